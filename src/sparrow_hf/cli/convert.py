"""`sparrow convert`: a checkpoint of the EAGLE family becomes a draft of this package."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import quiet_transformers


def convert(
    source: Annotated[str, typer.Argument(help="The checkpoint to convert: a folder, a weights file or a Hub id.")],
    target: Annotated[str, typer.Option(help="The target of the checkpoint: a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to write the converted draft to.")],
    subfolder: Annotated[str, typer.Option(help="Folder of the checkpoint inside its Hub repository.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of its Hub repository.")] = None,
    weights_only_bin: Annotated[
        bool,
        typer.Option("--weights-only-bin", help="Read pickled weights too, with torch's weights-only loader."),
    ] = False,
) -> None:
    """Converts an EAGLE-1/2, MSD, ViSpec or Sparrow checkpoint to a draft of this package.

    The draft gives the same logits at text positions.
    Prints what it leaves out.
    The exit code is 2 if the checkpoint holds an unknown tensor.
    """
    from ..conversion import convert_checkpoint
    from ..hub import refuse_to_replace

    quiet_transformers()
    refuse_to_replace(output)
    console = Console()
    with console.status("Converting"):
        conversion = convert_checkpoint(
            source, target, subfolder=subfolder, revision=revision, weights_only_bin=weights_only_bin
        )
        conversion.draft.save_pretrained(output)
    config = conversion.draft.config
    console.print(
        f"{config.num_hidden_layers} {config.block_type} layer(s), hidden size {config.hidden_size}, "
        f"input norm: {config.input_norm}, output norm: {config.output_norm}, FC bias: {config.fc_bias}, "
        f"positions: {config.position_mode}"
    )
    for name, why in sorted(conversion.dropped.items()):
        console.print(f"left out {name}: {why}", soft_wrap=True)
    for note in conversion.notes:
        console.print(note, soft_wrap=True)
    console.print(f"Written to {output}. Acceptance was not measured: try it with your target.", soft_wrap=True)

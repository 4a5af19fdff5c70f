"""`sparrow convert`: a draft of the EAGLE family becomes one of ours."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import errors_as_sentences, quiet_transformers


def convert(
    source: Annotated[str, typer.Argument(help="The draft: folder, weights file or Hub id.")],
    target: Annotated[str, typer.Option(help="Its target: folder or Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to write the converted draft to.")],
    subfolder: Annotated[str, typer.Option(help="Folder inside the draft's Hub repository.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the draft's repository.")] = None,
    weights_only_bin: Annotated[
        bool, typer.Option("--weights-only-bin", help="Read pickled weights too, with torch's weights-only loader.")
    ] = False,
) -> None:
    """Converts an EAGLE-1/2, MSD, ViSpec or Sparrow checkpoint to a draft of this package.

    The draft gives the same logits on text rows. Says what it leaves out; ends with 2 if it does not know a tensor.
    """
    with errors_as_sentences():
        from ..conversion import convert_checkpoint

        quiet_transformers()
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

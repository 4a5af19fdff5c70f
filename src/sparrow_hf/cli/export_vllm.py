"""`sparrow export-vllm`: the files of a draft that `sparrow-vllm` reads."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import quiet_transformers


def export_vllm(
    draft: Annotated[str, typer.Argument(help="The draft: a folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the exported draft to.")],
    target: Annotated[
        str | None, typer.Option(help="Its target, a folder or a Hub id (default: the one the draft names).")
    ] = None,
    glimpse_spacing: Annotated[
        str | None, typer.Option(help="Distances of the visual tokens that it reads (default: those the draft names).")
    ] = None,
) -> None:
    """Writes a draft as vLLM with sparrow-vllm reads it.

    Prints the --speculative-config to serve it with, for chains as deep as the draft's.
    The draft itself is not changed.
    """
    import json

    from ..configuration_sparrow import SparrowDraftConfig
    from ..export_vllm import export_vllm as export

    quiet_transformers()
    console = Console()
    with console.status("Exporting"):
        fields = export(draft, output, target, glimpse_spacing)
    sparrow = fields["sparrow"]
    if sparrow["method"] == "eagle":
        console.print("vLLM hands out no middle states of this target: no glimpse there.", soft_wrap=True)
    if sparrow["position_rule"]:
        console.print(f"Note: {sparrow['position_rule']}", soft_wrap=True)
    depth = SparrowDraftConfig.from_pretrained(draft).num_draft_levels
    if depth == 0:
        console.print("Note: this draft proposes nothing (num_draft_levels 0), and vLLM drafts at least one token.")
        depth = 1
    serve = {"method": sparrow["method"], "model": str(output), "num_speculative_tokens": depth}
    console.print(f"Written to {output}. Serve it with", soft_wrap=True)
    console.print(f"vllm serve TARGET --speculative-config '{json.dumps(serve)}'", soft_wrap=True, highlight=False)

"""All verbs of the `sparrow` command."""

from typing import Annotated

import typer

from .. import __version__
from .analyze import analyze
from .bench import bench
from .convert import convert
from .demo import demo
from .doctor import doctor
from .record import record
from .regenerate import regenerate
from .train import train
from .vocab import vocab

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparrow-hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Lossless speculative decoding for video LLMs."""


app.command()(demo)
app.command()(regenerate)
app.command()(record)
app.command(
    # The parser of the training's own arguments reads them, and knows what there is to be helped with.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)(train)
app.command()(vocab)
app.command()(convert)
app.command()(analyze)
app.command()(bench)
app.command()(doctor)

"""All verbs of the `sparrow` command."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import __version__
from .analyze import analyze
from .bench import bench
from .common import EXIT_CODES, Verb
from .convert import convert
from .demo import demo
from .doctor import doctor
from .export_vllm import export_vllm
from .generate import generate
from .record import record
from .regenerate import regenerate
from .train import train
from .tune import tune
from .vocab import vocab

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparrow-hf {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Lossless speculative decoding for video LLMs."""


def add(verb: Callable[..., None], **settings: Any) -> None:
    app.command(cls=Verb, epilog=EXIT_CODES, **settings)(verb)


add(generate)
add(demo)
add(regenerate)
add(record)
# The parser of the training's own arguments reads them, and knows what there is to be helped with.
add(train, context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
add(vocab)
add(convert)
add(export_vllm)
add(analyze)
add(bench)
add(tune)
add(doctor)

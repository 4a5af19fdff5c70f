"""`sparrow doctor`: what is installed here, and whether drafts can be used with it."""

import platform

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .common import BAD_INPUT, errors_as_sentences, quiet_transformers


def doctor() -> None:
    """Prints versions, which extras are installed, the state of the contract with transformers, and the devices.

    Ends with 2 if drafts cannot be used with the installed transformers. Put its output into a report of a fault.
    """
    with errors_as_sentences():
        import torch
        import transformers

        from .. import __version__
        from .._transformers import SUPPORTED_VERSIONS, TESTED_VERSIONS, contract_breaches
        from ..extras import EXTRAS, missing_packages

        quiet_transformers()
        breaches = contract_breaches()
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")

        def show(name: str, value: str) -> None:
            table.add_row(Text(name), Text(value))

        show("sparrow-hf", __version__)
        show("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
        show("torch", torch.__version__)
        show(
            "transformers",
            f"{transformers.__version__} (supported {SUPPORTED_VERSIONS}, tested {', '.join(TESTED_VERSIONS)})",
        )
        show("contract", "; ".join(breaches) or "kept: drafts can be used")
        for extra in EXTRAS:
            missing = missing_packages(extra)
            show(f"[{extra}]", f"without {', '.join(missing)}" if missing else "installed")
        show("devices", ", ".join(devices()))
        Console().print(table)
        if breaches:
            raise typer.Exit(BAD_INPUT)


def devices() -> list[str]:
    """Names of what torch computes on here, the CPU last."""
    import torch

    found = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({torch.get_num_threads()} threads)"]

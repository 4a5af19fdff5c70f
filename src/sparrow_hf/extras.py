"""Packages that are installed only if they are asked for, and the sentence that is said when they are missing."""

from importlib.util import find_spec

from .errors import MissingDependencyError

#: Extra in `pyproject.toml` → what its packages are imported as. The engine needs none of them.
EXTRAS = {
    "train": ("accelerate", "datasets", "peft", "tqdm", "yaml"),
    "cli": ("rich", "tqdm", "typer"),
    "video": ("PIL", "av", "tokenizers", "torchvision"),
    "plot": ("matplotlib",),
}


def missing_packages(extra: str) -> list[str]:
    """Import names of an extra's packages that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def require(extra: str, what: str, *packages: str) -> None:
    """Call it before the first import of an extra's packages.

    Args:
        extra: A key of `EXTRAS`.
        what: What needs it, as the subject of a sentence: "Reading videos".
        packages: Those of the extra that are needed; all by default.

    Raises:
        MissingDependencyError: A package that is needed is not installed.
    """
    if missing := [name for name in missing_packages(extra) if not packages or name in packages]:
        raise MissingDependencyError(
            f"{what} needs {' and '.join(missing)}, not installed here. In a clone of sparrow-hf, install what is "
            f'missing with: pip install ".[{extra}]"'
        )

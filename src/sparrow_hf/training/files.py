"""Files that are whole or absent, and the note in their folder that says how they were made."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TrainingDataError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, renamed at the end: whoever finds `path` finds all of it.

    Its name holds the process, so that processes may share a folder.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Removes what a killed process left half written."""
    for partial in folder.glob("*.partial"):
        partial.unlink(missing_ok=True)


def check_provenance(path: Path, provenance: dict[str, Any]) -> None:
    """Writes how the files beside `path` are made, or checks that those already there were made the same way.

    Raises:
        TrainingDataError: They were not; every difference is named.
    """
    if not path.exists():
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(provenance, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    wrong = [
        f"{name}: {found.get(name)!r}, now {value!r}" for name, value in provenance.items() if found.get(name) != value
    ]
    if wrong:
        raise TrainingDataError(
            f"{path.parent} holds files made differently ({'; '.join(wrong)}): choose another folder, or delete it"
        )


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint of a `Trainer` in a folder, or `None`.

    A process that was killed while saving leaves a checkpoint without the trainer's state, which is written last.
    """
    found = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    steps = {int(path.name.removeprefix("checkpoint-")): str(path) for path in found}
    return steps[max(steps)] if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True

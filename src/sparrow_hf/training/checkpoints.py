"""Finding the checkpoint that a training continues from."""

import json
import os
from pathlib import Path


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

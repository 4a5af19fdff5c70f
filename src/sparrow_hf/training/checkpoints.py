"""Checkpoints of a training: sealed with digests and settings when they are written, checked before one is resumed.

A `Trainer` writes the files of a checkpoint one after the other, its own state last. Then `digests.sha256` and
`training.json` (what decides the trained weights) are added. A process may be stopped in between, see
[`seal_checkpoint`]; earlier versions added neither.
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._transformers import uses_vllm_positions
from ..artifacts import check_made_alike, tensor_digest, write_json
from ..checksums import DIGESTS_FILE, Digests, digest_of_files, file_digest, read_json
from ..configuration_sparrow import SparrowDraftConfig
from ..data.datasets import data_files
from ..errors import TrainingOptionsError
from .recording import PROVENANCE_FILE, recorded_files

SETTINGS_FILE = "training.json"
_STATE_FILE = "trainer_state.json"
#: Any of these holds the weights of a checkpoint.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_NAME = re.compile(r"checkpoint-([0-9]+)")

#: Arguments of a training that decide where and how it runs and what is reported, but not the trained weights.
_NOT_COMPARED = re.compile(
    r"(logging|log|report|save|eval|hub|push_to_hub|trackio|dataloader|include|debug|do|ddp|torch_compile)(_.*)?"
    r"|output_dir|run_name|project|disable_tqdm|load_best_model_at_end|metric_for_best_model|greater_is_better"
    r"|per_device_eval_batch_size|batch_eval_metrics|prediction_loss_only|resume_from_checkpoint"
    r"|local_rank|use_cpu|skip_memory_metrics|restore_callback_states_from_checkpoint|(gradient|activation)_checkpointing(_kwargs)?|(bf16|fp16)_full_eval"
    r"|torch_empty_cache_steps|enable_jit_checkpoint|use_cache|max_steps|num_train_epochs|label_names"
    # A training that a bad row stopped goes on without it.
    r"|on_bad_row"
)
#: Arguments that the pattern above leaves out by their beginning, although they decide the weights.
_COMPARED = ("dataloader_drop_last",)
#: Fields of the draft that decide how it is named, saved, evaluated and decoded with, but not its trained weights: the
#: glimpse of a training step is drawn at random, and the target is compared by its digest.
_DRAFT_NOT_COMPARED = (
    *("transformers_version", "tensors_sha256", "_name_or_path"),
    *("target_name_or_path", "target_revision", "target_model_type"),
    *("num_tree_nodes", "num_draft_levels", "beam_width", "num_glimpse_tokens", "glimpse_spacing"),
)


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a `Trainer` in a folder that was written to its end, or `None`.

    A process that was killed while saving leaves a checkpoint without the trainer's state, which is written last.
    """
    steps = {
        int(found[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (found := _NAME.fullmatch(path.name)) and ((path / DIGESTS_FILE).exists() or _is_json(path / _STATE_FILE))
    }
    return str(steps[max(steps)]) if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


class RenewState(TrainerCallback):
    """Replaces what the state of a resumed training took from the first run although it may be another one now."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """How often is logged, evaluated and saved; and the path of the best checkpoint, which may be gone or another
        one's by now."""
        state.compute_steps(args, state.max_steps)
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


# -- writing ----------------------------------------------------------------------------------------------------------


class SealCheckpoints(TrainerCallback):
    """Seals every checkpoint when it is written.

    Attributes:
        settings: What decides the trained weights, see [`describe_training`].
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds settings and digests."""
        # Every process writes its random state.
        PartialState().wait_for_everyone()
        if args.should_save:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.settings)


def seal_checkpoint(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Writes the digests of a checkpoint's files, then the settings of the training, and then their digest.

    A training can be resumed from whatever a stop in between leaves:

        no digests, no settings              as a checkpoint of an earlier version, with a warning
        digests, no settings                 with a warning: the settings cannot be compared
        digests, settings without a digest   the settings are compared; they are written atomically

    Settings without digests are none of these: the digests were lost later.
    """
    digests = _digests_of(checkpoint)
    own = (DIGESTS_FILE, SETTINGS_FILE)
    digests.write([path for path in checkpoint.rglob("*") if path.is_file() and path.name not in own])
    write_json(checkpoint / SETTINGS_FILE, settings, indent=2)
    digests.add(checkpoint / SETTINGS_FILE)


def describe_training(trainer: Trainer, **sources: Any) -> dict[str, Any]:
    """What decides the trained weights, as JSON holds it: arguments, draft, target, and where the rows are from.

    Args:
        trainer: A [`SparrowTrainer`].
        sources: Further settings, digests of the rows among them.
    """
    draft: Any = trainer.model
    arguments = {
        name: value
        for name, value in trainer.args.to_dict().items()
        if name in _COMPARED or not _NOT_COMPARED.fullmatch(name)
    }
    configuration = {name: value for name, value in draft.config.to_dict().items() if name not in _DRAFT_NOT_COMPARED}
    settings = {
        "arguments": arguments,
        "steps": {"max_steps": trainer.args.max_steps, "num_train_epochs": trainer.args.num_train_epochs},
        "processes": trainer.args.world_size,
        # A stream is read in order.
        "streaming": not hasattr(trainer.train_dataset, "__len__"),
        "draft": configuration,
        "draft_dtype": str(draft.dtype),
        "vocabulary": None if draft.draft_to_target is None else tensor_digest({"ids": draft.draft_to_target}),
        "target_sha256": draft.target.sha256,
        # Checkpoints of earlier versions do not name it.
        "vllm_positions": uses_vllm_positions(draft.target.model) or None,
        **sources,
    }
    return json.loads(json.dumps(settings, default=str))


def digest_of_rows(source: str | os.PathLike[str]) -> str:
    """Digest of the rows at a path, wherever it is: of the files that are read, or of the digests beside them.

    Args:
        source: A file, or a folder: answers, a recording, files of rows, or one of `save_to_disk`. The name of a data
            set on the Hub stands for itself.
    """
    path = Path(source)
    if not path.exists():
        return str(source)
    if (path / DIGESTS_FILE).exists():
        return file_digest(path / DIGESTS_FILE)
    if (path / PROVENANCE_FILE).exists():
        return digest_of_files(path, recorded_files(path))
    # What else lies there, such as the checkpoints of a training, are no rows.
    return digest_of_files(path, [Path(file) for file in data_files(path)] or _saved_files(path))


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set that `save_to_disk` wrote, or of its splits; not what `datasets` adds later."""
    described = [*folder.glob("state.json"), *folder.glob("*/state.json")]
    return [
        state.parent / file["filename"] for state in described for file in json.loads(state.read_text())["_data_files"]
    ]


# -- checking ---------------------------------------------------------------------------------------------------------


def step_of(checkpoint: str | os.PathLike[str]) -> int:
    """How many steps were trained when a checkpoint was saved, from the name of its folder."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def check_checkpoint(checkpoint: str | os.PathLike[str], parts: Sequence[str] = ()) -> None:
    """Raises unless every part of a checkpoint is there, as it was written. No part is loaded.

    Args:
        checkpoint: The folder.
        parts: Names of files that must be among them, beside the weights and the trainer's state.

    Raises:
        TrainingOptionsError: A part is missing, damaged or from elsewhere; it is named.
    """
    folder = Path(checkpoint)
    digests = _digests_of(folder)
    if digests.known is None and (folder / SETTINGS_FILE).exists():
        raise TrainingOptionsError(f"{digests.path} is missing, although it was written: {_remedy(folder)}")
    digests.warn_without()
    digests.check_all()
    written = digests.known if digests.known is not None else {path.name for path in folder.iterdir()}
    if parts and not any(part in written for part in parts):
        # Those before it were saved in the same way.
        raise TrainingOptionsError(
            f"{folder} holds no {parts[0]}, as --save-only-model leaves it, so the training cannot go on as it was: "
            f"start another one from its weights with --warm-start {folder} and another --output"
        )
    for names in (WEIGHTS, *((part,) for part in (_STATE_FILE, *parts))):
        if not any(name in written for name in names):
            raise TrainingOptionsError(
                f"{folder / names[0]} is missing, or not in {DIGESTS_FILE}, so the training cannot go on as it was: "
                f"{_remedy(folder)}"
            )


def check_settings(checkpoint: str | os.PathLike[str], wanted: dict[str, Any]) -> None:
    """Compares the settings of a checkpoint with those of the training that is to go on from it.

    Warns if there is nothing to compare, and if the learning rate was planned for another number of steps.

    Args:
        checkpoint: The folder.
        wanted: From [`describe_training`].

    Raises:
        TrainingOptionsError: They differ in something that decides the weights, or cannot be read.
    """
    folder = Path(checkpoint)
    path = folder / SETTINGS_FILE
    digests = _digests_of(folder)
    if digests.lists(path):
        digests.check(path)
    elif not path.exists():
        if digests.known is not None:
            _warn_of_no_settings(f"{folder} has no {SETTINGS_FILE}, because the process was stopped when it saved")
        return
    found = read_json(path, TrainingOptionsError, _remedy(folder))
    if not found:
        _warn_of_no_settings(f"an earlier version has written no settings into {path}")
        return
    if isinstance(found.get("draft"), dict):
        # A field that its version did not have: `from_pretrained` takes it for the default, too.
        found["draft"] = json.loads(json.dumps(SparrowDraftConfig().to_dict(), default=str)) | found["draft"]
    # Versions of transformers differ in the arguments they know.
    shared = [name for name in wanted if name in found and name != "steps"]
    check_made_alike(
        folder,
        {name: _only_of(found[name], wanted[name]) for name in shared},
        {name: _only_of(wanted[name], found[name]) for name in shared},
        TrainingOptionsError,
        "--resume goes on with the options, rows and target of the first run; repeat them, or train on from its "
        "weights with --warm-start and another --output",
    )
    planned, steps = found.get("steps"), wanted.get("steps")
    if planned and steps and planned != steps and not wanted["arguments"]["lr_scheduler_type"].startswith("constant"):
        warnings.warn(
            f"the learning rate was planned for {planned}, and the training goes on with {steps}: its weights will be "
            "those of neither plan",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_no_settings(why: str) -> None:
    warnings.warn(
        f"{why}: nothing tells whether these are the options, rows and target of the first run",
        UserWarning,
        stacklevel=4,
    )


def _only_of(value: Any, other: Any) -> Any:
    """A setting; of one that is made of several, those that `other` has too."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {name: each for name, each in value.items() if name in other}


def _digests_of(checkpoint: Path) -> Digests:
    return Digests(checkpoint, TrainingOptionsError, _remedy(checkpoint))


def _remedy(checkpoint: Path) -> str:
    return f"delete the folder {checkpoint} and resume again, which goes on from the checkpoint before it"

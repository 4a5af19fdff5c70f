"""What `sparrow train` is told: one flat set of names, from a preset, then a YAML file, then the command line."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..errors import TrainingOptionsError
from .arguments import DRAFT_PRESETS, TRAINING_PRESETS, SparrowTrainingArguments

#: Options that are fields of [`SparrowDraftConfig`] too. Only what was said is passed on.
DRAFT_FIELDS = (
    "num_hidden_layers",
    "feature_layers",
    "visual_bridge_layer",
    "num_glimpse_tokens",
    "num_mtp_steps",
    "num_draft_levels",
    "position_mode",
    "project_visual",
)


@dataclass
class TrainingOptions:
    """Everything `sparrow train` needs besides [`SparrowTrainingArguments`]: target, rows, draft, and what to do.

    Paths are folders, files or Hub ids, as `from_pretrained` and [`load_rows`] take them.
    """

    target: str = field(metadata={"help": "The video LLM to draft for: folder or Hub id."})
    train: str = field(metadata={"help": "Rows to train on: answers, a recording, .jsonl, .parquet or a Hub dataset."})
    output: str = field(metadata={"help": "Folder of the finished draft; checkpoints go to its `checkpoints`."})
    held_out: str | None = field(
        default=None, metadata={"help": "Rows to measure on. They may share no video with the training rows."}
    )
    preset: Literal["default", "paper"] = field(default="default", metadata={"help": "The recipe to start from."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they come; needs --max-steps."})

    target_revision: str | None = field(default=None, metadata={"help": "Revision of the target on the Hub."})
    target_dtype: str = field(default="auto", metadata={"help": "Dtype of the target: auto, bfloat16, float32, …"})
    device: str | None = field(
        default=None, metadata={"help": "Where the target runs: cpu, cuda:1, …; auto spreads it over all GPUs."}
    )
    draft_dtype: str = field(default="float32", metadata={"help": "Dtype the draft is trained in."})

    warm_start: str | None = field(
        default=None, metadata={"help": "Start from the weights of this draft, with a new optimiser and schedule."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in the output folder."})
    lora: int | None = field(
        default=None, metadata={"help": "Train adapters of this rank on --warm-start instead of the whole draft."}
    )
    vocabulary: str | None = field(
        default=None, metadata={"help": "Draft only the tokens in this file of `sparrow vocab`."}
    )
    copy_last_layer: bool = field(
        default=False, metadata={"help": "Start the draft's layers as copies of the target's last ones."}
    )

    num_hidden_layers: int | None = field(default=None, metadata={"help": "Decoder layers of the draft."})
    feature_layers: list[int] | None = field(
        default=None, metadata={"help": "Target layers whose text states it reads; -1 is the post-norm state."}
    )
    visual_bridge_layer: int | None = field(default=None, metadata={"help": "Target layer of the visual rows."})
    num_glimpse_tokens: int | None = field(default=None, metadata={"help": "Visual rows kept when drafting."})
    num_mtp_steps: int | None = field(default=None, metadata={"help": "Passes over each training row."})
    num_draft_levels: int | None = field(default=None, metadata={"help": "Tokens per drafted chain."})
    position_mode: Literal["compact", "original"] | None = field(
        default=None, metadata={"help": "Positions of the draft's rows."}
    )
    project_visual: bool | None = field(default=None, metadata={"help": "Visual rows go through FC."})

    dry_run: bool = field(
        default=False, metadata={"help": "Print memory, disk and hours, from steps really taken, and leave."}
    )
    inspect: int | None = field(
        default=None, metadata={"help": "Show what the draft learns from in training row N, and leave."}
    )

    @property
    def draft_fields(self) -> dict[str, Any]:
        """Fields of the draft's configuration, as far as the preset or the user named them."""
        said = {name: getattr(self, name) for name in DRAFT_FIELDS if getattr(self, name) is not None}
        return DRAFT_PRESETS[self.preset] | said

    def __post_init__(self) -> None:
        if self.lora is not None and self.warm_start is None:
            raise TrainingOptionsError("--lora adapts an existing draft: name it with --warm-start")
        given = [name for name in (*DRAFT_FIELDS, "vocabulary") if getattr(self, name) is not None]
        if self.warm_start is not None and given:
            raise TrainingOptionsError(
                f"--warm-start takes the draft as it is; {', '.join(given)} can only be set for a new one"
            )


def parse_options(words: Sequence[str]) -> tuple[TrainingOptions, SparrowTrainingArguments]:
    """Reads the command line of `sparrow train`.

    Args:
        words: `--name value` pairs; names are those of [`TrainingOptions`] and [`SparrowTrainingArguments`], dashes
            or underscores alike. `--config FILE` names a flat YAML file of the same names. The command line goes
            before the file, the file before the preset.

    Raises:
        TrainingOptionsError: A name is unknown, a value has the wrong type, or something needed is missing.
    """
    words = [_with_underscores(word) for word in words]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    first.add_argument("--preset")
    parser = HfArgumentParser((TrainingOptions, SparrowTrainingArguments), allow_abbrev=False, add_help=False)
    try:
        known, rest = first.parse_known_args(words)
        config = _read_yaml(known.config) if known.config else {}
        preset = known.preset or config.get("preset", "default")
        if preset not in TRAINING_PRESETS:
            raise TrainingOptionsError(f"unknown preset {preset!r}; known: {', '.join(TRAINING_PRESETS)}")
        _set_defaults(parser, TRAINING_PRESETS[preset] | config | {"preset": preset})
        # argparse leaves with a code of its own where it cannot read a value.
        parser.error = _refuse
        namespace = parser.parse_args(rest)
    except argparse.ArgumentError as error:
        raise TrainingOptionsError(str(error)) from error
    values = vars(namespace)
    if values["output_dir"] is None:
        values["output_dir"] = str(Path(values["output"]) / "checkpoints")
    try:
        options = TrainingOptions(**_fields_of(TrainingOptions, values))
        arguments = SparrowTrainingArguments(**_fields_of(SparrowTrainingArguments, values))
    except ValueError as error:
        raise TrainingOptionsError(str(error)) from error
    return options, arguments


def describe_options() -> dict[str, list[tuple[str, str, str]]]:
    """What `sparrow train` can be told beyond transformers' own options: group → (option, default, help)."""
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    groups = {
        "what to train, and on what": dataclasses.fields(TrainingOptions),
        "how": [item for item in dataclasses.fields(SparrowTrainingArguments) if item.name not in inherited],
    }
    return {
        group: [
            (f"--{item.name.replace('_', '-')}", _default_of(item), str(item.metadata.get("help", "")))
            for item in fields
        ]
        for group, fields in groups.items()
    }


def _default_of(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required"
    return "" if item.default is None else str(item.default)


def _fields_of(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in dataclasses.fields(kind) if item.init}


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise TrainingOptionsError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise TrainingOptionsError(f"{file} must hold `name: value` lines and nothing nested")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def _set_defaults(parser: HfArgumentParser, values: dict[str, Any]) -> None:
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(values.keys() - actions.keys())
    if unknown:
        raise TrainingOptionsError(f"unknown options: {', '.join(unknown)}")
    for name, value in values.items():
        action = actions[name]
        action.required = False
        # argparse converts text only, and YAML reads 1e-4 as text.
        is_text = isinstance(value, str) and callable(action.type)
        action.default = parser._get_value(action, value) if is_text else value


def _refuse(message: str) -> None:
    raise TrainingOptionsError(message)

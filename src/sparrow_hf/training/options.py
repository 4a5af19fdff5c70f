"""The options of `sparrow train`: one flat set of names, from a preset, a YAML file and the command line."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..configuration_sparrow import SparrowDraftConfig
from ..errors import TrainingOptionsError
from .arguments import DRAFT_PRESETS, TRAINING_PRESETS, SparrowTrainingArguments
from .vocabulary import MIN_COVERAGE, REDUCED_SIZE

#: Options that are fields of [`SparrowDraftConfig`] too. Only those that were given are passed on.
DRAFT_FIELDS = (
    "num_hidden_layers",
    "feature_layers",
    "feature_norm",
    "visual_bridge_layer",
    "num_glimpse_tokens",
    "glimpse_spacing",
    "num_mtp_steps",
    "num_draft_levels",
    "position_mode",
    "project_visual",
)

#: Those whose default depends on the target or on another one: their help says it.
_WITHOUT_ONE_DEFAULT = ("feature_layers", "feature_norm", "visual_bridge_layer")

#: Names of options in the other verbs → what they are called here, where the draft has a dtype too.
ALIASES = {"dtype": "target_dtype"}


@dataclass
class TrainingOptions:
    """Options of `sparrow train` besides [`SparrowTrainingArguments`]: target, rows, draft, and what to do.

    Paths are folders, files or Hub ids, as `from_pretrained` and [`load_rows`] take them.
    """

    target: str = field(metadata={"help": "The video LLM to draft for: a folder or a Hub id."})
    train: str = field(
        metadata={
            "help": "Rows to train on: a folder of answers, a recording, a .jsonl, .json or .parquet file, a folder "
            "of them or one of save_to_disk, or a Hub id."
        }
    )
    output: str = field(
        metadata={"help": "Folder to write the draft to; checkpoints go into its subfolder `checkpoints`."}
    )
    held_out: str | None = field(
        default=None,
        metadata={
            "help": "Rows to evaluate on, at every checkpoint (--save-steps) unless --eval-strategy says when. They "
            "must not share a video, image or prompt with the training rows."
        },
    )
    preset: Literal["default", "paper"] = field(default="default", metadata={"help": "Recipe to start from."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the rows as a stream, in their order, instead of loading all of them; needs --max-steps."
        },
    )

    target_revision: str | None = field(default=None, metadata={"help": "Revision of the target on the Hub."})
    processor: str | None = field(
        default=None,
        metadata={"help": "Processor of the target, if it is in another folder or Hub repository."},
    )
    target_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the target: auto, float32, bfloat16 or float16. --dtype, as the other verbs call it, is "
            "the same option."
        },
    )
    device: str | None = field(
        default=None,
        metadata={
            "help": "cpu; or auto, which spreads the target over all GPUs. By default target and draft are on the "
            "first GPU that the process sees; CUDA_VISIBLE_DEVICES chooses it."
        },
    )
    vllm_positions: bool = field(
        default=False,
        metadata={
            "help": "Number the text after a video as vLLM does, for drafts of Qwen2-VL and Qwen2.5-VL that vLLM will "
            "serve."
        },
    )
    draft_dtype: str = field(default="float32", metadata={"help": "Dtype the draft is trained in."})

    warm_start: str | None = field(
        default=None,
        metadata={"help": "Draft whose weights the training starts from, with a new optimiser and schedule."},
    )
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint in the output folder."})
    lora: int | None = field(
        default=None,
        metadata={"help": "Rank of LoRA adapters to train on --warm-start, instead of training the whole draft."},
    )
    vocabulary: str | None = field(
        default=None,
        metadata={
            "help": "File of `sparrow vocab`; the draft proposes only the tokens in it. 'full': all tokens. By "
            f"default, a new draft for a target of {REDUCED_SIZE:,} tokens or more proposes the most frequent ones of "
            # Without a per cent sign, which argparse would take for a place to fill in.
            f"the training answers, if at least {MIN_COVERAGE:g} of the held-out answers' tokens are among them, else "
            "all."
        },
    )
    copy_last_layer: bool = field(
        default=False,
        metadata={
            "help": "Start the draft as the target's last layers: copied, and fed by a linear map that is fitted to "
            "some of the training rows."
        },
    )

    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of decoder layers of the draft."})
    feature_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Target layers whose text states the draft reads; -1 is the state after the final norm "
            "(default: an early, a middle, a late layer and -1)."
        },
    )
    feature_norm: bool | None = field(
        default=None,
        metadata={
            "help": "Bring the states of several feature layers to one length (default: where there are several)."
        },
    )
    visual_bridge_layer: int | None = field(
        default=None, metadata={"help": "Target layer whose visual states the draft reads; by default the middle one."}
    )
    num_glimpse_tokens: int | None = field(
        default=None, metadata={"help": "Number of visual tokens that the draft reads when it decodes."}
    )
    glimpse_spacing: Literal["even", "logarithmic"] | None = field(
        default=None,
        metadata={
            "help": "Distances of the visual tokens that the draft reads when it decodes: 'even', or 'logarithmic', "
            "which vLLM can follow too (`sparrow export-vllm`)."
        },
    )
    num_mtp_steps: int | None = field(
        default=None, metadata={"help": "Number of passes of the draft over each training row."}
    )
    num_draft_levels: int | None = field(
        default=None,
        metadata={
            "help": "Number of levels that the draft proposes in one round. With held-out rows, it is chosen at the "
            "end, unless it is given."
        },
    )
    position_mode: Literal["compact", "original"] | None = field(
        default=None,
        metadata={
            "help": "RoPE positions in the draft: 'compact' counts the draft's own sequence, 'original' keeps the "
            "prompt's."
        },
    )
    project_visual: bool | None = field(
        default=None, metadata={"help": "Pass visual states through the draft's FC, as text states."}
    )

    dry_run: bool = field(
        default=False,
        metadata={"help": "Measure a few steps, print the memory, disk space and hours of the training, and end."},
    )
    inspect: int | None = field(
        default=None, metadata={"help": "Show the inputs and labels that training row N gives to the draft, and end."}
    )

    @property
    def draft_fields(self) -> dict[str, Any]:
        """Fields of the draft's configuration that the preset or the user set."""
        said = {name: getattr(self, name) for name in DRAFT_FIELDS if getattr(self, name) is not None}
        return DRAFT_PRESETS[self.preset] | said

    def device_of(self, arguments: TrainingArguments) -> str | torch.device:
        """Where the target is loaded: where these arguments train, or spread over all GPUs."""
        return "auto" if self.device == "auto" else arguments.device

    def __post_init__(self) -> None:
        if self.lora is not None and self.warm_start is None:
            raise TrainingOptionsError("--lora adapts an existing draft: name it with --warm-start")
        layers = self.feature_layers
        if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
            raise TrainingOptionsError(
                f"feature_layers must be a list of layers' numbers, found {layers!r}: write it as [14, -1]"
            )
        given = [name for name in (*DRAFT_FIELDS, "vocabulary") if getattr(self, name) is not None]
        if self.warm_start is not None and given:
            raise TrainingOptionsError(
                f"--warm-start keeps its draft's configuration: leave out {', '.join(given)}, or train a new draft"
            )
        if self.warm_start is not None and self.copy_last_layer:
            raise TrainingOptionsError(
                "--warm-start starts from its draft's weights: leave out --copy-last-layer, or train a new draft"
            )


def parse_options(words: Sequence[str]) -> tuple[TrainingOptions, SparrowTrainingArguments]:
    """Reads the command line of `sparrow train`.

    Args:
        words: `--name value` pairs; names are those of [`TrainingOptions`] and [`SparrowTrainingArguments`], dashes
            or underscores alike. `--config FILE` names a flat YAML file of the same names. The command line replaces
            what the file sets, and the file what the preset sets.

    Raises:
        TrainingOptionsError: A name is unknown, a value has the wrong type, or something needed is missing.
    """
    words = [_with_field(word) for word in words]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    first.add_argument("--preset")
    parser = HfArgumentParser((TrainingOptions, SparrowTrainingArguments), allow_abbrev=False, add_help=False)
    try:
        known, rest = first.parse_known_args(words)
        config = _parsed(parser, _read_yaml(known.config)) if known.config else {}
        preset = known.preset or config.get("preset", "default")
        if preset not in TRAINING_PRESETS:
            raise TrainingOptionsError(f"unknown preset {preset!r}; known: {', '.join(TRAINING_PRESETS)}")
        # Whether to evaluate is decided below, unless it was said.
        _set_defaults(parser, {"eval_strategy": None} | TRAINING_PRESETS[preset] | config | {"preset": preset})
        # argparse would end the process with its own exit code where it cannot read a value.
        parser.error = _refuse
        namespace = parser.parse_args(rest)
    except argparse.ArgumentError as error:
        raise TrainingOptionsError(str(error)) from error
    values = vars(namespace)
    checkpoints = str(Path(values["output"]) / "checkpoints")
    if values["output_dir"] not in (None, checkpoints):
        raise TrainingOptionsError(
            f"--output-dir {values['output_dir']}: checkpoints are always in {checkpoints}, where --resume looks for "
            "them; leave this option out"
        )
    values["output_dir"] = checkpoints
    if values["resume_from_checkpoint"] is not None:
        raise TrainingOptionsError(
            "--resume-from-checkpoint: a training goes on from the last checkpoint of its output folder; give --resume"
        )
    if values["eval_strategy"] is None and values["held_out"] is not None:
        # Whenever a checkpoint is saved; which one is the best, evaluations every few steps tell.
        values["eval_strategy"] = "steps" if values["save_strategy"] == "best" else values["save_strategy"]
        values["eval_steps"] = values["eval_steps"] or values["save_steps"]
    values["eval_strategy"] = values["eval_strategy"] or "no"
    if values["device"] == "cpu":
        values["use_cpu"] = True
    try:
        options = TrainingOptions(**_fields_of(TrainingOptions, values))
        arguments = SparrowTrainingArguments(**_fields_of(SparrowTrainingArguments, values))
    except ValueError as error:
        raise TrainingOptionsError(str(error)) from error
    if options.device not in (None, "auto") and options.device != arguments.device.type:
        raise TrainingOptionsError(
            f"--device {options.device}: this training would run on the first {arguments.device.type} that its "
            "process sees. Leave this option out, and choose a GPU with CUDA_VISIBLE_DEVICES; or give cpu, or auto, "
            "which spreads the target over all GPUs"
        )
    return options, arguments


def describe_options() -> dict[str, list[tuple[str, str, str]]]:
    """Options of `sparrow train` that transformers does not have: group → (option, default, help)."""
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    groups = {
        "draft and data": dataclasses.fields(TrainingOptions),
        "training": [item for item in dataclasses.fields(SparrowTrainingArguments) if item.name not in inherited],
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
    if item.name in _WITHOUT_ONE_DEFAULT:
        return ""
    # What is not given here is what a new draft's configuration says.
    default = getattr(SparrowDraftConfig, item.name) if item.name in DRAFT_FIELDS else item.default
    return "" if default is None else str(default)


def _fields_of(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in dataclasses.fields(kind) if item.init}


def _field_of(name: str) -> str:
    """The field that an option's name means."""
    name = name.replace("-", "_")
    return ALIASES.get(name, name)


def _with_field(word: str) -> str:
    """A word of the command line, an option by the name of its field."""
    name, equals, value = word.partition("=")
    return f"--{_field_of(name.removeprefix('--'))}{equals}{value}" if word.startswith("--") else word


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingOptionsError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise TrainingOptionsError(f"{file} must hold `name: value` lines and nothing nested")
    return {_field_of(str(name)): value for name, value in found.items()}


def _parsed(parser: HfArgumentParser, values: dict[str, Any]) -> dict[str, Any]:
    """Values of a YAML file, read as the command line reads text. YAML has types of its own: `no` is false."""
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(values.keys() - actions.keys())
    if unknown:
        raise TrainingOptionsError(f"unknown options: {', '.join(unknown)}")
    hints = get_type_hints(TrainingOptions) | get_type_hints(SparrowTrainingArguments)

    def read(name: str, value: Any) -> Any:
        action, kinds = actions[name], _kinds_of(hints[name])
        if value is None and type(None) not in kinds:
            raise TrainingOptionsError(f"{name}: there is no value; leave the line out")
        if isinstance(value, bool) and bool not in kinds:
            raise TrainingOptionsError(
                f'{name}: YAML reads this value as {str(value).lower()}; if it is a word, such as "no", quote it'
            )
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, list):
            if list not in kinds:
                raise TrainingOptionsError(f"{name}: a single value is needed, found the list {value}")
            return [read_one(action, each) for each in value]
        return read_one(action, value)

    def read_one(action: argparse.Action, value: Any) -> Any:
        parsed = parser._get_value(action, str(value))
        parser._check_value(action, parsed)
        return parsed

    return {name: read(name, value) for name, value in values.items()}


def _kinds_of(hint: Any) -> set[Any]:
    """The types that a field may have, without those of what they hold."""
    if get_origin(hint) in (Union, UnionType):
        return {kind for each in get_args(hint) for kind in _kinds_of(each)}
    return {get_origin(hint) or hint}


def _set_defaults(parser: HfArgumentParser, values: dict[str, Any]) -> None:
    for action in parser._actions:
        if action.dest in values:
            action.required = False
            action.default = values[action.dest]


def _refuse(message: str) -> None:
    raise TrainingOptionsError(message)

"""Measures arms on prompts: every arm on every prompt, at several temperatures and seeds, in one process.

Each measured prompt is written to a run file at once, so a stopped benchmark can be continued.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel

from .._transformers import unwrap
from ..data.prepare import to_target
from ..draft_inputs import EVERY_VISUAL_TOKEN, visual_mask
from ..errors import BenchmarkError
from ..measurement import Arm, compare, num_rounds, warm_up
from ..modeling_sparrow import SparrowDraftModel
from ..target_config import visual_token_ids
from .provenance import provenance
from .run_file import RUN_FILE, RunFile

#: Fields of a draft's configuration that do not decide what it drafts, or that its arms name: see [`describe`].
_NOT_COMPARED = {
    *("architectures", "dtype", "tensors_sha256", "transformers_version", "target_name_or_path", "target_revision"),
    *("num_tree_nodes", "num_draft_levels", "beam_width", "num_glimpse_tokens"),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
        name: Unique among the prompts of the same length.
        length: Its group: requested visual tokens, maximum number of frames, or `None` for a single group.
        read: Decodes the video and runs the processor.
        task: The task or category it belongs to, for figures of each task.
    """

    name: str
    length: int | None
    read: Callable[[], BatchFeature]
    task: str | None = None


class Setting(NamedTuple):
    """One way to draw tokens; temperature 0 is greedy."""

    temperature: float
    seed: int


@dataclass
class Benchmark:
    """A benchmark: its arms, prompts and conditions.

    Args:
        name: Name of the benchmark and of its run file, so it must be a plain file name.
        target: The video LLM, in evaluation mode.
        arms: The first one is plain `generate()` (see [`~sparrow_hf.evaluation.arms.Arms`]).
        temperatures: 0 is greedy.
        seeds: Seeds of torch's global generator for sampled calls. Greedy text does not depend on them and is measured
            once, with the first.
        max_new_tokens: Maximum length of an answer.
        shared_prefill: Compute the prompt once for all arms (see
            [`~sparrow_hf.prefill.PrefillSnapshot`]).
        repeats: How often each arm answers each prompt; its median call counts (see
            [`~sparrow_hf.measurement.compare`]).
        is_content: Whether a token id belongs to a content word, for the split of acceptance.
        conditions: Further conditions that must not change between two runs, JSON types: digests of the weights,
            source and sampling of the prompts.
        command: The command that makes these measurements, recorded with each; the running command by default.
        tokenizer: The target's, for targets whose `generation_config` has stop strings.

    Raises:
        BenchmarkError: There is nothing to measure, or the name is not a file name.
    """

    name: str
    target: PreTrainedModel
    arms: Sequence[Arm]
    prompts: Sequence[Prompt]
    temperatures: Sequence[float] = (0.0,)
    seeds: Sequence[int] = (0,)
    max_new_tokens: int = 320
    shared_prefill: bool = False
    repeats: int = 1
    is_content: Callable[[int], bool] | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise BenchmarkError(f"a benchmark's name is that of a file in the folder of runs, found {self.name!r}")
        if not self.prompts or not self.temperatures or not self.seeds or self.repeats < 1:
            raise BenchmarkError("a benchmark needs at least one prompt, one temperature, one seed and one repeat")
        self.conditions = self.conditions | {
            # With what they are made of: a name may leave tree and glimpse to the draft's configuration. Through JSON,
            # as they come back from the run file.
            "arms": json.loads(json.dumps({arm.name: describe(arm) for arm in self.arms})),
            "max_new_tokens": self.max_new_tokens,
            "shared_prefill": self.shared_prefill,
            # Files of single calls, as there have been before there were repeats, do not name them.
            "repeats": self.repeats if self.repeats > 1 else None,
        }

    @property
    def settings(self) -> list[Setting]:
        """Temperatures and seeds that every prompt is measured at, each once however often it was named."""
        return list(
            dict.fromkeys(
                Setting(temperature, seed)
                for temperature in self.temperatures
                for seed in (self.seeds if temperature > 0 else self.seeds[:1])
            )
        )

    @property
    def drafts(self) -> dict[str, Any]:
        """The configuration of each draft, under the name of the first arm that drafts with it."""
        first: dict[int, Arm] = {}
        for arm in self.arms:
            if arm.draft is not None and arm.num_draft_levels:
                first.setdefault(id(arm.draft), arm)
        return {arm.name: configuration(arm.draft) for arm in first.values() if arm.draft is not None}

    @property
    def calls_per_prompt(self) -> int:
        """Calls of `generate()` that measuring one prompt at one setting takes, the warm-up left out."""
        return sum(num_rounds(arm, self.repeats, self.shared_prefill) for arm in self.arms)

    def open_runs(self, folder: Path) -> RunFile:
        """The file of this benchmark's measurements in a folder, with those that were made before.

        Raises:
            BenchmarkError: They were made under other conditions.
        """
        return RunFile(folder / f"{self.name}{RUN_FILE}", self.conditions, {"drafts": self.drafts})

    def missing(self, runs: RunFile) -> Iterator[tuple[Prompt, list[Setting]]]:
        """Prompts that are not measured yet, each with the settings it still needs."""
        for prompt in self.prompts:
            settings = [setting for setting in self.settings if not runs.done(**_key(prompt, setting))]
            if settings:
                yield prompt, settings

    def measure(self, runs: RunFile) -> None:
        """Measures what is missing, one line per prompt and setting.

        Raises:
            VideoError: A video cannot be read; what was measured before it stays.
        """
        command = {} if self.command is None else {"command": self.command}
        details = provenance(self.target, **command, **self.conditions, drafts=self.drafts)
        todo = list(self.missing(runs))
        is_warm = False
        with tqdm(total=sum(len(settings) for _, settings in todo), desc=self.name, unit="prompt") as progress:
            for prompt, settings in todo:
                inputs = to_target(prompt.read(), self.target)
                if not is_warm:
                    warm_up(
                        self.target,
                        self.arms,
                        inputs,
                        self.generate_arguments(settings[0].temperature),
                        shared_prefill=self.shared_prefill,
                    )
                    is_warm = True
                for setting in settings:
                    measured = compare(
                        self.target,
                        self.arms,
                        inputs,
                        self.generate_arguments(setting.temperature),
                        # The number of existing lines seeds the order of the next, so a continued run repeats none.
                        turn=len(runs.lines),
                        seed=setting.seed,
                        repeats=self.repeats,
                        shared_prefill=self.shared_prefill,
                        is_content=self.is_content,
                    )
                    runs.append(
                        {"benchmark": self.name, "family": unwrap(self.target).config.model_type}
                        | _key(prompt, setting)
                        | ({} if prompt.task is None else {"task": prompt.task})
                        | {
                            "visual_tokens": count_visual_tokens(self.target, inputs["input_ids"]),
                            "arms": self.conditions["arms"],
                            "runs": {arm: asdict(run) for arm, run in measured.items()},
                            "provenance": details,
                        }
                    )
                    progress.update()

    def generate_arguments(self, temperature: float) -> dict[str, Any]:
        """Arguments of `generate()` that all arms get: greedy, or the target's plain distribution at a temperature.

        Repetition penalty and nucleus sampling of the target's `generation_config` are off.
        """
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": temperature > 0,
            "repetition_penalty": 1.0,
            "tokenizer": self.tokenizer,
        }
        if temperature > 0:
            # A min_p of 0 changes nothing, but would sort the vocabulary at every token.
            arguments |= {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
        return arguments


def _key(prompt: Prompt, setting: Setting) -> dict[str, Any]:
    return {"prompt": prompt.name, "length": prompt.length} | setting._asdict()


def describe(arm: Arm) -> dict[str, Any]:
    """The tree `[nodes, levels, beam]` of an arm and its glimpse (`None`: it has none), and how the target runs."""
    tree, glimpse = arm.tree, arm.num_glimpse_tokens
    if arm.draft is not None and arm.num_draft_levels:
        tree = arm.draft.config.tree_shape if tree is None else tree
        glimpse = arm.draft.config.num_glimpse_tokens if glimpse is None else glimpse
    told = {"tree": tree, "glimpse": "all" if glimpse == EVERY_VISUAL_TOKEN else glimpse}
    # Named where they are not plain `generate()`'s only: files of earlier versions do not know them.
    if arm.attention is not None:
        told["attention"] = arm.attention
    if arm.is_compiled:
        told["compiled"] = True
    return told


def configuration(draft: SparrowDraftModel) -> dict[str, Any]:
    """What decides what a draft drafts beside its weights, its tree and its glimpse, as JSON holds it."""
    fields = draft.config.to_diff_dict().items()
    return json.loads(json.dumps({name: value for name, value in fields if name not in _NOT_COMPARED}))


def count_visual_tokens(target: PreTrainedModel, input_ids: Tensor) -> int:
    """Number of image and video placeholders in a prompt."""
    return int(visual_mask(input_ids, visual_token_ids(unwrap(target).config)).sum())

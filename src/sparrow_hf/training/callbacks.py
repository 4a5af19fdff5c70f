"""`DecodingCallback`: decodes held-out prompts during training, and logs the figures with the evaluation's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.messages import ROW_INDEX
from ..data.prepare import kind_of, to_target, tokenizer_of
from ..errors import TrainingDataError
from ..measurement import PLAIN, Arm, compare
from ..metrics import Run, acceptance, decoded, speed
from ..modeling_sparrow import SparrowDraftModel
from .data import SparrowDataCollator, as_row
from .trainer import SparrowTrainer


class DecodingCallback(TrainerCallback):
    """Generates on held-out prompts at every evaluation, plain and with the draft, and logs what [`decode`] measures.

    Evaluation itself is teacher-forced on known answers (`eval_tau`, `eval_k`, `eval_accepted_j`). With a chain, and
    on the same rows with greedy answers of the target of at most `max_new_tokens`, the two must agree up to the last
    round of each answer; if they do not, training and decoding read different positions. The figures are also added
    to the metrics of the trainer: with `metric_for_best_model="decoded_tau"`, `load_best_model_at_end` ends with the
    best draft. `save_strategy="best"` keeps its checkpoint, and alone ends with the last draft.

    Training is not affected: the random state and the draft's mode are restored. Of several processes only the main
    one generates.

        trainer.add_callback(DecodingCallback(trainer, rows))

    Args:
        trainer: The trainer this is added to.
        rows: Prompts, each generated twice per evaluation: rows with `messages`, read as the trainer's collator reads
            them (an answer they hold is left out), what the target's processor returned for one prompt, or processed
            conversations. A bad row is left out if the collator would leave it out of training.
        max_new_tokens: Maximum length of an answer.
        settings: Further arguments of `generate()`; greedy by default.

    Raises:
        TrainingDataError: There is no row.
    """

    #: See [`SparrowTrainer.add_callback`]: early stopping may go by these figures.
    adds_metrics = True

    def __init__(
        self, trainer: SparrowTrainer, rows: Sequence[Mapping[str, Any]], max_new_tokens: int = 256, **settings: Any
    ):
        if not len(rows):
            raise TrainingDataError("decoding needs at least one held-out row, found none")
        self.trainer = trainer
        self.rows = rows
        own = {"do_sample": False, "max_new_tokens": max_new_tokens}
        self.settings = own | {"tokenizer": tokenizer_of(collator_of(trainer).processor)} | settings

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Decodes, adds the figures to `metrics` under `eval_…` and logs them."""
        figures: list[dict[str, float]] = [{}]
        if state.is_world_process_zero:
            rows = tqdm(self.rows, desc="decoding", leave=False, disable=args.disable_tqdm)
            prompts = self._prompts(rows)
            if (first := next(prompts, None)) is not None:
                figures = [decode(self.trainer.draft, chain([first], prompts), self.settings, args.seed)]
        if args.world_size > 1:
            # Every process decides which checkpoint is the best one, so every process must know.
            broadcast_object_list(figures)
        named = {f"eval_{name}": value for name, value in figures[0].items()}
        metrics.update(named)
        self.trainer.log(named)

    def prompts(self) -> Iterator[Mapping[str, Tensor]]:
        """The held-out prompts, prepared as they are when they are decoded."""
        return self._prompts(self.rows)

    def _prompts(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Tensor]]:
        """Prepares rows as training does: the same folder, frames and treatment of bad rows."""
        collator = collator_of(self.trainer)
        for row in rows:
            try:
                prompt = collator.prepare_prompt(row)
            except TrainingDataError as error:
                # Rows of states are good for training but hold no pixels, so they raise here and are never skipped.
                if kind_of(as_row(row)) == "states" or not collator.may_skip(row):
                    raise
                self.trainer.report_skipped([(as_row(row).get(ROW_INDEX), str(error))])
            else:
                yield prompt


def decode(
    draft: SparrowDraftModel, prompts: Iterable[Mapping[str, Tensor]], settings: dict[str, Any], seed: int = 0
) -> dict[str, float]:
    """Generates every prompt plain and with the draft, with the tree its configuration names.

    Args:
        draft: A draft bound to its target.
        prompts: What the target's processor returned, one prompt at a time.
        settings: Further arguments of `generate()`.
        seed: Of torch's global generators, for sampling; they are put back afterwards, as is the draft's mode.

    Returns:
        Pooled over all rounds: `decoded_tau`, tokens per target forward after the prefill; `decoded_k`, accepted
        drafts per round; `decoded_accepted_j` = P(k ≥ j). `identical`: share of the prompts whose tokens are plain
        `generate()`'s. `dsr`: median over prompts of plain over speculative seconds per token after the prefill; left
        out if no answer got past its first token.
    """
    target = draft.target.model
    arms = [Arm(PLAIN), Arm("draft", draft)]
    runs: dict[str, list[Run]] = {arm.name: [] for arm in arms}
    with evaluation_mode(draft):
        for turn, prompt in enumerate(prompts):
            inputs = to_target(prompt, target)
            for name, run in compare(target, arms, inputs, settings, turn, seed).items():
                runs[name].append(run)
    plain, drafted = runs.values()
    taken = acceptance(drafted)
    figures = {
        "decoded_tau": taken.tau,
        "decoded_k": taken.k,
        **{f"decoded_accepted_{j}": share for j, share in enumerate(taken.per_position, start=1)},
        "identical": sum(run.differs_at is None for run in drafted) / len(drafted),
    }
    plain, drafted = decoded(plain, drafted)
    return figures | ({"dsr": speed(plain, drafted).dsr.median} if drafted else {})


def figures_of(levels: int) -> set[str]:
    """Names of the figures that [`decode`] gives of a draft with so many levels."""
    return {"decoded_tau", "decoded_k", "identical", "dsr", *(f"decoded_accepted_{j + 1}" for j in range(levels))}


@contextmanager
def evaluation_mode(draft: SparrowDraftModel) -> Iterator[None]:
    """Evaluation mode for the draft and a separate random state; both are restored afterwards, also on an error."""
    was_training = draft.training
    draft.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        draft.train(was_training)


def collator_of(trainer: SparrowTrainer) -> SparrowDataCollator:
    """What reads a trainer's conversations: its own collator, or one made of its arguments if that one reads none."""
    collator = trainer.data_collator
    if isinstance(collator, SparrowDataCollator) and collator.processor is not None:
        return collator
    args = trainer.args
    return SparrowDataCollator(
        trainer.processing_class, on_bad_row=args.on_bad_row, fps=args.fps, max_frames=args.max_frames
    )

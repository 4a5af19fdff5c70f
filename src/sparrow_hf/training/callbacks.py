"""Watching a draft learn: it decodes held-out prompts, and the result stands beside the teacher-forced figures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm
from transformers import (
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..errors import TrainingDataError
from ..measurement import PLAIN, Arm, compare
from ..metrics import Run, acceptance, speed
from ..modeling_sparrow import SparrowDraftModel
from .trainer import SparrowTrainer


class DecodingCallback(TrainerCallback):
    """Generates on held-out prompts at every evaluation, plain and with the draft, and logs what [`decode`] measures.

    Evaluation itself is teacher-forced: it walks along recorded text (`eval_tau`, `eval_k`, `eval_accepted_j`). On
    greedy text of the target, with a chain, the two must agree up to the last round of each answer; if they do not,
    training and decoding see different rows. The figures are also put into the metrics the trainer sees, so
    `metric_for_best_model="decoded_tau"` with `load_best_model_at_end` or `save_strategy="best"` keeps the best draft.

    Training goes on as if nothing had happened: random streams and the draft's mode are put back. Of several
    processes only the main one generates.

        trainer.add_callback(DecodingCallback(trainer, rows))

    Args:
        trainer: The trainer this is added to.
        rows: Prompts, each generated twice per evaluation: rows with `messages` (an answer they hold is left out),
            what the target's processor returned for one prompt, or processed conversations.
        max_new_tokens: Longest answer.
        settings: Anything else `generate()` takes; greedy by default.

    Raises:
        TrainingDataError: There is no row.
    """

    def __init__(
        self, trainer: SparrowTrainer, rows: Sequence[Mapping[str, Any]], max_new_tokens: int = 256, **settings: Any
    ):
        if not len(rows):
            raise TrainingDataError("decoding needs at least one held-out row, found none")
        self.trainer = trainer
        self.rows = rows
        self.settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | settings

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
            prompts = (prompt_of(row, self.trainer.processing_class) for row in rows)
            figures = [decode(self.trainer.draft, prompts, self.settings, args.seed)]
        if args.world_size > 1:
            # Every process decides which checkpoint is the best one, so every process must know.
            broadcast_object_list(figures)
        named = {f"eval_{name}": value for name, value in figures[0].items()}
        metrics.update(named)
        self.trainer.log(named)


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
            inputs = {name: value.to(target.device) for name, value in prompt.items()}
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
    decoded = [pair for pair in zip(plain, drafted, strict=True) if all(run.decode_tokens for run in pair)]
    return figures | ({"dsr": speed(*zip(*decoded, strict=True)).dsr.median} if decoded else {})


@contextmanager
def evaluation_mode(draft: SparrowDraftModel) -> Iterator[None]:
    """The draft in evaluation mode and random streams of their own; both as before afterwards, come what may."""
    was_training = draft.training
    draft.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        draft.train(was_training)


def prompt_of(row: Mapping[str, Any], processor: ProcessorMixin | None) -> dict[str, Tensor]:
    """The processed prompt of a row, without the answer if it holds one.

    Raises:
        TrainingDataError: The row is a recording, which holds no pixels, or has messages and there is no processor.
    """
    if "text_states" in row:
        raise TrainingDataError(
            "a recorded row holds no pixels, so the target cannot answer it: give the callback rows with 'messages', "
            "or what the processor returned"
        )
    if "input_ids" in row:
        shape, end = row["input_ids"].shape, row.get("answer_start")
        return {
            name: value[:, :end] if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in row.items()
            if name != "answer_start"
        }
    if processor is None:
        raise TrainingDataError("rows with 'messages' need the target's processor: SparrowTrainer(processing_class=…)")
    from ..video import prepare_inputs

    messages = list(row["messages"])
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return dict(prepare_inputs(processor, messages))

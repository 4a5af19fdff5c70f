"""The inputs of the trainer: conversations, or the frozen target's states of them.

A dataset row is one of three dictionaries (see [`~sparrow_hf.data.kind_of`]), and the collator takes any mix:

* a conversation of any dialect (see [`~sparrow_hf.data.clean_messages`]): the assistant turns at its end are the
  answer, unless the row has an `answer` (text) or `answer_ids` (the exact tokens the target wrote); `load_rows` reads
  them;
* a processed conversation: `answer_start` and the tensors of the target's processor for this one conversation, batch
  dimension included, with the answer's ids appended (see [`~sparrow_hf.data.append_answer`]);
* a [`TrainingStates`]: the target's states, computed before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from ..data.messages import ROW_ERROR, ROW_INDEX, naming_row
from ..data.prepare import kind_of, prepare_conversation, prepare_prompt
from ..data.sources import shown
from ..draft_inputs import DraftPositions, draft_positions, visual_mask
from ..errors import SparrowError, TrainingDataError
from ..hidden_states import HiddenStateCollector
from ..modeling_sparrow import SparrowDraftModel


@dataclass
class TrainingStates:
    """The frozen target's states of one sample: all that training a draft needs.

    Attributes:
        input_ids: `(L,)` prompt and answer, placeholders included.
        answer_start: Index in `input_ids` of the answer's first token.
        text_states: `(N, n·H)` states of the text positions, the feature layers side by side.
        last_states: `(N, H)` post-norm states of the text positions, which the target's head reads.
        visual_rows: `(V,)` indices in `input_ids` of the visual positions that were kept.
        visual_states: `(V, H)` states of the bridge layer at these positions.
    """

    input_ids: Tensor
    answer_start: int
    text_states: Tensor
    last_states: Tensor
    visual_rows: Tensor
    visual_states: Tensor

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "TrainingStates":
        """The states in a dictionary of the same names."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def to_row(self) -> dict[str, Any]:
        """A dictionary of the same names, as in a dataset and in the collator's output."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@torch.no_grad()
def read_with_target(
    draft: SparrowDraftModel, sample: Mapping[str, Any], positions: DraftPositions | None = None
) -> TrainingStates:
    """Runs the frozen target over one processed conversation and keeps what training needs.

    Samples are processed one by one and never padded together, so a recording is bit-identical to running the target
    during training.

    Args:
        draft: A draft bound to the target.
        sample: Processed conversation (see the module's docstring), on the target's device.
        positions: Where to keep states; by default all text and all visual tokens, as a recording needs them.

    Raises:
        TrainingDataError: The prompt has visual placeholders but no pixels, or the answer is too short or not text.
    """
    config, view = draft.config, draft.target
    check_processed(sample, config.visual_token_ids or [])
    input_ids = sample["input_ids"][0]
    inputs = {name: value for name, value in sample.items() if name != "answer_start"}
    if positions is None:
        positions = draft_positions(input_ids, config.visual_token_ids or [], num_glimpse_tokens=len(input_ids))
    bridge, text_layers = config.bridge_layer_id, (*config.feature_layer_ids, config.target_num_hidden_layers)
    wanted = positions.to_collect(text_layers, bridge)
    collector = HiddenStateCollector(wanted)
    with collector.active():
        # The logits are computed from the collected states later, and only at positions with a loss.
        view.model(**inputs, use_cache=False, logits_to_keep=1)
    states = {layer: collector.take(layer) for layer in wanted}
    text_states, visual_states = positions.by_kind(states, text_layers, bridge)
    return TrainingStates(
        input_ids=input_ids,
        answer_start=int(sample["answer_start"]),
        text_states=torch.cat([text_states[layer][0] for layer in config.feature_layer_ids], dim=-1),
        last_states=text_states[config.target_num_hidden_layers][0],
        visual_rows=positions.visual,
        visual_states=visual_states[0],
    )


def check_processed(sample: Mapping[str, Any], visual_token_ids: list[int]) -> None:
    """Raises [`TrainingDataError`] unless a processed conversation can be read: an answer, and pixels where needed."""
    input_ids = sample["input_ids"][0]
    check_sample(input_ids, int(sample["answer_start"]), visual_token_ids)
    has_pixels = any(name.startswith("pixel_values") for name in sample)
    if not has_pixels and visual_mask(input_ids, visual_token_ids).any():
        raise TrainingDataError(
            "the prompt holds visual placeholders but the sample has no pixel values: the target would read text "
            "embeddings in their place. Give the collator the messages with their videos, or drop the row."
        )


def check_sample(input_ids: Tensor, answer_start: int, visual_token_ids: list[int]) -> None:
    """Raises [`TrainingDataError`] unless the `(L,)` ids end in an answer of at least two text tokens."""
    answer = input_ids[answer_start:]
    if not 0 < answer_start < len(input_ids) - 1:
        raise TrainingDataError(
            f"the answer must have at least 2 tokens and follow a prompt: answer_start is {answer_start} of "
            f"{len(input_ids)} tokens (the first answer token is never drafted)"
        )
    if visual_mask(answer, visual_token_ids).any():
        raise TrainingDataError("the answer holds visual placeholders; only prompts may")


class SparrowDataCollator:
    """Turns dataset rows into `{"samples": [...], "places": [...], "skipped": [...]}`: one unpadded sample per good
    row, and its place among the rows.

    The draft's short sequences are padded after the target has run; videos are never padded.

    Args:
        processor: The target's processor; needed for rows that hold `messages`.
        visual_token_ids: Placeholder ids of the target (`draft.config.visual_token_ids`): rows with placeholders but
            no pixels, or with placeholders in their answer, are then found here, before the target reads them.
        on_bad_row: `"refuse"` raises at the first bad row; `"skip"` leaves it out and lists it under `"skipped"`, as
            `(index of the row, reason)`. A batch may then be empty.
        fps, max_frames: Sampling of video files, see [`~sparrow_hf.data.prepare_inputs`]. A row's own `fps` and
            `max_frames`, which regenerated rows have, take precedence.

    Raises:
        TrainingDataError: A row is bad, and bad rows are to be refused; the row's index is named.
    """

    def __init__(
        self,
        processor: ProcessorMixin | None = None,
        visual_token_ids: Sequence[int] | Tensor | None = None,
        on_bad_row: Literal["refuse", "skip"] = "refuse",
        fps: float | None = None,
        max_frames: int | None = None,
    ):
        self.processor = processor
        self.visual_token_ids = [] if visual_token_ids is None else [int(token) for token in visual_token_ids]
        self.on_bad_row = on_bad_row
        self.fps = fps
        self.max_frames = max_frames

    def __call__(self, rows: Sequence[Mapping[str, Any] | TrainingStates]) -> dict[str, list[Any]]:
        samples, places, skipped = [], [], []
        for place, row in enumerate(rows):
            try:
                samples.append(self.prepare(row))
                places.append(place)
            except TrainingDataError as error:
                if not self.may_skip(row):
                    raise
                skipped.append((as_row(row).get(ROW_INDEX), str(error)))
        return {"samples": samples, "places": places, "skipped": skipped}

    def may_skip(self, row: Mapping[str, Any] | TrainingStates) -> bool:
        """Whether the bad row `row` is left out; never without a processor, because then the collator is at fault."""
        return self.on_bad_row == "skip" and (self.processor is not None or kind_of(as_row(row)) != "messages")

    def prepare(self, row: Mapping[str, Any] | TrainingStates) -> dict[str, Any]:
        """The sample of one row.

        Raises:
            TrainingDataError: The row is bad; its index is named if it has one.
        """
        row = as_row(row)
        with naming_row(row.get(ROW_INDEX)):
            if kind_of(row) == "states":
                sample = dict(row)
                check_sample(sample["input_ids"], int(sample["answer_start"]), self.visual_token_ids)
            else:
                sample = prepare_conversation(self.processor, row, self.fps, self.max_frames)
                check_processed(sample, self.visual_token_ids)
            return sample

    def prepare_prompt(self, row: Mapping[str, Any] | TrainingStates) -> BatchFeature:
        """The prompt of the sample that [`prepare`] makes of a row, see [`~sparrow_hf.data.prepare_prompt`].

        Raises:
            TrainingDataError: The row is bad, or holds no pixels; its index is named if it has one.
        """
        row = as_row(row)
        with naming_row(row.get(ROW_INDEX)):
            return prepare_prompt(self.processor, row, self.fps, self.max_frames)


def as_row(row: Mapping[str, Any] | TrainingStates) -> Mapping[str, Any]:
    """The dictionary of a row, whichever way it is held; of what is no row, one that says so when it is read."""
    if isinstance(row, TrainingStates):
        return row.to_row()
    return row if isinstance(row, Mapping) else {ROW_ERROR: f"a row must be a dictionary, found {shown(row)}"}


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Errors of this package in the workers of a data loader, with their own sentence.

    torch raises them with the worker's whole traceback as their message; its last line is the error itself.
    """
    try:
        yield
    except SparrowError as error:
        name = f"\n{type(error).__module__}.{type(error).__qualname__}: "
        told, found, sentence = str(error).rpartition(name)
        if not (found and " in DataLoader worker process " in told):
            raise
        raise type(error)(sentence.strip()) from error

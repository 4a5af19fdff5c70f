"""What the trainer is fed: conversations, or what the frozen target made of them.

A dataset row is one of three dictionaries, and the collator takes any mix of them:

* a conversation: `messages` (the last turn is the answer), or `messages` and `answer` (text) or `answer_ids` (the very
  tokens the target wrote);
* a processed conversation: `answer_start` and the tensors of the target's processor for this one conversation, batch
  dimension included, with the answer's ids appended (see [`append_answer`]);
* a [`TrainingStates`]: the target has read it already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from ..errors import TrainingDataError
from ..hidden_states import HiddenStateCollector
from ..modeling_sparrow import SparrowDraftModel
from ..rows import DraftRows, draft_rows, visual_mask


@dataclass
class TrainingStates:
    """One sample after the frozen target has read it: all that training a draft needs of it.

    Attributes:
        input_ids: `(L,)` prompt and answer, placeholders included.
        answer_start: Index in `input_ids` of the answer's first token.
        text_states: `(N, n·H)` states of the text rows, the feature layers side by side.
        last_states: `(N, H)` post-norm states of the text rows; what the target's head reads.
        visual_rows: `(V,)` indices in `input_ids` of the visual rows that were kept.
        visual_states: `(V, H)` states of the bridge layer in these rows.
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
        """A dictionary of the same names: what a dataset holds and the collator hands on."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@torch.no_grad()
def read_with_target(
    draft: SparrowDraftModel, sample: Mapping[str, Any], rows: DraftRows | None = None
) -> TrainingStates:
    """Runs the frozen target over one processed conversation and keeps what training needs.

    Samples are read one by one, never padded together: a recording then equals what training on the fly sees, to the
    last bit.

    Args:
        draft: A draft bound to the target.
        sample: Processed conversation (see the module's docstring), on the target's device.
        rows: Rows to keep; by default all text rows and all visual rows, as a recording needs them.

    Raises:
        TrainingDataError: The prompt has visual placeholders but no pixels, or the answer is too short or not text.
    """
    config, view = draft.config, draft.target
    input_ids = sample["input_ids"][0]
    check_sample(input_ids, int(sample["answer_start"]), config.visual_token_ids or [])
    inputs = {name: value for name, value in sample.items() if name != "answer_start"}
    has_pixels = any(name.startswith("pixel_values") for name in inputs)
    if not has_pixels and visual_mask(input_ids, config.visual_token_ids or []).any():
        raise TrainingDataError(
            "the prompt holds visual placeholders but the sample has no pixel values: the target would read text "
            "embeddings in their place. Give the collator the messages with their videos, or drop the row."
        )
    if rows is None:
        rows = draft_rows(input_ids, config.visual_token_ids or [], num_glimpse_tokens=len(input_ids))
    last, bridge = config.target_num_hidden_layers, int(config.visual_bridge_layer or 0)
    wanted: dict[int, Tensor | None] = dict.fromkeys((*config.feature_layer_ids, last), rows.text)
    # A layer that is both feature and bridge is kept in both kinds of rows, no other one in more than it is read in.
    bridge_is_feature = bridge in wanted
    wanted[bridge] = rows.indices if bridge_is_feature else rows.visual
    collector = HiddenStateCollector(wanted)
    with collector.active():
        # The logits of training rows are computed from the collected states, and only where there is a loss.
        view.model(**inputs, use_cache=False, logits_to_keep=1)
    states = {layer: collector.take(layer)[0] for layer in wanted}
    visual_states = states[bridge]
    if bridge_is_feature:
        states[bridge], visual_states = visual_states[~rows.is_visual], visual_states[rows.is_visual]
    return TrainingStates(
        input_ids=input_ids,
        answer_start=int(sample["answer_start"]),
        text_states=torch.cat([states[layer] for layer in config.feature_layer_ids], dim=-1),
        last_states=states[last],
        visual_rows=rows.visual,
        visual_states=visual_states,
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


def append_answer(inputs: Mapping[str, Any], answer_ids: Sequence[int]) -> dict[str, Any]:
    """The processed conversation of a processed prompt and its answer.

    Args:
        inputs: What the target's processor returned for one prompt, generation prompt included.
        answer_ids: Tokens of the answer, end of turn included if it was reached.
    """
    prompt = inputs["input_ids"]
    answer = torch.tensor([list(answer_ids)], dtype=prompt.dtype, device=prompt.device)
    sample = dict(inputs)
    for name, value in inputs.items():
        # Whatever has one entry per token grows with the answer: its type is text (0), it is attended to (1).
        if isinstance(value, Tensor) and value.shape == prompt.shape and name != "input_ids":
            grown = torch.full_like(answer, 1 if name == "attention_mask" else 0, dtype=value.dtype)
            sample[name] = torch.cat((value, grown), dim=1)
    sample["input_ids"] = torch.cat((prompt, answer), dim=1)
    sample["answer_start"] = prompt.shape[1]
    return sample


class SparrowDataCollator:
    """Turns dataset rows into `{"samples": [...]}`, one entry per row, unpadded.

    Padding comes after the target: what is padded is the draft's short sequences, never the videos.

    Args:
        processor: The target's processor; needed for rows that hold `messages`.
    """

    def __init__(self, processor: ProcessorMixin | None = None):
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any] | TrainingStates]) -> dict[str, list[dict[str, Any]]]:
        return {"samples": [self._prepare(row) for row in rows]}

    def _prepare(self, row: Mapping[str, Any] | TrainingStates) -> dict[str, Any]:
        if isinstance(row, TrainingStates):
            return row.to_row()
        if "input_ids" in row:
            return dict(row)
        if "messages" not in row:
            raise TrainingDataError(
                "a row needs 'messages', or 'input_ids' and 'answer_start'; it has "
                f"{', '.join(sorted(row)) or 'nothing'}"
            )
        return self._process(row)

    def _process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.processor is None:
            raise TrainingDataError("rows with 'messages' need the target's processor: SparrowDataCollator(processor)")
        from ..video import prepare_inputs

        messages, answer = list(row["messages"]), row.get("answer")
        if "answer_ids" not in row and answer is None:
            if not messages or messages[-1].get("role") != "assistant":
                raise TrainingDataError(
                    "the row has no answer: end 'messages' with an assistant turn, or add 'answer' or 'answer_ids'"
                )
            answer = text_of(messages.pop())
        answer_ids = row.get("answer_ids")
        if answer_ids is None:
            tokenizer = self.processor.tokenizer
            answer_ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        return append_answer(prepare_inputs(self.processor, messages), answer_ids)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a chat message, whichever way its content is written."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")

"""The subject of an analysis: a prompt, the target's own greedy answer to it, and the groups of their positions.

Positions are in three groups: *visual* (placeholders), *instruction* (the last text of the user) and *text*, which is
everything else: system prompt, chat template, frame headers, and the answer.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._transformers import prompt_position_ids, unwrap
from ..data.datasets import load_rows
from ..data.messages import split_answer
from ..data.prepare import append_answer, prepare_prompt, to_target, tokenizer_of
from ..draft_inputs import visual_mask
from ..errors import AnalysisError
from ..target_config import visual_token_ids

#: Names of the groups, in the order of every table.
GROUPS = ("instruction", "visual", "text")


class Conversation(NamedTuple):
    """Chat messages that end with a user's turn, and a reference answer.

    Its video files are read with its own `fps` and `max_frames` if it has them (see
    [`~sparrow_hf.data.prepare_prompt`]).
    """

    messages: list[dict[str, Any]]
    reference: str | None = None
    fps: float | None = None
    max_frames: int | None = None


def read_conversations(source: str, split: str = "train", limit: int | None = None) -> list[Conversation]:
    """The first conversations of a source; the answer of a row is its reference, unless it names one.

    Args:
        source: Whatever [`~sparrow_hf.data.load_rows`] reads.
        split: Of the source.
        limit: Most conversations.

    Raises:
        TrainingDataError: The rows cannot be read, or one has no well-formed messages or no question.
    """
    rows = load_rows(source, split)
    conversations = []
    for index in range(len(rows))[:limit]:
        row = rows[index]
        messages, written = split_answer(row)
        conversations.append(
            Conversation(messages, row.get("reference") or written, row.get("fps"), row.get("max_frames"))
        )
    return conversations


@dataclass(frozen=True)
class ProcessedPrompt:
    """One prompt, processed.

    Attributes:
        inputs: What the target's processor returned: a batch of one, unpadded.
        instruction: `(n,)` positions of the instruction, ascending.
        reference: Reference answer, for a scoring function.
        tokenizer: The target's, for targets whose `generation_config` has stop strings.
    """

    inputs: dict[str, Any]
    instruction: Tensor
    reference: str | None = None
    tokenizer: Any = None


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with the target's greedy answer, ready for one forward over both.

    Attributes:
        prompt: The prompt.
        inputs: The target's inputs for prompt and answer, with the positions `generate()` gave them.
        is_visual: `(L,)` bool, over prompt and answer.
        answer_ids: Tokens of the answer.
    """

    prompt: ProcessedPrompt
    inputs: dict[str, Any]
    is_visual: Tensor
    answer_ids: list[int]

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, placeholders included."""
        return len(self.is_visual) - len(self.answer_ids)

    @property
    def last_instruction_row(self) -> int:
        """Position of the instruction's last token."""
        return int(self.prompt.instruction[-1])

    @cached_property
    def groups(self) -> Tensor:
        """`(L, 3)` bool: which of [`GROUPS`] a position belongs to."""
        instruction = torch.zeros_like(self.is_visual)
        instruction[self.prompt.instruction] = True
        return torch.stack((instruction, self.is_visual, ~(instruction | self.is_visual)), dim=-1)


def process_conversation(
    processor: Any, conversation: Conversation, *, fps: float | None = None, max_frames: int | None = None
) -> ProcessedPrompt:
    """Processes one conversation and finds its instruction: the last text the user wrote.

    Args:
        processor: The target's processor.
        conversation: The conversation.
        fps, max_frames: Sampling of video files, where the conversation sets none.

    Raises:
        AnalysisError: The user wrote nothing, or the chat template left it out.
        TrainingDataError: The messages are malformed; see [`~sparrow_hf.data.prepare_prompt`].
    """
    row = conversation._asdict()
    contents = [turn["content"] for turn in split_answer(row)[0] if turn["role"] == "user"]
    texts = [
        text
        for content in contents
        for text in (
            [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        )
    ]
    if not texts or not texts[-1].strip():
        raise AnalysisError("the messages hold no instruction: end the user's turn with a text")
    inputs = dict(prepare_prompt(processor, row, fps, max_frames))
    tokenizer = tokenizer_of(processor)
    instruction = find_text(tokenizer, inputs["input_ids"][0], texts[-1])
    return ProcessedPrompt(inputs, instruction, conversation.reference, tokenizer)


def find_text(tokenizer: Any, input_ids: Tensor, text: str) -> Tensor:
    """`(n,)` positions of the last occurrence of `text` in the `(L,)` ids, ignoring case and white space.

    Raises:
        AnalysisError: The decoded ids do not hold it.
    """
    special = torch.isin(input_ids, torch.tensor(sorted(set(tokenizer.all_special_ids))))
    rows = (~special).nonzero().squeeze(-1)
    ids = input_ids[rows].tolist()
    wanted = _squeezed(text)

    def reads(start: int, end: int) -> bool:
        return wanted in _squeezed(tokenizer.decode(ids[start:end]))

    # ids     … system … | describe this video . | assistant
    #                  start ≤ here holds        end ≥ here holds
    start = bisect_left(range(len(ids)), True, key=lambda index: not reads(index, len(ids))) - 1
    if start < 0:
        raise AnalysisError(f"the instruction {text!r} is not in the prompt as the tokenizer decodes it")
    end = bisect_left(range(len(ids)), True, key=lambda index: reads(start, index))
    return rows[start:end]


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


@torch.no_grad()
def answer(target: PreTrainedModel, prompt: ProcessedPrompt, max_new_tokens: int) -> AnsweredPrompt:
    """Lets the target answer greedily, without penalties, and prepares one forward over prompt and answer.

    Raises:
        AnalysisError: The prompt is padded, holds no visual tokens, or more than one sequence.
    """
    model = unwrap(target)
    inputs = to_target(prompt.inputs, model)
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if len(input_ids) != 1 or (mask is not None and not mask.bool().all()):
        raise AnalysisError(
            f"one unpadded prompt at a time, found a batch of {len(input_ids)}: process each by itself"
        )
    is_visual = visual_mask(input_ids[0], visual_token_ids(model.config))
    if not is_visual.any():
        raise AnalysisError(
            "the prompt has no visual tokens: add a video or an image, there is nothing to analyse without one"
        )
    output = greedy(model, inputs, max_new_tokens, prompt.tokenizer)
    answer_ids = output[0, input_ids.shape[1] :]
    return AnsweredPrompt(
        prompt,
        _appended(model, inputs, answer_ids),
        torch.cat((is_visual, torch.zeros_like(answer_ids, dtype=torch.bool))),
        answer_ids.tolist(),
    )


@torch.no_grad()
def greedy(model: PreTrainedModel, inputs: Mapping[str, Any], max_new_tokens: int, tokenizer: Any = None) -> Tensor:
    """`(1, L + A)` the prompt and its most probable answer, token by token; never a placeholder, which is no text."""
    suppressed = [*(model.generation_config.suppress_tokens or []), *visual_token_ids(model.config)]
    return model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        suppress_tokens=suppressed,
        tokenizer=tokenizer,
    )


def _appended(model: PreTrainedModel, inputs: Mapping[str, Any], answer_ids: Tensor) -> dict[str, Any]:
    """The inputs of one forward over prompt and answer."""
    grown = append_answer(inputs, answer_ids)
    del grown["answer_start"]
    # With M-RoPE, generate() numbers the answer from the last position + 1; for prompt and answer together, the model
    # would number it from the largest position + 1.
    positions = prompt_position_ids(model, inputs["input_ids"], inputs)
    steps = torch.arange(1, len(answer_ids) + 1, device=positions.device)
    grown["position_ids"] = torch.cat((positions, positions[..., -1:] + steps), dim=-1)
    return grown

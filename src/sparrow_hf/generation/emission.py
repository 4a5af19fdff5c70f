"""Commits tokens one by one, exactly as plain `generate()` does: same processors, draws and criteria, same order."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from ..devices import on_device
from .stop_rules import max_length, stop_rules


class TokenChoice:
    """Chooses the next tokens from the target's raw logits, and keeps scores and logits that a call asks for."""

    def __init__(self, logits_processor: LogitsProcessorList, generation_config: GenerationConfig):
        self._processor = logits_processor
        self._do_sample = generation_config.do_sample
        wants_dict = generation_config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_logits else None

    @property
    def is_argmax(self) -> bool:
        """Whether a token is simply the argmax of the raw logits, and nobody wants to see these: then the tokens after
        all nodes of a tree can be read at once."""
        plain = not self._do_sample and len(self._processor) == 0
        return plain and self.scores is None and self.logits is None

    def __call__(self, input_ids: Tensor, logits: Tensor) -> list[int]:
        """The tokens after `(B, t)` sequences, from `(B, V)` raw logits of any float dtype."""
        # A copy, because processors may write in place, and the caller may keep the raw logits.
        raw = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = self._processor(input_ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if self._do_sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[:, 0].tolist()
        return scores.argmax(dim=-1).tolist()


def likeliest(logits: Tensor) -> Tensor:
    """`(…)` the argmax of `(…, V)` raw logits as plain decoding takes it: in fp32, where two of fp64 may tie."""
    # What bf16 and fp16 hold, fp32 holds as it is.
    return (logits.float() if logits.dtype == torch.float64 else logits).argmax(dim=-1)


class TokenEmitter:
    """Turns the target's logits into committed tokens.

    Every emitted token is the argmax of, or one multinomial draw from, the target's processed logits. The draws come
    from torch's global generator, one per token, so that a seeded run equals plain `generate()` token for token.

    Args:
        input_ids: `(1, L)` prompt.

    Attributes:
        new_tokens: The committed tokens.
        choice: How a token is chosen, with the scores and logits of those chosen.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ):
        self.new_tokens: list[int] = []
        self.finished = False
        self._prompt_length = input_ids.shape[1]
        self._input_ids = input_ids
        self.choice = TokenChoice(logits_processor, generation_config)
        self._criteria = stopping_criteria
        self._rules = stop_rules(stopping_criteria)
        self._max_length = max_length(stopping_criteria)
        self._streamer = streamer

    @property
    def length(self) -> int:
        """Tokens of prompt and text together."""
        return self._prompt_length + len(self.new_tokens)

    @property
    def budget(self) -> int:
        """How many tokens the text may still get, at most."""
        return self._max_length - self.length

    @property
    def input_ids(self) -> Tensor:
        """`(1, t)` prompt and committed tokens, put together when somebody reads them.

        A new tensor for every length, as in plain decoding: processors and criteria may keep what they are given.
        Chosen tokens are int64, and so are the ids together, whatever integers the prompt has.
        """
        if self._input_ids.shape[1] < self.length:
            unread = self.new_tokens[self._input_ids.shape[1] - self.length :]
            new = on_device([unread], self._input_ids.device)
            self._input_ids = torch.cat((self._input_ids, new), dim=-1)
        return self._input_ids

    def choose(self, logits: Tensor, argmax: int | None = None) -> int:
        """The token after the current sequence.

        Args:
            logits: `(1, V)` raw logits of the target, any float dtype.
            argmax: Their argmax, if it is known and [`TokenChoice.is_argmax`] holds.
        """
        return self.choice(self.input_ids, logits)[0] if argmax is None else argmax

    def commit(self, token: int) -> None:
        """Appends a token, checks every stopping criterion on it, and hands it to the streamer.

        The criteria are those that `generate()` made of its arguments: length, EOS, `stop_strings`, the caller's own.
        """
        self.new_tokens.append(token)
        if self._rules is None:
            self.finished = bool(self._criteria(self.input_ids, self.choice.scores).all())
        else:
            self.finished = self._rules.stop(token, self.length)
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))


def recorded_step(outputs: Any, name: str, past_length: int, lead: int, path: list[int]) -> list[tuple[Tensor, ...]]:
    """What plain `generate()` would have returned as `outputs.<name>` for each committed token of a round.

    hidden states   (1, N, H)              → (1, 1, H)            of the node
    attentions      (1, heads, N, past+N)  → (1, heads, 1, past + depth + 1)   over prefix and ancestors

    Args:
        lead: How many rows of the forward come before the tree: committed text, like the prefix.
    """
    steps = []
    for depth, node in enumerate(path):
        row = lead + node
        if name == "hidden_states":
            steps.append(tuple(layer[:, row : row + 1] for layer in outputs[name]))
        else:
            prefix = past_length + lead
            ancestors = [prefix + ancestor for ancestor in path[: depth + 1]]
            of_node = (layer[:, :, row : row + 1] for layer in outputs[name])
            steps.append(tuple(torch.cat((each[..., :prefix], each[..., ancestors]), dim=-1) for each in of_node))
    return steps

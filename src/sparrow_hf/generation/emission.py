"""Commits tokens one by one, exactly as plain `generate()` does: same processors, draws and criteria, same order."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer


class TokenEmitter:
    """Turns the target's logits into committed tokens.

    Every emitted token is the argmax of, or one multinomial draw from, the target's processed logits. The draws come
    from torch's global generator, one per token, so that a seeded run equals plain `generate()` token for token.

    Args:
        input_ids: `(1, L)` prompt.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ):
        self.input_ids = input_ids
        self.finished = False
        self._processor = logits_processor
        self._criteria = stopping_criteria
        self._do_sample = generation_config.do_sample
        self._streamer = streamer
        wants_dict = generation_config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_logits else None

    @property
    def takes_argmax(self) -> bool:
        """Whether a token is simply the argmax of the raw logits, so that a whole tree can be read at once."""
        return not self._do_sample and len(self._processor) == 0

    def choose(self, logits: Tensor, argmax: int | None = None) -> int:
        """The token after the current sequence.

        Args:
            logits: `(1, V)` raw logits of the target, any float dtype.
            argmax: Their argmax, if it is known and [`~TokenEmitter.takes_argmax`] holds.
        """
        if argmax is not None and self.scores is None and self.logits is None:
            return argmax
        # A copy, because processors may write in place, and the caller may keep the raw logits.
        raw = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self._processor(self.input_ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if self._do_sample:
            return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
        return int(scores.argmax(dim=-1))

    def commit(self, token: int) -> None:
        """Appends a token, checks every stopping criterion on it, and hands it to the streamer.

        The criteria are those that `generate()` made of its arguments: length, EOS, `stop_strings`, the caller's own.
        """
        new = self.input_ids.new_full((1, 1), token)
        self.input_ids = torch.cat((self.input_ids, new), dim=-1)
        self.finished = bool(self._criteria(self.input_ids, self.scores).all())
        if self._streamer is not None:
            self._streamer.put(new[0].cpu())


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
            keys = list(range(prefix)) + [prefix + ancestor for ancestor in path[: depth + 1]]
            steps.append(tuple(layer[:, :, row : row + 1, keys] for layer in outputs[name]))
    return steps

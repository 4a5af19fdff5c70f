"""Commits the tokens of a batch, column by column, exactly as plain `generate()` does.

Plain decoding makes one column at a time: a token for every sequence, padding for those that are finished. Processors
and criteria see the whole batch, and a draw takes one number from the generator for all of it.

Sequences accept different numbers of drafted tokens. Two paces follow from that:

* *in step*: a round commits the columns of which every sequence has its token. Everything a call can ask for is then
  as in plain decoding: draws, processors that look at other sequences or keep a state, scores, the cache.
* *each at its own pace*: a sequence takes all the tokens it accepts. A column is committed once it is complete, so
  criteria and streamers still see what they see in plain decoding. Processors see each sequence as long as it is,
  behind its own padding; only those that treat every sequence by itself are run so.

    round            1         2      3
    sequence a     a0 a1 a2 | a3   | a4 a5            columns committed: 1, 2, 5
    sequence b     b0       | b1   | b2 b3 b4
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from .._transformers import pad_token
from ..devices import on_device
from .emission import TokenChoice, likeliest
from .stop_rules import end_tokens, max_length, stop_rules

#: Processors of transformers that treat every sequence by itself and keep nothing from one call to the next.
ROW_BY_ROW = frozenset(
    {
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    }
)


class BatchEmitter:
    """Turns the target's logits into the tokens of B sequences.

    Args:
        input_ids: `(B, L)` prompts.
        in_step: Whether all sequences take the same number of tokens in every round.

    Attributes:
        new_tokens: For each sequence, the tokens chosen so far; they may be ahead of the columns.
        finished: Whether every sequence is.
        choice: How tokens are chosen, with the scores and logits of those chosen.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        in_step: bool,
    ):
        self.new_tokens: list[list[int]] = [[] for _ in input_ids]
        self.finished = False
        self._in_step = in_step
        self._prompts = self._input_ids = input_ids
        self._columns: list[list[int]] = []
        self._processor = logits_processor
        self._criteria = stopping_criteria
        self._rules = stop_rules(stopping_criteria)
        self.choice = TokenChoice(logits_processor, generation_config)
        self._max_new = max_length(stopping_criteria) - input_ids.shape[1]
        self._streamer = streamer
        self._is_finished = [False] * len(input_ids)
        #: Tokens of each finished sequence up to its end.
        self._lengths: dict[int, int] = {}
        # Without a token that ends the text, plain decoding goes on with finished sequences until all are.
        pad = pad_token(generation_config)
        has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._pad = int(pad) if has_end and pad is not None else None
        self._ends = end_tokens(stopping_criteria)

    @property
    def input_ids(self) -> Tensor:
        """`(B, t)` prompts and committed columns, put together when somebody reads them; new for every length."""
        unread = self._columns[self._input_ids.shape[1] - self._prompts.shape[1] :]
        if unread:
            new = on_device(unread, self._prompts.device).T
            self._input_ids = torch.cat((self._input_ids, new), dim=1)
        return self._input_ids

    @property
    def num_text_tokens(self) -> int:
        """Tokens of all sequences so far, without what was chosen or padded behind the end of one."""
        return sum(self._lengths.get(row, len(tokens)) for row, tokens in enumerate(self.new_tokens))

    @property
    def open_rows(self) -> list[int]:
        """Sequences whose next token the target still chooses."""
        return [row for row in range(len(self.new_tokens)) if not self._is_closed(row)]

    @property
    def budget(self) -> int:
        """How many tokens a sequence may still get, at most."""
        return self._max_new - min(len(self.new_tokens[row]) for row in self.open_rows)

    @property
    def roots(self) -> Tensor:
        """`(B,)` the newest token of every sequence."""
        return on_device([tokens[-1] for tokens in self.new_tokens], self._prompts.device)

    @property
    def fill(self) -> Tensor:
        """`(B,)` what follows in sequences that are not open.

        Plain decoding feeds the padding token only to sequences that wait for others; it may have no embedding.
        """
        return torch.full_like(self.roots, self._pad) if self._in_step and self._pad is not None else self.roots

    def accept(self, logits: Tensor, chains: list[list[int]], path: list[int]) -> list[list[int]]:
        """One round: commits what the target chooses along the chains.

        Args:
            logits: `(B, N, V)` raw logits of the target after every node.
            chains: Tokens of the N nodes of each sequence.
            path: Empty; gets the nodes that some sequence keeps, the root first.

        Returns:
            The new tokens of each sequence.
        """
        before = [len(tokens) for tokens in self.new_tokens]
        # expected   d1 d2 d3 –1        chosen after node 0, 1 …: the walk goes on while it is the drafted token
        # node        0  1  2  3
        expected = [[*tokens[1:], -1] for tokens in chains]
        # Read from the device at once, node by node.
        best = likeliest(logits).T.tolist() if self.choice.is_argmax else None
        if self._in_step:
            self._accept_in_step(logits, best, expected, path)
        else:
            self._accept_each(logits, best, expected)
            path += range(max(len(tokens) - count for tokens, count in zip(self.new_tokens, before, strict=True)))
        return [tokens[count:] for tokens, count in zip(self.new_tokens, before, strict=True)]

    def start(self, logits: Tensor) -> list[int]:
        """Chooses and commits the first column from the `(B, V)` logits of the prefill."""
        self.accept(logits[:, None], [[-1] for _ in self.new_tokens], [])
        return [tokens[0] for tokens in self.new_tokens]

    # -- in step ------------------------------------------------------------------------------------------------------

    def _accept_in_step(
        self, logits: Tensor, best: list[list[int]] | None, expected: list[list[int]], path: list[int]
    ) -> None:
        for node in range(logits.shape[1]):
            path.append(node)
            chosen = self.choice(self.input_ids, logits[:, node]) if best is None else best[node]
            if self._pad is not None:
                chosen = [self._pad if was else token for token, was in zip(chosen, self._is_finished, strict=True)]
            for tokens, token in zip(self.new_tokens, chosen, strict=True):
                tokens.append(token)
            self._commit(chosen)
            if self.finished or any(row[node] != token for row, token in zip(expected, chosen, strict=True)):
                return

    # -- each at its own pace -----------------------------------------------------------------------------------------

    def _accept_each(self, logits: Tensor, best: list[list[int]] | None, expected: list[list[int]]) -> None:
        walking = self.open_rows
        for node in range(logits.shape[1]):
            chosen = best[node] if best is not None else self._choose_alone(walking, logits[:, node])
            for row in walking:
                self.new_tokens[row].append(chosen[row])
            walking = [row for row in walking if expected[row][node] == chosen[row] and not self._is_closed(row)]
            if not walking:
                break
        while not self.finished and (column := self._next_column()) is not None:
            self._commit(column)

    def _choose_alone(self, rows: list[int], logits: Tensor) -> list[int]:
        """The next token of each of `rows` (at other places anything), from `(B, V)` raw logits.

        Processors may count the rows, so they get a whole batch for every length there is. Its rows of other lengths
        hold the new tokens of a row that has this one.
        """
        tokens = [-1] * len(self.new_tokens)
        by_length = {len(self.new_tokens[row]): row for row in rows}
        for length, like in by_length.items():
            new = [own if len(own) == length else self.new_tokens[like] for own in self.new_tokens]
            ids = self._prompts
            if length > 0:
                ids = torch.cat((ids, on_device(new, ids.device)), dim=1)
            raw = logits.to(copy=True, dtype=torch.float32, device=ids.device)
            best = self._processor(ids, raw).argmax(dim=-1).tolist()
            for row in rows:
                if len(self.new_tokens[row]) == length:
                    tokens[row] = best[row]
        return tokens

    def _is_closed(self, row: int) -> bool:
        tokens = self.new_tokens[row]
        if self._pad is not None and (self._is_finished[row] or (len(tokens) > 0 and tokens[-1] in self._ends)):
            return True
        return len(tokens) >= self._max_new

    def _next_column(self) -> list[int] | None:
        """The next column, once every sequence has its token."""
        at, column = len(self._columns), []
        for tokens, is_finished in zip(self.new_tokens, self._is_finished, strict=True):
            if is_finished and self._pad is not None:
                column.append(self._pad)
            elif at < len(tokens):
                column.append(tokens[at])
            else:
                return None
        return column

    # -- both ---------------------------------------------------------------------------------------------------------

    def _commit(self, column: list[int]) -> None:
        """Appends a token to every sequence, checks every criterion on all of them, and hands them to the streamer."""
        self._columns.append(column)
        if self._rules is None:
            stops = self._criteria(self.input_ids, self.choice.scores).tolist()
        else:
            length = self._prompts.shape[1] + len(self._columns)
            stops = [self._rules.stop(token, length) for token in column]
        for row, stop in enumerate(stops):
            if stop:
                self._lengths.setdefault(row, len(self._columns))
        self._is_finished = [was or stop for was, stop in zip(self._is_finished, stops, strict=True)]
        self.finished = all(self._is_finished)
        if self._streamer is not None:
            self._streamer.put(torch.tensor(column))


def treats_rows_alone(processors: LogitsProcessorList) -> bool:
    """Whether every processor of a list treats every sequence by itself; a subclass may do something else."""
    kinds = [type(processor) for processor in processors]
    return all(kind.__name__ in ROW_BY_ROW and kind.__module__.startswith("transformers.") for kind in kinds)

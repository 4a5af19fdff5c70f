"""A streamer that marks drafted tokens."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation import BaseStreamer

from .modeling_sparrow import SparrowDraftModel

#: How drafted tokens and the target's own look on a terminal.
DRAFTED_STYLE, OWN_STYLE = "bold green", "yellow"


class ProvenanceStreamer(BaseStreamer):
    """Passes on new text, and whether its tokens were drafted or the target's own.

    Args:
        tokenizer: Turns ids into text.
        on_text: Called with a piece of new text, and whether the token that completed it had been drafted. Pieces put
            together are the text without special tokens.
        draft: The draft of this call; without one, every token is the target's own.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str, bool], None], draft: SparrowDraftModel | None = None):
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._draft = draft
        self._token_ids: list[int] = []
        self._printed = 0
        self._num_accepted = 0
        self._drafted = False
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then tokens one by one."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        # The loop counts a drafted token before it streams it, so the count has grown exactly if this one was drafted.
        stats = None if self._draft is None else self._draft.last_generation
        num_accepted = 0 if stats is None else sum(stats.accepted)
        self._drafted = num_accepted > self._num_accepted
        self._num_accepted = num_accepted
        self._token_ids += value.flatten().tolist()
        text = self._text()
        # A replacement character at the end: the bytes of a character that later tokens complete.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._hand_over(text)

    def end(self) -> None:
        """Hands over what is left."""
        self._hand_over(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._token_ids, skip_special_tokens=True)

    def _hand_over(self, text: str) -> None:
        if len(text) > self._printed:
            self._on_text(text[self._printed :], self._drafted)
            self._printed = len(text)

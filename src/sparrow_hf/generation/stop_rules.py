"""Stop rules that need no device: the text's length, and the tokens that end it.

All other criteria (stop strings, time limits, those of a user) run in `emission.py` and `batch_emission.py`.
"""

import sys
from dataclasses import dataclass

from transformers import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria


@dataclass(frozen=True)
class StopRules:
    """What transformers' criteria of length and end say of a text, from numbers alone.

    Attributes:
        max_length: Tokens of the longest text, its prompt included.
        ends: Tokens that end a text.
    """

    max_length: int
    ends: frozenset[int]

    def stop(self, token: int, length: int) -> bool:
        """Whether a text ends with this token, which makes it so long."""
        return length >= self.max_length or token in self.ends


def stop_rules(criteria: StoppingCriteriaList) -> StopRules | None:
    """The rules of a list of criteria; `None` if it holds others, or a subclass, which may do something else."""
    if type(criteria) is not StoppingCriteriaList:
        return None
    max_length, ends = sys.maxsize, set()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            longest = criterion.max_position_embeddings
            if longest is not None and longest < criterion.max_length:
                # It warns when the text gets longer.
                return None
            max_length = min(max_length, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            ends.update(criterion.eos_token_id.flatten().tolist())
        else:
            return None
    return StopRules(max_length, frozenset(ends))

"""Stop rules that need no device: the text's length, and the tokens that end it.

All other criteria (stop strings, time limits, those of a user) run in `emission.py` and `batch_emission.py`.
"""

import sys
from dataclasses import dataclass

from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
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
    if type(criteria) is not StoppingCriteriaList or not all(map(_is_rule, criteria)):
        return None
    return StopRules(max_length(criteria), end_tokens(criteria))


def max_length(criteria: StoppingCriteriaList) -> int:
    """Tokens of the longest text that a call's criteria admit, its prompt included.

    `generate()` makes one of `generation_config.max_length`, but a criterion of the user's takes its place.
    """
    lengths = (criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria)
    return min(lengths, default=sys.maxsize)


def end_tokens(criteria: StoppingCriteriaList) -> frozenset[int]:
    """Tokens that end a text by a call's criteria."""
    ends = (criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria)
    return frozenset(token for tokens in ends for token in tokens.flatten().tolist())


def _is_rule(criterion: StoppingCriteria) -> bool:
    if type(criterion) is MaxLengthCriteria:
        # It warns when a text gets longer than the positions.
        return criterion.max_position_embeddings is None or criterion.max_position_embeddings >= criterion.max_length
    return type(criterion) is EosTokenCriteria

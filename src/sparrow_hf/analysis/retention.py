"""Acceptance of the draft with all visual tokens, a few, or none (paper, figure 1b).

Decoding is replayed along the target's greedy answer: the draft proposes from the states of one target forward, and
the known tokens decide. This gives the same rounds as `generate()`, at the cost of the draft alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..draft_inputs import DraftPositions, draft_positions, strided
from ..generation.candidate_generator import SparrowCandidateGenerator
from ..generation.verification import walk
from ..modeling_sparrow import SparrowDraftModel
from .answered import AnsweredPrompt

#: Shares of the visual tokens that the draft reads.
RETAINED_SHARES = (1.0, 0.25, 0.10, 0.05, 0.01, 0.0)


class Rounds(NamedTuple):
    """The rounds of one answer: the accepted drafts of each, and the tokens that all of them committed."""

    accepted: list[int]
    tokens: int


def layers_of(draft: SparrowDraftModel) -> list[int]:
    """The target's layers that the draft reads: its feature layers and its bridge layer.

    All rows of them are needed here; 25,000 rows of a 7B target are 179 MB per layer in bf16.
    """
    return sorted(draft.config.layer_ids_read)


@torch.no_grad()
def retention(
    draft: SparrowDraftModel,
    answered: AnsweredPrompt,
    states: Mapping[int, Tensor],
    visual_scores: Mapping[str, Tensor],
    max_new_tokens: int,
    shares: Sequence[float] = RETAINED_SHARES,
) -> dict[str, dict[float, Rounds]]:
    """Rounds of the answer when the draft reads a share of the visual tokens.

    Args:
        draft: A draft bound to the target.
        answered: The prompt and the target's answer.
        states: Layer of [`layers_of`] → `(1, L, H)` states of prompt and answer, on the draft's device.
        visual_scores: Name → `(V,)` scores of the visual rows; those of the highest scores are kept.
        max_new_tokens: What the answer was limited to; the last tree is no deeper than there is room.
        shares: 1.0 keeps all; any other share but 0 keeps one row at least.

    Returns:
        Name of the scores, or `"strided"` for even strides → share → rounds.
    """
    visual = answered.is_visual.nonzero().squeeze(-1).cpu()
    input_ids = _prompt_ids(answered, draft)
    found: dict[str, dict[float, Rounds]] = {}
    # For all and for none of the tokens the scores do not matter.
    replayed: dict[tuple[int, ...], Rounds] = {}
    for name in (*visual_scores, "strided"):
        found[name] = {}
        for share in shares:
            count = max(1, round(share * len(visual))) if share else 0
            kept = strided(visual, count) if name == "strided" else best_rows(visual, visual_scores[name], count)
            key = tuple(kept.tolist())
            if key not in replayed:
                visual_ids, on_device = draft.config.visual_token_ids or [], kept.to(input_ids.device)
                positions = draft_positions(input_ids[0], visual_ids, count, visual_positions=on_device)
                replayed[key] = replay(draft, answered, states, positions, max_new_tokens)
            found[name][share] = replayed[key]
    return found


def best_rows(rows: Tensor, scores: Tensor, count: int) -> Tensor:
    """The `count` of the `(V,)` rows with the highest `(V,)` scores, ascending."""
    return rows[scores.topk(count).indices.sort().values]


def replay(
    draft: SparrowDraftModel,
    answered: AnsweredPrompt,
    states: Mapping[int, Tensor],
    positions: DraftPositions,
    max_new_tokens: int,
) -> Rounds:
    """Decodes along a known answer, the draft reading these positions of its prompt; see [`retention`]."""
    answer_ids, layers = answered.answer_ids, draft.config.feature_layer_ids
    generator = SparrowCandidateGenerator(draft, _prompt_ids(answered, draft), positions=positions)
    wanted = generator.layers_to_collect
    generator.prefill({layer: states[layer][:, at] for layer, at in wanted.items()}, answer_ids[0])
    features = torch.cat([states[layer][:, answered.prompt_length :] for layer in layers], dim=-1)
    accepted: list[int] = []
    committed = 1

    def choose(node: int) -> int:
        return answer_ids[committed]

    def commit(token: int, drafted: bool) -> bool:
        nonlocal committed
        accepted[-1] += drafted
        committed += 1
        return committed == len(answer_ids)

    while committed < len(answer_ids):
        start = committed
        # A round commits at most one token more than it drafts.
        tree = generator.propose(max_levels=max_new_tokens - committed - 1)
        accepted.append(0)
        walk(tree, choose, commit, path=[])
        if committed < len(answer_ids):
            # tokens      … root | a0  a1  a2        committed in this round
            # states of     root   a0  a1            what the next trees grow from
            generator.extend(features[:, start - 1 : committed - 1], answer_ids[start:committed])
    return Rounds(accepted, len(answer_ids) - 1)


def _prompt_ids(answered: AnsweredPrompt, draft: SparrowDraftModel) -> Tensor:
    """`(1, L)` ids of the prompt where the draft is: the end of a target that is spread over devices."""
    return answered.inputs["input_ids"][:, : answered.prompt_length].to(draft.device)

"""The dynamic tree: exact values on hand-made probabilities, invariants on random ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparrow_hf.generation.tree import CandidatePool, build_tree


def log(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -math.inf for p in probabilities]


def test_layout_of_a_hand_made_tree() -> None:
    #        0:A
    #      1:B   2:C
    #     3:D    4:B
    tree = build_tree([10, 11, 12, 13, 11], [-1, 0, 0, 1, 2])
    assert tree.depths.tolist() == [0, 1, 1, 2, 2]
    assert tree.children == [{11: 1, 12: 2}, {13: 3}, {11: 4}, {}, {}]
    assert tree.ancestors.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]
    assert not tree.is_chain
    assert build_tree([1, 2, 3], [-1, 0, 1]).is_chain


def test_two_levels_by_hand() -> None:
    pool = CandidatePool(beam_width=2)
    tokens, origins = pool.add_level(torch.tensor([log(0.6, 0.3, 0.1, 0.0)]))
    assert (tokens.tolist(), origins.tolist()) == ([0, 1], [0, 0])
    # Under token 0: .6·.9 and .6·.1; under token 1: .3·.7 and .3·.3
    tokens, origins = pool.add_level(torch.tensor([log(0.0, 0.0, 0.9, 0.1), log(0.7, 0.3, 0.0, 0.0)]))
    assert (tokens.tolist(), origins.tolist()) == ([2, 0], [0, 1])
    # Ranked: 0 (.6), 0→2 (.54), 1 (.3), 1→0 (.21), 1→1 (.09), 0→3 (.06)
    tree = pool.best_tree(root_token=9, num_nodes=5, device="cpu")
    assert tree is not None
    assert tree.token_ids.tolist() == [[9, 0, 1, 2, 0]]
    assert tree.children == [{0: 1, 1: 2}, {2: 3}, {0: 4}, {}, {}]


def test_ties_keep_parents_before_children() -> None:
    pool = CandidatePool(beam_width=1)
    for _ in range(4):
        pool.add_level(torch.tensor([log(1.0, 0.0)]))  # certain: all cumulative scores are equal
    tree = pool.best_tree(root_token=5, num_nodes=3, device="cpu")
    assert tree is not None
    assert tree.is_chain
    assert tree.token_ids.tolist() == [[5, 0, 0]]


def test_impossible_tokens_are_left_out() -> None:
    pool = CandidatePool(beam_width=3)
    pool.add_level(torch.tensor([log(1.0, 0.0, 0.0)]))
    tree = pool.best_tree(root_token=5, num_nodes=4, device="cpu")
    assert tree is not None
    assert tree.token_ids.tolist() == [[5, 0]]


@pytest.mark.parametrize("beam", [1, 3])
def test_scores_that_are_not_numbers_give_no_tree(beam: int) -> None:
    pool = CandidatePool(beam_width=beam)
    pool.add_level(torch.full((1, 6), math.nan))
    assert pool.best_tree(root_token=5, num_nodes=4, device="cpu") is None


@settings(deadline=None, max_examples=60)
@given(beam=st.integers(1, 6), levels=st.integers(1, 5), nodes=st.integers(2, 40), seed=st.integers(0, 10_000))
def test_best_tree_is_the_best_prefix_closed_set(beam: int, levels: int, nodes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool, frontier, paths = CandidatePool(beam), [()], {}
    scores = {(): 0.0}
    for _ in range(levels):
        log_probs = torch.randn(len(frontier), 9, generator=generator).mul(2).log_softmax(-1)
        for row, path in enumerate(frontier):
            values, ids = log_probs[row].topk(beam)
            for value, token in zip(values.tolist(), ids.tolist(), strict=True):
                scores[(*path, token)] = scores[path] + value
        tokens, origins = pool.add_level(log_probs)
        frontier = [
            (*frontier[origin], token) for token, origin in zip(tokens.tolist(), origins.tolist(), strict=True)
        ]
    tree = pool.best_tree(root_token=0, num_nodes=nodes, device="cpu")
    assert tree is not None

    for parent, children in enumerate(tree.children):
        for token, node in children.items():
            assert parent < node
            paths[node] = (*paths.get(parent, ()), token)
    found = sorted((scores[path] for path in paths.values()), reverse=True)
    best = sorted((score for path, score in scores.items() if path), reverse=True)[: nodes - 1]
    assert len(found) == min(nodes - 1, len(scores) - 1) == len(set(paths.values()))
    assert found == pytest.approx(best, abs=1e-5)
    for node, path in paths.items():
        assert tree.depths[node] == len(path)
        assert tree.ancestors[node].sum() == len(path) + 1

"""Mask, positions and walk of one verification."""

import torch

from sparrow_hf.generation.tree import build_tree
from sparrow_hf.generation.verification import tree_attention_mask, tree_position_ids, walk

#        0:A
#      1:B   2:C
#     3:D    4:B
TREE = build_tree([10, 11, 12, 13, 11], [-1, 0, 0, 1, 2])


def test_mask_shows_prefix_and_ancestors_only() -> None:
    mask = tree_attention_mask(TREE, past_length=3, dtype=torch.float32)
    visible = (mask[0, 0] == 0).int().tolist()
    assert visible == [[1, 1, 1, *row] for row in TREE.ancestors.int().tolist()]
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_mask_hides_left_padding() -> None:
    mask = tree_attention_mask(TREE, 3, torch.float32, prefix_mask=torch.tensor([[0, 1, 1, 1]]))
    assert (mask[0, 0, :, :3] == 0).int().tolist() == [[0, 1, 1]] * 5


def test_every_row_of_a_batch_has_its_own_prefix() -> None:
    prefixes = torch.tensor([[0, 1, 1], [1, 1, 0]])
    mask = tree_attention_mask(TREE, 3, torch.float32, prefix_mask=prefixes)
    expected = [[[*prefix, *row] for row in TREE.ancestors.int().tolist()] for prefix in prefixes.tolist()]
    assert (mask[:, 0] == 0).int().tolist() == expected


def test_positions_are_the_roots_plus_depth_for_both_kinds() -> None:
    assert tree_position_ids(TREE, torch.tensor([[7]])).tolist() == [[7, 8, 8, 9, 9]]
    mrope = torch.tensor([[[20]], [[8]], [[8]], [[8]]])  # (4, 1, 1): text row, then t, h, w
    assert tree_position_ids(TREE, mrope)[:, 0].tolist() == [[20, 21, 21, 22, 22]] + [[8, 9, 9, 10, 10]] * 3


def test_walk_follows_the_targets_tokens() -> None:
    def run(tokens: list[int], stop_after: int = 99) -> tuple[list[int], int, int]:
        committed: list[bool] = []

        def choose(node: int) -> int:
            return tokens[len(committed)]

        def commit(token: int, drafted: bool) -> bool:
            assert token == tokens[len(committed)]
            committed.append(drafted)
            return len(committed) >= stop_after

        path: list[int] = []
        walk(TREE, choose, commit, path)
        # Only the last token of a round may be one that was not drafted.
        assert all(committed[:-1])
        return path, sum(committed), len(committed)

    assert run([99]) == ([0], 0, 1)  # nothing drafted fits
    assert run([12, 99]) == ([0, 2], 1, 2)
    assert run([12, 11, 99]) == ([0, 2, 4], 2, 3)  # the token B under C, not the one under the root
    assert run([11, 13, 11]) == ([0, 1, 3], 2, 3)  # a leaf still gives the target's own token
    assert run([12, 11, 99], stop_after=2) == ([0, 2], 2, 2)  # stopped on a drafted token: its KV is not kept
    assert run([12, 11, 99], stop_after=1) == ([0], 1, 1)


def test_a_window_counts_rows_as_if_every_path_were_the_text() -> None:
    """The prefix has rows 3, 4, 5 of 6; a node at depth d stands in row 6 + d and sees 4 rows, itself included."""
    mask = tree_attention_mask(TREE, past_length=6, dtype=torch.float32, first_row=3, window=4)
    visible = (mask[0, 0] == 0).int().tolist()
    #                  3  4  5 | nodes
    assert visible[0][:3] == [1, 1, 1]
    for node, depth in enumerate(TREE.depths.tolist()):
        assert visible[node][:3] == [int(row > 6 + depth - 4) for row in (3, 4, 5)]
        assert visible[node][3:] == TREE.ancestors[node].int().tolist()
    narrow = (tree_attention_mask(TREE, 6, torch.float32, first_row=5, window=2)[0, 0] == 0).int().tolist()
    for node, depth in enumerate(TREE.depths.tolist()):
        near = [int(TREE.ancestors[node, other] and depth - TREE.depths[other] < 2) for other in range(len(TREE))]
        assert narrow[node] == [int(depth == 0), *near]

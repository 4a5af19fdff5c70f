"""What the target's cache holds after a round, whatever happened in it."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sparrow_hf.generation.caches import hold
from sparrow_hf.generation.tree import build_tree

#        0:A
#      1:B   2:C
#     3:D    4:B
TREE = build_tree([10, 11, 12, 13, 11], [-1, 0, 0, 1, 2])
PREFIX = [0.0, 1.0, 2.0]
NODES = [100.0, 101.0, 102.0, 103.0, 104.0]


def add_rows(cache: DynamicCache, rows: list[float], num_layers: int = 2) -> None:
    """Keys are the rows plus the layer's number, values their negatives."""
    for layer in range(num_layers):
        keys = torch.tensor(rows).view(1, 1, -1, 1) + layer
        cache.update(keys, -keys, layer)


def held_rows(cache: DynamicCache) -> list[list[float]]:
    def flat(tensor: Tensor) -> list[float]:
        return tensor.flatten().tolist()

    assert all(flat(layer.values) == [-key for key in flat(layer.keys)] for layer in cache.layers)
    return [flat(layer.keys) for layer in cache.layers]


@pytest.fixture
def cache() -> DynamicCache:
    cache = DynamicCache()
    add_rows(cache, PREFIX)
    return cache


@pytest.mark.parametrize("path", [[0], [0, 1], [0, 2, 4]])
def test_the_path_is_kept_in_order(cache: DynamicCache, path: list[int]) -> None:
    held = hold(cache)
    with held.verifying(TREE) as kept:
        add_rows(cache, NODES)
        kept += path
    expected = PREFIX + [NODES[node] for node in path]
    assert held_rows(cache) == [expected, [row + 1 for row in expected]]
    assert (held.length, held.rows_since_prefill, held.carried) == (3 + len(path), len(path), [])
    # A second round goes on from there.
    with held.verifying(TREE) as kept:
        add_rows(cache, NODES)
        kept += [0, 1]
    assert held_rows(cache)[0] == expected + NODES[:2]


def test_an_exception_in_the_walk_keeps_what_was_walked(cache: DynamicCache) -> None:
    with pytest.raises(KeyboardInterrupt), hold(cache).verifying(TREE) as kept:
        add_rows(cache, NODES)
        kept += [0, 2]
        raise KeyboardInterrupt
    assert held_rows(cache)[0] == [*PREFIX, 100.0, 102.0]


def test_an_exception_behind_the_last_layer_keeps_the_root(cache: DynamicCache) -> None:
    with pytest.raises(RuntimeError), hold(cache).verifying(TREE):
        add_rows(cache, NODES)
        raise RuntimeError
    assert held_rows(cache)[0] == [*PREFIX, 100.0]


def test_an_exception_between_two_layers_keeps_nothing_of_the_forward(cache: DynamicCache) -> None:
    with pytest.raises(RuntimeError), hold(cache).verifying(TREE):
        add_rows(cache, NODES, num_layers=1)
        raise RuntimeError
    assert held_rows(cache) == [PREFIX, [1.0, 2.0, 3.0]]

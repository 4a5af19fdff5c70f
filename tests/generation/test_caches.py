"""What the target's cache holds after a round, whatever happened in it."""

import random

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from sparrow_hf._transformers import drop_newest, grow_in_place, recurrent_states, slabs
from sparrow_hf.generation.caches import RaggedCache, RecurrentCache, hold
from sparrow_hf.generation.tree import CandidateTree, build_chains, build_tree

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


@pytest.fixture(params=["ordinary", "in place", "in little place"])
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DynamicCache:
    """One that is given back copies its rows to grow, the others do not, or hardly ever."""
    cache = DynamicCache()
    add_rows(cache, PREFIX)
    if request.param != "ordinary":
        monkeypatch.setattr(slabs, "ROOM", 512 if request.param == "in place" else 2)
        grow_in_place(cache)
    return cache


def test_growing_in_place_holds_what_growing_by_copies_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "ROOM", 7)
    chance = random.Random(0)
    ordinary, in_place = DynamicCache(), DynamicCache()
    caches = [ordinary, in_place]
    for each in caches:
        add_rows(each, PREFIX)
    grow_in_place(in_place)
    for step in range(200):
        new = [float(10 * step + row) for row in range(chance.randint(1, 12))]
        dropped = chance.randint(0, len(new))
        for each in caches:
            add_rows(each, new)
        assert held_rows(ordinary) == held_rows(in_place)
        for each in caches:
            drop_newest(each, dropped)
        assert held_rows(ordinary) == held_rows(in_place)
    assert in_place.get_seq_length() > 500


def test_a_layer_that_grows_in_place_is_emptied_but_given_no_other_rows() -> None:
    cache = DynamicCache()
    add_rows(cache, PREFIX)
    grow_in_place(cache)
    with pytest.raises(NotImplementedError, match="slab"):
        cache.reorder_cache(torch.tensor([0]))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].keys is None
    add_rows(cache, NODES)
    assert held_rows(cache)[0] == NODES


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


# -- recurrent layers -------------------------------------------------------------------------------------------------


def read_rows(cache: DynamicCache, rows: list[float]) -> None:
    """A forward over rows: the state is their sum, the convolution needs the last two, the window the last three."""
    recurrent, window = cache.layers
    before = 0.0 if recurrent.recurrent_states[0] is None else recurrent.recurrent_states[0]
    recurrent.update_conv_state(torch.tensor(rows).view(1, 1, -1), conv_kernel_size=2)
    recurrent.update_recurrent_state(torch.full((1, 1, 1, 1), sum(rows)) + before)
    window.update(torch.tensor(rows).view(1, 1, -1, 1), torch.tensor(rows).view(1, 1, -1, 1))


def all_held(cache: DynamicCache) -> tuple[float, list[float], list[float], int]:
    """State, inputs of the convolution, rows of the window, length."""
    recurrent, window = cache.layers
    conv, rows = recurrent.conv_states[0].flatten().tolist(), window.keys.flatten().tolist()
    return float(recurrent.recurrent_states[0]), conv, rows, cache.get_seq_length()


@pytest.fixture
def recurrent() -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [LinearAttentionLayer(), DynamicSlidingWindowLayer(sliding_window=4)]
    read_rows(cache, [1.0, 2.0, 3.0])
    return cache


def chain_of(*tokens: int) -> CandidateTree:
    return build_tree(list(tokens), list(range(-1, len(tokens) - 1)))


def test_states_are_put_back_and_accepted_tokens_carried(recurrent: DynamicCache) -> None:
    held = hold(recurrent)
    addresses = [state.data_ptr() for state in recurrent_states(recurrent)]
    # 7 and 8 of three tokens are accepted, then 9 of two, then both.
    for tokens, accepted, carried in (((7, 8, 9), 2, [[7], [8]]), ((9, 5), 1, [[7], [8], [9]]), ((6, 4), 2, [])):
        rows = [float(token) for token in (*sum(held.carried, []), *tokens)]
        with held.verifying(chain_of(*tokens)) as path:
            read_rows(recurrent, rows)
            path += range(accepted)
        assert held.carried == carried
        if carried:
            assert all_held(recurrent) == (6.0, [2.0, 3.0], [1.0, 2.0, 3.0], 3)
    assert all_held(recurrent) == (40.0, [6.0, 4.0], [9.0, 6.0, 4.0], 8)
    # In place: compiled graphs hold the addresses.
    assert [state.data_ptr() for state in recurrent_states(recurrent)] == addresses
    # The states that are saved now are the new ones.
    with held.verifying(chain_of(1, 2)) as path:
        read_rows(recurrent, [1.0, 2.0])
        path.append(0)
    assert all_held(recurrent) == (40.0, [6.0, 4.0], [9.0, 6.0, 4.0], 8) and held.carried == [[1]]


def test_a_forward_that_raised_is_undone(recurrent: DynamicCache) -> None:
    held = hold(recurrent)
    with pytest.raises(RuntimeError), held.verifying(chain_of(7, 8)):
        recurrent.layers[0].update_recurrent_state(torch.full((1, 1, 1, 1), 99.0))
        raise RuntimeError
    assert all_held(recurrent) == (6.0, [2.0, 3.0], [1.0, 2.0, 3.0], 3) and held.carried == []
    with pytest.raises(RuntimeError), held.verifying(chain_of(7, 8)):
        read_rows(recurrent, [7.0, 8.0])
        raise RuntimeError
    # Plain `generate()` has read the root by then.
    assert all_held(recurrent) == (6.0, [2.0, 3.0], [1.0, 2.0, 3.0], 3) and held.carried == [[7]]


def test_too_many_carried_tokens_are_committed(recurrent: DynamicCache) -> None:
    held = RecurrentCache(recurrent, max_carried=2)
    held.carried = [[7], [8]]
    assert held.spare_slots > 1000
    held.carried = [[7], [8], [9]]
    assert held.spare_slots == 1


# -- a batch whose rows part ------------------------------------------------------------------------------------------


def test_each_row_is_packed_to_its_own_end() -> None:
    """The picture in `RaggedCache`: a keeps three, then one; b keeps one, then three."""
    cache, new_tokens = DynamicCache(), [[5], [5]]
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def add(*rows: list[float]) -> None:
        keys = torch.tensor(rows)[:, None, :, None]
        cache.update(keys, -keys, 0)

    def text() -> list[list[float]]:
        """What each row sees of the cache."""
        keys, visible = cache.layers[0].keys[:, 0, :, 0], held.prefix_mask(padding).bool()
        assert torch.equal(cache.layers[0].values[:, 0, :, 0], -keys) and visible.shape == keys.shape
        return [row[seen].tolist() for row, seen in zip(keys, visible, strict=True)]

    add([0, 0, 1, 2, 3], [1, 2, 3, 4, 5])
    held = RaggedCache(cache, new_tokens)
    chains = build_chains(torch.zeros((2, 3), dtype=torch.long))
    ends = [[1, 2, 3], [1, 2, 3, 4, 5]]
    for number, kept in enumerate(((3, 1), (1, 3), (2, 0), (3, 3))):
        rows = [[10.0 * number + 100 * row + node for node in range(3)] for row in (1, 2)]
        with held.verifying(chains) as path:
            add(*rows)
            for tokens, count in zip(new_tokens, kept, strict=True):
                tokens += [7] * count
            path += range(max(kept))
        ends = [end + row[:count] for end, row, count in zip(ends, rows, kept, strict=True)]
        assert text() == ends
        assert held.rows_since_prefill.tolist() == [[len(tokens) - 1] for tokens in new_tokens]
        assert held.length == 5 + max(len(tokens) - 1 for tokens in new_tokens)

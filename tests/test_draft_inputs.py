"""Which positions of a prompt the draft keeps, what is collected there, and masks.

`V` = 99 is the placeholder id; everything else is text."""

import pytest
import torch

from sparrow_hf.draft_inputs import (
    EVERY_VISUAL_TOKEN,
    MAX_FRAME_HEADER_TOKENS,
    additive_mask,
    causal,
    draft_positions,
    frame_header_mask,
    logarithmic,
    put,
    strided,
)

V = 99


def keep(ids: list[int], glimpse: int, **kwargs):
    return draft_positions(torch.tensor(ids), [V], glimpse, **kwargs)


def test_text_and_strided_visual_tokens_in_order() -> None:
    kept = keep([1, 2, 3, V, V, V, V, V, V, V, V, 4, 5], glimpse=2)
    assert kept.indices.tolist() == [0, 1, 2, 5, 9, 11, 12]
    assert kept.text.tolist() == [0, 1, 2, 11, 12]
    assert kept.visual.tolist() == [5, 9]
    assert kept.position_ids("compact").tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert kept.position_ids("original").tolist() == [0, 1, 2, 5, 9, 11, 12]
    assert (kept.next_position_id("compact"), kept.next_position_id("original")) == (7, 13)


def test_no_glimpse_is_text_only_and_a_short_video_is_kept_whole() -> None:
    assert keep([1, V, V, V, 2], glimpse=0).indices.tolist() == [0, 4]
    assert keep([1, V, V, V, 2], glimpse=64).indices.tolist() == [0, 1, 2, 3, 4]
    assert keep([1, 2, 3], glimpse=64).indices.tolist() == [0, 1, 2]


def test_padding_is_dropped_and_does_not_count_as_position() -> None:
    mask = torch.tensor([0, 0, 1, 1, 1, 1])
    kept = keep([7, 7, 1, V, V, 2], glimpse=1, attention_mask=mask)
    assert kept.indices.tolist() == [2, 4, 5]
    assert kept.position_ids("original").tolist() == [0, 2, 3]
    assert kept.next_position_id("original") == 4


def test_frame_headers_are_not_text_but_a_question_between_images_is() -> None:
    header = list(range(1, MAX_FRAME_HEADER_TOKENS + 1))
    assert keep([50, V, *header, V, 51], glimpse=0).indices.tolist() == [0, len(header) + 3]
    question = [*header, 60]
    assert keep([50, V, *question, V, 51], glimpse=0).indices.tolist() == [0, *range(2, 2 + len(question)), 19 + 1]


def test_frame_headers_by_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.02, 0.05, 0.1, 0.5, 0.0, 1.0):
        for length in (0, 1, 2, 40, 300):
            is_visual = torch.rand(length, generator=generator) < share
            places = is_visual.nonzero().flatten().tolist()
            expected = torch.zeros(length, dtype=torch.bool)
            for before, after in zip(places, places[1:], strict=False):
                expected[before + 1 : after] = after - before - 1 <= MAX_FRAME_HEADER_TOKENS
            assert torch.equal(frame_header_mask(is_visual), expected)


def test_strides_cover_the_whole_video_at_any_length() -> None:
    for length in (64, 100, 8000, 25_000):
        picks = strided(torch.arange(length), 64)
        assert len(picks.unique()) == 64
        assert picks[0] < length / 64
        assert picks[-1] >= length - length / 64


def test_logarithmic_distances_grow_by_a_constant_factor() -> None:
    # c = 2: 2·(e^(k/2) − 1) is 0 · 1.29 · 3.43 · 6.96 · 12.77 · 22.36 · 38.17 · 64.23 · 107.19
    assert logarithmic(torch.arange(100), 10).tolist() == [0, 1, 3, 6, 12, 22, 38, 64]
    assert logarithmic(torch.arange(400), 64).tolist() == [
        *(0, 1, 2, 3, 4, 6, 7, 9, 11, 13, 15, 17, 19, 22, 25, 28, 31, 35, 39, 43, 48, 53, 58, 64, 70, 77, 84, 92, 101),
        *(110, 120, 131, 143, 155, 169, 184, 200, 217, 236, 256, 278, 302, 327, 355, 385),
    ]
    assert [len(logarithmic(torch.arange(length), 64)) for length in (0, 3, 1880, 3200, 25_000)] == [0, 3, 64, 71, 97]


@pytest.mark.parametrize("count", [1, 2, 10, 64, 1000])
def test_the_logarithmic_choice_of_a_prefix_is_the_beginning_of_the_choice(count: int) -> None:
    whole = logarithmic(torch.arange(5000), count).tolist()
    for length in (*range(60), 500, 4999):
        assert logarithmic(torch.arange(length), count).tolist() == [row for row in whole if row < length]


def test_logarithmic_positions_count_the_visual_tokens_of_the_whole_prompt() -> None:
    # Visual tokens 0 … 3 of one video and 4 … 6 of another, which begins at position 23; padding is not counted.
    text = list(range(20, 38))
    ids = [7, 1, V, V, V, V, *text, V, V, V, 2]
    kept = keep(ids, 10, glimpse_spacing="logarithmic", attention_mask=torch.tensor([0] + [1] * (len(ids) - 1)))
    assert kept.visual.tolist() == [2, 3, 5, 26]
    assert kept.indices.tolist() == [1, 2, 3, 5, *range(6, 24), 26, 27]
    assert keep(ids, 0, glimpse_spacing="logarithmic").visual.tolist() == []
    every = keep(ids, EVERY_VISUAL_TOKEN, glimpse_spacing="logarithmic")
    assert every.visual.tolist() == [2, 3, 4, 5, 24, 25, 26]


def test_random_positions_follow_the_generator() -> None:
    ids = [1, *[V] * 50, 2]
    draws = [keep(ids, 8, generator=torch.Generator().manual_seed(seed)).visual.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(draw)) == 8 and draw == sorted(draw) for draw in draws)


@pytest.mark.parametrize("glimpse", [0, 2])
@pytest.mark.parametrize("bridge", [1, 2, 4])
def test_each_layer_is_collected_where_it_is_read(glimpse: int, bridge: int) -> None:
    """Layers 2 and 4 are read at text; the bridge, which may be one of them, at the glimpse."""
    kept, states = keep([1, V, V, 2, 3], glimpse), torch.arange(5.0)[None, :, None]
    wanted = kept.to_collect((2, 4), bridge)
    assert set(wanted) == {2, 4, bridge}
    collected = {layer: 10 * layer + states[:, at] for layer, at in wanted.items()}
    text, visual = kept.by_kind(collected, (2, 4), bridge)
    assert {layer: of_layer.flatten().tolist() for layer, of_layer in text.items()} == {
        2: [20, 23, 24],
        4: [40, 43, 44],
    }
    assert visual.flatten().tolist() == [10 * bridge + at for at in (1, 2)[:glimpse]]


def test_values_are_put_at_their_positions_and_padding_is_dropped() -> None:
    sequence = torch.zeros(2, 3, 1)
    found = put(sequence, torch.tensor([[2, 0], [1, 3]]), torch.tensor([[[5.0], [6.0]], [[7.0], [8.0]]]))
    assert found.squeeze(-1).tolist() == [[6, 0, 5], [0, 7, 0]]
    assert not sequence.any()


def test_masks_by_hand() -> None:
    visible = causal(torch.tensor([[0, 2]]), 4)
    assert visible.int().tolist() == [[[1, 0, 0, 0], [1, 1, 1, 0]]]
    lowest = torch.finfo(torch.bfloat16).min
    mask = additive_mask(visible, torch.bfloat16)
    assert (mask.shape, mask.dtype) == ((1, 1, 2, 4), torch.bfloat16)
    assert mask[0, 0].tolist() == [[0, lowest, lowest, lowest], [0, 0, 0, lowest]]

"""Which prompt rows the draft keeps. `V` = 99 is the placeholder id; everything else is text."""

import torch

from sparrow_hf.rows import MAX_FRAME_HEADER_TOKENS, draft_rows, strided

V = 99


def rows(ids: list[int], glimpse: int, **kwargs):
    return draft_rows(torch.tensor(ids), [V], glimpse, **kwargs)


def test_text_and_strided_visual_rows_in_order() -> None:
    kept = rows([1, 2, 3, V, V, V, V, V, V, V, V, 4, 5], glimpse=2)
    assert kept.indices.tolist() == [0, 1, 2, 5, 9, 11, 12]
    assert kept.text.tolist() == [0, 1, 2, 11, 12]
    assert kept.visual.tolist() == [5, 9]
    assert kept.positions("compact").tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert kept.positions("original").tolist() == [0, 1, 2, 5, 9, 11, 12]
    assert (kept.next_position("compact"), kept.next_position("original")) == (7, 13)


def test_no_glimpse_is_text_only_and_a_short_video_is_kept_whole() -> None:
    assert rows([1, V, V, V, 2], glimpse=0).indices.tolist() == [0, 4]
    assert rows([1, V, V, V, 2], glimpse=64).indices.tolist() == [0, 1, 2, 3, 4]
    assert rows([1, 2, 3], glimpse=64).indices.tolist() == [0, 1, 2]


def test_padding_is_dropped_and_does_not_count_as_position() -> None:
    mask = torch.tensor([0, 0, 1, 1, 1, 1])
    kept = rows([7, 7, 1, V, V, 2], glimpse=1, attention_mask=mask)
    assert kept.indices.tolist() == [2, 4, 5]
    assert kept.positions("original").tolist() == [0, 2, 3]
    assert kept.next_position("original") == 4


def test_frame_headers_are_not_text_but_a_question_between_images_is() -> None:
    header = list(range(1, MAX_FRAME_HEADER_TOKENS + 1))
    assert rows([50, V, *header, V, 51], glimpse=0).indices.tolist() == [0, len(header) + 3]
    question = [*header, 60]
    assert rows([50, V, *question, V, 51], glimpse=0).indices.tolist() == [0, *range(2, 2 + len(question)), 19 + 1]


def test_strides_cover_the_whole_video_at_any_length() -> None:
    for length in (64, 100, 8000, 25_000):
        picks = strided(torch.arange(length), 64)
        assert len(picks.unique()) == 64
        assert picks[0] < length / 64
        assert picks[-1] >= length - length / 64


def test_random_rows_follow_the_generator() -> None:
    ids = [1, *[V] * 50, 2]
    draws = [rows(ids, 8, generator=torch.Generator().manual_seed(seed)).visual.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(draw)) == 8 and draw == sorted(draw) for draw in draws)

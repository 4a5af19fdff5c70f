"""Text first, visual rows later: what a sample shows depends on how far the training is."""

from collections import Counter

import pytest
import torch

from sparrow_hf.training import ALL_VISUAL_ROWS, SparrowTrainingArguments
from sparrow_research.curriculum import CurriculumArguments


def arguments(tmp_path, **overrides):
    return CurriculumArguments(str(tmp_path), use_cpu=True, report_to="none", **overrides)


def shown(args, progress, num_visual_rows=9):
    draws = [torch.Generator().manual_seed(seed) for seed in range(60)]
    return Counter(args.draw_visual_rows(num_visual_rows, progress, generator) for generator in draws)


def test_text_first_then_visual_rows(tmp_path):
    args = arguments(tmp_path, num_visual_rows_min=6, num_visual_rows_max=6, visual_start=0.5, visual_full=1.0)
    assert [args.visual_odds(share) for share in (0.0, 0.5, 0.75, 1.0)] == [0.0, 0.0, 0.5, 1.0]
    assert set(shown(args, 0.02)) == {0}
    halfway = shown(args, 0.75)
    assert set(halfway) == {0, 6} and 15 < halfway[6] < 45
    assert set(shown(args, 1.0)) == {6}
    args.visual_dropout = 1.0
    assert set(shown(args, 1.0)) == {0}


def test_every_visual_row_from_one_step_on(tmp_path):
    every = {"num_visual_rows_min": ALL_VISUAL_ROWS, "num_visual_rows_max": ALL_VISUAL_ROWS}
    args = arguments(tmp_path, visual_start=0.5, visual_full=0.5, **every)
    assert (set(shown(args, 0.49)), set(shown(args, 0.5))) == ({0}, {9})


def test_without_a_curriculum_the_draws_are_the_trainers(tmp_path):
    """What was trained before the options moved here is trained the same again."""
    plain = SparrowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert shown(arguments(tmp_path), 0.0) == shown(plain, 0.0) and len(shown(plain, 0.0)) > 20


@pytest.mark.parametrize("bad", [{"visual_start": 0.6, "visual_full": 0.5}, {"visual_dropout": 1.5}])
def test_contradicting_arguments_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="visual_start ≤ visual_full"):
        arguments(tmp_path, **bad)

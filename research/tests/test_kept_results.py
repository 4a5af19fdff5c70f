"""`research/data/results` belongs to the models that ship: `make results` goes on from it and makes nothing again."""

from pathlib import Path
from typing import Any

import pytest

from sparrow_hf.testbed.families import LLAVA_ONEVISION, QWEN2_5_VL, Family
from sparrow_research.results import __main__ as command
from sparrow_research.results import analyses, draft_steps
from sparrow_research.results.cells import CELLS
from sparrow_research.results.drafts import folders_of, is_finished

KEPT = Path(__file__).parents[1] / "data" / "results"


@pytest.mark.parametrize(
    "family",
    [QWEN2_5_VL, pytest.param(LLAVA_ONEVISION, marks=pytest.mark.full)],
    ids=lambda family: family.name,
)
def test_nothing_is_made_again(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr("sparrow_hf.evaluation.benchmark.compare", refuse)
    monkeypatch.setattr(draft_steps, "prefilled_generator", refuse)
    monkeypatch.setattr(analyses, "analyze", refuse)
    work = command.work_of(family, KEPT)
    folders = folders_of(family, work)
    assert all(map(is_finished, folders.values()))
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    command.measure_all(family, work, list(CELLS))
    analyses.analyse(family, folders[analyses.DRAFT], work)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before

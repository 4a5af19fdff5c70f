"""The whole path from models to tables, on an untrained target and two clips of a few steps each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparrow_hf import SparrowDraftModel
from sparrow_hf.testbed import figures
from sparrow_hf.testbed.figures import Cell
from sparrow_hf.testbed.nano import build_processor, build_target


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that name untrained models; cells small enough for them."""
    processor = build_processor()
    target = build_target(processor.tokenizer, num_hidden_layers=2)
    target.generation_config.suppress_tokens = [target.config.video_token_id, target.config.image_token_id]
    target.save_pretrained(tmp_path / "target")
    processor.save_pretrained(tmp_path / "target")
    for name in ("draft", "text-only"):
        SparrowDraftModel.from_target(target, num_glimpse_tokens=4).save_pretrained(tmp_path / name)
    cells = {
        "greedy": Cell(24, 2, ("none", "chain-3", "10-2-4", "text-only chain-3", "prompt lookup")),
        "sampling": Cell(24, 2, ("chain-3",), temperature=1.0),
    }
    monkeypatch.setattr(figures, "CELLS", cells)
    for name, value in {
        "MAX_NEW_TOKENS": 6,
        "STEP_VISUAL_TOKENS": (24, 120),
        "STEP_CLIPS": 1,
        "STEP_REPEATS": 3,
    }.items():
        monkeypatch.setattr(figures, name, value)
    places = {
        "--output": "figures.json",
        "--report": "figures.md",
        "--runs": "runs",
        "--target": "target",
        "--draft": "draft",
        "--text-only-draft": "text-only",
    }
    threads = str(torch.get_num_threads())
    return ["--threads", threads, *(part for key, name in places.items() for part in (key, str(tmp_path / name)))]


def test_from_models_to_tables(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures.main(options)
    data = json.loads((tmp_path / "figures.json").read_text())
    rows = {(row["cell"], row["arm"]): row for row in data["rows"]}
    assert set(rows) == {
        *(("greedy", arm) for arm in ("plain", "none", "chain-3", "10-2-4", "text-only chain-3", "prompt lookup")),
        *(("sampling", arm) for arm in ("plain", "chain-3")),
    }
    for row in rows.values():
        assert row["identical"] == row["prompts"] == 2
        assert row["provenance"]["dtype"] == "float32"
    assert rows["greedy", "plain"]["dsr"] == rows["greedy", "plain"]["tau"] == 1
    assert rows["greedy", "none"]["tau"] == 1
    assert rows["greedy", "chain-3"]["tree"] == [4, 3, 1]
    for arm in ("chain-3", "10-2-4"):
        # Text and glimpse rows are all there, and nothing beyond them and the tree.
        row = rows["greedy", arm]
        assert row["draft_cache_excess"] <= 0 < row["draft_cache_rows"]
    for step in data["draft_step"]:
        assert step["visual_tokens"] == [24, 120]
        assert len(set(step["draft_rows"])) == 1
        assert step["ratio"] > 0

    report = (tmp_path / "figures.md").read_text()
    assert "## greedy: 24 visual tokens, greedy" in report
    assert "| text-only chain-3 | 2/2 |" in report
    assert "sampling at T = 1" in report
    assert "| 10-2-4 | 2/2 |" in report

    # Once more: everything is there already, so nothing is measured and the same rows come out.
    monkeypatch.setattr(figures, "compare", None)
    with (tmp_path / "runs" / "greedy.jsonl").open("a") as file:
        file.write('{"seed": 11000')  # half a line, as a killed process leaves it
    figures.main(options)
    assert json.loads((tmp_path / "figures.json").read_text()) == data


def test_runs_of_other_weights_are_not_mixed_in(options: list[str], tmp_path: Path):
    figures.main([*options, "--cells", "sampling"])
    target, _ = figures.load_target(tmp_path / "target")
    torch.manual_seed(123)
    SparrowDraftModel.from_target(target, num_glimpse_tokens=4).save_pretrained(tmp_path / "draft")
    with pytest.raises(ValueError, match="other weights"):
        figures.main([*options, "--cells", "sampling"])


def test_the_worst_draft_cache_is_reported():
    from sparrow_hf.evaluation import Run
    from sparrow_hf.testbed.report import draft_cache

    def run(rows: int) -> Run:
        return Run(11, 10, 5, [1] * 5, 4, 1.0, 1.0, draft_cache_rows=rows)

    line: dict[str, Any] = {"prompt": {"text_rows": 20, "glimpse_rows": 8}}
    # 20 + 10 text rows, 8 glimpse rows, 3 levels of 2 tree rows.
    assert draft_cache([run(40), run(44)], [line, line], (9, 4, 2)) == {
        "draft_cache_rows": 44,
        "draft_cache_excess": 0,
    }
    assert draft_cache([run(45)], [line], (9, 4, 2))["draft_cache_excess"] == 1

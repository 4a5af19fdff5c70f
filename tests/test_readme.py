"""The README's figures are those of the measurements kept beside it."""

import json
from pathlib import Path

import pytest

from sparrow_hf.testbed.results.judges import DEFAULT, RIVALS
from sparrow_hf.testbed.results.table import NAMES, Results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATA = ROOT / "docs" / "data"


@pytest.mark.parametrize(("family", "name"), [("qwen2.5-vl", "Qwen2.5-VL"), ("llava-onevision", "LLaVA-OneVision")])
def test_the_demo(family: str, name: str) -> None:
    measured = json.loads((DATA / f"demo-{family}.json").read_text())
    assert measured["identical"] and measured["visual_tokens"] in (400, 401)
    row = f"| {name} | {measured['clips']} of {measured['clips']} | {measured['tau']:.2f} | {measured['dsr']:.2f}× |"
    assert f"{row} {measured['esr']:.2f}× |" in README


@pytest.mark.parametrize(("model_type", "name"), NAMES.items())
def test_the_default_and_its_best_rival(model_type: str, name: str) -> None:
    results = Results.read(DATA / "results.json")
    lengths = results.lengths(model_type)
    assert lengths == [400, 3000, 13_000, 25_000]
    for length in lengths:
        own = results.row(model_type, f"video-{length}", f"{DEFAULT}@chain-5")
        rivals = {rival: results.row(model_type, f"video-{length}", arm) for rival, arm in RIVALS.items()}
        assert own is not None
        best, row = max(rivals.items(), key=lambda rival: rival[1]["dsr"])
        figures = f"| {own['tau']:.2f} | {own['dsr']:.2f}× | {row['tau']:.2f} | {row['dsr']:.2f}× ({best}) |"
        assert f"| {name} | {length:,} {figures}" in README

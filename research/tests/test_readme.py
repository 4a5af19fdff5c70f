"""The README's figures are those of the measurements kept here."""

import json
from pathlib import Path

import pytest

from sparrow_research.results.arms import DEFAULT, Role, arms_of, name_of
from sparrow_research.results.table import NAMES, Results

RESEARCH = Path(__file__).parents[1]
README = (RESEARCH.parent / "README.md").read_text()
DATA = RESEARCH / "data"


@pytest.mark.parametrize(("family", "name"), [("qwen2.5-vl", "Qwen2.5-VL"), ("llava-onevision", "LLaVA-OneVision")])
def test_the_demo(family: str, name: str) -> None:
    measured = json.loads((DATA / f"demo-{family}.json").read_text())
    assert measured["identical"] and measured["visual_tokens"] in (400, 401)
    row = f"| {name} | {measured['clips']} of {measured['clips']} | {measured['tau']:.2f} | {measured['dsr']:.2f}× |"
    assert f"{row} {measured['esr']:.2f}× |" in README
    assert "{:.2f} … {:.2f}".format(*measured["dsr_quartiles"]) in README


def test_the_default_and_its_best_rival() -> None:
    results = Results.read(DATA / "results.json")
    ahead: dict[tuple[str, int], tuple[int, int]] = {}
    cache_rows = []
    for model_type, name in NAMES.items():
        assert results.lengths(model_type) == [400, 3000, 13_000, 25_000]
        for length in results.lengths(model_type):
            own = results.row(model_type, f"video-{length}", DEFAULT)
            rivals = [results.row(model_type, f"video-{length}", arm) for arm in arms_of(Role.RIVAL)]
            assert own is not None
            row = max(rivals, key=lambda rival: rival["dsr"])
            best = name_of(row["arm"])
            figures = f"| {own['tau']:.2f} | {own['dsr']:.2f}× | {row['tau']:.2f} | {row['dsr']:.2f}× ({best}) |"
            assert f"| {name} | {length:,} {figures}" in README
            pairs = list(zip(own["dsr_per_prompt"], row["dsr_per_prompt"], strict=True))
            ahead[name, length] = sum(ours > its for ours, its in pairs), len(pairs)
            cache_rows.append(own["draft_cache_rows"])
    short, middle = ("{} of {}".format(*ahead["Qwen2.5-VL", length]) for length in (400, 3000))
    assert f"on Qwen2.5-VL ours is ahead on {short} clips at 400 and on {middle} at 3,000" in README
    long = [sum(counts) for counts in zip(*(ahead[key] for key in ahead if key[1] >= 13_000), strict=True)]
    assert "13,000 on it is on {} of {}, both targets together".format(*long) in README
    assert f"cache has {min(cache_rows)} to {max(cache_rows)} rows at every length" in README

"""Drafts trained with few and many passes, measured with long chains: each once, resumed, told as a table."""

import json
from pathlib import Path

import pytest

from sparrow_research import deep_chains, recipes


def test_every_recipe_is_trained_once_and_measured_with_the_same_chains(
    small_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (recipes, deep_chains):
        monkeypatch.setattr(module, "LENGTHS", {400: 2})
    output = small_world / "deep.json"
    command = [
        "--target",
        str(small_world / "target"),
        "--work",
        str(small_world),
        "--output",
        str(output),
        "--steps",
        "2",
    ]
    deep_chains.main([*command, "--seeds", "0"])
    rows = json.loads(output.read_text())
    assert [(row["recipe"], row["seed"]) for row in rows] == [(name, 0) for name in deep_chains.RECIPES]
    assert [row["steps"] for row in rows] == [2, 2, 2, 2, 1]
    for row in rows:
        reached = row["measured"]["400"]["reached"]
        assert len(reached) == deep_chains.LEVELS and reached == sorted(reached, reverse=True)
        assert row["measured"]["400"]["tau"] == pytest.approx(1 + sum(reached), abs=2e-3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(deep_chains.RECIPES) and lines[0].startswith("| recipe | steps | τ | token 1 |")

    def refuse(*arguments: object) -> None:
        raise AssertionError("this run was there already")

    monkeypatch.setattr(deep_chains, "run_recipe", refuse)
    deep_chains.main([*command, "--seeds", "0"])


def test_the_figures_of_the_page_are_those_that_are_kept() -> None:
    repository = Path(__file__).parents[2]
    rows = json.loads((repository / "research/data/deep_chains.json").read_text())
    told = [line.split(" | ") for line in deep_chains.table(rows).splitlines()[2:]]
    page = (repository / "docs/training.md").read_text().splitlines()
    shown = [line for line in page if line.startswith(("  | 5 passes", "  | 8 passes", "  | 12 passes"))]
    assert len(shown) == len(told)
    for cells, line in zip(told, shown, strict=True):
        tau, first, fifth, sixth, last = (cells[place].split()[0] for place in (2, 3, 5, 6, 9))
        assert line.endswith(f"| {tau} | {first} | {fifth} | {sixth} | {last} |")


def test_a_share_is_of_the_chains_that_got_so_far() -> None:
    reached = [0.8, 0.4, 0.2] + [0.1] * 9
    run = {"recipe": "5 passes", "seed": 0, "steps": 200, "seconds": 9}
    rows = [{**run, "measured": {"400": {"tau": 2.9, "reached": each}}} for each in (reached, [1.0] * 12)]
    (line,) = deep_chains.table(rows).splitlines()[2:]
    assert line == "| 5 passes | 200 | 2.90 (2.90 … 2.90) | .90 | .86 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 9 |"

"""The comparison of recipes: every run once, resumed where it was stopped, told as a table."""

import json
from pathlib import Path

import pytest

from sparrow_hf.testbed.nano import ASSETS
from sparrow_research import recipes, retrain

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "research/data"


def test_runs_are_made_once_and_told_as_a_table(small_world, monkeypatch):
    monkeypatch.setattr(recipes, "LENGTHS", {16: 2, 32: 1})
    output, report = small_world / "recipes.json", small_world / "recipes.md"
    command = ["--target", str(small_world / "target"), "--work", str(small_world), "--output", str(output)]
    command += ["--report", str(report), "--steps", "2", "--seeds", "0", "1"]
    recipes.main([*command, "--recipes", "default"])
    recipes.main([*command, "--recipes", "default", "128 of 384 tokens"])
    rows = json.loads(output.read_text())
    assert [(row["recipe"], row["seed"]) for row in rows] == [
        ("default", 0),
        ("128 of 384 tokens", 0),
        ("default", 1),
        ("128 of 384 tokens", 1),
    ]
    assert all(set(row["tau"]) == {"16", "32"} and row["tau"]["16"] >= 1 for row in rows)
    assert set(rows[0]["tau_by_glimpse"]) == {"0", "16", "256"}
    assert "**Measured on another target than the one that ships**" in report.read_text()
    table = [line for line in report.read_text().splitlines() if line.startswith("|")]
    assert table[0] == "| recipe | 16 | 32 | seeds | steps |"
    assert sum(line.startswith("| default") for line in table) == 4
    assert all(line.endswith("| 2 | 2 |") for line in table[2:])

    shipped = retrain.load_target(small_world / "target")
    monkeypatch.setattr(recipes, "load_target", lambda *folder: shipped)
    recipes.write_report(rows, report)
    assert "Measured on another" not in report.read_text()

    def refuse(*arguments):
        raise AssertionError("this run was there already")

    monkeypatch.setattr(recipes, "run_recipe", refuse)
    recipes.main([*command, "--recipes", "default", "128 of 384 tokens"])
    assert json.loads(output.read_text()) == rows


def test_a_recording_has_the_layers_of_every_recipe():
    target, _ = retrain.load_target(ASSETS / "target")
    recorded = {*retrain.recorded_features(target)}
    read = [recipe.draft.get("feature_layers", [-1]) for recipe in recipes.RECIPES.values()]
    assert [2, 12, 21, -1] in read and all({*layers} <= recorded for layers in read)


def test_the_page_is_what_the_kept_runs_give(tmp_path):
    rows = json.loads((DATA / "recipes.json").read_text())
    recipes.write_results(rows, tmp_path / "recipes.json", tmp_path / "recipes.md")
    assert (tmp_path / "recipes.json").read_text() == (DATA / "recipes.json").read_text()
    assert (tmp_path / "recipes.md").read_text() == (REPOSITORY / "docs/recipes.md").read_text()


@pytest.mark.parametrize("kept", ["recipes.json", "feature_layers.json"])
def test_kept_runs_are_of_recipes_that_can_be_run_again(kept):
    assert {row["recipe"] for row in json.loads((DATA / kept).read_text())} <= set(recipes.RECIPES)


def test_several_layers_are_brought_to_one_length_unless_the_recipe_says_otherwise():
    target, _ = retrain.load_target(ASSETS / "target")
    for name, scaled in (("three feature layers", True), ("three feature layers, not scaled", False)):
        assert retrain.build_draft(target, 0, **recipes.RECIPES[name].draft).config.feature_norm is scaled


def test_a_run_of_a_recipe_that_is_gone_stands_last(tmp_path):
    rows = json.loads((DATA / "feature_layers.json").read_text())
    gone = [row | {"recipe": "an earlier name"} for row in rows if row["recipe"] == "default"]
    recipes.write_results([*gone, *rows], tmp_path / "found.json", tmp_path / "found.md")
    first = [row["recipe"] for row in json.loads((tmp_path / "found.json").read_text()) if row["seed"] == 0]
    assert first == ["default", "three feature layers", "three feature layers, not scaled", "an earlier name"]
    assert "| an earlier name | 4.89" in (tmp_path / "found.md").read_text()

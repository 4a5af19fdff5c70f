"""The README's figures are those of the measurements kept here. Figures are compared by number, words are free."""

import json
import re
from pathlib import Path

import pytest

from sparrow_research.results.arms import DEFAULT, MSD, TUNED, TUNED_COMPILED, Role, arms_of, name_of
from sparrow_research.results.cells import AS_SHIPPED
from sparrow_research.results.table import NAMES, Results

RESEARCH = Path(__file__).parents[1]
README = (RESEARCH.parent / "README.md").read_text()
DATA = RESEARCH / "data"


def table_rows(*starts: str) -> list[list[str]]:
    """Cells of the table rows whose first cells are these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:1] == "|"]
    return [row for row in rows if tuple(row[: len(starts)]) == starts]


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


@pytest.mark.parametrize(("family", "name"), [("qwen2.5-vl", "Qwen2.5-VL"), ("llava-onevision", "LLaVA-OneVision")])
def test_the_demo(family: str, name: str) -> None:
    measured = json.loads((DATA / f"demo-{family}.json").read_text())
    assert measured["identical"] and measured["visual_tokens"] in (400, 401)
    clips = f"{measured['clips']} of {measured['clips']}"
    ((*_, tau, dsr, esr),) = table_rows(name, clips)
    told = [numbers(cell)[0] for cell in (tau, dsr, esr)]
    assert told == [round(measured[figure], 2) for figure in ("tau", "dsr", "esr")]
    lower, upper = (round(quartile, 2) for quartile in measured["dsr_quartiles"])
    assert (lower, upper) in {tuple(map(float, pair)) for pair in re.findall(r"(\d\.\d\d) … (\d\.\d\d)", README)}


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
            best = max(rivals, key=lambda rival: rival["dsr"])
            ((*_, tau, dsr, rival_tau, rival_dsr),) = table_rows(name, f"{length:,}")
            told = [numbers(cell)[0] for cell in (tau, dsr, rival_tau, rival_dsr)]
            assert told == [round(row[figure], 2) for row in (own, best) for figure in ("tau", "dsr")]
            assert f"({name_of(best['arm'])})" in rival_dsr
            pairs = list(zip(own["dsr_per_prompt"], best["dsr_per_prompt"], strict=True))
            ahead[name, length] = sum(ours > its for ours, its in pairs), len(pairs)
            cache_rows.append(own["draft_cache_rows"])
    long = tuple(sum(counts) for counts in zip(*(ahead[key] for key in ahead if key[1] >= 13_000), strict=True))
    counts = [*ahead["Qwen2.5-VL", 400], *ahead["Qwen2.5-VL", 3000], *long]
    assert counts == counts_ahead()
    assert (min(cache_rows), max(cache_rows)) in {
        tuple(map(int, pair)) for pair in re.findall(r"(\d+) to (\d+) rows", README)
    }


def test_far_beyond_the_lengths_of_training() -> None:
    results, cell = Results.read(DATA / "results.json"), "beyond-64000"
    for model_type, name in NAMES.items():
        rows = [row for arm in arms_of(Role.RIVAL) if (row := results.row(model_type, cell, arm)) is not None]
        best = max(rows, key=lambda row: row["dsr"])["arm"]
        for arm in (DEFAULT, best, MSD):
            there, base = results.row(model_type, cell, arm), results.by_length(model_type, arm)[400]["tau"]
            assert there is not None and there["identical"] == there["prompts"] == 4
            label = "ours" if arm == DEFAULT else name_of(arm)
            taus = f"{base:.2f} | {there['tau']:.2f} | {there['tau'] / base:.2f}"
            line = f"| {name} | {label} | {taus} | {there['dsr']:.2f}× | {there['draft_cache_rows']:,} |"
            assert line in README, line


def test_the_draft_as_it_ships() -> None:
    results = Results.read(DATA / "results.json")
    for model_type, name in NAMES.items():
        for length in results.lengths(model_type, AS_SHIPPED):
            cell = f"{AS_SHIPPED}{length}"
            own, compiled = (results.row(model_type, cell, arm) for arm in (TUNED, TUNED_COMPILED))
            assert own is not None
            figures = [own["tau"], own["dsr"], own["dsr_over_best"]]
            figures += [compiled["dsr"], compiled["dsr_over_best"]] if compiled is not None else []
            ((*_, tau, dsr, over, compiled_dsr, compiled_over),) = table_rows(
                f"{name}, chain of {results.shipped_depth(model_type)}", f"{length:,}"
            )
            told = numbers(" ".join((tau, dsr, over, compiled_dsr, compiled_over)))
            assert told == [round(figure, 2) for figure in figures]


def counts_ahead() -> list[int]:
    """The three "n of m" of the paragraph that says on how many clips ours is ahead."""
    paragraph = next(part for part in README.split("\n\n") if "ahead on" in part)
    return [int(number) for pair in re.findall(r"(\d+) of (\d+)", paragraph) for number in pair]

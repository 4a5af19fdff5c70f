"""The figures of docs/speed.md are those in data/gpu."""

import json
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/speed.md").read_text()


def data(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / f"research/data/gpu/{name}.json").read_text())


def arm(run: dict[str, Any], part: str, prompt: int, name: str) -> dict[str, Any]:
    return next(
        row for row in run[part]["rows"] if row["prompt"] == prompt and row.get("arm") == name and "round_ms" in row
    )


def test_the_table_of_rounds() -> None:
    run = data("h100")
    static, compiled = "chain-5, static, not compiled", "chain-5, static, compiled"
    for prompt, part in ((3000, "compiled"), (25000, "compiled_long")):
        ours, ours_compiled = arm(run, "rounds", prompt, static), arm(run, part, prompt, compiled)
        plain = arm(run, "rounds", prompt, "plain, dynamic")["round_ms"]
        cells = [f"{prompt:,}", f"{plain:.1f}"]
        cells.append(
            f"{arm(run, part, prompt, 'plain, static, compiled')['round_ms']:.2f}"
            if prompt == 3000
            else "not measured"
        )
        for each in (ours, ours_compiled):
            cells += [f"{each['round_ms']:.2f}", f"{each['planted_token_ms']:.2f} at {each['planted_tau']:.1f}"]
        assert f"| {' | '.join(cells)} |" in PAGE
    longest = data("h200")
    names = ("plain, dynamic", "plain, static, compiled", static, compiled)
    eager, plain_compiled, ours, ours_compiled = (arm(longest, "compiled_long", 25000, name) for name in names)
    cells = ["25,000, an H200", f"{eager['round_ms']:.1f}", f"{plain_compiled['round_ms']:.2f}"]
    for each in (ours, ours_compiled):
        cells += [f"{each['round_ms']:.2f}", f"{each['planted_token_ms']:.2f} at {each['planted_tau']:.1f}"]
    assert f"| {' | '.join(cells)} |" in PAGE
    token = ours_compiled["planted_token_ms"]
    assert f"{plain_compiled['round_ms'] / token:.1f} times as fast as plain compiled" in PAGE
    plain = arm(run, "rounds", 3000, "plain, dynamic")["round_ms"]
    compiled_plain = arm(run, "compiled", 3000, "plain, static, compiled")["round_ms"]
    token = arm(run, "compiled", 3000, compiled)["planted_token_ms"]
    assert f"{plain / token:.1f} times as long" in PAGE and f"{compiled_plain / token:.1f} times as long" in PAGE
    longer = [arm(run, "rounds", prompt, "chain-10, static, not compiled")["round_ms"] for prompt in (3000, 25000)]
    assert f"{longer[0]:.2f} and {longer[1]:.2f} ms a round" in PAGE


def test_the_readme() -> None:
    run = data("h100")
    figures = (
        arm(run, "compiled", 3000, "chain-5, static, compiled")["planted_token_ms"],
        arm(run, "rounds", 3000, "plain, dynamic")["round_ms"],
        arm(run, "compiled", 3000, "plain, static, compiled")["round_ms"],
    )
    sentence = "a token took {:.1f} ms at 3,000 rows; plain `generate()` took {:.0f} ms, compiled {:.1f} ms".format(
        *figures
    )
    text = " ".join((REPOSITORY / "README.md").read_text().split())
    assert sentence in text
    longest, names = data("h200"), ("chain-5, static, compiled", "plain, dynamic", "plain, static, compiled")
    ours, eager, plain = (arm(longest, "compiled_long", 25000, name) for name in names)
    figures = (ours["planted_token_ms"], eager["round_ms"], plain["round_ms"])
    assert "it was {:.1f} ms, and plain {:.0f} ms, compiled {:.1f} ms".format(*figures) in text


def test_attention_and_steps() -> None:
    rows = {(row["W"], row["rows"]): row for row in data("h100")["attention"]["rows"]}
    for count in (6, 16):
        row = rows[28672, count]
        assert re.search(rf"{row['split_us']:.0f}( µs)? instead of {row['folded_us']:.0f}", PAGE)
    before = data("h100-before")
    steps = {
        row["rows"]: row["ms"]
        for row in before["steps"]["rows"]
        if row.get("prompt") == 3000 and row.get("way") == "static, folded, graph"
    }
    for count in (1, 6, 16, 64):
        assert f"{steps[count]:.1f} " in PAGE
    fell = arm(before, "rounds", 25000, "chain-5, static, not compiled")["round_ms"]
    assert (
        f"from {fell:.1f} to {arm(data('h100'), 'rounds', 25000, 'chain-5, static, not compiled')['round_ms']:.1f} ms"
        in PAGE
    )


def test_identity() -> None:
    before = data("h100-before")
    fp32 = [row for row in before["identity"]["rows"] if row.get("dtype") == "torch.float32"]
    assert fp32 and all(row["identical"] == row["prompts"] == 6 for row in fp32)
    assert all(row["identical"] == row["prompts"] for row in data("h100")["identity"]["rows"])
    rows = data("h200")["identity"]["rows"]
    exact = [row for row in rows if row["dtype"] == "torch.float32"]
    assert len(exact) == 10 and all(row["identical"] == row["prompts"] == 6 for row in exact)
    kept = {
        (row["shape"], "cache_implementation" in row["options"], row["prompt"]): row["identical"]
        for row in rows
        if row["dtype"] == "torch.bfloat16"
    }
    plain, dynamic, static = (
        [kept[(*arm, prompt)] for prompt in (400, 3000)]
        for arm in (("plain", True), ("chain-5", False), ("chain-5", True))
    )
    told = " ".join(PAGE.split())
    assert f"gives {plain[0]} and {plain[1]} of its own dynamic texts" in told
    assert f"{dynamic[0]} and {dynamic[1]} (dynamic) and {static[0]} and {static[1]} (static)" in told
    families = before["families"]
    assert families["cases"] == families["greedy_identical"] == families["sampled_identical"] == 68
    assert f"{len(families['families'])} families" in PAGE


def test_the_table_of_a_cpu() -> None:
    found = json.loads((REPOSITORY / "research/data/compiled_cpu.json").read_text())
    rows = {(row["visual_tokens"], row["arm"]): row for row in found["rows"]}
    for length in (400, 3000):
        arms = ("plain-compiled", "draft@chain-5", "draft", "draft/compiled")
        cells = [f"{length:,}", str(rows[length, "plain"]["prompts"])]
        cells += [f"{rows[length, name]['dsr']:.2f}" for name in arms]
        cells.append(f"{rows[length, 'draft/compiled']['dsr_over_best']:.2f}")
        assert f"| {' | '.join(cells)} |" in PAGE
    assert all(row["identical"] == row["prompts"] for row in found["rows"])


def test_the_table_of_another_cpu() -> None:
    found = json.loads((REPOSITORY / "research/data/tuned_400.json").read_text())
    quartiles = []
    for family, name in (
        ("qwen2_5_vl", "Qwen2.5-VL, chain of 12"),
        ("llava_onevision", "LLaVA-OneVision, chain of 10"),
    ):
        rows = {row["arm"]: row for row in found["rows"] if row["family"] == family}
        assert all(row["identical"] == row["prompts"] == 16 for row in rows.values())
        ours = rows["draft:sparrow/compiled"]
        best = rows[ours["best_baseline"]]
        cells = [rows[arm]["dsr"] for arm in ("draft:sparrow@chain-5", "draft:sparrow")]
        numbers = [best["dsr"], *cells, ours["dsr"], ours["dsr_over_best"]]
        assert f"| {name} | {' | '.join(f'{number:.2f}' for number in numbers)} |" in PAGE
        quartiles.append(" … ".join(f"{each:.2f}" for each in ours["dsr_quartiles"]))
    assert f"compiled chains: {' and '.join(quartiles)}." in PAGE

"""The evidence from end to end, on an untrained target: drafts, cells, analysis, report; resumed; judged."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_targets import save_small_target

from sparrow_hf import SparrowDraftModel
from sparrow_hf.draft_inputs import EVERY_VISUAL_TOKEN
from sparrow_hf.testbed.families import QWEN2_5_VL
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.training import ALL_VISUAL_ROWS
from sparrow_research import processes, retrain
from sparrow_research.pretrain import export
from sparrow_research.results import __main__ as command
from sparrow_research.results import analyses, cells, draft_steps, drafts
from sparrow_research.results.arms import ARMS, CURVES, Role, arms_of
from sparrow_research.results.cells import CELLS, Cell
from sparrow_research.results.claims import OURS, PAPERS, paragraph
from sparrow_research.results.report import arms_table, beyond_table
from sparrow_research.results.table import Results

CHAIN, RIVAL = "draft:sparrow@chain-5", "draft:msd@chain-5"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped models, untrained, and constants small enough for them."""
    save_small_target(tmp_path / "shipped" / "target", QWEN2_5_VL, 5)
    (tmp_path / "shipped" / "target" / "PROVENANCE.json").write_text(
        json.dumps(
            {"content_accuracy_after_bf16_rounding": {"24": 0.96, "48": 0.96}, "evaluation_clips": {"24": 2, "48": 1}}
        )
    )
    loaded, _ = retrain.load_target(tmp_path / "shipped" / "target")
    draft = retrain.build_draft(loaded)
    draft.save_pretrained(tmp_path / "shipped" / "draft")
    (tmp_path / "shipped" / "draft" / "PROVENANCE.json").write_text(json.dumps({"steps": 2}))
    for module in (drafts, analyses, command):
        monkeypatch.setattr(module, "SHIPPED", {QWEN2_5_VL.name: tmp_path / "shipped", "llava-onevision": tmp_path})
    monkeypatch.setattr(drafts, "CLIPS", 2)
    monkeypatch.setattr(retrain, "SHORT_CLIPS", (16, 24))
    monkeypatch.setattr(retrain, "LONG_SHARE", 0.0)
    monkeypatch.setattr(retrain, "MAX_CAPTION_TOKENS", 8)
    arms = ("none", "prompt-lookup", CHAIN, "draft:sparrow@10-2-4", RIVAL, f"{RIVAL}/glimpse=0", "draft:paper@chain-5")
    monkeypatch.setattr(
        cells,
        "CELLS",
        {
            "video-24": Cell(arms, 2, 24),
            "video-48": Cell(arms, 1, 48),
            "sampling-400": Cell((CHAIN,), 1, 24, temperature=1.0),
            "pictures": Cell((CHAIN, "assistant:sibling"), 1, kind="picture"),
            "text": Cell((CHAIN,), 1, kind="text"),
            "bfloat16-400": Cell((CHAIN,), 1, 24, dtype="bfloat16"),
        },
    )
    monkeypatch.setattr(command, "CELLS", cells.CELLS)
    monkeypatch.setattr(cells, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(analyses, "CLIPS", {24: 1, 48: 1})
    monkeypatch.setattr(analyses, "MAX_CAPTION_TOKENS", 6)
    for name, value in {"VISUAL_TOKENS": (24, 48), "CLIPS": 1, "REPEATS": 3}.items():
        monkeypatch.setattr(draft_steps, name, value)
    # A process of its own would not see the constants above.
    monkeypatch.setattr(processes, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    # Nor does the sibling have to learn anything.
    monkeypatch.setattr(command, "train_sibling", lambda family, work: place_sibling(work))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def place_sibling(work: Path) -> None:
    processor = build_processor()
    export(build_target(processor.tokenizer, 1, seed=1), processor, work / "sibling")
    (work / "sibling" / "finished.json").write_text("{}")


def test_from_models_to_the_report(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, report = shipped / "results.json", shipped / "docs" / "results.md"
    arguments = ["--work", str(shipped / "work"), "--output", str(output), "--report", str(report)]
    arguments += ["--families", "qwen2.5-vl", "--drafts", "msd", "text-only"]
    command.main([*arguments, "--note", "On a shared machine."])
    found = Results.read(output)
    assert found.note in report.read_text()
    assert list(found.families) == ["qwen2_5_vl"] and found.lengths("qwen2_5_vl") == [24, 48]
    # `paper` was not trained, so its arm is left out; everything else was measured.
    assert [row["arm"] for row in found.cell("qwen2_5_vl", "video-24")] == [
        "plain",
        *("none", "prompt-lookup", CHAIN, "draft:sparrow@10-2-4", RIVAL, f"{RIVAL}/glimpse=0"),
    ]
    assert found.row("qwen2_5_vl", "pictures", "assistant:sibling") is not None
    assert found.row("qwen2_5_vl", "pictures", CHAIN)["visual_tokens"] == 4
    assert found.row("qwen2_5_vl", "text", CHAIN)["visual_tokens"] == 0
    for row in found.rows:
        dtype = row["provenance"]["dtype"]
        assert dtype == ("bfloat16" if "bfloat16" in row["benchmark"] else "float32")
        if dtype == "float32":
            assert row["identical"] in (row["prompts"], None)
    text = report.read_text()
    assert "**Drafting loses nothing: holds.**" in text
    assert "| **Sparrow (ours), glimpse of 64** |" in text
    assert {row["prompts"] for row in found.shared} == {1} and {row["length"] for row in found.shared} == {24, 48}
    for name in ("tau", "dsr", "qwen2_5_vl/retention", "qwen2_5_vl/removal"):
        assert f"](figures/{name}.png)" in text
        assert (report.parent / "figures" / f"{name}.png").stat().st_size > 1000
    assert report.with_name("results-tables.md").read_text().count(": qwen2_5_vl, ") == 6

    def refuse(*arguments: Any) -> None:
        raise AssertionError("this was done already")

    data = json.loads(output.read_text())
    # What was needed on the way need not be kept.
    (work,) = (shipped / "work").iterdir()
    for folder in ("analysis", "recording"):
        shutil.rmtree(work / folder)
    # What is recommended is today's rule, whatever the kept file says.
    analysis = json.loads((work / "analysis.json").read_text())
    (work / "analysis.json").write_text(json.dumps(analysis | {"recommendation": {"needed_layers": 99}}))
    monkeypatch.setattr(command, "record_clips", refuse)
    monkeypatch.setattr("sparrow_hf.evaluation.benchmark.compare", refuse)
    monkeypatch.setattr("sparrow_hf.analysis.run.measure", refuse)
    command.main(arguments)
    assert json.loads(output.read_text()) == data
    # Another target starts anew: nothing of the old one's is taken for its own.
    weights = load_file(shipped / "shipped" / "target" / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, shipped / "shipped" / "target" / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match="done already"):
        command.main([*arguments, "--parts", "train"])
    command.main([*arguments, "--parts"])
    assert json.loads(output.read_text())["rows"] == []
    assert report.read_text().startswith("# The evidence")


def test_every_contender_can_be_built_and_reads_what_it_learned_from(shipped: Path) -> None:
    target, _ = retrain.load_target(shipped / "shipped" / "target")
    layers = {}
    for name, recipe in drafts.DRAFTS.items():
        draft = retrain.build_draft(target, 0, name == "text-only", recipe.draft_class, **recipe.draft)
        assert isinstance(draft, SparrowDraftModel) and name in drafts.MEANINGS
        layers[name] = draft.config.visual_bridge_layer
        # No draft is shown visual rows in use that it never saw, nor asked to do without what it was promised.
        glimpse, most = draft.config.num_glimpse_tokens, recipe.training.get("num_visual_rows_max", 64)
        if name not in ("paper", "no-bridge", "no-mtp", "text-only"):
            assert (glimpse, most) in {(64, 64), (0, 0), (EVERY_VISUAL_TOKEN, ALL_VISUAL_ROWS)}, name
        else:
            assert glimpse == 0
    assert {name for name, layer in layers.items() if layer == 0} == {"msd", "vispec"}
    assert set(layers.values()) == {0, 1}


def test_one_table_knows_every_arm() -> None:
    measured = {arm for cell in CELLS.values() for arm in cell.arms}
    assert measured == set(ARMS) and set(CURVES) < measured
    # No two arms are told apart by nothing.
    assert len({entry.label for entry in ARMS.values()}) == len(ARMS)


FAMILY = "qwen2_5_vl"


def made_up(taus: dict[str, dict[int, float]], right: dict[int, float] | None = None) -> Results:
    """Results of one family: arm → length → τ, DSR being half of it, and how much of the target's text is right."""
    found = [
        {
            "family": FAMILY,
            "arm": arm,
            "length": length,
            "benchmark": f"video-{length}",
            "tau": tau,
            "dsr": tau / 2,
            "dsr_per_prompt": [tau / 2 - 0.1, tau / 2 + 0.1],
            "esr": tau / 3,
            "prefill_share": length / 1e5,
            "draft_cache_rows": 200,
            "identical": 4,
            "prompts": 4,
            "provenance": {"dtype": "float32"},
        }
        for arm, lengths in taus.items()
        for length, tau in lengths.items()
    ]
    accuracy = {str(length): share for length, share in (right or {400: 0.97, 25_000: 0.96}).items()}
    steps = [{"family": FAMILY, "tree": "chain-5", "visual_tokens": n, "per_clip": [5.0, 7.0]} for n in (400, 25_000)]
    family = {"content_accuracy": accuracy, "clips": {}, "training_steps": 600, "analysis": None}
    return Results({"note": "", "rows": found, "shared": found, "draft_steps": steps, "families": {FAMILY: family}})


def verdict(title: str, results: Results) -> str:
    claim = next(claim for claim in (*PAPERS, *OURS) if claim.title.startswith(title))
    return paragraph(claim, results)


MSD, ALL_ROWS, PAPER = "draft:msd@chain-5", "draft:all-rows@chain-5", "draft:paper@chain-5"
EVERY_RIVAL = {arm: {400: 3.0, 25_000: 3.0} for arm in arms_of(Role.RIVAL)}
ABLATED = {"draft:no-bridge@chain-5": {400: 3.5, 25_000: 4.0}, "draft:no-mtp@chain-5": {400: 3.5, 25_000: 4.0}}


@pytest.mark.parametrize(
    ("title", "taus", "expected"),
    [
        ("Figure 1a", {MSD: {400: 4.0, 25_000: 3.0}, ALL_ROWS: {400: 4.0, 25_000: 3.5}}, "holds"),
        ("Figure 1a", {MSD: {400: 4.0, 25_000: 3.0}, ALL_ROWS: {400: 4.0, 25_000: 3.9}}, "does not hold"),
        ("Figure 1a", {MSD: {400: 4.0}, ALL_ROWS: {400: 4.0}}, "cannot be told here"),
        ("Figure 1b", {MSD: {400: 4.0, 25_000: 3.0}, f"{MSD}/glimpse=0": {400: 3.0, 25_000: 3.1}}, "holds"),
        ("Figure 1b", {MSD: {400: 4.0, 25_000: 3.0}, f"{MSD}/glimpse=0": {400: 4.1, 25_000: 2.9}}, "does not hold"),
        ("Figure 2", {CHAIN: {400: 4.0}}, "cannot be told here"),
        ("The main comparison", EVERY_RIVAL | {PAPER: {400: 2.0, 25_000: 3.1}}, "holds"),
        ("The main comparison", EVERY_RIVAL | {PAPER: {400: 4.0, 25_000: 2.9}}, "does not hold"),
        # A rival is missing.
        ("The main comparison", {MSD: {25_000: 3.0}, PAPER: {25_000: 3.1}}, "cannot be told here"),
        ("Lengths", {PAPER: {400: 4.0, 25_000: 3.9}}, "holds"),
        ("Lengths", {PAPER: {400: 4.0, 25_000: 3.7}}, "does not hold"),
        ("Lengths", {PAPER: {400: 4.0}}, "cannot be told here"),
        (
            "The ablation",
            ABLATED | {PAPER: {400: 4.0, 25_000: 3.9}, f"{PAPER}/glimpse=all": {400: 4.2, 25_000: 1.2}},
            "holds",
        ),
        (
            "The ablation",
            ABLATED | {PAPER: {400: 3.4, 25_000: 3.9}, f"{PAPER}/glimpse=all": {400: 4.2, 25_000: 1.2}},
            "does not hold",
        ),
        ("The prefill", {CHAIN: {400: 4.0, 25_000: 4.0}}, "holds"),
        ("Drafting", {CHAIN: {400: 4.0}}, "holds"),
        ("Drafting", {"prompt-lookup": {400: 4.0}}, "cannot be told here"),
        # A glimpse of another size is not the default.
        (
            "No chain",
            {CHAIN: {400: 2.1}, f"{CHAIN}/glimpse=all": {400: 1.0}, "draft:sparrow@48-5-10": {400: 1}},
            "holds",
        ),
        ("No chain", {CHAIN: {400: 2.1, 25_000: 1.9}}, "does not hold"),
        # Faster than plain, but not by its draft.
        ("No chain", {CHAIN: {400: 2.1, 25_000: 2.5}, "none": {400: 2.0, 25_000: 2.6}}, "does not hold"),
        ("No chain", {CHAIN: {400: 2.1, 25_000: 2.7}, "none": {400: 2.0, 25_000: 2.6}}, "holds"),
        (
            "A glimpse",
            {
                CHAIN: {400: 4.2, 25_000: 4.0},
                f"{CHAIN}/glimpse=0": {400: 4.0, 25_000: 3.9},
                "draft:hivis@chain-5": {400: 4.1, 25_000: 3.9},
                PAPER: {400: 3, 25_000: 3},
            },
            "holds",
        ),
        (
            "A glimpse",
            {
                CHAIN: {400: 4.2, 25_000: 4.0},
                f"{CHAIN}/glimpse=0": {400: 4.0, 25_000: 3.9},
                "draft:hivis@chain-5": {400: 4.1, 25_000: 4.1},
                PAPER: {400: 3, 25_000: 3},
            },
            "does not hold",
        ),
        ("The draft's cost", {CHAIN: {400: 4.2, 25_000: 4.0}}, "holds"),
    ],
)
def test_verdicts_follow_from_the_figures(title: str, taus: dict[str, dict[int, float]], expected: str) -> None:
    assert f": {expected}.** Qwen2.5-VL: " in verdict(title, made_up(taus))


def test_a_draft_whose_cache_grows_is_told() -> None:
    results = made_up({CHAIN: {400: 4.0, 25_000: 4.0}})
    results.shared[1]["draft_cache_rows"] = 240
    assert ": does not hold.**" in verdict("The draft's cost", results)
    results.shared[1]["draft_cache_rows"] = 210
    assert ": holds.**" in verdict("The draft's cost", results)
    # Two clips may be timed at two speeds; one clip's lengths may not.
    results.draft_steps[1]["per_clip"] = [5.0, 8.2]
    told = verdict("The draft's cost", results)
    assert ": does not hold.**" in told and "in ms at 400, 25,000 on each of 2 clips: 5.00, 5.00; 7.00, 8.20." in told


def test_where_the_target_errs_nothing_is_asked_of_the_draft() -> None:
    taus = {PAPER: {400: 4.0, 3000: 3.9, 25_000: 2.0}}
    told = verdict("Lengths", made_up(taus, {400: 0.97, 3000: 0.96, 25_000: 0.5}))
    assert ": holds.**" in told and "2.00 at 25,000 (target 0.50 right); judged at 3,000." in told
    assert ": cannot be told here.**" in verdict("Lengths", made_up(taus, {400: 0.9, 3000: 0.96, 25_000: 0.97}))


def test_the_best_rival_and_the_margin_are_named() -> None:
    rivals = EVERY_RIVAL | {"draft:vispec@chain-5": {400: 3.2, 25_000: 3.2}, PAPER: {400: 4.0, 25_000: 4.0}}
    results = made_up(rivals)
    told = "2.00 against 1.60 (ViSpec-like) at 25,000, margin +25%, ahead on"
    assert f"{told} 2 of 2 prompts" in verdict("The main comparison", results)
    results.row(FAMILY, "video-25000", PAPER)["dsr_per_prompt"] = [1.6, 2.4]
    results.row(FAMILY, "video-25000", "draft:vispec@chain-5")["dsr_per_prompt"] = [1.7, 1.5]
    assert f"{told} 1 of 2 prompts" in verdict("The main comparison", results)


def test_sampling_is_judged_by_acceptance_and_against_plain() -> None:
    results = made_up({PAPER: {400: 4.0, 3000: 4.0}})
    drawn = [row | {"benchmark": f"sampling-{row['length']}", "tau": 3.8, "dsr": 2.2} for row in results.rows]
    results.rows += drawn
    # The other cell may have met a slower machine.
    assert ": holds.**" in verdict("Temperatures", results)
    drawn[1]["tau"] = 4.1
    assert ": does not hold.**" in verdict("Temperatures", results)
    drawn[1] |= {"tau": 3.8, "dsr": 0.9}
    assert ": does not hold.**" in verdict("Temperatures", results)


def test_glimpses_of_other_sizes_come_from_their_own_cells() -> None:
    results = made_up({CHAIN: {25_000: 5.0}, f"{CHAIN}/glimpse=256": {25_000: 4.4}})
    results.rows[1]["benchmark"] = "glimpse-25000"
    table = arms_table(results, FAMILY, {"video-25000": "25,000"})
    assert "| arm | 25,000 (4 prompts) |" in table and "| … glimpse of 256 | 4.40 / 2.20 |" in table


def test_what_is_kept_far_beyond_the_lengths_of_training() -> None:
    results = made_up({CHAIN: {400: 5.0, 25_000: 4.8}, MSD: {400: 4.0, 25_000: 3.0}})
    results.shared = [*results.shared]
    for arm, tau in ((CHAIN, 4.5), (MSD, 2.0), (PAPER, 3.0)):
        there = results.rows[0] | {"benchmark": "beyond-64000", "arm": arm, "tau": tau, "dsr": 2.5}
        results.rows.append(there | {"draft_cache_rows": 64_100})
    assert results.lengths(FAMILY) == [400, 25_000]
    table = beyond_table(results, FAMILY, [400, 25_000], 64_000).splitlines()
    assert table[0] == "| arm | 400 | 25,000 | 64,000 | kept | DSR | draft cache rows |"
    # The published Sparrow has no shorter clips here.
    assert table[2:] == [
        "| MSD-like | 4.00 | 3.00 | 2.00 | 0.50 | 2.50 | 64,100 |",
        "| **Sparrow (ours), glimpse of 64** | 5.00 | 4.80 | 4.50 | 0.90 | 2.50 | 64,100 |",
    ]


def test_families_that_differ_are_named() -> None:
    results = made_up({CHAIN: {400: 2.1}})
    results.families["llava_onevision"] = results.families[FAMILY]
    assert ": holds (Qwen2.5-VL), cannot be told here (LLaVA-OneVision).**" in verdict("No chain", results)
    results.rows.append(results.rows[0] | {"family": "llava_onevision", "dsr": 0.9})
    assert ": holds (Qwen2.5-VL), does not hold (LLaVA-OneVision).**" in verdict("No chain", results)


@pytest.mark.parametrize(("needed", "holds"), [(18, True), (21, False)])
def test_a_target_may_need_its_visual_rows_in_three_quarters_of_its_depth(needed: int, holds: bool) -> None:
    results = made_up({})
    results.families[FAMILY]["analysis"] = {
        "all": {
            "similarity": {"visual": [0.5] * 24},
            "agreement": {"0": 0.8, "18": 0.99, "21": 0.995, "24": 1.0},
            "score": {"0": 0.1, "18": 0.95 if holds else 0.53, "21": 0.96, "24": 0.97},
        },
        "recommendation": {"needed_layers": needed},
    }
    text = verdict("Figures 3 and 5", results)
    assert ("after a middle layer: holds" in text) == holds
    assert f"needed in {needed} of 24 layers." in text
    assert f"80.0% and 0.10 from layer 0 on, 99.0% and {0.95 if holds else 0.53} from layer 18 on, " in text
    assert ("99.5% and 0.96 from layer 21 on, 100.0% and 0.97" in text) == (needed == 21)

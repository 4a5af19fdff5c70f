"""The evidence from end to end, on an untrained target: contenders, cells, analysis, report; resumed; judged."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sparrow_hf import SparrowDraftModel
from sparrow_hf.testbed import retrain
from sparrow_hf.testbed.families import QWEN2_5_VL
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.pretrain import export
from sparrow_hf.testbed.results import __main__ as command
from sparrow_hf.testbed.results import analyses, cells, contenders, draft_steps
from sparrow_hf.testbed.results.cells import Cell
from sparrow_hf.testbed.results.claims import CLAIMS, paragraph
from sparrow_hf.testbed.results.table import Results

CHAIN, RIVAL = "draft:sparrow@chain-5", "draft:msd@chain-5"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped models, untrained, and constants small enough for them."""
    processor = build_processor()
    target = build_target(processor.tokenizer, num_hidden_layers=2)
    target.generation_config.suppress_tokens = [target.config.video_token_id, target.config.image_token_id]
    target.generation_config.min_new_tokens = 5
    export(target, processor, tmp_path / "shipped" / "target")
    (tmp_path / "shipped" / "target" / "PROVENANCE.json").write_text(
        json.dumps({"content_accuracy_after_bf16_rounding": {"24": 0.96, "48": 0.96}})
    )
    loaded, _ = retrain.load_target(tmp_path / "shipped" / "target")
    draft = retrain.build_draft(loaded)
    draft.save_pretrained(tmp_path / "shipped" / "draft")
    (tmp_path / "shipped" / "draft" / "PROVENANCE.json").write_text(json.dumps({"steps": 2}))
    for module in (contenders, analyses, command):
        monkeypatch.setattr(module, "SHIPPED", {QWEN2_5_VL.name: tmp_path / "shipped"})
    monkeypatch.setattr(contenders, "CLIPS", 2)
    monkeypatch.setattr(contenders, "SIBLING_DEPTH", 1)
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
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda processes, context: ThreadPoolExecutor(processes))
    # Nor does the sibling have to learn anything.
    monkeypatch.setattr(command, "train_sibling", lambda family, work: place_sibling(work))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def place_sibling(work: Path) -> None:
    processor = build_processor()
    export(build_target(processor.tokenizer, 1, seed=1), processor, work / "drafts" / "sibling")
    (work / "drafts" / "sibling" / "PROVENANCE.json").write_text("{}")


def test_from_models_to_the_report(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, report = shipped / "results.json", shipped / "docs" / "results.md"
    arguments = ["--work", str(shipped / "work"), "--output", str(output), "--report", str(report)]
    arguments += ["--families", "qwen2.5-vl", "--contenders", "msd", "text-only"]
    command.main(arguments)
    found = Results(output)
    assert found.families == ["qwen2_5_vl"] and found.lengths("qwen2_5_vl") == [24, 48]
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
    assert "**Drafting loses nothing: holds here.**" in text
    assert "| **Sparrow (ours), glimpse of 64** |" in text
    for name in ("tau", "dsr", "qwen2_5_vl/retention", "qwen2_5_vl/removal"):
        assert f"](figures/{name}.png)" in text
        assert (report.parent / "figures" / f"{name}.png").stat().st_size > 1000
    assert report.with_name("results-tables.md").read_text().count("## qwen2.5-vl-") == 6

    def refuse(*arguments: Any) -> None:
        raise AssertionError("this was done already")

    data = json.loads(output.read_text())
    monkeypatch.setattr(command, "record_clips", refuse)
    monkeypatch.setattr("sparrow_hf.evaluation.benchmark.compare", refuse)
    monkeypatch.setattr("sparrow_hf.analysis.run.measure", refuse)
    command.main(arguments)
    assert json.loads(output.read_text()) == data


def test_every_contender_can_be_built(shipped: Path) -> None:
    target, _ = retrain.load_target(shipped / "shipped" / "target")
    layers = {}
    for name, contender in contenders.CONTENDERS.items():
        draft = retrain.build_draft(target, 0, name == "text-only", contender.draft_class, **contender.draft)
        assert isinstance(draft, SparrowDraftModel) and name in contenders.MEANINGS
        layers[name] = draft.config.visual_bridge_layer
    assert {name for name, layer in layers.items() if layer == 0} == {"msd", "vispec"}
    assert set(layers.values()) == {0, 1}


def made_up(**taus: float) -> Results:
    """Results of one family with these τ at 400, `NAME_400=…`, and 25,000 visual tokens."""
    rows = []
    for key, tau in taus.items():
        name, _, length = key.rpartition("_")
        rows.append(
            {
                "family": "qwen2_5_vl",
                "benchmark": f"qwen2.5-vl-video-{length}",
                "arm": name,
                "tau": tau,
                "dsr": tau / 2,
            }
        )
    results = Results.__new__(Results)
    results.rows, results.families = rows, ["qwen2_5_vl"]
    results.targets, results.analyses, results.draft_steps = {"qwen2_5_vl": {"400": 0.97, "25000": 0.96}}, {}, []
    return results


def verdict(title: str, results: Results) -> str:
    claim = next(claim for claim in CLAIMS if claim.title.startswith(title))
    return paragraph(claim, results)


@pytest.mark.parametrize(
    "title, name, short, long, expected",
    [
        ("Drafts that keep", "draft:msd@chain-5", 4.0, 3.0, "holds here"),
        ("Drafts that keep", "draft:msd@chain-5", 4.0, 3.9, "does not hold here"),
        ("τ does not fall", CHAIN, 4.0, 3.9, "holds here"),
        ("τ does not fall", CHAIN, 4.0, 3.7, "does not hold here"),
        ("Sampling", CHAIN, 4.0, 3.7, "cannot be told here"),
    ],
)
def test_verdicts_follow_from_the_figures(title: str, name: str, short: float, long: float, expected: str) -> None:
    figures = {f"{name}_400": short, f"{name}_25000": long, f"{CHAIN}_400": 4.0}
    figures |= {"draft:no-window@chain-5_400": short, "draft:no-window@chain-5_25000": long}
    figures |= {f"{name}_400": short}
    assert f": {expected}.**" in verdict(title, made_up(**figures))


def test_where_the_target_errs_nothing_is_asked_of_the_draft() -> None:
    results_there = made_up(**{f"{CHAIN}_400": 4.0, f"{CHAIN}_25000": 2.0})
    results_there.targets["qwen2_5_vl"]["25000"] = 0.5
    assert ": cannot be told here.**" in verdict("τ does not fall", results_there)
    assert "2.00 at 25,000 (target 0.50 right)" in verdict("τ does not fall", results_there)


def test_the_best_rival_is_named() -> None:
    figures = {f"{CHAIN}_400": 4.0, f"{CHAIN}_25000": 4.0, "draft:msd@chain-5_25000": 3.0, "prompt-lookup_25000": 2.0}
    assert "DSR 2.00 (chain-5) against 1.50 (msd@chain-5) at 25,000" in verdict("Sparrow decodes", made_up(**figures))
    assert ": holds here.**" in verdict("Sparrow decodes", made_up(**figures))
    figures["draft:msd@chain-5_25000"] = 5.0
    assert ": does not hold here.**" in verdict("Sparrow decodes", made_up(**figures))

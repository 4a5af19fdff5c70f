"""The harness that stops and goes on, and the rows it all ends in."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from noise import LENGTH, read
from transformers import PreTrainedModel

from sparrow_hf import metrics
from sparrow_hf.checksums import SEAL, sealed
from sparrow_hf.configuration_sparrow import TreeShape
from sparrow_hf.errors import BenchmarkError
from sparrow_hf.evaluation import Arm, compare
from sparrow_hf.evaluation import benchmark as benchmark_module
from sparrow_hf.evaluation.arms import Arms
from sparrow_hf.evaluation.benchmark import Benchmark, Prompt, describe
from sparrow_hf.evaluation.report import write_report
from sparrow_hf.evaluation.results import write_results
from sparrow_hf.evaluation.run_file import RunFile
from sparrow_hf.metrics import count_asked

from oracles import drafting_around

ROW_FIELDS = {
    "family", "arm", "visual_tokens", "temperature", "tree", "seed", "prompts", "tau", "k", "per_position",
    "histogram", "per_position_conditional", "dsr", "dsr_quartiles", "dsr_interval", "esr", "esr_quartiles",
    "prefill_share",
    "phase_ms", "draft_ms", "verify_ms", "draft_cache_rows", "peak_extra_mb", "identical", "first_differences",
    "content_acceptance", "function_acceptance", "provenance",
}  # fmt: skip


def resealed(line: dict[str, Any]) -> dict[str, Any]:
    """A line that was edited, as if it had been measured so."""
    return sealed({name: value for name, value in line.items() if name != SEAL})


@pytest.fixture
def prompts(target: PreTrainedModel) -> list[Prompt]:
    return [
        Prompt(f"noise {seed}", frames, partial(read, target, frames, seed)) for frames in (4, 8) for seed in (0, 1)
    ]


def test_asked_and_accepted_by_class_of_word():
    content = {1, 3}.__contains__
    # The prefill gives 0; a round accepts 1 2 and the target adds 3; another accepts 1 2 1 and the target adds 3.
    assert count_asked([0, 1, 2, 3, 1, 2, 1, 3], [2, 3], 3, 99, content) == {"content": [4, 3], "function": [2, 2]}
    # With eight tokens allowed and five there, the last round may draft two; with seven, one.
    assert count_asked([0, 1, 2, 3, 1, 2, 1], [2, 1], 3, 8, content)["content"] == [3, 2]
    assert count_asked([0, 1, 2, 3, 1, 2], [2, 1], 3, 6, content) == {"content": [3, 2], "function": [1, 1]}


@pytest.fixture
def run(
    target: PreTrainedModel,
    draft_folder: str,
    prompts: list[Prompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Measures into `tmp_path`, and returns the rows."""
    monkeypatch.setattr(metrics, "BOOTSTRAP_SAMPLES", 20)

    def run(**options: Any) -> list[dict[str, Any]]:
        options = {"arms": ["none", "prompt-lookup", "draft@chain-3"], "temperatures": (0.0, 1.0)} | options
        arms = Arms(target, draft_folder).parse(options.pop("arms"))
        bench = Benchmark(
            options.pop("name", "tiny"),
            target,
            arms,
            prompts,
            seeds=(0, 1),
            max_new_tokens=LENGTH,
            is_content=lambda token: token % 2 == 0,
            conditions={"draft_sha256": options.pop("weights", "abc")},
            **options,
        )
        bench.measure(bench.open_runs(tmp_path / "runs"))
        return write_results(tmp_path / "runs", tmp_path / "results.json", "a note")

    return run


@pytest.fixture
def set_draft(draft_folder: str) -> Iterator[Any]:
    """Edits fields of the draft's configuration, on disk."""
    path = Path(draft_folder) / "config.json"
    written = path.read_text()
    yield lambda **fields: path.write_text(json.dumps(json.loads(written) | fields))
    path.write_text(written)


def test_from_prompts_to_rows(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    greedy = {"temperatures": (0.0,)}
    rows = run(**greedy)
    assert [(row["visual_tokens"], row["arm"]) for row in rows] == [
        (tokens, arm) for tokens in (8, 16) for arm in ("plain", "none", "prompt-lookup", "draft@chain-3")
    ]
    for row in rows:
        assert row.keys() >= ROW_FIELDS
        assert (row["identical"], row["prompts"], row["first_differences"]) == (2, 2, [])
        assert row["tau"] == pytest.approx(row["k"] + 1, abs=0.2)
        assert row["peak_extra_mb"] is None
        assert set(row["phase_ms"]) == {"prefill", "draft", "verify", "other"}
    plain, _, lookup, drafted = rows[:4]
    assert plain["dsr"] == plain["esr"] == plain["tau"] == 1
    assert (lookup["draft_ms"], lookup["phase_ms"]["draft"], lookup["content_acceptance"]) == (None, None, None)
    assert drafted["draft_ms"] > 0 and drafted["tree"] == [4, 3, 1] and drafted["glimpse"] == 4
    assert 0 <= drafted["content_acceptance"] <= 1

    write_report(tmp_path / "results.json", tmp_path / "results.md")
    report = (tmp_path / "results.md").read_text()
    assert "## tiny: qwen2_5_vl, length 4, 8 visual tokens, greedy" in report
    assert "| draft@chain-3 | 2/2 |" in report and "a note" in report

    # A stopped run: one whole line less, and half a line too many. Only what is missing is measured again.
    path = tmp_path / "runs" / "tiny.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])
    measured = []
    right = benchmark_module.compare
    monkeypatch.setattr(benchmark_module, "compare", lambda *args, **kw: measured.append(1) or right(*args, **kw))
    assert len(run(**greedy)) == len(rows)
    assert len(measured) == 1
    assert path.read_text().splitlines(keepends=True)[:-1] == lines[:-1]

    # More temperatures and seeds go on from there; other weights and other arms do not.
    sampled = [row for row in run() if row["temperature"] == 1]
    assert len(measured) == 1 + 4 * 2
    assert {row["seed"] for row in sampled} == {0, 1}
    for row in sampled:
        # transformers' own loop draws other random numbers: another text, of which only the decoding is compared.
        own = row["arm"] != "prompt-lookup"
        assert (row["identical"], row["first_differences"]) == ((2, []) if own else (None, None))
        assert (row["esr"] is not None) == (row["esr_quartiles"] is not None) == own
        assert row["dsr"] > 0
    write_report(tmp_path / "results.json", tmp_path / "results.md")
    with pytest.raises(BenchmarkError, match="draft_sha256: 'abc', now 'def'"):
        run(weights="def")
    with pytest.raises(BenchmarkError, match=r"arms\.prompt-lookup: \{.*\}, now None"):
        run(arms=["none"])


def test_repeats_belong_to_the_conditions(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    right = benchmark_module.compare

    def compare(*args: Any, **settings: Any) -> Any:
        asked.append(settings["repeats"])
        return right(*args, **settings)

    monkeypatch.setattr(benchmark_module, "compare", compare)
    options = {"arms": ["draft@chain-3"], "temperatures": (0.0,)}
    rows = run(repeats=2, **options)
    assert set(asked) == {2} and rows[0]["provenance"]["repeats"] == 2
    with pytest.raises(BenchmarkError, match="repeats: 2, now None"):
        run(**options)

    # A file of single calls that was measured before there were repeats goes on.
    path = tmp_path / "runs" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["provenance"]["repeats"], line["sha256"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(run(**options)) == len(rows)
    with pytest.raises(BenchmarkError, match="repeats: None, now 2"):
        run(repeats=2, **options)


@pytest.mark.parametrize("digits", [32, 40])
def test_a_run_file_of_an_earlier_version_is_refused_as_such(tmp_path: Path, digits: int):
    line = {"prompt": "a", "provenance": {"target_sha256": "0" * digits, "seed": 1}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(BenchmarkError, match="made by an earlier version of this package"):
        RunFile(tmp_path / "runs.jsonl", {"target_sha256": "0" * 64, "seed": 1})


def test_what_is_named_twice_is_measured_once(run: Any, tmp_path: Path):
    options = {"arms": ["none"], "temperatures": (0.0, 0.0)}
    assert [row["prompts"] for row in run(**options)] == [2, 2, 2, 2]
    assert len((tmp_path / "runs" / "tiny.jsonl").read_text().splitlines()) == 4


def test_a_folder_of_runs_holds_nothing_else(run: Any, target: PreTrainedModel, prompts: list[Prompt], tmp_path: Path):
    with pytest.raises(BenchmarkError, match="found 'exp/1'"):
        Benchmark("exp/1", target, [Arm("plain")], prompts)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "prompts.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(BenchmarkError, match=r"the first line of .*prompts\.jsonl is not a measurement"):
        run(arms=["none"], temperatures=(0.0,))
    # Nothing is lost by it.
    (tmp_path / "runs" / "prompts.jsonl").unlink()
    assert len(run(arms=["none"], temperatures=(0.0,))) == 4
    with (tmp_path / "runs" / "tiny.jsonl").open("a") as file:
        file.write("not JSON\nand no end of line")
    with pytest.raises(BenchmarkError, match=r"line 5 of .*tiny\.jsonl is not a measurement"):
        run(arms=["none"], temperatures=(0.0,))
    # What is refused is left as it is.
    assert (tmp_path / "runs" / "tiny.jsonl").read_text().endswith("and no end of line")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_glimpse_tokens", 3, r"arms\.draft\.glimpse: 4, now 3; arms\.draft@chain-3\.glimpse: 4, now 3"),
        ("glimpse_spacing", "logarithmic", r"drafts\.draft\.glimpse_spacing: 'even', now 'logarithmic'"),
        ("position_mode", "original", r"drafts\.draft\.position_mode: 'compact', now 'original'"),
        ("visual_bridge_layer", 1, r"drafts\.draft\.visual_bridge_layer: 2, now 1"),
        ("rms_norm_eps", 0.5, r"drafts\.draft\.rms_norm_eps: 1e-05, now 0\.5"),
        ("project_visual", True, r"drafts\.draft\.project_visual: False, now True"),
    ],
)
def test_a_draft_set_otherwise_is_another_arm(run: Any, set_draft: Any, field: str, value: Any, told: str):
    options = {"arms": ["none", "draft", "draft@chain-3"], "temperatures": (0.0,)}
    run(**options)
    # No weight changes, and neither does the arm's name.
    set_draft(**{field: value})
    with pytest.raises(BenchmarkError, match=rf"made differently \({told}\): choose"):
        run(**options)


def test_what_a_draft_does_not_decode_with_may_change(run: Any, set_draft: Any, tmp_path: Path):
    options = {"arms": ["none", "prompt-lookup", "draft@chain-3/glimpse=2"], "temperatures": (0.0,)}
    rows = run(**options)
    # The arm has its own tree and glimpse, and where a target is found decides nothing.
    set_draft(target_name_or_path="elsewhere", num_glimpse_tokens=3, num_draft_levels=2, num_tree_nodes=3)
    assert run(**options) == rows
    told = json.loads((tmp_path / "runs" / "tiny.jsonl").read_text().splitlines()[0])["provenance"]["drafts"]
    assert list(told) == ["draft@chain-3/glimpse=2"]
    set_draft(glimpse_spacing="logarithmic")
    # Without a draft nothing is drafted.
    run(arms=["none"], temperatures=(0.0,), name="other")
    set_draft(glimpse_spacing="even")
    run(arms=["none"], temperatures=(0.0,), name="other")


def test_a_run_file_that_names_no_draft_s_configuration_goes_on(run: Any, set_draft: Any, tmp_path: Path):
    options = {"arms": ["draft"], "temperatures": (0.0,)}
    rows = run(**options)
    path = tmp_path / "runs" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["provenance"]["drafts"]
    path.write_text("".join(json.dumps(resealed(line)) + "\n" for line in lines[1:]))
    assert len(run(**options)) == len(rows)
    # The line that was measured now names it.
    set_draft(glimpse_spacing="logarithmic")
    with pytest.raises(BenchmarkError, match=r"drafts\.draft\.glimpse_spacing") as refused:
        run(**options)
    # What is refused is not kept open.
    set_draft()
    assert refused.value and len(run(**options)) == len(rows)


def test_an_arm_without_settings_of_its_own_has_those_of_its_draft(target: PreTrainedModel, draft_folder: str):
    draft = Arms(target, draft_folder).arm("draft").draft
    assert draft is not None
    assert describe(Arm("mine", draft)) == {"tree": (8, 7, 1), "glimpse": 4}
    assert describe(Arm("mine", draft, TreeShape(3, 2, 1), 0)) == {"tree": (3, 2, 1), "glimpse": 0}
    assert describe(Arms(target, draft_folder).arm("none")) == {"tree": (1, 0, 1), "glimpse": None}


def test_the_command_is_recorded_and_may_change(run: Any, tmp_path: Path):
    only = {"arms": ["none"], "command": "measure"}
    run(**only, temperatures=(0.0,))
    rows = run(**(only | {"command": "measure --again"}), temperatures=(0.0, 1.0))
    told = {(row["temperature"], row["provenance"]["command"]) for row in rows}
    assert told == {(0.0, "measure"), (1.0, "measure --again")}


def test_arms_of_a_method_that_is_gone_are_still_reported(run: Any, tmp_path: Path):
    run(arms=["prompt-lookup"], temperatures=(0.0,))
    path = tmp_path / "runs" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().replace('"prompt-lookup"', '"elsewhere:3"').splitlines()]
    path.write_text("".join(json.dumps(resealed(line)) + "\n" for line in lines))
    rows = write_results(tmp_path / "runs", tmp_path / "results.json")
    assert [row["arm"] for row in rows] == ["plain", "elsewhere:3"] * 2
    write_report(tmp_path / "results.json", tmp_path / "results.md")
    assert "| elsewhere:3 | 2/2 |" in (tmp_path / "results.md").read_text()


def test_lengths_are_told_apart_where_the_prompts_are_equally_long(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Short videos have no more frames, however many may be seen."""
    monkeypatch.setattr(metrics, "BOOTSTRAP_SAMPLES", 20)
    asked = [Prompt("noise", most, partial(read, target, 4, 0)) for most in (4, 8)]
    bench = Benchmark("tiny", target, Arms(target).parse(["prompt-lookup"]), asked, max_new_tokens=LENGTH)
    bench.measure(bench.open_runs(tmp_path / "runs"))
    rows = write_results(tmp_path / "runs", tmp_path / "results.json")
    assert [(row["length"], row["visual_tokens"]) for row in rows] == [(4, 8), (4, 8), (8, 8), (8, 8)]
    write_report(tmp_path / "results.json", tmp_path / "results.md")
    report = (tmp_path / "results.md").read_text()
    assert "length 4, 8 visual tokens" in report and "length 8, 8 visual tokens" in report


def test_penalties_and_filters_of_a_generation_config_are_off(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    def processors(temperature: float) -> list[str]:
        found = []
        right = type(target)._get_logits_processor

        def look(self: Any, *args: Any, **kwargs: Any) -> Any:
            found.append([type(processor).__name__ for processor in right(self, *args, **kwargs)])
            return right(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(target), "_get_logits_processor", look)
            target.generate(**read(target, 4, 0), **bench.generate_arguments(temperature))
        return found[0]

    bench = Benchmark("tiny", target, [Arm("plain")], [Prompt("noise", None, dict)], max_new_tokens=2)
    for name, value in {"repetition_penalty": 1.05, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.5}.items():
        monkeypatch.setattr(target.generation_config, name, value)
    assert processors(0.0) == ["SuppressTokensLogitsProcessor"]
    assert processors(0.7) == ["SuppressTokensLogitsProcessor", "TemperatureLogitsWarper"]


def test_memory_of_an_arm_that_prefills_for_itself_is_not_compared(run: Any, tmp_path: Path):
    run(temperatures=(0.0,), shared_prefill=True)
    path = tmp_path / "runs" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for measured in line["runs"].values():
            measured["peak_bytes"] = 5_000_000
    path.write_text("".join(json.dumps(resealed(line)) + "\n" for line in lines))
    rows = write_results(tmp_path / "runs", tmp_path / "results.json")
    assert {row["arm"]: row["peak_extra_mb"] for row in rows} == {
        "plain": 0, "none": 0, "prompt-lookup": None, "draft@chain-3": 0
    }  # fmt: skip


def test_a_text_that_differs_is_counted(run: Any, tmp_path: Path, target: PreTrainedModel):
    run(temperatures=(0.0,))
    path = tmp_path / "runs" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["runs"]["none"]["differs_at"] = 7
    # And an answer of one token: no decode speed, so no figure but the identity.
    lines[1]["runs"]["plain"]["decode_tokens"] = 0
    path.write_text("".join(json.dumps(resealed(line)) + "\n" for line in lines))
    row = write_results(tmp_path / "runs", tmp_path / "results.json")[1]
    assert (row["arm"], row["identical"], row["prompts"], row["first_differences"]) == ("none", 1, 2, [7])
    assert row["too_short"] == 1 and row["rounds"] == LENGTH - 1


def test_nothing_to_measure(target: PreTrainedModel):
    with pytest.raises(BenchmarkError, match="at least one prompt"):
        Benchmark("tiny", target, Arms(target).parse([]), [])


def test_an_oracle_gets_all_requested_tokens_accepted(target: PreTrainedModel, draft_folder: str):
    inputs, settings = read(target, 4, 0), {"max_new_tokens": LENGTH, "do_sample": False}
    text = target.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
    arms = Arms(target, draft_folder).parse(["draft@chain-3"])
    with drafting_around(text, adversarial=False):
        runs = compare(target, arms, inputs, settings, is_content=lambda token: token % 2 == 0)
    asked = runs["draft@chain-3"].asked
    assert all(count[0] == count[1] for count in asked.values())
    assert sum(count[0] for count in asked.values()) == sum(runs["draft@chain-3"].accepted)

"""Arms by name, the harness that stops and goes on, one prefill for all, and the rows it all ends in."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchFeature, PreTrainedModel

from sparrow_hf import TREE_PRESETS, SparrowDraftModel
from sparrow_hf.errors import BenchmarkError
from sparrow_hf.evaluation import Arm, compare, measure, metrics, warm_up
from sparrow_hf.evaluation import benchmark as benchmark_module
from sparrow_hf.evaluation.arms import Arms
from sparrow_hf.evaluation.baselines import ViSpecDraftModel
from sparrow_hf.evaluation.benchmark import Benchmark, Prompt
from sparrow_hf.evaluation.metrics import count_asked
from sparrow_hf.evaluation.prefill import PrefillSnapshot
from sparrow_hf.evaluation.report import write_report
from sparrow_hf.evaluation.results import write_results
from sparrow_hf.rows import EVERY_VISUAL_ROW

from families import FAMILY_BY_NAME
from oracles import drafting_around
from tiny_targets import Family

ROW_FIELDS = {
    "family", "arm", "visual_tokens", "temperature", "tree", "seed", "prompts", "tau", "k", "per_position",
    "histogram", "per_position_conditional", "dsr", "dsr_quartiles", "dsr_interval", "esr", "esr_quartiles",
    "prefill_share",
    "phase_ms", "draft_ms", "verify_ms", "draft_cache_rows", "peak_extra_mb", "identical", "first_differences",
    "content_acceptance", "function_acceptance", "provenance",
}  # fmt: skip
LENGTH = 10


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    # Placeholders are no text; and every answer is as long as it may be.
    target.generation_config.suppress_tokens = FAMILY_BY_NAME["qwen2_5_vl"].visual_token_ids
    target.generation_config.eos_token_id = None
    return target


@pytest.fixture(scope="module")
def draft_folder(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("draft")
    SparrowDraftModel.from_target(target, num_glimpse_tokens=4).save_pretrained(folder)
    return str(folder)


def read(target: PreTrainedModel, num_frames: int, seed: int) -> BatchFeature:
    return BatchFeature(FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(target, num_frames=num_frames, seed=seed))


@pytest.fixture
def prompts(target: PreTrainedModel) -> list[Prompt]:
    return [
        Prompt(f"noise {seed}", frames, partial(read, target, frames, seed)) for frames in (4, 8) for seed in (0, 1)
    ]


def test_arms_by_name(target: PreTrainedModel, draft_folder: str):
    parser = Arms(target, draft_folder)
    plain, none, lookup, draft, tree, blind, other = parser.parse(
        "none prompt-lookup-3 draft draft@10-2-4/glimpse=all draft/glimpse=0".split()
        + [f"draft:{draft_folder}@chain-2"]
    )
    assert (plain.name, plain.draft, plain.runs_stock_loop) == ("plain", None, False)
    assert none.tree == TREE_PRESETS["none"]
    assert lookup.prompt_lookup_num_tokens == lookup.num_draft_levels == 3
    assert (draft.tree, draft.num_glimpse_tokens) == (draft.draft.config.tree_shape, 4)
    assert (tree.tree, tree.num_glimpse_tokens) == ((10, 2, 4), EVERY_VISUAL_ROW)
    assert blind.num_glimpse_tokens == 0
    assert (other.name, other.num_draft_levels) == (f"draft:{draft_folder}@chain-2", 2)
    # One checkpoint, one model.
    assert none.draft is draft.draft is other.draft
    assert set(parser.weights) == {draft_folder}
    assert Arms(target, draft_folder).parse(["plain"]) == [plain]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("oak", "unknown arm 'oak'"),
        ("prompt-lookup-0", "unknown arm"),
        ("draft/glimpse=-1", "unknown arm"),
        ("draft@oak", "unknown tree 'oak'"),
        ("draft:nowhere", "draft 'nowhere' cannot be loaded"),
        ("assistant:nowhere", "assistant 'nowhere' cannot be loaded"),
    ],
)
def test_a_wrong_arm_is_named(target: PreTrainedModel, draft_folder: str, name: str, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Arms(target, draft_folder).arm(name)


def test_an_arm_that_needs_a_draft_says_so(target: PreTrainedModel, tmp_path: Path):
    with pytest.raises(BenchmarkError, match="arm 'none' needs a draft"):
        Arms(target).arm("none")
    target.save_pretrained(tmp_path)
    with pytest.raises(BenchmarkError, match="not a draft of this package"):
        Arms(target).arm(f"draft:{tmp_path}")


def test_the_glimpse_of_an_arm_changes_the_rows_and_is_taken_back(target: PreTrainedModel, draft_folder: str):
    arms = Arms(target, draft_folder).parse(["draft@chain-2/glimpse=0", "draft@chain-2", "draft@chain-2/glimpse=all"])
    runs = compare(target, arms, read(target, 8, 0), {"max_new_tokens": LENGTH, "do_sample": False})
    blind, glimpse, all_rows = (runs[arm.name].draft_cache_rows for arm in arms[1:])
    assert glimpse == blind + 4
    assert all_rows == blind + 16  # 8 frames, 4 merged patches every 2 frames
    assert arms[1].draft.config.num_glimpse_tokens == 4


def test_a_small_assistant(target: PreTrainedModel, tmp_path: Path):
    target.save_pretrained(tmp_path)
    arms = Arms(target).parse([f"assistant:{tmp_path}"])
    run = compare(target, arms, read(target, 4, 0), {"max_new_tokens": LENGTH, "do_sample": False})[arms[1].name]
    assert run.differs_at is None
    # The target is its own assistant: it agrees with itself, at least where the video does not matter.
    assert run.rounds < LENGTH - 1


def test_transformers_assistants_do_not_see_the_video(target: PreTrainedModel, tmp_path: Path):
    """What docs/benchmark.md says of them. Where this fails, transformers has learned to show it: say so there."""
    target.save_pretrained(tmp_path)
    arm = Arms(target).arm(f"assistant:{tmp_path}")
    seen: list[set[str]] = []
    hook = arm.assistant.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({name for name, value in kwargs.items() if value is not None}),
        with_kwargs=True,
    )
    measure(target, arm, read(target, 4, 0), {"max_new_tokens": LENGTH, "do_sample": False})
    hook.remove()
    assert seen
    assert not any(names & {"pixel_values_videos", "mm_encoder_outputs"} for names in seen)


@pytest.mark.parametrize("sampling", [False, True])
def test_one_prefill_serves_all_arms(target: PreTrainedModel, draft_folder: str, sampling: bool):
    arms = Arms(target, draft_folder).parse(["none", "draft@chain-3", "draft@10-2-4/glimpse=0", "prompt-lookup"])
    inputs, settings = read(target, 8, 0), {"max_new_tokens": LENGTH, "do_sample": sampling}
    own = compare(target, arms[:4] if sampling else arms, inputs, settings)
    prefills: list[int] = []
    hook = target.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: prefills.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    compared = arms[:4] if sampling else arms
    warm_up(target, compared, inputs, settings, shared_prefill=True)
    shared = compare(target, compared, inputs, settings, shared_prefill=True)
    hook.remove()
    # The snapshot's, and prompt lookup's own; once to warm up, once to measure.
    assert sum(rows >= inputs["input_ids"].shape[1] for rows in prefills) == 2 * (1 if sampling else 2)
    for name, run in shared.items():
        assert run.differs_at is None
        # The draft read the same states: it proposed the same.
        assert (run.accepted, run.rounds) == (own[name].accepted, own[name].rounds)
        assert run.draft_cache_rows == own[name].draft_cache_rows
    assert len({run.prefill_seconds for name, run in shared.items() if name != "prompt-lookup"}) == 1
    assert "_prefill" not in vars(target)


def test_one_prefill_serves_every_family(family: Family):
    target = family.build_target()
    inputs = family.build_inputs(target)
    arms = [
        Arm("plain"),
        Arm("draft", SparrowDraftModel.from_target(target, num_glimpse_tokens=2), TREE_PRESETS["chain-5"]),
    ]
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": family.visual_token_ids}
    own, shared = (compare(target, arms, inputs, settings, shared_prefill=shared) for shared in (False, True))
    assert own["draft"].differs_at is None and shared["draft"].differs_at is None
    assert shared["draft"].accepted == own["draft"].accepted


def test_a_replayed_prefill_is_the_prompts_own(target: PreTrainedModel, draft_folder: str):
    """Planted bug: another prompt's prefill gives another text."""
    arms = Arms(target, draft_folder).parse(["draft@chain-3"])
    settings = {"max_new_tokens": LENGTH, "do_sample": False}
    inputs, others = read(target, 8, 0), read(target, 8, 1)
    expected = target.generate(**inputs, **settings)
    prefill = PrefillSnapshot(target, others, settings, arms[1].layers_read)
    with prefill.replayed() as replayed:
        assert not torch.equal(target.generate(**replayed, **settings), expected)
    assert torch.equal(target.generate(**inputs, **settings), expected)


def test_asked_and_accepted_by_class_of_word():
    content = {1, 3}.__contains__
    # The prefill's 0; a round accepts 1 2, rejects, so the target says 3; one accepts all of 1 2 1 and gets a free 3.
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
            "tiny",
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
    with pytest.raises(BenchmarkError, match="other weights"):
        run(weights="def")
    with pytest.raises(BenchmarkError, match="other arms"):
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
    with pytest.raises(BenchmarkError, match="other repeats"):
        run(**options)

    # A file of single calls that was measured before there were repeats goes on.
    path = tmp_path / "runs" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["provenance"]["repeats"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(run(**options)) == len(rows)
    with pytest.raises(BenchmarkError, match="other repeats"):
        run(repeats=2, **options)


def test_what_is_named_twice_is_measured_once(run: Any, tmp_path: Path):
    options = {"arms": ["none"], "temperatures": (0.0, 0.0)}
    assert [row["prompts"] for row in run(**options)] == [2, 2, 2, 2]
    assert len((tmp_path / "runs" / "tiny.jsonl").read_text().splitlines()) == 4


def test_a_folder_of_runs_holds_nothing_else(run: Any, target: PreTrainedModel, prompts: list[Prompt], tmp_path: Path):
    with pytest.raises(BenchmarkError, match="found 'exp/1'"):
        Benchmark("exp/1", target, [Arm("plain")], prompts)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "prompts.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(BenchmarkError, match=r"line 1 of .*prompts\.jsonl is not a measurement"):
        run(arms=["none"], temperatures=(0.0,))
    # Nothing is lost by it.
    (tmp_path / "runs" / "prompts.jsonl").unlink()
    assert len(run(arms=["none"], temperatures=(0.0,))) == 4
    with (tmp_path / "runs" / "tiny.jsonl").open("a") as file:
        file.write("not JSON\n")
    with pytest.raises(BenchmarkError, match=r"line 5 of .*tiny\.jsonl is not a measurement"):
        run(arms=["none"], temperatures=(0.0,))


def test_a_draft_set_otherwise_is_another_arm(run: Any, draft_folder: str):
    run(arms=["draft"], temperatures=(0.0,))
    path = Path(draft_folder) / "config.json"
    written = path.read_text()
    # No weight changes, and neither does the arm's name.
    path.write_text(json.dumps(json.loads(written) | {"num_glimpse_tokens": 3}))
    try:
        with pytest.raises(BenchmarkError, match="other arms"):
            run(arms=["draft"], temperatures=(0.0,))
    finally:
        path.write_text(written)


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


def test_what_a_generation_config_asks_for_is_off(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
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
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = write_results(tmp_path / "runs", tmp_path / "results.json")
    assert {row["arm"]: row["peak_extra_mb"] for row in rows} == {
        "plain": 0, "none": 0, "prompt-lookup": None, "draft@chain-3": 0
    }  # fmt: skip


def test_a_saved_baseline_is_an_arm(target: PreTrainedModel, tmp_path: Path):
    ViSpecDraftModel.from_target(target).save_pretrained(tmp_path)
    arms = Arms(target).parse([f"draft:{tmp_path}@chain-2"])
    assert type(arms[1].draft) is ViSpecDraftModel
    run = compare(target, arms, read(target, 4, 0), {"max_new_tokens": LENGTH, "do_sample": False})[arms[1].name]
    assert run.differs_at is None and run.draft_cache_rows is not None


def test_a_text_that_differs_is_counted(run: Any, tmp_path: Path, target: PreTrainedModel):
    run(temperatures=(0.0,))
    path = tmp_path / "runs" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["runs"]["none"]["differs_at"] = 7
    # And an answer of one token: no decode speed, so no figure but the identity.
    lines[1]["runs"]["plain"]["decode_tokens"] = 0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = write_results(tmp_path / "runs", tmp_path / "results.json")[1]
    assert (row["arm"], row["identical"], row["prompts"], row["first_differences"]) == ("none", 1, 2, [7])
    assert row["too_short"] == 1 and row["rounds"] == LENGTH - 1


def test_nothing_to_measure(target: PreTrainedModel):
    with pytest.raises(BenchmarkError, match="at least one prompt"):
        Benchmark("tiny", target, Arms(target).parse([]), [])


def test_an_oracle_gets_all_it_is_asked_for(target: PreTrainedModel, draft_folder: str):
    inputs, settings = read(target, 4, 0), {"max_new_tokens": LENGTH, "do_sample": False}
    text = target.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
    arms = Arms(target, draft_folder).parse(["draft@chain-3"])
    with drafting_around(text, adversarial=False):
        runs = compare(target, arms, inputs, settings, is_content=lambda token: token % 2 == 0)
    asked = runs["draft@chain-3"].asked
    assert all(count[0] == count[1] for count in asked.values())
    assert sum(count[0] for count in asked.values()) == sum(runs["draft@chain-3"].accepted)

"""A task of lmms-eval made of unseen clips, run by its own command line with and without a draft."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("lmms_eval") is None:
    pytest.skip(
        "lmms-eval is not installed here: `make test-lmms-eval` runs these in an environment of their own",
        allow_module_level=True,
    )

import torch

from sparrow_hf.captioning import Captioner, Question
from sparrow_hf.errors import MessagesError
from sparrow_hf.testbed import EVALUATION_SEEDS, load, make_clip, shipped

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.video
doc_to_text: !function utils.question
doc_to_target: caption
process_results: !function utils.score
metric_list: [{{metric: overlap, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{max_new_tokens: 320, temperature: {temperature}}}
"""
UTILS = """
def video(doc):
    return [doc["video"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    said, shown = set(results[0].split()), set(doc["caption"].split())
    return {"overlap": len(said & shown) / len(said | shown)}
"""
TASKS = {"greedy_clips": 0.0, "sampled_clips": 1.0}
CLIPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, their rows, and two tasks that ask about them."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for seed in EVALUATION_SEEDS[:CLIPS]:
        clip = make_clip(folder / f"{seed}.mp4", seed, 160)
        video, text = clip.messages[0]["content"]
        rows.append({"video": video["video"], "question": text["text"], "caption": clip.caption})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, temperature in TASKS.items():
        task = TASK.format(name=name, rows=folder / "rows.jsonl", temperature=temperature)
        (folder / "tasks" / f"{name}.yaml").write_text(task)
    (folder / "tasks" / "utils.py").write_text(UTILS)
    return folder


def evaluate(folder: Path, draft: bool) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The answers of each task, and the results, of one run of lmms-eval's command line."""
    models, output = shipped(), folder / ("draft" if draft else "plain")
    arguments = f"pretrained={models / 'target'},fps=8,max_num_frames=768"
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "sparrow", "--tasks", ",".join(TASKS), "--device", "cpu"),
        *("--model_args", arguments + (f",draft={models / 'draft'}" if draft else "")),
        *("--include_path", folder / "tasks", "--output_path", output, "--log_samples", "--batch_size", "1"),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=900)
    found = list(output.rglob("*_results.json"))
    # lmms-eval ends with 0 after an error too.
    assert done.returncode == 0 and found, done.stdout[-4000:] + done.stderr[-4000:]
    assert "avg_tau" in done.stdout
    answers = {}
    for name in TASKS:
        (samples,) = output.rglob(f"*_samples_{name}.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        answers[name] = [line["filtered_resps"] for line in lines]
    return answers, json.loads(found[0].read_text())


def test_the_command_line_gives_the_same_texts_with_and_without_a_draft(folder: Path):
    (plain, without), (drafted, with_draft) = evaluate(folder, False), evaluate(folder, True)
    assert drafted == plain and [len(texts) for texts in plain.values()] == [CLIPS, CLIPS]
    assert with_draft["results"] == without["results"]
    assert all(without["results"][name]["overlap,none"] > 0.5 for name in TASKS)
    assert [without["throughput"][f"avg_{name}"] for name in ("tau", "k", "tau_sampled_clips")] == [1, 0, 1]
    assert with_draft["throughput"]["avg_tau_greedy_clips"] > with_draft["throughput"]["avg_tau"] > 3
    assert with_draft["throughput"]["total_gen_tokens"] == without["throughput"]["total_gen_tokens"]

    # The one road from messages to tensors: what `sparrow generate` says to the same rows.
    torch.set_num_threads(1)
    target, processor, _ = load()
    captioner = Captioner(target, processor, None, False, 8, 768, 0, {"max_new_tokens": 320, "do_sample": False})
    said = []
    for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
        content = [{"type": "video", "video": row["video"]}, {"type": "text", "text": row["question"]}]
        said.append(captioner.line(Question("", None, {"messages": [{"role": "user", "content": content}]}))["text"])
    assert plain["greedy_clips"] == said and plain["sampled_clips"] != said


def test_requests_are_read_as_lmms_eval_writes_them():
    from sparrow_lmms_eval.model import Sparrow, plain_part, settings_of

    window = {"type": "video", "video": "a.mp4", "video_start": 1.0, "video_end": 2.0}
    assert plain_part({"type": "video", "url": {"video": "a.mp4", "video_start": 1.0, "video_end": 2.0}}) == window
    assert plain_part({"type": "video", "url": "a.mp4", "start_time": 1.0, "end_time": None}) == {
        "type": "video", "url": "a.mp4", "video_start": 1.0, "video_end": None,
    }  # fmt: skip
    until = {"until": ["\n\n"]}
    assert settings_of(until) == {"max_new_tokens": 4096, "do_sample": False}
    assert settings_of({"max_new_tokens": 5, "temperature": 0, "do_sample": True, "num_beams": 1, "top_p": None}) == {
        "max_new_tokens": 5, "do_sample": False,
    }  # fmt: skip
    assert settings_of(until | {"temperature": 0.7, "top_p": 0.9, "num_beams": 2}) == {
        "max_new_tokens": 4096, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "num_beams": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="set --batch_size 1, found auto"):
        Sparrow(pretrained="nowhere", batch_size="auto")
    model = Sparrow(pretrained=str(shipped() / "target"), device="cpu")
    with pytest.raises(NotImplementedError, match="output type is generate_until"):
        model.loglikelihood([])
    # A target may name stop strings itself.
    model.target.generation_config.stop_strings = ["zzz"]
    asked = [{"role": "user", "content": [{"type": "text", "text": "what ?"}]}]
    model.task_dict = {"task": {"test": [asked]}}
    arguments = ("", lambda doc: doc, {"max_new_tokens": 4}, 0, "task", "test")
    assert len(model.generate_until([SimpleNamespace(args=arguments)])) == 1


def test_what_is_not_understood_is_refused():
    from sparrow_lmms_eval.model import plain_turns

    from sparrow_hf.data import clean_messages

    with pytest.raises(MessagesError, match="audio"):
        clean_messages({"messages": plain_turns([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])})

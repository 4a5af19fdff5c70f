"""Whoever reads a row sees the same tensors: generate, bench, demo, train, record, regenerate, analyze, decoding."""

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sparrow_hf.analysis import answered
from sparrow_hf.data import prepare_inputs, prepare_prompt, read_video
from sparrow_hf.errors import SparrowError
from sparrow_hf.evaluation import demo
from sparrow_hf.evaluation import prompts as benchmarking
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.training import SparrowDataCollator, callbacks, recording
from sparrow_hf.training import regenerate as regenerating
from sparrow_hf.training.callbacks import DecodingCallback

QUESTION = {"type": "text", "text": "what ?"}
#: Turns before the last question: one that is answered is no answer of the row.
EARLIER = [{"role": "user", "content": "a dot ?"}, {"role": "assistant", "content": "a dot"}]
ANSWERS = [
    {"role": "assistant", "content": "a ring"},
    {"role": "assistant", "content": [{"type": "text", "text": "a ring and a dot"}]},
]


class World:
    """A clip of 12 frames, and what reads it."""

    def __init__(self, folder: Path):
        make_clip(folder / "clips" / "clip.mp4", 1, 24)
        self.folder, self.clip = folder, folder / "clips" / "clip.mp4"
        self.processor = build_processor()
        self.target = build_target(self.processor.tokenizer, num_hidden_layers=2)
        self.sources = {
            "relative": "clips/clip.mp4",
            "absolute": str(self.clip),
            "path object": self.clip,
            "bytes": self.clip.read_bytes(),
            "undecoded": {"path": "gone.mp4", "bytes": self.clip.read_bytes()},
            "array": read_video(self.clip)[0],
        }

    def row(self, source: str | None, part: dict[str, Any], earlier: bool, text: bool, answers: int) -> dict[str, Any]:
        """A row of `load_rows` whose relative paths start at the folder."""
        content: Any = "what ?" if text and source is None else [QUESTION]
        if source is not None:
            content = [{"type": "video", "video": self.sources[source]} | part, QUESTION]
        question = {"role": "user", "content": content}
        messages = [*(EARLIER if earlier else []), question, *ANSWERS[:answers]]
        return {"messages": messages, "row_index": 3, "row_folder": str(self.folder)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def by_hand(world: World, row: dict[str, Any], fps: float | None, max_frames: int | None) -> dict[str, Any]:
    """What a user would write for `generate()`: the absolute path, no answer, the row's own frames."""
    messages = deepcopy([turn for turn in row["messages"] if turn not in ANSWERS])
    for part in parts_of({"messages": messages}):
        if isinstance(part.get("video"), str):
            part["video"] = str(world.clip)
    fps, max_frames = row.get("fps", fps), row.get("max_frames", max_frames)
    return dict(prepare_inputs(world.processor, messages, fps=fps, max_frames=max_frames))


def roads(
    world: World, row: dict[str, Any], fps: float | None, max_frames: int | None, patch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Any]]:
    """Name → the prompt that each reader of rows hands to the target. `patch` keeps the targets from running."""
    processor, seen = world.processor, []
    sampling = {"fps": fps, "max_frames": max_frames}
    yield "prepare_prompt", prepare_prompt(processor, row, fps, max_frames)

    for module in (benchmarking, answered):
        patch.setattr(module, "load_rows", lambda *args: [row])
    found = benchmarking.read_conversations("rows.jsonl").rows
    (prompt,) = benchmarking.conversation_prompts(processor, found, [] if max_frames is None else [max_frames], fps)
    yield "bench", prompt.read()
    (conversation,) = answered.read_conversations("rows.jsonl")
    yield "analyze", answered.process_conversation(processor, conversation, **sampling).inputs

    collator = SparrowDataCollator(processor, **sampling)
    sample = collator([row])["samples"][0]
    yield "train", prepare_prompt(None, sample)
    recorder = SimpleNamespace(
        has=lambda index: False,
        write=lambda _, sample: seen.append(sample),
        digests=SimpleNamespace(tidy=lambda: None),
    )
    patch.setattr(recording, "Recorder", lambda *args, **options: recorder)
    recording.record(None, [row], world.folder, collator)
    yield "record", prepare_prompt(None, seen.pop())

    patch.setattr(callbacks, "decode", lambda draft, prompts, *args: seen.extend(prompts) or {})
    args = SimpleNamespace(**sampling, on_bad_row="refuse", disable_tqdm=True, world_size=1, seed=0)
    trainer = SimpleNamespace(data_collator=collator, processing_class=processor, args=args, draft=None, log=dict)
    state = SimpleNamespace(is_world_process_zero=True)
    for trainer.data_collator in (collator, list):
        DecodingCallback(trainer, [row]).on_evaluate(args, state, None, {})
        yield "decoding", seen.pop()

    # Its rows are videos of a user's, which say nothing of frames.
    if not {"fps", "max_frames"} & row.keys():
        yield "demo", shown_by_the_demo(world, row, sampling, patch)

    def write(target: Any, prompts: Any, *args: Any, **options: Any) -> list[list[int]]:
        seen.extend(prompts)
        return [[5, 6]]

    # An array cannot be stored as text.
    if not any(isinstance(part.get("video"), np.ndarray) for part in parts_of(row)):
        patch.setattr(regenerating, "generate_answers", write)
        folder = Path(tempfile.mkdtemp(dir=world.folder))
        regenerating.regenerate(world.target, processor, [row], folder, **sampling)
        yield "regenerate", seen.pop()
        (stored,) = regenerating.read_answers(folder)
        # Whoever reads the answers later, by whatever defaults, sees what they were written to.
        sample = SparrowDataCollator(processor, fps=3, max_frames=2).prepare(stored)
        assert sample["input_ids"][0, sample["answer_start"] :].tolist() == [5, 6]
        yield "answers", prepare_prompt(None, sample)


def parts_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [turn["content"] for turn in row.get("messages", [])]
    return [part for content in contents if not isinstance(content, str) for part in content]


def shown_by_the_demo(world: World, row: dict[str, Any], sampling: dict[str, Any], patch: pytest.MonkeyPatch) -> Any:
    shown = []

    def stop(models: Any, arms: Any, inputs: Any, *args: Any) -> None:
        shown.append(inputs)
        raise KeyboardInterrupt

    patch.setattr(demo, "_stream", stop)
    patch.chdir(world.folder)
    patch.setattr(demo, "follow", lambda draft, target: None)
    draft = SimpleNamespace(config=SimpleNamespace(visual_token_ids=[]))
    question = demo.VideoQuestion("clip.mp4", row["messages"])
    options: dict[str, Any] = {"tree": None, "max_new_tokens": 2, "console": Console(quiet=True)}
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(demo.Models(world.target, world.processor, draft), iter([question]), 1, **options, **sampling)
    return shown[0]


def assert_one_road(
    world: World, row: dict[str, Any], fps: float | None = None, max_frames: int | None = None
) -> None:
    expected = by_hand(world, row, fps, max_frames)
    with pytest.MonkeyPatch.context() as patch:
        for name, found in roads(world, row, fps, max_frames, patch):
            assert set(found) == set(expected), name
            for key, value in expected.items():
                assert torch.equal(found[key], value), (name, key)


SAMPLING = st.fixed_dictionaries(
    {}, optional={"fps": st.sampled_from([2, 4.0]), "max_frames": st.sampled_from([4, 6])}
)
ROWS = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["relative", "absolute", "path object", "bytes", "undecoded", "array", None]),
        "part": st.fixed_dictionaries({}, optional={"fps": st.sampled_from([4, 8.0])}),
        "earlier": st.booleans(),
        "text": st.booleans(),
        "answers": st.integers(1, 2),
    }
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(form=ROWS, own=SAMPLING, default=SAMPLING)
def test_every_reader_of_a_row_sees_the_same_tensors(world: World, form: Any, own: Any, default: Any) -> None:
    assert_one_road(world, world.row(**form) | own, **default)


@pytest.mark.full
@settings(max_examples=1000, deadline=None)
@given(form=ROWS, own=SAMPLING, default=SAMPLING)
def test_a_thousand_more_rows(world: World, form: Any, own: Any, default: Any) -> None:
    assert_one_road(world, world.row(**form) | own, **default)


CLIP = {"source": "absolute", "part": {}, "earlier": False, "text": False, "answers": 1}


def forgetful(self: SparrowDataCollator, row: dict[str, Any]) -> Any:
    """Decoding as it once read its rows: no folder, no `fps`, no `max_frames`, one answer taken off."""
    return prepare_inputs(self.processor, list(row["messages"])[:-1])


@pytest.mark.parametrize(
    ("form", "own", "default"),
    [
        ({"source": "relative"}, {}, {}),
        ({}, {"fps": 2}, {}),
        ({}, {}, {"max_frames": 4}),
        ({"answers": 2}, {}, {}),
    ],
)
def test_a_reader_that_prepares_rows_differently_is_found(
    world: World, form: Any, own: Any, default: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = world.row(**(CLIP | form)) | own
    assert_one_road(world, row, **default)
    monkeypatch.setattr(SparrowDataCollator, "prepare_prompt", forgetful)
    with pytest.raises((AssertionError, SparrowError)):
        assert_one_road(world, row, **default)


CLIP_PART = {"type": "video", "video": "clips/clip.mp4"}
DIALECTS: dict[str, dict[str, Any]] = {
    "llama factory": {
        "messages": [{"role": "user", "content": "<video>what ?"}, ANSWERS[0]],
        "videos": ["clips/clip.mp4"],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<video>what ?"}, {"from": "gpt", "value": "a ring"}],
        "video": "clips/clip.mp4",
    },
    "trl": {
        "prompt": [{"role": "user", "content": [{"type": "video"}, QUESTION]}],
        "completion": [ANSWERS[0]],
        "videos": ["clips/clip.mp4"],
    },
    "openai": {
        "messages": [
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "clips/clip.mp4"}}, QUESTION]},
            ANSWERS[0],
        ]
    },
    "qwen": {"messages": [{"role": "user", "content": [CLIP_PART | {"nframes": None}, QUESTION]}, ANSWERS[0]]},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_reader_reads_every_dialect(world: World, dialect: str) -> None:
    row = DIALECTS[dialect] | {"fps": 4, "row_index": 3, "row_folder": str(world.folder)}
    expected = by_hand(world, world.row("absolute", {}, False, False, 0) | {"fps": 4}, None, None)
    with pytest.MonkeyPatch.context() as patch:
        found = dict(roads(world, row, None, None, patch))
    assert found.keys() >= {"bench", "analyze", "train", "record", "decoding", "regenerate", "answers"}
    for name, inputs in found.items():
        assert set(inputs) == set(expected), name
        for key, value in expected.items():
            assert torch.equal(inputs[key], value), (name, key)


def test_a_parts_own_frames_reach_every_reader_and_are_kept_with_the_answer(world: World) -> None:
    question = {"role": "user", "content": [CLIP_PART | {"nframes": 4, "max_pixels": 3000}, QUESTION]}
    row = {"messages": [question, ANSWERS[0]], "row_index": 3, "row_folder": str(world.folder), "fps": 4}
    expected = prepare_prompt(world.processor, row)
    assert expected["video_grid_thw"].tolist() == [[2, 2, 2]]
    with pytest.MonkeyPatch.context() as patch:
        for name, inputs in roads(world, row, 2, None, patch):
            assert all(torch.equal(inputs[key], value) for key, value in expected.items()), name

"""The same conversation in every dialect gives the same tensors, the same fingerprint, or the same refusal."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import make_media

from sparrow_hf.data import clean_messages, fingerprint, prepare_conversation, split_answer
from sparrow_hf.errors import SparrowError
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.training import media_keys

#: Words that the testbed's tokenizer knows, and marks that are text where nothing is shown.
TEXTS = ["what ?", "a dot", "and a ring", "a ring or a dot ?"]
SETTINGS: list[dict[str, Any]] = [
    {"fps": 2},
    {"fps": 4.0, "max_frames": 4},
    {"num_frames": 6},
    {"fps": 1, "min_frames": 4},
    {"video_start": 0.5, "video_end": 1.25},
    {"max_pixels": 1500},
    {"min_pixels": 6000, "max_pixels": 9000},
    {"resized_height": 96, "resized_width": 64},
]
#: What is wrong with a part that shows something, and can be written in every dialect of parts.
FAULTY_SETTINGS: list[dict[str, Any]] = [
    {"fps": 0},
    {"fps": "2"},
    {"fps": float("nan")},
    {"num_frames": True},
    {"max_frame": 4},
    {"min_frames": 8, "max_frames": 4},
    {"num_frames": 4, "fps": 2},
    {"resized_height": 64},
    {"video_start": 1, "video_end": 1},
]


def conversation(rng: random.Random, folder: Path, with_settings: bool) -> list[dict[str, Any]]:
    """A conversation in the plain dialect: perhaps a system turn, questions, media in any of them, and an answer."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": rng.choice(TEXTS)}] if rng.random() < 0.3 else []
    for number in range(rng.randint(1, 3)):
        if number:
            turns.append({"role": rng.choice(["assistant", "tool"]), "content": rng.choice(TEXTS)})
        content: list[dict[str, Any]] = []
        for _ in range(rng.randint(1, 4)):
            kind = rng.choice(["text", "video", "image"])
            if kind == "text" and not (content and content[-1]["type"] == "text"):
                content.append({"type": "text", "text": rng.choice(TEXTS)})
            elif kind == "video":
                own = rng.choice(SETTINGS) if with_settings and rng.random() < 0.6 else {}
                content.append({"type": "video", "video": str(folder / rng.choice(["1.mp4", "2.mp4"]))} | own)
            elif kind == "image":
                own = {"max_pixels": 1500} if with_settings and rng.random() < 0.3 else {}
                content.append({"type": "image", "image": str(folder / "picture.png")} | own)
        if all(part["type"] == "text" for part in content):
            turns.append({"role": "user", "content": rng.choice(TEXTS)})
        else:
            turns.append({"role": "user", "content": content})
    return [*turns, {"role": "assistant", "content": "a dot and a ring"}]


def broken(rng: random.Random, turns: list[dict[str, Any]], with_settings: bool) -> list[dict[str, Any]]:
    """The conversation with one fault."""
    turns = [turn | {"content": [dict(part) for part in parts_of(turn)] or turn["content"]} for turn in turns]
    videos = [part for turn in turns for part in parts_of(turn) if part["type"] == "video"]
    fault = rng.choice(["role", "missing", "text file", "setting"])
    if fault == "role" or not videos:
        turns[-1]["role"] = "assitant"
    elif fault == "setting" and with_settings:
        video = rng.choice(videos)
        for name in video.keys() - {"type", "video"}:
            del video[name]
        video |= rng.choice(FAULTY_SETTINGS)
    else:
        rng.choice(videos)["video"] = "/nowhere/clip.mp4" if fault == "missing" else __file__
    return turns


def parts_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if isinstance(turn["content"], str) else turn["content"]


# -- dialects: each writes a plain conversation its own way -----------------------------------------------------------


def with_parts(turns: list[dict[str, Any]], write: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        turn if isinstance(turn["content"], str) else turn | {"content": [write(part) for part in turn["content"]]}
        for turn in turns
    ]


def transformers_parts(rng: random.Random, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The source under `path` or `url`, as an object or in a dictionary, every part with the keys of all others."""

    def write(part: dict[str, Any]) -> dict[str, Any]:
        filler = dict.fromkeys(["text", "image", "video", "path", "url", "fps", "max_frames", "image_url"])
        if part["type"] == "text":
            return filler | part
        rest = {name: value for name, value in part.items() if name != part["type"]}
        source = part[part["type"]]
        key, value = rng.choice(
            [
                ("path", source),
                ("url", source),
                ("path", Path(source)),
                (part["type"], {"path": source, "bytes": None}),
            ]
        )
        return filler | rest | {key: value}

    return {"messages": with_parts(turns, write), "videos": None, "images": [], "audios": None}


def qwen_parts(rng: random.Random, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """`file://` addresses, and `nframes`."""

    def write(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        host = rng.choice(["", "localhost"])
        named = {"nframes" if name == "num_frames" else name: value for name, value in part.items()}
        return named | {part["type"]: f"file://{host}{part[part['type']]}"}

    return {"messages": tuple(with_parts(turns, write))}


def openai_parts(rng: random.Random, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """`video_url` and `image_url`, texts as parts."""

    def write(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        kind = part["type"]
        rest = {name: value for name, value in part.items() if name not in ("type", kind)}
        url = f"file://{part[kind]}"
        return {"type": f"{kind}_url", f"{kind}_url": rng.choice([url, {"url": url}])} | rest

    texts = [
        turn | {"content": [{"type": "text", "text": turn["content"]}]} if isinstance(turn["content"], str) else turn
        for turn in turns
    ]
    return {"messages": with_parts(texts, write)}


def marked(turn: dict[str, Any]) -> str:
    return turn["content"] if isinstance(turn["content"], str) else "".join(map(mark, turn["content"]))


def mark(part: dict[str, Any]) -> str:
    return part["text"] if part["type"] == "text" else f"<{part['type']}>"


def columns_of(rng: random.Random, turns: list[dict[str, Any]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for kind in ("video", "image"):
        media = [part[kind] for turn in turns for part in parts_of(turn) if part["type"] == kind]
        if len(media) == 1 and rng.random() < 0.5:
            columns[rng.choice([kind, f"{kind}s"])] = media[0]
        elif media or rng.random() < 0.3:
            columns[f"{kind}s"] = media
    return columns


def llama_factory(rng: random.Random, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Texts with marks, and columns."""
    return {"messages": [turn | {"content": marked(turn)} for turn in turns]} | columns_of(rng, turns)


def sharegpt(rng: random.Random, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """`conversations` of `from` and `value`, the system prompt in a column of its own."""
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    system = {"system": turns[0]["content"]} if turns[0]["role"] == "system" else {}
    told = turns[1:] if system else turns
    written = [{"from": names.get(turn["role"], turn["role"]), "value": marked(turn)} for turn in told]
    return {"conversations": written} | system | columns_of(rng, turns)


def trl(rng: random.Random, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """`prompt` and `completion`, parts that show something without saying what, and columns."""

    def write(part: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value for name, value in part.items() if name == "type" or name != part["type"] or name == "text"
        }

    asked = with_parts(turns, write)
    return {"prompt": asked[:-1], "completion": asked[-1:]} | columns_of(rng, turns)


#: Dialect → whether its parts can have settings.
DIALECTS: dict[Callable[[random.Random, list[dict[str, Any]]], dict[str, Any]], bool] = {
    transformers_parts: True,
    qwen_parts: True,
    openai_parts: True,
    trl: True,
    llama_factory: False,
    sharegpt: False,
}


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("media"))


def outcome(processor: Any, row: dict[str, Any]) -> dict[str, Any] | str:
    """Tensors and answer of a row, or the sentence that refuses it."""
    try:
        return prepare_conversation(processor, row)
    except SparrowError as error:
        return str(error)


def assert_twins(processor: Any, row: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether both rows are good."""
    expected, found = outcome(processor, plain), outcome(processor, row)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return False
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
    assert fingerprint(split_answer(row)[0]) == fingerprint(split_answer(plain)[0])
    assert media_keys(row) == media_keys(plain)
    cleaned = clean_messages(row)
    assert clean_messages({"messages": cleaned}) == cleaned
    return True


def compare_dialects(processor: Any, folder: Path, lists: int) -> tuple[int, int]:
    """How many rows were good, how many refused."""
    good = refused = 0
    for seed in range(lists):
        for number, (dialect, with_settings) in enumerate(DIALECTS.items()):
            rng = random.Random(seed * len(DIALECTS) + number)
            turns = conversation(rng, folder, with_settings)
            if rng.random() < 0.25:
                turns = broken(rng, turns, with_settings)
            before = json.dumps(turns, default=str)
            is_good = assert_twins(processor, dialect(rng, turns), {"messages": turns})
            assert json.dumps(turns, default=str) == before
            good, refused = good + is_good, refused + (not is_good)
    return good, refused


def test_every_dialect_gives_the_tensors_of_its_plain_twin(processor: Any, folder: Path) -> None:
    good, refused = compare_dialects(processor, folder, lists=12)
    assert good > 40 and refused > 10


@pytest.mark.full
def test_two_hundred_conversations_in_six_dialects(processor: Any, folder: Path) -> None:
    good, refused = compare_dialects(processor, folder, lists=200)
    assert good > 700 and refused > 200


VIDEO_PART = {"type": "video", "video": "1.mp4"}
ANSWER = {"role": "assistant", "content": "a dot"}


def asked(content: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ANSWER]} | columns


@pytest.mark.parametrize(
    ("row", "content"),
    [
        (asked("<video>what ?", videos=["1.mp4"]), [VIDEO_PART, {"type": "text", "text": "what ?"}]),
        # Nothing says where: before the first question, as TRL and ms-swift do.
        (asked("what ?", video="1.mp4"), [VIDEO_PART, {"type": "text", "text": "what ?"}]),
        (
            asked("what ?\n<video>", videos=[["picture.png", "picture.png"]]),
            [{"type": "text", "text": "what ?\n"}, {"type": "video", "video": ["picture.png", "picture.png"]}],
        ),
        # Marks are text in rows without columns of media.
        (asked("what is <video> ?"), "what is <video> ?"),
        (asked([{"type": "text", "text": "<image>"}]), [{"type": "text", "text": "<image>"}]),
        (asked("what ?", videos=None, images=[]), "what ?"),
    ],
)
def test_marks_and_columns(row: dict[str, Any], content: Any) -> None:
    assert clean_messages(row)[0]["content"] == content


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (asked("<video><video>what ?", videos=["1.mp4"]), "2 places for videos .* and 1 videos"),
        (asked("<video>what ?", videos=["1.mp4", "2.mp4"]), "1 places for videos .* and 2 videos"),
        (asked("<video>what ?", videos=[]), "1 places for videos .* and 0 videos"),
        (asked("<video>what ?", videos=None), "1 places for videos .* and 0 videos"),
        (asked("<video> or <image> ?", videos=["1.mp4"]), "1 places for images .* and 0 images"),
        (asked([VIDEO_PART], videos=["1.mp4"]), "in the messages and in 'videos' too"),
        (asked("<video>", videos=["1.mp4"], video="2.mp4"), "'videos' and 'video' both name videos"),
        (asked("<video>", videos=[None]), "placeholder for video but no video"),
        (asked("what ?", audios=["a.wav"]), "audio in its column 'audios'"),
        (asked("what ?", tools=[{"name": "f"}]), "tools"),
        ({"messages": [ANSWER], "videos": ["1.mp4"]}, "no user's turn"),
        ({"messages": [{"role": "user", "content": "x"}], "conversations": [{"from": "human"}]}, "both hold turns"),
        ({"prompt": "what ?", "completion": "a dot"}, "'messages', 'conversations' or a 'prompt' of turns"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": "a dot"}, "'completion' must be a list"),
        ({"prompt": [{"role": "user", "content": "x"}], "chosen": [ANSWER], "rejected": [ANSWER]}, "two answers"),
        ({"messages": [{"role": "user", "content": None}]}, "needs a 'role' and a 'content'"),
        ({"messages": [[{"role": "user", "content": "x"}]]}, "needs a 'role' .*found a list of 1"),
        ({"messages": [None]}, "needs a 'role' .*found None"),
        ({"messages": None}, "'messages' must be a list of turns, found None"),
        ({"conversations": []}, "'conversations' must be a list of turns"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": 1}]}]}, "a turn has 'tool_calls'"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "unknown role 'function_call'"),
        (asked("x", system="a") | {"messages": [{"role": "system", "content": "b"}]}, "'system' and a system turn"),
        (asked(["what ?"]), "turn 0, part 0: a part must be a dictionary"),
        (asked([("text", "what ?")]), "turn 0, part 0: .*found a tuple of 2"),
        ({"messages": [{"role": "user", "content": "x"}, ANSWER | {"content": [VIDEO_PART]}]}, "the answer shows"),
        ({"row_error": "line 3 of a.jsonl is no JSON object"}, "line 3 of a.jsonl"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(processor: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SparrowError, match=reason) as caught:
        prepare_conversation(processor, row)
    assert len(str(caught.value)) < 500


def test_a_huge_row_is_refused_in_a_short_sentence(processor: Any) -> None:
    row = asked("<video>" * 100_000, videos=["1.mp4"] * 99_999)
    with pytest.raises(SparrowError, match="100000 places for videos .* 99999 videos") as caught:
        prepare_conversation(processor, row)
    assert len(str(caught.value)) < 300

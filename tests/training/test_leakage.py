"""Held-out videos that were trained on are found, whichever way they are named."""

import hashlib
from pathlib import Path

import pytest
from rows import ask, video

from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.training import SparrowDataCollator, load_rows, media_keys, refuse_shared_media
from sparrow_hf.training.recording import RecordedDataset, record
from sparrow_hf.training.regenerate import regenerate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_clip(tmp_path / "1.mp4", 1, 16)
    return tmp_path


def test_shared_media_are_refused(folder):
    data = (folder / "1.mp4").read_bytes()
    url = "https://example.org/clip.mp4"
    assert media_keys(ask()) == set()
    assert media_keys(ask(video(url), video(data))) == media_keys(ask(video({"bytes": data, "path": "x"}), video(url)))
    assert media_keys(ask(video("a.mp4")) | {"row_folder": str(folder)}) == {str(folder.resolve() / "a.mp4")}
    train = [ask(video("a.mp4")), {"messages": []}, ask(video(url)), ask(video(data))]
    refuse_shared_media(train, [ask(video("b.mp4")), ask()])
    held_out = [ask(video("b.mp4")), ask(video("sub/../a.mp4")), ask(video(data))]
    with pytest.raises(
        TrainingDataError, match="held-out row 1 and training row 0: .*held-out row 2 and training row 3"
    ):
        refuse_shared_media(train, held_out)


def test_media_given_as_bytes_are_found_after_their_answers_are_stored(folder):
    processor = build_processor()
    target = build_target(processor.tokenizer, num_hidden_layers=2)
    data = (folder / "1.mp4").read_bytes()
    row = ask(video(data))
    for name in ("answers", "held_out"):
        regenerate(target, processor, [row], folder / name, max_new_tokens=2)
    answers, held_out = (list(load_rows(folder / name)) for name in ("answers", "held_out"))
    key = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert media_keys(row) == media_keys(answers[0]) == media_keys(held_out[0]) == {key}
    for train in (answers, [row]):
        with pytest.raises(TrainingDataError, match=f"held-out row 0 and training row 0: {key}"):
            refuse_shared_media(train, held_out)
    # Files that are not called by their digest there, or not there, are known by their path.
    digest = key.removeprefix("sha256:")
    for path in (folder / digest, folder / "media" / f"{digest}.mp4", folder / "media" / digest[:40]):
        assert media_keys(ask(video(str(path)))) == {str(path.resolve())}


def test_rows_that_show_nothing_are_compared_by_their_prompts(folder):
    said = {"messages": [{"role": "user", "content": "what is red ?"}]}
    train = [ask(), ask(video("a.mp4"))]
    # The same question about another video is another row.
    refuse_shared_media(train, [said, ask(video("b.mp4"))])
    with pytest.raises(TrainingDataError, match="1 held-out .* held-out row 1 and training row 0: prompt sha256:"):
        # Another answer to the same prompt.
        refuse_shared_media(train, [said, ask(answer={"role": "assistant", "content": "two"})])


def test_recordings_that_share_rows_are_refused(tmp_path, make_draft, samples):
    draft = make_draft()
    for name, rows in {"a": samples[:2], "again": samples[1:3], "other": samples[2:]}.items():
        record(draft, rows, tmp_path / name, SparrowDataCollator())
    a, again, other = (RecordedDataset(tmp_path / name, draft) for name in ("a", "again", "other"))
    refuse_shared_media(a, other)
    with pytest.raises(
        TrainingDataError, match="1 held-out .* held-out row 0 and training row 1: recorded row sha256:"
    ):
        refuse_shared_media(a, again)
    with pytest.raises(TrainingDataError, match="2 held-out"):
        refuse_shared_media(a, a)
    (tmp_path / "a" / "digests.sha256").unlink()
    with pytest.warns(UserWarning, match="no digests"):
        old = RecordedDataset(tmp_path / "a", draft)
    with pytest.raises(TrainingDataError, match="2 held-out .*row-000000.safetensors"):
        refuse_shared_media(old, old)
    # Nothing tells which conversations these are.
    refuse_shared_media(a, [ask()])

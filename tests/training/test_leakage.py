"""Held-out videos that were trained on are found, whichever way they are named."""

from pathlib import Path

import pytest
from rows import ask, video

from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.training import media_keys, refuse_shared_media


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

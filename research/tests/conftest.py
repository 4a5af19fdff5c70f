"""Fixtures of every test: those of the package's own tests, and a world so small that drafts train in seconds."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_targets import save_small_target

from sparrow_hf.testbed.families import QWEN2_5_VL
from sparrow_research import processes, recipes, retrain

from fixtures import family, no_network  # noqa: F401


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `target` of two layers, whose drafts are trained with two short clips, in threads."""
    save_small_target(tmp_path / "target", QWEN2_5_VL, 8)
    monkeypatch.setattr(recipes, "CLIPS", 2)
    monkeypatch.setattr(retrain, "SHORT_CLIPS", (16, 24))
    monkeypatch.setattr(retrain, "LONG_SHARE", 0.0)
    monkeypatch.setattr(retrain, "MAX_CAPTION_TOKENS", 16)
    # A process of its own would not see the constants above.
    monkeypatch.setattr(processes, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    return tmp_path

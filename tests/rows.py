"""Rows of conversation that ask about media, and media to ask about."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparrow_hf.testbed.world import make_clip

ANSWER = {"role": "assistant", "content": "a dot"}


def ask(*parts: dict[str, Any], answer: dict[str, Any] = ANSWER) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what ?"}]}, answer]}


def video(source: Any) -> dict[str, Any]:
    return {"type": "video", "video": source}


def make_media(folder: Path) -> Path:
    """Writes two clips, `1.mp4` and `2.mp4`, and `picture.png`."""
    for seed, tokens in ((1, 16), (2, 24)):
        make_clip(folder / f"{seed}.mp4", seed, tokens)
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(folder / "picture.png")
    return folder

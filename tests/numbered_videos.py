"""Videos whose frames tell their number, written by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

HEIGHT, WIDTH = 48, 64
STEP = 10
"""Each frame is by so much brighter than the one before it."""


#: Five seconds at one frame per second, then one second at ten.
SLOW_THEN_FAST = (*map(float, range(5)), *(5 + i / 10 for i in range(10)))


def pictures(count: int) -> np.ndarray:
    """Gray frames, each brighter, with a white mark in the upper left and a black one in the upper right corner."""
    frames = np.repeat(np.arange(count, dtype=np.uint8)[:, None, None, None] * STEP, HEIGHT, 1).repeat(WIDTH, 2)
    frames = frames.repeat(3, 3)
    frames[:, :16, :16], frames[:, :16, -16:] = 255, 0
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    """Which of `pictures` the frames are, by their middle."""
    _, height, width, _ = frames.shape
    middle = frames[:, height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4]
    return np.rint(middle.mean(axis=(1, 2, 3)) / STEP).astype(int).tolist()


def write(
    path: Path,
    codec: str = "libx264",
    seconds: Sequence[float] = tuple(i / 8 for i in range(24)),
    pixels: str = "yuv420p",
    rate: int = 8,
    matrix: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    container_options: dict[str, str] | None = None,
    first: int = 0,
    **arguments: Any,
) -> Path:
    """A file of `pictures`, frame `i` at `seconds[i]`.

    Args:
        first: Number of the frame at which a player begins: an edit list hides those before it.
    """
    with av.open(str(path), "w", options=container_options or {}, **arguments) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "6"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.codec_context.time_base = Fraction(1, rate if path.suffix == ".avi" else 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix is not None:
            stream.set_display_matrix(matrix)

        def mux(packets: list[av.Packet]) -> None:
            for packet in packets:
                shift = round(seconds[first] / packet.time_base)
                packet.duration = round(1 / rate / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                container.mux(packet)

        for second, picture in zip(seconds, pictures(len(seconds)), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(second / frame.time_base)
            mux(stream.encode(frame))
        mux(stream.encode())
    return path

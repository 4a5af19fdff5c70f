"""From the clean parts of a conversation to frames and pictures, sampled and sized as each part says."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata

from .._transformers import smart_resize
from ..errors import ImageError, MessagesError, SparrowError, VideoError
from ..extras import require
from .files import is_url
from .images import read_image
from .parts import IMAGE_SETTINGS, MediaKind
from .sources import shown
from .video import read_frames, read_video

DEFAULT_FRAMES_PER_SECOND = 2.0
"""Assumed for videos given as arrays that do not say how densely they were sampled (Qwen-VL's sampling rate)."""
#: Settings of a part that say how large its frames are.
SIZES = (*IMAGE_SETTINGS, "total_pixels")


def load_video(part: Mapping[str, Any], fps: float | None, max_frames: int | None) -> tuple[np.ndarray, VideoMetadata]:
    """The frames of a clean video part, and their metadata.

    Args:
        part: The part; its own sampling takes precedence.
        fps, max_frames: Sampling of video files otherwise.

    Raises:
        VideoError: The video cannot be read, or its frames are not of one size.
    """
    source = part["video"]
    _check_path(source, VideoError, "video")
    if isinstance(source, (str, bytes)):
        window = {"start": part.get("video_start"), "end": part.get("video_end")}
        return read_video(source, **_sampling(part, fps, max_frames), **window)
    if isinstance(source, list):
        source = _stacked([load_image(frame) for frame in source])
    return read_frames(source, float(part.get("fps", DEFAULT_FRAMES_PER_SECOND)))


def load_image(source: Any) -> Any:
    """The picture of a clean image part's source, or of a frame: RGB, an array with three channels where it had them.

    Raises:
        ImageError: It cannot be read, or the array is of another shape.
    """
    _check_path(source, ImageError, "image")
    if isinstance(source, np.ndarray) and source.ndim not in (2, 3):
        raise ImageError(f"An image given as an array must have 2 or 3 dimensions, got shape {source.shape}.")
    if isinstance(source, np.ndarray):
        return _rgb(source)
    try:
        return read_image(source)
    except (SparrowError, MemoryError):
        raise
    # Pillow's decoders raise many types of errors.
    except Exception as error:
        raise ImageError(f"An image cannot be read ({type(error).__name__}): save it again as png.") from error


def _rgb(array: np.ndarray) -> np.ndarray:
    """A grey array with its channel three times, one with transparency without it, as Pillow does it; others as is."""
    if array.ndim == 2:
        array = array[:, :, None]
    axis = 2 if array.shape[2] in (1, 3, 4) else 0
    if array.shape[axis] == 1:
        return array.repeat(3, axis)
    return array.take(range(3), axis) if array.shape[axis] == 4 else array


def _check_path(source: Any, error_class: type[ValueError], kind: str) -> None:
    """Raises where a path is rather a file as text, before an error of the readers repeats it."""
    if isinstance(source, str) and shown(source) != repr(source) and not is_url(source) and not os.path.exists(source):
        raise error_class(
            f"There is no {kind} file at {shown(source)}. Check the path; a file as text goes under 'base64' or into "
            "a data URL."
        )


def _stacked(frames: list[Any]) -> np.ndarray:
    arrays = [np.asarray(frame) for frame in frames]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise VideoError(
            f"The frames of a video must be of one size, found {', '.join(map(str, shapes[:4]))}: resize them first."
        )
    return np.stack(arrays)


def _sampling(part: Mapping[str, Any], fps: float | None, max_frames: int | None) -> dict[str, Any]:
    own = {name: part[name] for name in ("fps", "num_frames", "min_frames", "max_frames") if name in part}
    if "num_frames" in own:
        return own
    sampling = {"fps": fps, "max_frames": max_frames} | own
    if max_frames is not None and own.get("min_frames", 0) > max_frames and "max_frames" not in own:
        del sampling["max_frames"]
    return sampling


def set_sizes(
    processor: ProcessorMixin, kind: MediaKind, parts: Sequence[Mapping[str, Any]], media: Sequence[Any]
) -> list[Any] | None:
    """The videos or images of a prompt in the sizes that their parts ask for.

    Sizes follow the rule of Qwen's own helper: `resized_height` and `resized_width`, or bounds on the pixels of a
    frame (`total_pixels`: twice as many for all frames together), rounded to what the target's patches fill. Where a
    part sets no bound, the processor's own holds.

    Args:
        processor: The target's processor.
        kind: What the media are.
        parts: The clean part of each.
        media: Frames `(frames, height, width, 3)` or `(frames, 3, height, width)`; or pictures.

    Returns:
        `(frames, 3, height, width)` or `(3, height, width)` tensors that the processor must not resize again; `None`
        if no part asks for a size.

    Raises:
        MessagesError: The processor knows one size only, or the frames are too narrow to be resized.
    """
    if not any(name in part for part in parts for name in SIZES):
        return None
    require("video", "Resizing videos and images", "torchvision")
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as vision

    own = getattr(processor, f"{kind}_processor", None)
    if not hasattr(own, "merge_size") or not hasattr(own, "patch_size"):
        asked = next(name for part in parts for name in SIZES if name in part)
        raise MessagesError(f"{type(processor).__name__} makes all {kind}s one size: leave out {asked!r}")
    resized = []
    for part, medium in zip(parts, media, strict=True):
        pixels = torch.from_numpy(np.array(medium))
        if pixels.shape[-1] == 3:
            pixels = pixels.movedim(-1, -3)
        try:
            size = _size(own, kind, part, pixels)
        except ValueError as error:
            raise MessagesError(f"the {kind} cannot be resized: {error}") from error
        resized.append(vision.resize(pixels, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True))
    return resized


def _size(own: Any, kind: MediaKind, part: Mapping[str, Any], pixels: torch.Tensor) -> tuple[int, int]:
    """Height and width of the frames of one part."""
    factor = own.patch_size * own.merge_size
    if "resized_height" in part:
        height, width = part["resized_height"], part["resized_width"]
        return smart_resize(height, width, factor, min_pixels=4 * factor**2, max_pixels=16384 * factor**2)
    height, width = pixels.shape[-2:]
    chosen = _own_size(own, kind, pixels)
    unbound = smart_resize(height, width, factor, min_pixels=1, max_pixels=2**63)
    usual, free = math.prod(chosen), math.prod(unbound)
    # The processor's own bound holds where the part sets none: it shows in frames that it enlarges or shrinks.
    least = part.get("min_pixels", usual if usual > free else 1)
    most = part.get("max_pixels")
    if "total_pixels" in part:
        share = max(2 * part["total_pixels"] / len(pixels), 1.05 * part.get("min_pixels", 0))
        most = share if most is None else min(most, share)
    if most is None and usual < free:
        if least <= usual:
            return chosen
        most = 1.05 * least
    most = 2**63 if most is None else most
    return smart_resize(height, width, factor, min_pixels=min(least, most), max_pixels=most)


def _own_size(own: Any, kind: MediaKind, pixels: torch.Tensor) -> tuple[int, int]:
    """The size that the processor would choose, in whole patches."""
    if kind == "video":
        grid = own(videos=[pixels], do_sample_frames=False, return_tensors="pt")["video_grid_thw"]
    else:
        grid = own(images=[pixels], return_tensors="pt")["image_grid_thw"]
    _, rows, columns = grid[0].tolist()
    return rows * own.patch_size, columns * own.patch_size

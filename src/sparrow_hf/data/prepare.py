"""From a row to the tensors of a target. Generation, benchmarks, training and analysis all use these functions.

row            messages, and what `load_rows` adds: see `messages.py`
 │ split_answer     turns cleaned, paths made absolute, the answer at the end taken off
 │ prepare_inputs   videos decoded as densely as the row says, the target's processor run
prompt         what the processor returns for one prompt, generation prompt included
 │ append_answer    the answer's tokens appended
processed      conversation: the tensors of prompt and answer, and `answer_start`
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.video_utils import VideoMetadata

from ..errors import ImageError, TrainingDataError, VideoError
from .images import read_image
from .messages import ROW_FOLDER, ROW_INDEX, media_source, split_answer
from .video import read_frames, read_video

DEFAULT_FRAMES_PER_SECOND = 2.0
"""Assumed for videos given as arrays that do not say how densely they were sampled (Qwen-VL's sampling rate)."""

RowKind = Literal["messages", "processed", "states"]


def kind_of(row: Mapping[str, Any]) -> RowKind | None:
    """Which kind of row it is. No other function decides this.

    Returns:
        `"messages"`: a conversation. `"processed"`: tensors of a processor, of a prompt alone or with its answer (and
        then `answer_start`). `"states"`: what a target made of it, no pixels. `None`: nothing that can be used.
    """
    if "text_states" in row:
        return "states"
    if "input_ids" in row:
        return "processed"
    return "messages" if "messages" in row else None


def own_sampling(row: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling of videos that a row sets itself: its `fps` and `max_frames`, where it has them.

    Raises:
        TrainingDataError: One of them is no positive number.
    """
    sampling = {name: row[name] for name in ("fps", "max_frames") if row.get(name) is not None}
    for name, value in sampling.items():
        if not isinstance(value, (int, float)) or not value > 0 or (name == "max_frames" and value < 1):
            raise TrainingDataError(f"the row's {name!r} must be a positive number, found {value!r}")
    return sampling


def prepare_prompt(
    processor: ProcessorMixin | None,
    row: Mapping[str, Any],
    fps: float | None = None,
    max_frames: int | None = None,
) -> BatchFeature:
    """The processed prompt of a row, without the answer if it holds one.

    Args:
        processor: The target's processor; rows that are processed need none.
        row: A conversation, whose last question ends the prompt: all assistant turns after it are left out. Or a
            processed prompt or conversation.
        fps, max_frames: How densely to read video files, see [`prepare_inputs`]. A row that names its own `fps` or
            `max_frames` is read that way: with other frames, an answer of the target would not be its answer any more.

    Returns:
        Tensors of a batch of one.

    Raises:
        TrainingDataError: The row has no well-formed messages, no question, or holds states instead of pixels.
        VideoError: See [`prepare_inputs`], as are ImageError and MissingDependencyError.
    """
    if _readable_kind(row) == "messages":
        return prepare_inputs(_required(processor), split_answer(row)[0], **_sampling(row, fps, max_frames))
    shape, end = row["input_ids"].shape, row.get("answer_start")
    inputs = {
        name: value[:, :end] if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in _without_place(row).items()
        if name != "answer_start"
    }
    return BatchFeature(inputs)


def prepare_conversation(
    processor: ProcessorMixin | None,
    row: Mapping[str, Any],
    fps: float | None = None,
    max_frames: int | None = None,
) -> dict[str, Any]:
    """The processed conversation of a row: its prompt, as [`prepare_prompt`] makes it, and its answer.

    Args:
        processor: The target's processor; processed conversations need none.
        row: A conversation. Its answer is its `answer_ids` (the exact tokens the target wrote), else its
            `answer` (text), else the assistant turns at its end. Or a processed conversation, handed on.
        fps, max_frames: As for [`prepare_prompt`].

    Raises:
        TrainingDataError: As for [`prepare_prompt`]; or the row has no answer.
    """
    if _readable_kind(row) == "processed":
        return _without_place(row)
    answer_ids, answer = row.get("answer_ids"), row.get("answer")
    if answer_ids is None:
        tokenizer = tokenizer_of(_required(processor))
        answer = split_answer(row)[1] if answer is None else answer
        if answer is None:
            raise TrainingDataError(
                "the row has no answer: end 'messages' with an assistant turn, or add 'answer' or 'answer_ids'"
            )
        answer_ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return append_answer(prepare_prompt(processor, row, fps, max_frames), answer_ids)


def append_answer(inputs: Mapping[str, Any], answer_ids: Sequence[int] | Tensor) -> dict[str, Any]:
    """The processed conversation of a processed prompt and its answer.

    Args:
        inputs: What the target's processor returned for one prompt, generation prompt included.
        answer_ids: Tokens of the answer, a list or an `(A,)` or `(1, A)` tensor, end of turn included if it was
            reached.
    """
    prompt = inputs["input_ids"]
    answer = torch.as_tensor(answer_ids, dtype=prompt.dtype, device=prompt.device).reshape(1, -1)
    sample = dict(inputs)
    for name, value in inputs.items():
        # Whatever has one entry per token grows with the answer: its type is text (0), it is attended to (1).
        if isinstance(value, Tensor) and value.shape == prompt.shape and name != "input_ids":
            grown = torch.full_like(answer, 1 if name == "attention_mask" else 0, dtype=value.dtype)
            sample[name] = torch.cat((value, grown), dim=1)
    sample["input_ids"] = torch.cat((prompt, answer), dim=1)
    sample["answer_start"] = prompt.shape[1]
    return sample


def prepare_inputs(
    processor: ProcessorMixin,
    messages: list[dict[str, Any]],
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    add_generation_prompt: bool = True,
) -> BatchFeature:
    """Turns one conversation into the tensors a model of any family expects.

    Args:
        processor: The model's processor.
        messages: Chat messages. Content is a string or a list of parts: `{"type": "text", "text": …}`,
            `{"type": "image", "image": …}` (a PIL image, array, path, URL or a file's bytes) and
            `{"type": "video", "video": …}` (a path, URL or a file's bytes, or frames as an array, with their rate in
            `"fps"`). Any number of videos works, none too.
        fps: Frames per second to keep of video files, see [`~sparrow_hf.data.read_video`]. Arrays are passed on as
            they are.
        max_frames: Most frames to keep of each video file.
        add_generation_prompt: Whether the prompt ends where the assistant's answer begins.

    Returns:
        The processor's output for a batch of one, as tensors.

    Raises:
        VideoError: A video cannot be read, or the processor cannot take it: its size, or videos of different lengths
            or sizes together.
        ImageError: An image cannot be read.
        MissingDependencyError: PyAV or torchvision is not installed and the messages hold a video.
    """
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    videos = [_load_video_part(part, fps, max_frames) for part in parts if part["type"] == "video"]
    images = [_load_image_part(part) for part in parts if part["type"] == "image"]

    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        media["videos"] = [frames for frames, _ in videos]
        media["video_metadata"] = [metadata for _, metadata in videos]
        # The frames are sampled already: no processor may sample them again.
        media["do_sample_frames"] = False
    try:
        return processor(text=[text], **media, return_tensors="pt")
    except ValueError as error:
        shapes = {frames.shape for frames in media.get("videos", [])}
        if not shapes:
            raise
        found = f"found {', '.join(map(str, sorted(shapes)))}"
        if len(shapes) > 1:
            raise VideoError(
                f"{type(processor).__name__} cannot take videos of different shapes in one prompt ({found}): sample "
                "them alike with max_frames, or split the prompt."
            ) from error
        raise VideoError(
            f"{type(processor).__name__} cannot take the video ({found}): {str(error).rstrip('.')}. Cut or scale the "
            "video, or read other frames of it."
        ) from error


def _readable_kind(row: Mapping[str, Any]) -> Literal["messages", "processed"]:
    kind = kind_of(row)
    if kind is None:
        raise TrainingDataError(
            f"a row needs 'messages', or 'input_ids' and 'answer_start'; it has {', '.join(sorted(row)) or 'nothing'}"
        )
    if kind == "states":
        raise TrainingDataError(
            "a recorded row holds no pixels, so the target cannot read it again: give a row with 'messages', or what "
            "the processor returned"
        )
    return kind


def _without_place(row: Mapping[str, Any]) -> dict[str, Any]:
    """A processed row without its index and folder: the rest is passed to the target unchanged."""
    return {name: value for name, value in row.items() if name not in (ROW_INDEX, ROW_FOLDER)}


def _sampling(row: Mapping[str, Any], fps: float | None, max_frames: int | None) -> dict[str, Any]:
    return {"fps": fps, "max_frames": max_frames} | own_sampling(row)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a target that only reads text has no more than a tokenizer."""
    return getattr(processor, "tokenizer", processor)


def _required(processor: ProcessorMixin | None) -> ProcessorMixin:
    if processor is None:
        raise TrainingDataError(
            "rows with 'messages' need the target's processor: SparrowTrainer(processing_class=…) or "
            "SparrowDataCollator(processor)"
        )
    return processor


def _load_video_part(
    part: dict[str, Any], fps: float | None, max_frames: int | None
) -> tuple[np.ndarray, VideoMetadata]:
    source = media_source(part)
    if source is None:
        raise VideoError(
            "A video part needs a file, its bytes, a URL or an array under 'video', 'path' or 'url'; it has "
            f"{sorted(part)}."
        )
    if isinstance(source, (str, PathLike, bytes)):
        return read_video(source, fps, max_frames)
    return read_frames(source, float(part.get("fps", DEFAULT_FRAMES_PER_SECOND)))


def _load_image_part(part: dict[str, Any]) -> Any:
    source = media_source(part)
    if source is None:
        raise ImageError(f"An image part needs an image under 'image', 'path' or 'url'; it has {sorted(part)}.")
    return read_image(source)

"""From a row to the tensors of a target. Generation, benchmarks, training and analysis all use these functions.

row            messages of any dialect, and what `load_rows` adds: see `messages.py`
 │ split_answer     turns in their plain form, paths made absolute, the answer at the end taken off
 │ prepare_inputs   videos decoded as densely as the row says (`media.py`), the target's processor run
prompt         what the processor returns for one prompt, generation prompt included
 │ to_target        moved to the target's device, pixels in its dtype
 │ append_answer    the answer's tokens appended
processed      conversation: the tensors of prompt and answer, and `answer_start`
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from .._transformers import input_device
from ..errors import MessagesError, TrainingDataError, VideoError
from .dialects import has_turns
from .media import load_image, load_video, set_sizes
from .messages import ROW_ERROR, ROW_FOLDER, ROW_INDEX, clean_messages, media_parts, split_answer, text_of
from .parts import VIDEO_SETTINGS, plain_settings
from .sources import shown

RowKind = Literal["messages", "processed", "states"]
#: What a row says whose `fps` and `max_frames` are all there is: where one of them is not set, no option limits it.
FIXED_FRAMES = "fixed_frames"
TIMES = ("second_per_grid_ts", "video_second_per_grid")
"""Inputs that are seconds: RoPE positions are computed from them."""


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
    return "messages" if has_turns(row) else None


def own_sampling(row: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling of videos that a row sets itself: its `fps` and `max_frames`, where it has them.

    Both, and `None` for no limit, if the row says [`FIXED_FRAMES`].

    Raises:
        TrainingDataError: One of them is no positive number, or `max_frames` no whole one.
    """
    own = {name: row[name] for name in ("fps", "max_frames") if row.get(name) is not None}
    set_by_row = plain_settings(own, VIDEO_SETTINGS, "the row's")
    return {"fps": None, "max_frames": None} | set_by_row if row.get(FIXED_FRAMES) is True else set_by_row


def sampling_of(row: Mapping[str, Any], fps: float | None = None, max_frames: int | None = None) -> dict[str, Any]:
    """How videos of a row are sampled: as the row says, else as the options do."""
    return {"fps": fps, "max_frames": max_frames} | own_sampling(row)


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
    if readable_kind(row) == "messages":
        return prepare_inputs(_required(processor), split_answer(row)[0], **sampling_of(row, fps, max_frames))
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
        row: A conversation of any dialect. Its answer is its `answer_ids` (the exact tokens the target wrote), else
            its `answer` (text), else the assistant turns at its end. Or a processed conversation, handed on.
        fps, max_frames: As for [`prepare_prompt`].

    Raises:
        TrainingDataError: As for [`prepare_prompt`]; or the row has no answer.
    """
    if readable_kind(row) == "processed":
        return _without_place(row)
    answer_ids, answer = row.get("answer_ids"), row.get("answer")
    if answer_ids is None:
        tokenizer = tokenizer_of(_required(processor))
        answer = split_answer(row)[1] if answer is None else answer
        if answer is not None and not isinstance(answer, str):
            raise TrainingDataError(f"'answer' must be text, found {shown(answer)}")
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
    target: PreTrainedModel | None = None,
) -> BatchFeature:
    """Turns one conversation into the tensors a model of any family expects.

    Args:
        processor: The model's processor.
        messages: Chat messages. Content is a string or a list of parts: `{"type": "text", "text": …}`,
            `{"type": "image", "image": …}` and `{"type": "video", "video": …}`, by path, URL, bytes or pixels; a part
            may set its own sampling and size (see [`~sparrow_hf.data.parts.plain_part`]). Any number of videos works,
            none too.
        fps: Frames per second to keep of video files, see [`~sparrow_hf.data.read_video`]. Arrays are passed on as
            they are.
        max_frames: Most frames to keep of each video file.
        add_generation_prompt: Whether the prompt ends where the assistant's answer begins.
        target: The model that will read the tensors: they are moved to its device, and pixels to its dtype. By default
            they stay as the processor made them, on the CPU and in fp32.

    Returns:
        The processor's output for a batch of one, as tensors.

    Raises:
        MessagesError: Something in the messages is not understood, or `fps` or `max_frames` is no such number; or the
            target's chat template leaves out a video or image, or a text holds the target's own placeholder.
        VideoError: A video cannot be read, or the processor cannot take it: its size, or videos of different lengths
            or sizes together.
        ImageError: An image cannot be read.
        MissingDependencyError: PyAV or torchvision is not installed and the messages hold a video.
    """
    sampling = {name: value for name, value in (("fps", fps), ("max_frames", max_frames)) if value is not None}
    plain_settings(sampling, VIDEO_SETTINGS, "the given")
    messages = clean_messages({"messages": messages})
    if tokenizer_of(processor) is processor:
        messages = _of_text_alone(messages)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    video_parts, image_parts = media_parts(messages, "video"), media_parts(messages, "image")
    _check_places(processor, text, {"video": len(video_parts), "image": len(image_parts)})

    media: dict[str, Any] = {}
    if image_parts:
        media["images"] = [load_image(part["image"]) for part in image_parts]
        if (resized := set_sizes(processor, "image", image_parts, media["images"])) is not None:
            media |= {"images": resized, "images_kwargs": {"do_resize": False}}
    if video_parts:
        media["videos"], metadata = zip(*(load_video(part, fps, max_frames) for part in video_parts), strict=True)
        # The frames are sampled already: no processor may sample them again.
        sampled = {"video_metadata": list(metadata), "do_sample_frames": False}
        if (resized := set_sizes(processor, "video", video_parts, media["videos"])) is not None:
            media["videos"] = resized
            sampled["do_resize"] = False
        media |= {"videos": list(media["videos"]), "videos_kwargs": sampled}
    try:
        inputs = {**processor(text=[text], **media, return_tensors="pt")}
    except ValueError as error:
        shapes = {tuple(frames.shape) for frames in media.get("videos", [])}
        if not shapes or text.count(getattr(processor, "video_token", None) or "") == 0:
            raise MessagesError(f"{type(processor).__name__} cannot take the prompt: {error}") from error
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
    return BatchFeature(inputs if target is None else to_target(inputs, target))


def to_target(inputs: Mapping[str, Any], target: PreTrainedModel) -> dict[str, Any]:
    """Inputs as the target reads them: on its device, and pixels in its dtype.

    Not every target casts pixels by itself. Seconds stay exact: in bf16, `1.11` is `1.1094`, and every later frame
    would get another RoPE position.

    Args:
        inputs: What a processor returned, several prompts in a batch too. What is no tensor is handed on.
        target: The model that will read them.
    """
    device, moved = input_device(target), {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            is_cast = value.is_floating_point() and name not in TIMES
            value = value.to(device, target.dtype if is_cast else None)
        moved[name] = value
    return moved


def _of_text_alone(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns whose content is text, as the chat template of a language model expects it."""
    if media_parts(messages):
        raise MessagesError(
            "the messages show a video or image, and the target reads text alone (it has no processor, only a "
            "tokenizer): leave them out, or choose a video LLM"
        )
    return [{**turn, "content": text_of(turn)} for turn in messages]


def _check_places(processor: ProcessorMixin, text: str, shown_media: Mapping[str, int]) -> None:
    """Raises [`MessagesError`] if a prompt has more or fewer places for videos or images than the messages show.

    Said before anything is decoded. A prompt without a place is left to the processor: it may know another mark.
    """
    for kind, count in shown_media.items():
        token = getattr(processor, f"{kind}_token", None)
        places = 0 if token is None else text.count(token)
        if places and places != count:
            raise MessagesError(
                f"the prompt has {places} places for {kind}s ({token}) and the messages show {count}: the chat "
                "template leaves some out, or a text holds the target's own placeholder"
            )


def readable_kind(row: Mapping[str, Any]) -> Literal["messages", "processed"]:
    """What kind of row the target can read again.

    Raises:
        TrainingDataError: It is none.
    """
    if row.get(ROW_ERROR) is not None:
        raise MessagesError(row[ROW_ERROR])
    kind = kind_of(row)
    if kind is None:
        raise TrainingDataError(
            "a row needs 'messages', 'conversations' or a 'prompt' of turns, or 'input_ids' and 'answer_start'; "
            f"it has {', '.join(map(str, list(_without_place(row))[:20])) or 'nothing'}"
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


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a target that only reads text has no more than a tokenizer."""
    return getattr(processor, "tokenizer", processor)


def processor_digest(processor: Any) -> str:
    """SHA-256 over the settings and the chat template of a processor, which decide what a target is shown of a row."""
    settings = processor.to_dict() if isinstance(processor, ProcessorMixin) else {}
    told = [settings, getattr(processor, "chat_template", None)]
    # What JSON does not hold may print itself differently in every process.
    text = json.dumps(told, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def _required(processor: ProcessorMixin | None) -> ProcessorMixin:
    if processor is None:
        raise TrainingDataError(
            "rows with 'messages' need the target's processor: SparrowTrainer(processing_class=…) or "
            "SparrowDataCollator(processor)"
        )
    return processor

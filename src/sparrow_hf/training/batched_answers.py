"""One `generate()` call for several prompts: their tensors in one batch, and the answer of each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.prepare import to_target
from ..errors import SparrowError, TrainingDataError


def generate_answers(
    target: PreTrainedModel, prompts: Sequence[Mapping[str, Tensor]], pad_token_id: int, **settings: Any
) -> list[list[int]]:
    """Answers of several processed prompts from one batched `generate()` call, end of turn included.

    Args:
        target: The target.
        prompts: What its processor returned for each prompt.
        pad_token_id: Fills up short prompts on the left, and ends short answers.
        settings: Arguments of `generate()`.

    Raises:
        TrainingDataError: The prompts cannot be batched.
    """
    inputs = to_target(left_pad(prompts, pad_token_id), target)
    try:
        output = target.generate(**inputs, pad_token_id=pad_token_id, **settings)
    except ValueError as error:
        if isinstance(error, SparrowError) or len({frozenset(prompt) for prompt in prompts}) == 1:
            raise
        # GLM 4.xV cannot tell the images of one prompt from the videos of another.
        raise TrainingDataError(
            f"the target does not read these prompts in one batch ({error}): use batch_size=1 for these rows"
        ) from error
    eos = target.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    answers = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        while length and row[length - 1] == pad_token_id and pad_token_id not in ends:
            # What ended at a stop string is followed by padding alone.
            length -= 1
        answers.append(row[:length])
    return answers


def left_pad(prompts: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of several processed prompts: ids and masks padded on the left, visual tensors one after the other.

    Prompts may differ in what they show: a prompt without a video adds nothing to the videos of the batch.

    Raises:
        TrainingDataError: Tensors cannot be joined: their shapes differ, they number the patches of one prompt, or a
            prompt lacks one that has an entry for every token. Generate these prompts one by one.
    """
    if len(prompts) == 1:
        return dict(prompts[0])
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        holders = [prompt for prompt in prompts if name in prompt]
        parts = [prompt[name] for prompt in holders]
        per_token = all(prompt[name].shape == prompt["input_ids"].shape for prompt in holders)
        # Molmo 2 numbers the patches of a prompt: in a batch these would be those of the first one.
        is_numbers = name.endswith("_token_pooling")
        if name.startswith("pixel_") and all("pixel_attention_mask" in prompt for prompt in holders):
            parts = _with_as_many_images(parts)
        if per_token and len(holders) == len(prompts):
            # Masks and token types of padding are 0.
            fill = pad_token_id if name == "input_ids" else 0
            padded = [torch.nn.functional.pad(part, (length - part.shape[1], 0), value=fill) for part in parts]
            batch[name] = torch.cat(padded)
        elif not per_token and len({part.shape[1:] for part in parts}) == 1 and (len(parts) == 1 or not is_numbers):
            batch[name] = torch.cat(parts)
        else:
            shapes = ", ".join(str(tuple(prompt[name].shape)) if name in prompt else "none" for prompt in prompts)
            raise TrainingDataError(
                f"the prompts' {name} have shapes {shapes} and cannot be batched: use batch_size=1 for these rows"
            )
    return batch


def _with_as_many_images(parts: Sequence[Tensor]) -> list[Tensor]:
    """Pixels, or their mask, `(1, images, …)` of several prompts, filled up with images of zeros, which are no images.

    So do the processors that make such a mask (Idefics 3, SmolVLM), and their models leave them out.
    """
    most = max(part.shape[1] for part in parts)
    return [torch.cat([part, part.new_zeros(1, most - part.shape[1], *part.shape[2:])], dim=1) for part in parts]

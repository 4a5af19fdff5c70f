"""Models from folders or Hub ids, and the one sentence that says why one cannot be loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from ._transformers import OTHER_POSITIONS_IN_VLLM, use_vllm_positions
from .errors import MissingDependencyError, TargetLoadError, TransformersContractError
from .extras import require


@contextmanager
def told_if_not_loaded(what: str, source: str, error_class: type[Exception] = TargetLoadError) -> Iterator[None]:
    """Turns what the loading of a model can die of into one sentence.

    Args:
        what: "target", "draft", …
        source: Its folder or Hub id.
        error_class: What is raised.
    """
    try:
        yield
    except (MissingDependencyError, TransformersContractError):
        # These have a sentence of their own.
        raise
    # torch asserts that it was built for the device, and an attention function may need a package.
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise error_class(f"{what} {source!r} cannot be loaded: {reason}") from error


def load_target(
    target: str,
    processor: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    attention: str | None = None,
    vllm_positions: bool = False,
) -> tuple[Any, Any]:
    """A target in evaluation mode and its processor, from folders or Hub ids.

    Args:
        target: Folder or Hub id.
        processor: The same of its processor, if it lies elsewhere.
        dtype: "auto" is the checkpoint's own.
        device: By default the accelerator, else the CPU; "auto" spreads the target over all GPUs.
        revision: Of the target on the Hub, and of its processor, unless that lies elsewhere.
        attention: Attention implementation, such as "sdpa"; by default the one that transformers chooses.
        vllm_positions: Number the text after a video as vLLM does (`docs/serving.md`).

    Raises:
        TargetLoadError: One of them is not there, or does not fit the device; or `vllm_positions` of another family.
        MissingDependencyError: The device is "auto", and accelerate is not installed.
    """
    model = load_without_processor(target, dtype, device, revision, attention)
    if vllm_positions:
        if model.config.model_type not in OTHER_POSITIONS_IN_VLLM:
            raise TargetLoadError(
                f"--vllm-positions is for {' and '.join(sorted(OTHER_POSITIONS_IN_VLLM))} targets, and this is "
                f"{model.config.model_type}: leave it out"
            )
        use_vllm_positions(model)
    source = processor or target
    with told_if_not_loaded("processor", source):
        return model, AutoProcessor.from_pretrained(source, revision=revision if processor is None else None)


def load_without_processor(
    target: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    attention: str | None = None,
) -> Any:
    """A target in evaluation mode, without its processor. Arguments and errors are those of [`load_target`]."""
    if device == "auto":
        require("train", "Spreading a target over all GPUs", "accelerate")
    with told_if_not_loaded("target", target):
        where = {"device_map": "auto"} if device == "auto" else {}
        model = load_model(target, revision=revision, dtype=dtype, attn_implementation=attention, **where)
        if not where:
            model = model.to(device or default_device())
    return model.eval()


def load_model(source: str, revision: str | None = None, **options: Any) -> Any:
    """A video LLM, or a language model without a vision tower, from a folder or a Hub id.

    Args:
        options: Further arguments of `from_pretrained`.
    """
    config = AutoConfig.from_pretrained(source, revision=revision)
    return auto_class_of(type(config)).from_pretrained(source, revision=revision, **options)


def auto_class_of(config_class: type) -> Any:
    """The class of transformers that loads models of this configuration: video LLMs, or else language models."""
    sees = config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def default_device() -> torch.device:
    """The accelerator that torch runs on here, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def usable_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run a checkpoint in: its own, unless the device has no arithmetic for it, or only a slow one."""
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        return torch.float16
    if dtype == torch.float16 and device.type == "cpu":
        return torch.float32
    return dtype

"""Models, decoder layers, configurations, trainers and files."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .names import CACHE


def unwrap(model: Any) -> Any:
    """The transformers model inside the wrappers of peft, `torch.compile` and distributed training, or what it is."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:  # compiled
            model = model._orig_mod
        else:
            return model


def decoder_of(model: Any) -> Any:
    """The text decoder of a model, which holds its layers."""
    decoder = model.get_decoder()
    # Llama 4 gives the causal language model around it.
    return decoder if hasattr(decoder, "layers") else decoder.model


def run_layer(
    layer: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    position_embeddings: tuple[Tensor, Tensor],
    is_causal: bool,
) -> Tensor:
    """One decoder layer of [`DECODER_LAYERS`]. `is_causal` is set: sdpa takes a missing mask as a causal one."""
    return layer(
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        position_embeddings=position_embeddings,
        is_causal=is_causal,
        **{CACHE: cache},
    )


def checkpoint_with_cache(layer: nn.Module) -> None:
    """Lets gradient checkpointing run a layer with its cache, which must not grow when the layer is run again."""
    layer._can_checkpoint_with_cache = True  # type: ignore[assignment]


def name_of(config: Any) -> str:
    """Folder or Hub id that a configuration was loaded from; empty if it was not."""
    return config._name_or_path or ""


def commit_of(config: Any) -> str | None:
    """Commit of the Hub repository that a configuration was loaded from."""
    return getattr(config, "_commit_hash", None)


def attention_of(config: Any) -> str:
    """Name of the attention implementation a model runs on."""
    return config._attn_implementation or ""


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it keeps elsewhere; `None` if it does not."""
    hook = getattr(module, "_hf_hook", None)
    return None if hook is None else torch.device(hook.execution_device)


def on_device(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch, moved to where a `Trainer` trains."""
    return trainer._prepare_inputs(inputs)


def use_one_gpu(arguments: Any) -> None:
    """Lets a `Trainer` of these arguments train on one GPU, however many the process sees."""
    arguments._n_gpu = 1


def smart_resize(*args: Any, **kwargs: Any) -> tuple[int, int]:
    """Height and width that Qwen's processors give a picture; it needs torchvision to import."""
    from transformers.models.qwen2_vl import image_processing_qwen2_vl

    return image_processing_qwen2_vl.smart_resize(*args, **kwargs)


def find_file(source: Any, name: str, *, needs_hub: bool, **hub_options: Any) -> str | None:
    """Local path of a file of a folder or a Hub repository, downloaded if necessary.

    Args:
        needs_hub: Raise `OSError` if the Hub cannot be reached; otherwise the file counts as missing.
    """
    return transformers.utils.cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=needs_hub,
        **hub_options,
    )

"""Models, decoder layers, configurations, trainers and files."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .names import CACHE, GenerationMixin


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


def not_given_by_generate(model: Any) -> str:
    """What `generate()` gives other models and not this one: a dynamic cache, or positions. Empty if it gives both."""
    if not isinstance(model, GenerationMixin) or not model._supports_default_dynamic_cache():
        return "dynamic cache"
    return "" if "position_ids" in inspect.signature(model.forward).parameters else "position_ids"


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


def execution_device(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a module runs that has this weight: where the weight is, or where accelerate brings one it offloads."""
    hook = getattr(module, "_hf_hook", None)
    return weight.device if weight.device.type != "meta" or hook is None else torch.device(hook.execution_device)


def input_device(model: Any) -> torch.device:
    """Where a model's inputs enter: the device on which its input embedding runs."""
    embedding = model.get_input_embeddings()
    return execution_device(embedding, next(embedding.parameters()))


def on_device(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch, moved to where a `Trainer` trains."""
    return trainer._prepare_inputs(inputs)


@contextmanager
def as_trained(trainer: Any) -> Iterator[Any]:
    """In this context, the model of a `Trainer` as its training steps run it; afterwards it is what it was.

    That is with activation checkpointing, in mixed precision, compiled and in DDP, where the arguments ask for it.
    """
    args, model = trainer.args, trainer.model
    attributes, checkpointed = set(vars(model)), model.is_activation_checkpointing
    if args.activation_checkpointing:
        options = dict(args.activation_checkpointing_kwargs or {})
        which = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **which)
    try:
        yield trainer.accelerator.prepare_model(model)
    finally:
        # accelerate puts another `forward` in front of the model's own, and a mark that it did.
        for name in vars(model).keys() - attributes:
            delattr(model, name)
        if not checkpointed:
            model.activation_checkpointing_disable()


class TrainingLength(NamedTuple):
    """How long a training is.

    Attributes:
        steps: Optimizer steps of all of it.
        steps_per_epoch: Optimizer steps of one pass over the rows; `steps` where their number is not known.
        rows: Number of rows that all processes train on, those of every epoch counted.
    """

    steps: int
    steps_per_epoch: int
    rows: float


def training_length(trainer: Any) -> TrainingLength:
    """How long the training of a `Trainer` will be, as the trainer itself computes it.

    Raises:
        ValueError: Neither the number of rows nor `max_steps` is known, or an epoch has no batch.
    """
    # The loader of several processes draws a seed.
    with torch.random.fork_rng(devices=[]):
        loader = trainer.get_train_dataloader()
    _, steps_per_epoch, rows, _, batch, _, steps = trainer.set_initial_training_values(trainer.args, loader)
    # The last batch of an epoch may be short, or left out.
    return TrainingLength(steps, steps_per_epoch, min(rows * steps / steps_per_epoch, batch * steps))


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

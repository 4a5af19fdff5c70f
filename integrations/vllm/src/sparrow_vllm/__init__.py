"""vLLM plugin: Sparrow drafts, written by `sparrow export-vllm`, as drafts of the methods "eagle3" and "eagle"."""

from contextlib import suppress


def register() -> None:
    """Makes exported drafts known; vLLM calls it in each of its processes, also where no draft is served."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from .config import RawDraftConfig, SparrowVllmConfig

    AutoConfig.register(SparrowVllmConfig.model_type, SparrowVllmConfig, exist_ok=True)
    # Where sparrow_hf is imported too, its own class has this name.
    with suppress(ValueError):
        AutoConfig.register(RawDraftConfig.model_type, RawDraftConfig)
    # config.json names SparrowDraftModel; vLLM puts the method in front of it, and nothing for other methods.
    for method in ("Eagle3", "Eagle", ""):
        ModelRegistry.register_model(f"{method}SparrowDraftModel", "sparrow_vllm.model:SparrowDraft")

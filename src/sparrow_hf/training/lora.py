"""LoRA on an existing draft: adapters on its linear maps, trained beside the frozen draft, merged at the end.

The rest is in peft: `adapters.save_pretrained(folder)` writes the adapters alone, and
`PeftModel.from_pretrained(draft, folder, is_trainable=True)` loads them onto a draft with the same weights.
"""

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..errors import DraftConfigError
from ..modeling_sparrow import SparrowDraftModel


def add_lora(draft: SparrowDraftModel, rank: int = 16, alpha: float | None = None, dropout: float = 0.0) -> PeftModel:
    """Puts LoRA adapters on every linear map of `draft`: FC and those of its decoder layers.

    The draft is changed in place, so it is the draft that goes to the [`SparrowTrainer`]; its own weights are frozen
    and only the adapters are trained. Fresh adapters change no output. Where training resumes from a checkpoint, the
    adapters are added to the same draft with the same rank first.

    Args:
        rank: Rank of each adapter.
        alpha: Adapters are scaled by `alpha / rank`; twice the rank by default.
        dropout: On the input of the adapters, while training.

    Returns:
        peft's view of the draft: `save_pretrained` writes the adapters alone, and [`merge_lora`] takes it.

    Raises:
        DraftConfigError: `rank` is not positive, or the draft has adapters already.
    """
    if rank < 1:
        raise DraftConfigError(f"the rank of LoRA adapters must be at least 1, found {rank}")
    if hasattr(draft, "peft_config"):
        raise DraftConfigError("this draft has adapters already: merge them with merge_lora, or load the draft again")
    linear_maps = [name for name, module in draft.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=linear_maps,
    )
    return get_peft_model(draft, config)


def merge_lora(adapters: PeftModel) -> SparrowDraftModel:
    """Adds the adapters to the weights below them: the plain draft again, the same object, all of it trainable.

    Outputs change by rounding only: to about 1e-6 of their size in fp32, by a rounding of each weight in bf16.

    Raises:
        ValueError: The result is not finite.
    """
    return adapters.merge_and_unload(safe_merge=True).requires_grad_(True)

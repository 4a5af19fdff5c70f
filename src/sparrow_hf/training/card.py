"""What a training writes into the draft's provenance, from which its card is written (`model_card.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modeling_sparrow import SparrowDraftModel
from ..target_config import fields_for
from .acceptance import accepted
from .arguments import ALL_VISUAL_ROWS

if TYPE_CHECKING:
    from .trainer import SparrowTrainer

#: Entries of a provenance that tell of weights, so that they are wrong once these are trained on.
_OF_WEIGHTS = ("recipe", "acceptance", "tuned")


def begin_anew(draft: SparrowDraftModel, source: str) -> None:
    """Makes a draft that is trained on from another one say its own target and its own training.

    Its configuration names the target it is bound to. Its provenance is empty but for `warm_start`: the provenance of
    the other draft, with its Hub id, or the name of its folder, as `from`.

    Args:
        source: Where the other draft was loaded from.
    """
    target = fields_for(draft.target.model.config)
    for name in ("target_name_or_path", "target_revision", "target_model_type"):
        setattr(draft.config, name, target[name])
    # A path of one machine is useless on another.
    told = Path(source).resolve().name if Path(source).is_dir() else source
    draft.provenance = {"warm_start": {**draft.provenance, "from": told}}


def is_of_other_weights(draft: SparrowDraftModel) -> bool:
    """Whether the provenance of a draft that is about to be trained tells of the weights it was loaded with."""
    # A fresh draft has no name: what its provenance says was written for the training to come.
    return bool(draft.name_or_path) and any(name in draft.provenance for name in _OF_WEIGHTS)


def recipe_of(trainer: SparrowTrainer, **further: Any) -> dict[str, Any]:
    """The settings that decide most of what a training gives.

    Args:
        trainer: After its training.
        further: Settings that it does not know; `None` is left out.
    """
    arguments, config = trainer.args, trainer.draft.config
    rows, most = trainer.train_dataset, arguments.num_visual_rows_max
    recipe = {
        "training rows": len(rows) if hasattr(rows, "__len__") else None,
        "steps": trainer.state.global_step,
        "rows of a step": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "learning rate": f"{arguments.learning_rate:g}, {arguments.lr_scheduler_type.value}",
        "passes": config.num_mtp_steps,
        "losses": ", ".join(f"{weight:g} × {name}" for name, weight in arguments.loss_weights.items() if weight),
        "visual tokens read": "all" if most == ALL_VISUAL_ROWS else f"{arguments.num_visual_rows_min} … {most}",
        **further,
    }
    return {name: value for name, value in recipe.items() if value is not None}


def acceptance_of(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Held-out acceptance, from the metrics of the last evaluation, as rows of the card's table; none without any."""
    shares = accepted(metrics)
    if not shares:
        return []
    told = " ".join(f"{share:.2f}".removeprefix("0") for share in shares)
    measured = f"held-out rows, teacher-forced, chain of {len(shares)}"
    return [{"measured on": measured, "τ": f"{metrics['eval_tau']:.2f}", "P(k ≥ 1, 2, …)": told}]

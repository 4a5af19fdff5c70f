"""What a finished training adds to the draft's provenance, from which its card is written (`model_card.py`)."""

from collections.abc import Mapping
from typing import Any

from .arguments import ALL_VISUAL_ROWS
from .depth import accepted
from .trainer import SparrowTrainer


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

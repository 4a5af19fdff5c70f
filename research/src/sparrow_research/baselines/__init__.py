"""Rivals of Sparrow. Most are trained as it is: same decoding loop, same trainer, same data; only the draft differs.

Each is written anew from the published description; docs/baselines.md says what it keeps of the original. `AutoModel`
loads them once this is imported, and `sparrow bench` imports it where this package is installed. Train one:

    baseline = BASELINES["msd"]
    draft = baseline.draft_class.from_target(target, **baseline.draft).float()
    SparrowTrainer(draft, target, CurriculumArguments("msd", **baseline.training), train_dataset=rows).train()

`specvlm` needs no training, but a small sibling of the target, and runs in transformers' own loop.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, AutoModel

from sparrow_hf.draft_inputs import EVERY_VISUAL_TOKEN
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.training import ALL_VISUAL_ROWS

from .hivis import HiViSDraftConfig, HiViSDraftModel
from .vispec import ViSpecDraftConfig, ViSpecDraftModel

for _draft_class in (ViSpecDraftModel, HiViSDraftModel):
    AutoConfig.register(_draft_class.config_class.model_type, _draft_class.config_class, exist_ok=True)
    AutoModel.register(_draft_class.config_class, _draft_class, exist_ok=True)


@dataclass(frozen=True)
class Baseline:
    """What tells a baseline from this package's default. Optimiser and schedule are left to whoever compares.

    Attributes:
        draft_class: Its `from_target` makes the draft.
        draft: Fields of the draft's configuration.
        training: Fields of [`~sparrow_research.curriculum.CurriculumArguments`]. Unused where `weights_of` names
            another baseline.
        weights_of: The baseline whose trained weights it drafts with, its own `draft` fields set on them.
    """

    draft_class: type[SparrowDraftModel] = SparrowDraftModel
    draft: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    weights_of: str | None = None


_ALL_VISUAL_ROWS = {"num_visual_rows_min": ALL_VISUAL_ROWS, "num_visual_rows_max": ALL_VISUAL_ROWS}

_MSD_DRAFT = {
    "feature_layers": [-1],
    "visual_bridge_layer": 0,
    "num_glimpse_tokens": EVERY_VISUAL_TOKEN,
    "position_mode": "original",
    "input_norm": True,
    "output_norm": False,
    "num_mtp_steps": 1,
}

#: Name → baseline. The loss mixes are those of `sparrow_hf/training/arguments.py`.
BASELINES: dict[str, Baseline] = {
    "msd": Baseline(
        draft=_MSD_DRAFT,
        training=_ALL_VISUAL_ROWS
        | {
            "feature_smooth_l1_weight": 1.0,
            "soft_cross_entropy_weight": 0.1,
            "visual_start": 0.5,
            "visual_full": 1.0,
        },
    ),
    "msd-deleted": Baseline(draft=_MSD_DRAFT | {"num_glimpse_tokens": 0}, weights_of="msd"),
    "vispec": Baseline(
        ViSpecDraftModel,
        draft={"feature_layers": [-1], "num_mtp_steps": 2, "num_glimpse_tokens": EVERY_VISUAL_TOKEN},
        training=_ALL_VISUAL_ROWS
        | {
            "probability_l1_weight": 10.0,
            "list_mle_weight": 0.1,
            "soft_cross_entropy_weight": 0.0,
            "feature_smooth_l1_weight": 0.0,
            "hidden_state_noise": 0.2,
            "mtp_attention": "reinput",
            "visual_start": 0.5,
            "visual_full": 0.5,
        },
    ),
    "hivis": Baseline(
        HiViSDraftModel, draft={"feature_layers": [-1], "num_glimpse_tokens": 0}, training={"num_visual_rows_max": 0}
    ),
}

__all__ = [
    "BASELINES",
    "Baseline",
    "HiViSDraftConfig",
    "HiViSDraftModel",
    "ViSpecDraftConfig",
    "ViSpecDraftModel",
]

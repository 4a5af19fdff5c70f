"""Trains a rival of Sparrow, or a variant of it, with the options of `sparrow train`.

    python -m sparrow_research.language.rivals NAME --target FOLDER --train RECORDING --output FOLDER …

Rivals differ from Sparrow in what they read of the target, in their passes and in their losses. What a name stands for
is in `RIVALS`; an option of the same name on the command line takes precedence.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparrow_hf.draft_inputs import EVERY_VISUAL_TOKEN
from sparrow_hf.loading import load_target
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.training.options import parse_options
from sparrow_hf.training.run import build_draft, prepare_training

from ..baselines import HiViSDraftModel
from ..retrain import blindfold


@dataclass(frozen=True)
class Rival:
    """What tells a rival from Sparrow's default.

    Attributes:
        options: Of `sparrow train`.
        draft_class: What it is.
        prepare: Called with the untrained draft.
    """

    options: str = ""
    draft_class: type[SparrowDraftModel] = SparrowDraftModel
    prepare: Callable[[SparrowDraftModel], None] | None = None


_LAST = "--feature-layers -1"
_EAGLE = f"{_LAST} --num-mtp-steps 1 --feature-smooth-l1-weight 1.0 --soft-cross-entropy-weight 0.1"
_EVERY_ROW = f"--num-glimpse-tokens {EVERY_VISUAL_TOKEN} --num-visual-rows-min -1 --num-visual-rows-max -1"
_NO_ROW = "--num-glimpse-tokens 0 --num-visual-rows-max 0"
RIVALS = {
    # One pass on the target's own states; the loss is mostly that of the states.
    "eagle": Rival(_EAGLE),
    # Three layers, early, middle and late, and no loss of states.
    "eagle3": Rival("--feature-layers 2 15 27 --feature-smooth-l1-weight 0.0"),
    # A language model of one layer: with no states to feed back, all its passes would be the first one.
    "text-only": Rival(f"{_LAST} --num-mtp-steps 1 --feature-smooth-l1-weight 0.0 {_NO_ROW}", prepare=blindfold),
    "hivis": Rival(_LAST, draft_class=HiViSDraftModel),
    # The paper's losses, noise, visual rows and two passes; the optimizer is that of all.
    "paper": Rival("--preset paper --num-mtp-steps 2"),
    # The default on the last layer alone, without its later passes, and without its loss of states.
    "last-layer": Rival(_LAST),
    "one-pass": Rival("--num-mtp-steps 1"),
    "no-state-loss": Rival("--feature-smooth-l1-weight 0.0"),
    # The default with other visual rows: fewer, in training only, none, all.
    "glimpse-16": Rival("--num-glimpse-tokens 16 --num-visual-rows-max 16"),
    "bridge": Rival("--num-glimpse-tokens 0 --num-visual-rows-min -1 --num-visual-rows-max -1"),
    "no-visual": Rival(_NO_ROW),
    "every-visual": Rival(_EVERY_ROW),
    "eagle-visual": Rival(f"{_EAGLE} {_EVERY_ROW}"),
}
TEXT_RIVALS = ("eagle", "eagle3", "text-only", "hivis", "paper", "last-layer", "one-pass", "no-state-loss")
VIDEO_RIVALS = (
    *("eagle-visual", "eagle3", "text-only", "paper", "last-layer", "one-pass"),
    *("glimpse-16", "bridge", "no-visual", "every-visual"),
)


def train_rival(name: str, words: list[str]) -> SparrowDraftModel:
    """Trains the rival of this name; `words` are those of `sparrow train`."""
    rival = RIVALS[name]
    options, arguments = parse_options([*rival.options.split(), *words])
    target, processor = load_target(options.target, dtype=options.target_dtype, device=options.device_of(arguments))
    torch.manual_seed(arguments.seed)
    draft = build_draft(options, target, rival.draft_class)
    if rival.prepare is not None:
        rival.prepare(draft)
    return prepare_training(options, arguments, target, processor, draft).run()


def main() -> None:
    """Command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in RIVALS:
        raise SystemExit(f"give one of {', '.join(RIVALS)}, and the options of `sparrow train`")
    train_rival(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()

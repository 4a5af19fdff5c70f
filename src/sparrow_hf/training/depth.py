"""How deep a chain a freshly trained draft should propose: the last step of `sparrow train`."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import BenchmarkError
from ..modeling_sparrow import SparrowDraftModel
from ..tree_costs import assumed_costs, candidates, choose
from ..tree_shapes import TreeShape, tree_name
from ..tuning import tune, write_shape
from .acceptance import accepted
from .callbacks import DecodingCallback, evaluation_mode

#: Number of held-out prompts that are decoded with chains of several depths.
TUNED_PROMPTS = 2


def write_depth(
    draft: SparrowDraftModel, folder: Path, decoding: DecodingCallback | None, metrics: Mapping[str, float]
) -> str:
    """Chooses the depth of a saved draft's chains, sets it, and writes it into the draft's configuration.

    Args:
        draft: The draft, bound to its target.
        folder: Where it is saved.
        decoding: Its held-out prompts, on which chains are measured; `None` if they cannot be decoded.
        metrics: Of the last evaluation. `eval_accepted_1` … are used where nothing can be decoded.

    Returns:
        What was chosen and why, as a sentence.
    """
    before = tree_name(draft.config.tree_shape)
    prompts = [] if decoding is None else list(islice(decoding.prompts(), TUNED_PROMPTS))
    if prompts and decoding is not None:
        reads = [lambda prompt=prompt: prompt for prompt in prompts]
        settings = decoding.settings | {"max_new_tokens": min(decoding.settings["max_new_tokens"], 128)}
        # As it will decode: a draft that was loaded has its target's dtype, a trained one is mostly fp32.
        loaded = type(draft).from_pretrained(folder)
        try:
            with evaluation_mode(loaded):
                tuning = tune(loaded, draft.target.model, {"held-out": reads}, trees=(), **settings)
        except BenchmarkError as error:
            return f"The draft proposes {before}, as it was configured: no other shape was measured ({error})."
        device = {"prompts": "held-out rows", "device": str(draft.target.device), "dtype": str(draft.target.dtype)}
        _write(draft, folder, tuning.shape, tuning.evidence(**device))
        fastest, earlier = tuning.measured[tuning.shape], tuning.measured[tuning.configured]
        return (
            f"The draft proposes {tree_name(tuning.shape)}, the fastest here: {fastest:.2f} × plain generate() on "
            f"{len(prompts)} held-out prompts, {before} {earlier:.2f} ×. Measure other videos or machines with "
            "`sparrow tune`."
        )
    shares = accepted(metrics)
    if not shares or not shares[0]:
        return f"The draft proposes {before}, as it was configured: there is no acceptance to choose from."
    shape = choose(candidates([assumed_costs(shares)]))
    evidence: dict[str, Any] = {
        "shape": tree_name(shape),
        "configured": before,
        "accepted": [round(share, 4) for share in shares],
        "costs": "assumed, see docs/tuning.md",
    }
    _write(draft, folder, shape, evidence)
    told = " ".join(f"{share:.2f}".removeprefix("0") for share in shares)
    return (
        f"The draft proposes {tree_name(shape)}, from its held-out acceptance ({told}) and assumed costs. Measure it "
        "with `sparrow tune`."
    )


def was_chosen(provenance: Mapping[str, Any]) -> bool:
    """Whether the depth of a draft's chains was chosen by what it accepted, it or the one it was trained on from.

    Args:
        provenance: Of the draft.
    """
    before = provenance.get("warm_start")
    return "tuned" in provenance or (isinstance(before, Mapping) and was_chosen(before))


def _write(draft: SparrowDraftModel, folder: Path, shape: TreeShape, evidence: Mapping[str, Any]) -> None:
    draft.config.set_tree_shape(shape)
    draft.provenance = {**draft.provenance, "tuned": dict(evidence)}
    write_shape(folder, shape, evidence)

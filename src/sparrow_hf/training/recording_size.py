"""How large a recording will be, before it is made."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.datasets import Rows
from ..draft_inputs import draft_positions
from ..errors import DiskBudgetError, TrainingDataError
from ..modeling_sparrow import SparrowDraftModel
from .data import SparrowDataCollator
from .recording import HEADER_BYTES, recorded_layers

#: Number of rows that an estimate reads.
ROWS_LOOKED_AT = 16


def estimate_recording_bytes(
    draft: SparrowDraftModel,
    rows: Rows | Sequence[Mapping[str, Any]],
    collator: SparrowDataCollator,
    *,
    visual_rows: bool = True,
) -> int:
    """About how much disk a recording takes, from the lengths of some of its rows. Bad rows count as nothing."""
    config, itemsize = draft.config, draft.target.dtype.itemsize
    layers = len(recorded_layers(config))
    sizes = []
    for index in range(0, len(rows), max(1, len(rows) // ROWS_LOOKED_AT)):
        try:
            input_ids = collator.prepare(rows[index])["input_ids"][0]
        except TrainingDataError:
            sizes.append(0)
            continue
        kept = draft_positions(input_ids, config.visual_token_ids or [], len(input_ids) if visual_rows else 0)
        states = (len(kept.text) * layers + len(kept.visual)) * config.hidden_size * itemsize
        sizes.append(HEADER_BYTES + 8 * (len(input_ids) + len(kept.visual) + 1) + states)
    return round(len(rows) * sum(sizes) / max(1, len(sizes)))


def check_disk_budget(expected: float, max_disk_gb: float | None) -> None:
    """Raises [`DiskBudgetError`] if a recording of `expected` bytes is more than it may take, in 10⁹ bytes."""
    if max_disk_gb is not None and expected > max_disk_gb * 1e9:
        raise DiskBudgetError(
            f"the recording will take about {expected / 1e9:.3g} GB, more than the {max_disk_gb:g} GB it may "
            "(--max-disk-gb): allow more, record fewer rows, or leave visual states out (--text-only)"
        )

"""Numbers and indices on their way to a device, without waiting for what runs there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], device: torch.device | str) -> Tensor:
    """Numbers, or lists of them, as a tensor on a device."""
    return torch.tensor(values).to(device, non_blocking=True)


def index_of(rows: list[int], device: torch.device | str) -> slice | Tensor:
    """What selects ascending rows of a tensor: a slice where they follow one another, else a tensor."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return on_device(rows, device)

"""The start of a draft that is to be like the target's last layers: FC fitted by least squares, before any training.

The draft's layers are copies of the target's last ones (`SparrowDraftModel.from_target(copy_last_layer=True)`). In the
target, they read the state after all earlier layers. The draft has not got it, but FC can estimate it:

    FC reads at text t      e(t+1) ⊕ h(t)      next token, and the target's last state
    it should give          x(t+1)             what entered the target's last layers at the next text token

The layers begin with a norm, so an error counts in proportion to the length of x.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..configuration_sparrow import SparrowDraftConfig
from ..data.prepare import kind_of, to_target
from ..draft_inputs import draft_positions
from ..errors import TrainingDataError
from ..modeling_sparrow import SparrowDraftModel
from .data import SparrowDataCollator, TrainingStates, read_with_target

#: Text positions that FC is fitted to at most; several times as many as it has inputs.
MOST_POSITIONS = 40_000
#: Share of each input's mean square that keeps its weights small.
RIDGE = 1e-3


def entry_layer(config: SparrowDraftConfig) -> int:
    """The target layer whose output enters the layers that the draft copies, in the `hidden_states` convention."""
    return config.target_num_hidden_layers - config.num_hidden_layers


def reader_of(draft: SparrowDraftModel) -> SparrowDraftModel:
    """An untrained draft of the same target that reads the same states, and then those of [`entry_layer`]."""
    layers = [*draft.config.feature_layer_ids, entry_layer(draft.config)]
    bridge = draft.config.visual_bridge_layer
    return SparrowDraftModel.from_target(draft.target.model, feature_layers=layers, visual_bridge_layer=bridge)


@torch.no_grad()
def fit_fc(
    draft: SparrowDraftModel,
    reader: SparrowDraftModel,
    rows: Iterable[Any],
    collator: SparrowDataCollator,
    *,
    most_positions: int = MOST_POSITIONS,
    show_progress: bool = False,
) -> tuple[float, int]:
    """Fits FC, in place. Of a draft whose FC reads no states (its half for them is zero), only the other half.

    Args:
        draft: A draft whose layers are copies of the target's last ones.
        reader: From [`reader_of`].
        rows: Answered rows; as many are read as `most_positions` take. Recorded ones are read with `reader`.
        collator: Makes samples of them. Rows that it may skip are left out.
        most_positions: Text positions to use, prompts included.
        show_progress: Show a progress bar over them.

    Returns:
        The share of x that FC explains (1: all of it), and the number of positions.

    Raises:
        TrainingDataError: No row has three text tokens, or a row is bad and bad rows are refused.
    """
    hidden, device = draft.config.hidden_size, draft.device
    reads = hidden if not draft.fc.weight[:, hidden:].any() else 2 * hidden
    # Sums over positions: of the inputs with themselves, with the outputs, and of the outputs' squares.
    inputs = torch.zeros((reads, reads), device=device)
    products = torch.zeros((reads, hidden), device=device)
    count = 0
    with tqdm(total=most_positions, desc="fitting FC", unit="token", disable=not show_progress) as progress:
        for row in rows:
            states = _states(reader, row, collator)
            if states is None:
                continue
            read, wanted = _pairs(draft, reader, states)
            weights = 1 / wanted.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            read, wanted = read[:, :reads] * weights, wanted * weights
            inputs += read.T @ read
            products += read.T @ wanted
            count += len(read)
            progress.update(len(read))
            if count >= most_positions:
                break
    if not count:
        raise TrainingDataError("FC cannot be fitted: no row has three text tokens in succession")
    # Of each input by its own size: states are much larger than embeddings. One that is always zero gets no weight.
    squares = inputs.diagonal().double()
    damped = inputs.double() + torch.diag(RIDGE * squares + (squares == 0))
    solution = torch.linalg.solve(damped, products.double())
    # The weighted outputs have length 1 each.
    error = count - 2 * (solution * products).sum() + (solution * (inputs.double() @ solution)).sum()
    draft.fc.weight[:, :reads] = solution.T.to(draft.fc.weight)
    return 1 - float(error) / count, count


def _states(reader: SparrowDraftModel, row: Any, collator: SparrowDataCollator) -> TrainingStates | None:
    """The target's states of a row's text; `None` for a row that is left out."""
    try:
        sample: Mapping[str, Any] = collator.prepare(row)
    except TrainingDataError:
        if not collator.may_skip(row):
            raise
        return None
    if kind_of(sample) == "states":
        return TrainingStates.from_row(sample)
    sample = to_target(sample, reader.target.model)
    ids = sample["input_ids"][0]
    return read_with_target(reader, sample, draft_positions(ids, reader.config.visual_token_ids or [], 0))


def _pairs(draft: SparrowDraftModel, reader: SparrowDraftModel, states: TrainingStates) -> tuple[Tensor, Tensor]:
    """`(n, 2H)` what FC reads and `(n, H)` what it should give, in fp32, at the text of one row.

    text     0  1  2  3  …      The first token is left out as t and as t + 1: targets give it states of their own,
    t           1  2  3         hundreds of times as long as all others.
    t + 1          2  3
    """
    hidden = draft.config.hidden_size
    ids = states.input_ids[draft_positions(states.input_ids, draft.config.visual_token_ids or [], 0).text]
    features, entry = states.text_states.split((states.text_states.shape[1] - hidden, hidden), dim=-1)
    read = draft.read_states(draft.fuse(features[None, 1:-1].to(draft.fc.weight)), None, 0)
    embeds = draft.embed(ids[None, 2:].to(draft.device))
    return torch.cat((embeds, read), dim=-1)[0].float(), entry[2:].to(read.device).float()

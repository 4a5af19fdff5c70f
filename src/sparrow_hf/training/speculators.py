"""Hidden states exchanged with the `speculators` project, in the layout of its offline training.

A folder of `datasets.save_to_disk` with the columns `input_ids`, `loss_mask` and `seq_len`, and per row i a file
`hidden_states/hs_i.safetensors`:

    token_ids       (L,)        equal to `input_ids`
    hidden_states   (L, n, H)   feature layers in ascending order, then the last layer *before* the final norm

Our own recordings hold the post-norm state instead, and keep visual rows apart: see `recording.py`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ..artifacts import atomic_path
from ..errors import TrainingDataError
from ..modeling_sparrow import SparrowDraftModel
from ..rows import draft_rows
from .data import TrainingStates, read_with_target


class SpeculatorsDataset(Dataset):
    """Rows that speculators (vLLM, say) extracted, for [`SparrowTrainer`].

    Args:
        folder: Of `datasets.save_to_disk`, with its `hidden_states/`.
        draft: The draft to be trained, bound to its target.
        layers: Layer of each slice of `hidden_states`, as it was extracted; the last one is the target's depth. The
            files do not say it.

    Raises:
        TrainingDataError: The layers are not those the draft reads.
    """

    def __init__(self, folder: str | os.PathLike[str], draft: SparrowDraftModel, layers: Sequence[int]):
        import datasets

        self.draft = draft
        self.layers = list(layers)
        depth = draft.config.target_num_hidden_layers
        missing = {*draft.config.feature_layer_ids, depth} - set(self.layers)
        if missing or self.layers[-1] != depth:
            raise TrainingDataError(
                f"the draft reads layers {list(draft.config.feature_layer_ids)} and needs {depth} as the last one; "
                f"the files hold {self.layers}"
            )
        self.folder = Path(folder) / "hidden_states"
        self.table = datasets.load_from_disk(str(folder))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        config, path = self.draft.config, self.folder / f"hs_{index}.safetensors"
        if not path.is_file():
            raise TrainingDataError(f"row {index}: there is no {path}; extract its hidden states first")
        tensors, row = load_file(path), self.table[index]
        ids, states = tensors["token_ids"], tensors["hidden_states"]
        if ids.tolist() != row["input_ids"] or states.shape[:2] != (len(ids), len(self.layers)):
            raise TrainingDataError(
                f"row {index}: {path} holds {tuple(states.shape)} states of {len(ids)} tokens, the dataset has "
                f"{len(row['input_ids'])} tokens and {len(self.layers)} layers were announced"
            )
        start, end = last_answer(row["loss_mask"])
        ids, states = ids[:end], states[:end]
        has_bridge = config.visual_bridge_layer in self.layers[:-1]
        rows = draft_rows(ids, config.visual_token_ids or [], len(ids) if has_bridge else 0)
        by_layer = dict(zip(self.layers, states.unbind(1), strict=True))
        with torch.no_grad():
            norm = self.draft.target.norm
            last = norm(by_layer[self.layers[-1]][rows.text].to(norm.weight)).to(states)
        text = {layer: layer_states[rows.text] for layer, layer_states in by_layer.items()} | {self.layers[-1]: last}
        visual = by_layer[int(config.visual_bridge_layer or 0)] if has_bridge else states[:, 0]
        return TrainingStates(
            input_ids=ids,
            answer_start=start,
            text_states=torch.cat([text[layer] for layer in config.feature_layer_ids], dim=-1),
            last_states=last,
            visual_rows=rows.visual,
            visual_states=visual[rows.visual],
        ).to_row()


def last_answer(loss_mask: Sequence[int]) -> tuple[int, int]:
    """Start and end of the last run of ones: the answer that is trained on; earlier turns are part of the prompt.

    Raises:
        TrainingDataError: There is no one in it.
    """
    if not any(loss_mask):
        raise TrainingDataError("the row has no token with a loss")
    end = max(index for index, value in enumerate(loss_mask) if value) + 1
    start = end
    while start and loss_mask[start - 1]:
        start -= 1
    return start, end


def write_speculators(
    draft: SparrowDraftModel, samples: Iterable[Mapping[str, Any]], folder: str | os.PathLike[str]
) -> list[int]:
    """Has the target read samples and stores the *text rows* of each, as a text that speculators can train on.

    Args:
        draft: A draft bound to the target; its feature layers are what is stored, besides the last layer.
        samples: From [`SparrowDataCollator.prepare`].
        folder: Gets the dataset and `hidden_states/`.

    Returns:
        The layers of `hidden_states`, in order.
    """
    import datasets

    config, view = draft.config, draft.target
    depth = config.target_num_hidden_layers
    states_folder = Path(folder) / "hidden_states"
    states_folder.mkdir(parents=True, exist_ok=True)
    layers = [layer for layer in sorted(set(config.feature_layer_ids)) if layer != depth]
    table: dict[str, list[Any]] = {"input_ids": [], "loss_mask": [], "seq_len": []}
    for index, sample in enumerate(samples):
        rows = draft_rows(sample["input_ids"][0], config.visual_token_ids or [], 0)
        before_norm: list[Tensor] = []
        hook = view.norm.register_forward_pre_hook(lambda module, args, seen=before_norm: seen.append(args[0]))
        try:
            states = read_with_target(draft, sample, rows)
        finally:
            hook.remove()
        features = dict(
            zip(config.feature_layer_ids, states.text_states.split(config.hidden_size, dim=-1), strict=True)
        )
        stacked = torch.stack([*(features[layer] for layer in layers), before_norm[0][0, rows.text]], dim=1)
        ids = states.input_ids[rows.text]
        with atomic_path(states_folder / f"hs_{index}.safetensors") as partial:
            save_file({"token_ids": ids.cpu().contiguous(), "hidden_states": stacked.cpu().contiguous()}, partial)
        table["input_ids"].append(ids.tolist())
        table["loss_mask"].append((rows.text >= states.answer_start).long().tolist())
        table["seq_len"].append(len(ids))
    datasets.Dataset.from_dict(table).save_to_disk(str(folder))
    return [*layers, depth]

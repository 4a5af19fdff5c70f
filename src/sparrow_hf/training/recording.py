"""Stores the frozen target's states of answered rows, so that any number of drafts can train without the target.

One safetensors file per row, `rows/row-000000.safetensors`, and `recording.json`, which describes the settings:

    input_ids         (L,)      prompt and answer, placeholders included
    answer_start      ()        index in `input_ids` of the answer's first token
    text_states.K     (N, H)    states of layer K at text positions, for each recorded layer; the last one is post-norm
    visual_rows       (V,)      indices in `input_ids` of the visual positions; none if the bridge is off
    visual_states.K   (V, H)    states of the bridge layer at these positions

Files are written atomically, so a stopped recording can be continued and ends with the same files. `digests.sha256`
holds the digest of each; a file is checked when it is first read. States are stored in the target's own dtype, so
training from them is bit-identical to running the target during training.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from .._transformers import commit_of, uses_vllm_positions
from ..artifacts import (
    atomic_path,
    check_made_alike,
    earlier_target_digest,
    remove_partial_files,
    write_json,
)
from ..checksums import Digests, read_json
from ..configuration_sparrow import SparrowDraftConfig
from ..data.datasets import Rows
from ..data.messages import naming_row
from ..data.prepare import to_target
from ..draft_inputs import draft_positions
from ..errors import DiskBudgetError, TrainingDataError
from ..modeling_sparrow import SparrowDraftModel
from ..target_config import published_name
from ..targets import TargetView
from .data import SparrowDataCollator, TrainingStates, read_with_target

PROVENANCE_FILE = "recording.json"
#: What to do about a file that is missing or damaged.
REMEDY = "delete it and run `sparrow record` again with the same options, which keeps the rest"
#: What a safetensors file takes besides its tensors, about.
HEADER_BYTES = 600
#: What is read of a description, and its types.
_DESCRIBED: dict[str, type] = {"target_sha256": str, "text_layers": list, "visual_layers": list}


class Recorder:
    """Writes the rows of one recording, each once.

    Args:
        draft: A draft bound to the target. Of its configuration the feature layers and the bridge layer count.
        folder: Folder of the recording.
        visual_rows: Keep the bridge layer's states of all visual positions, for drafts that read some of them. They
            are most of a recording of videos; without them, drafts can be trained on text only.
        max_bytes: Maximum size of the recording on disk.
        source: Which rows are read, and how; a run that continues a recording must have the same.

    Raises:
        TrainingDataError: The folder holds a recording of another target, of other layers, or of another source.
    """

    def __init__(
        self,
        draft: SparrowDraftModel,
        folder: str | os.PathLike[str],
        *,
        visual_rows: bool = True,
        max_bytes: float | None = None,
        source: Mapping[str, Any] | None = None,
    ):
        self.draft = draft
        folder = Path(folder)
        self.rows_folder = folder / "rows"
        self.visual_rows = visual_rows
        processes = PartialState()
        with processes.main_process_first():
            self.rows_folder.mkdir(parents=True, exist_ok=True)
            wanted, provenance = describe(draft, visual_rows) | dict(source or {}), folder / PROVENANCE_FILE
            self.digests = digests_of(folder)
            if provenance.exists():
                if self.digests.known is None:
                    # An earlier version's files are taken as they are.
                    self.digests.warn_without()
                    self.digests.write([provenance, *recorded_files(folder)])
                self.digests.check(provenance)
                found = read_description(provenance, draft.target)
                # An earlier version described less.
                known = {name: value for name, value in wanted.items() if name in found}
                check_made_alike(folder, found, known, TrainingDataError)
            else:
                write_json(provenance, wanted, indent=2)
                self.digests.add(provenance)
            if processes.is_main_process:
                remove_partial_files(self.rows_folder)
                self.digests.tidy()
        self.bytes_left = None
        if max_bytes is not None:
            # Each process may use its share of the remaining space.
            self.bytes_left = (max_bytes - self.bytes_on_disk()) / processes.num_processes

    def bytes_on_disk(self) -> int:
        """What the recorded rows take."""
        return sum(path.stat().st_size for path in recorded_files(self.digests.folder))

    def path(self, index: int) -> Path:
        """File of the row `index`."""
        return self.rows_folder / f"row-{index:06d}.safetensors"

    def write(self, index: int, sample: Mapping[str, Any]) -> None:
        """Runs the target over a processed conversation and stores its states.

        Args:
            index: Of the row.
            sample: From [`SparrowDataCollator.prepare`], on any device.

        Raises:
            DiskBudgetError: The file would not fit into `max_bytes`; it is not written.
            TrainingDataError: The conversation cannot be trained on.
        """
        tensors = to_tensors(self.draft.config, self._read(to_target(sample, self.draft.target.model)))
        if self.bytes_left is not None:
            self.bytes_left -= sum(tensor.nbytes for tensor in tensors.values()) + HEADER_BYTES
            if self.bytes_left < 0:
                raise DiskBudgetError(
                    f"row {index} does not fit into the disk space given to the recording; the rows before it are "
                    f"complete in {self.rows_folder}. Give more (--max-disk-gb) and run the same command again, or "
                    "train on the complete rows."
                )
        with atomic_path(self.path(index)) as partial:
            save_file(tensors, partial)
        self.digests.add(self.path(index))

    def has(self, index: int) -> bool:
        """Whether the row `index` was recorded completely."""
        return self.path(index) in self.digests

    def _read(self, sample: Mapping[str, Any]) -> TrainingStates:
        ids, budget = sample["input_ids"][0], sample["input_ids"].shape[1] if self.visual_rows else 0
        return read_with_target(
            self.draft, sample, draft_positions(ids, self.draft.config.visual_token_ids or [], budget)
        )


def record(
    draft: SparrowDraftModel,
    rows: Rows | Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    collator: SparrowDataCollator,
    *,
    visual_rows: bool = True,
    max_disk_gb: float | None = None,
    show_progress: bool = False,
    source: Mapping[str, Any] | None = None,
) -> dict[int, str]:
    """Runs the target over every answered row once. Processes of `accelerate launch` share the rows.

    Args:
        draft: A draft bound to the target, see [`Recorder`].
        rows: Answered rows, see `data.py`.
        folder: Of the recording.
        collator: Makes samples of the rows. With `on_bad_row="skip"`, bad rows get no file.
        visual_rows: See [`Recorder`].
        max_disk_gb: Maximum size of the recording on disk, in 10⁹ bytes; checked before every file.
        show_progress: Show a progress bar over the rows of this process.
        source: Where the rows are from, as JSON holds it, for example their [`~checkpoints.digest_of_rows`]. A run
            that continues the recording must have the same, as many rows, and the same sampling of videos.

    Returns:
        Index of each row this process left out → reason.

    Raises:
        DiskBudgetError: The recording did not fit; complete rows are kept.
        TrainingDataError: See [`Recorder`]; or a row is bad, and bad rows are refused.
    """
    recorder = Recorder(
        draft,
        folder,
        visual_rows=visual_rows,
        max_bytes=None if max_disk_gb is None else max_disk_gb * 1e9,
        source={"rows": len(rows), "fps": collator.fps, "max_frames": collator.max_frames, **(source or {})},
    )
    processes = PartialState()
    own = range(len(rows))[processes.process_index :: processes.num_processes]
    skipped: dict[int, str] = {}
    for index in tqdm([index for index in own if not recorder.has(index)], unit="row", disable=not show_progress):
        try:
            with naming_row(index):
                sample = collator.prepare(rows[index])
            recorder.write(index, sample)
        except TrainingDataError as error:
            if not collator.may_skip(rows[index]):
                raise
            skipped[index] = str(error)
    recorder.digests.tidy()
    return skipped


def recorded_files(folder: Path) -> list[Path]:
    """The files of a recording's rows, in order."""
    return sorted((folder / "rows").glob("row-*.safetensors"))


class RecordedDataset(Dataset):
    """The rows of a recording, for [`SparrowTrainer`].

    Args:
        folder: Of the recording.
        draft: The draft to be trained, bound to its target. It may read any of the recorded layers.

    Attributes:
        text_layers: Layers whose text states are recorded, in the `hidden_states` convention.

    Raises:
        TrainingDataError: There is no recording, or it was made with another target or dtype, or without a layer that
            the draft reads, or a file that was recorded is missing. Reading a row raises it if the row's file is
            damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], draft: SparrowDraftModel):
        provenance = Path(folder) / PROVENANCE_FILE
        if not provenance.is_file():
            raise TrainingDataError(f"{folder} is not a recording: it has no {PROVENANCE_FILE}. Make one first.")
        self.digests = digests_of(Path(folder))
        self.digests.warn_without()
        self.digests.check(provenance)
        digest = draft.target.sha256
        found = read_description(provenance, draft.target)
        if found["target_sha256"] != digest:
            recorded, loaded = (
                str(dtype).removeprefix("torch.") for dtype in (found.get("dtype"), draft.target.dtype)
            )
            if "dtype" in found and recorded != loaded:
                raise TrainingDataError(
                    f"{folder} was recorded from a target in {recorded}, and this one is in {loaded}: train with "
                    f"--target-dtype {recorded}, or record again with --dtype {loaded} into another folder"
                )
            raise TrainingDataError(
                f"{folder} was recorded from another target ({found.get('target') or 'unnamed'}, sha256 "
                f"{found['target_sha256'][:12]}…; this one has {digest[:12]}…): record this one into another folder"
            )
        if found["vllm_positions"] != uses_vllm_positions(draft.target.model):
            how = f"with{'' if found['vllm_positions'] else 'out'} --vllm-positions"
            raise TrainingDataError(
                f"{folder} was recorded {how}: train {how} too, or record again into another folder"
            )
        wanted: dict[str, list[Any]] = {
            "text": recorded_layers(draft.config),
            "visual": [draft.config.visual_bridge_layer],
        }
        missing = [
            f"{kind} layer {layer}"
            for kind, layers in wanted.items()
            for layer in layers
            if found[f"{kind}_layers"] and layer not in found[f"{kind}_layers"]
        ]
        if missing:
            raise TrainingDataError(
                f"{folder} lacks {', '.join(missing)}, which the draft reads; it has text layers "
                f"{found['text_layers']} and visual layers {found['visual_layers']}: record again, or "
                "train a draft that reads these (--feature-layers, --visual-bridge-layer)"
            )
        self.config = draft.config
        self.text_layers: list[int] = found["text_layers"]
        self.digests.check_present()
        self.paths = recorded_files(Path(folder))
        #: Rows whose files this process has checked.
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._check(index)
        try:
            with safe_open(self.paths[index], "pt") as file:
                # A recording may hold more layers than this draft reads.
                wanted = names_of(self.config) & set(file.keys())
                return from_tensors(self.config, {name: file.get_tensor(name) for name in wanted}).to_row()
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise TrainingDataError(f"{self.paths[index]} is damaged ({error}): {REMEDY}") from error

    def row_keys(self) -> list[str]:
        """What tells the rows apart: the digest of each row's file, or its path in a recording without digests."""
        known = self.digests.known or {}
        digests = [known.get(path.relative_to(self.digests.folder).as_posix()) for path in self.paths]
        return [
            str(path.resolve()) if digest is None else f"recorded row sha256:{digest}"
            for path, digest in zip(self.paths, digests, strict=True)
        ]

    def answer_length(self, index: int) -> int:
        """Tokens of a row's answer."""
        self._check(index)
        with safe_open(self.paths[index], "pt") as file:
            return file.get_slice("input_ids").get_shape()[0] - int(file.get_tensor("answer_start"))

    def _check(self, index: int) -> None:
        if index not in self._checked:
            self.digests.check(self.paths[index])
            self._checked.add(index)


def to_tensors(config: SparrowDraftConfig, states: TrainingStates) -> dict[str, Tensor]:
    """What a file holds (see the module's docstring) of one row; each layer once, however often it is read."""
    features = states.text_states.split(config.hidden_size, dim=-1)
    layers = dict(zip(config.feature_layer_ids, features, strict=True))
    layers[config.target_num_hidden_layers] = states.last_states
    tensors = {
        "input_ids": states.input_ids,
        "answer_start": torch.tensor(states.answer_start),
        "visual_rows": states.visual_rows,
        f"visual_states.{config.visual_bridge_layer}": states.visual_states,
        **{f"text_states.{layer}": state for layer, state in layers.items()},
    }
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def names_of(config: SparrowDraftConfig) -> set[str]:
    """Names of the tensors that a draft of this configuration reads (see the module's docstring)."""
    states = {f"text_states.{layer}" for layer in recorded_layers(config)}
    return {"input_ids", "answer_start", "visual_rows", f"visual_states.{config.visual_bridge_layer}"} | states


def from_tensors(config: SparrowDraftConfig, tensors: Mapping[str, Tensor]) -> TrainingStates:
    """The row of a file, with the layers that a draft of this configuration reads."""
    last = tensors[f"text_states.{config.target_num_hidden_layers}"]
    # A recording without visual states has no bridge layer either.
    visual = tensors.get(f"visual_states.{config.visual_bridge_layer}", last[:0])
    features = [tensors[f"text_states.{layer}"] for layer in config.feature_layer_ids]
    return TrainingStates(
        input_ids=tensors["input_ids"],
        answer_start=int(tensors["answer_start"]),
        text_states=torch.cat(features, dim=-1),
        last_states=last,
        visual_rows=tensors["visual_rows"],
        visual_states=visual,
    )


def recorded_layers(config: SparrowDraftConfig) -> list[int]:
    """Layers whose text states a draft of this configuration trains on: its features, and the last for the loss."""
    return sorted({*config.feature_layer_ids, config.target_num_hidden_layers})


def describe(draft: SparrowDraftModel, visual_rows: bool) -> dict[str, Any]:
    """Settings that a recording must have been made with to be continued."""
    target = draft.target.model
    return {
        "target": published_name(target.config),
        "target_revision": commit_of(target.config),
        "target_sha256": draft.target.sha256,
        "transformers": transformers.__version__,
        "dtype": str(draft.target.dtype),
        "vllm_positions": uses_vllm_positions(target),
        "text_layers": recorded_layers(draft.config),
        "visual_layers": [draft.config.visual_bridge_layer] if visual_rows else [],
    }


def digests_of(folder: Path) -> Digests:
    """The digests of a recording's files."""
    return Digests(folder, TrainingDataError, REMEDY)


def read_description(path: Path, target: TargetView) -> dict[str, Any]:
    """The settings of a recording, as this version would have written them.

    Args:
        path: Path of `recording.json`.
        target: The target that should have been recorded.

    Raises:
        TrainingDataError: It is not the description of a recording.
    """
    found = read_json(path, TrainingDataError, REMEDY)
    lacks = [name for name, kind in _DESCRIBED.items() if not isinstance(found.get(name), kind)]
    if lacks:
        raise TrainingDataError(f"{path} does not describe a recording (see its {', '.join(lacks)}): {REMEDY}")
    # An earlier version knew one rule only.
    found.setdefault("vllm_positions", False)
    recorded = found["target_sha256"]
    # An earlier version recorded the same weights under another digest; recordings are too large to be made again.
    if recorded != target.sha256 and recorded == earlier_target_digest(target.model.state_dict()):
        found["target_sha256"] = target.sha256
    return found

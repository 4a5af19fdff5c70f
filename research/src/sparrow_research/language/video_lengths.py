"""τ of several drafts of the video LLM over the length of the clip, teacher-forced, and how much of it is kept.

    python -m sparrow_research.language.video_lengths --target FOLDER --recordings DIR --drafts DIR … --output FILE

`--recordings` holds a recording `recording-length-N` for lengths of `video_clips.LENGTHS`: greedy answers about the
same stories. What a chain would accept on them is computed from their states, without decoding, so any number of
drafts is measured in seconds. `video_tau` decodes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from sparrow_hf import SparrowDraftModel
from sparrow_hf.artifacts import tensor_digest, write_json
from sparrow_hf.loading import load_target
from sparrow_hf.metrics import bootstrap, per_position, tau
from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments
from sparrow_hf.training.recording import RecordedDataset

from .rivals import RIVALS
from .video_clips import LENGTHS
from .video_tau import retention

SHAPE = "chain-3"


def counts_of(draft: SparrowDraftModel, target: Any, recordings: Path, device: str) -> dict[int, np.ndarray]:
    """Length → `(clips, levels + 1)`: rounds of a clip that accepted at least 1, 2, … tokens, and all its rounds."""
    with TemporaryDirectory() as nowhere:
        arguments = SparrowTrainingArguments(
            nowhere, per_device_eval_batch_size=1, use_cpu=device == "cpu", report_to=[], disable_tqdm=True
        )
        trainer = SparrowTrainer(draft, target, arguments)
        found = {}
        for length in LENGTHS:
            folder = recordings / f"recording-length-{length}"
            if not folder.exists():
                continue
            rows = RecordedDataset(folder, draft)
            found[length] = trainer.predict(rows).predictions[:, -draft.config.num_draft_levels - 1 :]
    return found


def pooled(counts: Sequence[np.ndarray] | np.ndarray) -> float:
    """τ of several clips together."""
    *reaching, rounds = np.sum(counts, axis=0).tolist()
    return tau(sum(reaching) + rounds, rounds)


def describe(counts: dict[int, np.ndarray]) -> dict[str, Any]:
    """τ of every length, and what the longer ones keep of the shortest."""
    shortest = min(counts)
    lengths = [
        {
            "visual_tokens": length,
            "clips": len(rows),
            "tau": pooled(rows),
            "tau_interval": bootstrap(list(rows), pooled),
            "per_position": per_position(rows[:, :-1].sum(0).tolist(), int(rows[:, -1].sum())),
        }
        for length, rows in counts.items()
    ]
    # The clips of a longer length are the first ones of a shorter.
    kept = {
        str(length): retention(list(zip(rows, counts[shortest], strict=False)), pooled)
        for length, rows in counts.items()
        if length != shortest
    }
    return {"lengths": lengths, "retention": kept}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--recordings", type=Path, required=True, help="folder of the recordings")
    parser.add_argument("--drafts", type=Path, nargs="+", required=True, help="folders; their names are the drafts'")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the recordings")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    target, _ = load_target(options.target, dtype=options.dtype, device=options.device)
    found: dict[str, Any] = {"target_sha256": tensor_digest(target.state_dict()), "shape": SHAPE, "drafts": {}}
    for folder in options.drafts:
        kind = RIVALS[folder.name].draft_class if folder.name in RIVALS else SparrowDraftModel
        draft = kind.from_pretrained(folder)
        draft.bind(target)
        draft.to(options.device)
        draft.config.set_tree_shape(SHAPE)
        described = describe(counts_of(draft, target, options.recordings, options.device))
        found["drafts"][folder.name] = {"draft_sha256": tensor_digest(draft.state_dict()), **described}
        taus = [f"{row['visual_tokens']}: {row['tau']:.3f}" for row in described["lengths"]]
        print(folder.name, *taus, json.dumps(described["retention"]), flush=True)
        write_json(options.output, found, indent=1)


if __name__ == "__main__":
    main()

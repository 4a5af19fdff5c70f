"""How many passes a long chain wants: drafts trained with 5, 8 and 12 passes, each measured with chains of 12.

    python -m sparrow_research.deep_chains --work DIR --output research/data/deep_chains.json [--processes 2]

Pass s trains what the draft proposes as token s. The testbed's recipe has 5; for later tokens of a chain no pass was
trained. Every draft has the same rows and steps, or, in the last recipe, as many trained tokens as with 5 passes. Run
it again to go on where it was stopped; the recording is that of `recipes`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sparrow_hf.artifacts import tensor_digest, write_json
from sparrow_hf.evaluation.provenance import commit
from sparrow_hf.testbed.nano import ASSETS, load_target
from sparrow_hf.training.recording import RecordedDataset

from .processes import run_in_processes
from .recipes import LENGTHS, record_all
from .retrain import build_draft, build_trainer, train

STEPS, SEEDS, LEVELS = 200, (0, 1, 2), 12
RECIPES: dict[str, tuple[int, float, float]] = {
    "5 passes": (5, 1.0, 1.0),
    "8 passes": (8, 1.0, 1.0),
    "12 passes": (12, 1.0, 1.0),
    "12 passes, weights falling by 0.8": (12, 0.8, 1.0),
    "12 passes, 5/12 of the steps": (12, 1.0, 5 / 12),
}
"""Name → passes, `mtp_loss_decay`, and share of the steps."""


def run_recipe(target_folder: Path, name: str, seed: int, steps: int, recording: Path, folder: Path) -> dict[str, Any]:
    """Trains one draft on one thread; a row of the results."""
    torch.set_num_threads(1)
    passes, decay, share = RECIPES[name]
    start = time.monotonic()
    target, _ = load_target(target_folder)
    draft = build_draft(target, seed, num_mtp_steps=passes, num_draft_levels=LEVELS)
    rows = RecordedDataset(recording / "train", draft)
    own = max(1, round(share * steps))
    trainer = build_trainer(
        draft, rows, None, folder, max_steps=own, seed=seed, disable_tqdm=True, mtp_loss_decay=decay
    )
    train(trainer)
    seconds = round(time.monotonic() - start)
    measured = {}
    for length in LENGTHS:
        found = trainer.evaluate(RecordedDataset(recording / f"validation-{length}", draft))
        reached = [round(found[f"eval_accepted_{level}"], 4) for level in range(1, LEVELS + 1)]
        measured[str(length)] = {"tau": round(found["eval_tau"], 4), "reached": reached}
    return {
        "recipe": name,
        "seed": seed,
        "steps": own,
        "of_steps": steps,
        "seconds": seconds,
        "measured": measured,
        "commit": commit(),
        "target_sha256": tensor_digest(target.state_dict()),
    }


def table(rows: list[dict[str, Any]], length: str = "400") -> str:
    """The results at one length as Markdown: τ, and how often a token of a chain is accepted if all before it were."""
    places = (1, 3, 5, 6, 8, 10, 12)
    lines = [
        f"| recipe | steps | τ | {' | '.join(f'token {place}' for place in places)} | seconds |",
        f"|---|---|---|{'---|' * (len(places) + 1)}",
    ]
    for name in RECIPES:
        runs = [row for row in rows if row["recipe"] == name]
        if runs:
            taus = [row["measured"][length]["tau"] for row in runs]
            reached = [[1.0, *row["measured"][length]["reached"]] for row in runs]
            sums = [sum(each) for each in zip(*reached, strict=True)]
            shares = [sums[place] / sums[place - 1] if sums[place - 1] else None for place in places]
            cells = ["" if share is None else f"{share:.2f}".removeprefix("0") for share in shares]
            spread = f"{statistics.mean(taus):.2f} ({min(taus):.2f} … {max(taus):.2f})"
            seconds = f"{statistics.median(row['seconds'] for row in runs):.0f}"
            lines.append(f"| {name} | {runs[0]['steps']} | {spread} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=ASSETS / "target", help="folder of the target")
    parser.add_argument("--work", type=Path, required=True, help="folder of the recording and of running trainings")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, each on one thread")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    target, processor = load_target(options.target)
    record_all(target, processor, options.work / "recording")
    sha256 = tensor_digest(target.state_dict())
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    rows = [row for row in rows if (row["target_sha256"], row["of_steps"]) == (sha256, options.steps)]
    done = {(row["recipe"], row["seed"]) for row in rows}
    # All recipes once before any of them twice: an early stop leaves a whole table.
    runs = [(name, seed) for seed in options.seeds for name in RECIPES if (name, seed) not in done]
    folder = options.work / f"deep-{sha256[:8]}-{options.steps}"
    calls = [
        (
            *(options.target, name, seed, options.steps, options.work / "recording"),
            folder / f"{list(RECIPES).index(name)}-{seed}",
        )
        for name, seed in runs
    ]
    for row in run_in_processes(run_recipe, calls, options.processes, "deep chains"):
        rows.append(row)
        rows.sort(key=lambda each: (each["seed"], list(RECIPES).index(each["recipe"])))
        write_json(options.output, rows, indent=1)
    print(table(rows))


if __name__ == "__main__":
    main()

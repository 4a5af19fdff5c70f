"""Measures everything the documentation says about the testbed, on clips its models have not seen.

    python -m sparrow_hf.testbed.figures --text-only-draft DIR --output docs/data/testbed.json --report docs/testbed.md

Every arm captions every clip of a cell in the same process, plain `generate()` among them, in rotating order. Each
measured clip is written to `--runs` at once: run the command again to go on where it was stopped. Cells are
independent of each other, so two processes may measure different ones; each rewrites the tables from all runs there
are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import BatchFeature

from ..evaluation import Arm, compare, parse_tree, warm_up
from ..evaluation.provenance import provenance
from ..evaluation.run_file import RunFile, digest
from ..generation.candidate_generator import SparrowCandidateGenerator
from ..hidden_states import HiddenStateCollector
from ..modeling_sparrow import SparrowDraftModel
from ..rows import draft_rows, visual_mask
from .nano import ASSETS, load_target
from .prompts import clip_inputs
from .report import write_report, write_rows
from .world import EVALUATION_SEEDS

COMMAND = "python -m sparrow_hf.testbed.figures --text-only-draft DIR --output docs/data/testbed.json"
DIGESTS = ("target_sha256", "draft_sha256", "text_only_draft_sha256")
MAX_NEW_TOKENS = 320
PLAIN = "plain"
TEXT_ONLY = "text-only "
PROMPT_LOOKUP_TOKENS = 5

STEP_CELL = "draft-step"
STEP_VISUAL_TOKENS = (400, 8000)
STEP_CLIPS, STEP_REPEATS = 4, 60
STEP_TREES = ("chain-5", "48-5-10")


@dataclass(frozen=True)
class Cell:
    """Arms that are compared on the same clips.

    Attributes:
        arms: Names of trees, or `prompt lookup`; plain `generate()` always takes part.
        temperature: 0 is greedy.
    """

    visual_tokens: int
    clips: int
    arms: tuple[str, ...]
    temperature: float = 0.0


CELLS = {
    "acceptance-400": Cell(400, 50, ("chain-5", "48-5-10", TEXT_ONLY + "chain-5")),
    "shapes-400": Cell(
        400, 16, ("none", "chain-3", "chain-5", "chain-7", "30-4-8", "48-5-10", TEXT_ONLY + "48-5-10", "prompt lookup")
    ),
    "shapes-2000": Cell(2000, 16, ("none", "chain-5", "chain-7", "30-4-8", "48-5-10")),
    "sampling-400": Cell(400, 16, ("chain-5", "48-5-10"), temperature=1.0),
}


@dataclass(frozen=True)
class Bench:
    """The models under test, and what every measurement says about them."""

    target: Any
    processor: Any
    draft: SparrowDraftModel
    text_only_draft: SparrowDraftModel | None
    provenance: dict[str, Any]

    def arm(self, name: str) -> Arm | None:
        """An arm by its name; `None` if its draft is not there."""
        if name == PLAIN:
            return Arm(name)
        if name == "prompt lookup":
            return Arm(name, prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS)
        draft = self.text_only_draft if name.startswith(TEXT_ONLY) else self.draft
        return None if draft is None else Arm(name, draft, parse_tree(name.removeprefix(TEXT_ONLY)))

    def inputs(self, seed: int, visual_tokens: int) -> BatchFeature:
        """The processed prompt of one clip, by way of an mp4 file."""
        return clip_inputs(self.target, self.processor, seed, visual_tokens)


def load_bench(target_dir: Path, draft_dir: Path, text_only_dir: Path | None) -> Bench:
    """Loads the models; without a folder of its own, the text-only draft's arms are left out."""
    target, processor = load_target(target_dir)
    draft = SparrowDraftModel.from_pretrained(draft_dir).eval()
    draft.bind(target)
    text_only = None
    if text_only_dir is not None:
        text_only = SparrowDraftModel.from_pretrained(text_only_dir).eval()
        text_only.bind(target)
    folders = (target_dir, draft_dir, text_only_dir)
    digests = {name: folder and digest(folder) for name, folder in zip(DIGESTS, folders, strict=True)}
    return Bench(target, processor, draft, text_only, provenance(target, command=COMMAND, **digests))


def measure_cell(bench: Bench, name: str, cell: Cell, runs: RunFile) -> None:
    """Measures the clips of a cell that are not measured yet."""
    arms = [arm for arm in map(bench.arm, (PLAIN, *cell.arms)) if arm is not None]
    settings: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": cell.temperature > 0}
    if cell.temperature > 0:
        settings |= {"temperature": cell.temperature, "top_k": 0}
    is_warm = False
    for turn, seed in enumerate(tqdm(EVALUATION_SEEDS[: cell.clips], desc=name)):
        if runs.done(seed=seed):
            continue
        inputs = bench.inputs(seed, cell.visual_tokens)
        if not is_warm:
            warm_up(bench.target, arms, inputs, settings)
            is_warm = True
        measured = compare(bench.target, arms, inputs, settings, turn, seed)
        runs.append(
            {
                "family": bench.target.config.model_type,
                "seed": seed,
                "visual_tokens": cell.visual_tokens,
                "temperature": cell.temperature,
                "prompt": describe_prompt(bench.draft, inputs),
                "runs": {arm: asdict(run) for arm, run in measured.items()},
                "trees": {arm.name: arm.tree for arm in arms},
                "provenance": bench.provenance,
            }
        )


def describe_prompt(draft: SparrowDraftModel, inputs: BatchFeature) -> dict[str, int]:
    """How many rows a prompt has, and how many of them the draft keeps."""
    input_ids, visual_ids = inputs["input_ids"][0], draft.config.visual_token_ids or []
    rows = draft_rows(input_ids, visual_ids, draft.config.num_glimpse_tokens)
    return {
        "visual_tokens": int(visual_mask(input_ids, visual_ids).sum()),
        "text_rows": len(rows.text),
        "glimpse_rows": len(rows.visual),
    }


@torch.no_grad()
def prefilled_generator(bench: Bench, inputs: BatchFeature) -> SparrowCandidateGenerator:
    """The draft after the target's real prefill of a prompt, about to grow its first tree."""
    generator = SparrowCandidateGenerator(bench.draft, inputs["input_ids"])
    with HiddenStateCollector(generator.layers_to_collect).active() as collector:
        outputs = bench.target(**inputs, logits_to_keep=1)
    states = {layer: collector.take(layer) for layer in generator.layers_to_collect}
    generator.prefill(states, int(outputs.logits[0, -1].argmax()))
    return generator


@torch.no_grad()
def measure_draft_steps(bench: Bench, runs: RunFile) -> None:
    """Times growing a tree alone, after prompts that differ in nothing but the length of the video."""
    for seed in tqdm(EVALUATION_SEEDS[:STEP_CLIPS], desc=STEP_CELL):
        if runs.done(seed=seed):
            continue
        prompts = {tokens: bench.inputs(seed, tokens) for tokens in STEP_VISUAL_TOKENS}
        steps: dict[str, dict[str, float]] = {}
        for tree in STEP_TREES:
            with Arm(tree, bench.draft, parse_tree(tree)).options():
                generators = {tokens: prefilled_generator(bench, inputs) for tokens, inputs in prompts.items()}
            seconds: dict[int, list[float]] = {tokens: [] for tokens in generators}
            for repeat in range(STEP_REPEATS):
                # Interleaved, and in turns first: whatever else the machine does meets both lengths alike.
                for tokens in sorted(generators, reverse=bool(repeat % 2)):
                    start = time.perf_counter()
                    generators[tokens].propose(max_levels=generators[tokens].shape.num_draft_levels)
                    seconds[tokens].append(time.perf_counter() - start)
            steps[tree] = {str(tokens): 1000 * statistics.median(taken) for tokens, taken in seconds.items()}
        descriptions = {str(tokens): describe_prompt(bench.draft, inputs) for tokens, inputs in prompts.items()}
        runs.append({"seed": seed, "prompts": descriptions, "milliseconds": steps, "provenance": bench.provenance})


def announce(bench: Bench, names: Sequence[str]) -> None:
    """Says how much there is to do, before it is done."""
    captions = sum((1 + len(CELLS[name].arms)) * CELLS[name].clips for name in names if name in CELLS)
    print(
        f"{len(names)} cells, {captions} captions of up to {MAX_NEW_TOKENS} tokens: about half an hour on one core "
        "of a server CPU, and less than 1 MB of runs."
    )
    if bench.text_only_draft is None:
        print("Without --text-only-draft, the text-only arms are left out.")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the figures."""
    parser = argparse.ArgumentParser(description="Measure the testbed (resumes by itself).")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the tables' rows")
    parser.add_argument("--report", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--runs", type=Path, default=Path("runs/testbed-figures"), help="folder of single runs")
    parser.add_argument("--target", type=Path, default=ASSETS / "target", help="folder of the target")
    parser.add_argument("--draft", type=Path, default=ASSETS / "draft", help="folder of the draft")
    parser.add_argument("--text-only-draft", type=Path, help="folder of the draft trained without target states")
    parser.add_argument("--cells", nargs="*", choices=[*CELLS, STEP_CELL], help="which cells (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more rarely help on a small machine")
    parser.add_argument("--note", default="", help="what readers must know about the circumstances")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    names = [*CELLS, STEP_CELL] if options.cells is None else options.cells
    if names:
        bench = load_bench(options.target, options.draft, options.text_only_draft)
        announce(bench, names)
        for name in names:
            runs = RunFile(options.runs / f"{name}.jsonl", {name: bench.provenance[name] for name in DIGESTS})
            if name == STEP_CELL:
                measure_draft_steps(bench, runs)
            else:
                measure_cell(bench, name, CELLS[name], runs)
            write_rows(options.runs, options.output, options.note)
    write_rows(options.runs, options.output, options.note)
    if options.report is not None:
        write_report(options.output, options.report)


if __name__ == "__main__":
    main()

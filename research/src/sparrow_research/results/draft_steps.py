"""The draft's own step in isolation: how long growing a tree takes after prompts that differ only in their video."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.evaluation import RunFile
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.evaluation.run_file import read_lines
from sparrow_hf.generation.candidate_generator import SparrowCandidateGenerator
from sparrow_hf.hidden_states import HiddenStateCollector
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.testbed.benchmark_prompts import clip_inputs
from sparrow_hf.testbed.world import EVALUATION_SEEDS

VISUAL_TOKENS = (400, 3000, 25_000)
CLIPS, REPEATS = 2, 60
TREES = ("chain-5", "48-5-10")
FILE = "draft.steps"
COMMAND = "python -m sparrow_research.results --work DIR --output research/data/results.json --parts measure"


@torch.no_grad()
def prefilled_generator(target: Any, draft: SparrowDraftModel, inputs: Any) -> SparrowCandidateGenerator:
    """The draft after the target's real prefill of a prompt, about to grow its first tree."""
    generator = SparrowCandidateGenerator(draft, inputs["input_ids"])
    with HiddenStateCollector(generator.layers_to_collect).active() as collector:
        outputs = target(**inputs, logits_to_keep=1)
    states = {layer: collector.take(layer) for layer in generator.layers_to_collect}
    generator.prefill(states, int(outputs.logits[0, -1].argmax()))
    return generator


@torch.no_grad()
def measure_draft_steps(target: Any, processor: Any, draft_folder: Path, runs: Path) -> None:
    """Times growing a tree, the lengths in turns, on clips that are not measured yet."""
    draft = SparrowDraftModel.from_pretrained(draft_folder).eval()
    conditions = {
        "target_sha256": tensor_digest(target.state_dict()),
        "draft_sha256": tensor_digest(draft.state_dict()),
    }
    file = RunFile(runs / FILE, conditions)
    draft.bind(target)
    for seed in tqdm(EVALUATION_SEEDS[:CLIPS], desc="draft steps"):
        if file.done(seed=seed):
            continue
        prompts = {tokens: clip_inputs(target, processor, seed, tokens) for tokens in VISUAL_TOKENS}
        milliseconds: dict[str, dict[str, float]] = {}
        for tree in TREES:
            draft.config.set_tree_shape(tree)
            generators = {tokens: prefilled_generator(target, draft, inputs) for tokens, inputs in prompts.items()}
            seconds: dict[int, list[float]] = {tokens: [] for tokens in generators}
            for repeat in range(REPEATS):
                # Interleaved, each first in turn: other work on the machine slows all lengths by about as much.
                for tokens in sorted(generators, reverse=bool(repeat % 2)):
                    start = time.perf_counter()
                    generators[tokens].propose(max_levels=generators[tokens].shape.num_draft_levels)
                    seconds[tokens].append(time.perf_counter() - start)
            milliseconds[tree] = {str(tokens): 1000 * statistics.median(taken) for tokens, taken in seconds.items()}
        file.append(
            {
                "family": target.config.model_type,
                "seed": seed,
                "milliseconds": milliseconds,
                "provenance": provenance(target, command=COMMAND, **conditions),
            }
        )


def pool_draft_steps(runs: Path) -> list[dict[str, Any]]:
    """One row per tree and length: the median over clips, and each clip's own median."""
    lines = read_lines(runs / FILE) if (runs / FILE).exists() else []
    if not lines:
        return []
    rows = []
    for tree in TREES:
        for tokens in VISUAL_TOKENS:
            per_clip = [line["milliseconds"][tree][str(tokens)] for line in lines]
            rows.append(
                {
                    "family": lines[0]["family"],
                    "tree": tree,
                    "visual_tokens": tokens,
                    "milliseconds": statistics.median(per_clip),
                    "per_clip": per_clip,
                    "provenance": lines[0]["provenance"],
                }
            )
    return rows

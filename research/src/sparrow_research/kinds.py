"""Measures three kinds of targets with trained drafts: Qwen3.5-like, Gemma-4-like and GLM-4.xV-like.

    python -m sparrow_research.kinds --output research/data/kinds.json

Of each kind a small target (8 layers × 128) learns a few clips of the testbed's world by heart, and a draft learns
from the target's own greedy texts. Then τ and the cost of a round are measured, on clips of those and on others. A
kind takes about six minutes on one core; run the command again to go on with the next kind where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from sparrow_hf.artifacts import write_json
from sparrow_hf.data.prepare import append_answer
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.generation import caches
from sparrow_hf.measurement import Arm, measure
from sparrow_hf.metrics import Run
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.world import EVALUATION_SEEDS, TOKENS_PER_STEP, TRAIN_SEEDS, write_script
from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments
from sparrow_hf.training.batched_answers import generate_answers, left_pad
from sparrow_hf.tree_shapes import TREE_PRESETS

from .kind_targets import KINDS, Kind
from .retrain import MAX_CAPTION_TOKENS, MuonWithAdam, build_draft, clip_prompt

LAYERS = 8
VISUAL_TOKENS = 32
LEARNED, OF_DRAFT = TRAIN_SEEDS[:16], TRAIN_SEEDS[:32]
"""Clips that a target learns by heart, and clips whose greedy texts its draft learns from."""
BATCH_SIZE = 4


def prompts_of(processor: Any, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The processed prompt of each clip."""
    return [clip_prompt(processor, seed, VISUAL_TOKENS, TOKENS_PER_STEP) for seed in seeds]


def learn_by_heart(target: Any, processor: Any, steps: int) -> float:
    """Trains all of the target on the captions of `LEARNED`; returns the last loss."""
    tokenizer, rows, lengths = processor.tokenizer, [], []
    for seed, prompt in zip(LEARNED, prompts_of(processor, LEARNED), strict=True):
        caption = tokenizer(write_script(seed, VISUAL_TOKENS).caption)["input_ids"] + [tokenizer.eos_token_id]
        sample = append_answer(prompt, caption)
        del sample["answer_start"]
        rows.append(sample)
        lengths.append(len(caption))
    optimizer = torch.optim.AdamW(target.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    bar = tqdm(range(steps), desc="target")
    for _ in bar:
        chosen = torch.randperm(len(rows), generator=generator)[:BATCH_SIZE].tolist()
        batch = left_pad([rows[index] for index in chosen], tokenizer.pad_token_id)
        labels = torch.full_like(batch["input_ids"], -100)
        for row, index in enumerate(chosen):
            labels[row, -lengths[index] :] = batch["input_ids"][row, -lengths[index] :]
        loss = target(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def train_draft(target: Any, processor: Any, steps: int) -> SparrowDraftModel:
    """A draft trained on the target's own greedy texts of `OF_DRAFT`."""
    prompts, rows = prompts_of(processor, OF_DRAFT), []
    for start in tqdm(range(0, len(prompts), 16), desc="greedy texts"):
        batch = prompts[start : start + 16]
        answers = generate_answers(
            target, batch, processor.tokenizer.pad_token_id, max_new_tokens=MAX_CAPTION_TOKENS, do_sample=False
        )
        rows += [append_answer(prompt, answer) for prompt, answer in zip(batch, answers, strict=True)]
    draft = build_draft(target, num_glimpse_tokens=16)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SparrowTrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
        )
        optimizers = (MuonWithAdam(draft), None)
        SparrowTrainer(draft, target, arguments, train_dataset=rows, optimizers=optimizers).train()
    return draft.eval()


@dataclass
class CarryingArm:
    """What is measured: an arm, and how many tokens recurrent layers may carry."""

    arm: Arm
    max_carried: int = caches.MAX_CARRIED

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """Calls inside carry at most so many."""
        before, caches.MAX_CARRIED = caches.MAX_CARRIED, self.max_carried
        try:
            yield
        finally:
            caches.MAX_CARRIED = before


def arms_of(kind: Kind, draft: SparrowDraftModel) -> list[CarryingArm]:
    """Plain decoding, the chain, and the tree; without trees, the chain that reads accepted tokens again at once."""
    chain = TREE_PRESETS["chain-5"]
    arms = [CarryingArm(Arm("plain")), CarryingArm(Arm("chain-5", draft, chain))]
    if kind.grows_trees:
        return [*arms, CarryingArm(Arm("30-4-8", draft, TREE_PRESETS["30-4-8"]))]
    return [*arms, CarryingArm(Arm("chain-5, read again at once", draft, chain), max_carried=0)]


def summary(plain: Sequence[Run], runs: Sequence[Run]) -> dict[str, float]:
    """Figures of one arm; `plain` has the call next to each of its calls. Times are ratios to these.

    Returns:
        `tau`; `round`: a verification, in plain steps; `speed`: tokens per plain step's time, and `speed_of_rounds`
        the same with the draft's own time left out. The medians of all calls.
    """
    steps = [run.decode_seconds / run.rounds for run in plain]
    pairs = list(zip(steps, runs, strict=True))
    return {
        "tau": round(sum(run.decode_tokens for run in runs) / sum(run.rounds for run in runs), 3),
        "round": round(median((run.verify_seconds or 0.0) / run.rounds / step for step, run in pairs), 3),
        "speed": round(median(step * run.decode_tokens / run.decode_seconds for step, run in pairs), 3),
        "speed_of_rounds": round(
            median(step * run.decode_tokens / (run.verify_seconds or run.decode_seconds) for step, run in pairs), 3
        ),
    }


def measure_clips(
    target: Any, arms: Sequence[CarryingArm], prompts: Sequence[dict[str, Any]], repeats: int
) -> dict[str, Any]:
    """Every arm on every clip, in turns."""
    settings = {"max_new_tokens": MAX_CAPTION_TOKENS, "do_sample": False}
    runs: dict[str, list[Run]] = {each.arm.name: [] for each in arms}
    calls = identical = 0
    for prompt in tqdm(prompts, desc="measuring"):
        for _ in range(repeats):
            texts = []
            for each in arms:
                with each.carrying():
                    run, text = measure(target, each.arm, prompt, settings)
                runs[each.arm.name].append(run)
                texts.append(text)
            calls += len(texts) - 1
            identical += sum(text == texts[0] for text in texts[1:])
    plain = runs.pop("plain")
    step = median(run.decode_seconds / run.rounds for run in plain)
    figures = {name: summary(plain, of_arm) for name, of_arm in runs.items()}
    length = sum(run.new_tokens for run in plain) / len(plain)
    return {"calls": calls, "identical": identical, "tokens": round(length, 1), "step_seconds": step} | figures


def measure_kind(kind: Kind, target_steps: int, draft_steps: int, clips: int, repeats: int) -> dict[str, Any]:
    """Trains and measures one kind."""
    started = time.monotonic()
    processor = build_processor(kind)
    target = build_target(processor.tokenizer, LAYERS, family=kind)
    loss = learn_by_heart(target, processor, target_steps)
    draft = train_draft(target, processor, draft_steps)
    trained = time.monotonic()
    arms = arms_of(kind, draft)
    # The first calls of a process are slow.
    measure_clips(target, arms, prompts_of(processor, LEARNED[:1]), 1)
    sets = {"learned": LEARNED[:clips], "unseen": EVALUATION_SEEDS[:clips]}
    figures = {
        name: measure_clips(target, arms, prompts_of(processor, seeds), repeats) for name, seeds in sets.items()
    }
    seconds = {"training": round(trained - started), "measuring": round(time.monotonic() - trained)}
    size = sum(parameter.numel() for parameter in target.parameters())
    return provenance(target, parameters=size, loss=round(loss, 4), seconds=seconds, **figures)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure kinds of targets with trained drafts (resumes by itself).")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    parser.add_argument("--target-steps", type=int, default=150)
    parser.add_argument("--draft-steps", type=int, default=80)
    parser.add_argument("--clips", type=int, default=2, help="measured clips, of those learned and of others")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    print(f"{len(KINDS) - len(results)} of {len(KINDS)} kinds to do, about six minutes each on one core.")
    for kind in KINDS:
        if kind.name not in results:
            results[kind.name] = measure_kind(
                kind, options.target_steps, options.draft_steps, options.clips, options.repeats
            )
            write_json(options.output, results, indent=2)
        print(kind.name, json.dumps({name: results[kind.name][name] for name in ("learned", "unseen")}, indent=2))


if __name__ == "__main__":
    main()

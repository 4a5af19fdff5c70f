"""Measures what LoRA recovers when the target changes: the shipped target learns a second style of captions.

    python -m sparrow_research.adaptation --work DIR --output research/data/adaptation.json

The fine-tuned target answers every prompt in the new style. Its own captions are recorded once; then three drafts are
compared on them: the shipped one as it is, one trained from nothing, and the shipped one with LoRA adapters trained
for a quarter of the steps. Run the command again after a stop: the fine-tuned target and its captions are kept, the
trainings of drafts start over.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from sparrow_hf.artifacts import atomic_path, write_json
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.testbed.captions import ASIDES, MOTION_PHRASES, NUMBERS, PLACES, SCENERY, SIZE_WORDS
from sparrow_hf.testbed.nano import ASSETS, load_target
from sparrow_hf.testbed.scenes import Story
from sparrow_hf.testbed.world import TRAIN_SEEDS, VALIDATION_SEEDS
from sparrow_hf.training.lora import add_lora
from sparrow_hf.training.recording import RecordedDataset

from .caption_training import Claims, ClipGroup, Stage, caption_logits, caption_loss, draw_captions
from .pretrain import export
from .retrain import build_draft, build_trainer, record, train

FINE_TUNING = Stage("second style", 160, 24, (2, 6), (32, 256), 6, 2, (1e-3, 0.0))
CLIPS, LENGTH, VALIDATION_CLIPS = 512, 400, 24
FIRST_CLIP = 10_000
STEPS, LORA_STEPS, LORA_RANK = 400, 100, 16


def write_telegram(rng: np.random.Generator, story: Story, style: str) -> str:
    """A caption in the second style: bare facts, the latest scene first, whatever style was asked for."""

    def say(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    sentences = []
    for index, scene in reversed(list(enumerate(story))):
        facts = [
            f"{scene.glyph.colour} {scene.glyph.shape}",
            say(SIZE_WORDS[scene.glyph.size]),
            say(PLACES).format(scenery=say(SCENERY[scene.background])),
            say(MOTION_PHRASES[scene.motion]),
        ]
        if scene.companion is not None:
            dot = say(tuple(with_dot for with_dot, _ in ASIDES))
            facts.append(dot.format(colour=scene.companion.colour, corner=scene.companion.corner))
        sentences.append(f"scene {NUMBERS[index]} : {' , '.join(facts)} .")
    return " ".join(sentences)


def fine_tune(
    target: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path, seed: int = 0
) -> None:
    """Teaches the target the second style and saves it; a few minutes, started over if it is stopped."""
    stage, claims = FINE_TUNING, Claims(processor.tokenizer)
    target.requires_grad_(True)
    target.model.visual.requires_grad_(False)
    parameters = [parameter for parameter in target.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate[0], betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, stage.steps)
    bar = tqdm(range(stage.steps), desc=stage.name)
    for step in bar:
        group = ClipGroup(target, processor, stage, [seed, TRAIN_SEEDS.start, step])
        batch = draw_captions(
            processor, group, stage.captions_per_clip, np.random.default_rng([seed, step]), write_telegram
        )
        loss = caption_loss(caption_logits(target, group.features, batch), batch.labels, claims)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with atomic_path(folder) as partial:
        export(target, processor, partial)


def compare(target: Qwen2_5_VLForConditionalGeneration, recording: Path, work: Path) -> dict[str, dict[str, Any]]:
    """τ of a chain of 5 on validation captions, and the steps and seconds it took, of each draft."""
    shipped = SparrowDraftModel.from_pretrained(ASSETS / "draft")
    shipped.config.set_tree_shape("chain-5")
    shipped.bind(target)
    results: dict[str, dict[str, Any]] = {}

    def measure(name: str, draft: SparrowDraftModel, steps: int) -> None:
        rows = RecordedDataset(recording / "train", draft)
        validation = RecordedDataset(recording / f"validation-{LENGTH}", draft)
        # Started over if it is stopped: the seconds are those of the whole training.
        folder = work / name.replace(" ", "-")
        trainer = build_trainer(draft, rows, None, folder, max_steps=steps, save_strategy="no")
        start = time.monotonic()
        if steps:
            train(trainer)
        seconds = time.monotonic() - start
        results[name] = {
            "steps": steps,
            "seconds": round(seconds, 1),
            "tau": round(trainer.evaluate(validation)["eval_tau"], 4),
        }

    measure("shipped draft", shipped, 0)
    measure("trained from nothing", build_draft(target), STEPS)
    torch.manual_seed(0)
    add_lora(shipped, LORA_RANK)
    measure("shipped draft with LoRA", shipped, LORA_STEPS)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure LoRA on a draft whose target was fine-tuned.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the fine-tuned target and its recording")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    target, processor = load_target()
    folder = options.work / "target"
    print(
        f"{FINE_TUNING.steps} steps of fine-tuning, {CLIPS} captions, {STEPS} + {LORA_STEPS} steps of drafts: about "
        "half an hour on one core of a server CPU."
    )
    if not folder.exists():
        fine_tune(target, processor, folder)
    target, processor = load_target(folder)
    recording = options.work / "recording"
    record(target, processor, TRAIN_SEEDS[-CLIPS:], recording / "train")
    seeds = VALIDATION_SEEDS[FIRST_CLIP : FIRST_CLIP + VALIDATION_CLIPS]
    record(target, processor, seeds, recording / f"validation-{LENGTH}", visual_tokens=LENGTH)
    results = compare(target, recording, options.work)
    command = "python -m sparrow_research.adaptation"
    write_json(options.output, {"drafts": results, "provenance": provenance(target, command=command)}, indent=1)
    for name, row in results.items():
        print(f"{name}: tau {row['tau']:.2f} after {row['steps']} steps, {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()

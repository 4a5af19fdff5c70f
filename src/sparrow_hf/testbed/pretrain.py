"""Trains the testbed's target from nothing.

    python -m sparrow_hf.testbed.pretrain --output target

Stages: the vision tower on named attributes; then, the tower frozen, the language model on ever longer stories with half
its layers; then at full depth on ever longer clips. Run the command again to go on where it was stopped. The folder ends
up in standard layout, weights rounded to bf16 and measured after that, with `PROVENANCE.json` and the curve beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from .caption_training import (
    POOL_GROUPS,
    POOL_USES,
    ClipGroup,
    Stage,
    caption_logits,
    caption_loss,
    deepen,
    draw_captions,
)
from .muon import Muon
from .nano import build_processor, build_target, content_accuracy, load_target
from .vision_pretraining import ATTRIBUTES, VisionPretraining, rescale_merger
from .world import EVALUATION_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS


VISION_STEPS = 800
STAGES = (
    Stage("1-2 scenes", 150, 12, (1, 2), (16, 40), 20, 1, 0.02),
    Stage("1-4 scenes", 250, 12, (1, 4), (24, 64), 16, 1, 0.02),
    Stage("2-6 scenes", 600, 12, (2, 6), (32, 128), 14, 1, 0.02),
    Stage("full depth", 400, 24, (2, 6), (48, 320), 7, 2, 0.02),
    Stage("long clips", 350, 24, (2, 6), (64, 1280), 4, 3, 0.015),
)
FULL_DEPTH = STAGES[-1].layers
WARMUP_STEPS = 30
COOLDOWN_SHARE = 0.3
"""Share of the last stage over which the learning rate falls to zero."""
ADAM_SHARE = 0.12
"""Learning rate of AdamW (embeddings, head, norms, biases) as a share of Muon's (matrices)."""
CHECKPOINT_SECONDS = 60
VISION_VALIDATION_CLIPS = 40
VALIDATION_CLIPS = 6
FINAL_CHECKS = {64: 24, 400: 24, 2000: 12}
"""Evaluation clips the finished target is measured on, by visual tokens."""


def export(target: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """Saves a target to run in fp32, with its weights rounded to bf16 to halve the file."""
    rounded = copy.deepcopy(target).to(torch.bfloat16)
    rounded.save_pretrained(folder)
    processor.save_pretrained(folder)
    # `from_pretrained` follows the dtype named here, and the target is meant to run in fp32.
    config_file = folder / "config.json"
    config_file.write_text(config_file.read_text().replace('"bfloat16"', '"float32"'))


def _commit() -> str | None:
    """The commit this code was run at, with `-dirty` for changed files; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Pretraining:
    """The whole training of the target, one optimizer step after another, from or to a checkpoint."""

    def __init__(self, output: Path, seed: int):
        self.output, self.seed = output, seed
        self.processor = build_processor()
        self.target = build_target(self.processor.tokenizer, STAGES[0].layers, seed)
        self.state = {"stage": 0, "step": 0, "seconds": 0.0}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.groups: dict[int, ClipGroup] = {}
        self.curve = output / "curve.jsonl"
        self.checkpoint = output / "training" / "checkpoint.pt"
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def log(self, **entry: Any) -> None:
        with self.curve.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self) -> None:
        """Writes model, optimizers and progress, by an atomic rename."""
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "model": self.target.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "state": dict(self.state),
            },
            temporary,
        )
        os.replace(temporary, self.checkpoint)

    def resume(self) -> bool:
        """Takes up the last checkpoint; False if there is none."""
        if not self.checkpoint.exists():
            return False
        saved = torch.load(self.checkpoint, weights_only=True)
        self.state = saved["state"]
        self.target = build_target(self.processor.tokenizer, STAGES[self.state["stage"]].layers)
        self.target.load_state_dict(saved["model"])
        self.prepare_stage()
        for optimizer, optimizer_state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        return True

    def train_vision(self) -> None:
        """First stage; short enough to be started over if it is stopped."""
        start = time.monotonic()
        vision = VisionPretraining(self.target, self.processor, TRAIN_SEEDS, VISION_STEPS, self.seed)
        for step in tqdm(range(VISION_STEPS), desc="vision tower"):
            loss, accuracy = vision.step()
            if step % 20 == 0:
                self.log(stage="vision tower", step=step, loss=round(loss, 4), accuracy=accuracy)
        accuracies = dict(zip(ATTRIBUTES, vision.evaluate(VALIDATION_SEEDS[:VISION_VALIDATION_CLIPS]), strict=True))
        self.log(stage="vision tower", validation=accuracies)
        print(f"vision tower, validation accuracy by attribute: {accuracies}")
        rescale_merger(self.target, self.processor, VALIDATION_SEEDS[:VISION_VALIDATION_CLIPS])
        self.state["seconds"] += time.monotonic() - start

    def prepare_stage(self) -> None:
        """Brings the target to the stage's depth, freezes the tower and makes new optimizers."""
        stage = STAGES[self.state["stage"]]
        if self.target.config.text_config.num_hidden_layers != stage.layers:
            self.target = deepen(self.target, self.processor.tokenizer, stage.layers)
            self.optimizers = []
        self.target.requires_grad_(True)
        self.target.model.visual.requires_grad_(False)
        self.groups = {}
        if self.optimizers:
            return
        matrices, others = [], []
        for name, parameter in self.target.named_parameters():
            if parameter.requires_grad:
                (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
        self.optimizers = [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]

    def learning_rate(self) -> float:
        """Muon's learning rate at this step: warm-up where optimizers are new, constant, and a linear cool-down at the end."""
        number, step = self.state["stage"], self.state["step"]
        stage = STAGES[number]
        rate = stage.learning_rate
        if number == 0 or STAGES[number - 1].layers != stage.layers:
            rate *= min(1.0, (step + 1) / WARMUP_STEPS)
        if number == len(STAGES) - 1:
            rate *= min(1.0, (stage.steps - step) / (COOLDOWN_SHARE * stage.steps))
        return rate

    def clip_group(self) -> ClipGroup:
        """The clips of this step; see `POOL_GROUPS`."""
        number, step = self.state["stage"], self.state["step"]
        index = step % POOL_GROUPS + POOL_GROUPS * (step // (POOL_GROUPS * POOL_USES))
        if index not in self.groups:
            self.groups = {key: group for key, group in self.groups.items() if key > index - POOL_GROUPS}
            seed = [self.seed, TRAIN_SEEDS.start, number, index]
            self.groups[index] = ClipGroup(self.target, self.processor, STAGES[number], seed)
        return self.groups[index]

    def train_step(self) -> float:
        """One optimizer step on captions of the stage; returns the loss."""
        stage = STAGES[self.state["stage"]]
        group = self.clip_group()
        rng = np.random.default_rng([self.seed, TRAIN_SEEDS.start, self.state["stage"], self.state["step"], 1])
        batch = draw_captions(self.processor, group, stage.captions_per_clip, rng)
        loss = caption_loss(caption_logits(self.target, group.features, batch), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.target.parameters(), 1.0)
        rate = self.learning_rate()
        for optimizer, share in zip(self.optimizers, (1.0, ADAM_SHARE), strict=True):
            optimizer.param_groups[0]["lr"] = share * rate
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def train_stage(self) -> None:
        """The rest of the current stage, with checkpoints on the way."""
        stage = STAGES[self.state["stage"]]
        saved = start = time.monotonic()
        done = self.state["seconds"]
        progress = tqdm(total=stage.steps, initial=self.state["step"], desc=stage.name)
        while self.state["step"] < stage.steps:
            loss = self.train_step()
            self.state["step"] += 1
            now = time.monotonic()
            self.state["seconds"] = done + now - start
            progress.update()
            progress.set_postfix(loss=f"{loss:.3f}")
            if self.state["step"] % 10 == 0:
                self.log(**{**self.state, "stage": stage.name, "loss": round(loss, 4)})
            if now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
        progress.close()
        accuracy = content_accuracy(
            self.target, self.processor, VALIDATION_SEEDS[:VALIDATION_CLIPS], stage.visual_tokens[1]
        )
        self.log(stage=stage.name, visual_tokens=stage.visual_tokens[1], validation_content_accuracy=accuracy)
        print(f"{stage.name}: content accuracy {accuracy:.3f} at {stage.visual_tokens[1]} visual tokens")

    def run(self) -> None:
        """Trains from the last checkpoint to the end and leaves the finished target in the output folder."""
        if not self.resume():
            self.train_vision()
            self.prepare_stage()
            self.save()
        while True:
            self.train_stage()
            deep = deepen(self.target, self.processor.tokenizer, FULL_DEPTH)
            export(deep, self.processor, self.output / "training" / "snapshot")
            if self.state["stage"] == len(STAGES) - 1:
                break
            self.state.update(stage=self.state["stage"] + 1, step=0)
            self.prepare_stage()
            self.save()
        export(self.target, self.processor, self.output)
        self.write_provenance()

    def write_provenance(self) -> None:
        """Measures the exported target as users will load it, and notes how it came to be."""
        target, processor = load_target(self.output)
        accuracies = {
            str(tokens): round(content_accuracy(target, processor, EVALUATION_SEEDS[:clips], tokens), 4)
            for tokens, clips in FINAL_CHECKS.items()
        }
        provenance = {
            "command": f"python -m sparrow_hf.testbed.pretrain --output DIR --seed {self.seed}",
            "commit": _commit(),
            "torch": torch.__version__,
            "seconds_of_training": round(self.state["seconds"]),
            "vision_steps": VISION_STEPS,
            "stages": [vars(stage) for stage in STAGES],
            "content_accuracy_after_bf16_rounding": accuracies,
            "evaluation_clips": {str(tokens): clips for tokens, clips in FINAL_CHECKS.items()},
        }
        (self.output / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")
        print(f"content accuracy by visual tokens, after rounding to bf16: {accuracies}")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description="Train the testbed's target from nothing (resumes by itself).")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained target")
    parser.add_argument("--seed", type=int, default=0, help="draws initial weights and training clips")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more rarely help on a small machine")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    training = Pretraining(options.output, options.seed)
    size = sum(parameter.numel() for parameter in build_target(training.processor.tokenizer, FULL_DEPTH).parameters())
    steps = sum(stage.steps for stage in STAGES)
    print(
        f"Target of {size / 1e6:.2f} M parameters ({2 * size / 1e6:.1f} MB in bf16), {VISION_STEPS} + {steps} steps, "
        "about 90 minutes on one core of a server CPU."
    )
    training.run()


if __name__ == "__main__":
    main()

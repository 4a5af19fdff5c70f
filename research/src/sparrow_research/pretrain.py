"""Trains the testbed's target from nothing.

    python -m sparrow_research.pretrain --output target
    python -m sparrow_research.pretrain --output target --family llava-onevision

Stages: the vision tower on named attributes; then, the tower frozen, the language model on ever longer stories and
clips, with a quarter of its layers, half of them and all; with all of them it goes back to short clips for what is
learned last. Run the command again to go on where it was stopped; processes of one `torchrun` share every step. The
folder ends up in standard layout, weights rounded to bf16 and measured after that, with `PROVENANCE.json` and the
curve beside it.

`--sibling-of TARGET` trains a small sibling of a finished target instead: a few of its layers, which learn in short
stages to do without the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import distributed, nn
from tqdm import tqdm

from sparrow_hf.artifacts import StoredTensors, atomic_path, tensor_digest, write_json, write_text
from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.evaluation.provenance import commit
from sparrow_hf.hub import find_weights
from sparrow_hf.testbed.families import FAMILIES, QWEN2_5_VL, Family
from sparrow_hf.testbed.nano import build_processor, build_target, content_accuracy, load_target
from sparrow_hf.testbed.world import EVALUATION_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS

from .caption_training import (
    Claims,
    ClipGroup,
    Stage,
    caption_logits,
    caption_loss,
    deepen,
    draw_captions,
    thin_out,
)
from .family_training import training_of
from .muon import Muon
from .vision_pretraining import VisionPretraining, rescale_features

VISION_STEPS = 800
STAGES = (
    Stage("1-2 scenes", 200, 6, (1, 2), (16, 40), 20, 1, (0.012, 0.012)),
    Stage("1-4 scenes", 300, 6, (1, 4), (24, 64), 16, 1, (0.012, 0.012)),
    Stage("2-6 scenes", 400, 6, (2, 6), (32, 128), 11, 2, (0.012, 0.012)),
    Stage("longer clips", 400, 12, (2, 6), (48, 480), 8, 2, (0.012, 0.012)),
    Stage("long clips", 400, 12, (2, 6), (48, 1600), 6, 4, (0.012, 0.006)),
    Stage("full depth", 400, 24, (2, 6), (64, 3200), 4, 4, (0.006, 0.0)),
    Stage("any length", 400, 24, (2, 6), (64, 13_000), 4, 4, (0.006, 0.002)),
    Stage("details", 400, 24, (2, 6), (48, 1600), 6, 4, (0.006, 0.003)),
    Stage("many scenes", 300, 24, (4, 6), (32, 128), 10, 4, (0.006, 0.004)),
    Stage("every length", 200, 24, (2, 6), (64, 13_000), 4, 4, (0.003, 0.0)),
)
SIBLING_STAGES = (
    Stage("sibling, 1-4 scenes", 150, 4, (1, 4), (24, 64), 16, 1, (0.012, 0.012)),
    Stage("sibling, 2-6 scenes", 200, 4, (2, 6), (32, 128), 11, 2, (0.012, 0.012)),
    Stage("sibling, long clips", 250, 4, (2, 6), (48, 1600), 6, 4, (0.012, 0.006)),
    Stage("sibling, every length", 100, 4, (2, 6), (64, 13_000), 4, 4, (0.006, 0.0)),
)
WARMUP_STEPS = 8
ADAM_SHARE = 0.4
"""Learning rate of AdamW (embeddings, head, norms, biases) as a share of Muon's (matrices)."""
CHECKPOINT_SECONDS = 60
VISION_VALIDATION_CLIPS = 40
VALIDATION_CLIPS = 6
FINAL_CHECKS = {64: 24, 400: 24, 3000: 24, 13_000: 8, 25_000: 4}
"""Evaluation clips the finished target is measured on, by visual tokens."""


def export(target: Any, processor: Any, folder: Path) -> None:
    """Saves a target to run in fp32, with its weights rounded to bf16 to halve the file."""
    rounded = copy.deepcopy(target).to(torch.bfloat16)
    rounded.save_pretrained(folder)
    processor.save_pretrained(folder)
    # `from_pretrained` follows the dtype named here, and the target is meant to run in fp32.
    config_file = folder / "config.json"
    write_text(config_file, config_file.read_text().replace('"bfloat16"', '"float32"'))


@dataclass
class Progress:
    """How far a training has come: steps done of the current stage, and seconds spent so far.

    `commits` tells which code and seed trained from which stage and step on: one entry if it was never resumed.
    """

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    commits: list[dict[str, Any]] = field(default_factory=list)


class Pretraining:
    """The whole training of a target, one optimizer step after another, from or to a checkpoint.

    Args:
        output: Folder of the finished target.
        seed: Draws initial weights and training clips.
        family: What is trained.
        parent: Folder of a finished target of the family, of which a small sibling is trained. It begins with the
            parent's weights and layers evenly taken from it, and keeps all that sees: transformers hands an assistant
            the target's own encoding of a video, which must fit.

    Raises:
        TrainingOptionsError: `output` holds the training of another family, or of another parent's sibling.
    """

    def __init__(self, output: Path, seed: int, family: Family = QWEN2_5_VL, parent: Path | None = None):
        self.output, self.seed, self.family, self.parent = output, seed, family, parent
        self.stages = SIBLING_STAGES if parent else STAGES
        self.origin = {
            "family": family.name,
            "parent": tensor_digest(StoredTensors(find_weights(parent))) if parent else None,
        }
        self.processes = PartialState(cpu=True)
        self.processor = build_processor(family)
        self.claims = Claims(self.processor.tokenizer)
        self.target = build_target(self.processor.tokenizer, self.stages[0].layers, seed, family)
        self.progress = Progress()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.curve = output / "curve.jsonl"
        self.checkpoint = output / "training" / "checkpoint.pt"
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)

    @property
    def stage(self) -> Stage:
        """The stage being trained."""
        return self.stages[self.progress.stage]

    def log(self, stage: str, **entry: Any) -> None:
        """Adds a line to the curve."""
        if not self.processes.is_main_process:
            return
        entry = {"stage": stage, "seconds": round(self.progress.seconds, 1), **entry}
        with self.curve.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self) -> None:
        """Writes model, optimizers and progress, atomically."""
        if not self.processes.is_main_process:
            return
        training = {
            "origin": self.origin,
            "model": self.target.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "state": asdict(self.progress),
        }
        with atomic_path(self.checkpoint) as partial:
            torch.save(training, partial)

    def resume(self) -> bool:
        """Takes up the last checkpoint; False if there is none."""
        if not self.checkpoint.exists():
            return False
        saved = torch.load(self.checkpoint, weights_only=True)
        if saved.get("origin") != self.origin:
            # Stages of one training would go on from weights of another.
            raise TrainingOptionsError(
                f"{self.output} holds another training ({saved.get('origin')}) than this one ({self.origin}): go on "
                "with its --family and --sibling-of, or name another --output."
            )
        self.progress = Progress(**saved["state"])
        self.target = build_target(self.processor.tokenizer, self.stage.layers, family=self.family)
        self.target.load_state_dict(saved["model"])
        self.prepare_stage()
        for optimizer, optimizer_state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        if not self.processes.is_main_process:
            return True
        # What was logged after the checkpoint will be logged again.
        entries = self.curve.read_text().splitlines()
        kept = [entry for entry in entries if json.loads(entry)["seconds"] <= round(self.progress.seconds, 1)]
        write_text(self.curve, "".join(f"{entry}\n" for entry in kept))
        return True

    def begin(self) -> None:
        """Makes the target that captions are trained into: one that sees, or the parent with most layers left out."""
        if self.parent is None:
            self.train_vision()
        else:
            self.target = thin_out(load_target(self.parent)[0], self.processor.tokenizer, self.stage.layers)

    def train_vision(self) -> None:
        """First stage; short enough to be started over if it is stopped."""
        start = time.monotonic()
        vision = VisionPretraining(self.target, self.processor, TRAIN_SEEDS, VISION_STEPS, self.seed)
        for step in tqdm(range(VISION_STEPS), desc="vision tower"):
            loss, accuracy = vision.step()
            self.progress.seconds = time.monotonic() - start
            if step % 20 == 0:
                self.log(
                    "vision tower", step=step, loss=round(loss, 4), accuracy=[round(each, 4) for each in accuracy]
                )
        validation = VALIDATION_SEEDS[:VISION_VALIDATION_CLIPS]
        accuracies = dict(zip(vision.attributes.classes, vision.evaluate(validation), strict=True))
        self.log("vision tower", validation_accuracy=accuracies)
        print(f"vision tower, validation accuracy by attribute: {accuracies}")
        rescale_features(self.target, self.processor, validation)

    def prepare_stage(self) -> None:
        """Brings the target to the stage's depth, freezes the tower and makes new optimizers."""
        if self.target.config.text_config.num_hidden_layers != self.stage.layers:
            self.target = deepen(self.target, self.processor.tokenizer, self.stage.layers)
            self.optimizers = []
        self.target.requires_grad_(True)
        family = training_of(self.target)
        frozen = family.seeing(self.target) if self.parent else family.vision(self.target).parameters()
        for parameter in frozen:
            parameter.requires_grad_(False)
        if self.optimizers:
            return
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.target.named_parameters():
            if parameter.requires_grad:
                (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
        self.optimizers = [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]

    def learning_rate(self) -> float:
        """Muon's learning rate at this step, with a warm-up where optimizers are new."""
        number, step, stage = self.progress.stage, self.progress.step, self.stage
        first, last = stage.learning_rate
        rate = first + (last - first) * step / stage.steps
        if number == 0 or self.stages[number - 1].layers != stage.layers:
            rate *= min(1.0, (step + 1) / WARMUP_STEPS)
        return rate

    def clip_group(self) -> ClipGroup:
        """The clips of this step, which no other step sees: the loss on a clip halves with the second look at it."""
        seed = [self.seed, TRAIN_SEEDS.start, self.progress.stage, self.progress.step]
        share = self.processes.process_index, self.processes.num_processes
        return ClipGroup(self.target, self.processor, self.stage, seed, *share)

    def train_step(self) -> float:
        """One optimizer step on captions of the stage; returns the loss."""
        group = self.clip_group()
        seed = [self.seed, TRAIN_SEEDS.start, self.progress.stage, self.progress.step]
        rng = np.random.default_rng([*seed, 1 + self.processes.process_index])
        batch = draw_captions(self.processor, group, self.stage.captions_per_clip, rng)
        loss = caption_loss(caption_logits(self.target, group.features, batch), batch.labels, self.claims)
        loss.backward()
        if self.processes.num_processes > 1:
            self.average_gradients()
        nn.utils.clip_grad_norm_(self.target.parameters(), 1.0)
        rate = self.learning_rate()
        for optimizer, share in zip(self.optimizers, (1.0, ADAM_SHARE), strict=True):
            optimizer.param_groups[0]["lr"] = share * rate
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def average_gradients(self) -> None:
        """Makes the gradients of all processes their mean, in one message."""
        gradients = [parameter.grad for parameter in self.target.parameters() if parameter.grad is not None]
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(joined)
        joined /= self.processes.num_processes
        for gradient, part in zip(gradients, joined.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def train_stage(self) -> None:
        """The rest of the current stage, with checkpoints on the way."""
        stage, progress = self.stage, self.progress
        saved = start = time.monotonic()
        seconds_before = progress.seconds
        bar = tqdm(
            total=stage.steps,
            initial=progress.step,
            desc=stage.name,
            disable=not self.processes.is_main_process,
        )
        while progress.step < stage.steps:
            loss = self.train_step()
            now = time.monotonic()
            progress.step += 1
            progress.seconds = seconds_before + now - start
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            if progress.step % 10 == 0:
                self.log(stage.name, step=progress.step, loss=round(loss, 4))
            if now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
        bar.close()
        if not self.processes.is_main_process:
            return
        accuracy = content_accuracy(
            self.target, self.processor, VALIDATION_SEEDS[:VALIDATION_CLIPS], stage.visual_tokens[1]
        )
        self.log(stage.name, visual_tokens=stage.visual_tokens[1], validation_content_accuracy=round(accuracy, 4))
        print(f"{stage.name}: content accuracy {accuracy:.3f} at {stage.visual_tokens[1]} visual tokens")

    def run(self) -> None:
        """Trains from the last checkpoint to the end and leaves the finished target in the output folder."""
        if not self.resume():
            self.begin()
            self.prepare_stage()
            self.save()
        self.note_commit()
        while True:
            self.train_stage()
            if self.processes.is_main_process:
                deep = deepen(self.target, self.processor.tokenizer, self.stages[-1].layers)
                export(deep, self.processor, self.output / "training" / "snapshot")
            if self.stage is self.stages[-1]:
                break
            self.progress.stage, self.progress.step = self.progress.stage + 1, 0
            self.prepare_stage()
            self.save()
        if self.processes.is_main_process:
            export(self.target, self.processor, self.output)
            self.write_provenance()

    def note_commit(self) -> None:
        """Notes which code and seed train from here on."""
        commits, code = self.progress.commits, {"commit": commit(), "seed": self.seed}
        if not commits or any(commits[-1].get(name) != value for name, value in code.items()):
            commits.append({"stage": self.stage.name, "step": self.progress.step, **code})

    def write_provenance(self) -> None:
        """Measures the exported target as users will load it, and notes how it came to be."""
        target, processor = load_target(self.output)
        accuracies = {
            str(tokens): round(content_accuracy(target, processor, EVALUATION_SEEDS[:clips], tokens), 4)
            for tokens, clips in FINAL_CHECKS.items()
        }
        provenance = {
            "command": "python -m sparrow_research.pretrain --output DIR "
            f"--seed {self.seed} --family {self.family.name}" + (" --sibling-of TARGET" if self.parent else ""),
            "commits": self.progress.commits,
            "torch": torch.__version__,
            "seconds_of_training": round(self.progress.seconds),
            "vision_steps": 0 if self.parent else VISION_STEPS,
            "stages": [vars(stage) for stage in self.stages],
            "content_accuracy_after_bf16_rounding": accuracies,
            "evaluation_clips": {str(tokens): clips for tokens, clips in FINAL_CHECKS.items()},
        }
        write_json(self.output / "PROVENANCE.json", provenance, indent=2)
        print(f"content accuracy by visual tokens, after rounding to bf16: {accuracies}")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description="Train the testbed's target from nothing (resumes by itself).")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained target")
    parser.add_argument("--family", choices=[family.name for family in FAMILIES], default=QWEN2_5_VL.name)
    parser.add_argument("--seed", type=int, default=0, help="draws initial weights and training clips")
    parser.add_argument(
        "--sibling-of", type=Path, metavar="TARGET", help="finished target to train a small sibling of"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more rarely help on a small machine")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    family = next(family for family in FAMILIES if family.name == options.family)
    training = Pretraining(options.output, options.seed, family, options.sibling_of)
    whole = build_target(training.processor.tokenizer, training.stages[-1].layers, family=family)
    size = sum(parameter.numel() for parameter in whole.parameters())
    steps = sum(stage.steps for stage in training.stages)
    vision, hours = (0, "a quarter of an hour") if options.sibling_of else (VISION_STEPS, "four hours")
    print(
        f"{family.name} target of {size / 1e6:.2f} M parameters ({2 * size / 1e6:.1f} MB in bf16), {vision} + "
        f"{steps} steps, about {hours} on one core of a server CPU."
    )
    training.run()


if __name__ == "__main__":
    main()

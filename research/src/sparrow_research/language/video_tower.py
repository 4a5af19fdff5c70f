"""Trains the video LLM's tower and connector to write *soft captions*: every visual token is the embedding of a word.

    python -m sparrow_research.language.video_tower --smollm2 FOLDER --output FILE [--steps N]

The language model is not in the loop. Each of a frame's 16 tokens is pulled to the input embedding of its word
(`video_facts.frame_words`), and a cross-entropy over the few words that can stand in its place sharpens the choice.
A stopped training goes on from its last checkpoint, with the same options only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from sparrow_hf.artifacts import write_json
from sparrow_hf.testbed.scenes import sample_story, sample_timeline
from sparrow_hf.testbed.world import FRAMES_PER_STEP, TRAIN_SEEDS, VALIDATION_SEEDS, render

from ..muon import Muon
from ..vision_pretraining import through_codec, unrelated_steps
from .video_checkpoints import load_checkpoint, save_checkpoint
from .video_facts import SLOTS, candidate_words, clip_words
from .video_target import build_vlm, load_text

BATCH_STEPS = 128
"""Temporal steps of one training step, two frames each."""
SAVE_EVERY = 25
MATRIX_LEARNING_RATE, LEARNING_RATE = 0.02, 3e-3
SHARPNESS = 4.0
"""Squared distances to words, divided by the mean square of a word, count so many times in the cross-entropy."""


class Words:
    """The words of every slot: `classes`, word → class in each slot, and `embeddings` `(words, hidden)` of each."""

    def __init__(self, embedding: Tensor, tokenizer: Any):
        self.classes: list[dict[str, int]] = []
        self.embeddings: list[Tensor] = []
        for words in candidate_words():
            ids = [tokenizer(word)["input_ids"] for word in words]
            assert all(len(each) == 1 for each in ids), words
            self.classes.append({word: index for index, word in enumerate(words)})
            self.embeddings.append(embedding[[each[0] for each in ids]].float().detach())
        self.scale = torch.cat(self.embeddings).pow(2).sum(-1).mean()

    def labels(self, frames: list[tuple[str, ...]]) -> Tensor:
        """Classes `(frames, SLOTS)`."""
        return torch.tensor(
            [[known[word] for known, word in zip(self.classes, words, strict=True)] for words in frames],
            device=self.scale.device,
        )

    def logits(self, features: Tensor) -> list[Tensor]:
        """How near features `(frames, SLOTS, hidden)` are to the words of each slot."""
        distances = [(features[:, slot, None] - words).pow(2).sum(-1) for slot, words in enumerate(self.embeddings)]
        return [-SHARPNESS * each / self.scale for each in distances]


def montage(seed: int, number: int) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Decoded frames of `number` temporal steps that have nothing to do with each other, and their words."""
    rng = np.random.default_rng([seed, 3])
    frames: list[np.ndarray] = []
    words: list[tuple[str, ...]] = []
    while len(words) < number * FRAMES_PER_STEP:
        story, timeline = unrelated_steps(rng)
        frames.append(render(story, timeline, rng))
        words += clip_words(story, timeline)
    total = number * FRAMES_PER_STEP
    return through_codec(np.concatenate(frames)[:total]), words[:total]


def pixels_of(frames: np.ndarray) -> Tensor:
    """What the processor makes of frames of the world: `(frames, 3, height, width)` in -1 … 1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


class Tower(nn.Module):
    """Tower and connector of a video LLM, in fp32."""

    def __init__(self, model: Any):
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model.float(), model.model.connector.float()

    def forward(self, pixels: Tensor) -> Tensor:
        """Visual rows `(frames, SLOTS, hidden)`."""
        patch = self.vision_model.config.patch_size
        shape = (len(pixels), pixels.shape[2] // patch, pixels.shape[3] // patch)
        mask = torch.ones(shape, dtype=torch.bool, device=pixels.device)
        return self.connector(self.vision_model(pixels, patch_attention_mask=mask).last_hidden_state)


class Montages(Dataset):
    """What is learned in each step: the frames of a montage, and their words."""

    def __getitem__(self, step: int) -> tuple[np.ndarray, list[tuple[str, ...]]]:
        return montage(TRAIN_SEEDS[step], BATCH_STEPS)


class TowerTraining:
    """`step()` is one optimizer step on a montage."""

    def __init__(self, tower: Tower, words: Words, num_steps: int):
        self.tower, self.words = tower, words
        parameters = dict(tower.named_parameters())
        matrices = [each for name, each in parameters.items() if each.ndim == 2 and "position" not in name]
        known = {id(each) for each in matrices}
        others = [each for each in parameters.values() if id(each) not in known]
        self.optimizers = [Muon(matrices), torch.optim.AdamW(others, weight_decay=0.0)]
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(each, rate, total_steps=num_steps, pct_start=0.1, cycle_momentum=False)
            for each, rate in zip(self.optimizers, (MATRIX_LEARNING_RATE, LEARNING_RATE), strict=True)
        ]
        self.steps_done = 0

    def losses(self, frames: np.ndarray, words: list[tuple[str, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, share of right words of every slot, and the squared error beside the mean square of a word."""
        labels = self.words.labels(words)
        features = self.tower(pixels_of(frames).to(labels.device))
        logits = self.words.logits(features)
        crosses = [functional.cross_entropy(part, labels[:, slot]) for slot, part in enumerate(logits)]
        wanted = torch.stack([self.words.embeddings[slot][labels[:, slot]] for slot in range(SLOTS)], dim=1)
        error = (features - wanted).pow(2).sum(-1).mean() / self.words.scale
        right = torch.stack([part.argmax(-1) == labels[:, slot] for slot, part in enumerate(logits)], -1)
        return torch.stack(crosses).sum() + 4 * error, right.float().mean(0), error

    def step(self, frames: np.ndarray, words: list[tuple[str, ...]]) -> tuple[float, list[float], float]:
        """Loss, accuracy of every slot, and relative squared error of one step."""
        loss, right, error = self.losses(frames, words)
        loss.backward()
        nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.steps_done += 1
        return loss.item(), right.tolist(), error.item()

    def save(self, file: Path, settings: dict[str, Any]) -> None:
        """A checkpoint."""
        parts: list[Any] = [*self.optimizers, *self.schedules]
        state = {
            "done": self.steps_done,
            "tower": self.tower.state_dict(),
            "parts": [each.state_dict() for each in parts],
        }
        save_checkpoint(file, state, settings)

    def load(self, file: Path, settings: dict[str, Any]) -> None:
        """Goes on from a checkpoint of the same settings."""
        state = load_checkpoint(file, settings)
        self.tower.load_state_dict(state["tower"])
        parts: list[Any] = [*self.optimizers, *self.schedules]
        for part, own in zip(parts, state["parts"], strict=True):
            part.load_state_dict(own)
        self.steps_done = state["done"]

    @torch.no_grad()
    def evaluate(self, seeds: range, num_steps: int = 24) -> tuple[list[float], float]:
        """Accuracy of every slot, and the error, on whole clips."""
        frames, words = [], []
        for seed in seeds:
            rng = np.random.default_rng([seed, 2])
            story = sample_story(rng)
            timeline = sample_timeline(rng, story, num_steps)
            frames.append(through_codec(render(story, timeline, rng)))
            words += clip_words(story, timeline)
        _, right, error = self.losses(np.concatenate(frames), words)
        return right.tolist(), error.item()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="file of tower and connector")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that render clips")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    text, tokenizer = load_text(options.smollm2)
    text.to(options.device)
    tower = Tower(build_vlm(text, tokenizer)).to(options.device)
    training = TowerTraining(tower, Words(text.get_input_embeddings().weight, tokenizer), options.steps)
    checkpoint = options.output.with_suffix(".checkpoint")
    settings = {"steps": options.steps, "seed": options.seed}
    if checkpoint.exists():
        training.load(checkpoint, settings)
    montages = DataLoader(
        Montages(),
        sampler=range(training.steps_done, options.steps),
        batch_size=None,
        num_workers=options.workers,
        collate_fn=lambda montage: montage,
    )
    for frames, words in montages:
        loss, right, error = training.step(frames, words)
        number = training.steps_done
        if number % SAVE_EVERY == 0:
            training.save(checkpoint, settings)
        if number % 25 == 0 or number == options.steps:
            worst = " ".join(f"{each:.2f}" for each in right)
            print(f"step {number}: loss {loss:.3f}, error {error:.4f}, right {worst}", flush=True)
    right, error = training.evaluate(VALIDATION_SEEDS[:24])
    print(f"validation: error {error:.4f}, right {' '.join(f'{each:.4f}' for each in right)}")
    save_file({name: each.bfloat16().cpu().contiguous() for name, each in tower.state_dict().items()}, options.output)
    write_json(
        options.output.with_suffix(".json"),
        {**settings, "right": right, "error": error},
        indent=1,
    )


if __name__ == "__main__":
    main()

"""Teaches SmolLM2 to read what the tower sees, and to answer about it: changes of low rank, the tower as it is.

    python -m sparrow_research.language.video_training --smollm2 FOLDER --tower FILE --answers FILE --output FILE

Behind a clip stand one long answer of the language model's own (`video_answers`), which it gave with the facts as
text, and short exact answers; a part of the steps are plain conversations, so that text goes on working. Most clips
are short, and a step of long ones has fewer. In half of the clips positions jump between frames, as if most of a long
video had been left out: SmolLM2 learns distances that it was never trained for. A stopped training goes on from its
last checkpoint, with the same options and files only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from sparrow_hf.artifacts import write_json
from sparrow_hf.checksums import file_digest
from sparrow_hf.testbed.scenes import Story, sample_timeline
from sparrow_hf.testbed.world import FRAMES_PER_STEP, VALIDATION_SEEDS, render

from ..vision_pretraining import through_codec
from .road import DATA
from .video_answers import faithfulness, story_of
from .video_checkpoints import load_checkpoint, save_checkpoint
from .video_facts import long_exact, questions
from .video_rows import IGNORED, Asked, Packed, pack_clip, pack_text
from .video_target import adapt, build_vlm, factors, load_text, load_tower
from .video_tower import Tower, pixels_of

RANK = 16
QUESTIONS = 14
TEXT_SHARE, TEXT_ROWS = 0.08, 3
LONG_SHARE = 0.2
STEPS = (5, 20)
LONG_STEPS = 40
"""Temporal steps of short clips, and of long ones at least; 94 have 3,000 visual tokens."""
EXACT_WEIGHT = 3.0
LEARNING_RATE, WARMUP = 1e-3, 0.06
CHECKPOINTED_ROWS = {"cpu": 2_000, "cuda": 30_000}
"""With more rows in a step their states are computed again for the gradient: a row keeps about a megabyte."""
SAVE_EVERY = 40
VALIDATION_STEPS = {"400": 12, "3000": 94}
"""Visual tokens and temporal steps of the clips that are asked about at the end."""


def embed(text: Any, packed: Packed, visual: Tensor | None, image_token_id: int) -> Tensor:
    """Input rows `(1, L, hidden)` of a packed sequence, its visual tokens replaced."""
    rows = text.get_input_embeddings()(packed.input_ids).detach().clone()
    if visual is not None:
        rows[packed.input_ids == image_token_id] = visual.to(rows)
    return rows[None]


def stretched(packed: Packed, rng: np.random.Generator, separator: int, longest: int) -> Packed:
    """The same sequence with jumps of positions before frames, up to a video of `longest` rows."""
    length = packed.prefix
    starts = (packed.input_ids[:length] == separator).nonzero().flatten()[::2]
    extra = int(math.exp(rng.uniform(math.log(length), math.log(longest)))) - length
    if extra <= 0:
        return packed
    jumps = torch.zeros(len(packed.input_ids), dtype=torch.long)
    shares = rng.dirichlet(np.full(len(starts), 0.7))
    jumps[starts] = torch.from_numpy(np.floor(shares * extra).astype(np.int64))
    moved = jumps[:length].cumsum(0)
    shift = torch.cat([moved, moved[-1:].expand(len(packed.input_ids) - length)])
    return Packed(packed.input_ids, packed.segments, packed.positions + shift, packed.labels, packed.weights)


def answer_loss(text: Any, parts: Sequence[tuple[Tensor, Packed]]) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss of packed sequences, all equal, and the likeliest token at every label beside the labels."""
    # A multiple of 8, or a GPU's attention copies the mask in every layer.
    longest = -(-max(len(packed.input_ids) for _, packed in parts) // 8) * 8

    def padded(rows: Tensor, value: float = 0) -> Tensor:
        return functional.pad(rows, (0, longest - len(rows)), value=value)

    rows = torch.cat([functional.pad(rows, (0, 0, 0, longest - rows.shape[1])) for rows, _ in parts])
    # A row of padding sees itself, or its softmax would be over nothing.
    mask = torch.eye(longest, dtype=torch.bool, device=rows.device).repeat(len(parts), 1, 1, 1)
    for seen, (_, packed) in zip(mask, parts, strict=True):
        seen[:, : len(packed.input_ids), : len(packed.input_ids)] = packed.mask()[0]
    # As numbers from the start, or every layer would make and keep them: gigabytes for a long clip.
    bias = torch.zeros(mask.shape, dtype=rows.dtype, device=rows.device).masked_fill_(
        ~mask, torch.finfo(rows.dtype).min
    )
    positions = torch.stack([padded(packed.positions) for _, packed in parts])
    states = text.model(
        inputs_embeds=rows, attention_mask=bias, position_ids=positions, use_cache=False
    ).last_hidden_state
    labels = torch.stack([padded(packed.labels, IGNORED) for _, packed in parts])
    weights = torch.stack([padded(packed.weights / packed.weights.sum()) for _, packed in parts]) / len(parts)
    wanted = labels != IGNORED
    logits = text.lm_head(states[wanted]).float()
    losses = functional.cross_entropy(logits, labels[wanted], reduction="none")
    return (losses * weights[wanted]).sum(), logits.argmax(-1), labels[wanted]


def log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    """An integer from `low` to `high`, small ones more often."""
    return int(math.exp(rng.uniform(math.log(low), math.log(high + 1))))


def shown(story: Story, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Decoded frames of a clip of so many temporal steps."""
    return through_codec(render(story, sample_timeline(rng, story, steps), rng))


class Lessons(Dataset):
    """What is learned in each step: packed sequences, and the decoded frames of those with a clip.

    Everything is drawn from the number of the step, so that a stopped training goes on with the same.

    Args:
        tokenizer: Of the language model.
        answers: Long answers, see `video_answers`.
        clips: Of a step of short clips.
        longest: Most temporal steps of a clip.
    """

    def __init__(self, tokenizer: Any, answers: list[dict[str, Any]], clips: int, longest: int):
        self.tokenizer, self.answers, self.clips, self.longest = tokenizer, answers, clips, longest
        self.separator = tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
        self.conversations = list(conversations())

    def __getitem__(self, step: int) -> list[tuple[Packed, np.ndarray | None]]:
        rng = np.random.default_rng([step, 13])
        first, clips, bounds = self.clips * step, self.clips, STEPS
        if rng.random() < LONG_SHARE:
            steps = log_uniform(rng, LONG_STEPS, self.longest)
            # About as many rows as short clips have; all are of one length, so that nothing is padded.
            clips, bounds = max(1, self.clips * STEPS[1] // steps), (steps, steps)
        found: list[tuple[Packed, np.ndarray | None]] = []
        if rng.random() < TEXT_SHARE * clips:
            chosen = [
                self.conversations[int(index)] for index in rng.integers(len(self.conversations), size=TEXT_ROWS)
            ]
            found.append((pack_text(self.tokenizer, chosen), None))
        # Conversations take the place of a clip.
        return found + [self.clip(first + index, *bounds) for index in range(len(found), clips)]

    def clip(self, number: int, low: int, high: int) -> tuple[Packed, np.ndarray]:
        """A training clip of `low` to `high` temporal steps with its questions."""
        rng = np.random.default_rng([number, 11])
        answer = self.answers[number % len(self.answers)]
        story = story_of(answer["seed"])
        steps = max(2 * len(story), log_uniform(rng, low, high))
        asked = [Asked(answer["prompt"], answer["answer_ids"]), *self.exact(story, rng)]
        packed = pack_clip(self.tokenizer, FRAMES_PER_STEP * steps, asked)
        frames = shown(story, steps, rng)
        if rng.random() < 0.5:
            packed = stretched(packed, rng, self.separator, 48_000)
        return packed, frames

    def exact(self, story: Story, rng: np.random.Generator) -> Iterator[Asked]:
        """Short exact answers, and sometimes one that names every scene."""
        every = list(questions(story))
        chosen = [every[index] for index in rng.permutation(len(every))[:QUESTIONS]]
        if rng.random() < 0.4:
            chosen.append(long_exact(story, rng))
        for question in chosen:
            ids = self.tokenizer(question.answer)["input_ids"]
            yield Asked(question.text, [*ids, self.tokenizer.eos_token_id], EXACT_WEIGHT)


class VideoTraining:
    """`step()` is one optimizer step on a lesson."""

    def __init__(self, text: Any, tower: Tower, tokenizer: Any, steps: int):
        self.text, self.tower, self.tokenizer, self.steps = text, tower, tokenizer, steps
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.changes = adapt(text, RANK)
        parameters = [each for change in self.changes.values() for each in (change.down, change.up)]
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.done = 0

    @torch.no_grad()
    def on_device(self, lesson: Sequence[tuple[Packed, np.ndarray | None]]) -> list[tuple[Tensor, Packed]]:
        """Input rows of sequences, and the sequences, where the language model is."""
        found = []
        for packed, frames in lesson:
            moved = packed.to(self.text.device)
            visual = None
            if frames is not None:
                visual = self.tower(pixels_of(frames).to(self.text.device, self.text.dtype)).flatten(0, 1)
            found.append((embed(self.text, moved, visual, self.image), moved))
        return found

    def step(self, lesson: Sequence[tuple[Packed, np.ndarray | None]]) -> tuple[float, float]:
        """Loss, and share of tokens that were the likeliest."""
        self.text.train()
        parts = self.on_device(lesson)
        rows = len(parts) * max(len(packed.input_ids) for _, packed in parts)
        if rows > CHECKPOINTED_ROWS[self.text.device.type]:
            self.text.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.text.gradient_checkpointing_disable()
        loss, likeliest, labels = answer_loss(self.text, parts)
        loss.backward()
        progress = self.done / self.steps
        rate = min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress)) if self.done else 1 / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * max(rate, 0.02)
        torch.nn.utils.clip_grad_norm_(
            [each for group in self.optimizer.param_groups for each in group["params"]], 1.0
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.item(), (likeliest == labels).float().mean().item()

    @torch.no_grad()
    def facts_right(self, seeds: range, steps: int = 12) -> dict[str, float]:
        """Share of exact answers that greedy decoding gives, by kind, on clips that were not trained on."""
        self.text.eval()
        counts: dict[str, list[bool]] = {}
        for seed in seeds:
            rng, story = np.random.default_rng([seed, 2]), story_of(seed)
            every = list(questions(story))
            ids = [[*self.tokenizer(each.answer)["input_ids"], self.tokenizer.eos_token_id] for each in every]
            asked = [Asked(each.text, answer) for each, answer in zip(every, ids, strict=True)]
            packed = pack_clip(self.tokenizer, FRAMES_PER_STEP * steps, asked)
            _, likeliest, labels = answer_loss(self.text, self.on_device([(packed, shown(story, steps, rng))]))
            parts = (likeliest == labels).split([len(each) for each in ids])
            for question, part in zip(every, parts, strict=True):
                counts.setdefault(question.kind, []).append(bool(part.all()))
        return {kind: float(np.mean(each)) for kind, each in counts.items()}

    def save(self, file: Path, settings: dict[str, Any]) -> None:
        """A checkpoint."""
        state = {name: change.state_dict() for name, change in self.changes.items()}
        kept = {
            name: {key: each for key, each in part.items() if key in ("up", "down")} for name, part in state.items()
        }
        save_checkpoint(file, {"done": self.done, "changes": kept, "optimizer": self.optimizer.state_dict()}, settings)

    def load(self, file: Path, settings: dict[str, Any]) -> None:
        """Goes on from a checkpoint of the same settings."""
        state = load_checkpoint(file, settings)
        for name, change in self.changes.items():
            change.load_state_dict(state["changes"][name], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


def conversations() -> Iterator[dict[str, Any]]:
    """Plain conversations of the language model that are kept."""
    with gzip.open(DATA / "answers" / "train-h100.jsonl.gz", "rt") as file:
        for line in file:
            yield json.loads(line)


def good_answers(file: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The answers that name something of the clip, or that do not have to, and little that is not there."""
    kept = []
    for row in map(json.loads, file.read_text().splitlines()):
        shown, wrong = faithfulness(tokenizer.decode(row["answer_ids"]), story_of(row["seed"]))
        if wrong <= 1 and shown >= wrong and len(row["answer_ids"]) >= 12:
            kept.append(row)
    return kept


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True)
    parser.add_argument("--tower", type=Path, required=True, help="file that language.video_tower made")
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="file of the changes")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--clips", type=int, default=1, help="of a step; a GPU learns from 8 in little more time")
    parser.add_argument("--longest", type=int, default=94, help="most temporal steps of a clip; 430 want a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare clips")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, tokenizer = load_text(options.smollm2)
    model = build_vlm(text, tokenizer)
    load_tower(model, options.tower)
    tower = Tower(model).to(options.device, text.dtype).eval()
    training = VideoTraining(text.to(options.device), tower, tokenizer, options.steps)
    checkpoint = options.output.with_suffix(".checkpoint")
    settings = {"steps": options.steps, "clips_per_step": options.clips, "longest": options.longest}
    files = {"tower_sha256": file_digest(options.tower), "answers_sha256": file_digest(options.answers)}
    if checkpoint.exists():
        training.load(checkpoint, settings | files)
    answers = good_answers(options.answers, tokenizer)
    print(f"{len(answers)} long answers, from step {training.done}", flush=True)
    lessons = DataLoader(
        Lessons(tokenizer, answers, options.clips, options.longest),
        sampler=range(training.done, options.steps),
        batch_size=None,
        num_workers=options.workers,
        collate_fn=lambda lesson: lesson,
    )
    losses: list[tuple[float, float]] = []
    for lesson in lessons:
        losses.append(training.step(lesson))
        if training.done % 10 == 0:
            loss, right = np.mean(losses[-10:], axis=0)
            print(f"step {training.done}: loss {loss:.3f}, tokens right {right:.3f}", flush=True)
        if training.done % SAVE_EVERY == 0 or training.done == options.steps:
            training.save(checkpoint, settings | files)
            print(json.dumps(training.facts_right(VALIDATION_SEEDS[:3])), flush=True)
    save_file(factors(training.changes), options.output)
    right = {name: training.facts_right(VALIDATION_SEEDS[:16], steps) for name, steps in VALIDATION_STEPS.items()}
    about = {**settings, "rank": RANK, "long_answers": len(answers), "right": right}
    write_json(options.output.with_suffix(".json"), about, indent=1)


if __name__ == "__main__":
    main()

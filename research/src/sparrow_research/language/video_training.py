"""Teaches SmolLM2 to read soft captions and to answer about them: changes of low rank, no tower in the loop.

    python -m sparrow_research.language.video_training --smollm2 FOLDER --answers FILE --output FILE [--steps N]

A frame's visual tokens are the embeddings of its words, with the tower's errors as noise. Behind a clip stand one long
answer of the language model's own (`video_answers`), which it gave with the facts as text, and short exact answers; a
part of the steps are plain conversations, so that text goes on working. In half of the steps positions jump between
frames, as if most of a long video had been left out: SmolLM2 learns distances that it was never trained for. A stopped
training goes on from its last checkpoint.
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

from sparrow_hf.artifacts import atomic_path, write_json
from sparrow_hf.testbed.scenes import Story, sample_timeline
from sparrow_hf.testbed.world import FRAMES_PER_STEP, VALIDATION_SEEDS

from .road import DATA
from .video_answers import faithfulness, story_of
from .video_facts import candidate_words, clip_words, long_exact, questions
from .video_rows import IGNORED, Asked, Packed, pack_clip, pack_text
from .video_target import adapt, factors, load_text

RANK = 16
QUESTIONS = 14
TEXT_SHARE, TEXT_ROWS = 0.08, 3
LONG_SHARE = 0.02
STEPS = (5, 20)
LONG_STEPS = (40, 94)
"""Temporal steps of most clips and of some: 94 have 3,000 visual tokens."""
EXACT_WEIGHT = 3.0
FLIPPED = 0.004
"""Share of visual tokens that stand for another word of their slot."""
NOISE = 0.1
"""Relative size of the error of a visual token, at most."""
LEARNING_RATE, WARMUP = 1e-3, 0.06
CHECKPOINTED_ROWS = {"cpu": 2_000, "cuda": 60_000}
"""With more rows in a step their states are computed again for the gradient: a row keeps about a megabyte."""
SAVE_EVERY = 40


class SoftCaptions:
    """Embeddings of frames, as a tower with a few errors would give them."""

    def __init__(self, embedding: Tensor, tokenizer: Any):
        self.embedding = embedding.detach()
        self.candidates = [[tokenizer(word)["input_ids"][0] for word in words] for words in candidate_words()]
        self.ids = {word: tokenizer(word)["input_ids"][0] for words in candidate_words() for word in words}

    def __call__(self, frames: list[tuple[str, ...]], rng: np.random.Generator | None = None) -> Tensor:
        """`(frames · SLOTS, hidden)`; without `rng` free of errors."""
        ids = [[self.ids[word] for word in words] for words in frames]
        if rng is not None:
            for frame, slot in zip(*np.nonzero(rng.random((len(ids), len(ids[0]))) < FLIPPED), strict=True):
                ids[frame][slot] = self.candidates[slot][int(rng.integers(len(self.candidates[slot])))]
        rows = self.embedding[torch.tensor(ids).flatten()]
        if rng is not None:
            rms = rows.float().pow(2).mean(-1, keepdim=True).sqrt()
            noise = torch.from_numpy(rng.standard_normal(rows.shape, dtype=np.float32))
            rows = (rows.float() + float(rng.uniform(0, NOISE)) * rms * noise).to(rows.dtype)
        return rows


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
    longest = max(len(packed.input_ids) for _, packed in parts)

    def padded(rows: Tensor, value: float = 0) -> Tensor:
        return functional.pad(rows, (0, longest - len(rows)), value=value)

    rows = torch.cat([functional.pad(rows, (0, 0, 0, longest - rows.shape[1])) for rows, _ in parts])
    # A row of padding sees itself, or its softmax would be over nothing.
    mask = torch.eye(longest, dtype=torch.bool, device=rows.device).repeat(len(parts), 1, 1, 1)
    for seen, (_, packed) in zip(mask, parts, strict=True):
        seen[:, : len(packed.input_ids), : len(packed.input_ids)] = packed.mask()[0]
    positions = torch.stack([padded(packed.positions) for _, packed in parts])
    states = text.model(
        inputs_embeds=rows, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    labels = torch.stack([padded(packed.labels, IGNORED) for _, packed in parts])
    weights = torch.stack([padded(packed.weights / packed.weights.sum()) for _, packed in parts]) / len(parts)
    wanted = labels != IGNORED
    logits = text.lm_head(states[wanted]).float()
    losses = functional.cross_entropy(logits, labels[wanted], reduction="none")
    return (losses * weights[wanted]).sum(), logits.argmax(-1), labels[wanted]


class Lessons(Dataset):
    """What is learned in each step: packed sequences, and the visual rows of those with a clip.

    Everything is drawn from the number of the step, so that a stopped training goes on with the same.
    """

    def __init__(self, captions: SoftCaptions, tokenizer: Any, answers: list[dict[str, Any]], clips: int):
        self.captions, self.tokenizer, self.answers, self.clips = captions, tokenizer, answers, clips
        self.separator = tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
        self.conversations = list(conversations())

    def __getitem__(self, step: int) -> list[tuple[Packed, Tensor | None]]:
        rng = np.random.default_rng([step, 13])
        found: list[tuple[Packed, Tensor | None]] = [
            self.clip(self.clips * step + index) for index in range(self.clips)
        ]
        if rng.random() < TEXT_SHARE * self.clips:
            chosen = [
                self.conversations[int(index)] for index in rng.integers(len(self.conversations), size=TEXT_ROWS)
            ]
            found[0] = (pack_text(self.tokenizer, chosen), None)
        return found

    def clip(self, number: int) -> tuple[Packed, Tensor]:
        """A training clip with its questions."""
        rng = np.random.default_rng([number, 11])
        answer = self.answers[number % len(self.answers)]
        story = story_of(answer["seed"])
        low, high = LONG_STEPS if rng.random() < LONG_SHARE else STEPS
        steps = max(2 * len(story), int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
        asked = [Asked(answer["prompt"], answer["answer_ids"]), *self.exact(story, rng)]
        packed = pack_clip(self.tokenizer, FRAMES_PER_STEP * steps, asked)
        visual = self.captions(clip_words(story, sample_timeline(rng, story, steps)), rng)
        if rng.random() < 0.5:
            packed = stretched(packed, rng, self.separator, 48_000)
        return packed, visual

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

    def __init__(self, text: Any, tokenizer: Any, steps: int):
        self.text, self.tokenizer, self.steps = text, tokenizer, steps
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.changes = adapt(text, RANK)
        self.captions = SoftCaptions(text.get_input_embeddings().weight.cpu(), tokenizer)
        parameters = [each for change in self.changes.values() for each in (change.down, change.up)]
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.done = 0

    def on_device(self, lesson: Sequence[tuple[Packed, Tensor | None]]) -> list[tuple[Tensor, Packed]]:
        """Input rows of sequences, and the sequences, where the language model is."""
        found = []
        for packed, visual in lesson:
            moved = packed.to(self.text.device)
            found.append((embed(self.text, moved, visual, self.image), moved))
        return found

    def step(self, lesson: Sequence[tuple[Packed, Tensor | None]]) -> tuple[float, float]:
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
            visual = self.captions(clip_words(story, sample_timeline(rng, story, steps)))
            _, likeliest, labels = answer_loss(self.text, self.on_device([(packed, visual)]))
            parts = (likeliest == labels).split([len(each) for each in ids])
            for question, part in zip(every, parts, strict=True):
                counts.setdefault(question.kind, []).append(bool(part.all()))
        return {kind: float(np.mean(each)) for kind, each in counts.items()}

    def save(self, file: Path) -> None:
        """A checkpoint."""
        state = {name: change.state_dict() for name, change in self.changes.items()}
        kept = {
            name: {key: each for key, each in part.items() if key in ("up", "down")} for name, part in state.items()
        }
        with atomic_path(file) as partial:
            torch.save({"done": self.done, "changes": kept, "optimizer": self.optimizer.state_dict()}, partial)

    def load(self, file: Path) -> None:
        """Goes on from a checkpoint."""
        state = torch.load(file, map_location="cpu", weights_only=True)
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
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="file of the changes")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--clips", type=int, default=1, help="of a step; a GPU learns from 8 in little more time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare clips")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, tokenizer = load_text(options.smollm2)
    training = VideoTraining(text.to(options.device), tokenizer, options.steps)
    checkpoint = options.output.with_suffix(".checkpoint")
    if checkpoint.exists():
        training.load(checkpoint)
    answers = good_answers(options.answers, tokenizer)
    print(f"{len(answers)} long answers, from step {training.done}", flush=True)
    lessons = DataLoader(
        Lessons(training.captions, tokenizer, answers, options.clips),
        sampler=range(training.done, options.steps),
        batch_size=None,
        num_workers=options.workers,
    )
    losses: list[tuple[float, float]] = []
    for lesson in lessons:
        losses.append(training.step(lesson))
        if training.done % 10 == 0:
            loss, right = np.mean(losses[-10:], axis=0)
            print(f"step {training.done}: loss {loss:.3f}, tokens right {right:.3f}", flush=True)
        if training.done % SAVE_EVERY == 0 or training.done == options.steps:
            training.save(checkpoint)
            print(json.dumps(training.facts_right(VALIDATION_SEEDS[:3])), flush=True)
    save_file(factors(training.changes), options.output)
    right = training.facts_right(VALIDATION_SEEDS[:16])
    settings = {"steps": options.steps, "clips_per_step": options.clips, "rank": RANK, "long_answers": len(answers)}
    write_json(options.output.with_suffix(".json"), {**settings, "validation": right}, indent=1)


if __name__ == "__main__":
    main()

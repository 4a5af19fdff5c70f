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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from sparrow_hf.artifacts import atomic_path, write_json
from sparrow_hf.testbed.scenes import Story, sample_timeline
from sparrow_hf.testbed.world import FRAMES_PER_STEP, VALIDATION_SEEDS

from .road import DATA
from .video_answers import faithfulness, story_of
from .video_facts import candidate_words, clip_words, long_exact, questions
from .video_rows import IGNORED, Asked, Packed, pack_clip, pack_text
from .video_target import adapt, factors, load_text

RANK = 16
CLIPS_PER_STEP, QUESTIONS = 1, 14
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
CHECKPOINTED_ROWS = 2000
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
        rows[packed.input_ids == image_token_id] = visual.to(rows.dtype)
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


def answer_loss(text: Any, rows: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss of a packed sequence, and the likeliest token at every label beside the labels."""
    states = text.model(
        inputs_embeds=rows, attention_mask=packed.mask(), position_ids=packed.positions[None], use_cache=False
    ).last_hidden_state[0]
    wanted = packed.labels != IGNORED
    logits = text.lm_head(states[wanted]).float()
    labels, weights = packed.labels[wanted], packed.weights[wanted]
    loss = (functional.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    return loss, logits.argmax(-1), labels


class VideoTraining:
    """`step()` is one optimizer step; everything is drawn from the number of the step."""

    def __init__(self, text: Any, tokenizer: Any, answers: list[dict[str, Any]], steps: int):
        self.text, self.tokenizer, self.steps = text, tokenizer, steps
        self.image, self.separator = (
            tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<fake_token_around_image>")
        )
        self.changes = adapt(text, RANK)
        self.captions = SoftCaptions(text.get_input_embeddings().weight, tokenizer)
        self.answers, self.conversations = answers, list(conversations())
        parameters = [each for change in self.changes.values() for each in (change.down, change.up)]
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.done = 0

    def clip(self, number: int) -> tuple[Tensor, Packed]:
        """Rows of a training clip with its questions."""
        rng = np.random.default_rng([number, 11])
        answer = self.answers[number % len(self.answers)]
        story = story_of(answer["seed"])
        low, high = LONG_STEPS if rng.random() < LONG_SHARE else STEPS
        steps = max(2 * len(story), int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
        asked = [Asked(answer["prompt"], answer["answer_ids"]), *self.exact(story, rng)]
        packed = pack_clip(self.tokenizer, FRAMES_PER_STEP * steps, asked)
        visual = self.captions(clip_words(story, sample_timeline(rng, story, steps)), rng)
        rows = embed(self.text, packed, visual, self.image)
        if rng.random() < 0.5:
            packed = stretched(packed, rng, self.separator, 48_000)
        return rows, packed

    def exact(self, story: Story, rng: np.random.Generator) -> Iterator[Asked]:
        """Short exact answers, and sometimes one that names every scene."""
        every = list(questions(story))
        chosen = [every[index] for index in rng.permutation(len(every))[:QUESTIONS]]
        if rng.random() < 0.4:
            chosen.append(long_exact(story, rng))
        for question in chosen:
            ids = self.tokenizer(question.answer)["input_ids"]
            yield Asked(question.text, [*ids, self.tokenizer.eos_token_id], EXACT_WEIGHT)

    def step(self) -> tuple[float, float]:
        """Loss, and share of tokens that were the likeliest."""
        rng = np.random.default_rng([self.done, 13])
        self.text.train()
        total, right, tokens = 0.0, 0, 0
        parts: list[tuple[Tensor, Packed]] = [
            self.clip(CLIPS_PER_STEP * self.done + index) for index in range(CLIPS_PER_STEP)
        ]
        if rng.random() < TEXT_SHARE * CLIPS_PER_STEP:
            chosen = [
                self.conversations[int(index)] for index in rng.integers(len(self.conversations), size=TEXT_ROWS)
            ]
            packed = pack_text(self.tokenizer, chosen)
            parts[0] = (embed(self.text, packed, None, self.image), packed)
        for rows, packed in parts:
            if len(packed.input_ids) > CHECKPOINTED_ROWS:
                self.text.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.text.gradient_checkpointing_disable()
            loss, likeliest, labels = answer_loss(self.text, rows, packed)
            (loss / len(parts)).backward()
            total += loss.item() / len(parts)
            right, tokens = right + int((likeliest == labels).sum()), tokens + len(labels)
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
        return total, right / tokens

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
            rows = embed(
                self.text, packed, self.captions(clip_words(story, sample_timeline(rng, story, steps))), self.image
            )
            _, likeliest, labels = answer_loss(self.text, rows, packed)
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
        state = torch.load(file, weights_only=True)
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
    for line in file.read_text().splitlines():
        row = json.loads(line)
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
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, tokenizer = load_text(options.smollm2)
    answers = good_answers(options.answers, tokenizer)
    training = VideoTraining(text, tokenizer, answers, options.steps)
    checkpoint = options.output.with_suffix(".checkpoint")
    if checkpoint.exists():
        training.load(checkpoint)
    print(f"{len(answers)} long answers, from step {training.done}", flush=True)
    losses: list[tuple[float, float]] = []
    while training.done < options.steps:
        losses.append(training.step())
        if training.done % 10 == 0:
            loss, right = np.mean(losses[-10:], axis=0)
            print(f"step {training.done}: loss {loss:.3f}, tokens right {right:.3f}", flush=True)
        if training.done % SAVE_EVERY == 0 or training.done == options.steps:
            training.save(checkpoint)
            print(json.dumps(training.facts_right(VALIDATION_SEEDS[:3])), flush=True)
    save_file(factors(training.changes), options.output)
    right = training.facts_right(VALIDATION_SEEDS[:16])
    about = {"steps": options.steps, "rank": RANK, "long_answers": len(answers), "validation": right}
    write_json(options.output.with_suffix(".json"), about, indent=1)


if __name__ == "__main__":
    main()

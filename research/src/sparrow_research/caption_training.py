"""Second part of the target's training: its language model learns to caption clips, short and simple ones first.

The vision tower is frozen by now, so each clip passes it once and the language model is fed with its rows. Captions of
one clip share the rows of the prompt up to the video's end: these are computed once and every caption continues from
their keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedTokenizerFast

from sparrow_hf._transformers import CACHE
from sparrow_hf.data.messages import messages_for
from sparrow_hf.testbed.captions import CLAIM_WORDS, STYLES, meaning, sample_prompt, write_caption
from sparrow_hf.testbed.families import family_of
from sparrow_hf.testbed.nano import build_target
from sparrow_hf.testbed.scenes import Story, sample_story, sample_timeline
from sparrow_hf.testbed.tokenizer import VOCABULARY_SIZE
from sparrow_hf.testbed.world import render

from .family_training import training_of
from .vision_pretraining import through_codec


@dataclass(frozen=True)
class Stage:
    """One stretch of the curriculum: a decoder of `layers`, clips of `scenes` and `visual_tokens` (lowest, highest).

    A step learns from `clips` × `captions_per_clip` captions. Longer clips take fewer of them, see `clips_for`. The
    learning rate goes from the first to the second value.
    """

    name: str
    steps: int
    layers: int
    scenes: tuple[int, int]
    visual_tokens: tuple[int, int]
    clips: int
    captions_per_clip: int
    learning_rate: tuple[float, float]


IGNORED = -100

CLAIM_WEIGHT = 8.0
"""Loss weight of what a claim word means, next to the word itself, which weighs 1 like any other.

Most of the loss of a caption is the entropy of its wording, which no model can learn away and whose gradients drown
what can be learned."""

SLOW_CLAIM_WEIGHT = 32.0
SLOW_CLAIM_WORDS = ("left", "right")
"""The second word of a corner: rarely in question, and learned last."""


class ClipGroup:
    """A few clips of one visual length, seen through the codec and the frozen tower.

    Of several processes each makes its share of the clips; all clips have one length.
    """

    def __init__(
        self,
        target: Any,
        processor: Any,
        stage: Stage,
        seed: list[int],
        process: int = 0,
        num_processes: int = 1,
    ):
        tokens_per_step, training = family_of(target).tokens_per_step, training_of(target)
        rng = np.random.default_rng(seed)
        low, high = (math.log(bound / tokens_per_step) for bound in stage.visual_tokens)
        self.num_steps = max(stage.scenes[1], round(math.exp(rng.uniform(low, high))))
        num_clips = clips_for(stage, tokens_per_step * self.num_steps)
        self.stories: list[Story] = []
        frames = []
        if process:
            rng = np.random.default_rng([*seed, process])
        for _ in range(max(1, round(num_clips / num_processes))):
            story = sample_story(rng, *stage.scenes)
            frames.append(through_codec(render(story, sample_timeline(rng, story, self.num_steps), rng)))
            self.stories.append(story)
        # The tower looks at every temporal step by itself, so all clips may pass it as one.
        with torch.no_grad():
            features = training.visual_features(target, processor, np.concatenate(frames))
            self.features = features.view(len(frames), -1, features.shape[-1])
            self.num_visual_tokens = training.video_rows(target, self.features).shape[1]


def clips_for(stage: Stage, visual_tokens: int) -> int:
    """How many clips of `visual_tokens` a training step takes: about a constant number of rows."""
    typical = math.sqrt(stage.visual_tokens[0] * stage.visual_tokens[1])
    caption_rows = 140 * stage.captions_per_clip
    share = (typical + caption_rows) / (visual_tokens + caption_rows)
    return max(1, round(stage.clips * share))


@dataclass(frozen=True)
class CaptionBatch:
    """Token ids of one training step.

    `prefix` `(prefix,)` is the prompt up to the video's end, the same for all clips; `suffixes` `(captions, longest)`
    the rest of each prompt with its caption, padded on the right; `labels` the same, all but captions ignored.
    """

    prefix: torch.Tensor
    suffixes: torch.Tensor
    labels: torch.Tensor


def draw_captions(
    processor: Any,
    group: ClipGroup,
    captions_per_clip: int,
    rng: np.random.Generator,
    write: Callable[[np.random.Generator, Story, str], str] = write_caption,
) -> CaptionBatch:
    """Captions every clip of a group `captions_per_clip` times, asked for different styles, as `write` does it."""
    tokenizer = processor.tokenizer
    rows, num_visible = [], []
    for story in group.stories:
        for style in rng.choice(len(STYLES), captions_per_clip, replace=captions_per_clip > len(STYLES)):
            name = STYLES[int(style)]
            prompt = processor.apply_chat_template(
                messages_for("", sample_prompt(rng, name)), tokenize=False, add_generation_prompt=True
            )
            asked = tokenizer(prompt)["input_ids"]
            told = tokenizer(write(rng, story, name))["input_ids"] + [tokenizer.eos_token_id]
            video = asked.index(processor.video_token_id)
            prefix = asked[:video] + [processor.video_token_id] * group.num_visual_tokens + [asked[video + 1]]
            rows.append(asked[video + 2 :] + told)
            num_visible.append(len(told))
    suffixes = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(suffixes, IGNORED)
    for index, (row, visible) in enumerate(zip(rows, num_visible, strict=True)):
        suffixes[index, : len(row)] = torch.tensor(row)
        labels[index, len(row) - visible : len(row)] = suffixes[index, len(row) - visible : len(row)]
    return CaptionBatch(torch.tensor(prefix), suffixes, labels)


def caption_logits(target: Any, features: torch.Tensor, batch: CaptionBatch) -> torch.Tensor:
    """Logits `(captions, longest suffix, vocabulary)` of the suffixes, each after its clip.

    Equal to the target's own forward on pixels and whole sequences, with the positions `generate()` uses.
    """
    training = training_of(target)
    clips, captions = len(features), len(batch.suffixes)
    positions = training.positions(target, torch.cat([batch.prefix, batch.suffixes[0]])[None])
    prefix_positions, suffix_positions = positions.split([len(batch.prefix), batch.suffixes.shape[1]], dim=-1)
    axes = positions.shape[:-2]

    embed = target.get_input_embeddings()
    rows = embed(batch.prefix).expand(clips, -1, -1).clone()
    rows[:, batch.prefix == target.config.video_token_id] = training.video_rows(target, features)
    decoder = target.model.language_model
    cache = DynamicCache(config=target.config.text_config)
    decoder(inputs_embeds=rows, position_ids=prefix_positions.expand(*axes, clips, -1), **{CACHE: cache})
    cache.batch_repeat_interleave(captions // clips)
    states = decoder(
        inputs_embeds=embed(batch.suffixes),
        position_ids=suffix_positions.expand(*axes, captions, -1),
        **{CACHE: cache},
    ).last_hidden_state
    return target.lm_head(states)


class Claims:
    """What tokens claim: `meanings` `(vocabulary,)`, the first token that claims the same, and `weights` in the loss.

    Tokens that claim nothing mean `IGNORED` and weigh nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.meanings = torch.full((VOCABULARY_SIZE,), IGNORED)
        self.weights = torch.zeros(VOCABULARY_SIZE)
        first: dict[tuple[str, str], int] = {}
        for word in sorted(CLAIM_WORDS):
            token = tokenizer.convert_tokens_to_ids(word)
            self.meanings[token] = first.setdefault(meaning(word), token)
            self.weights[token] = SLOW_CLAIM_WEIGHT if word in SLOW_CLAIM_WORDS else CLAIM_WEIGHT


def caption_loss(logits: torch.Tensor, labels: torch.Tensor, claims: Claims) -> torch.Tensor:
    """Mean cross-entropy of the caption tokens, and of what they claim, weighted.

    A claim is right in any of its wordings: their probabilities are summed first.
    """
    told = labels[:, 1:] != IGNORED
    labels = labels[:, 1:][told]
    log_probabilities = logits[:, :-1][told].log_softmax(-1)
    words = functional.nll_loss(log_probabilities, labels, reduction="sum")
    # (tokens, vocabulary): the wordings of what each token claims; if it claims nothing, it weighs nothing.
    wordings = claims.meanings == claims.meanings[labels, None]
    meant = log_probabilities.masked_fill(~wordings, -torch.inf).logsumexp(-1)
    weights = claims.weights[labels]
    return (words - (weights * meant).sum()) / (len(labels) + weights.sum())


@torch.no_grad()
def deepen(target: Any, tokenizer: PreTrainedTokenizerFast, num_layers: int) -> Any:
    """A target of `num_layers` decoder layers that computes exactly what `target` does.

    New layers stand evenly between the old ones and start as copies of the layer below that write nothing into the
    residual stream. Half the depth learns the basics in half the time.
    """
    old_layers = target.config.text_config.num_hidden_layers
    if num_layers % old_layers:
        raise ValueError(f"{num_layers} layers cannot be spread evenly over {old_layers}.")
    copies = num_layers // old_layers
    deeper = _with_layers(target, tokenizer, [layer // copies for layer in range(num_layers)])
    for index, layer in enumerate(deeper.model.language_model.layers):
        if index % copies:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return deeper


def thin_out(target: Any, tokenizer: PreTrainedTokenizerFast, num_layers: int) -> Any:
    """A target of `num_layers` decoder layers, evenly taken from those of `target`, and all the rest of its weights.

    What it says is worth nothing until it is trained on.
    """
    old_layers = target.config.text_config.num_hidden_layers
    if old_layers % num_layers:
        raise ValueError(f"{num_layers} layers cannot be taken evenly from {old_layers}.")
    return _with_layers(target, tokenizer, range(0, old_layers, old_layers // num_layers))


def _with_layers(target: Any, tokenizer: PreTrainedTokenizerFast, layers: Sequence[int]) -> Any:
    """A copy of `target` that has, one after another, copies of those of its decoder layers."""
    stem = ".language_model.layers."
    weights = target.state_dict()
    copied = {name: tensor for name, tensor in weights.items() if stem not in name}
    for new, old in enumerate(layers):
        copied |= {
            name.replace(f"{stem}{old}.", f"{stem}{new}."): tensor
            for name, tensor in weights.items()
            if f"{stem}{old}." in name
        }
    copy = build_target(tokenizer, len(layers), family=family_of(target))
    copy.load_state_dict(copied)
    return copy

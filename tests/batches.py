"""Random batches of one promise: row by row, `generate()` with a draft gives the tokens that it gives without.

A case is a function of its number, as in `lossless.py`, of which it takes what concerns a single sequence.
"""

import functools
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from sparrow_hf import SparrowDraftModel
from sparrow_hf._transformers import CACHE, new_cache
from sparrow_hf.generation import batches
from sparrow_hf.generation.batch_drafts import BatchDrafter

from families import FAMILY_BY_NAME
from lossless import PROCESSORS, SAMPLERS, SERVED, EveryNthToken, RecordingStreamer, built_target
from tiny_targets import Family

#: Layers that need prompts of one length.
COUNTS_PADDING = "minimax_m3_sparse"

QUESTIONS = (
    "What moves here?",
    "Who?",
    "Tell me a long story about all the things that you have seen in it.",
    "Why so?",
)
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class OtherRowsToken(LogitsProcessor):
    """A processor that ties the rows of a batch: no row repeats the newest token of the row before."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, input_ids[:, -1:].roll(1, dims=0), -torch.inf)


class EveryOtherStep(LogitsProcessor):
    """A processor with a state: in every other call it forbids the most likely token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf) if self.calls % 2 else scores


class OtherRowStops(EveryNthToken):
    """A criterion that ties the rows: a row stops with the row before it."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return super().__call__(input_ids, scores).roll(1)


#: Processors and criteria of the user's own, made anew for each call.
OWN: dict[str, dict[str, Any]] = {
    "none": {},
    "ties rows": {"logits_processor": lambda: LogitsProcessorList([OtherRowsToken()])},
    "keeps a state": {"logits_processor": lambda: LogitsProcessorList([EveryOtherStep()])},
    "knows the rows": {"prefix_allowed_tokens_fn": lambda: lambda row, ids: list(range(20 + 9 * row, 60 + 9 * row))},
    "rows stop": {"stopping_criteria": lambda: StoppingCriteriaList([EveryNthToken(9)])},
    "rows stop others": {"stopping_criteria": lambda: StoppingCriteriaList([OtherRowStops(9)])},
}


class OracleDrafter(BatchDrafter):
    """Proposes what it is told: each row's future, up to a depth of its own, and then other tokens.

    Args:
        futures: For each row, all tokens plain `generate()` emitted.
        adversarial: Leave each row's future at a random depth of each round.
    """

    def __init__(self, *args: Any, futures: Sequence[list[int]], adversarial: bool, seed: int):
        super().__init__(*args)
        self._futures, self._adversarial, self._random = futures, adversarial, random.Random(seed)
        self._known = [1] * len(futures)

    def extend(self, features: Tensor, next_tokens: Sequence[list[int]]) -> None:
        super().extend(features, next_tokens)
        self._known = [known + len(new) for known, new in zip(self._known, next_tokens, strict=True)]

    def propose(self, roots: Tensor, fill: Tensor, max_levels: int) -> Tensor:
        chains = super().propose(roots, fill, max_levels)
        levels, config = chains.shape[1] - 1, self._draft.config
        allowed = [token for token in range(config.vocab_size) if token not in config.visual_token_ids]
        for row in self.rows:
            truth = self._futures[row][self._known[row] :][:levels]
            depth = self._random.randint(0, levels) if self._adversarial else levels
            truth = [token for token in truth[:depth] if token in allowed]
            truth += self._random.choices(allowed, k=levels - len(truth))
            chains[row, 1:] = chains.new_tensor(truth)
        return chains


@contextmanager
def drafting_around(futures: Sequence[list[int]], *, adversarial: bool, seed: int = 0) -> Iterator[None]:
    """Lets every batch inside be drafted for around `futures`."""
    oracle = functools.partial(OracleDrafter, futures=futures, adversarial=adversarial, seed=seed)
    with mock.patch.object(batches, "BatchDrafter", oracle):
        yield


def batch_of(family: Family, target: PreTrainedModel, prompts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """One batch of several prompts, arguments of `Family.build_inputs`."""
    parts = [family.build_inputs(target, **prompt) for prompt in prompts]
    return joined(parts, family.tokenizer.pad_token_id)


def joined(prompts: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Left-padded inputs of several processed prompts, some of them without a video."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        parts = [prompt[name] for prompt in prompts if name in prompt]
        if name in PER_TOKEN:
            fill = pad_token_id if name == "input_ids" else 0
            # A prompt without a video may come without the types of its tokens.
            parts = [prompt.get(name, torch.zeros_like(prompt["input_ids"])) for prompt in prompts]
            parts = [F.pad(part, (longest - part.shape[1], 0), value=fill) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


@dataclass(frozen=True)
class BatchCase:
    """One comparison; `generate_kwargs` holds what both arms are given."""

    number: int
    family: str
    attn_implementation: str
    drafter: str
    draft_fields: dict[str, Any]
    prompts: list[dict[str, Any]]
    generate_kwargs: dict[str, Any]
    own: str
    wants: str
    draft_vocab_size: int | None


def make_case(number: int, **fixed: Any) -> BatchCase:
    """The case of this number, with some fields fixed."""
    rng = random.Random(f"batch {number}")
    family = FAMILY_BY_NAME[fixed["family"]] if "family" in fixed else rng.choice(SERVED)
    size = rng.choice([2, 2, 3, 3, 4, 8])
    # Prompts of one length; or, where the target takes no more, one video in the whole batch.
    videos = [0 if family.chains_only == COUNTS_PADDING else rng.randint(0, 1) for _ in range(size)]
    if family.max_videos == 1:
        videos[1:] = [0] * (size - 1)
    levels = rng.randint(0, 6)
    kwargs: dict[str, Any] = {"max_new_tokens": rng.randint(1, 24)} | rng.choice(PROCESSORS)
    kwargs |= rng.choice(SAMPLERS) if rng.random() < 0.25 else {"do_sample": False}
    match rng.choice(["length", "eos", "eos", "strings", "no end"]):
        case "eos":
            kwargs["eos_token_id"] = rng.sample(range(100), k=12)
        case "strings":
            kwargs["stop_strings"] = rng.sample(["e", "th", "in", "an", "7", "Q", " ", "er"], k=3)
        case "no end":
            kwargs["eos_token_id"] = None
            kwargs.pop("exponential_decay_length_penalty", None)
    fields = {
        "family": family.name,
        "attn_implementation": rng.choice(family.attentions),
        "drafter": rng.choice(["random", "oracle", "adversary", "adversary"]),
        "draft_fields": {
            "num_draft_levels": levels,
            "beam_width": rng.choice([1, 1, 1, 3]) if levels else 1,
            "num_glimpse_tokens": rng.choice([0, 2, 5, 64]),
            "position_mode": rng.choice(["compact", "original"]),
            "feature_layers": rng.choice([[-1], [1, 3, -1]]),
            "num_hidden_layers": rng.choice([1, 1, 2]),
        },
        "prompts": [
            {
                "videos": of_row,
                "num_frames": 4,
                "seed": rng.randint(0, 9),
                "question": QUESTIONS[0] if family.chains_only == COUNTS_PADDING else rng.choice(QUESTIONS),
            }
            for of_row in videos
        ],
        "generate_kwargs": kwargs,
        "own": rng.choice(["none", "none", "none", *OWN]),
        "wants": rng.choice(["ids", "ids", "ids", "streamer", "everything", "cache", "chunks"]),
        "draft_vocab_size": rng.choice([None, None, 40]),
    }
    return BatchCase(number, **(fields | fixed))


def mismatch(case: BatchCase) -> str | None:
    """Runs both arms; what differed, or `None`."""
    family, target = FAMILY_BY_NAME[case.family], built_target(case.family, case.attn_implementation)
    inputs = batch_of(family, target, case.prompts)
    length = inputs["input_ids"].shape[1]

    def run(draft: SparrowDraftModel | None) -> tuple[Any, Any, list[list[int]]]:
        options: dict[str, Any] = {name: make() for name, make in OWN[case.own].items()}
        streamer = RecordingStreamer()
        if case.wants == "streamer":
            options["streamer"] = streamer
        elif case.wants == "everything":
            options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        elif case.wants == "cache":
            options[CACHE] = new_cache(target)
        elif case.wants == "chunks" and family.takes_chunks:
            options["prefill_chunk_size"] = 7 + case.number % 20
        torch.manual_seed(case.number)
        output = target.generate(
            **inputs, **case.generate_kwargs, **options, assistant_model=draft, tokenizer=family.tokenizer
        )
        return output, options.get(CACHE), streamer.received

    plain, plain_cache, plain_stream = run(None)
    ids = plain if isinstance(plain, Tensor) else plain.sequences
    futures = ids[:, length:].tolist()
    torch.manual_seed(case.number)
    draft = SparrowDraftModel.from_target(target, **case.draft_fields)
    if case.draft_vocab_size is not None:
        allowed = [token for token in range(draft.config.vocab_size) if token not in draft.config.visual_token_ids]
        draft.set_vocabulary(sorted(random.Random(case.number).sample(allowed, case.draft_vocab_size)))
    around = drafting_around(futures, adversarial=case.drafter == "adversary", seed=case.number)
    with warnings.catch_warnings(), nullcontext() if case.drafter == "random" else around:
        warnings.filterwarnings("ignore", "a batch is verified as chains")
        ours, our_cache, our_stream = run(draft)

    our_ids = ours if isinstance(ours, Tensor) else ours.sequences
    if not torch.equal(ids, our_ids):
        return f"tokens {futures} became {our_ids[:, length:].tolist()}"
    if plain_stream != our_stream:
        return f"the streamer got {our_stream}, not {plain_stream}"
    if case.wants == "everything":
        for name in ("scores", "logits"):
            for step, (expected, found) in enumerate(zip(plain[name], ours[name], strict=True)):
                if not torch.allclose(expected.softmax(-1), found.softmax(-1), atol=1e-4):
                    return f"{name} differ at step {step}"
        plain_cache, our_cache = plain[CACHE], ours[CACHE]
    if plain_cache is not None and plain_cache.get_seq_length() != our_cache.get_seq_length():
        return f"the cache holds {our_cache.get_seq_length()} rows, not {plain_cache.get_seq_length()}"
    return None

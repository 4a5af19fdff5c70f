"""Random cases of one promise: `generate(assistant_model=draft)` gives the tokens plain `generate()` gives.

A case is a function of its number: family, attention, draft, tree shape, processors, stop rule, whether the prompt is
padded, read in chunks, or the second turn of a conversation, and whether the draft decodes in fixed shapes.
"""

import copy
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sparrow_hf import SparrowDraftModel, TreeShape
from sparrow_hf._transformers import CACHE

from families import ALL_FAMILIES, FAMILY_BY_NAME
from oracles import drafting_around

#: Those that drafts are accepted for. The cases of a number are the same with and without timm.
SERVED = tuple(family for family in ALL_FAMILIES if family.refused is None and family.name != "perception_lm")

#: Ways to bring a prompt.
PROMPTS = ("plain", "plain", "padded", "chunked", "second turn")

#: Processors of every kind: none, of one row, of the history, that forbid, that force.
PROCESSORS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[7], [11, 12]], "suppress_tokens": [3, 5]},
    {"min_new_tokens": 6},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "exponential_decay_length_penalty": (4, 1.1)},
)
SAMPLERS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_p": 0.8, "temperature": 1.3},
    {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.3},
)


class EveryNthToken(StoppingCriteria):
    """A criterion of the user's own: stop once the newest token's id is a multiple of `n`."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % self.n == 0


class RecordingStreamer(BaseStreamer):
    """Keeps what it is given, call by call."""

    def __init__(self) -> None:
        self.received: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.received.append(value.flatten().tolist())

    def end(self) -> None:
        self.received.append([-1])


@dataclass(frozen=True)
class Case:
    """One comparison; `generate_kwargs` holds what both arms are given."""

    number: int
    family: str
    attn_implementation: str
    drafter: str
    draft_fields: dict[str, Any]
    inputs: dict[str, int]
    generate_kwargs: dict[str, Any]
    stop: dict[str, Any]
    draft_vocab_size: int | None
    prompt: str
    cache: str

    def __str__(self) -> str:
        return f"{self.number}-{self.family}-{self.drafter}"


def make_case(number: int, **fixed: Any) -> Case:
    """The case of this number, with some fields fixed."""
    rng = random.Random(number)
    family = rng.choice(SERVED)
    beam = rng.choice([1, 1, 2, 4, 10])
    levels = rng.randint(1, 7)
    shape = TreeShape(levels + 1 if beam == 1 else rng.randint(2, 48), levels, beam)
    stop: dict[str, Any] = {"max_new_tokens": rng.randint(1, 24)}
    match rng.choice(["length", "length", "eos", "strings", "custom"]):
        case "eos":
            stop["eos_token_id"] = rng.sample(range(100), k=12)
        case "strings":
            stop["stop_strings"] = rng.sample(["e", "th", "in", "an", "7", "Q", " ", "er"], k=3)
        case "custom":
            stop["custom"] = rng.randint(5, 15)
    fields = {
        "family": family.name,
        "attn_implementation": rng.choice(family.attentions),
        "drafter": rng.choice(["random", "oracle", "adversary", "adversary"]),
        "draft_fields": {
            **shape._asdict(),
            "num_glimpse_tokens": rng.choice([0, 2, 5, 64]),
            "position_mode": rng.choice(["compact", "original"]),
            "feature_layers": rng.choice([[-1], [-1], [1, 3, -1]]),
            "project_visual": rng.random() < 0.3,
            "input_norm": rng.random() < 0.7,
        },
        "inputs": {
            "videos": min(rng.choice([0, 1, 1, 1, 2]), family.max_videos),
            "num_frames": rng.choice([2, 4]),
            "seed": rng.randint(0, 3),
        },
        "generate_kwargs": rng.choice(SAMPLERS) | rng.choice(PROCESSORS),
        "stop": stop,
        "draft_vocab_size": rng.choice([None, None, 3, 40]),
        "prompt": rng.choice([way for way in PROMPTS if family.takes(way)]),
    }
    fields |= fixed
    # A second turn brings a cache of its own.
    fits = FAMILY_BY_NAME[fields["family"]].chains_only is None and fields["prompt"] != "second turn"
    return Case(number, **({"cache": rng.choice(["dynamic", "static"]) if fits else "dynamic"} | fields))


@functools.cache
def built_target(family: str, attn_implementation: str) -> PreTrainedModel:
    """Targets are shared, so a call must not change one."""
    return FAMILY_BY_NAME[family].build_target(attn_implementation)


def mismatch(case: Case) -> str | None:
    """Runs both arms; what differed (tokens, streamed tokens, scores, logits, cache length), or `None`."""
    family, target = FAMILY_BY_NAME[case.family], built_target(case.family, case.attn_implementation)
    inputs = family.build_inputs(target, **case.inputs)
    if case.prompt == "padded":
        inputs = left_padded(inputs, family.tokenizer.pad_token_id, 1 + case.number % 9)
    if case.prompt == "second turn":
        first = target.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        said = family.tokenizer("\nUser: And then?\nAssistant:", return_tensors="pt")["input_ids"]
        ids = torch.cat((first.sequences, said), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompt_length = inputs["input_ids"].shape[1]

    def run(draft: SparrowDraftModel | None) -> tuple[Any, list[list[int]]]:
        streamer = RecordingStreamer()
        options: dict[str, Any] = {"prefill_chunk_size": 7 + case.number % 20} if case.prompt == "chunked" else {}
        if draft is not None and case.cache == "static":
            options["cache_implementation"] = "static"
        if case.prompt == "second turn":
            options[CACHE] = copy.deepcopy(first[CACHE])
        stop = dict(case.stop)
        if "custom" in stop:
            stop["stopping_criteria"] = StoppingCriteriaList([EveryNthToken(stop.pop("custom"))])
        torch.manual_seed(case.number)
        output = target.generate(
            **inputs,
            **options,
            **case.generate_kwargs,
            **stop,
            assistant_model=draft,
            streamer=streamer,
            tokenizer=family.tokenizer,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        return output, streamer.received

    plain, plain_streamed = run(None)
    torch.manual_seed(case.number)
    draft = SparrowDraftModel.from_target(target, **case.draft_fields)
    if case.draft_vocab_size is not None:
        allowed = [token for token in range(draft.config.vocab_size) if token not in draft.config.visual_token_ids]
        drawn = random.Random(case.number).sample(allowed, case.draft_vocab_size)
        draft.set_vocabulary(torch.tensor(sorted(drawn)))
    future = plain.sequences[0, prompt_length:].tolist()
    with drafter(case, future):
        ours, ours_streamed = run(draft)

    if not torch.equal(plain.sequences, ours.sequences):
        return f"tokens {future} became {ours.sequences[0, prompt_length:].tolist()}"
    if plain_streamed != ours_streamed:
        return f"the streamer got {ours_streamed}, not {plain_streamed}"
    # Recurrent layers have one kernel for a row and one for several. Their logits differ by up to 1e-3, draft or not.
    atol = 1e-2 if family.chains_only == "linear_attention" else 1e-4
    for name in ("scores", "logits"):
        for step, (expected, found) in enumerate(zip(plain[name], ours[name], strict=True)):
            if not agree(expected, found, atol):
                return f"{name} differ at step {step}"
    lengths = plain[CACHE].get_seq_length(), ours[CACHE].get_seq_length()
    if lengths[0] != lengths[1]:
        return f"the cache holds {lengths[1]} rows, not {lengths[0]}"
    stats = draft.last_generation
    if stats is None or stats.new_tokens != len(future):
        return "the statistics count other tokens than were generated"
    return None


def agree(expected: Tensor, found: Tensor, atol: float = 1e-4) -> bool:
    """Whether `(1, V)` scores differ by rounding alone, by which a token at the border of the top k may change."""
    in_expected, in_found = expected.isfinite(), found.isfinite()
    kept = in_expected & in_found
    # Compared as probabilities: processors put infinities in the scores.
    same = torch.allclose(expected[kept].softmax(-1), found[kept].softmax(-1), atol=atol)
    above = expected[in_expected & ~in_found] - found[in_found].min()
    beyond = found[in_found & ~in_expected] - expected[in_expected].min()
    return same and bool((torch.cat((above, beyond)).abs() < atol).all())


def left_padded(inputs: dict[str, Tensor], pad_token_id: int, length: int) -> dict[str, Tensor]:
    """The same prompt behind padding."""
    values = {"input_ids": pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0, "moe_mm_token_type_ids": 0}
    padded = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
    for name in values.keys() & padded.keys():
        padded[name] = F.pad(padded[name], (length, 0), value=values[name])
    return padded


@contextmanager
def drafter(case: Case, future: list[int]) -> Iterator[None]:
    """Replaces what the draft proposes, for the cases in which it is not the draft itself."""
    around = drafting_around(future, adversarial=case.drafter == "adversary", seed=case.number)
    with nullcontext() if case.drafter == "random" else around:
        yield

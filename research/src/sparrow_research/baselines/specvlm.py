"""SpecVLM-like: a small sibling of the target drafts on a prompt whose visual tokens the target has sifted.

Training-free, and no draft over the target's states: the sibling is a whole video LLM of the same vocabulary. It runs
in transformers' own assisted loop, which asks a candidate generator for a chain per round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import CandidateGenerator

from sparrow_hf._transformers import CACHE, drop_newest, replaced_candidate_generator, unwrap
from sparrow_hf.analysis.attention import watching_attention
from sparrow_hf.draft_inputs import visual_mask
from sparrow_hf.evaluation.arms import Arms
from sparrow_hf.measurement import Arm
from sparrow_hf.target_config import visual_token_ids
from sparrow_hf.targets import TargetView

KEPT_SHARE, KEPT_MASS = 0.1, 0.4
"""Visual tokens that stay: those that get most of the attention, up to this mass of it, then others at even strides,
up to this share of all."""
NUM_DRAFT_TOKENS = 5


def choose_visual(scores: Tensor, share: float = KEPT_SHARE, mass: float = KEPT_MASS) -> Tensor:
    """Which visual tokens stay.

        scores      .30 .02 .25 .03 .10 …        attention from the text, any scale
        sorted      .30 .25 .10 …                until `mass` of it is reached
        then        even strides over the rest   until `share` of all tokens are kept

    Args:
        scores: `(V,)` attention that each visual token receives.

    Returns:
        Their indices, ascending: `max(1, round(share · V))` of them, none of none.
    """
    if not len(scores):
        return torch.zeros(0, dtype=torch.long)
    budget = max(1, round(share * len(scores)))
    order = scores.argsort(descending=True, stable=True)
    before = scores[order].cumsum(0) - scores[order]
    heavy = order[before < mass * scores.sum()][:budget]
    others = torch.ones(len(scores), dtype=torch.bool)
    others[heavy] = False
    rest = others.nonzero().squeeze(-1)
    left = budget - len(heavy)
    strided = rest[torch.arange(left) * len(rest) // max(1, left)]
    return torch.cat((heavy, strided)).sort().values


@contextmanager
def drafting_on_pruned_prompts(
    target: PreTrainedModel, sibling: PreTrainedModel, inputs: Mapping[str, Any]
) -> Iterator[None]:
    """While it lasts, the target's assisted generation with `assistant_model=sibling` drafts on the pruned prompt.

    Args:
        inputs: What the processor made of the prompt. The sibling looks at the video by itself: `generate()` would
            hand it the target's own encoding of it, which only a sibling with the same tower can read.

    Raises:
        UnsupportedTargetError: The target's attention cannot be read.
    """
    model: Any = unwrap(target)
    with ExitStack() as stack:

        def generator(generation_config: Any) -> PrunedPromptGenerator:
            return PrunedPromptGenerator(model, sibling, inputs, generation_config.max_length, stack)

        stack.enter_context(replaced_candidate_generator(model, generator))
        yield


class PrunedPromptArm(Arm):
    """An arm whose assistant drafts on the pruned prompt."""

    @property
    def num_draft_levels(self) -> int:
        """Most draft tokens a round can accept."""
        return NUM_DRAFT_TOKENS

    @contextmanager
    def options(self, target: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Arguments this arm adds to `target.generate(**inputs)`; the assistant is given its own prompt inside."""
        assert self.assistant is not None
        with super().options(target, inputs) as options, drafting_on_pruned_prompts(target, self.assistant, inputs):
            yield options


def pruned_prompt_arm(name: str, text: str, arms: Arms) -> PrunedPromptArm:
    """The arm `specvlm:ID` of `sparrow bench`; `ID` is the sibling's short name, folder or Hub id."""
    return PrunedPromptArm(name, assistant=arms.assistant(text))


class PrunedPromptGenerator(CandidateGenerator):
    """Chains that a sibling drafts greedily after its own reading of the pruned prompt.

    The first call drafts nothing: the sibling looks at the video, the target's prefill comes, and the attention its
    text rows pay is watched. The second call has the sibling read what is left of the prompt, rows at their old
    positions.

    Args:
        target, sibling: Video LLMs of one vocabulary.
        inputs: What the processor made of the prompt.
        max_length: Of prompt and answer.
        stack: Takes the hooks off if generation ends early.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        sibling: PreTrainedModel,
        inputs: Mapping[str, Any],
        max_length: int,
        stack: ExitStack,
    ):
        self._target, self._sibling = TargetView(target), TargetView(sibling)
        self._inputs, self._max_length, self._stack = inputs, max_length, stack
        self._is_visual = visual_mask(inputs["input_ids"][0], visual_token_ids(target.config))
        self._scores = torch.zeros(int(self._is_visual.sum()))
        self._watching: ExitStack | None = None
        self._cache: DynamicCache | None = None
        self._drafted_after: list[int] = []  # answer tokens whose rows the sibling's cache holds

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """The answer so far with a chain appended; see [`CandidateGenerator`]."""
        if self._watching is None:
            self._watching = self._stack.enter_context(ExitStack())
            text_rows = (~self._is_visual).nonzero().squeeze(-1)
            self._watching.enter_context(watching_attention(self._target, self._add, text_rows))
            with torch.no_grad():
                self._prompt = embedded_prompt(self._sibling, self._inputs)
            return input_ids, None
        self._watching.close()
        room = min(NUM_DRAFT_TOKENS, self._max_length - input_ids.shape[1] - 1)
        if room < 1:
            return input_ids, None
        with torch.no_grad():
            chain = self._draft(input_ids[0, len(self._is_visual) :].tolist(), room)
        return torch.cat((input_ids, torch.tensor([chain], device=input_ids.device)), dim=1), None

    def _add(self, layer: int, chunks: Iterator[tuple[Tensor, Tensor]]) -> None:
        for _, probabilities in chunks:
            self._scores += probabilities[..., self._is_visual].sum((0, 1)).cpu()

    def _draft(self, answer: list[int], num_tokens: int) -> list[int]:
        """Greedy continuation of the answer; rows of rejected tokens leave the cache first."""
        if self._cache is None:
            self._read_prompt()
        assert self._cache is not None
        held = self._drafted_after
        common = next((i for i, (a, b) in enumerate(zip(held, answer, strict=False)) if a != b), None)
        common = min(len(held), len(answer) - 1) if common is None else common
        if common < len(held):
            drop_newest(self._cache, len(held) - common)
        fed, chain = answer[common:], []
        for _ in range(num_tokens):
            embeds = self._sibling.embedding(torch.tensor([fed], device=self._last_position.device))
            steps = torch.arange(1, len(fed) + 1, device=self._last_position.device)
            states = self._run(embeds, self._last_position + common + steps)
            common += len(fed)
            chain.append(int(self._sibling.head(states[:, -1]).argmax()))
            fed = chain[-1:]
        self._drafted_after = answer + chain[:-1]
        return chain

    def _run(self, embeds: Tensor, positions: Tensor, **visual: Any) -> Tensor:
        return self._sibling.decoder(
            inputs_embeds=embeds, position_ids=positions, use_cache=True, **{CACHE: self._cache}, **visual
        ).last_hidden_state

    def _read_prompt(self) -> None:
        """The sibling's prefill, of the rows that stay."""
        embeds, positions, visual = self._prompt
        chosen = choose_visual(self._scores)
        kept = ~self._is_visual
        kept[self._is_visual.nonzero().squeeze(-1)[chosen]] = True
        if visual:
            # Qwen3-VL's lower layers add to the visual rows what earlier layers of its tower saw.
            visual["visual_pos_masks"] = visual["visual_pos_masks"][:, kept]
            visual["deepstack_visual_embeds"] = [each[chosen] for each in visual["deepstack_visual_embeds"]]
        self._cache = DynamicCache(config=self._sibling.text_config)
        self._last_position = positions[..., -1:]
        self._run(embeds[:, kept], positions[..., kept], **visual)
        del self._prompt  # rows of the whole video


class _Captured(Exception):
    """Ends a forward before the decoder runs."""


def embedded_prompt(view: TargetView, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What a video LLM's decoder would be given for a prompt: `(1, L, H)` rows, `(…, 1, L)` positions, and which rows
    are visual with what else is added to them, if the decoder wants that."""
    found: dict[str, Any] = {}

    def capture(module: Any, args: Any, arguments: dict[str, Any]) -> None:
        found.update(arguments)
        raise _Captured

    handle = view.decoder.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        view.model(**inputs)
    except _Captured:
        pass
    finally:
        handle.remove()
    embeds, positions = found["inputs_embeds"], found.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    names = ("visual_pos_masks", "deepstack_visual_embeds")
    return embeds, positions, {name: found[name] for name in names if found.get(name) is not None}

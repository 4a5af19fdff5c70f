"""In a batch, every row is drafted for as if it were alone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.data.prepare import prepare_inputs
from sparrow_hf.draft_inputs import DraftPositions
from sparrow_hf.generation import batch_drafts, candidate_generator
from sparrow_hf.generation.batch_drafts import BatchDrafter
from sparrow_hf.generation.candidate_generator import SparrowCandidateGenerator
from sparrow_hf.generation.tree import CandidateTree
from sparrow_hf.testbed import EVALUATION_SEEDS, load, make_clip

from batches import joined

NUM_TOKENS = 24


class Clips(NamedTuple):
    """The built-in models, and four prompts as one batch."""

    target: PreTrainedModel
    draft: SparrowDraftModel
    batch: dict[str, Tensor]
    #: For each prompt alone: what was drafted in every round, what was accepted, and how many tokens there are.
    drafts: list[list[list[int]]]
    accepted: list[list[int]]
    tokens: list[int]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    target, processor, draft = load()
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    prompts = []
    for index in range(3):
        messages = make_clip(path, EVALUATION_SEEDS[index], 40 * (index + 1)).messages
        prompts.append(prepare_inputs(processor, messages))
    prompts.append(prepare_inputs(processor, [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]))
    drafts: list[list[list[int]]] = []
    accepted, tokens = [], []
    propose = SparrowCandidateGenerator.propose

    def noted(self: SparrowCandidateGenerator, *args: Any, **kwargs: Any) -> CandidateTree:
        tree = propose(self, *args, **kwargs)
        drafts[-1].append(tree.token_ids[0].tolist())
        return tree

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparrowCandidateGenerator, "propose", noted)
        for inputs in prompts:
            drafts.append([])
            target.generate(**inputs, assistant_model=draft, max_new_tokens=NUM_TOKENS)
            accepted.append(draft.last_generation.accepted)
            tokens.append(draft.last_generation.new_tokens)
    batch = joined([dict(inputs) for inputs in prompts], processor.tokenizer.pad_token_id)
    return Clips(target, draft, batch, drafts, accepted, tokens)


def has_the_drafts_of_rows_alone(clips: Clips) -> bool:
    """Whether the batch is drafted for like its prompts alone."""
    drafts: list[list[list[int]]] = [[] for _ in clips.drafts]
    propose = BatchDrafter.propose

    def noted(self: BatchDrafter, *args: Any) -> Tensor:
        chains = propose(self, *args)
        for row in self.rows:
            drafts[row].append(chains[row].tolist())
        return chains

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchDrafter, "propose", noted)
        clips.target.generate(**clips.batch, assistant_model=clips.draft, max_new_tokens=NUM_TOKENS)
    # Near the end of its text, a prompt alone is drafted for no further than to the end.
    return all(
        len(alone) == len(found) and all(long[: len(short)] == short for short, long in zip(alone, found, strict=True))
        for alone, found in zip(clips.drafts, drafts, strict=True)
    )


def test_every_row_is_drafted_for_as_if_it_were_alone(clips: Clips) -> None:
    assert has_the_drafts_of_rows_alone(clips)
    # Rows take what they accept: they need different numbers of rounds.
    rounds = [len(row) for row in clips.accepted]
    assert sum(map(sum, clips.accepted)) > 15 and len(set(rounds)) > 1
    stats = clips.draft.last_generation
    # Rows that are finished cost no draft, and count no more.
    assert (stats.rounds, stats.new_tokens) == (sum(rounds), sum(clips.tokens))
    assert stats.tau == (sum(clips.tokens) - 4) / sum(rounds)
    # A row alone never drafts its very last token; beside rows that have more to say it does.
    assert 0 <= sum(stats.accepted) - sum(map(sum, clips.accepted)) <= 4
    ours = clips.target.generate(**clips.batch, assistant_model=clips.draft, max_new_tokens=NUM_TOKENS)
    assert torch.equal(ours, clips.target.generate(**clips.batch, max_new_tokens=NUM_TOKENS))


def draft_reads_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = candidate_generator.draft_positions

    def positions(*args: Any, attention_mask: Any, **kwargs: Any) -> DraftPositions:
        return stock(*args, attention_mask=None, **kwargs)

    monkeypatch.setattr(candidate_generator, "draft_positions", positions)


def draft_sees_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = BatchDrafter._prefix
    monkeypatch.setattr(BatchDrafter, "_prefix", lambda self: torch.ones_like(stock(self)))


def draft_positions_not_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = BatchDrafter.extend

    def extend(self: BatchDrafter, *args: Any) -> None:
        stock(self, *args)
        self._next_position_ids[:] = self._next_position_ids.max()

    monkeypatch.setattr(BatchDrafter, "extend", extend)


def draft_packs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row accepts stays where the forward put it, behind the longest row."""
    stock = batch_drafts.pack_rows

    def pack(cache: Any, ends: Sequence[int], kept: Sequence[int], num_new: int) -> None:
        stock(cache, [max(ends)] * len(ends), kept, num_new)

    monkeypatch.setattr(batch_drafts, "pack_rows", pack)


def draft_of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a row is dropped, the first ones stay, whichever it was."""
    stock = BatchDrafter.keep

    def keep(self: BatchDrafter, rows: Sequence[int]) -> None:
        kept = [row for row in self.rows if row in rows]
        stock(self, self.rows[: len(kept)])
        self.rows = kept

    monkeypatch.setattr(BatchDrafter, "keep", keep)


DRAFT_BUGS = (
    draft_reads_padding,
    draft_sees_behind_the_end,
    draft_positions_not_per_row,
    draft_packs_no_row,
    draft_of_another_row,
)


@pytest.mark.parametrize("plant", DRAFT_BUGS, ids=lambda plant: plant.__name__)
def test_planted_bug_of_the_draft_is_found(plant: Callable[[Any], None], clips: Clips, monkeypatch) -> None:
    plant(monkeypatch)
    assert not has_the_drafts_of_rows_alone(clips)

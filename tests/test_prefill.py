"""One prefill for all arms gives what their own prefills give."""

import pytest
import torch
from noise import LENGTH, build_target, read
from transformers import PreTrainedModel

from sparrow_hf import TREE_PRESETS, SparrowDraftModel, TreeShape
from sparrow_hf.measurement import Arm, compare, warm_up
from sparrow_hf.prefill import PrefillSnapshot

from tiny_targets import Family

CHAIN = TreeShape(4, 3, 1)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return build_target()


@pytest.fixture(scope="module")
def draft(target: PreTrainedModel) -> SparrowDraftModel:
    return SparrowDraftModel.from_target(target, num_glimpse_tokens=4)


@pytest.mark.parametrize("sampling", [False, True])
def test_one_prefill_serves_all_arms(target: PreTrainedModel, draft: SparrowDraftModel, sampling: bool):
    arms = [
        Arm("plain"),
        Arm("none", draft, TREE_PRESETS["none"]),
        Arm("chain", draft, CHAIN),
        Arm("blind tree", draft, TreeShape(10, 2, 4), num_glimpse_tokens=0),
        Arm("prompt-lookup", prompt_lookup_num_tokens=5),
    ]
    inputs, settings = read(target, 8, 0), {"max_new_tokens": LENGTH, "do_sample": sampling}
    own = compare(target, arms[:4] if sampling else arms, inputs, settings)
    prefills: list[int] = []
    hook = target.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: prefills.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    compared = arms[:4] if sampling else arms
    warm_up(target, compared, inputs, settings, shared_prefill=True)
    shared = compare(target, compared, inputs, settings, shared_prefill=True)
    hook.remove()
    # The snapshot's, and prompt lookup's own; once to warm up, once to measure.
    assert sum(rows >= inputs["input_ids"].shape[1] for rows in prefills) == 2 * (1 if sampling else 2)
    for name, run in shared.items():
        assert run.differs_at is None
        # The draft read the same states: it proposed the same.
        assert (run.accepted, run.rounds) == (own[name].accepted, own[name].rounds)
        assert run.draft_cache_rows == own[name].draft_cache_rows
    assert len({run.prefill_seconds for name, run in shared.items() if name != "prompt-lookup"}) == 1
    assert "_prefill" not in vars(target)


def test_one_prefill_serves_every_family(family: Family):
    target = family.build_target()
    inputs = family.build_inputs(target)
    arms = [
        Arm("plain"),
        Arm("draft", SparrowDraftModel.from_target(target, num_glimpse_tokens=2), TREE_PRESETS["chain-5"]),
    ]
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": family.visual_token_ids}
    own, shared = (compare(target, arms, inputs, settings, shared_prefill=shared) for shared in (False, True))
    assert own["draft"].differs_at is None and shared["draft"].differs_at is None
    assert shared["draft"].accepted == own["draft"].accepted


def test_a_replayed_prefill_is_the_prompts_own(target: PreTrainedModel, draft: SparrowDraftModel):
    """Planted bug: another prompt's prefill gives another text."""
    settings = {"max_new_tokens": LENGTH, "do_sample": False}
    inputs, others = read(target, 8, 0), read(target, 8, 1)
    expected = target.generate(**inputs, **settings)
    prefill = PrefillSnapshot(target, others, settings, Arm("chain", draft, CHAIN).layers_read)
    with prefill.replayed() as replayed:
        assert not torch.equal(target.generate(**replayed, **settings), expected)
    assert torch.equal(target.generate(**inputs, **settings), expected)

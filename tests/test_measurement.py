"""The instrument against a second, independent count, and the identity check against a text that does differ."""

import dataclasses
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from sparrow_hf import TREE_PRESETS, SparrowDraftModel, TreeShape, measurement
from sparrow_hf.evaluation import (
    Arm,
    Run,
    acceptance,
    compare,
    first_difference,
    measure,
    warm_up,
)
from sparrow_hf.generation.emission import TokenEmitter

from families import FAMILY_BY_NAME
from oracles import drafting_around

LENGTH = 25
CHAIN = TreeShape(5, 4, 1)
TREE = TreeShape(10, 3, 3)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return FAMILY_BY_NAME["qwen2_5_vl"].build_target()


@pytest.fixture(scope="module")
def inputs(target: PreTrainedModel) -> dict[str, Tensor]:
    return FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(target, num_frames=8)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    suppressed = FAMILY_BY_NAME["qwen2_5_vl"].visual_token_ids
    return {
        "max_new_tokens": LENGTH,
        "min_new_tokens": LENGTH,
        "do_sample": False,
        "suppress_tokens": suppressed,
    }


@pytest.fixture(scope="module")
def draft(target: PreTrainedModel) -> SparrowDraftModel:
    return SparrowDraftModel.from_target(target, num_glimpse_tokens=4)


@pytest.fixture(scope="module")
def text(target: PreTrainedModel, inputs: dict[str, Tensor], settings: dict[str, Any]) -> list[int]:
    """What plain `generate()` writes."""
    return target.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def arms(draft: SparrowDraftModel) -> list[Arm]:
    return [
        Arm("plain"),
        Arm("chain", draft, CHAIN),
        Arm("tree", draft, TREE),
        Arm("no draft", draft, TREE_PRESETS["none"]),
        Arm("lookup", prompt_lookup_num_tokens=3),
    ]


@pytest.fixture(scope="module")
def runs(target: Any, arms: list[Arm], inputs: Any, settings: Any, text: list[int]) -> dict[str, Run]:
    """All arms on one prompt, the draft replaced by one that is right up to a random depth of each round."""
    with drafting_around(text, adversarial=True):
        return compare(target, arms, inputs, settings, turn=2)


def test_every_arm_writes_the_plain_text(runs: dict[str, Run], arms: list[Arm]):
    assert list(runs) == [arm.name for arm in arms]
    assert all(run.differs_at is None for run in runs.values())
    assert all(run.new_tokens == LENGTH for run in runs.values())


def test_rounds_are_the_targets_forwards_after_the_prefill(
    target: Any, arms: list[Arm], inputs: Any, settings: Any, text: list[int]
):
    for arm in arms:
        widths: list[int] = []
        hook = target.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs, widths=widths: widths.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        )
        with drafting_around(text, adversarial=True):
            run, tokens = measure(target, arm, inputs, settings)
        hook.remove()
        assert tokens == text
        assert widths[0] >= inputs["input_ids"].shape[1]
        assert run.rounds == len(widths) - 1
        assert run.decode_tokens == LENGTH - 1 or arm.name == "lookup"
        assert acceptance([run]).tau == pytest.approx(run.decode_tokens / (len(widths) - 1))


def test_accepted_tokens_account_for_the_rounds_that_were_saved(runs: dict[str, Run]):
    for name in ("chain", "tree"):
        run = runs[name]
        assert run.rounds == len(run.accepted) < LENGTH - 1
        # Each round gives one more token than it accepts, the last one perhaps not.
        assert sum(run.accepted) + run.rounds - run.decode_tokens in (0, 1)
        assert max(run.accepted) <= run.num_draft_levels
    for name in ("plain", "no draft"):
        assert runs[name].rounds == LENGTH - 1
        assert acceptance([runs[name]]).tau == 1


def test_the_drafts_own_clock_agrees_with_the_outside_one(runs: dict[str, Run]):
    for name in ("chain", "tree", "no draft"):
        run = runs[name]
        inside = run.draft_seconds + run.verify_seconds
        # Both phases lie within the decode time, but for the set-up before the prefill.
        assert 0.6 * run.decode_seconds < inside < run.decode_seconds + 0.05
        assert run.prefill_seconds > 0


def test_a_wrong_token_is_found(
    target: Any, arms: list[Arm], inputs: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, text: list[int]
):
    right = TokenEmitter.choose
    calls = iter(range(1000))

    def wrong_at_seven(self: TokenEmitter, *args: Any) -> int:
        token = right(self, *args)
        return token + 1 if next(calls) == 7 else token

    monkeypatch.setattr(TokenEmitter, "choose", wrong_at_seven)
    runs = compare(target, [arms[0], arms[3]], inputs, settings)
    assert runs["plain"].differs_at is None
    assert runs["no draft"].differs_at == 7


def test_seeded_sampling_is_the_same_in_every_arm(target: Any, arms: list[Arm], inputs: Any, settings: Any):
    sampling = settings | {"do_sample": True, "temperature": 1.0, "max_new_tokens": 12, "min_new_tokens": 12}
    seeds = [compare(target, arms[:4], inputs, sampling, seed=seed) for seed in (1, 2)]
    assert all(run.differs_at is None for runs in seeds for run in runs.values())
    first, second = (measure(target, arms[0], inputs, sampling, seed)[1] for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize("shared_prefill", [False, True])
def test_of_several_rounds_the_median_call_counts(
    target: Any, arms: list[Arm], inputs: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, shared_prefill: bool
):
    """Calls get the times 10, 20, … but for plain's, whose slowest round comes in the middle; one text is wrong."""
    order: list[str] = []
    slow_second_round = {0: 1.0, 1: 3.0, 2: 2.0}

    def call(target: Any, arm: Arm, *args: Any) -> tuple[Run, list[int]]:
        run, tokens = measure(target, arm, *args)
        earlier = order.count(arm.name)
        order.append(arm.name)
        seconds = slow_second_round[earlier] if arm.name == "plain" else 10.0 * len(order)
        if arm.name == "chain" and earlier == 2:
            tokens[4] += 1
        return dataclasses.replace(run, decode_seconds=seconds), tokens

    monkeypatch.setattr(measurement, "measure", call)
    compared = [arms[0], arms[1], arms[4]]
    runs = compare(target, compared, inputs, settings, turn=1, repeats=3, shared_prefill=shared_prefill)
    # transformers' own loop would have to prefill again.
    again = ["chain", "plain"] if shared_prefill else ["chain", "lookup", "plain"]
    second = 3 + len(again)
    assert [sorted(names) for names in (order[:3], order[3:second], order[second:])] == [
        ["chain", "lookup", "plain"],
        again,
        again,
    ]
    assert runs["plain"].decode_seconds == 2.0
    for name in ("chain", "lookup"):
        times = [10.0 * index for index, other in enumerate(order, start=1) if other == name]
        assert runs[name].decode_seconds == times[len(times) // 2]
    assert [run.differs_at for run in runs.values()] == [None, 4, None]


def test_every_arm_follows_every_other_one_at_some_time(
    target: Any, arms: list[Arm], inputs: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
):
    orders: list[list[str]] = []
    run = Run(1, 0, 0, [], 0, 1.0, 1.0)
    monkeypatch.setattr(measurement, "measure", lambda target, arm, *args: orders[-1].append(arm.name) or (run, [1]))
    for turn in range(40):
        orders.append([])
        compare(target, arms, inputs, settings, turn)
    names = [arm.name for arm in arms]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert {order[0] for order in orders} == set(names)
    followed = {pair for order in orders for pair in zip(order, order[1:], strict=False)}
    assert len(followed) == len(names) * (len(names) - 1)


def test_an_arm_leaves_the_drafts_tree_as_it_was(target: Any, arms: list[Arm], inputs: Any, settings: Any):
    draft = arms[1].draft
    before = draft.config.tree_shape
    warm_up(target, arms, inputs, {"do_sample": False, "suppress_tokens": settings["suppress_tokens"]})
    assert draft.config.tree_shape == before
    with pytest.raises(RuntimeError), arms[1].options(target, inputs):
        assert draft.config.tree_shape == CHAIN
        raise RuntimeError
    assert draft.config.tree_shape == before


@pytest.mark.parametrize(
    ("reference", "tokens", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 4, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2], [1], 1),
        ([], [], None),
    ],
)
def test_first_difference(reference: list[int], tokens: list[int], expected: int | None):
    assert first_difference(reference, tokens) == expected

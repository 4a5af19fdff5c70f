"""The output hooks give the states of `output_hidden_states=True`, at the requested positions only."""

import threading

import pytest
import torch
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel, hidden_states
from sparrow_hf.errors import HiddenStateCaptureError
from sparrow_hf.hidden_states import HiddenStateCollector

from families import FAMILY_BY_NAME
from tiny_targets import Family


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    SparrowDraftModel.from_target(target, feature_layers=[1, 3, -1], visual_bridge_layer=2)
    return target


def test_hooks_equal_output_hidden_states(family: Family) -> None:
    target = family.build_target()
    depth = target.config.get_text_config().num_hidden_layers
    SparrowDraftModel.from_target(target, feature_layers=[1, -1], visual_bridge_layer=2)
    SparrowDraftModel.from_target(target, visual_bridge_layer=0)
    inputs = family.build_inputs(target)
    rows = torch.tensor([0, 3, 5])
    with torch.no_grad(), HiddenStateCollector({0: None, 1: None, 2: rows, depth: rows}).active() as collector:
        expected = target(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(collector.take(0), expected[0])
    assert torch.equal(collector.take(1), expected[1])
    assert torch.equal(collector.take(2), expected[2][:, rows])
    assert torch.equal(collector.take(depth), expected[-1][:, rows])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_add_up(chunk: int) -> None:
    states = torch.randn(1, 11, 4)
    rows = torch.tensor([0, 4, 5, 10])
    collector = HiddenStateCollector({7: rows, 8: None})
    for part in states.split(chunk, dim=1):
        collector.collect(7, part)
        collector.collect(8, part)
    assert torch.equal(collector.take(7), states[:, rows])
    assert torch.equal(collector.take(8), states)


def test_no_rows_of_a_kind_is_not_a_failure() -> None:
    collector = HiddenStateCollector({1: torch.tensor([], dtype=torch.long)})
    collector.collect(1, torch.randn(1, 3, 4))
    assert collector.take(1).shape == (1, 0, 4)


def test_a_hook_that_never_fired_is_reported() -> None:
    with pytest.raises(HiddenStateCaptureError, match=r"draft\.bind\(target\)"):
        HiddenStateCollector({1: None}).take(1)
    collector = HiddenStateCollector({1: torch.tensor([9])})
    collector.collect(1, torch.randn(1, 3, 4))
    with pytest.raises(HiddenStateCaptureError, match="3 states passed the hook, fewer than were asked for"):
        collector.take(1)


def test_a_step_that_fails_while_it_is_traced_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ZeroDivisionError), hidden_states.in_step([1]) as states:
        assert hidden_states._traced is states
        raise ZeroDivisionError
    assert hidden_states._traced is None


def test_rows_that_a_target_leaves_out_are_computed_for_a_collector() -> None:
    """Layers that share keys and values run for the wanted logits only, unless somebody collects their states."""
    family = FAMILY_BY_NAME["gemma4-shared"]
    target = family.build_target()
    for _ in range(2):
        SparrowDraftModel.from_target(target)
    assert len(target.get_decoder()._forward_pre_hooks) == 1
    inputs, collector = family.build_inputs(target), HiddenStateCollector({4: None})
    rows: list[int] = []
    target.get_decoder().layers[-1].register_forward_hook(lambda _, args, output: rows.append(output.shape[1]))
    with torch.no_grad():
        expected = target(**inputs, output_hidden_states=True)
        with collector.active():
            found = target(**inputs, logits_to_keep=1)
        target(**inputs, logits_to_keep=1)
    length = inputs["input_ids"].shape[1]
    assert rows == [length, length, 1]
    assert torch.equal(collector.take(4), expected.hidden_states[-1])
    torch.testing.assert_close(found.logits, expected.logits[:, -1:], rtol=0, atol=1e-5)


def test_nothing_is_kept_outside_a_collector_or_in_another_thread(target: PreTrainedModel) -> None:
    inputs = FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(target)
    collector = HiddenStateCollector({1: None})
    with torch.no_grad():
        with collector.active():
            other = threading.Thread(target=lambda: target(**inputs))
            other.start()
            other.join()
        target(**inputs)
    with pytest.raises(HiddenStateCaptureError):
        collector.take(1)


def test_binding_twice_installs_one_hook(target: PreTrainedModel) -> None:
    def count() -> tuple[int, int]:
        first = target.get_decoder().layers[0]
        return len(first._forward_hooks), len(first._forward_pre_hooks)

    SparrowDraftModel.from_target(target, feature_layers=[1, -1], visual_bridge_layer=0)
    before = count()
    SparrowDraftModel.from_target(target, feature_layers=[1, -1], visual_bridge_layer=0)
    assert count() == before


def test_changed_pixels_change_the_captured_text_states(family: Family) -> None:
    """The states that the draft reads must depend on the target's video."""
    target = family.build_target()
    draft = SparrowDraftModel.from_target(target)
    depth = target.config.get_text_config().num_hidden_layers
    captured = []
    for seed in (0, 1):
        inputs = family.build_inputs(target, seed=seed)
        last_text_row = torch.tensor([inputs["input_ids"].shape[1] - 1])
        with torch.no_grad(), HiddenStateCollector({depth: last_text_row}).active() as collector:
            target(**inputs)
        captured.append(collector.take(depth))
    assert draft.config.feature_layer_ids[-1] == depth
    assert not torch.allclose(captured[0], captured[1], atol=1e-3)

"""The target and the draft that ship with the package, as a user gets them: real mp4 files, the real processor."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.utils import GenerationMixin

from sparrow_hf import SparrowCandidateGenerator, SparrowDraftModel, testbed
from sparrow_hf.draft_inputs import draft_positions
from sparrow_hf.hidden_states import HiddenStateCollector
from sparrow_hf.testbed.nano import ASSETS
from sparrow_hf.video import prepare_inputs

from lossless import RecordingStreamer

SEEDS = testbed.EVALUATION_SEEDS[-2:]


@pytest.fixture(scope="module", params=[family.name for family in testbed.FAMILIES])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any, SparrowDraftModel]:
    return testbed.load(request.param)


@pytest.fixture(scope="module")
def clips(
    models: tuple[Any, Any, SparrowDraftModel], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("clips")
    steps = testbed.family_of(models[0]).tokens_per_step
    return [
        dict(prepare_inputs(models[1], testbed.make_clip(folder / f"{seed}.mp4", seed, 200, steps).messages))
        for seed in SEEDS
    ]


def generate(target: Any, inputs: dict[str, Any], **kwargs: Any) -> list[int]:
    torch.manual_seed(0)
    return target.generate(**inputs, max_new_tokens=96, **kwargs)[0, inputs["input_ids"].shape[1] :].tolist()


GREEDY, SAMPLING = {"do_sample": False}, {"do_sample": True, "temperature": 1.0}


@pytest.mark.parametrize(
    "tree, sampling",
    [
        ("chain-5", GREEDY),
        *(
            pytest.param(tree, sampling, marks=pytest.mark.full)
            for tree, sampling in (
                ("48-5-10", SAMPLING),
                ("chain-5", SAMPLING),
                ("30-4-8", GREEDY),
                ("30-4-8", SAMPLING),
                ("48-5-10", GREEDY),
            )
        ),
    ],
)
def test_identical_and_accepted_in_depth(models, clips, tree: str, sampling: dict[str, Any]) -> None:
    target, _, draft = models
    draft.config.set_tree_shape(tree)
    rounds = tokens = 0
    for inputs in clips:
        assert generate(target, inputs, **sampling) == generate(target, inputs, assistant_model=draft, **sampling)
        stats = draft.last_generation
        rounds, tokens = rounds + stats.rounds, tokens + stats.new_tokens - 1
        kept = draft_positions(inputs["input_ids"][0], draft.config.visual_token_ids, draft.config.num_glimpse_tokens)
        frontier_rows = (draft.config.num_draft_levels - 1) * draft.config.beam_width
        assert stats.max_draft_cache_length <= len(kept.indices) + stats.new_tokens + frontier_rows
    # A draft out of step with its training (positions, shift, rows) accepts almost nothing.
    assert tokens / rounds > (4.0 if not sampling["do_sample"] else 2.5)


def test_chain_in_the_stock_loop_takes_as_many_rounds(models, clips, monkeypatch: pytest.MonkeyPatch) -> None:
    target, _, draft = models
    draft.config.set_tree_shape("chain-5")
    ours = generate(target, clips[0], assistant_model=draft)
    rounds = draft.last_generation.rounds

    def generator(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> SparrowCandidateGenerator:
        return SparrowCandidateGenerator(draft, input_ids)

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", GenerationMixin._assisted_decoding.__wrapped__)
    monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", generator)
    forwards = []
    hook = target.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    stock = generate(target, clips[0], assistant_model=target)
    hook.remove()
    assert stock == ours
    assert len(forwards) - 1 == rounds


def test_other_pixels_change_what_is_proposed(models, clips) -> None:
    """The draft's proposals must depend on the video: two videos with one question give two proposals."""
    target, _, draft = models
    draft.config.set_tree_shape("48-5-10")
    proposals = []
    inputs = clips[0]
    for pixels in (each["pixel_values_videos"] for each in clips[:2]):
        generator = SparrowCandidateGenerator(draft, inputs["input_ids"])
        draft.bind(target)
        with torch.no_grad(), HiddenStateCollector(generator.layers_to_collect).active() as collector:
            target(**{**inputs, "pixel_values_videos": pixels}, logits_to_keep=1)
        states = {layer: collector.take(layer) for layer in generator.layers_to_collect}
        with torch.no_grad():
            generator.prefill(states, first_token=int(inputs["input_ids"][0, 0]))
            proposals.append(generator.propose(5).token_ids.tolist())
    assert proposals[0] != proposals[1]


def test_a_streamer_can_distinguish_drafted_tokens(models, clips) -> None:
    target, _, draft = models
    draft.config.set_tree_shape("chain-5")
    streamer = RecordingStreamer()
    tokens = generate(target, clips[0], assistant_model=draft, streamer=streamer)
    assert [token for chunk in streamer.received[1:-1] for token in chunk] == tokens
    stats = draft.last_generation
    assert sum(stats.accepted) + stats.rounds + 1 - len(tokens) in (0, 1)  # 1: the caption ended on a drafted token


def test_what_ships_is_small_and_says_where_it_comes_from() -> None:
    files = [path for path in Path(ASSETS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    for folder in testbed.SHIPPED.values():
        for part in ("target", "draft"):
            provenance = json.loads((folder / part / "PROVENANCE.json").read_text())
            # The module at the recorded commit.
            assert re.match(r"python -m sparrow_(hf\.testbed|research)\.(pre|re)train ", provenance["command"])
            assert provenance["commits" if part == "target" else "commit"]

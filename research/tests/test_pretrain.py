"""The training of the testbed's targets, of both families: each stage, stopped and resumed, from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.testbed import load_target, nano
from sparrow_hf.testbed.families import FAMILIES, LLAVA_ONEVISION, Family
from sparrow_hf.testbed.nano import build_processor, build_target
from sparrow_hf.testbed.tokenizer import VOCABULARY_SIZE
from sparrow_hf.testbed.world import make_clip
from sparrow_hf.video import prepare_inputs, read_video
from sparrow_research import pretrain
from sparrow_research.caption_training import (
    CLAIM_WEIGHT,
    IGNORED,
    CaptionBatch,
    Claims,
    ClipGroup,
    Stage,
    caption_logits,
    caption_loss,
    clips_for,
    deepen,
    draw_captions,
    thin_out,
)
from sparrow_research.family_training import training_of
from sparrow_research.muon import Muon, orthogonalize

STAGE = Stage("test", 4, 2, (2, 6), (32, 48), 2, 2, (0.02, 0.01))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Each of the testbed's families in turn."""
    return request.param


@pytest.fixture(scope="module")
def processor(family: Family) -> Any:
    return build_processor(family)


@pytest.fixture(scope="module")
def target(processor: Any, family: Family) -> Any:
    return build_target(processor.tokenizer, num_hidden_layers=2, family=family)


def test_training_sees_the_logits_that_generate_computes(
    processor: Any, target: Any, family: Family, tmp_path: Path
) -> None:
    # 25 temporal steps: further than the text before and after, where M-RoPE conventions part.
    clip = make_clip(tmp_path / "clip.mp4", 5, visual_tokens=100)
    inputs = prepare_inputs(processor, clip.messages)
    output = target.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True
    )
    ids = output.sequences[0]
    end_of_video = ids.tolist().index(processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")) + 1
    with torch.no_grad():
        features = training_of(target).visual_features(target, processor, read_video(tmp_path / "clip.mp4")[0])
        assert len(features) == 25 * family.tokens_per_step
        batch = CaptionBatch(ids[:end_of_video], ids[None, end_of_video:], ids[None, end_of_video:])
        trained = caption_logits(target, features[None], batch)[0, -9:-1]
    torch.testing.assert_close(trained, torch.cat(output.logits), atol=1e-4, rtol=1e-4)


def test_a_batch_shares_prefixes_and_learns_captions_only(processor: Any, target: Any, family: Family) -> None:
    group = ClipGroup(target, processor, STAGE, [0, 1])
    batch = draw_captions(processor, group, 2, np.random.default_rng(0))
    clips, visual_tokens = len(group.features), group.num_visual_tokens
    assert group.features.shape[1] == family.tokens_per_step * group.num_steps and clips == len(group.stories)
    assert visual_tokens - group.features.shape[1] == (1 if family is LLAVA_ONEVISION else 0)
    assert batch.suffixes.shape == batch.labels.shape and len(batch.suffixes) == 2 * clips
    assert (batch.prefix == target.config.video_token_id).sum() == visual_tokens
    for suffix, labels in zip(batch.suffixes, batch.labels, strict=True):
        learned = processor.tokenizer.decode(suffix[labels != IGNORED])
        assert learned.endswith("<|im_end|>") and "<|im_start|>" not in learned and "?" not in learned
        assert torch.equal(suffix[labels != IGNORED], labels[labels != IGNORED])
    with torch.no_grad():
        together = caption_logits(target, group.features, batch)
        alone = caption_logits(
            target, group.features[1:2], CaptionBatch(batch.prefix, batch.suffixes[2:3], batch.labels[2:3])
        )
    torch.testing.assert_close(together[2:3], alone, atol=1e-4, rtol=1e-4)


def test_a_claim_is_right_in_any_of_its_wordings(processor: Any) -> None:
    claims = Claims(processor.tokenizer)
    meanings = claims.meanings
    small, tiny, of, red = processor.tokenizer.convert_tokens_to_ids(["small", "tiny", "of", "red"])
    assert meanings[small] == meanings[tiny] != meanings[red] and meanings[of] == IGNORED
    probabilities = torch.full((2, VOCABULARY_SIZE), 0.2 / (VOCABULARY_SIZE - 2))
    probabilities[0, [small, tiny]] = torch.tensor([0.3, 0.5])
    probabilities[1, [of, red]] = 0.4
    logits = torch.cat([probabilities, torch.ones(1, VOCABULARY_SIZE)]).log()[None]
    labels = torch.tensor([[IGNORED, small, of]])
    meant = 0.8 + probabilities[0, red].item()  # "little" is the third wording
    expected = -(np.log(0.3) + np.log(0.4) + CLAIM_WEIGHT * np.log(meant)) / (2 + CLAIM_WEIGHT)
    assert caption_loss(logits, labels, claims).item() == pytest.approx(expected, rel=1e-5)
    said_nothing = caption_loss(logits, torch.tensor([[IGNORED, IGNORED, of]]), claims)
    assert said_nothing.item() == pytest.approx(-np.log(0.4), rel=1e-5)


def test_deepening_changes_no_logit(processor: Any, target: Any) -> None:
    group = ClipGroup(target, processor, STAGE, [0, 1])
    batch = draw_captions(processor, group, 1, np.random.default_rng(0))
    deeper = deepen(target, processor.tokenizer, 6)
    assert deeper.config.text_config.num_hidden_layers == 6
    with torch.no_grad():
        assert torch.equal(
            caption_logits(deeper, group.features, batch), caption_logits(target, group.features, batch)
        )
    with pytest.raises(ValueError, match="evenly"):
        deepen(target, processor.tokenizer, 5)
    with pytest.raises(ValueError, match="evenly"):
        thin_out(deeper, processor.tokenizer, 4)


def test_longer_clips_come_in_smaller_groups() -> None:
    stage = Stage("long", 1, 24, (2, 6), (64, 1024), 4, 2, (0.02, 0.01))
    assert [clips_for(stage, tokens) for tokens in (64, 256, 1024)] == [6, 4, 2]


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 96, 256), (2, 256, 96)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert 0.3 < values.min() and values.max() < 1.3


def test_muon_moves_every_matrix_by_its_own_gradient() -> None:
    torch.manual_seed(0)
    start = [torch.randn(8, 4), torch.randn(4, 8), torch.randn(8, 4)]
    together = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    for parameters, optimizers in ((together, [Muon(together)]), (alone, [Muon([each]) for each in alone])):
        for _ in range(3):
            sum((parameter**3).sum() for parameter in parameters).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for first, second, before in zip(together, alone, start, strict=True):
        torch.testing.assert_close(first, second)
        assert not torch.equal(first, before)


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of two vision steps and two short stages, the second one deeper."""
    stages = (
        Stage("a", 3, 1, (1, 2), (8, 12), 2, 1, (0.02, 0.01)),
        Stage("b", 3, 2, (2, 2), (12, 16), 1, 2, (0.02, 0.01)),
    )
    monkeypatch.setattr(pretrain, "STAGES", stages)
    monkeypatch.setattr(pretrain, "VISION_STEPS", 2)
    monkeypatch.setattr(pretrain, "FINAL_CHECKS", {24: 1})
    monkeypatch.setattr(pretrain, "VALIDATION_CLIPS", 1)
    monkeypatch.setattr(pretrain, "VISION_VALIDATION_CLIPS", 1)
    monkeypatch.setattr(pretrain.VisionPretraining, "batch_size", 12)
    monkeypatch.setattr(nano, "MAX_CAPTION_TOKENS", 4)


@pytest.mark.usefixtures("short_training")
def test_a_stopped_training_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "commit", lambda: "before")
    whole = pretrain.Pretraining(tmp_path / "whole", seed=3)
    whole.run()

    class Stop(Exception):
        pass

    class Stopped(pretrain.Pretraining):
        """Stops right before the second step of stage `stop_in`, the first one saved."""

        stop_in: int

        def train_step(self) -> float:
            if self.progress.step == 1 and self.progress.stage == self.stop_in:
                raise Stop
            loss = super().train_step()
            self.progress.step += 1
            self.save()
            self.progress.step -= 1
            return loss

    for stop_in in (0, 1):
        stopped = Stopped(tmp_path / "stopped", seed=3)
        stopped.stop_in = stop_in
        with pytest.raises(Stop):
            stopped.run()
    monkeypatch.setattr(pretrain, "commit", lambda: "after")
    resumed = pretrain.Pretraining(tmp_path / "stopped", seed=3)
    resumed.run()
    for (name, weight), expected in zip(
        resumed.target.state_dict().items(), whole.target.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, expected), name
    steps = [json.loads(line).get("step") for line in (tmp_path / "stopped" / "curve.jsonl").read_text().splitlines()]
    assert len(steps) == len((tmp_path / "whole" / "curve.jsonl").read_text().splitlines())
    began = {"stage": "a", "step": 0, "commit": "before", "seed": 3}
    commits = {
        name: json.loads((tmp_path / name / "PROVENANCE.json").read_text())["commits"] for name in ("whole", "stopped")
    }
    assert commits == {"whole": [began], "stopped": [began, {"stage": "b", "step": 1, "commit": "after", "seed": 3}]}


@pytest.mark.usefixtures("short_training")
def test_no_two_training_steps_see_the_same_clips(tmp_path: Path) -> None:
    training = pretrain.Pretraining(tmp_path, seed=3)
    seen = []
    for stage in range(2):
        for step in range(3):
            training.progress.stage, training.progress.step = stage, step
            seen += training.clip_group().stories
    assert len(set(seen)) == len(seen) > 6


@pytest.mark.usefixtures("short_training")
def test_a_training_leaves_a_loadable_fp32_target_rounded_to_bf16_with_its_provenance(
    family: Family, tmp_path: Path
) -> None:
    pretrain.main(["--output", str(tmp_path), "--seed", "3", "--family", family.name])
    target, processor = load_target(tmp_path)
    assert type(target) is family.model_class
    assert target.dtype == torch.float32 and not target.training
    weights = list(target.state_dict().values())
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)
    provenance = json.loads((tmp_path / "PROVENANCE.json").read_text())
    assert provenance["content_accuracy_after_bf16_rounding"].keys() == {"24"}
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in curve if "validation_content_accuracy" in entry] == ["a", "b"]
    assert processor.tokenizer.eos_token_id == target.generation_config.eos_token_id
    assert f"--family {family.name}" in provenance["command"]
    other = next(each for each in FAMILIES if each is not family)
    with pytest.raises(TrainingOptionsError, match=family.name):
        pretrain.Pretraining(tmp_path, 3, other).run()


@pytest.mark.usefixtures("short_training")
def test_a_sibling_sees_as_its_parent_does_and_starts_with_its_layers(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = build_target(build_processor(family).tokenizer, 4, seed=1, family=family)
    parent_folder = tmp_path / "parent"
    pretrain.export(parent, build_processor(family), parent_folder)
    parent, _ = load_target(parent_folder)
    monkeypatch.setattr(pretrain, "SIBLING_STAGES", (Stage("c", 2, 2, (1, 2), (8, 12), 2, 1, (0.02, 0.01)),))
    training = pretrain.Pretraining(tmp_path / "sibling", 3, family, parent_folder)
    training.begin()
    begun = {name: weight.clone() for name, weight in training.target.state_dict().items()}
    for name, weight in begun.items():
        # Layers 0 and 2 of the parent's four.
        of_parent = name.replace(".language_model.layers.1.", ".language_model.layers.2.")
        assert torch.equal(weight, parent.state_dict()[of_parent]), name
    arguments = ["--output", str(tmp_path / "sibling"), "--seed", "3", "--family", family.name]
    pretrain.main([*arguments, "--sibling-of", str(parent_folder)])
    sibling, _ = load_target(tmp_path / "sibling")
    for own, seen in zip(training_of(sibling).seeing(sibling), training_of(parent).seeing(parent), strict=True):
        assert torch.equal(own, seen)
    assert not torch.equal(sibling.lm_head.weight, parent.lm_head.weight)
    assert json.loads((tmp_path / "sibling" / "PROVENANCE.json").read_text())["vision_steps"] == 0
    # Neither a whole target's training goes on from a sibling's, nor that of another parent's sibling.
    for other in (None, tmp_path / "sibling"):
        with pytest.raises(TrainingOptionsError, match="another training"):
            pretrain.Pretraining(tmp_path / "sibling", 3, family, other).run()


@pytest.mark.usefixtures("short_training")
def test_captions_train_everything_but_the_tower(family: Family, tmp_path: Path) -> None:
    training = pretrain.Pretraining(tmp_path, 3, family)
    training.prepare_stage()
    before = {name: weight.clone() for name, weight in training.target.state_dict().items()}
    training.train_step()
    tower = {id(weight) for weight in training_of(training.target).vision(training.target).parameters()}
    for name, weight in training.target.named_parameters():
        # The first step of a decoder layer's biases and norms is tiny, yet no zero.
        assert torch.equal(weight, before[name]) == (id(weight) in tower), name

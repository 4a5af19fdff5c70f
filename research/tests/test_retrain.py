"""The command that retrains the testbed's draft, on a shallow untrained target."""

import json

import pytest
import torch
from small_targets import save_small_target

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed.families import LLAVA_ONEVISION, QWEN2_5_VL
from sparrow_hf.testbed.nano import load_target
from sparrow_research import retrain


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return save_small_target(tmp_path_factory.mktemp("target"), QWEN2_5_VL, 4)


@pytest.fixture(autouse=True)
def short_clips(monkeypatch):
    monkeypatch.setattr(retrain, "SHORT_CLIPS", (16, 40))
    monkeypatch.setattr(retrain, "LONG_SHARE", 0.0)
    monkeypatch.setattr(retrain, "MAX_CAPTION_TOKENS", 12)
    monkeypatch.setattr(retrain, "CLIPS_PER_BATCH", 3)
    monkeypatch.setattr(retrain, "CAPTION_BATCH_ROWS", 100)


def test_one_command_makes_a_draft_and_its_baseline(tmp_path, target_folder):
    common = ["--target", str(target_folder), "--clips", "6", "--validation-clips", "3", "--steps", "3"]
    retrain.main([*common, "--output", str(tmp_path / "draft")])
    recording = tmp_path / "draft" / "recording"
    stored = {path: path.stat().st_mtime_ns for path in recording.rglob("*.safetensors")}
    assert len(stored) == 9
    provenance = json.loads((tmp_path / "draft" / "PROVENANCE.json").read_text())
    assert provenance["validation"]["eval_tau"] >= 1 and "--steps 3" in provenance["command"]
    draft = SparrowDraftModel.from_pretrained(tmp_path / "draft")
    assert draft.config.num_mtp_steps == 5

    retrain.main([*common, "--output", str(tmp_path / "blind"), "--recording", str(recording), "--text-only"])
    assert stored == {path: path.stat().st_mtime_ns for path in recording.rglob("*.safetensors")}
    blind = SparrowDraftModel.from_pretrained(tmp_path / "blind")
    for each in (blind, draft):
        each.bind(load_target(target_folder)[0])
    ids, states = torch.arange(4)[None], torch.randn(1, 4, blind.config.hidden_size)
    assert blind.config.num_glimpse_tokens == 0
    assert torch.equal(blind.embed_next(ids, states), blind.embed_next(ids, torch.zeros_like(states)))
    assert not torch.equal(draft.embed_next(ids, states), draft.embed_next(ids, torch.zeros_like(states)))


def test_the_family_is_the_targets(tmp_path, monkeypatch):
    # LLaVA-OneVision stacks videos: clips of one length are captioned together, others never.
    monkeypatch.setattr(retrain, "CAPTION_BATCH_ROWS", 10_000)
    folder = save_small_target(tmp_path / "target", LLAVA_ONEVISION, 4)
    target, processor = retrain.load_target(folder)
    seeds = retrain.TRAIN_SEEDS[-6:]
    together = dict(retrain.caption_clips(target, processor, seeds))
    lengths = {sample["pixel_values_videos"].shape[1] for sample in together.values()}
    assert 1 < len(lengths) < len(seeds)
    for index, seed in enumerate(seeds):
        ((_, alone),) = retrain.caption_clips(target, processor, [seed])
        assert together[index]["answer_start"] == alone["answer_start"]
        assert torch.equal(together[index]["input_ids"], alone["input_ids"])
    command = ["--target", str(folder), "--clips", "6", "--validation-clips", "3", "--steps", "2"]
    retrain.main([*command, "--output", str(tmp_path / "draft")])
    draft = SparrowDraftModel.from_pretrained(tmp_path / "draft")
    draft.bind(target)
    fresh = retrain.build_draft(target)
    assert not torch.equal(draft.fc.weight, fresh.fc.weight)
    provenance = json.loads((tmp_path / "draft" / "PROVENANCE.json").read_text())
    assert provenance["validation"]["eval_tau"] >= 1


def test_a_recording_goes_on_and_belongs_to_one_target(tmp_path, target_folder):
    target, processor = retrain.load_target(target_folder)
    seeds = retrain.TRAIN_SEEDS[:4]
    retrain.record(target, processor, seeds, tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    whole = [path.read_bytes() for path in files]
    files[1].unlink()
    retrain.record(target, processor, seeds, tmp_path)
    assert sorted(tmp_path.rglob("*.safetensors")) == files and len(files) == 4
    assert whole == [path.read_bytes() for path in files]
    with pytest.raises(TrainingDataError, match="clips: 4, now 5"):
        retrain.record(target, processor, retrain.TRAIN_SEEDS[:5], tmp_path)
    with torch.no_grad():
        target.get_output_embeddings().weight[0] += 1
    with pytest.raises(TrainingDataError, match="target_sha256"):
        retrain.record(target, processor, seeds, tmp_path)


def test_clip_lengths_vary_and_stay_in_range(monkeypatch):
    monkeypatch.undo()
    lengths = [retrain.clip_length(seed) for seed in range(2000)]
    assert min(lengths) < 40 and max(lengths) > 1500
    assert 0.05 < sum(length > retrain.SHORT_CLIPS[1] for length in lengths) / 2000 < 0.11


def test_the_optimizer_resumes_and_its_vectors_move_as_with_adam(target_folder):
    def after(num_steps, resume_at=None):
        torch.manual_seed(0)
        draft = SparrowDraftModel.from_target(retrain.load_target(target_folder)[0])
        optimizer = retrain.MuonWithAdam(draft)
        for step in range(num_steps):
            if step == resume_at:
                state = optimizer.state_dict()
                optimizer = retrain.MuonWithAdam(draft)
                optimizer.load_state_dict(state)
            generator = torch.Generator().manual_seed(step)
            for parameter in draft.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return draft

    whole, resumed = after(4), after(4, resume_at=2)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

    start = after(0)
    adam = torch.optim.Adam([start.norm.weight], lr=retrain.VECTOR_LEARNING_RATE, betas=(0.9, 0.98))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for parameter in start.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adam.step()
    torch.testing.assert_close(start.norm.weight, whole.norm.weight)

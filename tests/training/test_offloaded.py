"""A target whose layers live on disk (accelerate's offloading) teaches and verifies like one in memory."""

import pytest
import torch
from conftest import greedy
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments


@pytest.fixture
def offloaded(target: PreTrainedModel, tmp_path) -> PreTrainedModel:
    target.save_pretrained(tmp_path / "target")
    decoder = "model.language_model"
    device_map = dict.fromkeys((f"{decoder}.embed_tokens", f"{decoder}.norm", f"{decoder}.rotary_emb"), "cpu")
    device_map |= {f"{decoder}.layers.{layer}": "cpu" for layer in range(len(target.get_decoder().layers))}
    device_map |= dict.fromkeys((f"{decoder}.layers.1", "model.visual", "lm_head"), "disk")
    folders = {"offload_folder": tmp_path / "offload", "offload_buffers": True}
    return type(target).from_pretrained(tmp_path / "target", device_map=device_map, **folders).eval()


def test_an_offloaded_target_trains_the_same_draft(target, offloaded, samples, prompts, tmp_path):
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    weights = []
    for teacher in (target, offloaded):
        torch.manual_seed(0)
        draft = SparrowDraftModel.from_target(target, num_mtp_steps=2, num_draft_levels=3)
        arguments = SparrowTrainingArguments(
            output_dir=str(tmp_path / "training"),
            use_cpu=True,
            max_steps=3,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        SparrowTrainer(draft, teacher, arguments, train_dataset=samples).train()
        weights.append(draft.state_dict())
        plain = target.generate(**prompts[0], **greedy(12))
        assert torch.equal(teacher.generate(**prompts[0], **greedy(12), assistant_model=draft), plain)
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

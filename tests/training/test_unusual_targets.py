"""Targets that are offloaded to disk or quantised, or share keys and values, teach and verify all the same."""

import pytest
import torch
from greedy import greedy
from transformers import BitsAndBytesConfig, PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.training import SparrowDataCollator, SparrowTrainer, SparrowTrainingArguments, append_answer
from sparrow_hf.training.recording import RecordedDataset, record

from families import FAMILY_BY_NAME


@pytest.fixture
def offloaded(target: PreTrainedModel, tmp_path) -> PreTrainedModel:
    target.save_pretrained(tmp_path / "target")
    decoder = "model.language_model"
    device_map = dict.fromkeys((f"{decoder}.embed_tokens", f"{decoder}.norm", f"{decoder}.rotary_emb"), "cpu")
    device_map |= {f"{decoder}.layers.{layer}": "cpu" for layer in range(len(target.get_decoder().layers))}
    device_map |= dict.fromkeys((f"{decoder}.layers.1", "model.visual", "lm_head"), "disk")
    folders = {"offload_folder": tmp_path / "offload", "offload_buffers": True}
    return type(target).from_pretrained(tmp_path / "target", device_map=device_map, **folders).eval()


def train(draft, target, rows, folder, steps):
    arguments = SparrowTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SparrowTrainer(draft, target, arguments, train_dataset=rows).train()


def test_an_offloaded_target_trains_the_same_draft(target, offloaded, samples, prompts, tmp_path):
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    weights, recorded = [], []
    for teacher in (target, offloaded):
        torch.manual_seed(0)
        draft = SparrowDraftModel.from_target(target, num_mtp_steps=2, num_draft_levels=3)
        train(draft, teacher, samples, tmp_path / "training", steps=3)
        weights.append(draft.state_dict())
        recording = tmp_path / f"recording-{len(weights)}"
        record(draft, samples[:1], recording, SparrowDataCollator())
        recorded.append((recording / "rows" / "row-000000.safetensors").read_bytes())
        plain = target.generate(**prompts[0], **greedy(12))
        assert torch.equal(teacher.generate(**prompts[0], **greedy(12), assistant_model=draft), plain)
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert recorded[0] == recorded[1]


def test_a_draft_overfits_one_recorded_row_of_a_target_that_shares_keys_and_values(tmp_path):
    family = FAMILY_BY_NAME["gemma4-shared"]
    target = family.build_target()
    prompt = family.build_inputs(target)
    plain = target.generate(**prompt, **greedy(12))
    row = append_answer(prompt, plain[0, prompt["input_ids"].shape[1] :].tolist())
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(target, num_mtp_steps=3, num_draft_levels=3)
    assert record(draft, [row], tmp_path / "recorded", SparrowDataCollator()) == {}
    train(draft, target, RecordedDataset(tmp_path / "recorded", draft), tmp_path / "training", steps=80)
    assert torch.equal(target.generate(**prompt, **greedy(12), assistant_model=draft), plain)
    assert draft.last_generation.accepted == [3, 3, 2]


@pytest.mark.full
def test_a_draft_overfits_one_sample_of_a_4_bit_target(target, prompts, tmp_path):
    linear = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is installed for the full tier only")
    target.save_pretrained(tmp_path / "target")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = type(target).from_pretrained(tmp_path / "target", quantization_config=four_bits, device_map="cpu")
    layers = [module for module in quantised.modules() if isinstance(module, linear.Linear4bit)]
    assert quantised.get_decoder().layers[0].mlp.up_proj in layers
    for layer in layers:
        # On CPUs with AVX-512 BF16 bitsandbytes would pack the weights for a bf16 kernel, which refuses layers this
        # narrow. Without it they are expanded in fp32, and a row's result does not depend on the rows beside it.
        layer.support_avx512bf16_for_cpu = False
    plain = quantised.generate(**prompts[0], **greedy(20))
    row = append_answer(prompts[0], plain[0, prompts[0]["input_ids"].shape[1] :].tolist())
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(quantised, num_mtp_steps=3, num_draft_levels=3)
    train(draft, quantised, [row], tmp_path / "training", steps=40)
    assert torch.equal(quantised.generate(**prompts[0], **greedy(20), assistant_model=draft), plain)
    # 1 token from the prefill, then 4 per round.
    assert draft.last_generation.accepted[:4] == [3, 3, 3, 3]

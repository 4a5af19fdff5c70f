"""LoRA: only adapters train, through the trainer and across a resume; merging gives the same draft, and only it."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer import arguments, assert_same_weights, weights_of
from transformers import TrainerCallback

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import DraftConfigError, DraftLoadError
from sparrow_hf.training import SparrowTrainer
from sparrow_hf.training.lora import add_lora, merge_lora

LAYER_MAPS = {
    f"layers.0.{name}_proj"
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}


def logits_of(draft):
    """What the draft makes of five tokens, by the calls that decoding and training make."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, len(draft.config.feature_layers) * draft.config.hidden_size, generator=generator)
    with torch.no_grad():
        embeds = draft.embed_next(torch.arange(5)[None], hidden)
        output = draft(embeds, torch.arange(5)[None], is_causal=True).last_hidden_state
        logits = draft.compute_logits(output)
    return logits[logits.isfinite()]


def randomize(adapters, std=0.1):
    """Adapters with random weights: fresh ones are zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if "lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("feature_layers", [[-1], [2, -1]])
def test_every_linear_map_gets_an_adapter_and_nothing_else_trains(make_draft, feature_layers):
    draft = make_draft(feature_layers=feature_layers)
    before = logits_of(draft)
    adapters = add_lora(draft, rank=3)
    assert torch.equal(logits_of(draft), before)
    trained = {name.split(".lora_")[0] for name, parameter in draft.named_parameters() if parameter.requires_grad}
    assert trained == LAYER_MAPS | {"fc"} | ({"feature_fc"} if len(feature_layers) > 1 else set())
    assert all("lora_" in name for name, parameter in draft.named_parameters() if parameter.requires_grad)
    randomize(adapters)
    assert not torch.allclose(logits_of(draft), before, atol=1e-2)
    assert not any(name.startswith(("_target", "embedding", "head")) for name, _ in draft.named_modules())


def test_merged_equals_unmerged_and_is_a_plain_draft(tmp_path, target, make_draft):
    draft = make_draft()
    names = set(draft.state_dict())
    adapters = add_lora(draft, rank=3, alpha=5)
    randomize(adapters)
    unmerged = logits_of(draft)
    merged = merge_lora(adapters)
    assert merged is draft and set(draft.state_dict()) == names
    assert all(parameter.requires_grad for parameter in draft.parameters())
    assert (logits_of(draft) - unmerged).abs().max() <= 1e-6 * unmerged.abs().max()
    draft.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names
    loaded = SparrowDraftModel.from_pretrained(tmp_path)
    loaded.bind(target)
    assert torch.equal(logits_of(loaded), logits_of(draft))
    add_lora(draft, rank=2)


def test_the_adapters_are_saved_alone_and_come_back(tmp_path, make_draft):
    draft = make_draft()
    adapters = add_lora(draft, rank=3)
    randomize(adapters)
    adapters.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    # FC, what fuses the feature layers, and the decoder layer.
    assert len(stored) == 2 * (2 + len(LAYER_MAPS)) and all("lora_" in name for name in stored)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    again = make_draft()
    loaded = PeftModel.from_pretrained(again, str(tmp_path), is_trainable=True)
    assert torch.equal(logits_of(again), logits_of(draft))
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in again.named_parameters())
    assert_same_weights(weights_of(merge_lora(loaded)), weights_of(merge_lora(adapters)))


def test_the_trainer_trains_the_adapters_and_resumes_exactly(tmp_path, target, make_draft, recorded):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 2e-2}

    def with_adapters(seed):
        draft = make_draft(seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return draft, add_lora(draft, rank=3, dropout=0.1)

    def trainer_of(draft, folder, **kwargs):
        return SparrowTrainer(draft, target, arguments(folder, **settings), train_dataset=recorded, **kwargs)

    whole, adapters = with_adapters(seed=0)
    before = weights_of(whole)
    trainer_of(whole, tmp_path / "a").train()
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    interrupted, _ = with_adapters(seed=0)
    trainer_of(interrupted, tmp_path / "b", callbacks=[Stop()]).train()
    resumed, resumed_adapters = with_adapters(seed=1)
    trainer_of(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert_same_weights(weights_of(resumed), weights_of(whole))
    assert_same_weights(weights_of(merge_lora(resumed_adapters)), weights_of(merge_lora(adapters)))


def test_adapters_that_are_not_merged_start_no_training_and_it_is_said_what_does(tmp_path, make_draft):
    draft = make_draft()
    add_lora(draft, rank=2).save_pretrained(tmp_path / "adapters")
    draft.save_pretrained(tmp_path / "checkpoint-3")
    told = (
        "give the output folder of `sparrow train --lora`, where the finished draft has them merged (in Python, save "
        "what merge_lora returns); a checkpoint is only gone on from, with --resume"
    )
    for name, what in (
        ("adapters", "LoRA adapters and no draft"),
        ("checkpoint-3", r"LoRA adapters that are not merged \(missing: fc\.weight, .*fc\.base_layer\.weight.*\)"),
    ):
        with pytest.raises(DraftLoadError, match=f"^{tmp_path}/{name} holds {what}: {re.escape(told)}$"):
            SparrowDraftModel.from_pretrained(tmp_path / name)


def test_adapters_are_added_once(make_draft):
    draft = make_draft()
    add_lora(draft, rank=2)
    with pytest.raises(DraftConfigError, match="already"):
        add_lora(draft, rank=2)
    with pytest.raises(DraftConfigError, match="rank"):
        add_lora(make_draft(), rank=0)

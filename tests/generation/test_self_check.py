"""What cannot be read of a target is tried once; `sparrow doctor --target` always tries, and prints what was found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, PreTrainedModel
from typer.testing import CliRunner

from sparrow_hf import SparrowDraftModel
from sparrow_hf._transformers import CACHE, new_cache
from sparrow_hf.cli import app
from sparrow_hf.errors import UnsupportedGenerationError, UnsupportedTargetError
from sparrow_hf.generation import self_check
from sparrow_hf.generation.self_check import how_to_verify, measure, what_cannot_be_read
from sparrow_hf.targets import TargetView

from families import ALL_FAMILIES, FAMILY_BY_NAME
from lossless import SERVED
from oracles import drafting_around
from tiny_targets import HIDDEN_SIZE, TEXT_SIZES, randomize
from tiny_tokenizer import VOCAB_SIZE


class MixedRows(nn.Module):
    """A linear map that rounds its input by the largest number in it: quantisation with one scale per tensor."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, states: Tensor) -> Tensor:
        scale = states.abs().max() / 7
        return self.linear((states / scale).round() * scale)


class SeparateRows(MixedRows):
    """The same with one scale per row."""

    def forward(self, states: Tensor) -> Tensor:
        scale = states.abs().amax(dim=-1, keepdim=True) / 7
        return self.linear((states / scale).round() * scale)


def quantised(kind: type[MixedRows], target: PreTrainedModel | None = None) -> PreTrainedModel:
    target = target or FAMILY_BY_NAME["llava_onevision"].build_target()
    for layer in target.get_decoder().layers:
        layer.mlp.up_proj = kind(layer.mlp.up_proj)
    return target


def test_rows_that_depend_on_each_other_are_refused_before_anything_runs() -> None:
    target = quantised(MixedRows)
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    draft = SparrowDraftModel.from_target(target)
    ran: list[int] = []
    target.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UnsupportedTargetError, match="modules of the kind MixedRows"):
        target.generate(**inputs, assistant_model=draft, max_new_tokens=4)
    assert not ran


def test_rows_that_are_quantised_one_by_one_are_served() -> None:
    target = quantised(SeparateRows)
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    draft = SparrowDraftModel.from_target(target, num_tree_nodes=14, num_draft_levels=4, beam_width=3)
    plain = target.generate(**inputs, max_new_tokens=8)
    assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, max_new_tokens=8))
    assert how_to_verify(draft.target).untold == ["modules of the kind SeparateRows"]


def test_a_second_turn_keeps_its_positions() -> None:
    """What is tried before a call must not touch what the model noted of the first turn's video."""
    family, said = FAMILY_BY_NAME["qwen2_5_vl"], torch.tensor([[20, 21, 22]])
    texts = []
    for kind in (None, SeparateRows):
        target = family.build_target()
        if kind is not None:
            for layer in target.get_decoder().layers:
                layer.mlp.up_proj = kind(layer.mlp.up_proj)
        inputs = family.build_inputs(target, videos=1, num_frames=8)
        for assistant in (None, SparrowDraftModel.from_target(target)):
            cache = new_cache(target)
            first = target.generate(**inputs, max_new_tokens=6, do_sample=False, **{CACHE: cache})
            ids = torch.cat((first, said), dim=1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache}
            texts.append(target.generate(**turn, max_new_tokens=12, do_sample=False, assistant_model=assistant))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[2], texts[3])


def test_too_little_memory_says_nothing_about_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    target = quantised(SeparateRows)
    draft = SparrowDraftModel.from_target(target)
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    logits = self_check._Prompt._logits

    def out_of_memory(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("2 GB")

    monkeypatch.setattr(self_check._Prompt, "_logits", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        target.generate(**inputs, assistant_model=draft, max_new_tokens=4)
    monkeypatch.setattr(self_check._Prompt, "_logits", logits)
    target.generate(**inputs, assistant_model=draft, max_new_tokens=4)


def test_modules_replaced_after_a_call_are_tried() -> None:
    target = FAMILY_BY_NAME["llava_onevision"].build_target()
    inputs = FAMILY_BY_NAME["llava_onevision"].build_inputs(target)
    draft = SparrowDraftModel.from_target(target)
    target.generate(**inputs, assistant_model=draft, max_new_tokens=4)
    quantised(MixedRows, target)
    with pytest.raises(UnsupportedTargetError, match="modules of the kind MixedRows"):
        target.generate(**inputs, assistant_model=draft, max_new_tokens=4)


def paligemma2() -> PreTrainedModel:
    """Windows and full attention, whose masks the model in between makes itself."""
    text = TEXT_SIZES | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 6}
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, "hidden_size": HIDDEN_SIZE}
    vision |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16, "num_image_tokens": 4, "projection_dim": HIDDEN_SIZE}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=VOCAB_SIZE - 1, projection_dim=HIDDEN_SIZE
    )
    torch.manual_seed(1)
    target = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomize(target, [2])
    target.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return target.eval()


def test_a_model_that_makes_the_masks_of_its_layers_verifies_chains_only() -> None:
    target = paligemma2()
    draft = SparrowDraftModel.from_target(target)
    image = torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    input_ids = torch.tensor([[VOCAB_SIZE - 1] * 4 + [5, 6, 7, 8, 9]])
    call = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": image}
    call |= {"token_type_ids": torch.zeros_like(input_ids), "max_new_tokens": 20}
    plain = target.generate(**call)
    draft.config.set_tree_shape("14-4-3")
    with drafting_around(plain[0, 9:].tolist(), adversarial=True):
        with pytest.warns(UserWarning, match="makes the masks of its layers itself, cannot verify trees"):
            assert torch.equal(target.generate(**call, assistant_model=draft), plain)
    assert draft.last_generation.tau > 1
    with pytest.raises(UnsupportedGenerationError, match="draft and the target's forward, which makes the masks"):
        target.generate(**call, assistant_model=draft, cache_implementation="static")


def test_nothing_is_tried_where_all_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "measure", None)
    for number, family in enumerate(SERVED):
        view = TargetView(family.build_target(family.attentions[number % len(family.attentions)]))
        assert what_cannot_be_read(view) == [], family.name
        ways = how_to_verify(view)
        assert (ways.chains, ways.trees) == ("own", None if family.chains_only else "own")
        assert (family.chains_only or "") in ways.why_no_trees


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "gemma4", "hyperclovax_vision_v2", "minimax_m3_vl", "lfm3_vl", "qwen3_5"]
)
def test_what_was_read_is_what_is_measured(name: str) -> None:
    view = TargetView(FAMILY_BY_NAME[name].build_target())
    read, tried = how_to_verify(view), measure(view)
    assert (tried.chains, tried.trees) == (read.chains, read.trees)
    assert max(tried.differences.values()) < 1e-5


def test_a_class_that_is_not_transformers_own_is_tried() -> None:
    family = FAMILY_BY_NAME["llava_onevision"]
    remote = type("RemoteModel", (family.model_class,), {"__module__": "remote_code"})
    target = family.build_target()
    target.__class__ = remote
    view = TargetView(target)
    assert what_cannot_be_read(view) == ["the class RemoteModel, which is not transformers' own"]
    assert how_to_verify(view).differences.keys() == {"chain, own", "tree, own"}


def test_refused_families_are_refused_by_the_kind_of_their_layers() -> None:
    refused = [family for family in ALL_FAMILIES if family.refused is not None]
    assert refused
    for family in refused:
        with pytest.raises(UnsupportedTargetError, match=f"layers of the kind .*{family.refused}"):
            SparrowDraftModel.from_target(family.build_target())


def doctor(folder: Path, target: PreTrainedModel, *options: str) -> Any:
    target.save_pretrained(folder)
    return CliRunner().invoke(app, ["doctor", "--target", str(folder), *options])


def test_the_doctor_measures_a_target(tmp_path: Path) -> None:
    result = doctor(tmp_path, FAMILY_BY_NAME["gemma4"].build_target())
    assert result.exit_code == 0
    said = " ".join(result.output.split())
    assert "layers 2 sliding_attention, 2 full_attention" in said
    assert "trees verified, by the target's attention function" in said
    assert "difference (tree, own)" in said and "tried on first use nothing" in said


def test_the_doctor_says_why_a_target_gets_chains_only_or_nothing(tmp_path: Path) -> None:
    result = doctor(tmp_path / "chains", FAMILY_BY_NAME["lfm3_vl"].build_target(), "--attention", "eager")
    assert result.exit_code == 0
    assert "narrowed to chains: conv layers" in " ".join(result.output.split())
    result = doctor(tmp_path / "nothing", FAMILY_BY_NAME["dots3_note"].build_target())
    assert result.exit_code == 2
    assert "indexed_attention" in result.output

"""`sparrow export-vllm`: what is in the exported files, and which drafts vLLM cannot be given."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sparrow_vllm import config as plugin
from sparrow_vllm.rows import MAX_FRAME_HEADER_TOKENS
from transformers import LlavaConfig, LlavaOnevisionConfig, PreTrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig
from typer.testing import CliRunner

from sparrow_hf import SparrowDraftConfig, SparrowDraftModel, draft_inputs
from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.cli import app
from sparrow_hf.errors import BindingError, DraftConfigError, OutputError, SparrowError, TargetLoadError
from sparrow_hf.export_vllm import FORMAT, export_vllm, exported_config
from sparrow_hf.testbed import load_target, shipped
from sparrow_hf.tree_shapes import parse_tree_shape
from sparrow_hf.tuning import write_shape

QWEN, LLAVA = shipped("qwen2.5-vl"), shipped("llava-onevision")


def test_both_packages_agree() -> None:
    assert FORMAT == plugin.FORMAT
    assert draft_inputs.MAX_FRAME_HEADER_TOKENS == MAX_FRAME_HEADER_TOKENS


def test_the_built_in_draft(tmp_path: Path) -> None:
    fields = export_vllm(QWEN / "draft", tmp_path / "out", QWEN / "target", glimpse_spacing="logarithmic")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved == fields and saved["dtype"] == "float32"
    assert saved["architectures"] == ["SparrowDraftModel"] and saved["model_type"] == "sparrow_vllm"
    assert saved["eagle_aux_hidden_state_layer_ids"] == [12, 24]
    assert (saved["qkv_bias"], saved["attention_bias"], saved["mlp_bias"]) == (True, False, False)
    assert saved["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000.0}
    rule = saved["sparrow"].pop("position_rule")
    assert "largest of time, height and width" in rule
    rows = saved["sparrow"].pop("glimpse_rows")
    assert rows[:12] == [0, 1, 2, 3, 4, 6, 7, 9, 11, 13, 15, 17]
    assert rows == draft_inputs.logarithmic(torch.arange(saved["max_position_embeddings"]), 64).tolist()
    assert saved["sparrow"] == {
        "format": 3,
        "method": "eagle3",
        "target": {
            "name": None,
            "model_type": "qwen2_5_vl",
            "num_hidden_layers": 24,
            "hidden_size": 96,
            "vocab_size": 384,
            "visual_token_ids": [5, 6],
            "rms_norm_eps": 1e-06,
        },
        "feature_layers": [24],
        "feature_norm": False,
        "bridge_layer": 12,
        "after_visual": 4,
        "qk_norm": False,
        "input_norm": True,
        "output_norm": True,
        "fc_bias": False,
        "project_visual": False,
        "position_mode": "compact",
    }
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.pop("never_drafted").nonzero().flatten().tolist() == [5, 6]
    draft = SparrowDraftModel.from_pretrained(QWEN / "draft")
    norm = load_target(QWEN / "target")[0].model.language_model.norm.weight
    assert torch.equal(tensors.pop("target_norm.weight"), norm)
    assert tensors.keys() == {f"model.{name}" for name in draft.state_dict()}
    assert all(torch.equal(tensors[f"model.{name}"], tensor) for name, tensor in draft.state_dict().items())
    provenance = json.loads((tmp_path / "out" / "PROVENANCE.json").read_text())
    exported = provenance.pop("exported_for_vllm")
    assert provenance == draft.provenance and provenance
    assert exported["draft_sha256"] == tensor_digest(draft.state_dict())
    assert exported["glimpse_spacing"] == "logarithmic"


def test_a_target_without_middle_states_in_vllm(tmp_path: Path) -> None:
    fields = export_vllm(LLAVA / "draft", tmp_path, LLAVA / "target")
    assert fields["sparrow"]["method"] == "eagle" and fields["sparrow"]["glimpse_rows"] == []
    assert "target_norm.weight" not in load_file(tmp_path / "model.safetensors")
    assert fields["sparrow"]["position_rule"] is None


def config_for(target: PreTrainedConfig, **fields: Any) -> dict[str, Any]:
    return exported_config(SparrowDraftConfig.from_target_config(target, **fields), target)


@pytest.mark.parametrize(
    ("spacing", "num_glimpse_tokens", "rows"),
    [
        ("even", 0, []),
        ("logarithmic", 0, []),
        ("even", draft_inputs.EVERY_VISUAL_TOKEN, None),
        ("logarithmic", draft_inputs.EVERY_VISUAL_TOKEN, None),
        ("logarithmic", 10, [0, 1, 3, 6, 12, 22, 38, 64]),
    ],
)
def test_the_visual_tokens_of_a_glimpse(spacing: str, num_glimpse_tokens: int, rows: list[int] | None) -> None:
    glimpse = {
        "feature_layers": [-1],
        "glimpse_spacing": spacing,
        "num_glimpse_tokens": num_glimpse_tokens,
        "max_position_embeddings": 100,
    }
    fields = config_for(Qwen2_5_VLConfig(), **glimpse, visual_bridge_layer=9)
    assert fields["sparrow"]["glimpse_rows"] == rows
    # What is not read is not asked for.
    depth = Qwen2_5_VLConfig().text_config.num_hidden_layers
    assert fields["eagle_aux_hidden_state_layer_ids"] == ([depth] if rows == [] else [9, depth])


@pytest.mark.parametrize("scaled", [{}, {"feature_norm": False}], ids=("scaled", "as they are"))
def test_several_feature_layers_and_another_bridge(scaled: dict[str, Any]) -> None:
    other = {"feature_layers": [-1, 3, 20], "visual_bridge_layer": 3, "glimpse_spacing": "logarithmic"}
    fields = config_for(Qwen3VLConfig(), **other, **scaled)
    depth = Qwen3VLConfig().text_config.num_hidden_layers
    assert fields["sparrow"]["feature_layers"] == [depth, 3, 20]
    assert fields["eagle_aux_hidden_state_layer_ids"] == [3, 20, depth]
    assert fields["sparrow"]["feature_norm"] == (not scaled)
    assert fields["sparrow"]["qk_norm"] and fields["sparrow"]["position_rule"] is None


def test_a_llama_layer_has_its_output_bias() -> None:
    fields = config_for(LlavaConfig(), feature_layers=[-1], attention_bias=True, mlp_bias=True)
    assert fields["qkv_bias"] and fields["attention_bias"] and fields["mlp_bias"]


def test_a_reduced_vocabulary(tmp_path: Path) -> None:
    draft = SparrowDraftModel.from_pretrained(QWEN / "draft")
    draft.set_vocabulary([2, 9, 71])
    draft.save_pretrained(tmp_path / "draft")
    export_vllm(tmp_path / "draft", tmp_path / "out", QWEN / "target", "logarithmic")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert (~tensors["never_drafted"]).nonzero().flatten().tolist() == [2, 9, 71]
    assert not any("draft_to_target" in name for name in tensors)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_num_hidden_layers": 12, "feature_layers": [-1]},
        {"hidden_size": 896},
        {"vocab_size": 999},
        {"visual_token_ids": [3]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_another_target_of_the_same_family(wrong: dict[str, Any]) -> None:
    with pytest.raises(BindingError, match=f"{next(iter(wrong)).removeprefix('target_')}: draft"):
        config_for(Qwen2_5_VLConfig(), **wrong)


@pytest.mark.parametrize(
    ("target", "fields", "message"),
    [
        (Qwen2_5_VLConfig(), {"hidden_act": "gelu"}, "silu only, this draft has gelu"),
        (Qwen3VLConfig(), {"attention_bias": True}, "no Qwen3 layers with biases"),
        (
            LlavaOnevisionConfig(),
            {},
            "of a llava_onevision vLLM hands out the last ones only. Train .*--feature-layers -1",
        ),
        (Qwen2_5_VLConfig(), {}, "64 visual tokens at equal distances, .* with --glimpse-spacing logarithmic, or"),
    ],
    ids=("activation", "biases", "layers", "glimpse"),
)
def test_parts_that_the_plugin_has_not(target: PreTrainedConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DraftConfigError, match=message):
        config_for(target, **fields)


@pytest.mark.parametrize(
    ("target", "spacing", "error", "message"),
    [
        (LLAVA / "target", None, BindingError, "made for another target: model_type: draft qwen2_5_vl, target llava"),
        (None, None, BindingError, r"say where it is \(--target\)"),
        (QWEN / "nothing", None, TargetLoadError, "cannot be loaded"),
        (QWEN / "target", None, DraftConfigError, "at equal distances"),
        (QWEN / "target", "linear", DraftConfigError, "must be 'even' or 'logarithmic', found 'linear'"),
    ],
    ids=("another", "unknown", "missing", "even", "spacing"),
)
def test_what_cannot_be_exported_leaves_the_folder_alone(
    tmp_path: Path, target: Path | None, spacing: str | None, error: type[SparrowError], message: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sparrow_vllm"}')
    with pytest.raises(error, match=message):
        export_vllm(QWEN / "draft", tmp_path, target, glimpse_spacing=spacing)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_another_model_is_not_replaced(tmp_path: Path) -> None:
    draft = shutil.copytree(QWEN / "draft", tmp_path / "draft")
    before = {path.name: path.read_bytes() for path in draft.iterdir()}
    with pytest.raises(OutputError, match="draft holds a model, which would be replaced: name another folder"):
        export_vllm(draft, draft, QWEN / "target", "logarithmic")
    assert {path.name: path.read_bytes() for path in draft.iterdir()} == before


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        export_vllm(QWEN / "draft", tmp_path, QWEN / "target", "logarithmic")


def test_a_target_without_its_norm(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text((QWEN / "target" / "config.json").read_text())
    (target / "model.safetensors").write_bytes((QWEN / "draft" / "model.safetensors").read_bytes())
    # The draft's own norm has a name like it.
    assert export_vllm(QWEN / "draft", tmp_path / "out", target, "logarithmic")
    (target / "model.safetensors").unlink()
    with pytest.raises(TargetLoadError, match="hold 0 norms behind the decoder"):
        export_vllm(QWEN / "draft", tmp_path / "out", target, "logarithmic")


@pytest.mark.parametrize("shape", [None, "chain-3", "24-8-4", "none"])
def test_the_command(tmp_path: Path, shape: str | None) -> None:
    draft, depth = QWEN / "draft", 12
    if shape is not None:
        draft, depth = tmp_path / "draft", {"chain-3": 3, "24-8-4": 8, "none": 1}[shape]
        shutil.copytree(QWEN / "draft", draft)
        write_shape(draft, parse_tree_shape(shape), {})
    arguments = [draft, tmp_path / "out", "--target", QWEN / "target", "--glimpse-spacing", "logarithmic"]
    result = CliRunner().invoke(app, ["export-vllm", *map(str, arguments)], env={"COLUMNS": "500"})
    assert result.exit_code == 0, result.output
    serve = {"method": "eagle3", "model": str(tmp_path / "out"), "num_speculative_tokens": depth}
    assert f"vllm serve TARGET --speculative-config '{json.dumps(serve)}'" in result.output
    assert ("this draft proposes nothing" in result.output) == (shape == "none")
    assert "largest of time, height and width" in result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sparrow"]["glimpse_rows"][:3] == [0, 1, 2]
    result = CliRunner().invoke(app, ["export-vllm", str(QWEN / "draft"), str(tmp_path / "other")])
    assert result.exit_code == 2 and "--target" in result.output

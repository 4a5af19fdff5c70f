"""`SparrowDraftConfig`: what follows the target, what is refused, what survives a round trip."""

import json
import re

import pytest
from transformers import AutoConfig, Blip2VisionConfig, PreTrainedConfig, Qwen2_5_VLConfig, Qwen2Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config

from sparrow_hf import TREE_PRESETS, SparrowDraftConfig, SparrowDraftModel, TreeShape
from sparrow_hf.configuration_sparrow import parse_tree_shape
from sparrow_hf.errors import DraftConfigError, UnsupportedTargetError
from sparrow_hf.evaluation import parse_tree

from families import FAMILY_BY_NAME
from tiny_targets import Family


def test_follows_the_targets_text_decoder(family: Family) -> None:
    target_config = family.build_target().config
    text = target_config.get_text_config()
    config = SparrowDraftConfig.from_target_config(target_config)
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(config, name) == getattr(text, name)
    assert sorted(config.visual_token_ids) == sorted(family.visual_token_ids)
    assert config.target_num_hidden_layers == text.num_hidden_layers
    assert config.visual_bridge_layer == text.num_hidden_layers // 2
    assert not any(key.startswith("mrope") for key in config.rope_parameters)
    # What `generate()` and `pipeline()` compare between a model and its assistant.
    assert config.get_text_config().vocab_size == text.vocab_size
    assert [getattr(config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")] == [
        getattr(text, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    ]


def test_round_trip_through_json(tmp_path) -> None:
    config = SparrowDraftConfig.from_target_config(Qwen2_5_VLConfig(), feature_layers=[20, 40, -1], beam_width=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SparrowDraftConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sparrow_draft"


def test_minus_one_is_the_post_norm_state() -> None:
    config = SparrowDraftConfig(target_num_hidden_layers=28, feature_layers=[14, -1])
    assert config.feature_layer_ids == (14, 28)


@pytest.mark.parametrize(
    "fields",
    [
        {"feature_layers": [29]},
        {"feature_layers": [0]},
        {"visual_bridge_layer": 29},
        {"num_glimpse_tokens": -1},
        {"position_mode": "rotary"},
        {"glimpse_spacing": "linear"},
        {"num_mtp_steps": 0},
        {"num_attention_heads": 28, "num_key_value_heads": 5},
        {"num_draft_levels": 4, "beam_width": 1, "num_tree_nodes": 30},
        {"num_tree_nodes": 1, "num_draft_levels": 4, "beam_width": 8},
        {"beam_width": 0},
    ],
)
def test_contradictions_are_refused(fields: dict) -> None:
    with pytest.raises(DraftConfigError):
        SparrowDraftConfig(**fields)


def test_drafts_saved_with_the_former_window_field(tmp_path) -> None:
    """Every draft of version 0.1 has it in its file, nearly all as null."""
    SparrowDraftConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert "sliding_window" not in saved
    file.write_text(json.dumps(saved | {"sliding_window": None}))
    assert SparrowDraftConfig.from_pretrained(tmp_path).to_dict() == SparrowDraftConfig().to_dict()
    file.write_text(json.dumps(saved | {"sliding_window": 8}))
    with pytest.raises(DraftConfigError, match="sliding_window is no longer supported"):
        SparrowDraftConfig.from_pretrained(tmp_path)


def test_an_unknown_text_model_gets_a_llama_layer() -> None:
    """Its fields by whatever names it has for them, one RoPE instead of one per kind of layer."""
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
    text = sizes | {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-4, "num_hidden_layers": 12}
    config = SparrowDraftConfig.from_target_config(Gemma3Config(text_config=text))
    assert config.block_type == "llama"
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert (config.hidden_act, config.rms_norm_eps) == ("gelu_pytorch_tanh", 1e-4)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000.0}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"layer_norm_eps": 1e-3}, {"rms_norm_eps": 1e-3}, id="epsilon"),
        pytest.param({"intermediate_size": [96, 64]}, {"intermediate_size": 96}, id="one-width-per-layer"),
        pytest.param({"intermediate_size": None}, {"intermediate_size": 192}, id="no-width"),
        pytest.param({"dense_intermediate_size": 80}, {"intermediate_size": 80}, id="experts-and-a-dense-layer"),
        pytest.param({"num_key_value_heads": 3}, {"num_key_value_heads": 4}, id="heads-that-do-not-divide"),
        pytest.param({"num_key_value_heads": None}, {"num_key_value_heads": 4}, id="no-heads"),
        pytest.param({"head_dim": None}, {"head_dim": 12}, id="no-head-size"),
        pytest.param({"head_dim": 7}, {"head_dim": 6}, id="a-head-of-odd-size"),
        pytest.param({"hidden_act": "swish_of_its_own"}, {"hidden_act": "silu"}, id="activation"),
        pytest.param({"hidden_act": None}, {"hidden_act": "silu"}, id="no-activation"),
        pytest.param({"attention_bias": True}, {"attention_bias": True, "mlp_bias": False}, id="attention-bias"),
        pytest.param({"mlp_bias": True}, {"attention_bias": False, "mlp_bias": True}, id="mlp-bias"),
        pytest.param({"attention_bias": None}, {"attention_bias": False}, id="no-bias"),
    ],
)
def test_fields_of_other_forms(fields: dict[str, object], expected: dict[str, object]) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}
    text = PreTrainedConfig(**(sizes | {"intermediate_size": 60} | fields))
    config = SparrowDraftConfig.from_target_config(text)
    assert {name: getattr(config, name) for name in expected} == expected
    SparrowDraftModel(config)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 7.0, "mrope_section": [2, 1, 1]}, {}),
        ({"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}, {}),
        ({"rope_type": "dynamic", "rope_theta": 7.0, "factor": 2.0}, {}),
        ({"rope_type": "longrope", "rope_theta": 7.0, "long_factor": [1.0], "short_factor": [1.0]}, {}),
        ({"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0, "partial_rotary_factor": 0.5}, {}),
    ],
)
def test_the_draft_takes_over_a_rope_that_is_the_same_for_every_text(
    rope: dict[str, object], expected: dict[str, object]
) -> None:
    text = Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1.0})
    text.rope_parameters = rope
    found = SparrowDraftConfig.from_target_config(text).rope_parameters
    assert found == {"rope_type": "default", "rope_theta": 7.0} | expected


def test_a_model_without_a_text_decoder_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedTargetError, match="blip_2_vision_model says no vocab_size"):
        SparrowDraftConfig.from_target_config(Blip2VisionConfig())


def test_tree_presets_are_the_papers() -> None:
    config = SparrowDraftConfig()
    # No preset, but what pays at the acceptance of a good draft.
    assert config.tree_shape == TreeShape(num_tree_nodes=8, num_draft_levels=7, beam_width=1)
    config.set_tree_shape("48-5-10")
    assert config.tree_shape == (48, 5, 10) == TREE_PRESETS["48-5-10"]
    config.set_tree_shape((3, 2, 1))
    assert config.tree_shape == (3, 2, 1)
    config.set_tree_shape("chain-2")
    assert config.tree_shape == (3, 2, 1)
    with pytest.raises(DraftConfigError, match="unknown tree 'oak': give one of none, chain-5, "):
        config.set_tree_shape("oak")
    with pytest.raises(DraftConfigError):
        config.set_tree_shape((30, 4, 1))
    assert config.tree_shape == (3, 2, 1)


def test_a_shape_is_read_from_its_text() -> None:
    assert parse_tree_shape("none") == (1, 0, 1)
    assert parse_tree_shape("chain-7") == TreeShape(num_tree_nodes=8, num_draft_levels=7, beam_width=1)
    assert parse_tree_shape("20-3-4") == TreeShape(num_tree_nodes=20, num_draft_levels=3, beam_width=4)
    assert {name: parse_tree_shape(name) for name in TREE_PRESETS} == TREE_PRESETS
    assert parse_tree is parse_tree_shape


@pytest.mark.parametrize("text", ["", "oak", "1-2", "chain-", "chain-0-1", "-3-4-5", "3-4-5-6", f"chain-{'9' * 5000}"])
def test_a_text_that_names_no_shape_is_refused(text: str) -> None:
    with pytest.raises(DraftConfigError, match="unknown tree"):
        parse_tree_shape(text)


@pytest.mark.parametrize("text", ["1-5-10", "6-4-1", "5-0-2", "9-2-0", "0-0-1"])
def test_a_tree_that_cannot_grow_is_refused(text: str) -> None:
    with pytest.raises(DraftConfigError, match="found"):
        parse_tree_shape(text)


@pytest.mark.parametrize(
    ("text", "most", "shape"),
    [
        ("chain-5000", "num_draft_levels is at most 4096", (5001, 5000, 1)),
        ("70000-4-5000", "num_tree_nodes is at most 65536, beam_width is at most 4096", (70000, 4, 5000)),
    ],
)
def test_a_tree_too_large_is_refused_with_what_is(text: str, most: str, shape: tuple[int, int, int]) -> None:
    message = f"a tree of this size does not fit into any memory: {most}, found {shape}"
    with pytest.raises(DraftConfigError, match=f"^{re.escape(message)}$"):
        parse_tree_shape(text)


def test_the_placeholder_of_molmo_is_known_by_its_own_name() -> None:
    config = FAMILY_BY_NAME["molmo2"].build_target().config
    assert SparrowDraftConfig.from_target_config(config).visual_token_ids == [config.image_patch_id]

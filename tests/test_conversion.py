"""Converted drafts: their logits are those of an independent forward of the checkpoint; misfits are refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel
from typer.testing import CliRunner

from sparrow_hf import SparrowDraftModel
from sparrow_hf.cli import app
from sparrow_hf.conversion import convert_checkpoint
from sparrow_hf.draft_inputs import draft_positions
from sparrow_hf.errors import DraftLoadError

from families import FAMILY_BY_NAME

#: The family's config.json; heads and epsilon differ from the targets' on purpose.
CONFIG = {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-3, "rope_theta": 500.0}
HEAD_DIM = 16


@pytest.fixture(scope="module", params=["qwen2_5_vl", "video_llava", "qwen3_vl"])
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return FAMILY_BY_NAME[request.param].build_target()


@pytest.fixture(scope="module")
def qwen() -> PreTrainedModel:
    return FAMILY_BY_NAME["qwen2_5_vl"].build_target()


def eagle_tensors(
    target: PreTrainedModel, *, fc_bias: bool = True, input_norm: bool = False, qkv_bias: bool | None = None
) -> dict[str, Tensor]:
    """A checkpoint of random weights in the layout of EAGLE-1/2."""
    generator = torch.Generator().manual_seed(3)
    embedding = target.get_input_embeddings().weight.detach()
    hidden = embedding.shape[1]
    attention, mlp = "layers.0.self_attn.", "layers.0.mlp."

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 1.2 / math.sqrt(columns)

    tensors = {
        "embed_tokens.weight": embedding.clone(),
        "fc.weight": matrix(hidden, 2 * hidden),
        f"{attention}q_proj.weight": matrix(2 * HEAD_DIM, hidden),
        f"{attention}k_proj.weight": matrix(HEAD_DIM, hidden),
        f"{attention}v_proj.weight": matrix(HEAD_DIM, hidden),
        f"{attention}o_proj.weight": matrix(hidden, 2 * HEAD_DIM),
        f"{mlp}gate_proj.weight": matrix(48, hidden),
        f"{mlp}up_proj.weight": matrix(48, hidden),
        f"{mlp}down_proj.weight": matrix(hidden, 48),
        "layers.0.post_attention_layernorm.weight": 1 + matrix(1, hidden)[0],
    }
    text_type = target.config.get_text_config().model_type
    if "qwen3" in text_type:
        tensors |= {f"{attention}{name}_norm.weight": 1 + matrix(1, HEAD_DIM)[0] for name in "qk"}
    if "qwen2" in text_type if qkv_bias is None else qkv_bias:
        for name in "qkv":
            tensors[f"{attention}{name}_proj.bias"] = matrix(1, len(tensors[f"{attention}{name}_proj.weight"]))[0]
    if fc_bias:
        tensors["fc.bias"] = matrix(1, hidden)[0]
    if input_norm:
        tensors["layers.0.input_layernorm.weight"] = 1 + matrix(1, hidden)[0]
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


@pytest.fixture
def target_folder(target: PreTrainedModel, tmp_path: Path) -> Path:
    target.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def qwen_folder(qwen: PreTrainedModel, tmp_path: Path) -> Path:
    qwen.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def prompt_of(target: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Twelve tokens, four of them visual in the middle, and a random state for each."""
    visual = FAMILY_BY_NAME[target.config.model_type].visual_token_ids[-1]
    ids = torch.tensor([20, 21, 22, visual, visual, visual, visual, 23, 24, 25, 26, 27])
    hidden = target.get_input_embeddings().weight.shape[1]
    return ids, torch.randn(len(ids), hidden, generator=torch.Generator().manual_seed(5))


def our_logits(draft: SparrowDraftModel, target: PreTrainedModel) -> Tensor:
    ids, states = prompt_of(target)
    draft.bind(target)
    kept = draft_positions(ids, draft.config.visual_token_ids or [], draft.config.num_glimpse_tokens)
    position_ids = kept.position_ids(draft.config.position_mode)[None, :-1]
    with torch.no_grad():
        embeds = draft.embed_next(ids[kept.text[1:]][None], states[kept.text[:-1]][None])
        return draft.compute_logits(draft(embeds, position_ids, is_causal=True).last_hidden_state)[0]


@torch.no_grad()
def their_logits(
    tensors: dict[str, Tensor], target: PreTrainedModel, *, theta: float = 500.0, epsilon: float = 1e-3
) -> Tensor:
    """The checkpoint's forward, written out: fc over (embedding, state), one decoder layer, the target's head."""
    ids, states = prompt_of(target)
    positions = torch.tensor([0, 1, 2, 7, 8, 9, 10])
    next_ids = torch.tensor([21, 22, 23, 24, 25, 26, 27])
    layer = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items() if name.startswith("layers.")}

    def norm(rows: Tensor, weight: Tensor) -> Tensor:
        return weight * rows / (rows.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()

    def heads(rows: Tensor, name: str) -> Tensor:
        weight, bias = layer[f"self_attn.{name}_proj.weight"], layer.get(f"self_attn.{name}_proj.bias")
        vectors = linear(rows, weight, bias).reshape(len(rows), -1, HEAD_DIM)
        head_norm = layer.get(f"self_attn.{name}_norm.weight")
        return vectors if head_norm is None else norm(vectors, head_norm)

    def rotate(vectors: Tensor) -> Tensor:
        frequencies = theta ** (-torch.arange(HEAD_DIM // 2) * 2.0 / HEAD_DIM)
        angles = (positions[:, None] * frequencies)[:, None]
        first, second = vectors.chunk(2, dim=-1)
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    embeds = tensors["embed_tokens.weight"][next_ids]
    residual = linear(torch.cat((embeds, states[positions]), -1), tensors["fc.weight"], tensors.get("fc.bias"))
    weight = layer.get("input_layernorm.weight")
    rows = residual if weight is None else norm(residual, weight)
    queries, keys, values = rotate(heads(rows, "q")), rotate(heads(rows, "k")), heads(rows, "v")
    mixed = torch.zeros_like(queries)
    for row in range(len(positions)):
        for head in range(2):
            scores = keys[: row + 1, 0] @ queries[row, head] / math.sqrt(HEAD_DIM)
            mixed[row, head] = scores.softmax(-1) @ values[: row + 1, 0]
    hidden = residual + linear(mixed.flatten(1), layer["self_attn.o_proj.weight"])
    rows = norm(hidden, layer["post_attention_layernorm.weight"])
    gate, up = (linear(rows, layer[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    hidden = hidden + linear(silu(gate) * up, layer["mlp.down_proj.weight"])
    return linear(hidden, target.get_output_embeddings().weight)


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    drafted = ours.isfinite()
    assert drafted.sum(-1).min() > ours.shape[-1] - 8
    torch.testing.assert_close(ours[drafted], theirs[drafted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("fc_bias", [False, True])
def test_logits_are_those_of_an_independent_forward(
    target: PreTrainedModel, target_folder: Path, tmp_path: Path, fc_bias: bool, input_norm: bool
) -> None:
    tensors = eagle_tensors(target, fc_bias=fc_bias, input_norm=input_norm)
    conversion = convert_checkpoint(write(tmp_path / "eagle", tensors), target_folder)
    config = conversion.draft.config
    assert (config.fc_bias, config.input_norm, config.output_norm) == (fc_bias, input_norm, False)
    assert (config.position_mode, config.num_glimpse_tokens) == ("original", 0)
    assert (
        config.block_type
        == {"qwen2_5_vl": "qwen2", "video_llava": "llama", "qwen3_vl": "qwen3"}[target.config.model_type]
    )
    assert conversion.dropped == {"embed_tokens.weight": "equal to the target's"}
    theirs = their_logits(tensors, target)
    assert_same_logits(our_logits(conversion.draft, target), theirs)

    conversion.draft.save_pretrained(tmp_path / "draft")
    assert set(load_file(tmp_path / "draft" / "model.safetensors")) == tensors.keys() - {"embed_tokens.weight"}
    assert_same_logits(our_logits(SparrowDraftModel.from_pretrained(tmp_path / "draft"), target), theirs)


def test_generate_with_a_converted_draft(qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
    draft = convert_checkpoint(write(tmp_path / "eagle", eagle_tensors(qwen)), qwen_folder).draft
    inputs = FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(qwen)
    plain = qwen.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(qwen.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=draft), plain)


def test_a_block_without_biases_on_a_target_with_them(
    qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path
) -> None:
    tensors = eagle_tensors(qwen, qkv_bias=False)
    draft = convert_checkpoint(write(tmp_path / "eagle", tensors), qwen_folder).draft
    assert draft.config.block_type == "llama"
    assert_same_logits(our_logits(draft, qwen), their_logits(tensors, qwen))


def test_rope_of_the_family(qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
    """No base in config.json is a base of 10,000; the sections of a copied configuration do not apply."""
    tensors = eagle_tensors(qwen)
    folder = write(tmp_path / "eagle", tensors, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    # What has no value is as if it were not there.
    config["hidden_act"] = None
    (folder / "config.json").write_text(json.dumps(config))
    draft = convert_checkpoint(folder, qwen_folder).draft
    assert_same_logits(our_logits(draft, qwen), their_logits(tensors, qwen, theta=10000.0))


def test_without_a_configuration_the_targets_is_used(qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
    tensors = eagle_tensors(qwen)
    save_file(tensors, tmp_path / "alone.safetensors")
    conversion = convert_checkpoint(tmp_path / "alone.safetensors", qwen_folder, num_attention_heads=2)
    assert "no config.json" in conversion.notes[0]
    text = qwen.config.get_text_config()
    theta, epsilon = text.rope_parameters["rope_theta"], text.rms_norm_eps
    theirs = their_logits(tensors, qwen, theta=theta, epsilon=epsilon)
    assert_same_logits(our_logits(conversion.draft, qwen), theirs)


@pytest.mark.parametrize("fc_bias", [False, True])
def test_vispec_text_path(qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path, fc_bias: bool) -> None:
    """`img_fc` is applied before `fc` on text too, so it is merged into `fc`; the compressor is left out."""
    plain = eagle_tensors(qwen, fc_bias=fc_bias)
    hidden = qwen.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(9)
    image_weight = torch.randn(hidden, 2 * hidden, generator=generator) / math.sqrt(hidden)
    image_bias = torch.randn(hidden, generator=generator)
    stored = plain | {
        "img_fc.weight": image_weight,
        "img_fc.bias": image_bias,
        "imadpt.q": torch.zeros(2, 2, 16),
        "imadpt.k_proj.weight": torch.zeros(hidden, hidden),
    }
    conversion = convert_checkpoint(write(tmp_path / "vispec", stored), qwen_folder)
    assert {"imadpt.q", "imadpt.k_proj.weight", "embed_tokens.weight"} == conversion.dropped.keys()
    assert "img_fc was folded into fc" in conversion.notes[0]

    embedding_half, state_half = plain["fc.weight"].chunk(2, dim=1)
    by_hand = plain | {
        "fc.weight": torch.cat((embedding_half, state_half @ image_weight[:, :hidden]), dim=1),
        "fc.bias": state_half @ image_bias + plain.get("fc.bias", torch.zeros(hidden)),
    }
    assert_same_logits(our_logits(conversion.draft, qwen), their_logits(by_hand, qwen))


def test_tensors_that_are_not_the_drafts(qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
    stored = eagle_tensors(qwen) | {
        "lm_head.weight": qwen.get_output_embeddings().weight.detach().clone(),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(HEAD_DIM // 2),
    }
    conversion = convert_checkpoint(write(tmp_path / "eagle", stored), qwen_folder)
    assert conversion.dropped == {
        "embed_tokens.weight": "equal to the target's",
        "lm_head.weight": "equal to the target's",
        "layers.0.self_attn.rotary_emb.inv_freq": "computed from the configuration",
    }
    assert_same_logits(our_logits(conversion.draft, qwen), their_logits(eagle_tensors(qwen), qwen))


def test_an_embedding_that_cannot_be_compared_is_reported(
    qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path
) -> None:
    (qwen_folder / "model.safetensors").unlink()
    conversion = convert_checkpoint(write(tmp_path / "eagle", eagle_tensors(qwen)), qwen_folder)
    reason = "not compared: the target's weights are not on this machine"
    assert conversion.dropped["embed_tokens.weight"] == reason
    assert conversion.draft.provenance["dropped"] == conversion.dropped
    assert len(conversion.draft.provenance["source_sha256"]["model.safetensors"]) == 64


def keep_tensors(folder: Path, ending: str) -> None:
    """Leaves only the tensors of a target on disk whose names end so."""
    kept = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name.endswith(ending)}
    assert kept
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_is_compared_with_the_embedding_it_is_tied_to(
    qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path
) -> None:
    """A target with tied embeddings stores its embedding only."""
    keep_tensors(qwen_folder, "embed_tokens.weight")
    embedding = qwen.get_input_embeddings().weight.detach()
    right = write(tmp_path / "right", eagle_tensors(qwen) | {"lm_head.weight": embedding.clone()})
    assert convert_checkpoint(right, qwen_folder).dropped["lm_head.weight"] == "equal to the target's"
    wrong = write(tmp_path / "wrong", eagle_tensors(qwen) | {"lm_head.weight": embedding + 0.5})
    with pytest.raises(DraftLoadError, match=r"lm_head\.weight of the draft is not the target's .*embed_tokens"):
        convert_checkpoint(wrong, qwen_folder)


def test_weights_without_an_embedding_are_not_said_to_be_missing(
    qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path
) -> None:
    keep_tensors(qwen_folder, "q_proj.weight")
    stored = eagle_tensors(qwen)
    stored["lm_head.weight"] = stored["embed_tokens.weight"].clone()
    dropped = convert_checkpoint(write(tmp_path / "eagle", stored), qwen_folder).dropped
    reason = "not compared: the target's weights hold no "
    assert dropped["embed_tokens.weight"] == f"{reason}embed_tokens.weight"
    assert dropped["lm_head.weight"] == f"{reason}lm_head.weight or embed_tokens.weight"


def test_half_precision_is_kept(qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in eagle_tensors(qwen).items()}
    conversion = convert_checkpoint(write(tmp_path / "eagle", tensors), qwen_folder)
    assert conversion.draft.dtype == torch.bfloat16
    assert conversion.dropped["embed_tokens.weight"] == "equal to the target's"


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"extra.weight": torch.zeros(2)}, r"unknown: extra\.weight"),
            ({"midlayer.weight": torch.zeros(2), "fc.weight": None}, r"EAGLE-3 \(it holds midlayer\.weight\)"),
            ({"d2t": torch.zeros(2), "layers.0.self_attn.q_proj.weight": None}, r"EAGLE-3 \(it holds d2t\)"),
            ({"layers.0.mlp.up_proj.weight": None}, r"missing: layers\.0\.mlp\.up_proj\.weight"),
            ({"layers.0.mlp.gate_proj.weight": None}, r"lacks layers\.0\.mlp\.gate_proj\.weight"),
            ({"layers.0.mlp.up_proj.weight": torch.zeros(3, 32)}, "of another shape"),
            ({"fc.weight": None}, "no draft of the EAGLE-1/2 family"),
            ({"fc.weight": torch.zeros(32, 96)}, "reads several of its layers"),
            ({"fc.weight": torch.zeros(64, 128)}, "another target"),
        ],
    )
    def test_tensors(
        self, qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        tensors = {name: tensor for name, tensor in (eagle_tensors(qwen) | change).items() if tensor is not None}
        with pytest.raises(DraftLoadError, match=message):
            convert_checkpoint(write(tmp_path / "eagle", tensors), qwen_folder)

    def test_another_targets_embedding(self, qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
        tensors = eagle_tensors(qwen)
        tensors["embed_tokens.weight"] += 0.5
        with pytest.raises(DraftLoadError, match="made for another target"):
            convert_checkpoint(write(tmp_path / "eagle", tensors), qwen_folder)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type 'linear'"),
            ({"rope_scaling": "linear"}, "RoPE in an object, found 'linear'"),
            *(({"num_attention_heads": heads}, f"draft must be .*, found {heads!r}") for heads in (0, 999, "2")),
        ],
    )
    def test_a_configuration(
        self, qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(DraftLoadError, match=message):
            convert_checkpoint(write(tmp_path / "eagle", eagle_tensors(qwen), **fields), qwen_folder)

    def test_damaged_and_empty(self, qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
        folder = write(tmp_path / "eagle", eagle_tensors(qwen))
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
        with pytest.raises(DraftLoadError, match="damaged"):
            convert_checkpoint(folder, qwen_folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(DraftLoadError, match="holds neither"):
            convert_checkpoint(folder, qwen_folder)
        with pytest.raises(DraftLoadError, match="configuration of the target"):
            convert_checkpoint(write(tmp_path / "other", eagle_tensors(qwen)), tmp_path / "nowhere")


class TestPickled:
    def test_only_when_asked_for(self, qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
        folder = write(tmp_path / "eagle", tensors := eagle_tensors(qwen))
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(DraftLoadError, match="--weights-only-bin"):
            convert_checkpoint(folder, qwen_folder)
        draft = convert_checkpoint(folder, qwen_folder, weights_only_bin=True).draft
        assert_same_logits(our_logits(draft, qwen), their_logits(tensors, qwen))

    def test_code_is_never_run(self, qwen_folder: Path, tmp_path: Path) -> None:
        class Touch:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "run",)

        torch.save({"fc.weight": Touch()}, tmp_path / "draft.bin")
        with pytest.raises(DraftLoadError, match="more than tensors"):
            convert_checkpoint(tmp_path / "draft.bin", qwen_folder, weights_only_bin=True)
        assert not (tmp_path / "run").exists()


def test_command(qwen: PreTrainedModel, qwen_folder: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "eagle", eagle_tensors(qwen) | {"imadpt.q": torch.zeros(2)})
    command = ["convert", str(folder), "--target", str(qwen_folder), "--output", str(tmp_path / "draft")]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for told in ("embed_tokens.weight: equal to the target's", "imadpt.q: ViSpec"):
        assert f"left out {told}" in result.output
    SparrowDraftModel.from_pretrained(tmp_path / "draft").bind(qwen)
    (folder / "model.safetensors").unlink()
    result = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "other")], env={"COLUMNS": "500"})
    assert result.exit_code == 2 and "holds neither" in result.output and "Traceback" not in result.output

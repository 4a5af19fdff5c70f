"""Drafts of the EAGLE family → [`SparrowDraftModel`]: EAGLE-1/2, MSD, ViSpec's text path, the Sparrow authors' files.

Their common layout: `fc` maps the embedding and the target's state, concatenated in this order as here, to one vector;
`layers.0` is a decoder layer, mostly without an input norm (attention and residual then take the raw output of `fc`);
nothing comes after it; embedding and head are the target's. RoPE is plain, at the tokens' original positions.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from .checksums import file_digest, read_json
from .configuration_sparrow import SparrowDraftConfig
from .errors import DraftLoadError
from .hub import find_file, find_weights
from .modeling_sparrow import SparrowDraftModel

#: Tensors without a place in a Sparrow draft, by a part of their name, and what is lost without them.
IGNORED_TENSORS: dict[str, str] = {
    "imadpt.": "ViSpec's compressor of visual tokens: the draft reads text only",
    "rotary_emb.inv_freq": "computed from the configuration",
}

#: Tensors that are the target's own: tensor here → how the name of the target's may end, the first that is stored
#: counts. A head that is tied to the embedding is not stored.
_BORROWED_TENSORS = {
    "embed_tokens.weight": ("embed_tokens.weight",),
    "lm_head.weight": ("lm_head.weight", "embed_tokens.weight"),
}

#: RoPE base of the family's code where config.json names none.
_DEFAULT_ROPE_THETA = 10000.0


@dataclass
class Conversion:
    """A converted draft and what happened to the tensors that are not in it.

    Attributes:
        draft: The draft, in the checkpoint's dtype, not bound.
        dropped: Tensor of the checkpoint → what it was, or why it is not in the draft.
        notes: What was assumed or computed on the way.
    """

    draft: SparrowDraftModel
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    subfolder: str = "",
    revision: str | None = None,
    weights_only_bin: bool = False,
    **overrides: Any,
) -> Conversion:
    """Converts a draft of the EAGLE family into one of ours that gives the same logits on text.

    Args:
        source: Folder, weights file or Hub id of the draft. A `config.json` beside the weights is read for heads,
            RoPE and epsilon; without one they are taken to be the target's.
        target: Folder or Hub id of the target. Its configuration is needed; its weights, if they are on this machine,
            are compared with the checkpoint's embedding.
        subfolder, revision: Where in the Hub repository of the draft.
        weights_only_bin: Also read pickled weights (`.bin`, `.pt`), through torch's weights-only loader, which makes
            tensors and nothing else.
        overrides: Fields of [`SparrowDraftConfig`].

    Raises:
        DraftLoadError: The checkpoint is not of this family, is damaged, is pickled and `weights_only_bin` is off, or
            was made for another target.
        UnsupportedTargetError: The package has no decoder layer for the target's text model.
    """
    files, config_file = _find_checkpoint(source, weights_only_bin, subfolder=subfolder, revision=revision)
    tensors = _read_tensors(files)
    own_config = read_json(config_file, DraftLoadError, "get it again") if config_file else {}
    try:
        target_config = AutoConfig.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise DraftLoadError(f"the configuration of the target {target} cannot be read: {error}") from error
    conversion = convert_tensors(tensors, own_config, target_config, **overrides)
    for name in _BORROWED_TENSORS.keys() & tensors.keys():
        conversion.dropped[name] = _compare_with_target(tensors[name], target, name)
    conversion.draft.provenance = {
        "converted_from": str(source),
        "subfolder": subfolder or None,
        "revision": revision,
        "source_sha256": {path.name: file_digest(path) for path in files},
        "dropped": conversion.dropped,
        "notes": conversion.notes,
    }
    return conversion


def convert_tensors(
    tensors: dict[str, Tensor], own_config: dict[str, Any], target_config: PreTrainedConfig, **overrides: Any
) -> Conversion:
    """The part of [`convert_checkpoint`] that touches no file: tensors by name → a draft.

    Args:
        tensors: All tensors of the checkpoint.
        own_config: Its `config.json`, or `{}`.
        target_config: Configuration of the target.
    """
    if theirs := sorted(name for name in tensors if name == "d2t" or "midlayer" in name.split(".")):
        raise DraftLoadError(f"this is a draft of EAGLE-3 (it holds {theirs[0]}): only EAGLE-1/2 drafts are converted")
    dropped = {name: why for name in tensors for part, why in IGNORED_TENSORS.items() if part in name}
    dropped |= {name: "the target's own" for name in _BORROWED_TENSORS if name in tensors}
    weights = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    notes: list[str] = []
    if "img_fc.weight" in weights:
        _fold_image_fc(weights)
        notes.append("img_fc was folded into fc, for a prompt without images: its visual half is lost")
    if not {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= weights.keys():
        raise DraftLoadError(
            f"this is no draft of the EAGLE-1/2 family: it lacks fc.weight or layers.0.*, and holds "
            f"{', '.join(sorted(tensors)[:8])}, …"
        )
    text = target_config.get_text_config()
    if weights["fc.weight"].shape != (text.hidden_size, 2 * text.hidden_size):
        raise DraftLoadError(
            f"fc.weight is {tuple(weights['fc.weight'].shape)}, but embedding and state of a target of hidden size "
            f"{text.hidden_size} take {(text.hidden_size, 2 * text.hidden_size)}: this draft was made for another "
            "target, or reads several of its layers, which is not supported"
        )
    shape = _shape_fields(weights, own_config | overrides, text)
    if own_config:
        shape["rope_parameters"] = _plain_rope(own_config)
    else:
        notes.append("no config.json: heads, RoPE and epsilon are taken to be the target's")
    # Nothing in the family reads the target's middle layers at inference.
    one_pass = {"feature_layers": [-1], "position_mode": "original", "num_glimpse_tokens": 0, "num_mtp_steps": 1}
    fields = one_pass | shape | overrides
    draft = SparrowDraftModel(SparrowDraftConfig.from_target_config(target_config, **fields))
    _check_names(weights, draft)
    draft = draft.to(weights["fc.weight"].dtype)
    draft.load_state_dict(weights)
    return Conversion(draft.eval(), dropped, notes)


# -- the configuration ------------------------------------------------------------------------------------------------


def _shape_fields(weights: dict[str, Tensor], own_config: dict[str, Any], text: PreTrainedConfig) -> dict[str, Any]:
    """Fields of the draft's configuration, from its tensors or else from its own configuration."""
    own = {"num_attention_heads": text.num_attention_heads, "rms_norm_eps": text.rms_norm_eps}
    own |= {"hidden_act": text.hidden_act}
    own |= {name: own_config[name] for name in own if own_config.get(name) is not None}
    attention = "layers.0.self_attn."
    heads, width = own["num_attention_heads"], weights[attention + "q_proj.weight"].shape[0]
    if not isinstance(heads, int) or not 0 < heads <= width:
        raise DraftLoadError(
            f"num_attention_heads of the draft must be a whole number from 1 to {width}, found {heads!r:.100}: mend "
            "its config.json"
        )
    head_dim = width // heads
    # The biases distinguish the blocks: Qwen2 has them on q, k and v only, Llama on all four or none.
    has_bias = {name: f"{attention}{name}_proj.bias" in weights for name in "qo"}
    if f"{attention}q_norm.weight" in weights:
        block_type = "qwen3"
    elif has_bias["q"] and not has_bias["o"]:
        block_type = "qwen2"
    else:
        block_type = "llama"
    return own | {
        "block_type": block_type,
        "attention_bias": has_bias["q"],
        "mlp_bias": "layers.0.mlp.up_proj.bias" in weights,
        "num_hidden_layers": len({name.split(".")[1] for name in weights if name.startswith("layers.")}),
        "head_dim": head_dim,
        "num_key_value_heads": _rows(weights, attention + "k_proj.weight") // head_dim,
        "intermediate_size": _rows(weights, "layers.0.mlp.gate_proj.weight"),
        "input_norm": "layers.0.input_layernorm.weight" in weights,
        "output_norm": "norm.weight" in weights,
        "fc_bias": "fc.bias" in weights,
    }


def _rows(weights: dict[str, Tensor], name: str) -> int:
    if name not in weights:
        raise DraftLoadError(f"the checkpoint lacks {name}: it is incomplete, or not of the EAGLE-1/2 family")
    return weights[name].shape[0]


def _plain_rope(own_config: dict[str, Any]) -> dict[str, Any]:
    rope = own_config.get("rope_parameters") or own_config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise DraftLoadError(
            f"the draft's config.json must describe its RoPE in an object, found {rope!r:.100}: mend it"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise DraftLoadError(f"the draft's config.json has RoPE of type {kind!r}; only plain RoPE is converted")
    theta = rope.get("rope_theta", own_config.get("rope_theta", _DEFAULT_ROPE_THETA))
    return {"rope_type": "default", "rope_theta": theta}


# -- the tensors ------------------------------------------------------------------------------------------------------


def _fold_image_fc(weights: dict[str, Tensor]) -> None:
    """ViSpec maps the state `h` and a visual summary `g` to `A·h + B·g + c` before `fc` reads it; here `g` = 0."""
    image_weight = weights.pop("img_fc.weight").double()
    image_bias = weights.pop("img_fc.bias", None)
    fc = weights["fc.weight"]
    embedding_half, state_half = fc.double().chunk(2, dim=1)
    weights["fc.weight"] = torch.cat((embedding_half, state_half @ image_weight.chunk(2, dim=1)[0]), dim=1).to(fc)
    if image_bias is not None:
        bias = state_half @ image_bias.double()
        weights["fc.bias"] = (bias + weights["fc.bias"].double() if "fc.bias" in weights else bias).to(fc)


def _check_names(weights: dict[str, Tensor], draft: SparrowDraftModel) -> None:
    expected = draft.state_dict()
    wrong = {
        "unknown": sorted(weights.keys() - expected.keys()),
        "missing": sorted(expected.keys() - weights.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise DraftLoadError(
            f"the checkpoint does not hold the tensors of an EAGLE-1/2 draft for this target: {found}"
        )


def _compare_with_target(tensor: Tensor, target: str | Path, name: str) -> str:
    """Why an embedding or head may be dropped: it is the target's, or could not be compared with it."""
    files = find_weights(target, local_files_only=True)
    if not files:
        return "not compared: the target's weights are not on this machine"
    endings = _BORROWED_TENSORS[name]
    found = next(filter(None, (_stored_tensor(files, ending) for ending in endings)), None)
    if found is None:
        return f"not compared: the target's weights hold no {' or '.join(endings)}"
    their_name, theirs = found
    # Checkpoints keep it in other precisions than the target does.
    if theirs.shape != tensor.shape or not torch.allclose(tensor.float(), theirs.float(), rtol=1e-2, atol=1e-4):
        raise DraftLoadError(
            f"{name} of the draft is not the target's {their_name}: it was made for another target than {target}"
        )
    return "equal to the target's"


def _stored_tensor(files: list[Path], ending: str) -> tuple[str, Tensor] | None:
    """Name and value of the first tensor in safetensors files whose name ends so."""
    for path in files:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(ending):
                    return name, stored.get_tensor(name)
    return None


# -- the files --------------------------------------------------------------------------------------------------------


def _find_checkpoint(source: str | Path, weights_only_bin: bool, **hub_options: Any) -> tuple[list[Path], Path | None]:
    """The weight files of a checkpoint, and its configuration if it has one."""
    if Path(source).is_file():
        beside = Path(source).parent / "config.json"
        files, config_file = [Path(source)], beside if beside.exists() else None
    else:
        files, config_file = find_weights(source, **hub_options), find_file(source, "config.json", **hub_options)
    if not files:
        pickled = find_file(source, "pytorch_model.bin", **hub_options)
        files = [pickled] if pickled is not None else []
    if not files:
        raise DraftLoadError(f"{source} holds neither model.safetensors nor pytorch_model.bin")
    if any(path.suffix != ".safetensors" for path in files) and not weights_only_bin:
        raise DraftLoadError(
            f"{', '.join(map(str, files))} is pickled. If you trust its source, allow torch's weights-only loader: "
            "--weights-only-bin (weights_only_bin=True)"
        )
    return files, config_file


def _read_tensors(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                part = load_file(path)
            else:
                part = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise DraftLoadError(f"{path} is damaged, cut short or holds more than tensors: {error}") from error
        if not isinstance(part, dict) or not all(isinstance(tensor, Tensor) for tensor in part.values()):
            raise DraftLoadError(f"{path} must hold tensors by name, and nothing else")
        tensors |= part
    return tensors

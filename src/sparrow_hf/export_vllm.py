"""A draft → the files that `sparrow-vllm` (`integrations/vllm`) reads, so that stock vLLM decodes with it.

What differs from the draft's own files: the target's final norm lies beside the weights, since vLLM hands out states
before it; `config.json` says which states vLLM must hand out, and lists the visual tokens that the glimpse keeps.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from . import artifacts, hub
from ._transformers import OTHER_POSITIONS_IN_VLLM
from .configuration_sparrow import SparrowDraftConfig
from .draft_inputs import EVERY_VISUAL_TOKEN, logarithmic
from .errors import BindingError, DraftConfigError
from .loading import told_if_not_loaded
from .model_card import PROVENANCE_FILE
from .modeling_sparrow import SparrowDraftModel
from .target_config import visual_token_ids

#: Of the exported files; `sparrow_vllm.config` reads this number and no other.
FORMAT = 3
#: Of the exported files.
MODEL_TYPE = "sparrow_vllm"
#: `model_type` of targets of which vLLM hands out the states of any layer (its method "eagle3"). Of others it hands
#: out the last ones (its method "eagle"), so that there is no glimpse.
AUXILIARY_STATES = frozenset({"qwen2_5_vl", "qwen3_vl"})
_POSITION_RULE = (
    "vLLM numbers the text after a video from the largest of time, height and width, transformers since 5.3 from the "
    "larger of height and width. They differ for videos with more time steps than rows or columns; a draft (or a "
    "target) that learned one of them accepts less under the other."
)


def export_vllm(
    draft: str | os.PathLike[str],
    output: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    glimpse_spacing: str | None = None,
) -> dict[str, Any]:
    """Writes `config.json`, `model.safetensors` and `PROVENANCE.json` of a draft for `sparrow-vllm`.

    Args:
        draft: Folder or Hub id of a saved draft.
        output: Folder to write to. An earlier export in it stays complete until the new one is.
        target: Folder or Hub id of its target, whose final norm is read; by default the name in the draft's
            configuration.
        glimpse_spacing: Replaces the `glimpse_spacing` of the draft's configuration.

    Returns:
        The exported configuration.

    Raises:
        OutputError: `output` holds another model, such as the draft itself.
        DraftLoadError: The draft cannot be loaded.
        TargetLoadError: The target's configuration or weights cannot be read.
        BindingError: The draft does not fit the target, or no target is known.
        DraftConfigError: There is no such spacing, or as [`exported_config`] says.
    """
    hub.refuse_to_replace(Path(output), kind=MODEL_TYPE)
    overrides = {} if glimpse_spacing is None else {"glimpse_spacing": glimpse_spacing}
    model = SparrowDraftModel.from_pretrained(draft, **overrides)
    config = model.config
    source = target or config.target_name_or_path
    if source is None:
        raise BindingError("the draft does not name its target: say where it is (--target)")
    revision = None if target else config.target_revision
    with told_if_not_loaded("target", str(source)):
        target_config = AutoConfig.from_pretrained(source, revision=revision)
    fields = exported_config(config, target_config)
    if model.provenance.get("vllm_positions"):
        fields["sparrow"]["position_rule"] = None
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name != "draft_to_target"}
    tensors["never_drafted"] = _never_drafted(model)
    if fields["sparrow"]["method"] == "eagle3":
        with told_if_not_loaded("target", str(source)):
            tensors["target_norm.weight"] = _final_norm(source, revision).to(model.dtype)
    provenance = model.provenance | {
        "exported_for_vllm": {
            "draft": str(draft),
            "draft_sha256": artifacts.tensor_digest(model.state_dict()),
            "sha256": artifacts.tensor_digest(tensors),
            "glimpse_spacing": config.glimpse_spacing,
        }
    }
    with artifacts.atomic_files(Path(output), CONFIG_NAME, hub.is_weights_file) as partial:
        artifacts.write_json(partial / PROVENANCE_FILE, provenance, indent=2, default=str)
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / SAFE_WEIGHTS_NAME, {"format": "pt"})
        fields |= {"dtype": str(model.dtype).removeprefix("torch.")}
        artifacts.write_json(partial / CONFIG_NAME, fields, indent=2)
    return fields


def exported_config(config: SparrowDraftConfig, target_config: PreTrainedConfig) -> dict[str, Any]:
    """`config.json` of the exported draft; `SparrowVllmConfig` of `sparrow-vllm` says what its fields mean.

    Of a target of the method "eagle" vLLM hands out no middle states: the draft's glimpse is left out.

    Raises:
        BindingError: The draft does not fit the target.
        DraftConfigError: Of the method "eagle3": vLLM cannot follow the spacing of the draft's glimpse. Of "eagle":
            the draft reads text states of another layer than the last. Of both: the draft has a part that
            `sparrow-vllm` does not (an activation other than SiLU, Qwen3 layers with biases).
    """
    text = target_config.get_text_config()
    found = {
        "model_type": (config.target_model_type or target_config.model_type, target_config.model_type),
        "num_hidden_layers": (config.target_num_hidden_layers, text.num_hidden_layers),
        "hidden_size": (config.hidden_size, text.hidden_size),
        "vocab_size": (config.vocab_size, text.vocab_size),
        "visual_token_ids": (sorted(config.visual_token_ids or []), visual_token_ids(target_config)),
    }
    if wrong := [f"{name}: draft {ours}, target {theirs}" for name, (ours, theirs) in found.items() if ours != theirs]:
        raise BindingError(f"this draft was made for another target: {'; '.join(wrong)}. Give its own target.")
    if config.hidden_act != "silu":
        raise DraftConfigError(f"sparrow-vllm has the activation silu only, this draft has {config.hidden_act}")
    if config.block_type == "qwen3" and config.attention_bias:
        raise DraftConfigError(
            "sparrow-vllm has no Qwen3 layers with biases, and this draft has them in its attention"
        )
    method = "eagle3" if target_config.model_type in AUXILIARY_STATES else "eagle"
    features = list(config.feature_layer_ids)
    if method == "eagle" and features != [config.target_num_hidden_layers]:
        raise DraftConfigError(
            f"this draft reads the states of layers {features}; of a {target_config.model_type} vLLM hands out the "
            "last ones only. Train a draft that reads those (--feature-layers -1)"
        )
    glimpse_rows = _glimpse_rows(config) if method == "eagle3" else []
    layers_read = {*features, *([] if glimpse_rows == [] else [config.bridge_layer_id])}
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("rope_parameters", "mlp_bias"),
    )
    return {
        "architectures": ["SparrowDraftModel"],
        "model_type": MODEL_TYPE,
        **{name: getattr(config, name) for name in names},
        # Qwen2 has biases on q, k and v alone, Llama on all four or none.
        "qkv_bias": config.attention_bias,
        "attention_bias": config.attention_bias and config.block_type == "llama",
        "eagle_aux_hidden_state_layer_ids": sorted(layers_read),
        "tie_word_embeddings": False,
        "sparrow": {
            "format": FORMAT,
            "method": method,
            "target": {
                "name": config.target_name_or_path,
                **{name: theirs for name, (_, theirs) in found.items()},
                "rms_norm_eps": getattr(text, "rms_norm_eps", config.rms_norm_eps),
            },
            "feature_layers": features,
            "feature_norm": config.feature_norm and len(features) > 1,
            "bridge_layer": config.bridge_layer_id,
            "glimpse_rows": glimpse_rows,
            "after_visual": getattr(target_config, "vision_end_token_id", None),
            "qk_norm": config.block_type == "qwen3",
            **{name: getattr(config, name) for name in ("input_norm", "output_norm", "fc_bias", "project_visual")},
            "position_mode": config.position_mode,
            "position_rule": _POSITION_RULE if target_config.model_type in OTHER_POSITIONS_IN_VLLM else None,
        },
    }


def _never_drafted(model: SparrowDraftModel) -> Tensor:
    """`(vocab_size,)` bool: visual tokens, and those that a reduced vocabulary leaves out."""
    ids = torch.arange(model.config.vocab_size)
    visual, drafted = torch.isin(ids, torch.tensor(model.config.visual_token_ids)), model.draft_to_target
    return visual if drafted is None else visual | ~torch.isin(ids, drafted)


def _glimpse_rows(config: SparrowDraftConfig) -> list[int] | None:
    """Which visual tokens of a prompt the draft reads, the first one being 0, or `None`: all of them."""
    count = config.num_glimpse_tokens
    if count == EVERY_VISUAL_TOKEN:
        return None
    if count and config.glimpse_spacing == "even":
        raise DraftConfigError(
            f"this draft reads {count} visual tokens at equal distances, and vLLM does not say how long a video will "
            "be: train a draft with --glimpse-spacing logarithmic, or export this one with it; drafts that were "
            "trained with random visual tokens, as by default, accept as much"
        )
    # No prompt has more tokens.
    return logarithmic(torch.arange(config.max_position_embeddings), count).tolist()


def _final_norm(target: str | os.PathLike[str], revision: str | None) -> Tensor:
    """`(H,)` weights of the norm behind a target's decoder, from its files."""
    tensors = artifacts.StoredTensors(hub.find_weights(str(target), revision=revision))
    named = re.compile(r"(model\.)?(language_model\.)?(model\.)?norm\.weight")
    names = [name for name in tensors if named.fullmatch(name)]
    if len(names) != 1:
        raise ValueError(f"its safetensors files hold {len(names)} norms behind the decoder, expected one")
    return tensors[names[0]]

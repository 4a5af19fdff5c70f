"""`SparrowDraftConfig`: the shape of a draft, the target it was made for, and how it proposes."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from ._transformers import CACHE, LlamaRotaryEmbedding
from .config_fields import check_fields
from .errors import DraftConfigError, DraftLoadError
from .target_config import fields_for
from .tree_shapes import TREE_PRESETS as TREE_PRESETS
from .tree_shapes import TreeShape, check_tree_shape, parse_tree_shape

#: What transformers raises where a field of its own holds something unexpected.
_RAISED_BY_BAD_FIELDS = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    RuntimeError,
)

#: Fields that transformers handles without declaring them.
_UNDECLARED = {
    *("model_type", "name_or_path", "_name_or_path", "_commit_hash", "torch_dtype", "num_labels", "auto_map"),
    *("attn_implementation", "experts_implementation", "output_attentions", "quantization_config"),
    *("_attn_implementation_internal", "_experts_implementation_internal", "per_layer_config"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "use_return_dict", "tokenizer_class"),
    *("_attn_implementation", "_experts_implementation", "_output_attentions"),
}
#: Fields of `generate()`, which older files of transformers hold; left out when they are read.
_GENERATION_FIELDS = frozenset(GenerationConfig().to_dict())


#: What to load instead of LoRA adapters.
MERGED = (
    "give the output folder of `sparrow train --lora`, where the finished draft has them merged (in Python, save what "
    "merge_lora returns); a checkpoint is only gone on from, with --resume"
)


class SparrowDraftConfig(PreTrainedConfig):
    r"""Configuration of a [`SparrowDraftModel`].

    Make one with [`SparrowDraftConfig.from_target_config`]; the fields of the decoder layer (`hidden_size` …
    `rope_parameters`) then follow the target's text decoder.

    Args:
        target_name_or_path, target_revision (`str`, *optional*): Where the target came from. Another name or revision
            of the same shape only warns when the draft is bound: local copies and fine-tunes are normal.
        target_model_type (`str`): `model_type` of the target.
        target_num_hidden_layers (`int`): Decoder layers of the target; layer ids below count in these.
        visual_token_ids (`list[int]`): The target's image and video placeholder ids. They are never drafted. Their
            positions are visual, all others are text.
        block_type (`"qwen2"`, `"qwen3"` or `"llama"`): Which decoder layer of transformers the draft is made of.
        num_hidden_layers (`int`): Decoder layers of the draft (paper, section 3.1: one).
        feature_layers (`list[int]`): Target layers whose text states the draft reads, in the `hidden_states`
            convention: k = output after k layers, −1 = post-norm. Several are fused by one more linear map.
        feature_norm (`bool`): Of several feature layers, every state is first brought to the length of that of the
            latest layer: before the target's final norm they can be many times as long, and drafts then learn more
            slowly (docs/language.md). The default of [`SparrowDraftConfig.from_target_config`] where there are
            several; drafts of earlier versions lack it.
        visual_bridge_layer (`int`): Layer m whose visual states serve as the bridge (IVSB) and the glimpse; the paper
            takes half of the layers. 0: the projected visual features, as they enter the target's decoder.
        num_glimpse_tokens (`int`): Visual tokens kept in the draft's window at inference; 0 = the paper's VATA.
        glimpse_spacing (`"even"` or `"logarithmic"`): Which visual tokens these are. Even: exactly so many, at equal
            distances over the whole prompt. Logarithmic: at growing distances from the first one on; so many of 30
            times as many visual tokens, fewer of a shorter video, more of a longer one. This needs no number of all
            visual tokens, so vLLM, which reads a prompt in pieces, can follow it.
        num_mtp_steps (`int`): Passes of the draft over a training row (MTP); 2 in the paper.
        position_mode (`"compact"` or `"original"`): RoPE position: the index in the draft's sequence, or
            the index in the prompt (EAGLE-family checkpoints).
        input_norm, output_norm, fc_bias, project_visual (`bool`): Layer 0 keeps its input norm; the draft ends with a
            norm; FC has a bias; visual states go through FC's hidden-state half instead of entering raw (paper: raw).
        num_tree_nodes, num_draft_levels, beam_width (`int`): Shape of the tree (see [`TreeShape`]). `beam_width=1` is
            a chain of `num_draft_levels` tokens. Without `num_tree_nodes`, one root plus a beam per level. The
            default, a chain of 7, pays where 85 % of the drafted tokens are accepted; `sparrow tune` measures.
        draft_vocab_size (`int`, *optional*): The draft proposes only so many tokens of the target's vocabulary; which
            ones, `SparrowDraftModel.draft_to_target` says. `None`: all. `vocab_size` stays the target's.
        tensors_sha256 (`str`, *optional*): Digest of the tensors saved beside this file, checked when they are loaded.
            Set in files only: a model in memory may change.

    Fields that this class does not know, of a file that a newer version wrote, are kept and saved again; they have no
    effect, which a warning says.

    Raises:
        DraftConfigError: A field has the wrong type or is out of range, or two fields contradict each other.
    """

    model_type = "sparrow_draft"
    keys_to_ignore_at_inference = [CACHE]

    target_name_or_path: str | None = None
    target_revision: str | None = None
    target_model_type: str | None = None
    target_num_hidden_layers: int = 28
    visual_token_ids: list[int] | None = None

    block_type: Literal["qwen2", "qwen3", "llama"] = "qwen2"
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 1
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    feature_layers: list[int] | None = None
    feature_norm: bool = False
    visual_bridge_layer: int | None = None
    num_glimpse_tokens: int = 64
    glimpse_spacing: Literal["even", "logarithmic"] = "even"
    num_mtp_steps: int = 4
    position_mode: Literal["compact", "original"] = "compact"
    input_norm: bool = True
    output_norm: bool = True
    fc_bias: bool = False
    project_visual: bool = False

    num_tree_nodes: int | None = None
    num_draft_levels: int = 7
    beam_width: int = 1
    draft_vocab_size: int | None = None

    tensors_sha256: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # A field of drafts saved by earlier versions.
        if kwargs.pop("sliding_window", None) is not None:
            raise DraftConfigError(
                "sliding_window is no longer supported: train the draft anew without it, or use an earlier version"
            )
        check_fields(vars(self) | kwargs)
        if self.head_dim is None:
            self.head_dim = max(1, self.hidden_size // self.num_attention_heads)
        if self.visual_token_ids is None:
            self.visual_token_ids = []
        if self.feature_layers is None:
            self.feature_layers = [-1]
        if self.visual_bridge_layer is None:
            self.visual_bridge_layer = self.target_num_hidden_layers // 2
        if self.num_tree_nodes is None:
            self.num_tree_nodes = self.num_draft_levels * self.beam_width + 1
        self._check_names(kwargs)
        try:
            super().__post_init__(**kwargs)
        except _RAISED_BY_BAD_FIELDS as error:
            raise DraftConfigError(
                f"a field that every configuration of transformers has is wrong: {error}"
            ) from error
        self.check()

    def _check_names(self, fields: Mapping[str, Any]) -> None:
        """Warns of fields that are not declared here, and refuses those that would replace a part of the class."""
        if fields.get("model_type", self.model_type) != type(self).model_type:
            raise DraftConfigError(
                f"model_type must be {type(self).model_type!r}, found {fields['model_type']!r:.80}: these are not the "
                "files of a draft"
            )
        unknown = [name for name in fields if name not in _UNDECLARED and name not in _GENERATION_FIELDS]
        taken = [name for name in unknown if hasattr(type(self), name)]
        if taken:
            raise DraftConfigError(f"a configuration cannot have fields named {', '.join(taken)}: remove them")
        if unknown:
            warnings.warn(
                f"this version does not know the fields {', '.join(sorted(unknown))} of a draft's configuration (a "
                "newer one may have written them); they are kept and have no effect",
                UserWarning,
                stacklevel=2,
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but the file must hold a JSON object.

        Raises:
            DraftConfigError: It holds something else.
            DraftLoadError: There is no such file.
        """
        source = pretrained_model_name_or_path
        damaged = f"config.json of {source} holds no JSON object: get it again"
        missing = "give the folder that save_pretrained wrote, or the id of a repository on the Hub"
        try:
            found, unused = super().get_config_dict(source, **kwargs)
        except OSError as error:
            if isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError)):
                raise DraftConfigError(damaged) from error
            reason = str(error).strip().splitlines()[0]
            raise DraftLoadError(f"{source} has no config.json of a draft ({reason:.300}): {missing}") from error
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise DraftConfigError(damaged) from error
        if not isinstance(found, dict):
            raise DraftConfigError(damaged)
        if not found and (Path(str(source)) / "adapter_config.json").is_file():
            raise DraftLoadError(f"{source} holds LoRA adapters and no draft: {MERGED}")
        if not found:
            raise DraftLoadError(f"{source} has no config.json, or one without fields: {missing}")
        return found, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, with every value checked, also those of `kwargs`."""
        try:
            found = super().from_dict(config_dict, **kwargs)
        except _RAISED_BY_BAD_FIELDS as error:
            if isinstance(error, DraftConfigError):
                raise
            raise DraftConfigError(f"the fields of a draft's configuration cannot be read: {error}") from error
        (found[0] if isinstance(found, tuple) else found).check()
        return found

    @classmethod
    def from_target_config(cls, target_config: PreTrainedConfig, **overrides: Any) -> Self:
        """The configuration of a draft that fits a target with this configuration.

        Args:
            target_config: Configuration of the (multimodal) target.
            overrides: Any field of this class.

        Raises:
            UnsupportedTargetError: The text decoder has no number of layers, no vocabulary or no width.
            DraftConfigError: An override is out of range.
        """
        fields = fields_for(target_config) | overrides
        layers = fields["feature_layers"]
        fields.setdefault("feature_norm", isinstance(layers, (list, tuple)) and len(layers) > 1)
        return cls(**fields)

    def set_tree_shape(self, shape: TreeShape | tuple[int, int, int] | str) -> None:
        """Sets the three tree fields at once.

        Args:
            shape: A [`TreeShape`], or its text as [`parse_tree_shape`] reads it (`"48-5-10"`, `"chain-7"`, `"none"`).

        Raises:
            DraftConfigError: There is no such shape, or no such tree can be grown; the fields stay as they were.
        """
        shape = parse_tree_shape(shape) if isinstance(shape, str) else TreeShape(*shape)
        check_fields(shape._asdict())
        check_tree_shape(shape)
        self.num_tree_nodes, self.num_draft_levels, self.beam_width = shape

    @property
    def tree_shape(self) -> TreeShape:
        """The three tree fields, checked, as one value."""
        shape = TreeShape(self.num_tree_nodes or 0, self.num_draft_levels, self.beam_width)
        check_tree_shape(shape)
        return shape

    @property
    def feature_layer_ids(self) -> tuple[int, ...]:
        """`feature_layers` with −1 written as the number of target layers (= the post-norm state)."""
        return tuple(self.target_num_hidden_layers if layer == -1 else layer for layer in self.feature_layers or [-1])

    @property
    def bridge_layer_id(self) -> int:
        """`visual_bridge_layer`, once its default is known."""
        return int(self.visual_bridge_layer or 0)

    @property
    def layer_ids_read(self) -> set[int]:
        """All target layers whose states a draft may read: its feature layers and its bridge layer."""
        return {*self.feature_layer_ids, self.bridge_layer_id}

    def check(self) -> None:
        """Raises [`DraftConfigError`] if a field is wrong or two contradict each other; runs on construction."""
        check_fields(vars(self))
        layers = self.target_num_hidden_layers
        for layer in self.feature_layer_ids:
            if not 1 <= layer <= layers:
                raise DraftConfigError(f"feature_layers holds {layer}, but the target has layers 1 … {layers} (or −1)")
        if not 0 <= self.bridge_layer_id <= layers:
            raise DraftConfigError(
                f"visual_bridge_layer is {self.visual_bridge_layer}, but the target has layers 1 … {layers} (0: what "
                "enters the first)"
            )
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise DraftConfigError(
                f"draft_vocab_size must be 1 … vocab_size ({self.vocab_size}) or None, found {self.draft_vocab_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise DraftConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise DraftConfigError(f"head_dim must be even, because RoPE turns pairs, found {self.head_dim}")
        try:
            LlamaRotaryEmbedding(self)
        except _RAISED_BY_BAD_FIELDS as error:
            raise DraftConfigError(
                f"rope_parameters name no RoPE of transformers, found {self.rope_parameters!r:.200}: {error!r:.80}"
            ) from error
        check_tree_shape(TreeShape(self.num_tree_nodes or 0, self.num_draft_levels, self.beam_width))


def check_vocabulary(config: SparrowDraftConfig, token_ids: Tensor | Sequence[int]) -> Tensor:
    """`(D,)` ids as int64.

    Raises:
        DraftConfigError: They cannot be the draft's vocabulary.
    """
    try:
        found = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DraftConfigError(f"a draft vocabulary is one row of token ids, found {token_ids!r:.80}") from error
    if found.ndim != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool:
        raise DraftConfigError(f"a draft vocabulary is one row of token ids, found {found.dtype} {tuple(found.shape)}")
    # Differences of an unsigned type cannot be negative.
    token_ids = found.to(torch.int64)
    if (token_ids.diff() <= 0).any() or token_ids[0] < 0 or token_ids[-1] >= config.vocab_size:
        raise DraftConfigError(
            f"the ids of a draft vocabulary must be ascending and lie in 0 … {config.vocab_size - 1}; found "
            f"{int(token_ids.min())} … {int(token_ids.max())}"
        )
    forbidden = set(config.visual_token_ids or []).intersection(token_ids.tolist())
    if forbidden:
        raise DraftConfigError(
            f"visual placeholders are never drafted; the draft vocabulary holds {sorted(forbidden)}"
        )
    return token_ids

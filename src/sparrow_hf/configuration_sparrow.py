"""`SparrowDraftConfig`: the shape of a draft, the target it was made for, and how it proposes."""

import os
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ._transformers import ACTIVATIONS, CACHE, commit_of, name_of
from .errors import DraftConfigError, UnsupportedTargetError


class TreeShape(NamedTuple):
    """A draft tree: nodes verified per round (root included), draft forwards per round, candidates per forward."""

    num_tree_nodes: int
    num_draft_levels: int
    beam_width: int


#: The trees of the paper (written there as nodes-levels-beam), this project's default chain, and a root alone: the
#: same loop without drafting, which measures the cost of the loop itself.
TREE_PRESETS: dict[str, TreeShape] = {
    "none": TreeShape(1, 0, 1),
    "chain-5": TreeShape(6, 5, 1),
    "30-4-8": TreeShape(30, 4, 8),
    "48-5-10": TreeShape(48, 5, 10),
}

_CHAIN = re.compile(r"chain-([0-9]{1,9})")
_TREE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})-([0-9]{1,9})")

#: Text decoder of the target → the plain-text decoder layer of transformers that has its exact shape. Others get a
#: Llama layer: the draft reads the target's states, so its own layer need not be of the target's kind.
_BLOCK_OF_TEXT_MODEL: dict[str, str] = {
    "qwen2": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3": "qwen3",
    "qwen3_vl_text": "qwen3",
    "llama": "llama",
    "mistral": "llama",
}

#: Names under which the families keep the ids of their visual placeholders.
_PLACEHOLDER_FIELDS = (
    "image_token_id",
    "video_token_id",
    "image_token_index",
    "video_token_index",
    "image_patch_id",
    "media_placeholder_token_id",
)

#: Field of a draft's layer → what text decoders call it, the draft's own name first.
_FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "intermediate_size": ("dense_intermediate_size", "intermediate_size", "ffn_dim"),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "hidden_act": ("hidden_act", "hidden_activation"),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "max_position_embeddings": ("max_position_embeddings",),
    "initializer_range": ("initializer_range",),
    "attention_bias": ("attention_bias",),
    "mlp_bias": ("mlp_bias",),
}

#: Kinds of RoPE whose frequencies a draft takes over. Of the others it takes the base alone: some have frequencies for
#: a part of a head only, some follow the longest position of a forward.
_FIXED_ROPE_TYPES = ("linear", "llama3", "yarn")


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
        visual_bridge_layer (`int`): Layer m whose visual states serve as the bridge (IVSB) and the glimpse; the paper
            takes half of the depth. 0: the projected visual features, as they enter the target's decoder.
        num_glimpse_tokens (`int`): Visual tokens (evenly strided) kept in the draft's window at inference; 0 = the
            paper's VATA.
        num_mtp_steps (`int`): Passes of the draft over a training row (MTP); 2 in the paper.
        position_mode (`"compact"` or `"original"`): RoPE position: the index in the draft's sequence, or
            the index in the prompt (EAGLE-family checkpoints).
        input_norm, output_norm, fc_bias, project_visual (`bool`): Layer 0 keeps its input norm; the draft ends with a
            norm; FC has a bias; visual states go through FC's hidden-state half instead of entering raw (paper: raw).
        num_tree_nodes, num_draft_levels, beam_width (`int`): Shape of the tree (see [`TreeShape`]). `beam_width=1` is
            a chain of `num_draft_levels` tokens. Without `num_tree_nodes`, one root plus a beam per level.
        draft_vocab_size (`int`, *optional*): The draft proposes only so many tokens of the target's vocabulary; which
            ones, `SparrowDraftModel.draft_to_target` says. `None`: all. `vocab_size` stays the target's.
        tensors_sha256 (`str`, *optional*): Digest of the tensors saved beside this file, checked when they are loaded.
            Set in files only: a model in memory may change.

    Raises:
        DraftConfigError: A field is out of range or two fields contradict each other.
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
    visual_bridge_layer: int | None = None
    num_glimpse_tokens: int = 64
    num_mtp_steps: int = 4
    position_mode: Literal["compact", "original"] = "compact"
    input_norm: bool = True
    output_norm: bool = True
    fc_bias: bool = False
    project_visual: bool = False

    num_tree_nodes: int | None = None
    num_draft_levels: int = 5
    beam_width: int = 1
    draft_vocab_size: int | None = None

    tensors_sha256: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # A field of drafts saved by earlier versions.
        if kwargs.pop("sliding_window", None) is not None:
            raise DraftConfigError(
                "sliding_window is no longer supported: train the draft anew without it, or use an earlier version"
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.visual_token_ids is None:
            self.visual_token_ids = []
        if self.feature_layers is None:
            self.feature_layers = [-1]
        if self.visual_bridge_layer is None:
            self.visual_bridge_layer = self.target_num_hidden_layers // 2
        if self.num_tree_nodes is None:
            self.num_tree_nodes = self.num_draft_levels * self.beam_width + 1
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_target_config(cls, target_config: PreTrainedConfig, **overrides: Any) -> Self:
        """The configuration of a draft that fits a target with this configuration.

        Args:
            target_config: Configuration of the (multimodal) target.
            overrides: Any field of this class.

        Raises:
            UnsupportedTargetError: The configuration has no text decoder with a depth, a vocabulary and a width.
            DraftConfigError: An override is out of range.
        """
        text = target_config.get_text_config()
        sizes = ("num_hidden_layers", "vocab_size", "hidden_size")
        if missing := [field for field in sizes if not isinstance(getattr(text, field, None), int)]:
            raise UnsupportedTargetError(
                f"the text decoder of a {target_config.model_type} says no {', '.join(missing)}; Sparrow needs a "
                "decoder-only video LLM of transformers"
            )
        block_type = _BLOCK_OF_TEXT_MODEL.get(text.model_type, "llama")
        name = published_name(target_config)
        fields: dict[str, Any] = {
            "target_name_or_path": name,
            "target_revision": None if name is None else commit_of(target_config),
            "target_model_type": target_config.model_type,
            "target_num_hidden_layers": text.num_hidden_layers,
            "visual_token_ids": visual_token_ids(target_config),
            "block_type": block_type,
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            # Qwen2 attention always has its bias and no field for it.
            "attention_bias": block_type == "qwen2",
            **_layer_fields(text),
        }
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            # `pipeline(assistant_model=)` compares these three with the target's text configuration.
            fields[field] = getattr(text, field, None)
        return cls(**(fields | overrides))

    def set_tree_shape(self, shape: TreeShape | tuple[int, int, int] | str) -> None:
        """Sets the three tree fields at once.

        Args:
            shape: A [`TreeShape`], or its text as [`parse_tree_shape`] reads it (`"48-5-10"`, `"chain-7"`, `"none"`).

        Raises:
            DraftConfigError: There is no such shape, or no such tree can be grown; the fields stay as they were.
        """
        shape = parse_tree_shape(shape) if isinstance(shape, str) else TreeShape(*shape)
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
        """Raises [`DraftConfigError`] if a field is out of range; runs on construction."""
        depth = self.target_num_hidden_layers
        for layer in self.feature_layer_ids:
            if not 1 <= layer <= depth:
                raise DraftConfigError(f"feature_layers holds {layer}, but the target has layers 1 … {depth} (or −1)")
        if not 0 <= self.bridge_layer_id <= depth:
            raise DraftConfigError(
                f"visual_bridge_layer is {self.visual_bridge_layer}, but the target has layers 1 … {depth} (0: what "
                "enters the first)"
            )
        for name in ("num_hidden_layers", "num_mtp_steps", "vocab_size", "hidden_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise DraftConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.num_glimpse_tokens < 0:
            raise DraftConfigError(f"num_glimpse_tokens must not be negative, found {self.num_glimpse_tokens}")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise DraftConfigError(
                f"draft_vocab_size must be 1 … vocab_size ({self.vocab_size}) or None, found {self.draft_vocab_size}"
            )
        if self.position_mode not in ("compact", "original"):
            raise DraftConfigError(f"position_mode must be 'compact' or 'original', found {self.position_mode!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DraftConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        check_tree_shape(TreeShape(self.num_tree_nodes or 0, self.num_draft_levels, self.beam_width))


def parse_tree_shape(text: str) -> TreeShape:
    """The shape that a text names: `none` (nothing is drafted), `chain-LEVELS`, or `NODES-LEVELS-BEAM`.

    Raises:
        DraftConfigError: It is none of these, or no such tree can be grown.
    """
    if text == "none":
        shape = TREE_PRESETS["none"]
    elif chain := _CHAIN.fullmatch(text):
        shape = TreeShape(int(chain[1]) + 1, int(chain[1]), 1)
    elif sizes := _TREE.fullmatch(text):
        shape = TreeShape(*map(int, sizes.groups()))
    else:
        raise DraftConfigError(
            f"unknown tree {text!r}: give one of {', '.join(TREE_PRESETS)}, chain-LEVELS, or NODES-LEVELS-BEAM "
            "such as 40-5-8"
        )
    check_tree_shape(shape)
    return shape


def check_tree_shape(shape: TreeShape) -> None:
    """Raises [`DraftConfigError`] unless a tree of this shape can be grown."""
    nodes, levels, beam = shape
    if nodes < 1 or levels < 0 or beam < 1:
        raise DraftConfigError(f"a tree needs a root and a beam of at least one, found {tuple(shape)}")
    if (nodes == 1) != (levels == 0):
        raise DraftConfigError(
            f"num_tree_nodes counts the root, so one node means no draft level and the reverse, found {tuple(shape)}"
        )
    if beam == 1 and nodes != levels + 1:
        raise DraftConfigError(
            f"a chain (beam_width=1) of {levels} levels has {levels + 1} nodes with its root, found "
            f"num_tree_nodes={nodes}"
        )


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


def _layer_fields(text: PreTrainedConfig) -> dict[str, Any]:
    """What a draft's layer takes over from a text decoder; a field of another form is left to this class's default."""
    fields: dict[str, Any] = {}
    for field, names in _FIELD_NAMES.items():
        found = (getattr(text, name, None) for name in names)
        # Some decoders have one value per layer.
        found = (value[0] if isinstance(value, (list, tuple)) and value else value for value in found)
        kind = type(getattr(SparrowDraftConfig, field) or 0)
        value = next((value for value in found if type(value) is kind), None)
        if value is not None:
            fields[field] = value
    heads = fields.setdefault("num_attention_heads", max(text.hidden_size // 64, 1))
    fields.setdefault("intermediate_size", 4 * text.hidden_size)
    if heads % fields.setdefault("num_key_value_heads", heads):
        fields["num_key_value_heads"] = heads
    # RoPE rotates pairs.
    fields["head_dim"] = fields.get("head_dim", text.hidden_size // heads) // 2 * 2
    if fields.get("hidden_act") not in ACTIVATIONS:
        fields.pop("hidden_act", None)
    return fields | {"rope_parameters": _rope_parameters(text)}


def _rope_parameters(text: PreTrainedConfig) -> dict[str, Any]:
    """The rotary embedding of a draft: the target's, as far as it holds for one position per text token."""
    rope = getattr(text, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        # One for each kind of layer.
        rope = rope.get("full_attention") or next(iter(rope.values()))
    # Text tokens have one position each, so the multimodal sections of the target's RoPE do not apply.
    rope = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    if rope.get("rope_type") in _FIXED_ROPE_TYPES and rope.get("partial_rotary_factor", 1.0) == 1.0:
        return rope
    return {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 10000.0}


def published_name(target_config: PreTrainedConfig) -> str | None:
    """Hub id of the target; empty for a folder, because a path of one machine is useless on another."""
    name = name_of(target_config)
    return None if not name or os.path.isdir(name) else name


def visual_token_ids(target_config: PreTrainedConfig) -> list[int]:
    """Sorted placeholder ids of images and videos in a target's configuration."""
    ids = {getattr(target_config, name, None) for name in _PLACEHOLDER_FIELDS}
    return sorted(token_id for token_id in ids if token_id is not None)

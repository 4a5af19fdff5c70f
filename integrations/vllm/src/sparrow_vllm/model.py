"""A Sparrow draft as a draft of vLLM's methods "eagle3" (states of several layers) and "eagle" (the last one's).

For every row vLLM hands over the id of the next token, the target's states of this one, and whether the next one is
visual. `rows.describe` makes of it what the draft reads. The target verifies what comes out, so nothing in here can
change a text; it can only cost acceptance.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from . import seams
from .config import DraftError
from .rows import describe

logger = init_logger("vllm.sparrow")

#: A hidden row's key has −HIDING_KEY in one channel, and every query so much that their product is HIDDEN_LOGIT: its
#: weight is then exactly 0, whatever the rest of the score is. fp8 holds the key.
HIDING_KEY, HIDDEN_LOGIT = 240.0, -15360.0
#: A state's length is taken to be no less, as in transformers.
SHORTEST = 1e-6


class HidingRope(nn.Module):
    """RoPE that also tells the attention which rows are hidden, whatever its backend.

    RoPE turns channel i of a head with channel i + head_dim/2. The last pair turns slowest, says least and is given
    up: its second channel holds a constant in queries, and 0 (kept) or −`HIDING_KEY` (hidden) in keys.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.rope, self.head_dim = attention.rotary_emb, attention.head_dim
        self.query = HIDDEN_LOGIT / (-HIDING_KEY * attention.scaling)
        self.hidden: Tensor | None = None

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = (x.unflatten(-1, (-1, self.head_dim)) for x in self.rope(positions, query, key))
        free, mark = self.head_dim // 2 - 1, self.head_dim - 1
        query[..., free], key[..., free] = 0.0, 0.0
        query[..., mark] = self.query
        key[..., mark] = torch.where(self.hidden, -HIDING_KEY, 0.0).to(key.dtype)[:, None]
        return query.flatten(1), key.flatten(1)


class SparrowModel(nn.Module):
    """FC, decoder layers, norm. `embed_tokens` is replaced by the target's."""

    def __init__(self, vllm_config: VllmConfig, config: Any, prefix: str):
        super().__init__()
        fields, size, eps = config.sparrow, config.hidden_size, config.rms_norm_eps
        # vLLM compares the width before it puts the target's here.
        self.embed_tokens = nn.Embedding(1, size)
        features = len(fields["feature_layers"])
        self.feature_fc = nn.Linear(features * size, size, bias=False) if features > 1 else nn.Identity()
        self.fc = nn.Linear(2 * size, size, bias=fields["fc_bias"])
        first = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.layers = nn.ModuleList(
            seams.decoder_layer(config, vllm_config, maybe_prefix(prefix, f"layers.{first + number}"))
            for number in range(config.num_hidden_layers)
        )
        for layer in self.layers:
            layer.self_attn.rotary_emb = HidingRope(layer.self_attn)
        if not fields["input_norm"]:
            self.layers[0].input_layernorm = nn.Identity()
        self.norm = RMSNorm(size, eps=eps) if fields["output_norm"] else nn.Identity()

    def forward(self, positions: Tensor, states: Tensor, hidden: Tensor) -> Tensor:
        """`(n, H)` states that enter the first layer → `(n, H)`; no row attends to `(n,)` hidden ones."""
        residual = None
        for layer in self.layers:
            layer.self_attn.rotary_emb.hidden = hidden
            states, residual = layer(positions, states, residual)
        return self.norm(states + residual)


class SparrowDraft(seams.Eagle3Base):
    """The draft, of both methods. "eagle" gives it the target's last states, so that it has no glimpse."""

    # vLLM then says which of the next tokens are visual, whatever their ids are.
    supports_multimodal_embeddings = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        self.config = config = vllm_config.speculative_config.draft_model_config.hf_config
        self.vllm_config, self.fields = vllm_config, config.sparrow
        check_fits(self.fields, vllm_config)
        self.model = SparrowModel(vllm_config, config, maybe_prefix(prefix, "model"))
        seams.check(vllm_config, self.model.layers[0])
        self.layer_names = [layer.self_attn.attn.layer_name for layer in self.model.layers]
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.never_drafted = nn.Parameter(torch.zeros(config.vocab_size, dtype=torch.bool), requires_grad=False)
        if self.fields["method"] == "eagle3":
            self.target_norm = RMSNorm(config.hidden_size, eps=self.fields["target"]["rms_norm_eps"])
        all_rows = torch.arange(vllm_config.model_config.max_model_len)
        kept = all_rows if self.fields["glimpse_rows"] is None else torch.tensor(self.fields["glimpse_rows"])
        self.register_buffer("glimpse", torch.isin(all_rows, kept), persistent=False)
        self.has_glimpse = len(kept) > 0
        # Kept from `combine_hidden_states` to the forward, which a CUDA graph may replay.
        room = vllm_config.scheduler_config.max_num_batched_tokens if self.has_glimpse else 0
        self.register_buffer("bridge", torch.zeros(room, config.hidden_size), persistent=False)
        self._memory: Tensor | None = None
        self._given: tuple[Tensor | None, Tensor | None] = (None, None)

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """`(n, k·H)` states of the layers in `eagle_aux_hidden_state_layer_ids` → `(n, H)` that FC reads."""
        layers, last = self.config.eagle_aux_hidden_state_layer_ids, self.fields["target"]["num_hidden_layers"]
        states = dict(zip(layers, hidden_states.chunk(len(layers), dim=-1), strict=True))
        if last in states:
            # vLLM hands it over before the norm.
            states[last] = self.target_norm(states[last].contiguous())
        if self.has_glimpse:
            self.bridge[: len(hidden_states)] = states[self.fields["bridge_layer"]]
        features = [states[layer] for layer in self.fields["feature_layers"]]
        if self.fields["feature_norm"]:
            layers = self.fields["feature_layers"]
            features = of_one_length(features, layers.index(max(layers)))
        return self.model.feature_fc(torch.cat(features, dim=-1))

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Keeps what is known of the next tokens: the forward, which comes next, gets embeddings only."""
        self._given = (input_ids, is_multimodal)
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        n, device = len(hidden_states), hidden_states.device
        given, self._given = self._given, (None, None)
        next_ids, next_is_visual = given if inputs_embeds is not None else (input_ids, None)
        # Nothing is given in dry runs, and nothing of what is visual after the first step.
        next_ids = torch.zeros(n, dtype=torch.int64, device=device) if next_ids is None else _padded(next_ids, n)
        visual = hidden = torch.zeros(n, dtype=torch.bool, device=device)
        if self._memory is None:
            # Before graphs are captured, since a graph would clear it every time.
            self._memory = seams.new_memory(self.vllm_config, device)
        batch = seams.current_batch(self.vllm_config, self.layer_names[0])
        if batch is not None and self._memory is not None:
            m, after, mode = batch.num_rows, self.fields["after_visual"], self.fields["position_mode"]
            next_is_visual = visual[:m] if next_is_visual is None else _padded(next_is_visual.to(device), m)
            rows = describe(batch, next_ids[:m], next_is_visual, self._memory, self.glimpse, after, mode == "compact")
            for name in self.layer_names:
                seams.put_slots(name, rows.slots)
            found = (rows.next_ids, rows.positions, rows.is_visual, rows.hidden)
            next_ids, positions, visual, hidden = (_padded(x, n) for x in found)
        states = self.model.fc(torch.cat((self.model.embed_tokens(next_ids), hidden_states), dim=-1))
        if self.has_glimpse:
            bridge = self.bridge[:n]
            if self.fields["project_visual"]:
                bridge = self.model.fc(torch.cat((torch.zeros_like(bridge), bridge), dim=-1))
            states = torch.where(visual[:, None], bridge, states)
        states = self.model(positions, states, hidden)
        return states, states

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = self.logits_processor(self.lm_head, hidden_states)
        return None if logits is None else logits.masked_fill(self.never_drafted, float("-inf"))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=seams.STACKED)
        borrowed = {"model.embed_tokens.weight"}
        if missing := dict(self.named_parameters()).keys() - loaded - borrowed:
            raise DraftError(f"the draft's files lack {', '.join(sorted(missing))}: export the draft again")
        return loaded | borrowed


def of_one_length(features: list[Tensor], latest: int) -> list[Tensor]:
    """Each `(n, H)` brought to the length of the one at `latest`, row by row."""
    lengths = [torch.linalg.vector_norm(each, dim=-1, keepdim=True, dtype=torch.float32) for each in features]
    scales = (lengths[latest] / length.clamp(min=SHORTEST) for length in lengths)
    return [each * scale.to(each.dtype) for each, scale in zip(features, scales, strict=True)]


def check_fits(fields: dict[str, Any], vllm_config: VllmConfig) -> None:
    """Raises [`DraftError`] if a draft was exported for another method or another target."""
    if vllm_config.speculative_config.method != fields["method"]:
        raise DraftError(
            f'this draft was exported for the method "{fields["method"]}", and --speculative-config asks for another '
            f'one: write "method": "{fields["method"]}"'
        )
    target = vllm_config.model_config.hf_config
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size")
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    found = {
        "model_type": target.model_type,
        **{name: getattr(target.get_text_config(), name) for name in sizes},
        "visual_token_ids": sorted({getattr(target, name, None) for name in names} - {None}),
    }
    wanted = fields["target"]
    wrong = [f"{name} {wanted[name]}, not {value}" for name, value in found.items() if wanted[name] != value]
    if wrong:
        raise DraftError(
            f"this draft was made for another target ({'; '.join(wrong)}): serve {wanted['name'] or 'that one'}, or "
            "train a draft for this one"
        )
    if fields["position_rule"]:
        logger.warning("Sparrow draft: %s", fields["position_rule"])


def _padded(tensor: Tensor, n: int) -> Tensor:
    """`(m,)` → `(n,)`, cut or filled with zeros."""
    return nn.functional.pad(tensor[:n], (0, max(n - len(tensor), 0)))

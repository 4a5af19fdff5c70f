"""The draft's layers in few calls: the numbers of its modules, which run themselves if one of them was changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sparrow_hf import SparrowDraftConfig, SparrowDraftModel
from sparrow_hf._transformers import DECODER_LAYERS
from sparrow_hf.generation import candidate_generator
from sparrow_hf.generation.draft_forward import DraftForward, FewCalls, draft_forward

from families import FAMILY_BY_NAME

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "head_dim": 16,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "target_num_hidden_layers": 4,
    "target_model_type": "qwen2_5_vl",
    "rms_norm_eps": 0.1,
}


def make_draft(dtype: torch.dtype = torch.float32, **overrides: Any) -> SparrowDraftModel:
    """A draft in which no weight is zero or one."""
    torch.manual_seed(0)
    draft = SparrowDraftModel(SparrowDraftConfig(**SIZES | overrides)).eval()
    with torch.no_grad():
        for weight in draft.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.ndim == 1))
    return draft.to(dtype)


@torch.no_grad()
def outputs_of(forward: DraftForward, draft: SparrowDraftModel) -> list[Tensor]:
    """A text of seven tokens, a single one, and the three of a level that do not see each other; then the cache."""
    generator, cache, outputs = torch.Generator().manual_seed(1), DynamicCache(), []
    lowest, past = torch.finfo(draft.dtype).min, 0
    for count, positions in ((7, range(3, 10)), (1, [10]), (3, [11])):
        embeds = torch.randn(count, draft.config.hidden_size, generator=generator).to(draft.dtype)
        mask = torch.full((1, 1, count, past + count), lowest, dtype=draft.dtype).triu(past + 1)
        mask[..., past:].masked_fill_(~torch.eye(count, dtype=torch.bool) & (len(positions) < count), lowest)
        rotary = forward.rotary(embeds, torch.tensor(positions))
        outputs.append(forward(embeds, rotary, None if count == 1 else mask, cache))
        past += count
    return [*outputs, *(states for layer in cache.layers for states in (layer.keys, layer.values))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the whole tensor: rounding errors grow with the terms of a sum, which a number near zero does not show."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"num_hidden_layers": 2, "input_norm": False, "output_norm": False},
        {"num_attention_heads": 2, "hidden_act": "gelu"},
    ],
    ids=["plain", "biases", "two layers and no norms", "heads of their own"],
)
@pytest.mark.parametrize("block", DECODER_LAYERS)
def test_few_calls_give_what_the_modules_do(block: str, overrides: dict[str, Any]) -> None:
    draft = make_draft(block_type=block, **overrides)
    forward = draft_forward(draft)
    assert type(forward) is FewCalls
    for found, expected in zip(outputs_of(forward, draft), outputs_of(DraftForward(draft), draft), strict=True):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("block", DECODER_LAYERS)
def test_few_calls_are_as_exact_in_bf16(block: str) -> None:
    """Compared with the same weights in fp32, not with one another: both round."""
    draft = make_draft(torch.bfloat16, block_type=block)
    exact = copy.deepcopy(draft).float()
    errors = [
        [relative_error(found, expected) for found, expected in zip(run, truth, strict=True)]
        for truth in [outputs_of(DraftForward(exact), exact)]
        for run in (outputs_of(draft_forward(draft), draft), outputs_of(DraftForward(draft), draft))
    ]
    assert all(ours < 1.5 * stock + 1e-3 for ours, stock in zip(*errors, strict=True))


def adapted(draft: SparrowDraftModel) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), draft)


def with_another_linear(draft: SparrowDraftModel) -> None:
    class Quantised(nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states).round(decimals=1)

    draft.layers[0].mlp.up_proj.__class__ = Quantised


def with_a_tensor_of_another_kind(draft: SparrowDraftModel) -> None:
    class Packed(Tensor):
        pass

    linear = draft.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)


def parametrized(draft: SparrowDraftModel) -> None:
    nn.utils.parametrizations.weight_norm(draft.layers[0].self_attn.o_proj)


def hooked(draft: SparrowDraftModel) -> None:
    draft.layers[0].self_attn.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))


def hooked_before(draft: SparrowDraftModel) -> None:
    draft.norm.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def replaced(draft: SparrowDraftModel) -> None:
    stock = draft.layers[0].mlp.forward
    draft.layers[0].mlp.forward = lambda states: 2 * stock(states)


def with_another_norm(draft: SparrowDraftModel) -> None:
    draft.norm = nn.LayerNorm(draft.config.hidden_size)


def with_another_norm_in_a_layer(draft: SparrowDraftModel) -> None:
    draft.layers[0].post_attention_layernorm = nn.RMSNorm(draft.config.hidden_size)


def with_another_attention(draft: SparrowDraftModel) -> None:
    class Clipped(type(draft.layers[0].self_attn)):  # type: ignore[misc]
        pass

    draft.layers[0].self_attn.__class__ = Clipped


def with_one_more_module(draft: SparrowDraftModel) -> None:
    draft.layers[0].mlp.register_module("dropout", nn.Dropout())


def with_a_layer_of_another_class(draft: SparrowDraftModel) -> None:
    class Scaled(type(draft.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    draft.layers[0].__class__ = Scaled


def with_a_forward_of_its_own(draft: SparrowDraftModel) -> None:
    class Other(SparrowDraftModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    draft.__class__ = Other


def in_eager_attention(draft: SparrowDraftModel) -> None:
    draft.set_attn_implementation("eager")


def compiled(draft: SparrowDraftModel) -> None:
    draft.layers[0].compile(backend="eager")


def in_training(draft: SparrowDraftModel) -> None:
    draft.train()


CHANGES = [
    adapted,
    with_another_linear,
    with_a_tensor_of_another_kind,
    parametrized,
    hooked,
    hooked_before,
    replaced,
    with_another_norm,
    with_another_norm_in_a_layer,
    with_another_attention,
    with_one_more_module,
    with_a_layer_of_another_class,
    with_a_forward_of_its_own,
    in_eager_attention,
    compiled,
    in_training,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_draft_runs_its_modules(change: Callable[[SparrowDraftModel], None]) -> None:
    draft = make_draft()
    change(draft)
    assert type(draft_forward(draft)) is DraftForward


def test_under_autocast_the_modules_run() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert type(draft_forward(make_draft())) is DraftForward


def test_a_call_reads_the_weights_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be trained, or merged with an adapter, between two calls."""
    made: list[DraftForward] = []
    monkeypatch.setattr(
        candidate_generator, "draft_forward", lambda draft: made.append(draft_forward(draft)) or made[-1]
    )
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    draft = SparrowDraftModel.from_target(target)
    for _ in range(2):
        target.generate(**family.build_inputs(target), assistant_model=draft, max_new_tokens=8, do_sample=False)
        for found, expected in zip(outputs_of(made.pop(), draft), outputs_of(DraftForward(draft), draft), strict=True):
            assert relative_error(found, expected) < 1e-5
        with torch.no_grad():
            for weight in draft.layers.parameters():
                weight += 0.1 * torch.randn_like(weight)
    assert not made

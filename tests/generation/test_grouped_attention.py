"""Grouped heads: folded attention is sdpa's, and nothing else changes."""

import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparrow_hf._transformers import query_groups
from sparrow_hf.generation import grouped_attention
from sparrow_hf.generation.grouped_attention import fold, groups_of
from sparrow_hf.generation.self_check import how_to_verify, what_cannot_be_read
from sparrow_hf.generation.split_attention import split_attention
from sparrow_hf.generation.tree import build_tree
from sparrow_hf.generation.verification import tree_attention_mask
from sparrow_hf.targets import TargetView

from families import FAMILY_BY_NAME
from grouped_families import FAMILY, GROUPS, target_of

# -- the attention itself ---------------------------------------------------------------------------------------------


def a_tree(size: int) -> Any:
    """Node i hangs under one of those before it; most rows have strangers before them."""
    return build_tree(list(range(size)), [-1, *((node * 7 + 3) % (node + 1) for node in range(size - 1))])


def inputs(groups: int, rows: int, window: int | None, padded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, keys and values of two sequences, two KV heads and 40 cached rows; the mask of a tree."""
    generator = torch.Generator().manual_seed(groups * 100 + rows)
    query = torch.randn(2, 2 * groups, rows, 8, generator=generator)
    key, value = (torch.randn(2, 2, 40 + rows, 8, generator=generator) for _ in range(2))
    prefix = (torch.arange(40) >= torch.tensor([[9], [0]])).long() if padded else None
    return query, key, value, tree_attention_mask(a_tree(rows), 40, torch.float32, prefix, window=window)


def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0]


@pytest.mark.parametrize("groups", [1, 4, 7])
@pytest.mark.parametrize("rows", [1, 6, 16])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("padded", [False, True])
def test_folded_attention_is_sdpas(groups: int, rows: int, window: int | None, padded: bool) -> None:
    query, key, value, mask = inputs(groups, rows, window, padded)
    folded = grouped_attention.grouped_attention(query, key, value, fold(mask, groups), 0.3)
    expected = stock(query, key, value, mask)
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-6)
    assert folded.is_contiguous() and folded.shape == (2, rows, 2 * groups, 8)
    boolean = grouped_attention.grouped_attention(query, key, value, fold(mask == 0, groups), 0.3)
    torch.testing.assert_close(boolean, expected, rtol=0, atol=1e-6)


def test_a_mask_in_a_higher_precision_is_taken() -> None:
    query, key, value, mask = inputs(4, 6, 12, True)
    half = [states.bfloat16() for states in (query, key, value)]
    folded = grouped_attention.grouped_attention(*half, fold(mask, 4), 0.3)
    assert folded.dtype == torch.bfloat16
    torch.testing.assert_close(folded, stock(*half, mask.bfloat16()), rtol=0, atol=1e-2)


def interleaved(mask: Tensor, groups: int) -> Tensor:
    return mask.repeat_interleave(groups, dim=2)


def node_major(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Rows of one node side by side, under a mask that repeats all nodes."""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    rows_first = query.view(batch, -1, groups, rows, width).transpose(2, 3).reshape(batch, -1, rows * groups, width)
    output = nn.functional.scaled_dot_product_attention(rows_first, key, value, attn_mask=mask, scale=scaling)
    return output.view(batch, -1, rows, groups, width).transpose(2, 3).reshape(query.shape).transpose(1, 2)


@pytest.mark.parametrize("bug", ["interleaved mask", "node-major fold"])
@pytest.mark.parametrize("groups, rows", [(4, 6), (7, 16)])
def test_a_wrong_fold_is_found(bug: str, groups: int, rows: int) -> None:
    query, key, value, mask = inputs(groups, rows, None, False)
    if bug == "interleaved mask":
        wrong = grouped_attention.grouped_attention(query, key, value, interleaved(mask, groups), 0.3)
    else:
        wrong = node_major(query, key, value, fold(mask, groups), 0.3)
    assert (wrong - stock(query, key, value, mask)).abs().max() > 0.1


# -- the functions in the register ------------------------------------------------------------------------------------


NAMES = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling")


@pytest.mark.parametrize("folds_steps", [False, True])
def test_every_other_call_is_sdpas(folds_steps: bool) -> None:
    """With the very same arguments."""
    called: list[tuple[Any, dict[str, Any]]] = []

    def recorded(*args: Any, **kwargs: Any) -> str:
        called.append((args, kwargs))
        return "stock"

    function = grouped_attention._taking_folded_masks(recorded, folds_steps)
    query, key, value, mask = inputs(4, 6, None, True)
    same = torch.randn(2, 2, 6, 8)
    for arguments, options in [
        # A prompt, a mask as models make it, one row per sequence as FlashAttention's, one for each head.
        ((query, key, value, None), {"dropout": 0.1, "scaling": 0.3, "is_causal": True}),
        ((query, key, value, mask), {"scaling": 0.3, "sliding_window": 4}),
        ((query, key, value, mask[:, 0, 0]), {}),
        ((query, key, value, fold(mask, 4).expand(-1, 8, -1, -1)), {}),
        # Heads that are not grouped, and what sdpa knows beside masks.
        ((same, key, value, mask), {"scaling": 0.3}),
        ((query, key, value, fold(mask, 4)), {"position_bias": mask}),
        ((query, key, value, fold(mask, 4)), {"softcap": 30.0}),
        ((query[:, :, :1], key, value, None), {"position_bias": mask}),
    ]:
        called.clear()
        assert function("module", *arguments, **options) == "stock"
        ((args, kwargs),) = called
        given = dict(zip(NAMES, args, strict=False)) | kwargs
        expected = dict(zip(NAMES[1:], arguments, strict=False)) | options
        assert given.pop("module") == "module"
        assert given.keys() == expected.keys() | {"dropout", "scaling"}
        assert all(given[name] is expected[name] for name in expected)


@pytest.mark.parametrize(
    "make_mask", [lambda mask: None, lambda mask: mask[:, :, :1], lambda mask: mask[:, :, :1] == 0]
)
def test_sdpa_grouped_folds_plain_steps(make_mask: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, mask = inputs(7, 6, None, True)
    query, mask = query[:, :, :1], make_mask(mask)
    register = AttentionInterface()
    expected = stock(query, key, value, mask)
    monkeypatch.setattr(nn.Module, "num_key_value_groups", 7, raising=False)
    found = register["sdpa_grouped"](nn.Module(), query, key, value, mask, scaling=0.3)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(register["sdpa"](nn.Module(), query, key, value, mask, scaling=0.3)[0], expected)


def test_rows_of_layers_that_share_keys_and_values_have_a_mask() -> None:
    """Their code leaves rows out, and knows only under the name of sdpa when the others need a mask for that."""
    name = "gemma4-shared-4:1"
    target, given = target_of(name, "sdpa_grouped"), FAMILY[name].build_inputs(target_of(name, "sdpa_grouped"))
    with torch.no_grad():
        torch.testing.assert_close(
            target(**given, logits_to_keep=5).logits, target(**given).logits[:, -5:], rtol=0, atol=1e-5
        )
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = target_of(name, "sdpa").generate(**given, **options).logits
    found = target.generate(**given, **options, cache_implementation="static").logits
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5)


PROGRAM = """
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=56, intermediate_size=32, num_hidden_layers=2,
                                     num_attention_heads=14, num_key_value_heads=2, head_dim=8, pad_token_id=0)).eval()
ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]])
def run():
    options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    plain = model.generate(ids, attention_mask=(ids > 0).long(), **options)
    single = model.generate(ids[1:], **options)
    return [*plain.logits, *single.logits]
before = run()
import sparrow_hf
from sparrow_hf.generation.grouped_attention import install_grouped_attention
assert all(map(torch.equal, before, run()))
function = AttentionInterface()["sdpa"]
assert hasattr(function, "__wrapped__")
install_grouped_attention()
assert AttentionInterface()["sdpa"] is function
model.set_attn_implementation("sdpa_grouped")
for found, expected in zip(run(), before):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
"""


def test_plain_generate_is_bit_for_bit_what_it_was_before_the_import() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_function_of_somebody_else_under_the_name_of_sdpa_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may compute anything, and be registered before or after."""

    def other(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return query.transpose(1, 2), None

    ours = AttentionInterface._global_mapping["sdpa"]

    @wraps(ours)
    def counted(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    view = TargetView(target_of("qwen2_5_vl-7:1", "sdpa"))
    assert groups_of(view) == {"full_attention": 7}
    for function in (other, counted, sdpa_attention_forward):
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", function)
        assert groups_of(view) == {}
    monkeypatch.setattr(grouped_attention, "_TAKING_FOLDED_MASKS", {})
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", other)
    grouped_attention.install_grouped_attention()
    assert AttentionInterface._global_mapping["sdpa"] is other


@pytest.mark.full
@pytest.mark.parametrize("name", ["sdpa", "sdpa_grouped"])
def test_compiled_code_has_no_break(name: str) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=56,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    decoder = LlamaForCausalLM._from_config(config, attn_implementation=name).model.eval()
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    mask = tree_attention_mask(build_tree([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2]), 0, torch.float32)
    with torch.no_grad():
        expected = decoder(ids, attention_mask=mask, use_cache=False)[0]
        for given in (mask, fold(mask, 7)):
            found = compiled(ids, attention_mask=given, use_cache=False)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            compiled(ids[:, :1], use_cache=False)[0], decoder(ids[:, :1], use_cache=False)[0], rtol=0, atol=1e-5
        )
    torch.compiler.reset()


# -- what is folded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("attention", ["sdpa", "sdpa_grouped", "eager"])
def test_every_kind_of_layer_has_its_own_groups(name: str, attention: str) -> None:
    view = TargetView(target_of(name, attention))
    assert groups_of(view) == ({} if attention == "eager" else GROUPS[name])
    # Nothing about it must be tried.
    assert what_cannot_be_read(view) == []


@pytest.mark.parametrize(
    "name",
    [
        # Attention that picks its keys itself, KV heads of latents, and layers that follow no mask.
        *("minimax_m3_vl", "kimi_k25", "lfm3_vl", "qwen3_5"),
    ],
)
def test_masks_are_left_as_they_are(name: str) -> None:
    if name not in FAMILY_BY_NAME:
        pytest.skip("not in this transformers")
    assert groups_of(TargetView(FAMILY_BY_NAME[name].build_target("sdpa"))) == {}


def test_attention_that_reads_its_mask_is_not_given_a_folded_one() -> None:
    """Neither is code that is not transformers' own."""
    from transformers.models.doge.modeling_doge import DogeAttention
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, hidden_size=32)
    layer = nn.Module()
    layer.self_attn = LlamaAttention(config, 0)
    for kind, groups in (
        (LlamaAttention, {"full_attention": 4}),
        (type("Mine", (LlamaAttention,), {"forward": lambda *args, **kwargs: None}), {}),
        (DogeAttention, {}),
    ):
        layer.self_attn.__class__ = kind
        assert query_groups(nn.ModuleList([layer]), config) == groups


def test_nothing_is_tried_and_the_choice_of_attention_may_change() -> None:
    target = FAMILY["qwen2_5_vl-7:1"].build_target("eager")
    view = TargetView(target)
    for name, groups in (("sdpa_grouped", {"full_attention": 7}), ("eager", {}), ("sdpa", {"full_attention": 7})):
        target.set_attn_implementation(name)
        assert groups_of(view) == groups
        found = how_to_verify(view)
        assert (found.chains, found.trees, found.differences) == ("own", "own", {})


@pytest.mark.parametrize("num_splits", [1, 2, 7, 8])
@pytest.mark.parametrize("rows", [1, 6, 48])
def test_split_keys_give_what_all_keys_give(rows: int, num_splits: int) -> None:
    """On a GPU the keys are split; the sums are brought together in the same way everywhere."""
    torch.manual_seed(rows)
    query, key, value = (torch.randn(1, 4, length, 16) for length in (rows * 7, 448, 448))
    mask = torch.zeros(1, 1, rows * 7, 448)
    mask.masked_fill_(torch.rand(mask.shape) < 0.3, torch.finfo(mask.dtype).min)
    # A split of which nothing is seen.
    mask[..., 300:] = torch.finfo(mask.dtype).min
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    found = split_attention(query, key, value, mask, num_splits, 0.3)
    assert torch.allclose(found, expected, atol=1e-6)
    # Planted: splits that count alike, whatever of them is seen.
    with mock.patch.object(Tensor, "softmax", lambda self, dim: torch.full_like(self, 1 / num_splits)):
        alike = split_attention(query, key, value, mask, num_splits, 0.3)
    assert num_splits == 1 or not torch.allclose(alike, expected, atol=1e-3)


def test_a_folded_mask_is_repeated_and_its_rows_begin_where_kernels_want_them() -> None:
    mask = torch.rand(2, 1, 3, 13)
    folded = fold(mask, 4)
    assert torch.equal(folded, mask.repeat(1, 1, 4, 1))
    assert folded.stride(2) % 8 == 0

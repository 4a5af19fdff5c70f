"""Decoding with `cache_implementation="static"`: the same ids, one graph for each step, nothing left of earlier calls.

That the ids are plain `generate()`'s, over all families, processors and stop rules, is in `test_lossless.py`: half of
its cases decode in fixed shapes.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kills import apart
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from sparrow_hf import SparrowDraftModel
from sparrow_hf._transformers import CACHE, slab_layers
from sparrow_hf.errors import UnsupportedGenerationError
from sparrow_hf.generation import static_verification
from sparrow_hf.generation.fixed_steps import FixedStep, traces_steps
from sparrow_hf.generation.static_decoding import bucket

from families import ALL_FAMILIES, FAMILY_BY_NAME
from oracles import drafting_around
from tiny_targets import Family

NEW = 24
CHAIN = {"num_tree_nodes": 6, "num_draft_levels": 5, "beam_width": 1}
TREE = {"num_tree_nodes": 12, "num_draft_levels": 4, "beam_width": 3}


def a_target(family: str = "qwen2_5_vl") -> tuple[PreTrainedModel, dict[str, Tensor]]:
    target = FAMILY_BY_NAME[family].build_target()
    return target, FAMILY_BY_NAME[family].build_inputs(target, videos=1, num_frames=2, seed=0)


def a_draft(target: PreTrainedModel, **shape: int) -> SparrowDraftModel:
    torch.manual_seed(0)
    return SparrowDraftModel.from_target(target, **shape)


def new_ids(target: PreTrainedModel, inputs: dict[str, Tensor], count: int = NEW, **options: Any) -> list[int]:
    ids = target.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def compile_with(backend: str) -> dict[str, Any]:
    """Arguments of `generate()` with which a CPU compiles too."""
    config = CompileConfig(backend=backend)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


COMPILES = pytest.mark.skipif(not traces_steps(), reason="torch before 2.11 cannot trace the steps")


@COMPILES
def test_steps_are_traced_once_for_all_rounds_calls_and_lengths_of_a_bucket() -> None:
    apart(check_what_is_traced)


def check_what_is_traced() -> None:
    for shape in (CHAIN, TREE):
        steps_are_traced_once(shape)


def steps_are_traced_once(shape: dict[str, int]) -> None:
    target, inputs = a_target()
    draft = a_draft(target, **shape)
    plain = new_ids(target, inputs)
    torch.compiler.reset()
    counters.clear()
    with drafting_around(plain, adversarial=False):
        # The oracle proposes; extending and verifying are traced all the same.
        assert new_ids(target, inputs, assistant_model=draft, **compile_with("eager")) == plain
    assert new_ids(target, inputs, assistant_model=draft, **compile_with("eager")) == plain
    traced = counters["stats"]["unique_graphs"]
    # Extending, proposing, verifying.
    assert traced == 3
    for count in (NEW - 3, NEW - 1):
        assert new_ids(target, inputs, count, assistant_model=draft, **compile_with("eager")) == plain[:count]
    assert counters["stats"]["unique_graphs"] == traced
    assert not counters["graph_break"]


@pytest.mark.full
@COMPILES
@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma4", "gemma4-shared"])
def test_compiled_steps_give_the_same_ids(family: str, shape: dict[str, int]) -> None:
    target, inputs = a_target(family)
    draft, plain = a_draft(target, **shape), new_ids(target, inputs)
    for adversarial in (False, True):
        with drafting_around(plain, adversarial=adversarial):
            assert new_ids(target, inputs, assistant_model=draft, **compile_with("inductor")) == plain


@pytest.mark.parametrize("family", [each for each in ALL_FAMILIES if each.chains_only], ids=lambda each: each.name)
def test_targets_whose_rows_cannot_branch_are_refused(family: Family) -> None:
    target, inputs = a_target(family.name)
    draft, plain = a_draft(target, **CHAIN), new_ids(target, inputs)
    ran: list[int] = []
    hooks = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in target.modules()]
    with pytest.raises(UnsupportedGenerationError, match=f"'static' .* the target's .*{family.chains_only}"):
        new_ids(target, inputs, assistant_model=draft, cache_implementation="static")
    assert not ran
    for hook in hooks:
        hook.remove()
    assert new_ids(target, inputs) == plain


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_of_every_step_are_refused(name: str) -> None:
    target, inputs = a_target()
    draft = a_draft(target, **CHAIN)
    options = {"return_dict_in_generate": True, name: True, "cache_implementation": "static"}
    with pytest.raises(UnsupportedGenerationError, match=name):
        target.generate(**inputs, assistant_model=draft, max_new_tokens=4, **options)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_target_as_a_whole_are_refused(register: str) -> None:
    target, inputs = a_target()
    draft = a_draft(target, **CHAIN)
    hook = getattr(target, register)(lambda *_: None)
    with pytest.raises(UnsupportedGenerationError, match="forward hooks on the target as a whole"):
        new_ids(target, inputs, assistant_model=draft, cache_implementation="static")
    hook.remove()
    assert new_ids(target, inputs, assistant_model=draft, cache_implementation="static") == new_ids(target, inputs)


def test_a_torch_that_cannot_compile_says_so_and_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = a_target()
    draft, plain = a_draft(target, **CHAIN), new_ids(target, inputs)
    monkeypatch.setattr("sparrow_hf.generation.decoding.traces_steps", lambda: False)
    with pytest.warns(UserWarning, match="torch before 2.11 cannot compile"):
        assert new_ids(target, inputs, assistant_model=draft, **compile_with("inductor")) == plain


def test_several_sequences_are_refused() -> None:
    target, inputs = a_target()
    draft = a_draft(target, **CHAIN)
    two = {name: torch.cat((value, value)) for name, value in inputs.items()}
    with pytest.raises(UnsupportedGenerationError, match="2 sequences"):
        target.generate(**two, assistant_model=draft, max_new_tokens=4, cache_implementation="static")


def test_a_returned_cache_goes_on() -> None:
    target, inputs = a_target()
    draft, plain = a_draft(target, **TREE), new_ids(target, inputs)
    first = target.generate(
        **inputs,
        assistant_model=draft,
        max_new_tokens=NEW // 2,
        do_sample=False,
        cache_implementation="static",
        return_dict_in_generate=True,
    )
    rows = first.sequences.shape[1] - 1
    cache = first[CACHE]
    assert cache.get_seq_length() == rows
    # Of its own: the next call in the same slabs does not change it.
    before = cache.layers[0].keys.clone()
    new_ids(target, inputs, assistant_model=draft, cache_implementation="static")
    assert torch.equal(cache.layers[0].keys, before)
    said = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    rest = target.generate(**said, **{CACHE: cache}, max_new_tokens=NEW - NEW // 2, do_sample=False)
    assert rest[0, inputs["input_ids"].shape[1] :].tolist() == plain


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_step_may_run_several_times_before_it_is_captured(
    shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where a step warms up before its kernels are recorded."""
    run = FixedStep.__call__

    def as_on_cuda(self: FixedStep) -> Any:
        if not hasattr(self, "is_warm"):
            self.is_warm = True
            for _ in range(3):
                run(self)
        return run(self)

    monkeypatch.setattr(FixedStep, "__call__", as_on_cuda)
    target, inputs = a_target()
    draft, plain = a_draft(target, **shape), new_ids(target, inputs)
    # A random draft is hardly ever right: no row has to be moved.
    assert new_ids(target, inputs, assistant_model=draft, cache_implementation="static") == plain
    (session,) = draft.target.static_sessions.values()
    for rows in (rows for layer in slab_layers(session.verification.cache) for rows in layer.slab):
        rows.copy_(torch.arange(rows.shape[2])[:, None].expand_as(rows))
    session.verification.move(7, [0, 2, 4])
    for rows in (rows for layer in slab_layers(session.verification.cache) for rows in layer.slab):
        assert rows[0, 0, 7:10, 0].tolist() == [7, 9, 11]


def test_numbers_that_are_none_stay_in_their_call() -> None:
    target, inputs = a_target()
    draft, plain = a_draft(target, **TREE), new_ids(target, inputs)
    norm = target.get_decoder().layers[0].input_layernorm.weight
    with torch.no_grad():
        kept = norm.clone()
        norm.fill_(float("nan"))
        target.generate(**inputs, assistant_model=draft, cache_implementation="static", max_new_tokens=NEW)
        norm.copy_(kept)
    (session,) = draft.target.static_sessions.values()
    assert new_ids(target, inputs, assistant_model=draft, cache_implementation="static") == plain
    assert list(draft.target.static_sessions.values()) == [session]


def test_an_earlier_call_leaves_nothing_behind() -> None:
    target, inputs = a_target()
    others = FAMILY_BY_NAME["qwen2_5_vl"].build_inputs(target, videos=1, num_frames=4, seed=3)
    draft = a_draft(target, **TREE)
    for each in (inputs, others, inputs):
        assert new_ids(target, each, assistant_model=draft, cache_implementation="static") == new_ids(target, each)
    assert len(draft.target.static_sessions) <= 2


@pytest.mark.parametrize("is_first_call", [True, False])
def test_a_prompt_of_which_the_draft_reads_nothing(is_first_call: bool) -> None:
    """Visual tokens alone, and a draft that looks at none of them."""
    target, inputs = a_target("llava_onevision")
    draft = a_draft(target, num_glimpse_tokens=0, **CHAIN)
    is_visual = torch.isin(inputs["input_ids"][0], torch.tensor(FAMILY_BY_NAME["llava_onevision"].visual_token_ids))
    visual = inputs | {name: inputs[name][:, is_visual] for name in ("input_ids", "attention_mask")}
    if not is_first_call:
        new_ids(target, inputs, assistant_model=draft, cache_implementation="static")
    assert new_ids(target, visual, assistant_model=draft, cache_implementation="static") == new_ids(target, visual)
    assert draft.last_generation.accepted == [0] * (NEW - 1)


def test_an_option_of_the_forward_holds_for_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = a_target()
    draft, forward, given = a_draft(target, **CHAIN), target.forward, []

    @functools.wraps(forward)
    def noted(**kwargs: Any) -> Any:
        given.append(kwargs.pop("style", None))
        return forward(**kwargs)

    signature = inspect.signature(forward)
    style = inspect.Parameter("style", inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, rest = signature.parameters.values()
    noted.__signature__ = signature.replace(parameters=[*named, style, rest])  # type: ignore[attr-defined]
    monkeypatch.setattr(target, "forward", noted)
    steps = []
    for options in ({}, {}, {"style": "bold"}, {}):
        given.clear()
        assert new_ids(target, inputs, assistant_model=draft, cache_implementation="static", **options)
        assert set(given) == {options.get("style")}
        (session,) = draft.target.static_sessions.values()
        steps.append(session.verification._verify)
    # What was captured with an option is not run without it.
    assert steps[0] is steps[1] and steps[1] is not steps[2] and steps[2] is not steps[3]


def test_a_head_that_is_offloaded_is_run_as_a_whole() -> None:
    accelerate = pytest.importorskip("accelerate")
    target, inputs = a_target()
    plain = new_ids(target, inputs)
    draft = a_draft(target, draft_vocab_size=40, **CHAIN)
    rows = draft.target.head_rows(draft.draft_to_target)
    assert torch.equal(rows[0], target.lm_head.weight[:40])
    accelerate.cpu_offload(target.lm_head, execution_device="cpu")
    assert target.lm_head.weight.is_meta and draft.target.head_rows(draft.draft_to_target) is None
    for options in ({}, {"cache_implementation": "static"}):
        assert new_ids(target, inputs, assistant_model=draft, **options) == plain


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_autocast_is_seen(shape: dict[str, int]) -> None:
    """The slabs have the dtype of what was put into them first."""
    target, inputs = a_target()
    draft = a_draft(target, **shape)
    texts = []
    for is_autocast in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            texts.append(new_ids(target, inputs, assistant_model=draft, cache_implementation="static"))
    # bf16 rounds a step over several tokens otherwise than one over a single token.
    assert texts[0] == texts[2] and texts[1] == new_ids(target, inputs)
    assert len(draft.target.static_sessions) == 2


@pytest.mark.parametrize(
    ("choose", "other", "usual"),
    [
        (torch.set_float32_matmul_precision, "high", "highest"),
        (torch.use_deterministic_algorithms, True, False),
        (torch.backends.cuda.enable_flash_sdp, False, True),
    ],
)
def test_kernels_of_other_settings_are_captured_anew(choose: Callable[[Any], None], other: Any, usual: Any) -> None:
    target, inputs = a_target()
    draft = a_draft(target, **CHAIN)
    try:
        for value in (usual, other, usual):
            choose(value)
            new_ids(target, inputs, assistant_model=draft, cache_implementation="static")
    finally:
        choose(usual)
    assert len(draft.target.static_sessions) == 2


def test_the_session_of_a_call_that_raised_is_not_kept() -> None:
    target, inputs = a_target()
    draft = a_draft(target, **CHAIN)
    new_ids(target, inputs, assistant_model=draft, cache_implementation="static")
    assert len(draft.target.static_sessions) == 1

    class Full(BaseStreamer):
        def put(self, value: Tensor) -> None:
            # Not at the prompt, which is no step.
            if value.numel() == 1:
                raise OSError("the disk is full")

        def end(self) -> None: ...

    with pytest.raises(OSError, match="the disk"):
        new_ids(target, inputs, assistant_model=draft, cache_implementation="static", streamer=Full())
    assert not draft.target.static_sessions
    assert new_ids(target, inputs, assistant_model=draft, cache_implementation="static") == new_ids(target, inputs)


def test_threads_do_not_share_a_session() -> None:
    target, inputs = a_target()
    draft, plain = a_draft(target, **TREE), new_ids(target, inputs)
    found: list[list[int]] = []

    def call() -> None:
        for _ in range(3):
            found.append(new_ids(target, inputs, assistant_model=draft, cache_implementation="static"))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [plain] * 12


def test_inference_mode_and_ordinary_calls_share_buffers() -> None:
    target, inputs = a_target()
    draft, plain = a_draft(target, **CHAIN), new_ids(target, inputs)
    with torch.inference_mode():
        assert new_ids(target, inputs, assistant_model=draft, cache_implementation="static") == plain
    assert new_ids(target, inputs, assistant_model=draft, cache_implementation="static") == plain


def test_a_longer_call_of_the_same_bucket_fits() -> None:
    """Nodes of the last round lie behind the longest text."""
    target, inputs = a_target()
    draft, prompt = a_draft(target, **CHAIN), inputs["input_ids"].shape[1]
    plain = new_ids(target, inputs, 128 - prompt)
    # A random draft is hardly ever right, so the last round begins at the last token but one.
    for length in (70, 120, 128):
        ids = new_ids(target, inputs, length - prompt, assistant_model=draft, cache_implementation="static")
        assert ids == plain[: length - prompt]


@pytest.mark.parametrize(("length", "size"), [(1, 64), (64, 64), (65, 128), (448, 448), (449, 512), (25000, 28672)])
def test_bucket(length: int, size: int) -> None:
    assert bucket(length) == size
    assert bucket(size) == size


def mask_with_a_stale_row(self: Any, kind: str, past: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
    return REAL_MASK(self, kind, past + 1, depths, ancestors)


def mask_of_interleaved_heads(self: Any, kind: str, past: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
    mask = REAL_MASK(self, kind, past, depths, ancestors)
    groups = mask.shape[2] // self.num_nodes
    return mask[:, :, : self.num_nodes].repeat_interleave(groups, dim=2)


def no_rows_moved(self: Any, past: int, path: list[int]) -> None:
    pass


REAL_MASK = static_verification.StaticVerification._mask


@pytest.mark.parametrize(
    ("name", "bug"),
    [("_mask", mask_with_a_stale_row), ("_mask", mask_of_interleaved_heads), ("move", no_rows_moved)],
    ids=["stale row", "interleaved heads", "rows stay where they were"],
)
def test_planted_bugs_are_found(name: str, bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = a_target()
    draft, plain = a_draft(target, **TREE), new_ids(target, inputs)
    monkeypatch.setattr(static_verification.StaticVerification, name, bug)
    with drafting_around(plain, adversarial=False, seed=1):
        assert new_ids(target, inputs, assistant_model=draft, cache_implementation="static") != plain

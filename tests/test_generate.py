"""Everything `generate()` offers at batch one, with a draft: equal to the same call without."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, pipeline
from transformers.generation import BaseStreamer

from sparrow_hf import SparrowCandidateGenerator, SparrowDraftModel
from sparrow_hf._transformers import CACHE

from families import FAMILY_BY_NAME
from oracles import drafting_around

FAMILIES = ("qwen2_5_vl", "llava_onevision", "internvl")
TREE = {"num_tree_nodes": 14, "num_draft_levels": 4, "beam_width": 3}


@pytest.fixture(params=FAMILIES)
def setting(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, SparrowDraftModel, dict[str, Any]]:
    family = FAMILY_BY_NAME[request.param]
    target = family.build_target()
    torch.manual_seed(0)
    return target, SparrowDraftModel.from_target(target, **TREE), family.build_inputs(target)


def both(target: PreTrainedModel, draft: SparrowDraftModel, inputs: dict[str, Any], **kwargs: Any) -> tuple[Any, Any]:
    """The call without and with a draft that accepts in depth."""
    plain = target.generate(**inputs, **kwargs)
    sequences = plain if isinstance(plain, torch.Tensor) else plain.sequences
    with drafting_around(sequences[0, inputs["input_ids"].shape[1] :].tolist(), adversarial=True, seed=3):
        return plain, target.generate(**inputs, assistant_model=draft, **kwargs)


def test_hidden_states_and_attentions(setting) -> None:
    target, draft, inputs = setting
    target.set_attn_implementation("eager")
    plain, ours = both(
        target,
        draft,
        inputs,
        max_new_tokens=10,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert torch.equal(plain.sequences, ours.sequences)
    for name in ("hidden_states", "attentions"):
        assert len(plain[name]) == len(ours[name]) == 10
        for expected, found in zip(plain[name], ours[name], strict=True):
            for expected_layer, found_layer in zip(expected, found, strict=True):
                assert expected_layer.shape == found_layer.shape
                assert torch.allclose(expected_layer, found_layer, atol=1e-4)


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_chunked_prefill(setting, chunk: int) -> None:
    target, draft, inputs = setting
    plain = target.generate(**inputs, max_new_tokens=10)
    whole = SparrowDraftModel.from_target(target, **draft.config.tree_shape._asdict())
    whole.load_state_dict(draft.state_dict())
    target.generate(**inputs, max_new_tokens=10, assistant_model=whole)
    chunked = target.generate(**inputs, max_new_tokens=10, prefill_chunk_size=chunk, assistant_model=draft)
    assert torch.equal(plain, chunked)
    # The draft read the same rows, whatever the chunks.
    assert draft.last_generation.accepted == whole.last_generation.accepted


# Since 5.24 transformers takes the cache by either name.
@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_multi_turn_from_a_cache(setting, name: str) -> None:
    target, draft, inputs = setting

    def two_turns(assistant: SparrowDraftModel | None) -> torch.Tensor:
        cache = DynamicCache(config=target.config.get_text_config())
        first = target.generate(**inputs, **{name: cache}, max_new_tokens=6, assistant_model=assistant)
        second = torch.cat((first, torch.tensor([[20, 21, 22, 23]])), dim=1)
        return target.generate(
            input_ids=second,
            attention_mask=torch.ones_like(second),
            **{name: cache},
            max_new_tokens=8,
            assistant_model=assistant,
        )

    assert torch.equal(two_turns(None), two_turns(draft))


def test_left_padding(setting) -> None:
    target, draft, inputs = setting
    pad = target.generation_config.pad_token_id
    padded = dict(inputs)
    padded["input_ids"] = torch.cat((torch.full((1, 5), pad), inputs["input_ids"]), dim=1)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    padded["attention_mask"] = torch.cat((torch.zeros((1, 5), dtype=mask.dtype), mask), dim=1)
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        padded["mm_token_type_ids"] = torch.cat((types.new_zeros((1, 5)), types), dim=1)
    plain, ours = both(target, draft, padded, max_new_tokens=12)
    assert torch.equal(plain, ours)
    # Padding is no context: the draft proposes what it proposes without it.
    target.generate(**padded, max_new_tokens=12, assistant_model=draft)
    with_padding = draft.last_generation
    target.generate(**inputs, max_new_tokens=12, assistant_model=draft)
    assert draft.last_generation.max_draft_cache_length == with_padding.max_draft_cache_length


@pytest.mark.parametrize("offset", range(1, 12))
def test_max_length_at_every_offset(offset: int) -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    draft, inputs = SparrowDraftModel.from_target(target), family.build_inputs(target)
    plain = target.generate(**inputs, max_new_tokens=12)
    prompt = inputs["input_ids"].shape[1]
    with drafting_around(plain[0, prompt:].tolist(), adversarial=False):
        ours = target.generate(**inputs, assistant_model=draft, max_length=prompt + offset)
    assert torch.equal(ours, plain[:, : prompt + offset])


def test_peft_model(setting) -> None:
    from peft import LoraConfig, get_peft_model

    target, draft, inputs = setting
    torch.manual_seed(5)
    wrapped = get_peft_model(
        target, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    )
    plain, ours = both(wrapped, draft, inputs, max_new_tokens=12)
    assert torch.equal(plain, ours)
    assert draft.last_generation.rounds > 0


def test_pipeline() -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    draft = SparrowDraftModel.from_target(target)
    prompt = [{"role": "user", "content": [{"type": "text", "text": "What moves here?"}]}]
    family._processor.chat_template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    pipe = pipeline("image-text-to-text", model=target, processor=family._processor)
    # Given to the pipeline itself, this one drops the assistant (transformers 5.23); given to the call it arrives.
    texts = [
        pipe(text=prompt, return_full_text=False, generate_kwargs={"max_new_tokens": 12} | extra)[0]["generated_text"]
        for extra in ({}, {"assistant_model": draft})
    ]
    assert texts[0] == texts[1]
    assert draft.last_generation.new_tokens > 1


@pytest.mark.parametrize("name", FAMILIES[:2])
@pytest.mark.parametrize("shape", ["chain-5", "48-5-10"])
def test_chain_in_the_stock_loop(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator alone, inside transformers' own assisted loop."""
    from transformers.generation.utils import GenerationMixin

    family = FAMILY_BY_NAME[name]
    target = family.build_target()
    torch.manual_seed(0)
    draft, inputs = SparrowDraftModel.from_target(target), family.build_inputs(target)
    draft.config.set_tree_shape(shape)
    plain = target.generate(**inputs, max_new_tokens=14)

    def generator(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> SparrowCandidateGenerator:
        return SparrowCandidateGenerator(draft, input_ids)

    stock = GenerationMixin._assisted_decoding.__wrapped__
    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", stock)
    monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", generator)
    ours = target.generate(**inputs, max_new_tokens=14, assistant_model=target)
    assert torch.equal(plain, ours)


def test_statistics_of_a_call_add_up() -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    draft = SparrowDraftModel.from_target(target, num_draft_levels=5)
    inputs = family.build_inputs(target, num_frames=8)
    plain = target.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :].tolist()
    calls = []
    hook = target.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    with drafting_around(plain, adversarial=False):
        target.generate(**inputs, max_new_tokens=20, assistant_model=draft)
    hook.remove()
    stats = draft.last_generation
    assert stats.rounds == len(calls) - 1
    # 1 from the prefill, then 6 a round: 1 + 6 + 6 + 6 = 19, and the last round may only draft what is left.
    assert stats.new_tokens == 20
    assert stats.accepted == [5, 5, 5, 0]
    assert (stats.k, stats.tau) == (15 / 4, 19 / 4)
    assert stats.per_position == [0.75] * 5
    assert stats.prefill_seconds > 0 and stats.draft_seconds > 0 and stats.verify_seconds > 0
    visual = int(torch.isin(inputs["input_ids"], torch.tensor(family.visual_token_ids)).sum())
    text = inputs["input_ids"].shape[1] - visual
    assert stats.max_draft_cache_length <= text + 19 + min(visual, 64) + 6


def test_not_a_number_drafts_nothing_and_changes_nothing(setting) -> None:
    target, draft, inputs = setting
    plain = target.generate(**inputs, max_new_tokens=10)
    with torch.no_grad():
        draft.fc.weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="not numbers"):
        ours = target.generate(**inputs, max_new_tokens=10, assistant_model=draft)
    assert torch.equal(plain, ours)
    assert (draft.last_generation.failed_drafts, draft.last_generation.rounds) == (8, 9)  # the last may draft nothing


def test_other_assistants_pass_through() -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    inputs = family.build_inputs(target, videos=0)
    plain = target.generate(**inputs, max_new_tokens=8)
    assert torch.equal(plain, target.generate(**inputs, max_new_tokens=8, assistant_model=target))
    assert torch.equal(plain, target.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3))


def test_arguments_of_a_custom_generate_pass_through() -> None:
    """It may have arguments that are called as ours are."""
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()

    def decode(model: Any, input_ids: torch.Tensor, function: str, target: str, **options: Any) -> Any:
        return function, target

    inputs = family.build_inputs(target, videos=0)
    assert target.generate(**inputs, custom_generate=decode, function="f", target="t") == ("f", "t")


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_a_call_inside_a_call_leaves_the_outer_ones_statistics(options: dict[str, Any]) -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    draft = SparrowDraftModel.from_target(target, num_draft_levels=2)
    inputs, inner = family.build_inputs(target), family.build_inputs(target, videos=0)

    def asks_itself(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        target.generate(**inner, max_new_tokens=3, assistant_model=draft)
        return scores

    target.generate(**inputs, max_new_tokens=7, assistant_model=draft, logits_processor=[asks_itself], **options)
    assert draft.last_generation.new_tokens == 7


@pytest.mark.parametrize("rows", [1, 2])
def test_a_near_tie_of_fp64_goes_as_plain_takes_it(rows: int) -> None:
    """Plain decoding rounds logits to fp32, where both are the same, and takes the lower id."""
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target().double()
    inputs = {name: value.repeat(rows, 1) for name, value in family.build_inputs(target, videos=0).items()}
    head = target.get_output_embeddings().weight
    for token in target.generate(**inputs, max_new_tokens=12)[0, -12:].unique():
        with torch.no_grad():
            head[token - 1] = head[token] * (1 - 1e-9)
    draft = SparrowDraftModel.from_target(target, num_draft_levels=2)
    plain = target.generate(**inputs, max_new_tokens=12)
    # The token of the prefill is chosen by itself.
    logits = target(plain).logits[0, -12:-1]
    assert (logits.argmax(-1) != logits.float().argmax(-1)).any()
    assert torch.equal(plain, target.generate(**inputs, max_new_tokens=12, assistant_model=draft))


def test_threads_share_one_target_and_one_draft(setting) -> None:
    target, draft, inputs = setting
    prompts = [inputs | {"input_ids": inputs["input_ids"].clone()} for _ in range(6)]
    for number, prompt in enumerate(prompts):
        prompt["input_ids"][0, -1] = 20 + number  # another last word, so another answer
    serial = [target.generate(**prompt, max_new_tokens=10) for prompt in prompts]

    def run(prompt: dict[str, Any]) -> tuple[torch.Tensor, int]:
        sequences = target.generate(**prompt, max_new_tokens=10, assistant_model=draft)
        return sequences, draft.last_generation.new_tokens

    with ThreadPoolExecutor(max_workers=3) as pool:
        threaded = list(pool.map(run, prompts))
    for expected, (found, new_tokens) in zip(serial, threaded, strict=True):
        assert torch.equal(expected, found)
        assert new_tokens == 10


class Rebinding(BaseStreamer):
    """Binds the draft to another target with every token, as a call of another thread might."""

    def __init__(self, draft: SparrowDraftModel, other: PreTrainedModel):
        self.draft, self.other = draft, other

    def put(self, value: torch.Tensor) -> None:
        self.draft.bind(self.other)

    def end(self) -> None: ...


@pytest.mark.parametrize(
    ("rows", "options"),
    [(1, {}), (1, {"cache_implementation": "static"}), (2, {})],
    ids=["dynamic", "static", "batch"],
)
def test_a_call_keeps_its_target_when_the_draft_is_bound_to_another(rows: int, options: dict[str, Any]) -> None:
    target, other = (FAMILY_BY_NAME["qwen2_5_vl"].build_target() for _ in range(2))
    with torch.no_grad():
        for weight in other.get_decoder().parameters():
            weight.mul_(-1.5)
    draft = SparrowDraftModel.from_target(target, **TREE | {"beam_width": 1, "num_tree_nodes": 5})
    ids = torch.arange(20, 40).repeat(rows, 1)
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = target.generate(ids, **call)
    assert not torch.equal(plain, other.generate(ids, **call))
    # The second call, too: nothing that was made for the other target is kept for this one.
    for _ in range(2):
        streamer = Rebinding(draft, other)
        assert torch.equal(plain, target.generate(ids, **call, assistant_model=draft, streamer=streamer, **options))

"""The sibling on a sifted prompt: which tokens stay, and drafts of a sibling that is the target itself."""

from pathlib import Path

import pytest
import torch

from sparrow_hf.evaluation import Arms, compare
from sparrow_research.baselines import specvlm
from sparrow_research.baselines.specvlm import choose_visual, drafting_on_pruned_prompts

from families import FAMILY_BY_NAME
from tiny_targets import Family

LENGTH = 14


@pytest.mark.parametrize(
    ("scores", "share", "kept"),
    [
        # 0.5 of the mass is more than enough: one heavy token, the others at even strides of the nine that are left.
        ([1, 1, 1, 9, 1, 1, 1, 1, 1, 1], 0.4, [0, 3, 4, 7]),
        # The heavy ones alone would be more than the budget.
        ([5, 4, 3, 2, 1, 0, 0, 0, 0, 0], 0.1, [0]),
        ([0, 0, 6, 6, 0, 0, 0, 0, 0, 0], 0.2, [0, 2]),
        ([1, 1, 1, 1], 1.0, [0, 1, 2, 3]),
        ([2.0], 0.1, [0]),
        ([], 0.1, []),
    ],
)
def test_which_visual_tokens_stay(scores: list[float], share: float, kept: list[int]) -> None:
    assert choose_visual(torch.tensor(scores, dtype=torch.float), share).tolist() == kept


def settings(family: Family, **sampling: float) -> dict[str, object]:
    fixed = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "suppress_tokens": family.visual_token_ids}
    return fixed | {"do_sample": bool(sampling)} | sampling


def test_who_reads_the_whole_prompt_drafts_what_the_target_writes(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no token sifted out, the target as its own sibling is always right: rows, positions and cache are."""
    target = family.build_target()
    ends = target.generation_config.eos_token_id
    kept_from = [*family.visual_token_ids, *(ends if isinstance(ends, list) else [ends or 0])]
    with torch.no_grad():
        # The target is kept from writing these, a sibling is not: neither must want to.
        target.get_output_embeddings().weight[torch.tensor(kept_from)] = 0
    monkeypatch.setattr(choose_visual, "__defaults__", (1.0, 0.4))
    inputs = family.build_inputs(target, num_frames=4)
    prompt = inputs["input_ids"].shape[1]
    rounds: list[int] = []
    hook = target.get_decoder().register_forward_hook(lambda *_: rounds.append(1))
    with drafting_on_pruned_prompts(target, target, inputs):
        written = target.generate(**inputs, **settings(family), assistant_model=target)[0, prompt:].tolist()
    hook.remove()
    assert written == target.generate(**inputs, **settings(family))[0, prompt:].tolist()
    # The prefill, the sibling's own, and rounds of five drafts and one more token, drafts by the same decoder.
    full, rest = divmod(LENGTH - 1, specvlm.NUM_DRAFT_TOKENS + 1)
    assert len(rounds) == 2 + full * (specvlm.NUM_DRAFT_TOKENS + 1) + rest
    assert "_get_candidate_generator" not in vars(target)
    assert not any(layer.self_attn._forward_pre_hooks for layer in target.get_decoder().layers)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_whatever_is_sifted_out_the_text_stays(name: str, sampling: dict[str, float], tmp_path: Path) -> None:
    family = FAMILY_BY_NAME[name]
    target = family.build_target()
    target.generation_config.suppress_tokens = family.visual_token_ids
    target.save_pretrained(tmp_path)
    arm = Arms(target, folders={"twin": str(tmp_path)}).arm("specvlm:twin")
    assert arm.num_draft_levels == specvlm.NUM_DRAFT_TOKENS and arm.runs_stock_loop
    plain = Arms(target).arm("plain")
    for frames in (4, 12):
        inputs = family.build_inputs(target, num_frames=frames, seed=frames)
        runs = compare(target, [plain, arm], inputs, settings(family, **sampling))
        assert runs[arm.name].new_tokens == LENGTH
        if not sampling:
            assert runs[arm.name].differs_at is None


def test_a_prompt_without_a_video_and_an_answer_of_one_token() -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    inputs = family.build_inputs(target, videos=0)
    with drafting_on_pruned_prompts(target, target, inputs):
        written = target.generate(**inputs, **settings(family), assistant_model=target)
        assert torch.equal(written, target.generate(**inputs, **settings(family)))
        target.generate(**inputs, max_new_tokens=1, assistant_model=target)
    assert not any(layer.self_attn._forward_pre_hooks for layer in target.get_decoder().layers)

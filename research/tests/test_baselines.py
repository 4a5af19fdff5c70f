"""The rivals: lossless like Sparrow, trained on what they decode with, and each with the rows its originals have."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from sparrow_hf import SparrowCandidateGenerator, SparrowDraftModel
from sparrow_hf.draft_inputs import DraftInputs, draft_positions, visual_mask
from sparrow_hf.errors import DraftConfigError
from sparrow_hf.training import SparrowTrainer, append_answer, read_with_target
from sparrow_hf.training.passes import exact_passes, make_batch, reinput_passes
from sparrow_research.baselines import BASELINES, HiViSDraftModel, ViSpecDraftModel
from sparrow_research.curriculum import CurriculumArguments

from families import FAMILY_BY_NAME
from oracles import drafting_around

TRAINED = [name for name, baseline in BASELINES.items() if baseline.weights_of is None]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return FAMILY_BY_NAME["qwen2_5_vl"].build_target()


@pytest.fixture(scope="module")
def samples(target: PreTrainedModel) -> list[dict[str, Any]]:
    """Two prompts with the target's own greedy answers; prompt, answer and video of both differ in length."""
    family, rows = FAMILY_BY_NAME["qwen2_5_vl"], []
    for seed, (length, question) in enumerate([(7, "Why?"), (12, "What is shown in this video?")]):
        prompt = family.build_inputs(target, num_frames=4 + 8 * seed, seed=seed, question=question)
        rows.append(append_answer(prompt, plain(target, prompt, family.visual_token_ids, length)))
    return rows


def plain(
    target: PreTrainedModel, prompt: dict[str, Tensor], suppressed: list[int], length: int, **kwargs: Any
) -> Any:
    """Tokens of exactly so long an answer; a random target would end it early or write placeholders."""
    torch.manual_seed(0)
    fixed = {"max_new_tokens": length, "min_new_tokens": length, "suppress_tokens": suppressed}
    return target.generate(**prompt, **({"do_sample": False} | fixed | kwargs))[
        0, prompt["input_ids"].shape[1] :
    ].tolist()


def make_draft(name: str, target: PreTrainedModel, **overrides: Any) -> SparrowDraftModel:
    """A baseline's draft with weights so wide that everything a row attends to shows in what it predicts."""
    baseline = BASELINES[name]
    draft = baseline.draft_class.from_target(target, **(baseline.draft | overrides))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2, generator=generator)
    return draft


# -- the promise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("family_name", "tree"),
    [
        ("qwen2_5_vl", "chain-5"),
        ("llava_onevision", "30-4-8"),
        pytest.param("qwen2_5_vl", "30-4-8", marks=pytest.mark.full),
        pytest.param("llava_onevision", "chain-5", marks=pytest.mark.full),
    ],
)
def test_tokens_are_those_of_plain_generate(family_name: str, name: str, tree: str) -> None:
    family = FAMILY_BY_NAME[family_name]
    target, ids = family.build_target(), family.visual_token_ids
    draft = make_draft(name, target)
    draft.config.set_tree_shape(tree)
    for videos, images, sampling in ((1, 0, {}), (1, 1, {"do_sample": True}), (0, 0, {})):
        inputs = family.build_inputs(target, videos=videos, images=images)
        expected = plain(target, inputs, ids, 8, **sampling)
        assert plain(target, inputs, ids, 8, assistant_model=draft, **sampling) == expected
        assert draft.last_generation.failed_drafts == 0
        with drafting_around(expected, adversarial=True):
            assert plain(target, inputs, ids, 8, assistant_model=draft, **sampling) == expected


# -- training sees what decoding sees ---------------------------------------------------------------------------------


def decoded_chains(
    draft: SparrowDraftModel, sample: dict[str, Any], monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> list[list[Tensor]]:
    """States the generator's chains predict, one chain per answer token, when all they draft is the true answer."""
    start = sample["answer_start"]
    states = read_with_target(
        draft,
        sample,
        draft_positions(sample["input_ids"][0], draft.config.visual_token_ids, draft.config.num_glimpse_tokens),
    )
    answer = sample["input_ids"][0, start:].tolist()
    generator = SparrowCandidateGenerator(draft, sample["input_ids"][:, :start])
    num_text = len(generator.positions.text)
    predicted: list[Tensor] = []

    def draft_the_answer(hidden: Tensor, **_: Any) -> Tensor:
        predicted.append(hidden[-1])
        logits = torch.zeros(1, draft.config.vocab_size)
        logits[..., answer[chain + len(predicted)]] = 9.0
        return logits

    monkeypatch.setattr(draft, "compute_logits", draft_the_answer)
    given = {draft.config.feature_layer_ids[0]: states.text_states[None, :num_text]}
    generator.prefill({draft.config.visual_bridge_layer: states.visual_states[None]} | given, answer[0])
    chains = []
    for chain in range(len(answer) - 1):
        generator.propose(min(num_steps, len(answer) - 1 - chain))
        chains.append(list(predicted))
        predicted.clear()
        generator.extend(states.text_states[None, num_text + chain : num_text + chain + 1], [answer[chain + 1]])
    monkeypatch.undo()
    return chains


@pytest.mark.parametrize("overrides", [{}, {"position_mode": "compact"}], ids=["published", "compact"])
@pytest.mark.parametrize("name", BASELINES)
def test_exact_passes_are_what_the_generator_computes(name, overrides, target, samples, monkeypatch) -> None:
    draft = make_draft(name, target, **overrides)
    config, read = draft.config, []
    for sample in samples:
        rows = draft_positions(sample["input_ids"][0], config.visual_token_ids, config.num_glimpse_tokens)
        read.append((read_with_target(draft, sample, rows), rows))
    with torch.no_grad():
        passes = exact_passes(draft, make_batch(read, config.position_mode), num_passes=5)
        for index, sample in enumerate(samples):
            for chain, states in enumerate(decoded_chains(draft, sample, monkeypatch, num_steps=5)):
                found = torch.stack([passes[step][index, chain] for step in range(len(states))])
                torch.testing.assert_close(found, torch.stack(states), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vispec", "hivis"])
def test_padding_changes_nothing(name, target, samples) -> None:
    """A sample alone and the same one beside one with a longer video: same outputs of both kinds of passes."""
    draft, read = make_draft(name, target), []
    for sample in samples:
        rows = draft_positions(sample["input_ids"][0], draft.config.visual_token_ids, draft.config.num_glimpse_tokens)
        read.append((read_with_target(draft, sample, rows), rows))
    with torch.no_grad():
        for passes in (exact_passes, reinput_passes):
            together = passes(draft, make_batch(read, "original"), 3)
            for index in range(2):
                alone = passes(draft, make_batch(read[index : index + 1], "original"), 3)
                for step in range(3):
                    width = alone[step].shape[1]
                    torch.testing.assert_close(
                        together[step][index : index + 1, :width], alone[step], rtol=1e-3, atol=1e-4
                    )


@pytest.mark.parametrize("progress", [0.0, 1.0], ids=["text-first", "visual"])
@pytest.mark.parametrize("name", TRAINED)
def test_one_trainer_for_all(tmp_path, name, progress, target, samples) -> None:
    """Every parameter learns in every step, be it nothing: processes that train together wait for its gradient."""
    draft = make_draft(name, target)
    args = CurriculumArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=10, **BASELINES[name].training)
    trainer = SparrowTrainer(draft, target, args)
    trainer.state.max_steps, trainer.state.global_step = 10, int(10 * progress)
    budgets = [len(rows) for rows in trainer.make_batch(samples, training=True).visual_positions]
    assert (max(budgets) > 0) == (progress == 1.0 and name != "hivis")
    loss = trainer.compute_loss(draft.train(), {"samples": samples})
    loss.backward()
    assert loss.isfinite()
    gradients = {name: parameter.grad for name, parameter in draft.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    if progress == 1.0:
        assert not [name for name, gradient in gradients.items() if not gradient.any()]


# -- what each draft reads --------------------------------------------------------------------------------------------


def test_rows_in_the_drafts_cache(target) -> None:
    """All visual rows, none, one for the video, none; and the new text rows."""
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    inputs = family.build_inputs(target, num_frames=8)
    num_visual = int(visual_mask(inputs["input_ids"], family.visual_token_ids).sum())
    num_text = inputs["input_ids"].shape[1] - num_visual
    found = {}
    for name in BASELINES:
        draft = make_draft(name, target)
        draft.config.set_tree_shape((2, 1, 1))
        plain(target, inputs, family.visual_token_ids, 2, assistant_model=draft)
        found[name] = draft.last_generation.max_draft_cache_length - num_text
    assert found == {"msd": num_visual, "msd-deleted": 0, "vispec": 1, "hivis": 0}


def test_msd_reads_the_projected_visual_features(target, samples) -> None:
    draft = make_draft("msd", target)
    states = read_with_target(draft, samples[0])
    prompt = {name: value for name, value in samples[0].items() if name != "answer_start"}
    with torch.no_grad():
        embeddings = target(**prompt, output_hidden_states=True).hidden_states[0][0]
    assert torch.equal(states.visual_states, embeddings[states.visual_rows])
    kept = draft_positions(states.input_ids, draft.config.visual_token_ids, draft.config.num_glimpse_tokens)
    batch = make_batch([(states, kept)], "original")
    embeds, _ = draft.embed_inputs(batch)
    assert torch.equal(embeds[0, batch.visual_positions[0]], states.visual_states)


def test_vispec_rows_by_hand(target) -> None:
    """Two samples: runs of 2 and 3 rows among 4 text rows; one run of 1 among 3, padded."""
    draft = make_draft("vispec", target)
    hidden = draft.config.hidden_size
    visual = torch.randn(2, 5, hidden)
    inputs = DraftInputs(
        next_ids=torch.zeros(2, 4, dtype=torch.long),
        text_states=torch.randn(2, 4, hidden),
        #                        t v v t v v v t t       t t v t, padded
        text_positions=torch.tensor([[0, 3, 7, 8], [0, 1, 3, 9]]),
        visual_states=visual,
        visual_positions=torch.tensor([[1, 2, 4, 5, 6], [2, 9, 9, 9, 9]]),
        position_ids=torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21, 22, 23, 0, 0, 0, 0, 0]]),
    )
    with torch.no_grad():
        _, found = draft.embed_inputs(inputs)
        assert found.text_positions.tolist() == [[0, 2, 4, 5], [0, 1, 3, 6]]
        assert found.visual_positions.tolist() == [[1, 3], [2, 6]]
        assert found.position_ids.tolist() == [[10, 12, 13, 16, 17, 18], [20, 21, 22, 23, 0, 0]]

        def attend(run: Tensor) -> Tensor:
            queries = draft.visual_queries.weight[None]
            return draft.compressor(queries, run[None], run[None])[0][0]

        first, second, other = attend(visual[0, :2]), attend(visual[0, 2:]), attend(visual[1, :1])
        expected_rows = torch.stack((first[0], second[0], other[0]))
        torch.testing.assert_close(torch.cat((found.visual_states[0], found.visual_states[1, :1])), expected_rows)
        nothing = torch.zeros(hidden)
        summaries = torch.stack((nothing, first[1], second[1], second[1], nothing, nothing, other[1]))
        torch.testing.assert_close(torch.cat((found.visual_summary[0], found.visual_summary[1, :3])), summaries)

        state, summary = torch.randn(1, 1, hidden), torch.randn(1, 1, hidden)
        by_hand = draft.img_fc.weight @ torch.cat((state, summary), dim=-1)[0, 0]
        torch.testing.assert_close(draft.read_states(state, summary, 0)[0, 0], by_hand)


def test_before_training_they_read_states_as_sparrow_does(target) -> None:
    states = torch.randn(1, 3, target.config.get_text_config().hidden_size)
    for draft_class in (ViSpecDraftModel, HiViSDraftModel):
        draft = draft_class.from_target(target)
        assert torch.equal(draft.read_states(states, torch.randn(1, 1, states.shape[-1]), step=2), states)


def test_hivis_has_a_residual_for_each_step(target) -> None:
    draft = make_draft("hivis", target, num_mtp_steps=3)
    states = torch.zeros(1, 1, draft.config.hidden_size)
    for step, row in enumerate([0, 1, 2, 2]):
        assert torch.equal(draft.read_states(states, None, step)[0, 0], draft.step_residuals.weight[row])


@pytest.mark.parametrize("name", TRAINED)
def test_saved_and_copied_drafts_are_the_same(tmp_path, name, target) -> None:
    draft = make_draft(name, target)
    draft.save_pretrained(tmp_path)
    loaded = BASELINES[name].draft_class.from_pretrained(tmp_path)
    for twin in (loaded, AutoModel.from_pretrained(tmp_path), copy.deepcopy(draft)):
        assert type(twin) is type(draft) and twin.config.to_diff_dict() == draft.config.to_diff_dict()
        assert twin.state_dict().keys() == draft.state_dict().keys()
        for key, tensor in draft.state_dict().items():
            assert torch.equal(twin.state_dict()[key], tensor), key
    if name != "msd":
        with pytest.raises(DraftConfigError, match=f"found '{name}_draft'"):
            SparrowDraftModel.from_pretrained(tmp_path)
    # The card says how to load it.
    loading = (tmp_path / "README.md").read_text().split("```python\n")[1].split("target =")[0]
    names: dict[str, Any] = {}
    exec(loading, names)
    assert names[type(draft).__name__] is type(draft)
    assert f"draft = {type(draft).__name__}.from_pretrained(" in (tmp_path / "README.md").read_text()

"""The draft as a model: borrowed parts stay borrowed, checkpoints hold the draft only, misfits are refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import BindingError, DraftConfigError, DraftLoadError, UnsupportedTargetError

from families import FAMILY_BY_NAME
from meta_targets import META_TARGETS, MetaTarget


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return FAMILY_BY_NAME["qwen2_5_vl"].build_target()


def run(draft: SparrowDraftModel, target: PreTrainedModel) -> torch.Tensor:
    draft.bind(target)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, draft.config.hidden_size, generator=generator)
    embeds = draft.embed_next(torch.arange(5)[None], hidden, step=1)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    return draft.compute_logits(draft(embeds, torch.arange(5)[None], mask).last_hidden_state)


def test_checkpoint_holds_the_draft_only_and_loads_bit_equal(target: PreTrainedModel, tmp_path) -> None:
    draft = SparrowDraftModel.from_target(target, feature_layers=[1, -1])
    draft.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {name for name, _ in draft.named_parameters()}
    assert not any("embed" in name or "head" in name for name in stored)
    expected = run(draft, target)
    for loaded in (SparrowDraftModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is SparrowDraftModel
        assert torch.equal(run(loaded, target), expected)


@pytest.mark.parametrize("feature_layers", [[1, -1], [-1, 1]])
def test_several_feature_layers_start_as_the_last_one(target: PreTrainedModel, feature_layers: list[int]) -> None:
    draft = SparrowDraftModel.from_target(target, feature_layers=feature_layers)
    features = torch.randn(3, 2, draft.config.hidden_size)
    last = features[:, feature_layers.index(-1)]
    assert torch.equal(draft.feature_fc(features.flatten(1)), last)
    # Nothing of the others' size, which may be that of padding, changes that.
    features[:, 1 - feature_layers.index(-1)] *= torch.tensor([[0.0], [1.0], [1e4]])
    ids, single = torch.arange(3)[None], SparrowDraftModel.from_target(target, feature_layers=[-1])
    single.fc.load_state_dict(draft.fc.state_dict())
    assert torch.equal(draft.embed_next(ids, features.flatten(1)[None]), single.embed_next(ids, last[None]))


def test_the_states_of_several_layers_are_as_long_as_the_latest(target: PreTrainedModel) -> None:
    layers = [2, 1, -1]
    draft = SparrowDraftModel.from_target(target, feature_layers=layers)
    assert draft.config.feature_norm
    width = draft.config.hidden_size
    states = torch.randn(4, 3, width) * torch.tensor([0.1, 30.0, 3.0])[:, None]
    states[0, 1] = 0
    seen: list[torch.Tensor] = []
    draft.feature_fc.register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(-1, (3, width))))
    draft.fuse(states.flatten(1))
    latest = states[:, 2].norm(dim=-1, keepdim=True)
    assert torch.equal(seen[0][:, 2], states[:, 2]) and seen[0][0, 1].eq(0).all()
    for layer in (0, 1):
        expected = states[:, layer] / states[:, layer].norm(dim=-1, keepdim=True).clamp(min=1e-6) * latest
        torch.testing.assert_close(seen[0][:, layer], expected)


def test_drafts_of_earlier_versions_take_the_states_of_several_layers_as_they_are(
    target: PreTrainedModel, tmp_path: Path
) -> None:
    SparrowDraftModel.from_target(target, feature_layers=[1, -1], feature_norm=False).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["feature_norm"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    draft = SparrowDraftModel.from_pretrained(tmp_path)
    seen: list[torch.Tensor] = []
    draft.feature_fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = torch.randn(2, 2 * draft.config.hidden_size)
    draft.fuse(states)
    assert torch.equal(seen[0], states)


def test_the_target_is_neither_registered_nor_moved(target: PreTrainedModel) -> None:
    draft = SparrowDraftModel.from_target(target)
    names = {name for name, _ in draft.named_modules()}
    assert names.isdisjoint({"_target", "embedding", "head"})
    draft.to(torch.bfloat16)
    assert target.dtype == torch.float32
    assert (
        draft.compute_logits(torch.randn(1, 2, draft.config.hidden_size, dtype=torch.bfloat16)).dtype == torch.float32
    )


def test_a_copy_is_unbound_and_equal(target: PreTrainedModel) -> None:
    draft = SparrowDraftModel.from_target(target)
    twin = copy.deepcopy(draft)
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), twin.parameters(), strict=True))
    with pytest.raises(BindingError, match="not bound"):
        twin.embed(torch.tensor([[1]]))
    assert torch.equal(run(twin, target), run(draft, target))


def test_layer_copied_from_the_target(target: PreTrainedModel) -> None:
    draft = SparrowDraftModel.from_target(target, copy_last_layer=True)
    for name, value in target.get_decoder().layers[-1].named_parameters():
        assert torch.equal(draft.layers[0].get_parameter(name), value)


def test_placeholders_are_never_drafted(target: PreTrainedModel) -> None:
    draft = SparrowDraftModel.from_target(target)
    logits = draft.compute_logits(torch.randn(3, draft.config.hidden_size))
    assert (logits[:, draft.config.visual_token_ids] == float("-inf")).all()
    assert logits.isfinite().sum() == 3 * (draft.config.vocab_size - len(draft.config.visual_token_ids))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 64),
        ("vocab_size", 200),
        ("target_num_hidden_layers", 7),
        ("visual_token_ids", [1, 2]),
    ],
)
def test_another_targets_draft_is_refused(target: PreTrainedModel, field: str, value: object) -> None:
    config = SparrowDraftModel.from_target(target).config
    setattr(config, field, value)
    with pytest.raises(BindingError, match=field.removeprefix("target_")):
        SparrowDraftModel(config).bind(target)


def test_another_name_of_the_same_shape_only_warns(target: PreTrainedModel) -> None:
    draft = SparrowDraftModel.from_target(target)
    draft.config.target_name_or_path = "somebody/else"
    target.config._name_or_path = "my/fine-tune"
    try:
        with pytest.warns(UserWarning, match="my/fine-tune"):
            copy.deepcopy(draft).bind(target)
    finally:
        target.config._name_or_path = ""


def test_a_model_without_a_decoder_is_refused() -> None:
    from transformers import CLIPConfig, CLIPModel

    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPModel(CLIPConfig(text_config=tiny | {"vocab_size": 10}, vision_config=tiny | {"image_size": 32}))
    with pytest.raises(UnsupportedTargetError):
        SparrowDraftModel.from_target(model)


def test_layers_that_depend_on_the_other_rows_are_refused() -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    target.config.get_text_config().layer_types[0] = "indexed_attention"
    with pytest.raises(UnsupportedTargetError, match="layers of the kind indexed_attention"):
        SparrowDraftModel.from_target(target)


def test_an_encoder_decoder_is_refused() -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    target.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedTargetError, match="encoder-decoder"):
        SparrowDraftModel.from_target(target)


def test_layers_of_another_kind_are_not_copied() -> None:
    target = FAMILY_BY_NAME["glm4v"].build_target()
    with pytest.raises(UnsupportedTargetError, match="Glm4vTextDecoderLayer is no LlamaDecoderLayer"):
        SparrowDraftModel.from_target(target, copy_last_layer=True)


def test_more_layers_than_the_target_has_are_not_copied() -> None:
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    most = target.config.get_text_config().num_hidden_layers
    with pytest.raises(DraftConfigError, match=f"has {most + 1} layers to copy into, but the target has {most}"):
        SparrowDraftModel.from_target(target, copy_last_layer=True, num_hidden_layers=most + 1)


@pytest.mark.parametrize("meta_target", META_TARGETS, ids=lambda meta_target: meta_target.name)
def test_binds_to_the_published_7b_shapes(meta_target: MetaTarget) -> None:
    target = meta_target.build()
    draft = SparrowDraftModel.from_target(target)
    assert {parameter.device.type for parameter in draft.parameters()} == {"meta"}
    assert draft.config.hidden_size == 3584
    assert draft.config.visual_bridge_layer == 14
    assert draft.bind(target) is draft.target


class TestDamagedCheckpoints:
    @pytest.fixture
    def folder(self, target: PreTrainedModel, tmp_path):
        SparrowDraftModel.from_target(target).save_pretrained(tmp_path / "draft")
        return tmp_path / "draft"

    def test_missing_tensor(self, folder) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["fc.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DraftLoadError, match=r"fc\.weight"):
            SparrowDraftModel.from_pretrained(folder)

    def test_unexpected_tensor(self, folder) -> None:
        tensors = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.zeros(2, 2)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DraftLoadError, match=r"lm_head\.weight"):
            SparrowDraftModel.from_pretrained(folder)

    @pytest.mark.parametrize("keep", [0, 6, 0.5, 0.99])
    def test_truncated_file(self, folder, keep: float) -> None:
        data = (folder / "model.safetensors").read_bytes()
        length = int(keep * len(data)) if keep < 1 else int(keep)
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(DraftLoadError):
            SparrowDraftModel.from_pretrained(folder)

    def test_pickled_weights_are_never_read(self, folder) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            SparrowDraftModel.from_pretrained(folder)

    def test_configuration_of_another_shape(self, folder, tmp_path) -> None:
        shutil.copytree(folder, tmp_path / "other")
        text = (folder / "config.json").read_text().replace('"intermediate_size": ', '"intermediate_size": 1')
        (tmp_path / "other" / "config.json").write_text(text)
        with pytest.raises((DraftLoadError, RuntimeError)):
            SparrowDraftModel.from_pretrained(tmp_path / "other")


def test_placeholders_are_never_drafted_and_those_behind_the_head_are_ignored(target: PreTrainedModel) -> None:
    draft = SparrowDraftModel.from_target(target)
    hidden = torch.randn(2, 3, draft.config.hidden_size, requires_grad=True)
    logits = target.get_output_embeddings()(hidden)
    # The ids of a configuration may change between two calls.
    for token_ids in ([3, 7], [5], [], [4, 10**6]):
        draft.config.visual_token_ids = token_ids
        with torch.inference_mode():
            first = draft.compute_logits(hidden)
        found = draft.compute_logits(hidden)
        for token in range(logits.shape[-1]):
            expected = torch.full_like(logits[..., token], float("-inf")) if token in token_ids else logits[..., token]
            assert torch.equal(found[..., token], expected) and torch.equal(first[..., token], expected)
        (gradient,) = torch.autograd.grad(found[found.isfinite()].sum(), hidden)
        kept = [token for token in range(logits.shape[-1]) if token not in token_ids]
        weights = target.get_output_embeddings().weight[kept].sum(dim=0)
        assert torch.allclose(gradient, weights.expand_as(gradient), atol=1e-4)

"""A whole analysis of an untrained target of two layers: records, resume, figures, and the command."""

import json
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from subjects import QUESTION
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from sparrow_hf import SparrowDraftModel, extras
from sparrow_hf.analysis import Conversation, analyze, attention, draw_figures, run
from sparrow_hf.analysis.answered import ProcessedPrompt, answer, find_text, process_conversation
from sparrow_hf.analysis.run import measure
from sparrow_hf.cli import app
from sparrow_hf.data import fingerprint, prepare_inputs
from sparrow_hf.errors import AnalysisError, MissingDependencyError
from sparrow_hf.targets import TargetView
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip
from sparrow_hf.testbed.nano import build_processor, build_target

from families import FAMILY_BY_NAME

TEXT = {"type": "text", "text": "describe this video ."}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, SparrowDraftModel]:
    processor = build_processor()
    target = build_target(processor.tokenizer, num_hidden_layers=2)
    return target, processor, SparrowDraftModel.from_target(target, num_glimpse_tokens=4)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    """Three clips of two lengths."""
    folder = tmp_path_factory.mktemp("clips")
    clips = [make_clip(folder / f"{i}.mp4", EVALUATION_SEEDS[i], length) for i, length in enumerate((24, 72, 24))]
    return [Conversation(clip.messages, clip.caption) for clip in clips]


def analyzed(models, conversations, folder, **options):
    target, processor, draft = models
    options = {"draft": draft, "max_new_tokens": 6, "show_progress": False} | options
    return analyze(target, processor, conversations, folder, **options)


@pytest.fixture(scope="module")
def whole(models, conversations, tmp_path_factory):
    """An uninterrupted analysis and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return analyzed(models, conversations, folder, score=lambda text, reference: float(len(reference) > 0)), folder


def test_what_is_in_it(whole):
    summary, _ = whole
    assert [group["prompts"] for group in summary["lengths"]] == [2, 1]
    everything = summary["all"]
    assert everything["prompts"] == 3
    assert everything["agreement"].keys() == {"0", "1", "2"}
    assert everything["agreement"]["2"] == 1.0
    assert everything["score"] == {"0": 1.0, "1": 1.0, "2": 1.0}
    assert everything["retention"].keys() == {"last_instruction", "all_text", "strided"}
    assert list(everything["retention"]["strided"]) == ["1", "0.25", "0.1", "0.05", "0.01", "0"]
    assert torch.tensor(everything["attention"]["answer"]).shape == (2, 3, 3)
    assert len(everything["similarity"]["text"]) == 2
    assert summary["recommendation"].keys() == {"needed_layers", "visual_bridge_layer", "feature_layers"}


def test_an_interrupted_analysis_goes_on_to_the_same_figures(whole, models, conversations, tmp_path, monkeypatch):
    summary, _ = whole
    measured, right = [], run.measure

    def interrupt_at_the_third(*args, **kwargs):
        measured.append(args)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return right(*args, **kwargs)

    monkeypatch.setattr(run, "measure", interrupt_at_the_third)
    score = {"score": lambda text, reference: float(len(reference) > 0)}
    with pytest.raises(KeyboardInterrupt):
        analyzed(models, conversations, tmp_path, **score)
    assert analyzed(models, conversations, tmp_path, **score) == summary
    assert len(measured) == 4


def test_records_of_other_settings_or_prompts_are_refused(whole, models, conversations):
    _, folder = whole
    options = {"score": lambda text, reference: 1.0}
    with pytest.raises(AnalysisError, match="max_new_tokens: 6, now 7"):
        analyzed(models, conversations, folder, max_new_tokens=7, **options)
    with pytest.raises(AnalysisError, match="conversation: "):
        analyzed(models, conversations[::-1], folder, **options)
    other = SparrowDraftModel.from_target(models[0], num_glimpse_tokens=4)
    with pytest.raises(AnalysisError, match="draft: "):
        analyzed(models, conversations, folder, draft=other, **options)


def test_records_of_other_weights_trees_or_dtypes_are_refused(whole, models, conversations, monkeypatch):
    """The name of the target stays what it was: a folder may hold other weights by now."""
    _, folder = whole
    target, processor, draft = models
    options = {"score": lambda text, reference: 1.0}
    with monkeypatch.context() as patched, pytest.raises(AnalysisError, match=r"\(target_sha256: '\w+', now '\w+'\)"):
        weight = target.get_output_embeddings().weight
        patched.setattr(weight, "data", weight.data + 1)
        analyzed(models, conversations, folder, **options)
    with monkeypatch.context() as patched, pytest.raises(AnalysisError, match=r"\(tree: \[.*\], now \[30, 4, 8\]\)"):
        for name, value in (("num_tree_nodes", 30), ("num_draft_levels", 4), ("beam_width", 8)):
            patched.setattr(draft.config, name, value)
        analyzed(models, conversations, folder, **options)
    with monkeypatch.context() as patched, pytest.raises(AnalysisError, match=r"\(processor_sha256: '\w+', now"):
        patched.setattr(processor.video_processor, "do_normalize", False)
        analyzed(models, conversations, folder, **options)
    halved = deepcopy(target).to(torch.bfloat16), processor, None
    with pytest.raises(AnalysisError, match=r"dtype: 'torch.float32', now 'torch.bfloat16'"):
        analyzed(halved, conversations, folder, **options)


def test_what_cannot_be_analysed_is_said(models, conversations, tmp_path):
    with pytest.raises(AnalysisError, match="no prompts"):
        analyzed(models, [], tmp_path)
    with pytest.raises(AnalysisError, match="no 'reference'"):
        analyzed(models, [Conversation(conversations[0].messages)], tmp_path, score=lambda text, reference: 1.0)
    with pytest.raises(AnalysisError, match=r"0 … 2 \(the target's depth\), found \[1, 2, 5\]"):
        analyzed(models, conversations, tmp_path, layers=[1, 5])
    text_only = Conversation([{"role": "user", "content": "describe this video ."}])
    with pytest.raises(AnalysisError, match="prompt 0: the prompt has no visual tokens"):
        analyzed(models, [text_only], tmp_path)
    missing = Conversation([{"role": "user", "content": [{"type": "video", "video": "no.mp4"}, TEXT]}])
    with pytest.raises(AnalysisError, match="prompt 0: There is no video file at no.mp4"):
        analyzed(models, [missing], tmp_path)


def test_a_conversation_may_set_the_sampling_of_its_video(whole, models, conversations, tmp_path):
    _, folder = whole
    before = json.loads((folder / "prompts" / "00000.json").read_text())["made_from"]["conversation"]
    assert run.digest_of(conversations[0]) == before == fingerprint(list(conversations[0][:2]))
    own = conversations[0]._replace(max_frames=4)
    assert run.digest_of(own) != before
    processor = models[1]
    asked = process_conversation(processor, own, max_frames=8).inputs
    expected = prepare_inputs(processor, own.messages, max_frames=4)
    assert all(torch.equal(asked[name], value) for name, value in expected.items())


def test_the_target_keeps_no_hook(whole, models):
    assert not any(module._forward_pre_hooks for module in models[0].modules())


def test_figures(whole, tmp_path):
    summary, _ = whole
    paths = draw_figures(summary, tmp_path)
    assert [path.stem for path in paths] == ["attention", "heads", "removal", "similarity", "retention"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_matplotlib_figures_name_the_install_line(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda package: None if package == "matplotlib" else find_spec(package))
    with pytest.raises(MissingDependencyError, match=r"\.\[plot\]"):
        draw_figures(whole[0], tmp_path)


def test_the_command(models, conversations, tmp_path, monkeypatch):
    target, processor, draft = models
    target.save_pretrained(tmp_path / "target")
    processor.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    rows = [{"messages": conversation.messages, "reference": conversation.reference} for conversation in conversations]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["analyze", "--target", tmp_path / "target", "--draft", tmp_path / "draft", "--limit", 2]
    arguments += ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out", "--max-new-tokens", 5]

    def invoke():
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    monkeypatch.setattr(extras, "find_spec", lambda package: None if package == "matplotlib" else find_spec(package))
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "2 prompts: one answer and 4 forwards each" in result.output
    assert "24 visual tokens" in result.output and "72 visual tokens" in result.output
    assert "visual_bridge_layer=1" in result.output
    assert "no figures: Drawing figures needs matplotlib" in result.output
    report = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert report["all"]["prompts"] == 2
    assert report["provenance"]["prompts"] == str(tmp_path / "prompts.jsonl")

    arguments[-1] = 6
    refused = invoke()
    assert refused.exit_code == 2 and "max_new_tokens: 5, now 6" in refused.output


class SizeLimit(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return output


def largest_in_the_decoder(target, inputs):
    """Elements of the largest tensor that an analysis makes in the decoder and its hooks; and the rows there are."""
    rows = find_text(FAMILY.tokenizer, inputs["input_ids"][0], QUESTION)
    answered, decoder = answer(target, ProcessedPrompt(inputs, rows), 2), target.get_decoder()
    limit = SizeLimit()
    handles = [
        decoder.register_forward_pre_hook(lambda *args: limit.__enter__() and None),
        decoder.register_forward_hook(lambda *args: limit.__exit__(None, None, None)),
    ]
    measure(TargetView(target), answered, [0, 2, 4], 2)
    for handle in handles:
        handle.remove()
    return limit.largest, len(answered.is_visual)


FAMILY = FAMILY_BY_NAME["qwen2_5_vl"]


def test_nothing_grows_with_the_square_of_the_length(monkeypatch):
    """No operation, the target's own included, returns a tensor of rows × rows; eager attention does, and is seen."""
    monkeypatch.setattr(attention, "MAX_SCORES", 2**13)
    target = FAMILY.build_target()
    inputs = FAMILY.build_inputs(target, num_frames=160, question=QUESTION)
    largest, rows = largest_in_the_decoder(target, inputs)
    assert largest < rows**2 / 2
    largest, rows = largest_in_the_decoder(FAMILY.build_target("eager"), inputs)
    assert largest >= rows**2

"""Targets are loaded in one place, and say in one sentence why they cannot be."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from sparrow_hf import extras, loading
from sparrow_hf.errors import BenchmarkError, MissingDependencyError, TargetLoadError
from sparrow_hf.loading import default_device, load_target, told_if_not_loaded, usable_dtype
from sparrow_hf.testbed import shipped

TARGET = str(shipped() / "target")


def test_a_target_and_its_processor(tmp_path: Path) -> None:
    target, processor = load_target(TARGET, dtype="bfloat16", device="cpu")
    assert (target.dtype, target.device.type, target.training) == (torch.bfloat16, "cpu", False)
    assert processor.tokenizer
    with pytest.raises(TargetLoadError, match="^target 'nowhere' cannot be loaded: "):
        load_target("nowhere")
    with pytest.raises(TargetLoadError, match=f"^processor {str(tmp_path)!r} cannot be loaded: "):
        load_target(TARGET, str(tmp_path), device="cpu")
    with pytest.raises(TargetLoadError, match="cannot be loaded: "):
        load_target(TARGET, device="cuda:99")


def test_a_revision_is_that_of_the_targets_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_without_processor", lambda *arguments: None)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda source, revision: (source, revision))
    assert load_target("here", revision="v2")[1] == ("here", "v2")
    assert load_target("here", "elsewhere", revision="v2")[1] == ("elsewhere", None)


def test_a_target_goes_to_the_accelerator_if_there_is_one() -> None:
    assert load_target(TARGET)[0].device.type == default_device().type
    assert (default_device().type == "cpu") is not torch.accelerator.is_available()


def test_a_spread_target_needs_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(MissingDependencyError, match="all GPUs needs accelerate"):
        load_target(TARGET, device="auto")


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError("first line\nsecond line"), "first line"),
        (KeyError("name"), "'name'"),
        (AssertionError(), "AssertionError"),
        (ImportError("FlashAttention2 has been toggled on, but it is not installed"), "FlashAttention2 has been .*"),
    ],
)
def test_the_sentence_is_the_first_line_of_the_error(error: Exception, reason: str) -> None:
    with pytest.raises(BenchmarkError, match=f"^draft 'mine' cannot be loaded: {reason}$") as raised:
        with told_if_not_loaded("draft", "mine", BenchmarkError):
            raise error
    assert raised.value.__cause__ is error
    with pytest.raises(MissingDependencyError), told_if_not_loaded("draft", "mine"):
        raise MissingDependencyError("install it")
    with pytest.raises(TypeError), told_if_not_loaded("draft", "mine"):
        raise TypeError("a mistake of ours")


def test_dtypes_that_a_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert usable_dtype(torch.float16, cpu) == torch.float32
    assert usable_dtype(torch.bfloat16, cpu) == torch.bfloat16
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, has=has_bfloat16: has)
        assert usable_dtype(torch.bfloat16, gpu) == expected
        assert usable_dtype(torch.float32, gpu) == torch.float32

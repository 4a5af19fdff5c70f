"""What cannot be served is refused when it is loaded, in one sentence that says what to do."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="vLLM is not installed here: `make test-vllm` runs these in an environment of their own"
)
from sparrow_vllm import config as plugin_config
from sparrow_vllm import register, seams
from sparrow_vllm.config import DraftError, SparrowVllmConfig
from transformers import AutoConfig

TARGET = {
    "name": "some/target",
    "model_type": "qwen2_5_vl",
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "vocab_size": 100,
    "visual_token_ids": [5, 6],
    "rms_norm_eps": 1e-6,
}


def engine_with(method: str = "eagle3", **changes: Any) -> Any:
    """As much of a `VllmConfig` as is looked at."""
    fields = TARGET | changes
    text = SimpleNamespace(**{name: fields[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size")})
    image, video = fields["visual_token_ids"]
    target = SimpleNamespace(
        model_type=fields["model_type"], image_token_id=image, video_token_id=video, get_text_config=lambda: text
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=target), speculative_config=SimpleNamespace(method=method)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen3_vl"},
        {"num_hidden_layers": 5},
        {"hidden_size": 9},
        {"vocab_size": 99},
        {"visual_token_ids": [5, 7]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_target(changes: dict[str, Any]) -> None:
    from sparrow_vllm.model import check_fits

    fields = {"method": "eagle3", "target": TARGET, "position_rule": None}
    check_fits(fields, engine_with())
    with pytest.raises(DraftError, match=f"another target .*{next(iter(changes))}.*some/target"):
        check_fits(fields, engine_with(**changes))


@pytest.mark.parametrize("method", ("eagle", "draft_model"))
def test_another_method(method: str) -> None:
    from sparrow_vllm.model import check_fits

    with pytest.raises(DraftError, match='write "method": "eagle3"'):
        check_fits({"method": "eagle3", "target": TARGET, "position_rule": None}, engine_with(method))


@pytest.mark.parametrize("found", ("0.31.4", "0.33.0", "1.32.0", "0.320.0", "dev"))
def test_another_vllm(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", found)
    with pytest.raises(DraftError, match=rf"supports vLLM 0\.32, found {found}: install"):
        SparrowVllmConfig(sparrow={"format": plugin_config.FORMAT})


def test_another_format() -> None:
    with pytest.raises(
        DraftError, match="have the export format 7, and this sparrow-vllm reads 3: run `sparrow export-vllm"
    ):
        SparrowVllmConfig(sparrow={"format": 7})


def test_a_draft_that_was_not_exported(tmp_path: Any) -> None:
    register()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sparrow_draft", "hidden_size": 8}))
    with pytest.raises(DraftError, match="the export format none, .* run `sparrow export-vllm DRAFT OUTPUT`"):
        AutoConfig.from_pretrained(tmp_path)


def layer_on(backend: str) -> Any:
    attention = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: backend))
    return SimpleNamespace(self_attn=SimpleNamespace(attn=attention))


def distributed(**changes: Any) -> Any:
    parallel = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{name: changes.get(name, size) for name, size in parallel.items()}),
        kv_transfer_config=changes.get("kv_transfer_config"),
    )


def test_another_backend_and_metadata_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in seams.BACKENDS:
        seams.check(distributed(), layer_on(backend))
    with pytest.raises(DraftError, match='FLASHINFER .*"attention_backend": "FLASH_ATTN"'):
        seams.check(distributed(), layer_on("FLASHINFER"))
    monkeypatch.setattr(seams, "_FIELDS", {"seq_lens", "requests"})
    with pytest.raises(DraftError, match="CPUAttentionMetadata of this vLLM has no requests"):
        seams.check(distributed(), layer_on("CPU_ATTN"))


@pytest.mark.parametrize(
    "changes", [{"pipeline_parallel_size": 2}, {"decode_context_parallel_size": 2}, {"kv_transfer_config": object()}]
)
def test_another_distribution(changes: dict[str, Any]) -> None:
    with pytest.raises(DraftError, match="parallelism|KV transfer"):
        seams.check(distributed(**changes), layer_on("CPU_ATTN"))

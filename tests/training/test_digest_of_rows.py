"""What tells the rows of a training apart when it is resumed."""

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.checksums import DIGESTS_FILE, digest_of_files
from sparrow_hf.training import SparrowDataCollator
from sparrow_hf.training.checkpoints import digest_of_rows
from sparrow_hf.training.recording import record


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, samples: list[Any]) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    record(SparrowDraftModel.from_target(target), samples[:1], folder, SparrowDataCollator())
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "disk", "recording"])
def test_the_digest_of_rows_is_of_the_files_that_are_read(recording: Path, tmp_path: Path, kind: str) -> None:
    table = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "what ?"}]}])
    if kind == "recording":
        # As version 0.2 wrote them.
        shutil.copytree(recording, tmp_path, dirs_exist_ok=True)
        (tmp_path / DIGESTS_FILE).unlink()
    elif kind == "disk":
        table.save_to_disk(str(tmp_path))
    else:
        getattr(table, "to_parquet" if kind == "parquet" else "to_json")(str(tmp_path / f"rows.{kind}"))
    ending = {"disk": ".arrow", "recording": ".safetensors"}.get(kind, f".{kind}")
    files = [path for path in tmp_path.rglob("*") if path.suffix == ending]
    before = digest_of_rows(tmp_path)
    # Earlier versions had the same.
    assert before == digest_of_files(tmp_path, files)
    (tmp_path / "draft" / "checkpoint-1").mkdir(parents=True)
    for name in ("model.safetensors", "rows.jsonl", "rows.parquet", "trainer_state.json"):
        (tmp_path / "draft" / "checkpoint-1" / name).write_text("a training's own")
    if kind == "disk":
        datasets.load_from_disk(str(tmp_path)).map(lambda row: {"n": 1})
        assert list(tmp_path.glob("cache-*.arrow"))
    assert digest_of_rows(tmp_path) == before
    files[0].write_bytes(files[0].read_bytes()[::-1])
    assert digest_of_rows(tmp_path) != before

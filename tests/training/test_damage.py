"""Mutated files of every kind: a typed error, or exactly what was written. None is silent, none hangs."""

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sparrow_hf import SparrowDraftModel
from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.checksums import file_digest
from sparrow_hf.data.answers import digests_of, read_answers, read_skipped
from sparrow_hf.errors import SparrowError
from sparrow_hf.evaluation import RunFile
from sparrow_hf.evaluation.run_file import read_lines
from sparrow_hf.training import SparrowDataCollator
from sparrow_hf.training.checkpoints import check_checkpoint, seal_checkpoint
from sparrow_hf.training.recording import RecordedDataset, record
from sparrow_hf.training.vocabulary import load_vocabulary, save_vocabulary

VALUES = (None, True, -1, 0, 1, 10**9, 10**400, float("nan"), 0.5, "5", "x", [], [1], {}, [[]])


def mutate(path: Path, other: Path | None, chance: random.Random) -> None:
    """Damages a file in one of the ways that files are damaged."""
    data = path.read_bytes()
    at = chance.randrange(len(data))
    kind = chance.choice(("flip", "flip", "flip", "byte", "cut", "zeros", "insert", "empty", "missing", "swap"))
    if kind == "flip":
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
    elif kind == "byte":
        path.write_bytes(data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :])
    elif kind == "cut":
        os.truncate(path, at)
    elif kind == "zeros":
        path.write_bytes(data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :])
    elif kind == "insert":
        path.write_bytes(data[:at] + bytes([chance.randrange(256)]) + data[at:])
    elif kind == "empty":
        os.truncate(path, 0)
    elif kind == "missing":
        path.unlink()
    elif other is not None:
        shutil.copy(other, path)


class Kind:
    """A folder of files, how it is read, and whether what was read may be a beginning of what was written.

    Args:
        read: Folder → what was read, as something that can be compared.
        is_log: A process that was killed leaves a beginning of such a file, which is gone on with.
    """

    def __init__(self, folder: Path, twin: Path, read: Callable[[Path], Any], is_log: bool = False):
        self.folder, self.twin, self.read, self.is_log = folder, twin, read, is_log
        self.written = read(folder)

    def is_same(self, found: Any) -> bool:
        return found == (self.written[: len(found)] if self.is_log else self.written)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, samples: list[Any]) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("kinds")
    draft = SparrowDraftModel.from_target(target)
    counts = torch.arange(40)
    for twin in (0, 1):
        where = {
            name: folder / str(twin) / name for name in ("recording", "answers", "runs", "checkpoint", "ids", "draft")
        }
        record(draft, samples[twin : twin + 2], where["recording"], SparrowDataCollator())
        answers, runs = where["answers"], where["runs"] / "runs.jsonl"
        answers.mkdir()
        for shard in range(2):
            rows = [{"messages": [], "answer_ids": [shard, index, twin]} for index in range(3)]
            (answers / f"answers-{shard:05d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (answers / "answers-00000.skipped.json").write_text(json.dumps([[twin, "no answer"]]))
        digests_of(answers).write(answers.iterdir())
        file = RunFile(runs, {"seed": 0})
        for prompt in range(3):
            file.append({"prompt": str(prompt), "seconds": [0.25, twin + 0.5], "provenance": {"seed": 0}})
        checkpoint = where["checkpoint"]
        SparrowDraftModel(draft.config).save_pretrained(checkpoint)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": torch.full((9,), twin)}, checkpoint / name)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": twin}))
        seal_checkpoint(checkpoint, {"seed": twin})
        save_vocabulary(where["ids"] / "ids.safetensors", counts[5 + twin : 20], counts, {"target": str(twin)})
        SparrowDraftModel(draft.config).save_pretrained(where["draft"])

    def read_recording(path: Path) -> Any:
        rows = RecordedDataset(path, draft)
        return [
            tensor_digest({k: v for k, v in rows[i].items() if isinstance(v, torch.Tensor)}) for i in range(len(rows))
        ]

    def read_checkpoint(path: Path) -> Any:
        check_checkpoint(path, ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
        return [file_digest(path / name) for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")]

    def read_draft(path: Path) -> Any:
        return tensor_digest(SparrowDraftModel.from_pretrained(path).state_dict())

    readers: dict[str, Callable[[Path], Any]] = {
        "recording": read_recording,
        "answers": lambda path: (list(read_answers(path)), read_skipped(path)),
        "runs": lambda path: read_lines(path / "runs.jsonl") if (path / "runs.jsonl").exists() else [],
        "checkpoint": read_checkpoint,
        "ids": lambda path: load_vocabulary(path / "ids.safetensors").tolist(),
        "draft": read_draft,
    }
    return {
        name: Kind(folder / "0" / name, folder / "1" / name, read, is_log=name == "runs")
        for name, read in readers.items()
    }


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cases", [60, pytest.param(2000, marks=pytest.mark.full)])
def test_a_mutated_file_gives_a_typed_error_or_what_was_written(
    kinds: dict[str, Kind], tmp_path: Path, cases: int
) -> None:
    chance = random.Random(cases)
    refused = 0
    for case in range(cases):
        name = list(kinds)[case % len(kinds)]
        kind, folder = kinds[name], tmp_path / str(case)
        shutil.copytree(kind.folder, folder)
        path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        twin = kind.twin / path.relative_to(folder)
        if name == "draft" and path.name == "config.json" and case % 2:
            # A configuration may be edited by hand: a value of any type in any field.
            fields = json.loads(path.read_text())
            fields[chance.choice(sorted(fields))] = chance.choice(VALUES)
            path.write_text(json.dumps(fields))
        else:
            # A single file is whatever file it is replaced by.
            mutate(path, None if name in ("runs", "ids") else twin, chance)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = kind.read(folder)
        except SparrowError as error:
            assert "\n" not in str(error), error
            refused += 1
        else:
            assert kind.is_same(found), (case, path)
        shutil.rmtree(folder)
    assert refused > cases / 2

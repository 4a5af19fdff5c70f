"""A folder that a draft is saved to holds the old draft or the new one, whoever reads, writes or dies."""

import copy
import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

from sparrow_hf import SparrowDraftModel, artifacts
from sparrow_hf.artifacts import atomic_files, read_together, tensor_digest, write_json
from sparrow_hf.errors import DraftLoadError

from families import FAMILY_BY_NAME


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return FAMILY_BY_NAME["qwen2_5_vl"].build_target()


@pytest.fixture
def draft(target: PreTrainedModel) -> SparrowDraftModel:
    return SparrowDraftModel.from_target(target)


@pytest.fixture
def other(draft: SparrowDraftModel) -> SparrowDraftModel:
    other = SparrowDraftModel(copy.deepcopy(draft.config))
    with torch.no_grad():
        other.fc.weight.add_(1)
    other.provenance = {"data": "other"}
    return other


SHARDS = {"max_shard_size": "20KB"}


class TestAFullDisk:
    @pytest.mark.parametrize("options", [{}, SHARDS])
    @pytest.mark.parametrize("writer", ["weights", "config", "card"])
    def test_the_old_draft_stays(
        self,
        draft: SparrowDraftModel,
        other: SparrowDraftModel,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        options: dict[str, Any],
        writer: str,
    ) -> None:
        draft.save_pretrained(tmp_path, **options)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        calls = []

        def fill(path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        def save_file_once(tensors: Any, path: str, **kwargs: Any) -> None:
            calls.append(path)
            if len(calls) > (1 if options else 0):
                fill(Path(path))
            save_file(tensors, path, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            if writer == "weights":
                patch.setattr(transformers.modeling_utils, "safe_save_file", save_file_once)
            elif writer == "config":
                save = type(draft.config).save_pretrained
                patch.setattr(type(draft.config), "save_pretrained", lambda *args: fill(save(*args) or args[1] / "x"))
            else:
                patch.setattr("sparrow_hf.model_card.write_text", lambda path, text: fill(path))
            other.save_pretrained(tmp_path, **options)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert torch.equal(SparrowDraftModel.from_pretrained(tmp_path).fc.weight, draft.fc.weight)
        other.save_pretrained(tmp_path, **options)
        assert torch.equal(SparrowDraftModel.from_pretrained(tmp_path).fc.weight, other.fc.weight)


class TestSavingWhileLoading:
    @pytest.mark.parametrize("loader", [SparrowDraftModel, AutoModel])
    @pytest.mark.parametrize("options", [{}, SHARDS])
    def test_four_threads_save_and_a_reader_finds_old_or_new(
        self, draft: SparrowDraftModel, other: SparrowDraftModel, tmp_path: Path, loader: Any, options: dict[str, Any]
    ) -> None:
        """Two drafts in turn, so that a mixture of both can be recognised."""
        draft.save_pretrained(tmp_path, **options)
        known = {tensor_digest(model.state_dict()) for model in (draft, other)}
        stop, configs = threading.Event(), []

        def save(number: int) -> None:
            while not stop.is_set():
                (draft, other)[number % 2].save_pretrained(tmp_path, **options)
                number += 1

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(save, number) for number in range(4)]
            try:
                for _ in range(12):
                    configs.append(json.loads((tmp_path / "config.json").read_text())["tensors_sha256"])
                    loaded = loader.from_pretrained(tmp_path)
                    assert tensor_digest(loaded.state_dict()) in known
                    assert ("data" in loaded.provenance) == torch.equal(loaded.fc.weight, other.fc.weight)
            finally:
                stop.set()
            for run in running:
                run.result()
        assert set(configs) <= known and draft.config.tensors_sha256 is None
        assert not list(tmp_path.glob("*.partial"))
        loader.from_pretrained(tmp_path)

    def test_one_draft_saved_by_four_threads(self, draft: SparrowDraftModel, tmp_path: Path) -> None:
        folders = [tmp_path / str(number) for number in range(12)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(draft.save_pretrained, folders))
        digests = {json.loads((folder / "config.json").read_text())["tensors_sha256"] for folder in folders}
        assert digests == {tensor_digest(draft.state_dict())}

    def test_shards_take_the_place_of_one_file_and_the_other_way_round(
        self, draft: SparrowDraftModel, other: SparrowDraftModel, tmp_path: Path
    ) -> None:
        (tmp_path / "model-notes.safetensors").write_bytes(b"not ours")
        for model, options in ((draft, {}), (other, SHARDS), (draft, {"max_shard_size": "40KB"}), (other, {})):
            model.save_pretrained(tmp_path, **options)
            assert torch.equal(SparrowDraftModel.from_pretrained(tmp_path).fc.weight, model.fc.weight)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {
            "README.md", "PROVENANCE.json", "config.json", "model.safetensors", "model-notes.safetensors"
        }  # fmt: skip

    @pytest.mark.parametrize("options", [{}, SHARDS])
    def test_variants_lie_side_by_side(
        self, draft: SparrowDraftModel, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        for variant in (None, "copy", "copy"):
            draft.save_pretrained(tmp_path, variant=variant, **options)
        for variant in (None, "copy"):
            assert torch.equal(SparrowDraftModel.from_pretrained(tmp_path, variant=variant).fc.weight, draft.fc.weight)

    def test_a_process_that_is_not_the_main_one_leaves_what_is_there(
        self, draft: SparrowDraftModel, other: SparrowDraftModel, tmp_path: Path
    ) -> None:
        draft.save_pretrained(tmp_path)
        other.save_pretrained(tmp_path, is_main_process=False)
        assert torch.equal(SparrowDraftModel.from_pretrained(tmp_path).fc.weight, draft.fc.weight)


class TestReadingTogether:
    @pytest.fixture
    def no_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(artifacts, "fcntl", None)

    @pytest.mark.parametrize("loader", [SparrowDraftModel, AutoModel])
    def test_without_locks_a_replaced_draft_is_read_again(
        self,
        no_locks: None,
        draft: SparrowDraftModel,
        other: SparrowDraftModel,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        loader: Any,
    ) -> None:
        """Others are saved after it was loaded and before it is checked."""
        draft.save_pretrained(tmp_path)
        load, saves = PreTrainedModel.from_pretrained.__func__, iter([other, draft])

        def save_meanwhile(cls: Any, *args: Any, **kwargs: Any) -> Any:
            loaded = load(cls, *args, **kwargs)
            if model := next(saves, None):
                model.save_pretrained(tmp_path)
            return loaded

        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(save_meanwhile))
        loaded = loader.from_pretrained(tmp_path)
        assert next(saves, None) is None
        assert torch.equal(loaded.fc.weight, draft.fc.weight) and "data" not in loaded.provenance

    def test_a_configuration_that_was_read_before_is_read_again(
        self, draft: SparrowDraftModel, other: SparrowDraftModel, tmp_path: Path
    ) -> None:
        """As `AutoModel` reads it."""
        draft.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        other.config.num_glimpse_tokens = 7
        other.save_pretrained(tmp_path)
        loaded = SparrowDraftModel.from_pretrained(tmp_path, config=config)
        assert torch.equal(loaded.fc.weight, other.fc.weight) and loaded.config.num_glimpse_tokens == 7
        # A value that was set counts.
        assert AutoModel.from_pretrained(tmp_path, num_glimpse_tokens=3).config.num_glimpse_tokens == 3

    def test_what_is_damaged_is_read_once(self, tmp_path: Path) -> None:
        calls = []

        def read() -> None:
            calls.append(1)
            raise DraftLoadError("damaged")

        with pytest.raises(DraftLoadError):
            read_together(tmp_path, "config.json", read, DraftLoadError)
        assert len(calls) == 1

    def test_what_is_always_replaced_is_refused(self, no_locks: None, tmp_path: Path) -> None:
        saves: list[int] = []

        def save() -> None:
            saves.append(1)
            write_json(tmp_path / "config.json", saves)

        with pytest.raises(DraftLoadError, match="whenever it was read"):
            read_together(tmp_path, "config.json", save, DraftLoadError)
        assert len(saves) == artifacts.READ_ATTEMPTS

    def test_a_writer_waits_for_a_reader_in_another_process_but_not_for_ever(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").write_text("old")
        with reading_elsewhere(tmp_path) as stop:
            monkeypatch.setattr(artifacts, "LOCK_SECONDS", 0.2)
            with atomic_files(tmp_path, "a", "a".__eq__) as partial:
                (partial / "a").write_text("new")
            assert (tmp_path / "a").read_text() == "new"
            monkeypatch.setattr(artifacts, "LOCK_SECONDS", 30.0)
            threading.Timer(0.3, stop).start()
            with atomic_files(tmp_path, "a", "a".__eq__) as partial:
                (partial / "a").write_text("newer")
                threading.Timer(0.1, lambda: seen.append((tmp_path / "a").read_text())).start()
                seen: list[str] = []
            assert seen == ["new"] and (tmp_path / "a").read_text() == "newer"


READER = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH)
print("begun", flush=True)
sys.stdin.read()
"""


@contextmanager
def reading_elsewhere(folder: Path) -> Iterator[Callable[[], None]]:
    """Another process in the middle of reading a folder, until it is stopped."""
    process = subprocess.Popen([sys.executable, "-c", READER, str(folder)], stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"begun\n"
        yield process.stdin.close
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


class TestWhatKilledProcessesLeave:
    def test_a_half_written_draft_is_removed_by_the_next_save(self, draft: SparrowDraftModel, tmp_path: Path) -> None:
        draft.save_pretrained(tmp_path)
        before = {path.name for path in tmp_path.iterdir()}
        with writing_elsewhere(tmp_path) as (partial, kill):
            SparrowDraftModel.from_pretrained(tmp_path)
            # Its writer lives, so it stays.
            draft.save_pretrained(tmp_path)
            assert (partial / "model.safetensors").read_bytes() == b"half"
            kill()
            SparrowDraftModel.from_pretrained(tmp_path)
            draft.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("moved", [0, 1, 2, 3])
    @pytest.mark.parametrize("then", ["load", "save"])
    def test_a_save_that_is_cut_off_while_it_replaces_files_is_finished(
        self, draft: SparrowDraftModel, tmp_path: Path, moved: int, then: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draft.save_pretrained(tmp_path, max_shard_size="50KB")
        (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"of an even older draft")
        newer, newest = copy.deepcopy(draft), copy.deepcopy(draft)
        for scale, twin in ((2.0, newer), (3.0, newest)):
            twin.fc.weight.data.mul_(scale)
        replace, calls = os.replace, []

        def until_the_end(*names: Any) -> None:
            if Path(names[0]).parent.suffix == ".switch":
                if len(calls) == moved:
                    raise SystemExit
                calls.append(names)
            replace(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until_the_end)
            with pytest.raises(SystemExit):
                newer.save_pretrained(tmp_path)
        if then == "save":
            newest.save_pretrained(tmp_path)
        expected = newest if then == "save" else newer
        loaded = SparrowDraftModel.from_pretrained(tmp_path)
        assert torch.equal(loaded.fc.weight, expected.fc.weight)
        names = {path.name for path in tmp_path.iterdir()}
        assert (
            {"config.json", "model.safetensors"}
            <= names
            <= {"config.json", "model.safetensors", "PROVENANCE.json", "README.md"}
        )

    def test_a_folder_that_is_a_file_is_no_folder_to_save_to(self, draft: SparrowDraftModel, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(NotADirectoryError, match="is a file: name a folder to save to"):
            draft.save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"


def write_half(folder: Path, told: Connection) -> None:
    with atomic_files(folder, "config.json", lambda name: False) as partial:
        (partial / "model.safetensors").write_bytes(b"half")
        told.send(partial)
        time.sleep(600)


@contextmanager
def writing_elsewhere(folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Another process in the middle of saving to a folder: where, and how it is killed."""
    # A fork need not import torch once more.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=write_half, args=(folder, theirs), daemon=True)
    process.start()

    def kill() -> None:
        process.kill()
        process.join()

    try:
        yield ours.recv(), kill
    finally:
        kill()

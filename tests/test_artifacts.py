"""Atomic writes, digests of weights, and saving a draft while it is loaded."""

import errno
import functools
import io
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparrow_hf import artifacts
from sparrow_hf.artifacts import (
    StoredTensors,
    append_line,
    atomic_path,
    check_made_alike,
    earlier_target_digest,
    tensor_digest,
    without_names,
    write_json,
    write_text,
)
from sparrow_hf.errors import BenchmarkError


class TestWriting:
    def test_whole_or_absent(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "file.json"
        with pytest.raises(KeyboardInterrupt), atomic_path(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
        assert list(path.parent.iterdir()) == []
        write_json(path, {"a": 1}, indent=1)
        assert path.read_text() == '{\n "a": 1\n}\n'
        with pytest.raises(KeyboardInterrupt), atomic_path(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
        assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]

    def test_a_folder_too(self, tmp_path: Path) -> None:
        for wrong in (True, False):
            try:
                with atomic_path(tmp_path / "folder") as partial:
                    write_text(partial / "a", "text")
                    if wrong:
                        raise ValueError
            except ValueError:
                assert list(tmp_path.iterdir()) == []
        assert (tmp_path / "folder" / "a").read_text() == "text"

    def test_threads_and_processes_do_not_share_a_partial_file(self, tmp_path: Path) -> None:
        """Every one holds its file open while the others write theirs."""
        texts, together = [str(number) * 100_000 for number in range(4)], threading.Barrier(4)

        def write(text: str) -> str:
            with atomic_path(tmp_path / "file") as partial:
                partial.write_text(text)
                together.wait()
                return partial.name

        with ThreadPoolExecutor(4) as pool:
            names = set(pool.map(write, texts))
        assert len(names) == 4 and all(str(os.getpid()) in name for name in names)
        assert (tmp_path / "file").read_text() in texts and len(list(tmp_path.iterdir())) == 1

    def test_a_writer_that_begins_anew_is_not_taken_for_the_one_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One thread finds the folder of another, which is done and writes again before the first removes it."""
        thread, is_locked = 1, artifacts._is_locked
        monkeypatch.setattr(threading, "get_ident", lambda: thread)
        files = functools.partial(artifacts.atomic_files, tmp_path, "last", lambda name: False)
        before, after = ExitStack(), ExitStack()
        write_text(before.enter_context(files()) / "last", "before")

        def found_just_before(path: Path) -> bool:
            nonlocal thread
            monkeypatch.setattr(artifacts, "_is_locked", is_locked)
            thread = 1
            before.close()
            write_text(after.enter_context(files()) / "other", "after")
            thread = 2
            return False

        thread = 2
        monkeypatch.setattr(artifacts, "_is_locked", found_just_before)
        with files() as partial:
            write_text(partial / "last", "of the second")
        after.close()
        texts = {path.name: path.read_text() for path in tmp_path.iterdir() if not path.name.startswith(".")}
        assert texts == {"last": "of the second", "other": "after"}

    def test_links_and_devices_stay(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "file")
        write_text(tmp_path / "link", "text")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
        os.mkfifo(tmp_path / "pipe")
        reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
        read: list[str] = []
        reader.start()
        write_text(tmp_path / "pipe", "text")
        reader.join()
        assert read == ["text"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


class TestDigest:
    def test_the_digest_depends_on_names_types_shapes_and_bytes(self) -> None:
        tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
        digest = tensor_digest(tensors)
        assert digest == tensor_digest(dict(reversed(tensors.items())))
        others: list[dict[str, torch.Tensor]] = [
            {"a": tensors["b"], "b": tensors["a"]},
            tensors | {"a": torch.arange(6.0).reshape(2, 3)},
            tensors | {"a": torch.arange(6.0).view(torch.int32)},
            tensors | {"a": torch.arange(6.0) * -1},
            {"a": tensors["a"]},
        ]
        assert len({digest, *map(tensor_digest, others)}) == 6

    def test_of_files_is_that_of_the_tensors_in_them(self, tmp_path: Path) -> None:
        tensors = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.arange(6.0), "c": torch.zeros(())}
        save_file({"b": tensors["b"], "c": tensors["c"]}, tmp_path / "1.safetensors")
        save_file({"a": tensors["a"]}, tmp_path / "2.safetensors")
        stored = StoredTensors(sorted(tmp_path.iterdir()))
        assert len(stored) == 3 and tensor_digest(stored) == tensor_digest(tensors)

    def test_the_digest_of_offloaded_weights_has_name_type_and_shape(self) -> None:
        def told(*shape: int) -> str:
            return tensor_digest({"a": torch.empty(shape, device="meta")})

        assert told(2, 3) == told(2, 3) != told(3, 2)

    def test_the_earlier_one_is_read_still(self) -> None:
        tensors = {"a": torch.arange(3.0)}
        assert earlier_target_digest(tensors) == "68e618d83c0c7d42dcde6458e1f7d9c1fa94d6bcced078db0d7c5f4b9a257351"


def test_every_difference_is_named() -> None:
    found = {"same": 1, "beyond": 2, "arms": {"a": {"tree": [1]}, "b": 1}, "seed": 0}
    check_made_alike("folder", found, {"same": 1, "never": None}, BenchmarkError)
    with pytest.raises(BenchmarkError) as caught:
        check_made_alike("folder", found, {"same": 1, "arms": {"a": {"tree": [2]}, "c": 3}, "seed": 1}, BenchmarkError)
    assert str(caught.value) == (
        "folder was made differently (arms.a.tree: [1], now [2]; arms.b: 1, now None; arms.c: None, now 3; "
        "seed: 0, now 1): choose another folder, or delete it"
    )


def test_names_of_the_same_weights_do_not_count() -> None:
    wanted = {
        "target": "/a",
        "target_revision": None,
        "target_sha256": "1",
        "draft": "/b",
        "draft_sha256": "2",
        "seed": 0,
    }
    rest = {"target_sha256": "1", "draft_sha256": "2", "seed": 0}
    assert without_names({"target": "a", "target_sha256": "1", "draft": "b", "draft_sha256": "2"}, wanted) == rest
    assert without_names({"target_sha256": "1"}, wanted) == rest | {"draft": "/b"}
    assert without_names({"target_sha256": "2", "draft_sha256": None}, wanted) == wanted
    # Two that have no draft.
    without = wanted | {"draft": None, "draft_sha256": None}
    assert without_names({"draft": None, "draft_sha256": None}, without) == without


class TestAppending:
    def test_a_line_is_appended_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "lines"
        append_line(path, "first")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(Path, "open", lambda path, *args, **kwargs: FullDisk(path, 3))
            append_line(path, "second")
        assert path.read_text() == "first\n"
        append_line(path, "third")
        assert path.read_text() == "first\nthird\n"

    def test_lines_of_threads_never_mix(self, tmp_path: Path) -> None:
        lines = [str(number) * 10_000 for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda line: append_line(tmp_path / "lines", line), lines))
        assert sorted((tmp_path / "lines").read_text().splitlines()) == lines


class FullDisk(io.FileIO):
    """A file that takes only some more bytes."""

    def __init__(self, path: Path, room: int):
        super().__init__(path, "ab")
        self.room = room

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(data[: self.room])
        self.room -= written
        return written

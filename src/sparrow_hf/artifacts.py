"""Files that this package writes: atomic writes, digests of tensors, and the check that settings are the same.

Digests of files, and their check when they are read back, are in `checksums.py`.
"""

import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import SparrowError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_T = TypeVar("_T")

#: Maximum seconds to wait for other processes that use the same folder. A stopped process must not block a training.
LOCK_SECONDS = 30.0
#: How often files are read again if they are replaced meanwhile.
READ_ATTEMPTS = 5

#: Ending of a folder whose files are complete and being moved, and the file in it that says what is to be done.
_SWITCH, _PLAN = ".switch", "plan.json"
_writes = itertools.count()


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write a file to, renamed at the end, so that `path` is always complete.

    After an exception `path` is what it was. A folder can be written as well, if there is none at `path` yet. The
    folder that holds `path` is made.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        # A device or a pipe (`/dev/stdout`) must not be replaced.
        yield path
        return
    # What a link points to is replaced, not the link.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{_own_suffix()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        _remove(partial)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text)


def write_json(
    path: str | os.PathLike[str],
    value: Any,
    indent: int | None = None,
    default: Callable[[Any], Any] | None = None,
) -> None:
    """Writes a JSON file that ends with a newline, atomically; `indent` and `default` are those of `json.dumps`."""
    write_text(path, json.dumps(value, indent=indent, default=default) + "\n")


def append_line(path: Path, line: str) -> None:
    """Appends a line to a text file, whole or not at all; the lines of several processes never mix."""
    # Unbuffered: what a full disk refuses must not be written later, when the file is closed.
    with locked(path.parent, exclusive=True), path.open("ab", buffering=0) as file:
        before, data = file.tell(), line.encode() + b"\n"
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            # The next line must not be appended to half of this one.
            file.truncate(before)
            raise


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file, without what a killed process has left behind the last newline."""
    return path.read_bytes().decode(errors="replace").split("\n")[:-1]


@contextmanager
def atomic_files(folder: Path, last: str, is_kind: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write files to that belong together; at the end they are moved to `folder`.

    After an exception `folder` is unchanged. [`read_together`] reads either the old or the new files. Other writers
    wait, so that the files of two writers are never mixed. If the process is killed while it moves them, whoever reads
    or writes next moves the rest.

    Args:
        folder: Made if it is not there.
        last: Name of the file that describes the others, and is moved after them.
        is_kind: Whether a file of this name is of a kind that is replaced as a whole: if there are new files of the
            kind, old ones of other names go.
    """
    with _folder_in(folder) as partial:
        yield partial
        with locked(folder, exclusive=True):
            new = {path.name for path in partial.iterdir()}
            replaced = any(map(is_kind, new))
            plan = {
                "move": sorted(new, key=lambda name: (name == last, name)),
                "remove": [
                    path.name for path in folder.iterdir() if replaced and path.name not in new and is_kind(path.name)
                ],
            }
            (partial / _PLAN).write_text(json.dumps(plan))
            # From this moment on the new files are those of the folder, wherever each of them is.
            partial.rename(switch := partial.with_suffix(_SWITCH))
            _move(switch)


def _move(switch: Path) -> None:
    """Moves the files of a finished writer to its folder, as far as that was not done."""
    # Where there are no locks, another process may be doing the same.
    with suppress(FileNotFoundError):
        plan = json.loads((switch / _PLAN).read_text())
        for name in plan["move"]:
            with suppress(FileNotFoundError):
                os.replace(switch / name, switch.parent / name)
        for name in plan["remove"]:
            (switch.parent / name).unlink(missing_ok=True)
    _remove(switch)


def finish_switches(folder: Path) -> None:
    """Moves what killed processes have written completely and not moved. Does nothing in a read-only folder."""
    if any(folder.glob(f".*{_SWITCH}")):
        with suppress(PermissionError), locked(folder, exclusive=True):
            for switch in sorted(folder.glob(f".*{_SWITCH}")):
                _move(switch)


@contextmanager
def _folder_in(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, removed at the end. Those that killed processes have left there are removed too."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder to save to")
    folder.mkdir(parents=True, exist_ok=True)
    finish_switches(folder)
    for other in folder.glob(".*.*.partial"):
        if not _is_locked(other):
            _remove(other)
    partial, unlocked = (folder / f".{_own_suffix()}{kind}" for kind in ("", ".new"))
    with ExitStack() as end:
        for path in (partial, unlocked):
            # A killed process may have had the same numbers.
            _remove(path)
            end.callback(_remove, path)
        # Locked as long as its writer lives, and before it has the name that others look for.
        unlocked.mkdir()
        end.enter_context(locked(unlocked, exclusive=True))
        unlocked.rename(partial)
        yield partial


def remove_partial_files(folder: Path) -> None:
    """Removes what a killed process left half written."""
    # safetensors writes to a file of its own first.
    for pattern in ("*.partial", ".tmp??????"):
        for partial in folder.glob(pattern):
            _remove(partial)


def _own_suffix() -> str:
    # Processes and threads may write to the same folder. No name comes twice, because whoever finds one without a
    # writer removes it a little later.
    return f"{os.getpid()}.{threading.get_ident()}.{next(_writes)}.partial"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -- reading what others may be writing -------------------------------------------------------------------------------


def read_together(folder: Path, last: str, read: Callable[[], _T], error: type[SparrowError]) -> _T:
    """Reads files of a folder that belong together with `read`, all of them old or all of them new.

    Writers with [`atomic_files`] wait for it. On file systems without locks, files that were replaced meanwhile are
    read again.

    Args:
        folder: The folder.
        last: Name of the file that describes the others, as in [`atomic_files`].
        read: Reads them, and raises if they do not belong together.
        error: The type of the error.

    Raises:
        SparrowError: They were replaced during every attempt.
        Exception: Whatever `read` raises on files that stay as they are.
    """
    for _ in range(READ_ATTEMPTS):
        finish_switches(folder)
        with locked(folder, exclusive=False):
            before, described = _versions(folder), _bytes_in(folder / last)
            try:
                result = read()
            except Exception:
                if _versions(folder) == before:
                    raise
            else:
                if _bytes_in(folder / last) == described:
                    return result
    raise error(f"{folder} was written to whenever it was read: try again when the writer has finished")


def _bytes_in(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _versions(folder: Path) -> set[tuple[Any, ...]]:
    versions = set()
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            stat = path.stat()
            versions.add((path.name, stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return versions


@contextmanager
def locked(folder: Path, exclusive: bool) -> Iterator[None]:
    """Waits until no one else replaces files of the folder together, or (`exclusive`) reads them.

    Goes on without a lock where there are none (Windows, some network file systems), or after `LOCK_SECONDS`.
    """
    if fcntl is None:
        yield
        return
    # Every call opens the folder anew, so that threads exclude each other as processes do.
    handle = os.open(folder, os.O_RDONLY)
    give_up = time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    break
                time.sleep(0.002)
            except OSError:
                break
        yield
    finally:
        with suppress(OSError):
            # Closing is not enough: a process that was forked meanwhile has the handle too.
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _is_locked(folder: Path) -> bool:
    """Whether someone holds the lock of a folder, or may hold it."""
    if fcntl is None:
        return True
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_UN)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


# -- digests ----------------------------------------------------------------------------------------------------------


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, each read when it is accessed."""

    def __init__(self, files: Iterable[Path]):
        self._files: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as stored:
                self._files |= dict.fromkeys(stored.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as stored:
            return stored.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, in the order of their names.

    Args:
        tensors: A model's `state_dict()`, or [`StoredTensors`]. Of weights that are offloaded to disk (on the meta
            device), name, dtype and shape have to do.

    Returns:
        64 hexadecimal digits: what `tensors_sha256`, `target_sha256` and `draft_sha256` are in all files.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if not tensor.is_meta:
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def earlier_target_digest(tensors: Mapping[str, Tensor]) -> str:
    """What recordings of earlier versions hold as `target_sha256`; read, never written."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(name.encode())
        digest.update(str(tuple(tensor.shape)).encode() if tensor.is_meta else _bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


# -- made alike -------------------------------------------------------------------------------------------------------


def check_made_alike(
    what: str | os.PathLike[str],
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    error: type[SparrowError],
    remedy: str = "choose another folder, or delete it",
) -> None:
    """Compares how files were made with how they would be made now.

    Args:
        what: The file or folder.
        found: The settings recorded there. Settings that are not in `wanted` do not count.
        wanted: The settings it should have, as read back from JSON.
        error: The type of the error.
        remedy: What to do about it, as the end of the sentence.

    Raises:
        SparrowError: They differ; every difference is named.
    """
    wrong = list(_differences(found, wanted))
    if wrong:
        raise error(f"{what} was made differently ({'; '.join(wrong)}): {remedy}")


def without_names(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What is wanted, without the names of weights that are the same by their digests, whichever way they are named.

    Args:
        found, wanted: As for [`check_made_alike`]. `target_sha256` stands beside `target` and `target_revision`, and
            `draft_sha256` beside `draft`.
    """
    digests = {name: wanted[f"{name}_sha256"] for name in ("target", "draft")}
    same = {name for name, digest in digests.items() if digest and found.get(f"{name}_sha256") == digest}
    return {name: value for name, value in wanted.items() if name.removesuffix("_revision") not in same}


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(other, Mapping) and isinstance(value, Mapping):
            yield from _differences(other, dict.fromkeys(other) | dict(value), f"{prefix}{name}.")
        elif other != value:
            yield f"{prefix}{name}: {other!r}, now {value!r}"

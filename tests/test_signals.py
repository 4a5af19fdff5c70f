"""Ctrl-C and SIGTERM are neither lost nor mistaken for an error, and they never end in a traceback."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
from stopping import in_process, needs_posix
from typer.testing import CliRunner

import sparrow_hf
from sparrow_hf import signals
from sparrow_hf.cli import app, common, main, vocab
from sparrow_hf.data.messages import naming_row

pytestmark = [needs_posix, pytest.mark.usefixtures("interruptible")]
BOTH = [
    (signal.SIGINT, KeyboardInterrupt, "Stopped by Ctrl-C"),
    (signal.SIGTERM, signals.Terminated, "Stopped by SIGTERM"),
]
VOCAB = ["vocab", "--target", "t", "--answers", "a", "--output", "o"]


@pytest.mark.parametrize(("number", "error", "_"), BOTH)
def test_what_python_ignores_is_raised_once_more(number: signal.Signals, error: type[BaseException], _: str) -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.raises(error):
        with signals.raising() as raised:
            Finalised()
            assert [type(stop) for stop in raised] == [error]
            time.sleep(10)
    assert [type(stop) for stop in raised] == [error, error]


def test_other_ignored_errors_are_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: shown.append(str(what.exc_value)))

    class Finalised:
        def __del__(self) -> None:
            raise ValueError("shown")

    with signals.raising():
        Finalised()
    Finalised()
    assert shown == ["shown", "shown"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), signals.Terminated()])
def test_a_bad_row_is_no_disguise(stop: BaseException) -> None:
    with pytest.raises(type(stop)), naming_row(3):
        raise SystemError("returned a result with an exception set") from stop


@pytest.mark.parametrize(("number", "_", "told"), BOTH)
def test_an_error_in_place_of_an_interrupt_is_told_as_one(
    number: signal.Signals, _: object, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            pass
        raise RuntimeError("cannot go on")

    monkeypatch.setattr("sparrow_hf.cli.vocab.quiet_transformers", work)
    result = CliRunner().invoke(app, VOCAB)
    assert result.exit_code == 128 + number
    assert result.stderr == f"{told}: nothing new is kept; start again with: sparrow {' '.join(VOCAB)}\n"


def test_a_second_one_does_not_end_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        signal.raise_signal(signal.SIGINT)
        return "told"

    monkeypatch.setattr("sparrow_hf.cli.vocab.quiet_transformers", interrupt)
    monkeypatch.setattr(common.Ending, "__str__", interrupt)
    result = CliRunner().invoke(app, VOCAB)
    assert (result.exit_code, result.stderr) == (130, "Stopped by Ctrl-C: told\n")


def test_the_handlers_of_others_come_back_and_what_is_ignored_stays_so() -> None:
    handlers = [signal.getsignal(number) for number in signals.NAMES]
    with signals.raising(), signals.ignoring():
        assert [signal.getsignal(number) for number in signals.NAMES] == [signal.SIG_IGN, signal.SIG_IGN]
    assert [signal.getsignal(number) for number in signals.NAMES] == handlers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals.raising():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize(("number", "_", "told"), BOTH)
@pytest.mark.parametrize("started", ["module", "script"])
@pytest.mark.parametrize("package", ["torch", pytest.param("typer", marks=pytest.mark.full)])
def test_an_interrupt_during_imports_is_told(
    number: signal.Signals, _: object, told: str, started: str, package: str, tmp_path: Path
) -> None:
    ended = interrupted_import(tmp_path, number, started, package)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "", f"{told}.\n")


def test_whoever_imports_the_package_keeps_their_handlers(tmp_path: Path) -> None:
    ended = interrupted_import(tmp_path, signal.SIGINT, "library", "torch")
    assert ended.returncode == -signal.SIGINT and ended.stderr.endswith("KeyboardInterrupt\n")


def interrupted_import(folder: Path, number: int, started: str, package: str) -> subprocess.CompletedProcess[str]:
    """Starts a process that is sent a signal as soon as it imports a package."""
    (folder / "packages").mkdir()
    (folder / "packages" / f"{package}.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(20)\nraise ImportError('too late')\n"
    )
    (folder / "sparrow").write_text("from sparrow_hf.cli import main\nmain()\n")
    words = {
        "module": ["-m", "sparrow_hf.cli"],
        "script": [folder / "sparrow"],
        "library": ["-c", "import sparrow_hf"],
    }
    path = os.pathsep.join([str(folder / "packages"), str(Path(sparrow_hf.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, *words[started]],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def wait_for_ever() -> None:
    """A verb that is interrupted when its pool has started a thread that it does not know yet."""

    def work() -> NoReturn:
        threading.Thread(target=threading.Event().wait).start()
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    vocab.quiet_transformers = work
    main()


@pytest.mark.full
def test_a_forgotten_thread_does_not_keep_the_process() -> None:
    ended = in_process("test_signals:wait_for_ever", *VOCAB)
    # The full tier's bitsandbytes says something of its own first.
    assert ended.code == 130 and "\nStopped by Ctrl-C: nothing new is kept" in f"\n{ended.output}", ended.output

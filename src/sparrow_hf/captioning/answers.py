"""Answers to many questions in a file that a stopped run goes on with, and their totals."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.generation import BaseStreamer

import sparrow_hf

from ..artifacts import check_made_alike, without_names
from ..errors import CaptionError
from ..line_file import LineFile
from .caption import Captioner
from .sources import Question, Questions

#: Conditions that earlier versions did not write.
LATER_CONDITIONS = ("target_sha256", "processor_sha256")


class AnswerFile(LineFile):
    """Answers made under the same conditions, see [`~sparrow_hf.line_file.LineFile`].

    Args:
        conditions: See [`Captioner.conditions`]. Those that earlier versions did not write are compared where a line
            has them.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]):
        self._conditions = conditions
        super().__init__(path, {}, CaptionError, "an answer of sparrow generate")

    def check_line(self, line: Mapping[str, Any]) -> None:
        found = line["provenance"]
        lacking = {name for name in LATER_CONDITIONS if found.get(name) is None}
        wanted = without_names(found, self._conditions)
        wanted = {name: value for name, value in wanted.items() if name not in lacking}
        check_made_alike(self.path, found, wanted, CaptionError)


def check_writable(path: Path) -> None:
    """Makes the folder of a file of answers, and raises if nothing can be written there: before models are loaded.

    Raises:
        CaptionError: The file, or its folder, cannot be written to.
        OSError: The folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise CaptionError(f"{path} is a folder: name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CaptionError(f"{path} cannot be written: change its permissions, or choose another file")


def open_answers(path: Path, conditions: Mapping[str, Any], asked: Questions) -> AnswerFile:
    """The file of answers, with those that were given before.

    Args:
        path: The file.
        conditions: See [`Captioner.conditions`].
        asked: What is asked.

    Raises:
        CaptionError: The file holds answers made with other settings, to other rows or about other files of the same
            names, or something else.
    """
    answers = AnswerFile(path, conditions)
    try:
        _refuse_others(answers, asked)
    except CaptionError:
        answers.close()
        raise
    return answers


def _refuse_others(answers: LineFile, asked: Questions) -> None:
    known, others = {line["name"]: line for line in answers.lines}, []
    strange = set(known) if asked.are_rows else set()
    for question in asked if known else ():
        strange.discard(question.name)
        if question.name in known and _is_about_another(known[question.name], question):
            others.append(question.name)
    if strange:
        raise CaptionError(
            f"{answers.path} holds answers to other rows, {len(strange)} in number ({min(strange)}): choose another "
            "file, or delete it"
        )
    if others:
        raise CaptionError(
            f"{answers.path} holds answers about other files of the same names, {len(others)} in number "
            f"({others[0]}: {_file_of(known[others[0]])}): choose another file, or delete it"
        )


def _is_about_another(line: Mapping[str, Any], question: Question) -> bool:
    """Whether an answer is about another file than the question. A file that is gone may have been moved."""
    answered, asked = _file_of(line), question.file
    if answered is None or asked is None or not os.path.exists(answered):
        return False
    return not os.path.exists(asked) or not os.path.samefile(answered, asked)


def _file_of(line: Mapping[str, Any]) -> str | None:
    """The file that an answer is about. Earlier versions wrote its path as it was given, and no more."""
    return line.get("file") or line["source"]


def given_before(answers: LineFile, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """The answers of a file to what is asked; a file may hold those to other videos too."""
    names = {question.name for question in asked}
    return [line for line in answers.lines if line["name"] in names]


def answer_all(
    captioner: Captioner,
    asked: Sequence[Question],
    conditions: Mapping[str, Any],
    answers: LineFile | None = None,
    streamer: BaseStreamer | None = None,
) -> Iterator[dict[str, Any]]:
    """Answers what is not answered yet, in order.

    Args:
        captioner: Answers.
        asked: What is asked.
        conditions: Stand in every line under `"provenance"`, with the versions.
        answers: The file that lines are written to as soon as they are made.
        streamer: See [`Captioner.line`].

    Yields:
        Lines, see [`Captioner.line`].
    """
    versions = {"transformers": transformers.__version__, "sparrow_hf": sparrow_hf.__version__}
    done = set() if answers is None else {line["name"] for line in answers.lines}
    for question in asked:
        if question.name in done:
            continue
        line = captioner.line(question, streamer) | {"provenance": {**conditions, **versions}}
        if answers is not None:
            answers.append(line)
        yield line


@dataclass(frozen=True)
class Totals:
    """Sums over lines.

    Attributes:
        rows: Answers and errors.
        errors: Rows with an error.
        tokens, seconds: Of all answers.
        speedup: Seconds of plain `generate()` over those with the draft; `None` if nothing was compared.
        different: Names of the answers that differ from plain `generate()`; `None` if nothing was compared.
    """

    rows: int
    errors: int
    tokens: int
    seconds: float
    speedup: float | None
    different: list[str] | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def total(lines: Sequence[Mapping[str, Any]]) -> Totals:
    """Sums up lines of [`Captioner.line`]."""
    answered = [line for line in lines if line["error"] is None]
    seconds = sum(line["seconds"] for line in answered)
    compared = [line for line in answered if line["identical"] is not None]
    return Totals(
        rows=len(lines),
        errors=len(lines) - len(answered),
        tokens=sum(line["tokens"] for line in answered),
        seconds=seconds,
        speedup=sum(line["plain_seconds"] for line in compared) / seconds if compared and seconds else None,
        different=[line["name"] for line in compared if not line["identical"]] if compared else None,
    )

"""What is asked: from a video, a folder of videos, or rows, to a list of questions."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from mimetypes import MimeTypes
from pathlib import Path
from typing import Any

from ..data.answers import is_answers
from ..data.datasets import SAVED_DATASETS, load_rows, row_kind
from ..data.files import is_url
from ..data.messages import (
    ROW_ERROR,
    ROW_FOLDER,
    ROW_INDEX,
    media_parts,
    messages_for,
    row_name,
    split_answer,
    text_of,
)
from ..data.prepare import own_sampling
from ..errors import CaptionError, TrainingDataError, VideoError
from ..testbed import EVALUATION_SEEDS, FAMILIES, make_clip, shipped

QUESTION = "Describe this video in detail."
"""What is asked about a video where nothing else is."""

#: Python's own table, which is the same on every system. A file of a type that it does not know may be a video.
TYPES = MimeTypes(filenames=())
OTHER_TYPES = ("text/", "image/", "application/", "audio/")
#: What lies beside videos, by endings that the table lacks: notes, logs, a system's or a camera's own files, sound.
OTHER_ENDINGS = (".md", ".log", ".ini", ".db", ".aae", ".m4a")
#: Videos of phones, which the table takes for sound: `.3gp` and `.3g2`.
PHONE_TYPES = ("audio/3gpp", "audio/3gpp2")
#: Pictures that may move. Not every version of Python knows `.webp`.
MOVING = ("image/gif", "image/webp")


@dataclass(frozen=True)
class Question:
    """A row, and what it is called in the output.

    Attributes:
        name: Different for every question of a source, and the same whenever the source is read again.
        source: Its first video or image that is a file: a path or URL, as the row names it; `None` if it has none,
            or the row is malformed.
        row: What [`~sparrow_hf.data.prepare_prompt`] reads.
    """

    name: str
    source: str | None
    row: dict[str, Any]

    @property
    def file(self) -> str | None:
        """The absolute path of its first video or image that is a file of this machine, if it has one."""
        try:
            paths = (source for source in _addresses(split_answer(self.row)[0]) if not is_url(source))
            return os.path.abspath(next(paths))
        except (TrainingDataError, StopIteration):
            return None


@dataclass(frozen=True)
class Questions(Sequence[Question]):
    """The questions of a source, each read when it is accessed.

    Attributes:
        question: What is asked about every video; `None` if rows ask their own questions.
        left_out: Files of a folder that are no videos by their names.
    """

    items: Any
    question: str | None
    left_out: tuple[str, ...] = ()

    @property
    def are_rows(self) -> bool:
        return self.question is None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        item = self.items[index]
        return item if isinstance(item, Question) else _of_row(item)


def read_questions(source: str, question: str | None = None, output: Path | None = None) -> Questions:
    """What is asked about a source.

    Args:
        source: A video file or its URL; a folder of videos, folders in it included; or what
            [`~sparrow_hf.data.load_rows`] reads: a file that [`~sparrow_hf.data.datasets.row_kind`] knows, or a folder
            or a data set of rows.
        question: What is asked about videos; a description by default. Rows ask their own questions.
        output: The file of answers, which may lie in the folder.

    Raises:
        VideoError: There is no such file, or the folder is empty, or a folder in it cannot be read.
        TrainingDataError: The rows cannot be read.
        CaptionError: There are rows and a question, the question is a file, or the output is one of the inputs.
    """
    path, about = Path(source), question or QUESTION
    if not source.strip():
        raise VideoError("The name of the video is empty. Name a video, a folder or rows.")
    if question and os.path.isfile(question):
        # What a shell makes of `*.mp4`.
        raise CaptionError(f"{question} is a file, not a question: name one video, or a folder of videos")
    if output is not None and output.is_file() and path.is_file() and output.samefile(path):
        raise CaptionError(f"{output} holds what is asked: name another file for the answers")
    if is_url(source) or source.startswith("file://") or path.is_file() and row_kind(path) is None:
        return Questions([_about(source, source, about)], about)
    if path.is_dir() and not is_answers(path) and not any((path / name).exists() for name in SAVED_DATASETS):
        names = sorted(file.relative_to(path).as_posix() for file in _files(path, output))
        left_out = tuple(name for name in names if _is_other(path / name))
        videos = [name for name in names if name not in left_out]
        if videos or all(row_kind(name) is None for name in names):
            if not videos:
                raise VideoError(f"{source} holds no videos and no rows: name a folder of videos, or one video.")
            asked = [_about(name, str(path / name), about) for name in videos]
            return Questions(asked, about, left_out)
    if not path.exists() and TYPES.guess_type(source)[0] is not None:
        raise VideoError(f"There is no video file at {source}. Check the path.")
    if question is not None:
        raise CaptionError(f"the rows of {source} ask their own questions: leave out the question")
    if output is not None and path.is_dir() and output.resolve().parent == path.resolve():
        raise CaptionError(f"{output} would be one of the rows' own files: write the answers outside of {source}")
    rows = load_rows(source)
    if len(rows) == 0:
        raise TrainingDataError(f"{source} has no rows: give a file with at least one question")
    return Questions(rows, None)


def built_in_clip(folder: Path, family: str) -> Questions:
    """A generated clip that the built-in models have not seen, and the question they know.

    Raises:
        TargetLoadError: There is no such family.
    """
    shipped(family)
    tokens_per_step = next(each.tokens_per_step for each in FAMILIES if each.name == family)
    clip = make_clip(folder / "clip.mp4", EVALUATION_SEEDS[0], tokens_per_step=tokens_per_step)
    question = text_of(clip.messages[0])
    return Questions([Question("clip.mp4", None, {"messages": clip.messages})], question)


def _files(folder: Path, output: Path | None) -> Iterator[Path]:
    """The files of a folder and of those in it, links to folders too, without hidden ones and the output."""
    own, seen = None if output is None else output.resolve(), set()
    for parent, folders, files in os.walk(folder, onerror=_refuse_unread, followlinks=True):
        # A link may lead back. In order, so that of two ways to a folder always the same one is taken.
        is_new = (real := os.path.realpath(parent)) not in seen
        seen.add(real)
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        if not is_new:
            continue
        for name in files:
            if not name.startswith(".") and (Path(parent) / name).resolve() != own:
                yield Path(parent) / name


def _refuse_unread(error: OSError) -> None:
    raise VideoError(f"{error.filename} cannot be read ({error.strerror}): change its permissions, or move it away")


def _is_other(file: Path) -> bool:
    """Whether a file is no video by its name; pictures may move."""
    kind = TYPES.guess_type(file.name)[0] or ""
    if kind in MOVING or file.suffix.lower() == ".webp":
        return not _moves(file)
    is_other = kind.startswith(OTHER_TYPES) and kind not in PHONE_TYPES
    return is_other or file.suffix.lower() in OTHER_ENDINGS or row_kind(file) is not None


def _moves(picture: Path) -> bool:
    """Whether a picture is a video without sound rather than a thumbnail."""
    from PIL import Image

    try:
        with Image.open(picture) as opened:
            return getattr(opened, "is_animated", False)
    # Pillow's decoders raise many types of errors.
    except Exception:
        return False


def _about(name: str, video: str, question: str) -> Question:
    return Question(name, video, {"messages": messages_for(video, question)})


def _of_row(row: dict[str, Any]) -> Question:
    """A row by its number and a fingerprint of what it asks, so that other rows are never taken for it.

    Relative paths count as they are written: a folder of rows asks the same wherever it lies.
    """
    try:
        messages, own = split_answer(row | {ROW_FOLDER: None})[0], own_sampling(row)
    except TrainingDataError:
        # The row's error is told when the row is answered. Here it only needs a name.
        added = (ROW_INDEX, ROW_FOLDER, ROW_ERROR)
        written = {name: value for name, value in row.items() if name not in added}
        return Question(row_name(row[ROW_INDEX], repr(written)), None, row)
    asked = [messages, own.get("fps"), own.get("max_frames")]
    return Question(row_name(row[ROW_INDEX], asked), next(_addresses(messages), None), row)


def _addresses(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The paths and URLs of videos and images that clean messages show by them, in order."""
    shown = (part[part["type"]] for part in media_parts(messages))
    return (source for source in shown if isinstance(source, str))

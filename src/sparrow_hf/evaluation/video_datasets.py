"""Public video data sets as prompts, read from a local copy. Their columns and files are configuration.

A copy is the folder that the Hub repository was downloaded to, with its archives unpacked inside. Videos are found by
name anywhere below it, because mirrors pack them differently. Multiple-choice questions ask for an explanation,
because an answer of one letter has nothing to decode.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from ..errors import BenchmarkError
from ..extras import require

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
EXPLAIN = "Explain what in the video supports your answer, then name the letter of the best option."

Row = Mapping[str, Any]


@dataclass(frozen=True)
class VideoDataset:
    """Files and columns of a data set.

    Attributes:
        hub_id: Its place on the Hub.
        files: File name (a glob) of the rows → folder that their videos lie below; `""` is the whole copy.
        video: Column of the video's name; a name without a suffix may have any of `VIDEO_SUFFIXES`.
        prompt: Makes the text of a row's question.
        window: Columns of the seconds at which the part of the video begins and ends that a row asks about, if it has
            them.
    """

    hub_id: str
    files: Mapping[str, str]
    video: str
    prompt: Callable[[Row], str]
    window: tuple[str, str] | None = None


def ask_for_choice(question: str, options: list[str]) -> str:
    """A question of choice with its options as (A), (B), …"""
    listed = "\n".join(f"({chr(ord('A') + index)}) {option}" for index, option in enumerate(options))
    return f"{question}\n{listed}\n{EXPLAIN}"


def _with_candidates(row: Row) -> str:
    # MLVU's two tasks of generation have no candidates.
    return ask_for_choice(row["question"], list(row["candidates"])) if row.get("candidates") else row["question"]


def _numbered_options(row: Row) -> list[str]:
    options = (row[f"option{index}"] for index in range(5))
    return [option for option in options if option != "N/A"]


DATASETS: dict[str, VideoDataset] = {
    "videodetailcaption": VideoDataset(
        hub_id="lmms-lab/VideoDetailCaption",
        files={"test-*.parquet": ""},
        video="video_name",
        prompt=lambda row: row["question"],
    ),
    "mvbench": VideoDataset(
        hub_id="OpenGVLab/MVBench",
        files={
            f"{task}.json": folder
            for folder, tasks in {
                "star": "action_sequence action_prediction object_interaction",
                "ssv2_video*": "action_antonym",
                "Moments_in_Time_Raw": "fine_grained_action",
                "FunQA_test": "unexpected_action",
                "clevrer": "object_existence moving_direction moving_count moving_attribute counterfactual_inference",
                "perception": "object_shuffle action_count state_change character_order",
                "sta": "action_localization",
                "scene_qa": "scene_transition",
                "nturgbd*": "fine_grained_pose",
                "vlnqa": "egocentric_navigation",
                "tvqa": "episodic_reasoning",
            }.items()
            for task in tasks.split()
        },
        video="video",
        prompt=_with_candidates,
        window=("start", "end"),
    ),
    "longvideobench": VideoDataset(
        hub_id="longvideobench/LongVideoBench",
        files={"validation-*.parquet": ""},
        video="video_path",
        prompt=lambda row: ask_for_choice(row["question"], _numbered_options(row)),
    ),
    "mlvu": VideoDataset(
        hub_id="MLVU/MVLU",
        files={
            f"{task}.json": task
            for task in (
                "1_plotQA",
                "2_needle",
                "3_ego",
                "4_count",
                "5_order",
                "6_anomaly_reco",
                "7_topic_reasoning",
                "8_sub_scene",
                "9_summary",
            )
        },
        video="video",
        prompt=_with_candidates,
    ),
}


class Conversations(NamedTuple):
    """What a copy of a data set holds.

    Attributes:
        rows: `{"messages"}`, one per question whose video is there; with their `"task"`, which is the name of their
            file, where the data set has a file for each.
        missing: Names of videos that rows ask about and the copy does not have.
    """

    rows: list[dict[str, Any]]
    missing: list[str]


def read_dataset(name: str, folder: Path) -> Conversations:
    """The questions of a local copy of a data set.

    Args:
        name: One of `DATASETS`.
        folder: The copy.

    Raises:
        BenchmarkError: No such data set or folder, rows of another schema, or not one question with its video.
    """
    if name not in DATASETS:
        raise BenchmarkError(f"unknown data set {name!r}: known are {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    if not folder.is_dir():
        raise BenchmarkError(
            f"there is no folder {folder}: download {dataset.hub_id} from the Hub and unpack it there"
        )
    videos = _videos_by_name(folder)
    rows, missing = [], []
    for path, below in _row_files(dataset, folder):
        for index, row in enumerate(_read_rows(path)):
            try:
                video = _find(videos, folder, str(row[dataset.video]), below)
                prompt = dataset.prompt(row)
            except (KeyError, TypeError, IndexError) as error:
                raise BenchmarkError(
                    f"row {index} of {path} is not of {dataset.hub_id}'s schema ({type(error).__name__}: {error}); it "
                    f"has {', '.join(row) if isinstance(row, Mapping) else type(row).__name__}"
                ) from error
            if video is None:
                missing.append(str(row[dataset.video]))
                continue
            shown = {"type": "video", "video": str(video)} | _window_of(dataset, row)
            content = [shown, {"type": "text", "text": prompt}]
            task = {"task": path.stem} if len(dataset.files) > 1 else {}
            rows.append({"messages": [{"role": "user", "content": content}]} | task)
    if not rows:
        raise BenchmarkError(
            f"{folder} has no question of {dataset.hub_id} with its video ({len(missing)} videos are missing): "
            f"expected {', '.join(list(dataset.files)[:3])} … and unpacked videos below it"
        )
    return Conversations(rows, missing)


def _window_of(dataset: VideoDataset, row: Row) -> dict[str, Any]:
    """The part of the video that a row asks about, as settings of a message's part."""
    columns = dict(zip(("video_start", "video_end"), dataset.window or (), strict=False))
    return {setting: row[column] for setting, column in columns.items() if row.get(column) is not None}


def _row_files(dataset: VideoDataset, folder: Path) -> Iterator[tuple[Path, str]]:
    for pattern, below in dataset.files.items():
        for path in sorted(folder.rglob(pattern)):
            yield path, below


def _read_rows(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        require("train", "Reading Parquet files", "datasets")
        import datasets

        try:
            return datasets.load_dataset("parquet", data_files=str(path), split="train").to_list()
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise BenchmarkError(f"{path} is not Parquet ({error}): download it again") from error
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON ({error}): download it again") from error
    return rows if isinstance(rows, list) else [rows]


def _videos_by_name(folder: Path) -> dict[str, list[Path]]:
    """Video files below a folder, by their name with and without suffix."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            for name in {path.name, path.stem}:
                found.setdefault(name, []).append(path.absolute())
    return found


def _find(videos: Mapping[str, list[Path]], folder: Path, name: str, below: str) -> Path | None:
    """The first video of a name below a folder called `below`, anywhere in the copy."""
    for path in videos.get(PurePath(name).name, []):
        parents = path.relative_to(folder.absolute()).parts[:-1]
        if not below or any(PurePath(part).match(below) for part in parents):
            return path
    return None

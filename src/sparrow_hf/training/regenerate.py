"""The target answers prompts. A draft is trained on these answers, because they are the text it has to predict.

Answers are written atomically, in JSON-lines shards. A stopped run continues with the first missing shard; existing
shards must be answers of the same target to the same rows, made with the same settings. `digests.sha256` holds the
digest of every file, which is checked when the answers are read. Processes of `accelerate launch` share the shards,
and together write the same files as one process.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from .._transformers import commit_of, name_of, uses_vllm_positions
from ..artifacts import (
    atomic_path,
    check_made_alike,
    remove_partial_files,
    tensor_digest,
    without_names,
    write_json,
    write_text,
)
from ..checksums import Digests, read_json
from ..data.answers import (
    MEDIA_FOLDER,
    PROVENANCE_FILE,
    REMEDY,
    digests_of,
    read_answers,
    read_skipped,
    skipped_list,
)
from ..data.datasets import Rows
from ..data.files import is_url
from ..data.messages import columns_of, media_digest, naming_row, rows_digest, split_answer
from ..data.prepare import FIXED_FRAMES, prepare_prompt, processor_digest, sampling_of, tokenizer_of
from ..errors import TrainingDataError
from ..generation.integration import follow
from ..modeling_sparrow import SparrowDraftModel
from ..resources import ran_out
from .batched_answers import generate_answers
from .data import as_row

__all__ = ["estimate_answer_bytes", "read_answers", "read_skipped", "regenerate"]

logger = logging.get_logger(__name__)

#: Fields of `provenance.json` that earlier versions did not write.
LATER_FIELDS = ("target_sha256", "draft_sha256", "prompts_sha256", "processor_sha256")
#: What an answer token takes in a shard, its id and its text together (English, a vocabulary of 150,000).
BYTES_PER_ANSWER_TOKEN = 12
#: Number of rows that an estimate reads.
ROWS_LOOKED_AT = 32


def regenerate(
    target: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Rows | Sequence[Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    *,
    draft: SparrowDraftModel | None = None,
    shard_size: int = 64,
    batch_size: int = 1,
    max_new_tokens: int = 1024,
    seed: int = 0,
    fps: float | None = None,
    max_frames: int | None = None,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    show_progress: bool = False,
    **generation_settings: Any,
) -> list[Path]:
    """Lets the target answer prompts and stores the answers beside them.

    Args:
        target: The target the draft will be trained for.
        processor: Its processor.
        rows: Prompts: conversations of any dialect, see `data/messages.py`. Assistant turns at the end are left out,
            because the target writes them.
        output_dir: Gets `answers-00000.jsonl`, … and `provenance.json`. Each line is the row with `answer_ids` (the
            tokens as written, end of turn included) and `answer` (their text). Videos and images are named by absolute
            path or URL; those given as bytes are stored in `media/`, and named by their paths in the folder.
        draft: A draft of this target that speeds up the writing.
        shard_size: Rows per file.
        batch_size: Prompts generated together, padded on the left. Those that do not fit into one batch (videos of
            different length, where a target's pixels have no mask), or into memory together, are answered one by one.
        max_new_tokens: Maximum length of an answer.
        seed: Seed of sampling. Each shard has its own random stream, so a resumed run writes the same answers. Where
            memory ran out, the sampled answers of that shard are others.
        fps, max_frames: Sampling of video files. They are stored in each row, `None` too, and used whenever it is read
            again.
        on_bad_row: `"refuse"` raises at the first bad row, or one that alone does not fit into memory; `"skip"` leaves
            it out and lists it with the reason in `answers-00000.skipped.json`, see [`read_skipped`]. A run that was
            refused may go on with `"skip"`.
        show_progress: Show a progress bar over the rows of this process.
        generation_settings: Further arguments of `generate()` (`do_sample`, `temperature`, …).

    Returns:
        All shards, in order. Those of other processes may still be missing.

    Raises:
        BindingError: The draft was made for another target.
        TrainingDataError: The folder holds answers of another target, to other rows or made with other settings, or a
            row is bad.
    """
    if draft is not None:
        # A draft of another target is refused before anything is written.
        follow(draft, target)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = generation_settings | {"max_new_tokens": max_new_tokens}
    sampling: dict[str, Any] = {
        name: value for name, value in (("fps", fps), ("max_frames", max_frames)) if value is not None
    }
    weights = target.state_dict()
    provenance = {
        "target": name_of(target.config),
        "target_revision": commit_of(target.config),
        "target_sha256": tensor_digest(weights),
        "transformers": transformers.__version__,
        "dtype": str(target.dtype),
        "processor_sha256": processor_digest(processor),
        # Files of earlier versions do not name it.
        "vllm_positions": uses_vllm_positions(target) or None,
        "settings": settings,
        "draft": None if draft is None else name_of(draft.config),
        "draft_sha256": None if draft is None else tensor_digest(draft.state_dict()),
        "video_sampling": sampling,
        "seed": seed,
        "shard_size": shard_size,
        "batch_size": batch_size,
        "rows": len(rows),
        "prompts_sha256": rows_digest(as_row(rows[index]) for index in range(len(rows))),
    }
    processes = PartialState()
    with processes.main_process_first():
        digests, described = digests_of(folder), folder / PROVENANCE_FILE
        if described.exists():
            if digests.known is None:
                # An earlier version's files are taken as they are.
                digests.warn_without()
                digests.write([described, *folder.glob("answers-*.json*"), *folder.glob(f"{MEDIA_FOLDER}/*")])
            digests.check(described)
            found = read_json(described, TrainingDataError, REMEDY)
            untold = {name: provenance[name] for name in LATER_FIELDS if name not in found and provenance[name]}
            # Of weights that are offloaded to disk, the digest does not say enough.
            is_whole = not any(weight.is_meta for weight in weights.values())
            wanted = without_names(found, provenance) if is_whole else provenance
            found |= untold
            are_others = found["prompts_sha256"] != provenance["prompts_sha256"]
            told = "the rows ask something else, or name files in another place: " if are_others else ""
            remedy = f"{told}choose another folder, or delete it"
            check_made_alike(folder, found, wanted, TrainingDataError, remedy)
            if untold:
                warnings.warn(
                    f"an earlier version wrote {described} without {' and '.join(untold)}: the answers there are kept "
                    "as this target's answers to these rows. If target or rows have changed since, delete the folder",
                    UserWarning,
                    stacklevel=2,
                )
                write_json(described, provenance, indent=2)
                digests.add(described)
        else:
            write_json(described, provenance, indent=2)
            digests.add(described)
        if processes.is_main_process:
            remove_partial_files(folder)
            digests.tidy()
    tokenizer = tokenizer_of(processor)
    settings = settings | {"tokenizer": tokenizer, "pad_token_id": tokenizer.pad_token_id}
    if draft is not None:
        settings["assistant_model"] = draft

    numbers = range(-(-len(rows) // shard_size))
    shards = [folder / f"answers-{number:05d}.jsonl" for number in numbers]
    own = numbers[processes.process_index :: processes.num_processes]
    missing = []
    for number in own:
        files = [path for path in (shards[number], skipped_list(shards[number])) if digests.lists(path)]
        if shards[number] in digests and all(path in digests for path in files):
            for path in files:
                digests.check(path)
        else:
            missing.append(number)
    parts = {number: range(len(rows))[number * shard_size : (number + 1) * shard_size] for number in missing}
    with tqdm(total=sum(map(len, parts.values())), unit="row", disable=not show_progress) as progress:
        for number, indices in parts.items():
            torch.manual_seed(seed + number)
            written: list[dict[str, Any]] = []
            skipped: list[tuple[int, str]] = []
            leave_out = skipped if on_bad_row == "skip" else None
            for first in range(0, len(indices), batch_size):
                batch = indices[first : first + batch_size]
                good: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
                for index in batch:
                    with _bad_row(index, leave_out):
                        good[index] = _prepare(processor, as_row(rows[index]), index, digests, sampling)
                together = _answer_together(target, [prompt for _, prompt in good.values()], settings)
                for place, (index, (row, prompt)) in enumerate(good.items()):
                    with _bad_row(index, leave_out):
                        ids = together[place] if together else generate_answers(target, [prompt], **settings)[0]
                        text = tokenizer.decode(ids, skip_special_tokens=True)
                        written.append(row | {"answer_ids": ids, "answer": text})
                progress.update(len(batch))
            if skipped:
                # Written first, so that an existing shard always has it.
                write_json(skipped_list(shards[number]), skipped)
                digests.add(skipped_list(shards[number]))
            write_text(shards[number], "".join(json.dumps(row) + "\n" for row in written))
            digests.add(shards[number])
    digests.tidy()
    return shards


def estimate_answer_bytes(rows: Rows | Sequence[Mapping[str, Any]], max_new_tokens: int) -> int:
    """About how much disk the shards take at most: every answer as long as it may be. From a sample of the rows."""
    step = max(1, len(rows) // ROWS_LOOKED_AT)
    looked_at = [as_row(rows[index]) for index in range(0, len(rows), step)]
    media: list[int] = []

    def size_of_media(value: Any) -> None:
        media.append(len(value) if isinstance(value, bytes) else 0)

    text = [len(json.dumps(dict(row), default=size_of_media, skipkeys=True)) for row in looked_at]
    per_row = (sum(text) + sum(media)) / max(1, len(looked_at))
    return round(len(rows) * (per_row + max_new_tokens * BYTES_PER_ANSWER_TOKEN))


def _prepare(
    processor: ProcessorMixin, row: Mapping[str, Any], index: int, digests: Digests, sampling: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row as it will be stored, and its processed prompt."""
    with naming_row(index):
        messages, _ = split_answer(row)
        prompt = dict(prepare_prompt(processor, row, **sampling))
        stored = columns_of(row) | sampling_of(row, **sampling) | {FIXED_FRAMES: True}
        stored["messages"] = [_storable(turn, digests) for turn in messages]
        # A column that JSON cannot hold is the row's fault, and found before the target has written anything.
        json.dumps(stored)
        return stored, prompt


def _storable(turn: Mapping[str, Any], digests: Digests) -> dict[str, Any]:
    """A turn as JSON can hold it: media by absolute path or URL, bytes as a file in `media/`."""
    if isinstance(turn["content"], str):
        return dict(turn)
    content = [
        part if part["type"] == "text" else part | {part["type"]: _storable_source(part[part["type"]], digests)}
        for part in turn["content"]
    ]
    return dict(turn) | {"content": content}


def _storable_source(source: Any, digests: Digests) -> Any:
    if isinstance(source, list):
        return [_storable_source(frame, digests) for frame in source]
    if isinstance(source, bytes):
        name = f"{MEDIA_FOLDER}/{media_digest(source)}"
        if (path := digests.folder / name) not in digests:
            with atomic_path(path) as partial:
                partial.write_bytes(source)
            digests.add(path)
        return name
    if not isinstance(source, str):
        raise TrainingDataError(
            f"answers are stored as text, which cannot hold a {type(source).__name__}: give videos and images as "
            "paths, URLs or the bytes of their files"
        )
    return source if is_url(source) else os.path.abspath(source)


def _answer_together(
    target: PreTrainedModel, prompts: Sequence[Mapping[str, Any]], settings: dict[str, Any]
) -> list[list[int]] | None:
    """The answers of a batch; `None` if its prompts must be answered one by one."""
    if len(prompts) < 2:
        return None
    try:
        return generate_answers(target, prompts, **settings)
    except TrainingDataError:
        reason = "prompts that do not fit into one batch are answered one by one"
    except Exception as error:
        if ran_out(error) != "memory":
            raise
        reason = "batches that do not fit into memory are answered one by one: smaller ones take less time"
    # Here, where the error no longer holds the memory of what was computed.
    logger.warning_once(reason)
    return None


@contextmanager
def _bad_row(index: int, leave_out: list[tuple[int, str]] | None) -> Iterator[None]:
    """Adds a row that is bad, or does not fit into memory, with the reason to a list; raises where there is none."""
    try:
        try:
            yield
        except Exception as error:
            if ran_out(error) != "memory":
                raise
            raise TrainingDataError(
                f"row {index}: memory ran out, for this row alone: leave it out with --on-bad-row skip "
                f"(on_bad_row='skip'), or go on where there is more memory ({' '.join(str(error).split())})"
            ) from error
    except TrainingDataError as error:
        # The row is not to blame for a full disk.
        if leave_out is None or ran_out(error) == "disk":
            raise
        leave_out.append((index, str(error)))

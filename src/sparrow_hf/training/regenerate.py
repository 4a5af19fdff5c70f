"""The target writes its own answers: the text a draft should be trained on is the text it will have to predict.

Answers come in JSON-lines shards that are written whole or not at all. A run that was stopped goes on with the first
missing shard; what is found must have been made with the same settings.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from ..errors import TrainingDataError

PROVENANCE_FILE = "provenance.json"


def regenerate(
    target: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    *,
    shard_size: int = 256,
    batch_size: int = 1,
    max_new_tokens: int = 1024,
    seed: int = 0,
    **generation_settings: Any,
) -> list[Path]:
    """Lets the target answer prompts and stores the answers beside them.

    Args:
        target: The target the draft will be trained for.
        processor: Its processor.
        rows: Prompts: `{"messages": [...]}`, JSON-serialisable, videos as paths. An assistant turn at the end is left
            out: it is what the target is to write.
        output_dir: Gets `answers-00000.jsonl`, … and `provenance.json`. Each line is the row with `answer_ids` (the
            tokens as written, end of turn included) and `answer` (their text).
        shard_size: Rows per file.
        batch_size: Prompts generated together, padded on the left.
        max_new_tokens: Longest answer.
        seed: Of sampling; each shard starts its own stream, so a resumed run writes what the whole one would have.
        generation_settings: Anything else `generate()` takes (`do_sample`, `temperature`, …).

    Returns:
        The shards, in order.

    Raises:
        TrainingDataError: The folder holds answers made with other settings, or the prompts cannot be batched.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = generation_settings | {"max_new_tokens": max_new_tokens}
    provenance = {
        "target": target.config._name_or_path,
        "target_revision": getattr(target.config, "_commit_hash", None),
        "transformers": transformers.__version__,
        "dtype": str(target.dtype),
        "settings": settings,
        "seed": seed,
        "shard_size": shard_size,
        "batch_size": batch_size,
        "rows": len(rows),
    }
    _check_provenance(folder / PROVENANCE_FILE, provenance)
    shards = []
    for number, start in enumerate(range(0, len(rows), shard_size)):
        shards.append(folder / f"answers-{number:05d}.jsonl")
        if shards[-1].exists():
            continue
        torch.manual_seed(seed + number)
        chunk = rows[start : start + shard_size]
        written = []
        for first in range(0, len(chunk), batch_size):
            written += _answer(target, processor, chunk[first : first + batch_size], settings)
        _write_atomically(shards[-1], "".join(json.dumps(row) + "\n" for row in written))
    return shards


def read_answers(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of all shards in a folder, in order; a dataset for [`SparrowTrainer`]."""
    for shard in sorted(Path(folder).glob("answers-*.jsonl")):
        with shard.open() as lines:
            yield from map(json.loads, lines)


def _answer(
    target: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[Mapping[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    from ..video import prepare_inputs

    prompts = []
    for row in rows:
        messages = list(row["messages"])
        if messages and messages[-1].get("role") == "assistant":
            messages.pop()
        prompts.append(prepare_inputs(processor, messages))
    answers = generate_answers(target, prompts, processor.tokenizer.pad_token_id, **settings)
    return [
        dict(row) | {"answer_ids": ids, "answer": processor.tokenizer.decode(ids, skip_special_tokens=True)}
        for row, ids in zip(rows, answers, strict=True)
    ]


def generate_answers(
    target: PreTrainedModel, prompts: Sequence[Mapping[str, Tensor]], pad_token_id: int, **settings: Any
) -> list[list[int]]:
    """Answers of several processed prompts from one batched `generate()` call, end of turn included.

    Args:
        target: The target.
        prompts: What its processor returned for each prompt.
        pad_token_id: Fills up short prompts on the left, and ends short answers.
        settings: Arguments of `generate()`.
    """
    inputs = {name: value.to(target.device) for name, value in left_pad(prompts, pad_token_id).items()}
    output = target.generate(**inputs, pad_token_id=pad_token_id, **settings)
    eos = target.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    answers = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:length])
    return answers


def left_pad(prompts: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of several processed prompts: ids and masks padded on the left, visual tensors one after the other.

    Raises:
        TrainingDataError: Visual tensors of different shapes cannot be joined; generate these prompts one by one.
    """
    if len(prompts) == 1:
        return dict(prompts[0])
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch: dict[str, Tensor] = {}
    for name, first in prompts[0].items():
        parts = [prompt[name] for prompt in prompts]
        if first.shape == prompts[0]["input_ids"].shape:
            # Masks and token types of padding are 0.
            fill = pad_token_id if name == "input_ids" else 0
            padded = [torch.nn.functional.pad(part, (length - part.shape[1], 0), value=fill) for part in parts]
            batch[name] = torch.cat(padded)
        elif all(part.shape[1:] == first.shape[1:] for part in parts):
            batch[name] = torch.cat(parts)
        else:
            raise TrainingDataError(
                f"the prompts' {name} have shapes {', '.join(str(tuple(part.shape)) for part in parts)} and cannot be "
                "batched: use batch_size=1 for this family"
            )
    return batch


def _check_provenance(path: Path, provenance: dict[str, Any]) -> None:
    """Writes how the answers are made, or checks that those already there were made the same way."""
    if not path.exists():
        _write_atomically(path, json.dumps(provenance, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    wrong = [
        f"{name}: {found.get(name)!r}, now {value!r}" for name, value in provenance.items() if found.get(name) != value
    ]
    if wrong:
        raise TrainingDataError(
            f"{path.parent} holds answers made differently ({'; '.join(wrong)}): choose another folder, or delete it"
        )


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)

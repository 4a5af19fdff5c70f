"""A reduced draft vocabulary: the most frequent tokens of the target's answers.

Most of a draft step is the target's head, and captions use a small part of its vocabulary. Verification does not
change: a token outside the draft's vocabulary is never drafted.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from ..artifacts import StoredTensors, atomic_path, tensor_digest
from ..checksums import SEAL, sealed, unseal, warn_without_digest
from ..errors import TrainingDataError, VocabularyError
from ..target_config import visual_token_ids

VOCABULARY_FILE = "vocabulary.safetensors"

#: Targets with so many tokens get a reduced draft vocabulary by default: of half of them, at most so many.
REDUCED_SIZE = 32_768
#: Share of the answers' tokens that a vocabulary which nobody asked for must cover.
MIN_COVERAGE = 0.995


@dataclass(frozen=True)
class TargetTokens:
    """The properties of a target's vocabulary that the choice depends on; no weights.

    Attributes:
        vocab_size: Ids its head scores; all others are of these.
        end_ids: Ids that end an answer: in every draft vocabulary.
        visual_ids: Visual placeholders: in none.
    """

    vocab_size: int
    end_ids: frozenset[int]
    visual_ids: frozenset[int]

    @classmethod
    def from_pretrained(cls, target: str) -> "TargetTokens":
        """From the configurations of a target, a folder or a Hub id.

        Raises:
            OSError: There is no such target.
        """
        try:
            generation_config = GenerationConfig.from_pretrained(target)
        except OSError:
            # A target without one ends where its configuration says.
            generation_config = None
        return cls.from_configs(AutoConfig.from_pretrained(target), generation_config)

    @classmethod
    def from_configs(cls, config: PreTrainedConfig, generation_config: GenerationConfig | None) -> "TargetTokens":
        """From the configurations of a loaded target."""
        text = config.get_text_config()
        # Some text configurations have no such field.
        ends = [getattr(each, "eos_token_id", None) for each in (text, generation_config)]
        flat = [token for end in ends for token in (end if isinstance(end, list) else [end]) if token is not None]
        # Placeholders may lie behind the ids that the head scores.
        scored = set(range(text.vocab_size))
        return cls(text.vocab_size, frozenset(scored & {*flat}), frozenset(scored & {*visual_token_ids(config)}))


def count_tokens(rows: Iterable[Mapping[str, Any]], vocab_size: int) -> Tensor:
    """How often each token of the target occurs in the answers.

    Args:
        rows: Rows with `answer_ids`, as [`read_answers`] gives them.
        vocab_size: Of the target.

    Returns:
        `(vocab_size,)` int64 counts.

    Raises:
        TrainingDataError: There is no row, one has no `answer_ids`, or holds an id outside the vocabulary.
    """
    counted: Counter[int] = Counter()
    index = -1
    for index, row in enumerate(rows):
        if "answer_ids" not in row:
            raise TrainingDataError(
                f"row {index} has no 'answer_ids' (it has {', '.join(sorted(row)) or 'nothing'}): count the answers "
                "that `sparrow regenerate` wrote"
            )
        ids = [int(token) for token in row["answer_ids"]]
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise TrainingDataError(
                f"row {index} holds the token ids {min(ids)} … {max(ids)}, but the target has 0 … {vocab_size - 1}: "
                "these are answers of another target"
            )
        counted.update(ids)
    if index < 0:
        raise TrainingDataError("there are no answers to count: give the folder that `sparrow regenerate` wrote")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    counts[torch.tensor(list(counted), dtype=torch.int64)] = torch.tensor(list(counted.values()), dtype=torch.int64)
    return counts


def choose_vocabulary(counts: Tensor, size: int, tokens: TargetTokens) -> Tensor:
    """The `size` most frequent ids, lower ids first among equals; ends of answers always in, placeholders never.

    Args:
        counts: `(V,)` from [`count_tokens`].
        size: `draft_vocab_size`.
        tokens: Of the target.

    Returns:
        `(size,)` int64 target ids, ascending: `draft_to_target`.

    Raises:
        VocabularyError: The target has no `size` ids to choose from, or more ends of answers than that.
    """
    most = len(counts) - len(tokens.visual_ids)
    if not max(len(tokens.end_ids), 1) <= size <= most:
        raise VocabularyError(
            f"a draft vocabulary of this target has {max(len(tokens.end_ids), 1)} … {most} tokens, found {size}"
        )
    rank = counts.clone()
    rank[sorted(tokens.end_ids)] = torch.iinfo(torch.int64).max
    rank[sorted(tokens.visual_ids)] = -1
    return rank.sort(descending=True, stable=True).indices[:size].sort().values


def default_vocabulary(
    tokens: TargetTokens, train: Iterable[Mapping[str, Any]] | None, held_out: Iterable[Mapping[str, Any]] | None
) -> tuple[Tensor | None, str]:
    """The vocabulary of a draft for which none was named: a reduced one where the head takes most of a draft step.

    It holds the most frequent tokens of the training answers, of those rows that have `answer_ids`, and must cover
    [`MIN_COVERAGE`] of the tokens in the held-out answers (in the training ones, if no held-out row has `answer_ids`).

    Args:
        tokens: Of the target, with [`REDUCED_SIZE`] tokens or more.
        train, held_out: The rows; `None` if they cannot be counted.

    Returns:
        `draft_to_target`, or `None` for all tokens; and a sentence that says what was chosen and why.

    Raises:
        TrainingDataError: A row has ids that the target does not have.
    """
    counts = _counts_of(train, tokens.vocab_size)
    if counts is None:
        return (
            None,
            "The draft proposes the whole vocabulary: the training rows hold no answer_ids that can be counted.",
        )
    chosen = choose_vocabulary(counts, min(REDUCED_SIZE, tokens.vocab_size // 2), tokens)
    measured, name = _counts_of(held_out, tokens.vocab_size), "held-out"
    if measured is None:
        measured, name = counts, "training"
    share = coverage(measured, chosen)
    told = f"{len(chosen):,} of {tokens.vocab_size:,} tokens, which cover {share:.3%} of the {name} answers"
    if share < MIN_COVERAGE:
        return None, f"The draft proposes the whole vocabulary: {told}, and {MIN_COVERAGE:.1%} are needed."
    return chosen, f"The draft proposes {told}; --vocabulary full keeps all."


def _counts_of(rows: Iterable[Mapping[str, Any]] | None, vocab_size: int) -> Tensor | None:
    """The counts of those rows whose answers are known token by token; `None` if there are none."""
    known = (row for row in rows or () if row.get("answer_ids") is not None)
    first = next(known, None)
    return None if first is None else count_tokens(chain([first], known), vocab_size)


def coverage(counts: Tensor, draft_to_target: Tensor) -> float:
    """Share of the counted tokens that a draft with this vocabulary can propose."""
    return float(counts[draft_to_target].sum() / counts.sum().clamp(min=1))


def save_vocabulary(
    path: str | os.PathLike[str], draft_to_target: Tensor, counts: Tensor, provenance: Mapping[str, Any]
) -> None:
    """Writes a vocabulary as one safetensors file, atomically, with the digest of what it holds.

    Args:
        path: The file: `draft_to_target` `(D,)` int64 and `counts` `(D,)` int64, how often each of them was written.
        draft_to_target: From [`choose_vocabulary`].
        counts: `(V,)` from [`count_tokens`].
        provenance: Further metadata: the target, the answers.
    """
    metadata = {
        "vocab_size": len(counts),
        "answer_tokens": int(counts.sum()),
        "covered_tokens": int(counts[draft_to_target].sum()),
        **provenance,
    }
    tensors = {"draft_to_target": draft_to_target.contiguous(), "counts": counts[draft_to_target]}
    described = {name: str(value) for name, value in metadata.items()} | {"tensors_sha256": tensor_digest(tensors)}
    with atomic_path(path) as partial:
        save_file(tensors, partial, sealed(described))


def load_vocabulary(path: str | os.PathLike[str], vocab_size: int | None = None) -> Tensor:
    """Reads `draft_to_target` `(D,)` int64 from a file of [`save_vocabulary`].

    Args:
        path: The file.
        vocab_size: Vocabulary of the target to use it with; by default of the one it was made for.

    Raises:
        VocabularyError: The file is no vocabulary: unreadable, not as it was written, of another dtype or shape, not
            ascending, or with ids the target does not have. Or it was made for a target of another size.
    """
    made = "make it again with `sparrow vocab`"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = StoredTensors([Path(path)])
        ids = tensors["draft_to_target"]
        if metadata.keys() & {SEAL, "tensors_sha256"}:
            metadata, has_digest = unseal(metadata)
            if not has_digest or metadata.get("tensors_sha256") != tensor_digest(tensors):
                raise ValueError("it is not what was written: its digest differs")
        else:
            warn_without_digest(Path(path))
        made_for = int(metadata.get("vocab_size", 0))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise VocabularyError(f"{path} cannot be read as a draft vocabulary ({error}): {made}") from error
    if ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids):
        raise VocabularyError(
            f"draft_to_target in {path} must be int64 and of shape (draft_vocab_size,), found {ids.dtype} of shape "
            f"{tuple(ids.shape)}: {made}"
        )
    if (ids.diff() <= 0).any():
        raise VocabularyError(f"draft_to_target in {path} must be ascending, without repetition: {made}")
    if vocab_size and made_for and vocab_size != made_for:
        raise VocabularyError(
            f"{path} was made for {metadata.get('target', 'a target')}, which has {made_for:,} tokens, and this "
            f"target has {vocab_size:,}: {made} from the answers of this target"
        )
    size = vocab_size or made_for or int(ids[-1] + 1)
    if ids[0] < 0 or ids[-1] >= size:
        raise VocabularyError(
            f"draft_to_target in {path} holds the ids {int(ids[0])} … {int(ids[-1])}, but the target has 0 … "
            f"{size - 1}: it was made for another target"
        )
    return ids

"""Runs an analysis and writes one record per prompt, so that it can be interrupted and continued."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .._transformers import name_of
from ..artifacts import check_made_alike, tensor_digest, write_json
from ..checksums import read_json, sealed
from ..data.messages import fingerprint
from ..data.prepare import processor_digest
from ..errors import AnalysisError, ImageError, TrainingDataError, VideoError
from ..generation.integration import follow
from ..hidden_states import HiddenStateCollector
from ..modeling_sparrow import SparrowDraftModel
from ..targets import TargetView
from .answered import AnsweredPrompt, Conversation, ProcessedPrompt, answer, process_conversation
from .attention import AttentionMass
from .internalization import InputSimilarity
from .removal import agreement, layer_grid, predicted_tokens, scores
from .retention import layers_of, retention
from .summary import summarize

#: Scores an answer: (its text, the reference) → a number; larger is better.
Score = Callable[[str, str], float]


def analyze(
    target: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    output: str | os.PathLike[str],
    *,
    draft: SparrowDraftModel | None = None,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 256,
    score: Score | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Analyses a target over several prompts; see [`measure`] for what is measured, `docs/analysis.md` for its use.

    Every prompt takes one answer, one forward, and one more forward per value of x; with a `score` also one answer per
    value of x. The analysis puts hooks on the target's layers and removes them, so nothing else may use it meanwhile.

    Args:
        target: A video LLM.
        processor: Its processor.
        conversations: The prompts.
        output: Folder of the records, one file per prompt. Run again, the analysis goes on with the first missing one.
        draft: A draft of the target, to measure its acceptance with fewer visual tokens.
        layers: Values of x, "visual tokens are hidden from layer x on"; by default nine from 0 to the depth.
        max_new_tokens: Longest answer, in tokens.
        score: Judges answers whose conversation has a reference.
        fps, max_frames: How densely to read video files.

    Returns:
        What [`~sparrow_hf.analysis.summary.summarize`] returns.

    Raises:
        AnalysisError: There is nothing to analyse, a conversation has no instruction or no visual tokens, some have
            no reference, or the folder holds records of other settings or prompts.
        UnsupportedTargetError: The target is of an architecture whose attention cannot be read.
        BindingError: The draft is another target's.
    """
    view, folder = TargetView(target), Path(output) / "prompts"
    if not conversations:
        raise AnalysisError("there are no prompts to analyse: name at least one")
    if score is not None and any(conversation.reference is None for conversation in conversations):
        raise AnalysisError("answers are to be scored, but some prompts have no 'reference': add it, or do not score")
    layers = layer_grid(len(view.layers)) if layers is None else sorted({*layers, len(view.layers)})
    if not 0 <= layers[0] <= layers[-1] <= len(view.layers):
        raise AnalysisError(f"layers must be 0 … {len(view.layers)} (the target's depth), found {layers}")
    if draft is not None:
        follow(draft, target)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "target": name_of(view.model.config),
        "target_sha256": tensor_digest(view.model.state_dict()),
        "processor_sha256": processor_digest(processor),
        "dtype": str(view.dtype),
        "draft": None if draft is None else tensor_digest(draft.state_dict()),
        "tree": None if draft is None else list(draft.config.tree_shape),
        "layers": layers,
        "max_new_tokens": max_new_tokens,
        "scored": score is not None,
        "fps": fps,
        "max_frames": max_frames,
    }
    records = []
    for index, conversation in enumerate(
        tqdm(conversations, desc="Analysing", unit="prompt", disable=not show_progress)
    ):
        path, made_from = folder / f"{index:05}.json", settings | {"conversation": digest_of(conversation)}
        if not path.exists():
            try:
                prompt = process_conversation(processor, conversation, fps=fps, max_frames=max_frames)
                answered = answer(target, prompt, max_new_tokens)
            except (AnalysisError, ImageError, TrainingDataError, VideoError) as error:
                raise AnalysisError(f"prompt {index}: {error}") from error
            judge = None if score is None else _judge(processor, score)
            measured = measure(view, answered, layers, max_new_tokens, draft=draft, score=judge)
            write_json(path, sealed({"made_from": made_from} | measured))
        # Read back, so that a resumed analysis uses exactly the same numbers.
        record = read_json(path, AnalysisError, "delete it and run the same command again, which keeps the rest")
        found = record.get("made_from", {})
        # Records of earlier versions do not name the processor.
        wanted = {name: value for name, value in made_from.items() if name in found or name != "processor_sha256"}
        check_made_alike(path, found, wanted, AnalysisError)
        records.append(record)
    return summarize(records)


def measure(
    view: TargetView,
    answered: AnsweredPrompt,
    layers: Sequence[int],
    max_new_tokens: int,
    *,
    draft: SparrowDraftModel | None = None,
    score: Callable[[list[int], ProcessedPrompt], float] | None = None,
) -> dict[str, Any]:
    """The record of one prompt, as JSON holds it.

    Args:
        view: The target.
        answered: The prompt and the target's answer.
        layers: Values of x for [`~sparrow_hf.analysis.removal.agreement`].
        max_new_tokens: What the answer was limited to.
        draft: A draft bound to the target.
        score: See [`~sparrow_hf.analysis.removal.scores`].

    Returns:
        `visual_tokens`, `text_tokens`, `answer_tokens`; `attention`: query → `(layers, heads, 3)` mass on instruction,
        visual and text rows; `similarity`: `visual` or `text` → `(layers,)`; `agreed`: x → tokens; `score` and
        `retention` (scores → share → `accepted` per round, `tokens`) where requested.
    """
    states = HiddenStateCollector(dict.fromkeys(layers_of(draft) if draft is not None else []))
    attention, similarity = AttentionMass(view, answered), InputSimilarity(view, answered)
    with attention.gathering(), similarity.gathering(), states.active() if draft is not None else nullcontext():
        expected = predicted_tokens(view, answered)
    num_visual = int(answered.is_visual.sum())
    record: dict[str, Any] = {
        "visual_tokens": num_visual,
        "text_tokens": answered.prompt_length - num_visual,
        "answer_tokens": len(answered.answer_ids),
        "attention": {query: mass.tolist() for query, mass in attention.mass.items()},
        "similarity": {kind: cosines.tolist() for kind, cosines in similarity.similarity.items()},
    }
    if draft is not None:
        # The states of a target that is spread over devices are on several of them.
        collected = {layer: states.take(layer).to(draft.device) for layer in layers_of(draft)}
        kept = retention(draft, answered, collected, attention.visual_scores, max_new_tokens)
        record["retention"] = {
            name: {f"{share:g}": rounds._asdict() for share, rounds in shares.items()} for name, shares in kept.items()
        }
        del collected, states
    record["agreed"] = _by_layer(agreement(view, answered, expected, layers))
    if score is not None:
        record["score"] = _by_layer(scores(view, answered, layers, max_new_tokens, score))
    return record


def digest_of(conversation: Conversation) -> str:
    """Fingerprint of a conversation; unchanged for those without `fps` and `max_frames`, so old records stay valid."""
    says_how = conversation.fps is not None or conversation.max_frames is not None
    return fingerprint(conversation if says_how else conversation[:2])


def _by_layer(figures: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): figure for layer, figure in figures.items()}


def _judge(processor: Any, score: Score) -> Callable[[list[int], ProcessedPrompt], float]:
    return lambda ids, prompt: score(processor.tokenizer.decode(ids, skip_special_tokens=True), prompt.reference or "")

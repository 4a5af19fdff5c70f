"""The answer to one question, plain, with a draft, or both compared. It is a line of JSON, as is a bad row's error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.generation import BaseStreamer

from .._transformers import attention_of, commit_of, unwrap
from ..artifacts import tensor_digest
from ..data.messages import ROW_INDEX, naming_row, split_answer, text_of
from ..data.prepare import prepare_prompt, processor_digest, readable_kind, to_target, tokenizer_of
from ..draft_inputs import visual_mask
from ..errors import CaptionError, MissingDependencyError, SparrowError
from ..generation.integration import follow
from ..loading import load_target, told_if_not_loaded, usable_dtype
from ..measurement import PLAIN, Arm, first_difference, measure, warm_up
from ..metrics import Run, pooled_tau
from ..modeling_sparrow import SparrowDraftModel
from ..resources import ran_out
from ..signals import raise_stop_in
from ..target_config import visual_token_ids
from ..testbed import named_or_built_in
from .sources import Question

DRAFT = "draft"
NO_DRAFT = "none"
"""What names no draft on the command line."""


def load_models(
    target: str | None,
    draft: str | None,
    family: str,
    processor: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin, SparrowDraftModel | None]:
    """A target, its processor and its draft.

    Args:
        target: Folder or Hub id; by default the built-in target of `family`, with its draft.
        draft: Folder or Hub id, or "none" for no draft. Needed with a target of one's own.
        processor, device, attention: See [`~sparrow_hf.loading.load_target`]. Built-in targets run on the CPU.
        dtype: "auto" is the checkpoint's own if the device computes well in it, else one in which it does.

    Raises:
        CaptionError: The draft is not named, or cannot be loaded.
        TargetLoadError: See [`~sparrow_hf.loading.load_target`].
    """
    remedy = f"name one with --draft, or plain generate() with --draft {NO_DRAFT}"
    target, draft, device = named_or_built_in(target, draft, device, family, CaptionError, remedy)
    model, its_processor = load_target(target, processor, dtype, device, attention=attention)
    if dtype == "auto" and (usable := usable_dtype(model.dtype, model.device)) != model.dtype:
        model = model.to(usable)
    if draft == NO_DRAFT:
        return model, its_processor, None
    with told_if_not_loaded("draft", draft, CaptionError):
        return model, its_processor, SparrowDraftModel.from_pretrained(draft).eval()


@dataclass
class Captioner:
    """Answers questions, one at a time.

    Args:
        target: The video LLM.
        processor: Its processor.
        draft: A draft of it; without one, `generate()` is plain.
        compare: Answer with plain `generate()` too, and compare text and time.
        fps, max_frames: How densely to read videos, see [`~sparrow_hf.data.prepare_prompt`].
        seed: Every answer starts from this seed.
        settings: Further arguments of `generate()`.

    Raises:
        BindingError: The draft was made for another target.
    """

    target: PreTrainedModel
    processor: ProcessorMixin
    draft: SparrowDraftModel | None
    compare: bool
    fps: float | None
    max_frames: int | None
    seed: int
    settings: dict[str, Any]
    _is_warm: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.draft is not None:
            follow(self.draft, self.target)
        self._arm = Arm(PLAIN) if self.draft is None else Arm(DRAFT, self.draft)
        self._visual_ids = visual_token_ids(unwrap(self.target).config)
        # Stop strings of the target's generation_config need the tokenizer.
        self._options = self.settings | {"tokenizer": tokenizer_of(self.processor)}

    @property
    def told(self) -> str:
        """What it runs on: dtype, device, attention, draft."""
        config, device = unwrap(self.target).config, self.target.device
        threads = f" (threads: {torch.get_num_threads()})" if device.type == "cpu" else ""
        dtype = str(self.target.dtype).removeprefix("torch.")
        tree = "" if self.draft is None else "-".join(map(str, self.draft.config.tree_shape))
        return f"{dtype} on {device}{threads}, {attention_of(config)} attention, " + (
            f"draft tree {tree}" if tree else "no draft"
        )

    def conditions(self, target: str, draft: str | None, question: str | None, in_file: bool) -> dict[str, Any]:
        """How answers are made. Only answers made alike stand in one file.

        Args:
            target, draft: Folders or Hub ids, as the user named them.
            question: What is asked about every video; `None` if rows ask.
            in_file: Whether the answers go to a file, which a later run may go on with. The digest of the target's
                weights, seconds of work for a large target, is in its lines only.
        """
        config = unwrap(self.target).config
        return {
            "target": target,
            "target_revision": commit_of(config),
            "target_sha256": tensor_digest(self.target.state_dict()) if in_file else None,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "attention": attention_of(config),
            "draft": draft,
            "draft_sha256": None if self.draft is None else tensor_digest(self.draft.state_dict()),
            "tree": None if self.draft is None else list(self.draft.config.tree_shape),
            "processor_sha256": processor_digest(self.processor),
            "question": question,
            "fps": self.fps,
            "max_frames": self.max_frames,
            "seed": self.seed,
            "settings": self.settings,
            "compare": self.compare,
        }

    def line(self, question: Question, streamer: BaseStreamer | None = None) -> dict[str, Any]:
        """The answer to a question, or what is wrong with its row.

        Args:
            question: The question.
            streamer: Is handed the text while it is written, if nothing is compared.

        Returns:
            `name`, `source`, `file`, `question`, and
            `text`: the answer without special tokens; `None` in a row with an error, as are all figures;
            `tokens`, `visual_tokens`, `truncated`: its length, the video's, whether `max_new_tokens` ended it;
            `seconds`, `tokens_per_second`: of the call of `generate()`, prefill included;
            `tau`: tokens per forward of the target after the prefill;
            `plain_seconds`, `speedup`, `differs_at`, `identical`: against plain `generate()`, with `compare`;
            `error`: one sentence, or `None`.

        Raises:
            SparrowError: No row can be answered: the target, the draft or the options are at fault.
            OSError: The disk is full.
        """
        try:
            # The line has the row's name already.
            row = question.row | {ROW_INDEX: None}
            with naming_row(None):
                readable_kind(row)
                asked = text_of(split_answer(row)[0][-1])
                inputs = prepare_prompt(self.processor, row, self.fps, self.max_frames)
        except MissingDependencyError:
            raise
        except Exception as error:
            # Whatever a damaged file makes a decoder or a processor raise.
            return self._bad_row(question, error)
        try:
            answer = self._answer(to_target(inputs, self.target), streamer)
        except (ValueError, IndexError, RuntimeError, MemoryError) as error:
            # What the package refuses, and a device in a state of error, would fail for every row.
            if isinstance(error, (SparrowError, getattr(torch, "AcceleratorError", ()))):
                raise
            return self._bad_row(question, error)
        return _named(question, asked) | answer | {"error": None}

    def _answer(self, inputs: Mapping[str, Any], streamer: BaseStreamer | None) -> dict[str, Any]:
        if self.compare and not self._is_warm:
            warm_up(self.target, [Arm(PLAIN), self._arm], inputs, self._options)
            self._is_warm = True
        compared: dict[str, Any] = dict.fromkeys(COMPARED)
        if self.compare:
            streamer = None
            plain, expected = measure(self.target, Arm(PLAIN), inputs, self._options, self.seed)
        run, tokens = measure(self.target, self._arm, inputs, self._options, self.seed, streamer=streamer)
        if self.compare:
            differs_at = first_difference(expected, tokens)
            compared = {
                "plain_seconds": round(plain.seconds, 4),
                "speedup": round(plain.seconds / run.seconds, 3),
                "differs_at": differs_at,
                "identical": differs_at is None,
            }
        return {
            "text": self.processor.decode(tokens, skip_special_tokens=True).strip(),
            "tokens": len(tokens),
            "visual_tokens": int(visual_mask(inputs["input_ids"], self._visual_ids).sum()),
            "truncated": self._is_truncated(tokens),
            "seconds": round(run.seconds, 4),
            "tokens_per_second": round(_rate(run), 2),
            "tau": round(pooled_tau([run]), 3),
        } | compared

    def _is_truncated(self, tokens: Sequence[int]) -> bool:
        eos = self.target.generation_config.eos_token_id
        return len(tokens) == self.settings["max_new_tokens"] and tokens[-1] not in (
            eos if isinstance(eos, list) else [eos]
        )

    def _bad_row(self, question: Question, error: Exception) -> dict[str, Any]:
        raise_stop_in(error)
        what, told = ran_out(error), " ".join(str(error).split())
        if what == "disk":
            raise error
        if what == "memory":
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            told = f"memory ran out, lower --max-frames or --fps ({told})"
        elif not isinstance(error, SparrowError):
            told = f"{type(error).__name__}: {told}"
        return _named(question, None) | dict.fromkeys(FIGURES) | {"error": told}


#: Figures of an answer, in the order of a line.
COMPARED = ("plain_seconds", "speedup", "differs_at", "identical")
FIGURES = ("text", "tokens", "visual_tokens", "truncated", "seconds", "tokens_per_second", "tau", *COMPARED)


def _named(question: Question, asked: str | None) -> dict[str, Any]:
    return {"name": question.name, "source": question.source, "file": question.file, "question": asked}


def _rate(run: Run) -> float:
    return run.new_tokens / run.seconds if run.seconds else 0.0

"""Typed errors. Each says what was found, what was expected and what to do; each also derives from the builtin a
caller would have caught anyway, so `except ValueError` keeps working."""

from collections.abc import Iterator


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those it was raised from or while they were handled."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


class SparrowError(Exception):
    """Base of every error this package raises on purpose."""


class DraftConfigError(SparrowError, ValueError):
    """A `SparrowDraftConfig` field is out of range, or two fields contradict each other."""


class DraftLoadError(SparrowError, OSError):
    """A draft checkpoint is truncated, incomplete, altered or not stored as safetensors."""


class OutputError(SparrowError, FileExistsError):
    """A model is to be written to a folder that holds another one."""


class BindingError(SparrowError, ValueError):
    """The draft does not fit this target: another hidden size, vocabulary, layer count or token ids."""


class VocabularyError(SparrowError, ValueError):
    """A reduced draft vocabulary is not an ascending list of the target's ids, or cannot have the requested size."""


class UnsupportedTargetError(SparrowError, ValueError):
    """Several tokens in one forward of the target may not give what one at a time gives, or it lacks a part."""


class UnsupportedGenerationError(SparrowError, ValueError):
    """An option of `generate()` cannot be combined with a Sparrow draft; raised before the prefill."""


class HiddenStateCaptureError(SparrowError, RuntimeError):
    """The output hooks did not get the requested positions (for example if the target was compiled before binding)."""


class AnalysisError(SparrowError, ValueError):
    """A prompt or a folder of results cannot be analysed: no visual tokens, no instruction, or other settings."""


class TransformersContractError(SparrowError, ImportError):
    """The installed transformers lacks, or has changed, an internal this package builds on."""


class MissingDependencyError(SparrowError, ImportError):
    """An optional dependency is absent; the message holds the exact install line."""


class VideoError(SparrowError, ValueError):
    """A video is missing, unreadable, empty or cut short."""


class ImageError(SparrowError, ValueError):
    """An image is missing or unreadable."""


class TargetLoadError(SparrowError, OSError):
    """A target, or its processor, cannot be loaded from the folder or Hub id on the command line."""


class DiskBudgetError(SparrowError, OSError):
    """A recording would take more disk space than allowed; complete rows stay and are used when it is continued."""


class CaptionError(SparrowError, ValueError):
    """Options of `sparrow generate` contradict each other, or its output holds answers made with other settings."""


class BenchmarkError(SparrowError, ValueError):
    """A benchmark cannot be run or continued: an unknown arm, no prompts, measurements under other conditions."""


class UnavailableArmError(BenchmarkError):
    """An arm of a benchmark is understood, but the target or what is installed cannot run it."""


class TrainingDataError(SparrowError, ValueError):
    """A training row cannot be trained on: no answer, placeholders without pixels, or a field of the wrong type."""


class MessagesError(TrainingDataError):
    """Messages are not understood: an unknown part or setting, a value that is none, a mark without its video."""


class TrainingOptionsError(SparrowError, ValueError):
    """Options of a training contradict each other, are unknown, or would overwrite an earlier training."""

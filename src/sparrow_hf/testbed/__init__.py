"""The built-in models: tiny video LLMs of real architectures, their drafts, and the rendered clips they know.

They work offline right after installation: `load()` gives the models, `make_clip()` a video they have not seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from transformers.utils import logging

from ..errors import SparrowError, TargetLoadError
from .families import FAMILIES, LLAVA_ONEVISION, QWEN2_5_VL, Family, family_of
from .nano import ASSETS, content_accuracy, load_target
from .world import EVALUATION_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS, Clip, make_clip

if TYPE_CHECKING:
    from ..modeling_sparrow import SparrowDraftModel

SHIPPED = {QWEN2_5_VL.name: ASSETS, LLAVA_ONEVISION.name: ASSETS / LLAVA_ONEVISION.name}
"""Folder of a family's `target` and `draft`."""


def load(family: str = QWEN2_5_VL.name) -> tuple[Any, Any, SparrowDraftModel]:
    """A family's trained target, its processor and its draft, in fp32 evaluation mode.

    Args:
        family: `"qwen2.5-vl"` or `"llava-onevision"`.

    Raises:
        TargetLoadError: There is no such family, or its models do not ship with this version.
    """
    from ..modeling_sparrow import SparrowDraftModel

    folder = shipped(family)
    shows_progress = logging.is_progress_bar_enabled()
    # The models are so small that progress bars are useless.
    logging.disable_progress_bar()
    try:
        target, processor = load_target(folder / "target")
        return target, processor, SparrowDraftModel.from_pretrained(folder / "draft").eval()
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def shipped(family: str = QWEN2_5_VL.name) -> Path:
    """The folder of a family's `target` and `draft`; raises as `load` does."""
    folder = SHIPPED.get(family)
    if folder is None:
        known = " and ".join(repr(name) for name in SHIPPED)
        raise TargetLoadError(f"The testbed has the families {known}, none called {family!r}.")
    missing = [part for part in ("target", "draft") if not (folder / part / "config.json").is_file()]
    if missing:
        raise TargetLoadError(
            f"The {' and the '.join(missing)} of {family!r} do not ship with this version of the package. "
            "`make testbed` in a clone of its repository trains them; load both from its output folder."
        )
    return folder


@overload
def named_or_built_in(
    target: str | None, draft: str | None, device: str | None, family: str
) -> tuple[str, str | None, str | None]: ...


@overload
def named_or_built_in(
    target: str | None,
    draft: str | None,
    device: str | None,
    family: str,
    without_draft: type[SparrowError],
    remedy: str = ...,
) -> tuple[str, str, str | None]: ...


def named_or_built_in(
    target: str | None,
    draft: str | None,
    device: str | None,
    family: str,
    without_draft: type[SparrowError] | None = None,
    remedy: str = "name one with --draft",
) -> tuple[str, str | None, str | None]:
    """The target, draft and device that were named, or the built-in ones where no target was.

    Built-in models run on the CPU, on one thread from here on: they are so small that a second one slows them down.

    Args:
        target, draft: Folders or Hub ids.
        device: Of the target.
        family: Of the built-in models.
        without_draft: What is raised if a target is named and no draft; by default it needs none.
        remedy: What to do about it, as the end of a sentence.

    Raises:
        TargetLoadError: There is no such family, or its models do not ship with this version.
    """
    if target is None:
        torch.set_num_threads(1)
        folder = shipped(family)
        return str(folder / "target"), draft or str(folder / "draft"), device or "cpu"
    if draft is None and without_draft is not None:
        raise without_draft(f"a target of your own needs a draft made for it: {remedy}")
    return target, draft, device


__all__ = [
    "EVALUATION_SEEDS",
    "FAMILIES",
    "QWEN2_5_VL",
    "TRAIN_SEEDS",
    "VALIDATION_SEEDS",
    "Clip",
    "Family",
    "content_accuracy",
    "family_of",
    "load",
    "load_target",
    "make_clip",
    "named_or_built_in",
    "shipped",
]

"""Every arm of the evidence: what it is called, what it is there for, and where it stands in a table.

An arm's key is its name in `sparrow bench`; `draft:NAME` is one of `drafts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from sparrow_hf.measurement import NO_DRAFT, PLAIN

from .drafts import SIBLING

DEFAULT, PAPER = "draft:sparrow@chain-5", "draft:paper@chain-5"
MSD, MSD_BLIND, ALL_ROWS = "draft:msd@chain-5", "draft:msd@chain-5/glimpse=0", "draft:all-rows@chain-5"
VISPEC, HIVIS = "draft:vispec@chain-5", "draft:hivis@chain-5"
PROMPT_LOOKUP, BLIND = "prompt-lookup", "draft:sparrow@chain-5/glimpse=0"
TUNED, TUNED_COMPILED = "draft:sparrow", "draft:sparrow/compiled"
PLAIN_GROUPED, PLAIN_COMPILED, PLAIN_BOTH = "plain-grouped", "plain-compiled", "plain-grouped-compiled"
NO_VATA, NO_IVSB, NO_MTP = "draft:paper@chain-5/glimpse=all", "draft:no-bridge@chain-5", "draft:no-mtp@chain-5"


class Role(Enum):
    """What an arm is measured for."""

    CONTROL = auto()  # what of a speed-up is the loop's
    BASELINE = auto()  # what plain `generate()` can do faster than by default
    RIVAL = auto()  # what users could take instead
    RECIPE = auto()  # the published recipe, whole and without its parts, and ours with what it leaves out
    GLIMPSE = auto()  # the default with other numbers of visual rows
    DEFAULT = auto()  # the draft that ships, with its chains and trees
    TREE = auto()  # the others' wide trees
    TUNED = auto()  # the draft that ships, with the chain that ships in its configuration


@dataclass(frozen=True)
class Entry:
    """What the evidence knows of an arm.

    Attributes:
        label: In tables. One that starts with `…` goes on from the label above it.
        role: What it is measured for.
        name: In sentences; the label where nothing is said.
        legend: In pictures; the name where nothing is said.
    """

    label: str
    role: Role
    name: str = ""
    legend: str = ""


#: In the order of every table.
ARMS = {
    NO_DRAFT: Entry("our loop without a draft", Role.CONTROL),
    PLAIN_GROUPED: Entry("plain, grouped attention", Role.BASELINE),
    PLAIN_COMPILED: Entry("plain, compiled", Role.BASELINE),
    PLAIN_BOTH: Entry("plain, grouped attention, compiled", Role.BASELINE),
    PROMPT_LOOKUP: Entry("prompt lookup", Role.RIVAL),
    f"assistant:{SIBLING}": Entry("a small sibling LM, blind", Role.RIVAL, "a small sibling"),
    f"specvlm:{SIBLING}": Entry("SpecVLM-like: the sibling on a sifted prompt", Role.RIVAL, "SpecVLM-like"),
    "draft:text-only@chain-5": Entry("text-only", Role.RIVAL),
    MSD: Entry("MSD-like", Role.RIVAL),
    MSD_BLIND: Entry(
        "MSD-like, visual rows deleted", Role.RIVAL, "MSD-like without its visual rows", "MSD-like, rows deleted"
    ),
    VISPEC: Entry("ViSpec-like", Role.RIVAL),
    HIVIS: Entry("HiViS-like", Role.RIVAL),
    PAPER: Entry("Sparrow as published", Role.RECIPE),
    NO_VATA: Entry("… without VATA", Role.RECIPE, "without VATA"),
    NO_IVSB: Entry("… without IVSB", Role.RECIPE, "without IVSB"),
    "draft:no-bridge@chain-5/glimpse=all": Entry("… without IVSB and VATA", Role.RECIPE),
    NO_MTP: Entry("… without MTP", Role.RECIPE, "without MTP"),
    ALL_ROWS: Entry("our recipe with all visual rows", Role.RECIPE, "all middle-layer rows"),
    BLIND: Entry("Sparrow (ours), no glimpse", Role.GLIMPSE),
    "draft:sparrow@chain-5/glimpse=16": Entry("… glimpse of 16", Role.GLIMPSE),
    DEFAULT: Entry("**Sparrow (ours), glimpse of 64**", Role.DEFAULT, "Sparrow, glimpse of 64"),
    "draft:sparrow@chain-5/glimpse=256": Entry("… glimpse of 256", Role.GLIMPSE),
    "draft:sparrow@chain-5/glimpse=all": Entry("… all rows", Role.GLIMPSE),
    "draft:sparrow@chain-7": Entry("**… chain of 7**", Role.DEFAULT),
    "draft:sparrow@30-4-8": Entry("… 30-4-8", Role.DEFAULT),
    "draft:sparrow@48-5-10": Entry("… 48-5-10", Role.DEFAULT),
    TUNED: Entry("**… its own chain**", Role.TUNED, "Sparrow as it ships"),
    TUNED_COMPILED: Entry("**… its own chain, compiled**", Role.TUNED, "Sparrow as it ships, compiled"),
    "draft:paper@48-5-10": Entry("Sparrow as published, 48-5-10", Role.TREE),
    "draft:msd@48-5-10": Entry("MSD-like, 48-5-10", Role.TREE),
    "draft:vispec@48-5-10": Entry("ViSpec-like, 48-5-10", Role.TREE),
    "draft:hivis@48-5-10": Entry("HiViS-like, 48-5-10", Role.TREE),
}
#: The arms of the pictures, in the order in which they get their colours.
CURVES = (DEFAULT, PAPER, ALL_ROWS, MSD, MSD_BLIND, VISPEC, HIVIS, PROMPT_LOOKUP)


def arms_of(*roles: Role) -> tuple[str, ...]:
    """The arms of some roles."""
    return tuple(arm for arm, entry in ARMS.items() if entry.role in roles)


def name_of(arm: str) -> str:
    """What a sentence calls an arm; plain `generate()` has no entry and keeps its name."""
    return arm if arm == PLAIN else ARMS[arm].name or ARMS[arm].label


def legend_of(arm: str) -> str:
    """What a picture calls an arm."""
    return ARMS[arm].legend or name_of(arm)


def in_our_loop(arm: str) -> bool:
    """Whether this package's loop decodes, with or without a draft, and not transformers' plain or assisted one."""
    return arm == NO_DRAFT or arm.startswith("draft:")

"""Shapes of draft trees: their text, and whether such a tree can be grown."""

import re
from typing import NamedTuple

from .config_fields import INTEGERS
from .errors import DraftConfigError


class TreeShape(NamedTuple):
    """A draft tree: nodes verified per round (root included), draft forwards per round, candidates per forward."""

    num_tree_nodes: int
    num_draft_levels: int
    beam_width: int


#: The trees of the paper (written there as nodes-levels-beam), the chain that docs/results.md compares drafts with,
#: and a root alone: the same loop without drafting, which measures the cost of the loop itself.
TREE_PRESETS: dict[str, TreeShape] = {
    "none": TreeShape(1, 0, 1),
    "chain-5": TreeShape(6, 5, 1),
    "30-4-8": TreeShape(30, 4, 8),
    "48-5-10": TreeShape(48, 5, 10),
}

_CHAIN = re.compile(r"chain-([0-9]{1,9})")
_TREE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})-([0-9]{1,9})")


def parse_tree_shape(text: str) -> TreeShape:
    """The shape that a text names: `none` (nothing is drafted), `chain-LEVELS`, or `NODES-LEVELS-BEAM`.

    Raises:
        DraftConfigError: It is none of these, or no such tree can be grown.
    """
    if text == "none":
        shape = TREE_PRESETS["none"]
    elif levels := _CHAIN.fullmatch(text):
        shape = chain(int(levels[1]))
    elif sizes := _TREE.fullmatch(text):
        shape = TreeShape(*map(int, sizes.groups()))
    else:
        raise DraftConfigError(
            f"unknown tree {text!r}: give one of {', '.join(TREE_PRESETS)}, chain-LEVELS, or NODES-LEVELS-BEAM "
            "such as 40-5-8"
        )
    check_tree_shape(shape)
    return shape


def chain(num_levels: int) -> TreeShape:
    """The chain of so many tokens; of none, the root alone."""
    return TreeShape(num_levels + 1, num_levels, 1)


def tree_name(shape: TreeShape) -> str:
    """The text that [`parse_tree_shape`] reads as this shape."""
    nodes, levels, beam = shape
    if beam > 1:
        return f"{nodes}-{levels}-{beam}"
    return f"chain-{levels}" if levels else "none"


def check_tree_shape(shape: TreeShape) -> None:
    """Raises [`DraftConfigError`] unless a tree of this shape can be grown."""
    nodes, levels, beam = shape
    limits = {name: INTEGERS[name][1] for name, size in shape._asdict().items() if size > INTEGERS[name][1]}
    if limits:
        most = ", ".join(f"{name} is at most {limit}" for name, limit in limits.items())
        raise DraftConfigError(f"a tree of this size does not fit into any memory: {most}, found {tuple(shape)}")
    if nodes < 1 or levels < 0 or beam < 1:
        raise DraftConfigError(f"a tree needs a root and a beam of at least one, found {tuple(shape)}")
    if (nodes == 1) != (levels == 0):
        raise DraftConfigError(
            f"num_tree_nodes counts the root, so one node means no draft level and the reverse, found {tuple(shape)}"
        )
    if beam == 1 and nodes != levels + 1:
        raise DraftConfigError(
            f"a chain (beam_width=1) of {levels} levels has {levels + 1} nodes with its root, found "
            f"num_tree_nodes={nodes}"
        )

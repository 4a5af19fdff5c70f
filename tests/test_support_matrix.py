"""`docs/support-matrix.md`: every family in every cell. `make support-matrix` runs the cells and writes the page."""

import os
import re
import sys
from pathlib import Path

import pytest
import transformers

from sparrow_hf.errors import UnsupportedGenerationError, UnsupportedTargetError
from sparrow_hf.targets import TargetView

from families import ALL_FAMILIES
from lossless import make_case, mismatch
from tiny_targets import Family

PAGE = Path(__file__).parents[1] / "docs" / "support-matrix.md"
BEGIN, END = "<!-- cells -->\n", "<!-- end of cells -->\n"

_SHAPES = {
    "chain": {"num_tree_nodes": 6, "num_draft_levels": 5, "beam_width": 1},
    "tree": {"num_tree_nodes": 30, "num_draft_levels": 4, "beam_width": 8},
}
_GREEDY, _SAMPLED = {"do_sample": False}, {"do_sample": True, "temperature": 0.9, "top_k": 20}
#: Column → what its cases have in common.
CELLS = {
    "chain, greedy": ("chain", "plain", _GREEDY),
    "chain, sampled": ("chain", "plain", _SAMPLED),
    "tree, greedy": ("tree", "plain", _GREEDY),
    "tree, sampled": ("tree", "plain", _SAMPLED),
    "second turn": ("tree", "second turn", _GREEDY),
    "chunked prefill": ("chain", "chunked", _GREEDY),
    "left padding": ("tree", "padded", _GREEDY),
}
DRAFTERS = ("random", "oracle", "adversary")


def cell(family: Family, name: str) -> str:
    """What a cell of the page says: how many of its cases are identical, of how many."""
    shape, prompt, decoding = CELLS[name]
    if prompt == "chunked" and not family.takes_chunks:
        return "–"
    cases = [
        make_case(
            100 * number,
            family=family.name,
            attn_implementation=attention,
            drafter=drafter,
            draft_fields=_SHAPES[shape],
            generate_kwargs=decoding,
            stop={"max_new_tokens": 24},
            inputs={"videos": 1, "num_frames": 4, "seed": number},
            prompt=prompt,
            draft_vocab_size=None,
        )
        for attention in family.attentions
        for number, drafter in enumerate(DRAFTERS)
    ]
    if not family.takes(prompt):
        for case in cases:
            with pytest.raises(UnsupportedGenerationError, match="the prompt is padded"):
                mismatch(case)
        return "refused"
    return f"{[mismatch(case) for case in cases].count(None)}/{len(cases)}"


def row(family: Family) -> str:
    """The row of a family, after its cases have run."""
    target = family.build_target()
    try:
        view = TargetView(target)
    except UnsupportedTargetError:
        return f"| {family.name} | {family.refused} | refused |" + " |" * (len(CELLS) - 1)
    kinds = ", ".join(dict.fromkeys(view.layer_kinds)).replace("_attention", "")
    marker = " ¹" if family.chains_only else ""
    return f"| {family.name}{marker} | {kinds} | {' | '.join(cell(family, name) for name in CELLS)} |"


@pytest.mark.full
@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
def test_every_cell_is_identical(family: Family) -> None:
    found = row(family)
    for identical, cases in re.findall(r"(\d+)/(\d+)", found):
        assert identical == cases, found
    if name := os.environ.get("SPARROW_SUPPORT_MATRIX"):
        with open(name, "a") as rows:
            rows.write(found + "\n")


def test_the_page_lists_every_family() -> None:
    page = PAGE.read_text()
    listed = re.findall(r"^\| ([\w-]+)", page.split(BEGIN)[1].split(END)[0], re.MULTILINE)[1:]
    missing = {family.name for family in ALL_FAMILIES} - set(listed)
    assert not missing, "make support-matrix writes the page"
    for identical, cases in re.findall(r"(\d+)/(\d+)", page):
        assert identical == cases


def write_page(rows: str) -> None:
    """Puts the rows of a run into the page."""
    head = f"| family | layers | {' | '.join(CELLS)} |\n|{'---|' * (len(CELLS) + 2)}\n"
    before, _, rest = PAGE.read_text().partition(BEGIN)
    version = f"transformers {transformers.__version__}:\n\n"
    PAGE.write_text(before + BEGIN + version + head + rows + END + rest.partition(END)[2])


if __name__ == "__main__":
    write_page(Path(sys.argv[1]).read_text())

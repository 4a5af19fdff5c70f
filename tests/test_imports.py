"""Imports go one way: the rooms above use those below, and rooms side by side share through what is below both."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparrow_hf

ROOT = Path(sparrow_hf.__file__).parent
#: Every folder and file of the package's top level.
ROOMS = sorted(path.stem for path in ROOT.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py")
#: Room → what it may not import, lazily or for types neither. `""`: every file that lies in no folder.
FORBIDDEN = {
    "": {"training", "captioning", "evaluation", "analysis", "testbed", "cli"},
    # Nothing but the errors lies below it.
    "_transformers": {*ROOMS} - {"_transformers", "errors"},
    "generation": {"measurement", "prefill", "training", "captioning", "evaluation", "analysis", "testbed", "cli"},
    "training": {"captioning", "evaluation", "analysis", "testbed", "cli"},
    "analysis": {"training", "captioning", "evaluation", "testbed", "cli"},
    "evaluation": {"training", "captioning", "analysis", "cli"},
    "captioning": {"training", "evaluation", "analysis", "cli"},
    # Nothing in it trains.
    "testbed": {"training", "captioning", "cli"},
}


def imported_rooms(file: Path) -> set[str]:
    """Folders and files of the package's top level that a file imports from."""
    package = ("sparrow_hf", *file.relative_to(ROOT).parts[:-1])
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            # `from .. import metrics` names a room itself.
            names += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("sparrow_hf.")}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_from_below(room: str) -> None:
    files = (ROOT / room).rglob("*.py") if room else ROOT.glob("*.py")
    found = {file.relative_to(ROOT).as_posix(): imported_rooms(file) & FORBIDDEN[room] for file in files}
    assert found and not {file: rooms for file, rooms in found.items() if rooms}


def test_an_import_of_every_kind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    (tmp_path / "training").mkdir()
    file = tmp_path / "training" / "file.py"
    file.write_text(
        "import sparrow_hf.cli\nfrom sparrow_hf.testbed import load\nfrom .. import metrics\nfrom .data import rows\n"
        "def late():\n    from ..evaluation.arms import Arms\n"
    )
    assert imported_rooms(file) == {"cli", "testbed", "metrics", "training", "evaluation"}


def imported_names(file: Path) -> set[str]:
    """Everything that a file imports, and every attribute it reads by its full name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}".removeprefix(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def test_research_is_never_imported() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert files and not [file for file in files if any("sparrow_research" in name for name in imported_names(file))]


def what_trains(file: Path) -> set[str]:
    """Names in a file that only a training needs."""
    training = re.compile(r"\boptim\b|Trainer\b|\bbackward$|\baccelerate\b")
    return set(filter(training.search, imported_names(file)))


def test_nothing_in_the_testbed_trains() -> None:
    files = sorted((ROOT / "testbed").rglob("*.py"))
    assert files and not [file for file in files if what_trains(file)]


def test_names_that_train_are_found(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "import numpy, sparrow_research.results, torch\nfrom accelerate import PartialState\nfrom torch import optim\n"
        "from ..training import SparrowTrainer\n"
        "def step(loss):\n    loss.backward()\n    torch.optim.AdamW([])\n    torch.no_grad()\n"
    )
    assert "sparrow_research.results" in imported_names(file)
    assert what_trains(file) == {
        *("accelerate.PartialState", "torch.optim", "training.SparrowTrainer"),
        *("loss.backward", "torch.optim.AdamW"),
    }


def imported_files(file: Path) -> Iterator[Path]:
    """Files of the package that a file imports when it is imported itself (not within functions, not for types)."""
    waiting: list[ast.stmt] = list(ast.parse(file.read_text()).body)
    for node in waiting:
        if isinstance(node, (ast.If, ast.Try)) and "TYPE_CHECKING" not in ast.unparse(node):
            waiting += node.body + node.orelse
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            # `from . import hub` names a file, `from .hub import find_file` something in one.
            found = [folder / f"{alias.name}.py", folder / alias.name / "__init__.py", folder.with_suffix(".py")]
            yield next((path for path in found if path.exists()), folder / "__init__.py")


def test_no_imports_run_in_a_circle() -> None:
    graph = {file: set(imported_files(file)) - {file} for file in ROOT.rglob("*.py")}
    # The package's front imports everything, and what names it means one of its attributes.
    front = ROOT / "__init__.py"
    order = list(TopologicalSorter({file: found - {front} for file, found in graph.items()}).static_order())
    assert order.index(ROOT / "errors.py") < order.index(ROOT / "generation" / "decoding.py") < order.index(front)

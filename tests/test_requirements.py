"""The requirements of `pyproject.toml`, the pins of the locks, and the imports of the code agree."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"dev": "dev", "full": "full", "floor": "test"}


def requirements(extra: str | None = None) -> list[Requirement]:
    """Direct requirements of the package and of an extra, the extras that it names included."""
    found = [] if extra else [Requirement(line) for line in PROJECT["dependencies"]]
    for line in PROJECT["optional-dependencies"][extra] if extra else []:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            found += [each for other in sorted(requirement.extras) for each in requirements(other)]
        else:
            found.append(requirement)
    return found


def pins(lock: str) -> dict[str, list[Version]]:
    """Name → versions: some packages have several, for different versions of Python."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines():
        if match := re.match(r"(\S+)==(\S+) ", line):
            name, version = match.groups()
            found.setdefault(canonicalize_name(name), []).append(Version(version))
    return found


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_pins_every_requirement_within_its_bounds(lock: str) -> None:
    pinned = pins(lock)
    for requirement in requirements() + requirements(EXTRAS[lock]):
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement.name} is not in requirements/{lock}.txt: run `make lock`"
        for version in versions:
            assert requirement.specifier.contains(version), (
                f"{requirement} in requirements/{lock}.txt: run `make lock`"
            )


def test_the_floor_is_what_pyproject_says() -> None:
    pinned = pins("floor")
    for requirement in requirements() + requirements("test"):
        lowest = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        assert len(lowest) == 1, f"{requirement.name} needs a lower bound"
        assert min(pinned[canonicalize_name(requirement.name)]) == lowest[0]


def test_the_full_lock_is_the_dev_lock_and_more() -> None:
    dev, full = pins("dev"), pins("full")
    assert {name: full[name] for name in dev} == dev


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_names_hashes_and_no_index(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    assert "://" not in text and "--index" not in text and "--extra-index" not in text and "--find-links" not in text
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_the_hooks_check_as_make_quality_does() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff-pre-commit\n.*\n *rev: v(\S+)", hooks) == [str(each) for each in pins("dev")["ruff"]]
    (checked,) = re.findall(r"/mypy (.+)", (ROOT / "Makefile").read_text())
    assert re.findall(r"/mypy (.+)", hooks) == [checked]


#: Room → the extras whose packages its files import at once, and those that they import where they are needed. `""` is
#: every file that lies in no folder: of these, `_transformers` and `generation`, the engine is made.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "": (set(), set()),
    "plotting.py": (set(), {"plot"}),
    "_transformers": (set(), set()),
    "generation": (set(), set()),
    "data": (set(), {"video", "train"}),
    "training": ({"train"}, set()),
    "captioning": (set(), {"video"}),
    "evaluation": ({"cli"}, {"train"}),
    "analysis": ({"cli"}, {"plot"}),
    "testbed": ({"video"}, set()),
    "cli": ({"cli"}, {"train"}),
}


def imports(tree: ast.AST, at_once: bool = True) -> Iterator[tuple[str, bool]]:
    """Names of the packages that a file imports, each with whether an import of the file imports it too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], at_once
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from imports(node, at_once and not for_types and not isinstance(node, (ast.FunctionDef, ast.Lambda)))


modules_of = cache(packages_distributions)


def undeclared(path: Path, tree: ast.AST) -> set[str]:
    """What a file of the package imports though neither the core nor an extra of its room declares it.

    Args:
        path: Relative to the package's folder.
    """
    room = path.name if path.name in ROOMS else path.parts[0] if len(path.parts) > 1 else ""
    at_once, later = ROOMS[room]
    distributions = modules_of()
    found = set()
    for name, is_at_once in set(imports(tree)):
        extras = at_once if is_at_once else at_once | later
        declared = {canonicalize_name(each.name) for extra in (None, *extras) for each in requirements(extra)}
        owners = set(map(canonicalize_name, distributions.get(name, [])))
        if name != "sparrow_hf" and name not in sys.stdlib_module_names and not declared & owners:
            found.add(name)
    return found


def test_every_import_is_declared_by_what_its_room_needs() -> None:
    source = ROOT / "src" / "sparrow_hf"
    paths = [path.relative_to(source) for path in source.rglob("*.py")]
    found = {path.as_posix(): undeclared(path, ast.parse((source / path).read_text())) for path in paths}
    assert found and not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "path, line, refused",
    [
        ("modeling_sparrow.py", "import peft", {"peft"}),
        ("modeling_sparrow.py", "def late():\n    from tqdm import tqdm", {"tqdm"}),
        ("modeling_sparrow.py", "import safetensors.torch, numpy, os", set()),
        ("data/video.py", "import av", {"av"}),
        ("data/video.py", "def late():\n    import av, matplotlib", {"matplotlib"}),
        ("plotting.py", "if TYPE_CHECKING:\n    import matplotlib", set()),
        ("plotting.py", "import matplotlib.figure", {"matplotlib"}),
        ("training/trainer.py", "import accelerate, typer", {"typer"}),
        ("cli/train.py", "import typer, yaml", {"yaml"}),
    ],
)
def test_an_import_that_a_room_may_not_have_is_found(path: str, line: str, refused: set[str]) -> None:
    assert undeclared(Path(path), ast.parse(line)) == refused

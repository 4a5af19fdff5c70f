"""The requirements of `pyproject.toml`, the pins of the locks, and the imports of the code agree."""

import ast
import re
import sys
import tomllib
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


def test_every_import_is_declared() -> None:
    declared = {canonicalize_name(each.name) for extra in (None, "video", "plot") for each in requirements(extra)}
    distributions = packages_distributions()
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
    undeclared = {
        name: distributions.get(name)
        for name in imported - set(sys.stdlib_module_names) - {"sparrow_hf"}
        if not declared.intersection(map(canonicalize_name, distributions.get(name, [])))
    }
    assert not undeclared

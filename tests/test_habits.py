"""Files of the repository that name the same thing agree on it: versions, make targets, versions of Python."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sparrow_hf

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "tests.yml"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (sparrow_hf.__version__, str(citation["date-released"]))
    assert citation["version"] == sparrow_hf.__version__


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "RELEASE.md", "README.md", "docs/compatibility.md"])
def test_the_make_targets_that_a_page_names_exist(name: str) -> None:
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE))
    assert named and {first or second for first, second in named} <= TARGETS


def test_hosted_ci_runs_make_on_every_version_of_python_admitted() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    pinned = jobs["pinned"]["strategy"]["matrix"]["include"]
    assert commands == ["make ${{ matrix.targets }} PYTHON=python", "make canary PYTHON=python"]
    assert [each["python"] for each in pinned if "test" in each["targets"].split()] == pythons
    assert [each["python"] for each in pinned if each["targets"] == "floor"] == pythons[:1]
    assert jobs["canary"]["strategy"]["matrix"]["python"] == pythons
    assert {target for each in pinned for target in each["targets"].split()} | {"canary"} <= TARGETS


def test_pre_commit_formats_as_the_lock_does() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (repo for repo in repos if repo["repo"].endswith("ruff-pre-commit"))
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "requirements" / "dev.txt").read_text(), re.MULTILINE)
    assert pinned and ruff["rev"] == f"v{pinned[1]}"

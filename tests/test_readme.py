"""What the README shows runs, and what the documentation links to exists."""

import re
import shlex
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import TrainingArguments
from typer.main import get_command

from sparrow_hf.cli.commands import app
from sparrow_hf.cli.generate import SAMPLING
from sparrow_hf.training.options import describe_options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Its prompts are text.
WITHOUT_VIDEOS = ROOT / "docs" / "language.md"


def commands(page: Path) -> list[list[str]]:
    """The `sparrow` commands in the blocks of a page, as words after `sparrow`."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.strip().startswith("sparrow ")]


def options_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_the_first_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], "README.md", "exec"), {})
    *caption, figure = capsys.readouterr().out.strip().splitlines()
    assert len(" ".join(caption).split()) > 30
    assert float(figure.split()[0]) > 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    missing = []
    for link in links:
        name, _, heading = link.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in headings(file)):
            missing.append(link)
    assert not missing


def headings(page: Path) -> set[str]:
    """What links call the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_listed() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\(([^)]+\.md)\)", index))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_name_options_that_exist(page: Path) -> None:
    verbs = get_command(app).commands
    of_transformers = {field.name for field in fields(TrainingArguments)}
    for verb, *words in commands(page):
        known = {name for each in verbs[verb].params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
        if verb == "train":
            own = {name for options in describe_options().values() for name, *_ in options}
            known = own | {f"--{name.replace('_', '-')}" for name in of_transformers} | {"--config"}
        assert options_of(words) <= known


def test_drafts_are_trained_on_the_frames_that_generate_reads() -> None:
    with_videos = [words for page in PAGES if page != WITHOUT_VIDEOS for words in commands(page)]
    told = [dict(pairwise(words)) for words in with_videos if words[0] == "regenerate"]
    assert told
    assert {(float(options["--fps"]), int(options["--max-frames"])) for options in told} == {SAMPLING}

"""What runs in an environment that holds the core dependencies and some extras, and what it says without the others.

The environment is the installed one in which a subprocess does not see the other distributions, nor their metadata.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sparrow_hf
from sparrow_hf import extras

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = Path(sparrow_hf.__file__).parents[1]

HIDE = """
import sys


class Without:
    '''A finder that does not see some packages and distributions.'''

    def __init__(self, finder, modules, distributions):
        self.finder, self.modules, self.distributions = finder, modules, distributions

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.modules else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        for found in getattr(self.finder, "find_distributions", lambda context: ())(context):
            if found.metadata["Name"].lower().replace("_", "-") not in self.distributions:
                yield found


def hide(modules, distributions):
    sys.meta_path[:] = [Without(finder, modules, distributions) for finder in sys.meta_path]
    assert not modules & {name.partition(".")[0] for name in sys.modules}
"""

GENERATES = """
import sys, torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration
before = set(sys.modules)
import sparrow_hf
print(*sorted(set(sys.modules) - before))
from sparrow_hf import SparrowDraftModel

torch.manual_seed(0)
target = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                      num_attention_heads=2, pad_token_id=0, eos_token_id=1)).eval()
draft = SparrowDraftModel.from_target(target).eval()
ids = torch.tensor([[5, 6, 7]])
plain = target.generate(ids, max_new_tokens=8)
assert torch.equal(target.generate(ids, max_new_tokens=8, assistant_model=draft), plain)
assert draft.last_generation.rounds
assert type(AutoModel.from_config(draft.config)) is SparrowDraftModel
from sparrow_hf.extras import EXTRAS
print(*set(sum(EXTRAS.values(), ())) & set(sys.modules))
try:
    import sparrow_hf.training
except sparrow_hf.errors.MissingDependencyError as error:
    print(error)
try:
    import sparrow_hf.cli
    sparrow_hf.cli.main()
except SystemExit as end:
    print(end.code)
"""


def packages_with(*wanted: str) -> set[str]:
    """Distributions that `pip install` brings with some extras, what they need included."""
    todo = [Requirement(line) for line in PROJECT["dependencies"]]
    todo += [Requirement(line) for extra in wanted for line in PROJECT["optional-dependencies"][extra]]
    found: set[str] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for each in map(Requirement, lines):
            if each.marker is None or any(
                each.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})
            ):
                todo.append(each)
    return found


def run_with(program: str, *wanted: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a program where only the core, the `wanted` extras and what they need are installed.

    Args:
        without: Import names that are hidden besides: what is missing, though a dependency may bring it.
    """
    kept = packages_with(*wanted)
    modules = packages_distributions()
    hidden = {name for name, owners in modules.items() if not kept & set(map(canonicalize_name, owners))}
    hidden = (hidden - {"sparrow_hf", "_distutils_hack", "pkg_resources", "sitecustomize"}) | set(without)
    distributions = {canonicalize_name(owner) for name in hidden for owner in modules.get(name, [])} - {"sparrow-hf"}
    shared = {canonicalize_name(owner) for name in set(modules) - hidden for owner in modules[name]}
    program = f"{HIDE}\nhide({hidden!r}, {distributions - shared!r})\n{program}"
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_the_extras_are_those_of_pyproject() -> None:
    distributions = packages_distributions()
    for extra, packages in extras.EXTRAS.items():
        declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
        assert {canonicalize_name(distributions[name][0]) for name in packages} == declared
    assert PROJECT["optional-dependencies"]["all"] == [f"sparrow-hf[{','.join(extras.EXTRAS)}]"]


def test_the_core_brings_none_of_the_extras() -> None:
    assert not packages_with() & {"peft", "datasets", "accelerate", "av", "torchvision", "pillow", "matplotlib"}


def test_the_engine_runs_with_the_core_alone() -> None:
    """And the other rooms say what to install; none of the packages of the extras is imported by anybody.

    `import sparrow_hf` imports nothing that transformers does not, nor any room of ours that only some calls need.
    """
    done = run_with(GENERATES, without=("typer", "rich"))
    assert done.returncode == 0, done.stderr
    new, imported, training, *command = done.stdout.splitlines()
    packages = {name.partition(".")[0] for name in new.split()}
    assert packages - set(sys.stdlib_module_names) == {"sparrow_hf", "transformers"}
    rooms = {name.split(".")[1] for name in new.split() if name.startswith("sparrow_hf.")}
    assert "modeling_sparrow" in rooms
    later = {"training", "evaluation", "analysis", "testbed", "cli", "data", "plotting", "conversion", "loading"}
    assert not rooms & later
    # transformers' own dependencies.
    assert set(imported.split()) <= {"tqdm", "yaml", "tokenizers"}
    assert re.fullmatch(r'Training a draft needs accelerate.*pip install "\.\[train\]"', training)
    assert command == ["2"]
    assert re.fullmatch(
        r'Error: The sparrow command needs rich and typer.*pip install "\.\[cli\]"', done.stderr.strip()
    )


@pytest.mark.full
def test_videos_are_read_with_the_extra_video() -> None:
    program = """
from pathlib import Path
import tempfile
from sparrow_hf.data import prepare_inputs, read_video
from sparrow_hf.testbed import EVALUATION_SEEDS, make_clip
from sparrow_hf.testbed.nano import build_processor

with tempfile.TemporaryDirectory() as folder:
    clip = make_clip(Path(folder) / "clip.mp4", EVALUATION_SEEDS[0], 32)
    frames, metadata = read_video(Path(folder) / "clip.mp4")
    assert frames.shape[1:] == (64, 64, 3)
    assert "pixel_values_videos" in prepare_inputs(build_processor(), clip.messages)
"""
    done = run_with(program, "video", without=("typer", "rich"))
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_a_draft_is_trained_with_the_extra_train() -> None:
    program = """
from sparrow_hf import training
from sparrow_hf.training import lora, options, recording, regenerate, run
options.parse_options(["--target", "a", "--train", "b", "--output", "c", "--use-cpu", "true"])
"""
    done = run_with(program, "train", without=("typer", "rich"))
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_the_command_has_its_verbs_with_the_extra_cli() -> None:
    """Its help names them all, and a verb that needs more says what."""
    program = """
import contextlib, io, sys
from sparrow_hf.cli import main

for arguments in %r:
    sys.argv, told = ["sparrow", *arguments], io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            main()
    except SystemExit as end:
        print([end.code or 0, told.getvalue()])
"""
    rows = ["--target", "a", "--prompts", "b", "--output", "c"]
    answers = ["--target", "a", "--answers", "b", "--output", "c"]
    needs = {
        ("train", "--help"): "train",
        ("regenerate", *rows): "train",
        ("record", *answers): "train",
        ("vocab", *answers): "train",
        ("analyze", *rows): "train",
        ("demo",): "video",
    }
    done = run_with(program % [["--help"], *map(list, needs)], "cli")
    assert done.returncode == 0, done.stderr
    (code, listing), *told = map(ast.literal_eval, done.stdout.splitlines())
    assert code == 0
    for verb in ("demo", "train", "regenerate", "record", "vocab", "convert", "bench", "analyze", "doctor"):
        assert re.search(rf"\b{verb}\b", listing)
    assert len(told) == len(needs)
    for extra, (code, sentence) in zip(needs.values(), told, strict=True):
        assert code == 2
        assert re.fullmatch(rf'Error: .* needs .*pip install "\.\[{extra}\]"', sentence.strip())

"""The one room that names what is private or renamed in transformers, and its contract with the installed version."""

import ast
import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers
from transformers.generation import GenerationMixin

import sparrow_hf
from sparrow_hf import SparrowDraftModel, _transformers
from sparrow_hf._transformers import CACHE, DECODER_LAYERS, contract
from sparrow_hf.errors import TransformersContractError

from families import FAMILIES
from tiny_targets import Family

SOURCE = Path(sparrow_hf.__file__).parent
ROOM = SOURCE / "_transformers"

#: Private names of other libraries, and one of the standard library that is public.
OTHERS = {
    "_actions",
    "_asdict",
    "_check_value",
    "_compiled_call_impl",
    "_dynamo",
    "_exit",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_get_value",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
}
#: Renamed between versions, or inside a cache, its layers or outputs.
NAMES_OF_THE_ROOM = {
    "past_key_values",
    "activate_past_recording",
    "crop",
    "cumulative_length",
    "BaseModelOutputWithPast",
    "GenerateDecoderOnlyOutput",
}
#: Modules of transformers whose names are documented for users.
DOCUMENTED_MODULES = {
    "transformers.generation",
    "transformers.image_utils",
    "transformers.utils",
    "transformers.video_utils",
}


# -- one room knows ---------------------------------------------------------------------------------------------------


def own_names(trees: list[ast.AST]) -> set[str]:
    """Private names that the sources define themselves."""
    found = {"_transformers"}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__setattr__":
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return found


def names_for_the_room(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Names in a file that only `_transformers/` may use, each with its line."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    looked_up = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr")
        for argument in node.args
    }
    for node in ast.walk(tree):
        name, may_be_private = "", True
        if isinstance(node, ast.Attribute):
            name = node.attr
            # `mapping.keys()` is a dictionary's, `layer.keys` a cache's.
            if name == "keys" and id(node) not in called:
                yield f"line {node.lineno}: .keys of a cache's layer"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name, may_be_private = node.value, id(node) in looked_up
        elif isinstance(node, (ast.keyword, ast.arg)):
            name = node.arg or ""
        elif isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            if node.module not in DOCUMENTED_MODULES:
                yield f"line {node.lineno}: from {node.module}"
        is_private = may_be_private and name.startswith("_") and not name.startswith("__")
        if name in NAMES_OF_THE_ROOM or (is_private and name not in own | OTHERS):
            yield f"line {node.lineno}: {name}"


def test_no_other_room_names_what_is_private_or_renamed() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py") if ROOM not in path.parents}
    own = own_names(list(trees.values()))
    found = {path.name: list(names_for_the_room(tree, own)) for path, tree in trees.items()}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "line",
    [
        "outputs = target._prefill(ids)",
        "target._prefill = ours",
        "with target._optimize_model_for_decode(): pass",
        "length = config._mask_length",
        "name = getattr(config, '_commit_hash', None)",
        "model(past_key_values=cache)",
        "kwargs['past_key_values']",
        "def forward(past_key_values): pass",
        "keys = cache.layers[0].keys",
        "cache.crop(-1)",
        "from transformers.cache_utils import DynamicLayer",
        "from transformers.models.llama.modeling_llama import LlamaDecoderLayer",
        "output = transformers.generation.GenerateDecoderOnlyOutput()",
    ],
)
def test_a_name_in_another_file_is_found(line: str) -> None:
    tree = ast.parse(line)
    assert list(names_for_the_room(tree, own_names([tree])))


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_check() -> Iterator[None]:
    _transformers.contract_breaches.cache_clear()
    yield
    _transformers.contract_breaches.cache_clear()


def test_the_installed_version_keeps_the_contract(fresh_check: None) -> None:
    assert _transformers.contract_breaches() == ()


def broken_methods() -> Iterator[Any]:
    for name, arguments in contract._METHODS.items():
        yield pytest.param(GenerationMixin, name, None, f"GenerationMixin.{name} is missing", id=f"no-{name}")
        for argument in sorted(arguments):
            message = f"GenerationMixin.{name} takes no {argument}"
            yield pytest.param(GenerationMixin, name, argument, message, id=f"{name}-without-{argument}")
    for layer in DECODER_LAYERS.values():
        yield pytest.param(layer, "forward", CACHE, f"{layer.__name__}.forward takes no {CACHE}", id=layer.__name__)


@pytest.mark.parametrize("kind, name, argument, message", list(broken_methods()))
def test_what_is_missing_is_named(
    kind: type, name: str, argument: str | None, message: str, monkeypatch: pytest.MonkeyPatch, fresh_check: None
) -> None:
    if argument is None:
        monkeypatch.delattr(kind, name)
    else:
        found = inspect.signature(getattr(kind, name))

        def changed(*args: Any, **kwargs: Any) -> None: ...

        kept = [each for each in found.parameters.values() if each.name != argument]
        changed.__signature__ = found.replace(parameters=kept)  # type: ignore[attr-defined]
        monkeypatch.setattr(kind, name, changed)
    with pytest.raises(TransformersContractError) as raised:
        _transformers.check_contract()
    text = str(raised.value)
    assert message in text and transformers.__version__ in text
    assert _transformers.SUPPORTED_VERSIONS in text and all(tested in text for tested in _transformers.TESTED_VERSIONS)


@pytest.mark.parametrize("crop", [lambda self, count: None, lambda self: None], ids=["keeps", "takes-no-count"])
def test_a_cache_that_does_not_step_back_is_found(
    crop: Any, monkeypatch: pytest.MonkeyPatch, fresh_check: None
) -> None:
    monkeypatch.setattr(transformers.Cache, "crop", crop)
    assert any("DynamicCache" in breach for breach in _transformers.contract_breaches())


def test_a_cache_that_shows_copies_is_found(monkeypatch: pytest.MonkeyPatch, fresh_check: None) -> None:
    shown = _transformers.cache_tensors
    monkeypatch.setattr(
        contract, "cache_tensors", lambda cache: [(keys.clone(), values) for keys, values in shown(cache)]
    )
    assert _transformers.contract_breaches() == ("DynamicCache.crop keeps the wrong positions",)


def names_found() -> list[tuple[str, str]]:
    """Module and name of all that `names.py` looks up."""
    found: list[tuple[str, str]] = []
    import_module = importlib.import_module

    class Recorder:
        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            found.append((self._module, name))
            return getattr(import_module(self._module), name)

    with mock.patch.object(importlib, "import_module", Recorder):
        runpy.run_path(str(ROOM / "names.py"))
    return found


@pytest.mark.parametrize(("module", "name"), names_found())
def test_the_package_is_imported_without_a_name(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = importlib.import_module(module)
    lazy: Any = type(transformers)
    stock = lazy.__getattr__

    def without(self: Any, wanted: str) -> Any:
        if self is holder and wanted == name:
            raise AttributeError(wanted)
        return stock(self, wanted)

    monkeypatch.setattr(lazy, "__getattr__", without)
    monkeypatch.delitem(vars(holder), name, raising=False)
    for imported in [each for each in sys.modules if each.partition(".")[0] == "sparrow_hf"]:
        monkeypatch.delitem(sys.modules, imported)
    package = importlib.import_module("sparrow_hf")
    assert f"{module}.{name}" in package._transformers.missing_names()
    with pytest.raises(package.errors.TransformersContractError, match=f"{re.escape(module)}.{name} is missing"):
        _ = package.SparrowDraftModel


# -- another transformers ---------------------------------------------------------------------------------------------

PROGRAM = """
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, pad_token_id=0, eos_token_id=1)).eval()
ids = torch.tensor([[5, 6, 7]])
before = model.generate(ids, max_new_tokens=5)
import sparrow_hf
assert torch.equal(model.generate(ids, max_new_tokens=5), before)
print("plain generate() works")
from sparrow_hf import SparrowDraftConfig, SparrowDraftModel
config = SparrowDraftConfig(vocab_size=64, hidden_size=16, intermediate_size=32, target_num_hidden_layers=2,
                            num_attention_heads=2, num_key_value_heads=2)
model.generate(ids, max_new_tokens=5, assistant_model=SparrowDraftModel(config))
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("_prefill", "_fill_the_cache", "GenerationMixin._prefill is missing"),
        pytest.param(
            "num_new_tokens",
            "num_tokens",
            "GenerationMixin._update_model_kwargs_for_generation takes no num_new_tokens",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "_assisted_decoding", "_assisted", "GenerationMixin._assisted_decoding is missing", marks=pytest.mark.full
        ),
        pytest.param(
            "CandidateGenerator",
            "Drafter",
            "transformers.generation.CandidateGenerator is missing",
            marks=pytest.mark.full,
        ),
    ],
)
def test_with_a_changed_transformers_only_drafts_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    """A copy of transformers with one name changed: import and plain `generate()` work, a draft raises a sentence."""
    original = Path(transformers.__file__).parent
    copy = tmp_path / "transformers"
    copy.mkdir()
    for entry in original.iterdir():
        if entry.name != "generation":
            (copy / entry.name).symlink_to(entry)
    shutil.copytree(original / "generation", copy / "generation", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy / "generation").glob("*.py"):
        path.write_text(path.read_text().replace(old, new))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(SOURCE.parent)))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert "plain generate() works" in done.stdout, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "TransformersContractError" in last and message in last


# -- what the loop does by way of it ----------------------------------------------------------------------------------


def test_verification_runs_as_transformers_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that transformers swaps for decoding must be the same in plain decoding and in verification."""
    family = FAMILIES[0]
    target = family.build_target("sdpa")
    draft = SparrowDraftModel.from_target(target)
    decoding, forwards = [False], []

    @contextmanager
    def optimised(self: Any) -> Iterator[None]:
        decoding[0] = True
        yield
        decoding[0] = False

    monkeypatch.setattr(GenerationMixin, "_optimize_model_for_decode", optimised)
    target.get_decoder().register_forward_hook(lambda *_: forwards.append(decoding[0]))
    for assistant in (None, draft):
        forwards.clear()
        target.generate(**family.build_inputs(target), max_new_tokens=6, do_sample=False, assistant_model=assistant)
        assert forwards[0] is False and all(forwards[1:]) and not decoding[0]


@pytest.mark.parametrize("family", [each for each in FAMILIES if "qwen" in each.name], ids=lambda each: each.name)
def test_text_behind_a_video_goes_on_where_the_targets_learned_it(family: Family) -> None:
    """Behind a video of t × h × w merged patches text goes on max(h, w) positions later, whatever t is.

    The models' original code, and other engines, continue after the largest of t, h and w. The output of a draft does
    not depend on it, but the built-in Qwen2.5-VL target was trained with it: if it changes upstream, captions and τ
    get worse, and this test gives the reason (`docs/compatibility.md`).
    """
    target = family.build_target("sdpa")
    inputs = family.build_inputs(target)
    ids = inputs["input_ids"]
    positions = _transformers.prompt_position_ids(target, ids, inputs)[-3:, 0]
    (grid,) = inputs["video_grid_thw"].tolist()
    is_video = ids[0] == target.config.video_token_id
    runs = is_video.nonzero().flatten()
    start, end = int(runs[0]), int(runs[-1])
    if grid[0] * grid[1] * grid[2] // 4 != end - start + 1:
        # Frame by frame, with text between the frames (Qwen3-VL): no run of video is longer than a frame.
        end = start + grid[1] * grid[2] // 4 - 1
    assert grid[0] > 1
    assert (positions[:, end + 1] - positions[:, start - 1] == max(grid[1], grid[2]) // 2 + 1).all()

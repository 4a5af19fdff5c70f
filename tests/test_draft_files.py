"""Files of a draft that are damaged, from elsewhere or of the future: one sentence with the remedy, or the draft."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sparrow_hf import SparrowDraftConfig, SparrowDraftModel
from sparrow_hf.cli import app
from sparrow_hf.errors import DraftConfigError, DraftLoadError, SparrowError

SAVED = Path(__file__).parent / "saved" / "draft-0.1.0"
CONFIG: dict[str, Any] = json.loads((SAVED / "config.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAVED, tmp_path / "draft"))


@pytest.fixture
def sharded(folder: Path, tmp_path: Path) -> Path:
    SparrowDraftModel.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def set_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes tensors and takes the digest away, so that nothing but themselves tells."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, tensors_sha256=None)


class TestConfig:
    @pytest.mark.parametrize("text", ["[]", "null", '"x"', "5", "{", "", "[" * 3000])
    def test_what_is_no_object_is_refused(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        for loader in (SparrowDraftConfig, SparrowDraftModel):
            with pytest.raises(DraftConfigError, match=r"config\.json of .* holds no JSON object: get it again"):
                loader.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("field", "value", "expected"),
        [
            ("beam_width", None, "an integer from 1 to 4,096"),
            ("beam_width", 10**9, "an integer from 1 to 4,096"),
            ("num_hidden_layers", 1e9, "an integer from 1 to 256"),
            ("num_hidden_layers", True, "an integer from 1 to 256"),
            ("head_dim", 0, "an integer from 1 to 16,384 or None"),
            ("hidden_size", "32", "an integer from 1 to 131,072"),
            ("num_key_value_heads", 0, "an integer from 1 to 4,096"),
            ("block_type", "x", "'qwen2', 'qwen3' or 'llama'"),
            ("hidden_act", "x", "the name of an activation"),
            ("rms_norm_eps", float("nan"), "a number from 0.0 to 1.0"),
            ("attention_dropout", -0.5, "a number from 0.0 to 1.0"),
            ("fc_bias", 1, "true or false"),
            ("feature_layers", ["1"], "a list of target layers"),
            ("visual_token_ids", 5, "a list of token ids"),
            ("rope_parameters", [], "an object of finite numbers"),
            ("dtype", "int8", "the name of a floating-point dtype"),
            ("num_labels", 10**9, "an integer from 0 to 65,536"),
        ],
    )
    def test_a_wrong_field_is_refused_at_once(self, folder: Path, field: str, value: Any, expected: str) -> None:
        set_config(folder, **{field: value})
        with pytest.raises(DraftConfigError, match=f"^{field} must be {expected}.*, found "):
            SparrowDraftModel.from_pretrained(folder)

    @pytest.mark.parametrize(
        "fields", [{"rope_parameters": {"rope_type": "x"}}, {"check": 1}, {"model_type": "llama"}, {"head_dim": 7}]
    )
    def test_so_is_what_would_fail_later(self, folder: Path, fields: dict[str, Any]) -> None:
        set_config(folder, **fields)
        with pytest.raises(DraftConfigError):
            SparrowDraftConfig.from_pretrained(folder)

    def test_a_field_of_the_future_is_kept_and_said_once(self, folder: Path, tmp_path: Path) -> None:
        set_config(folder, num_wings=2)
        with pytest.warns(UserWarning) as said:
            draft = SparrowDraftModel.from_pretrained(folder)
        assert [str(warning.message) for warning in said if "num_wings" in str(warning.message)] == [
            "this version does not know the fields num_wings of a draft's configuration (a newer one may have written "
            "them); they are kept and have no effect"
        ]
        draft.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["num_wings"] == 2


class TestWeights:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (
                lambda tensors: tensors.update({"fc.weight": tensors["fc.weight"][:-1].clone()}),
                r"fc.weight \[31, 64\]",
            ),
            (lambda tensors: tensors.update({"fc.weight": tensors["fc.weight"].to(torch.int32)}), "of another type"),
            (lambda tensors: tensors.pop("fc.weight"), "missing: fc.weight"),
            (lambda tensors: tensors.update({"head": torch.ones(1)}), "unexpected: head"),
            (lambda tensors: tensors.clear(), r"missing: draft_to_target, fc\.weight.* and [0-9]+ more"),
        ],
    )
    def test_other_tensors_are_refused_by_name(self, folder: Path, change: Any, named: str) -> None:
        change_tensors(folder, change)
        with pytest.raises(DraftLoadError, match=named):
            SparrowDraftModel.from_pretrained(folder)

    def test_a_configuration_of_another_size_is_refused_before_anything_is_built(self, folder: Path) -> None:
        """Its weights would take 200 GB."""
        set_config(folder, hidden_size=2**17, num_hidden_layers=4)
        with pytest.raises(DraftLoadError, match=r"fc\.weight \[32, 64\], not \[131072, 262144\]"):
            SparrowDraftModel.from_pretrained(folder)

    def test_pickled_or_absent_files_are_refused_with_the_remedy(self, folder: Path, tmp_path: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(DraftLoadError, match="only pickled weights.*sparrow convert"):
            SparrowDraftModel.from_pretrained(folder)
        (folder / "pytorch_model.bin").unlink()
        with pytest.raises(DraftLoadError, match=r"holds no model\.safetensors: give the folder of a saved draft"):
            SparrowDraftModel.from_pretrained(folder)
        (folder / "config.json").unlink()
        with pytest.raises(DraftLoadError, match=r"has no config\.json.*: give the folder"):
            SparrowDraftModel.from_pretrained(folder)
        with pytest.raises(DraftLoadError, match="README.md is a file: give the folder"):
            SparrowDraftModel.from_pretrained(folder / "README.md")
        with pytest.raises(DraftLoadError, match="nowhere"):
            SparrowDraftModel.from_pretrained(tmp_path / "nowhere")

    @pytest.mark.parametrize("size", [0, 4, 100, -1])
    def test_cut_files_are_refused(self, folder: Path, size: int) -> None:
        path = folder / "model.safetensors"
        os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
        with pytest.raises(DraftLoadError, match=r"model\.safetensors is damaged or cut short"):
            SparrowDraftModel.from_pretrained(folder)


class TestShards:
    def rename(self, folder: Path, name: str) -> str:
        """Lets the index name its first shard otherwise; returns the name it had."""
        index = folder / "model.safetensors.index.json"
        found = json.loads(index.read_text())
        first = min(found["weight_map"].values())
        found["weight_map"] = {key: name if shard == first else shard for key, shard in found["weight_map"].items()}
        index.write_text(json.dumps(found))
        return first

    @pytest.mark.parametrize("name", ["../secret.safetensors", "{}/secret.safetensors", "a/../../secret.safetensors"])
    def test_an_index_stays_in_its_folder(self, sharded: Path, name: str) -> None:
        name = name.format(sharded.parent)
        shutil.copy(sharded / self.rename(sharded, name), sharded.parent / "secret.safetensors")
        with pytest.raises(DraftLoadError, match="which is not a .safetensors file in its folder"):
            SparrowDraftModel.from_pretrained(sharded)

    def test_links_out_of_the_folder_are_refused_but_those_of_the_hubs_cache(self, sharded: Path) -> None:
        model = sharded.parent / "models--me--draft"
        (model / "blobs").mkdir(parents=True)
        snapshot = model / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for path in sharded.iterdir():
            shutil.copy(path, model / "blobs" / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
        SparrowDraftModel.from_pretrained(snapshot)
        shard = min(sharded.glob("model-*.safetensors"))
        shutil.move(shard, sharded.parent / "secret.safetensors")
        shard.symlink_to("../secret.safetensors")
        with pytest.raises(DraftLoadError, match="which is not a .safetensors file in its folder"):
            SparrowDraftModel.from_pretrained(sharded)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{"])
    def test_a_broken_index_is_refused(self, sharded: Path, text: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(DraftLoadError, match=r"model\.safetensors\.index\.json .*: get the files again"):
            SparrowDraftModel.from_pretrained(sharded)

    def test_missing_pickled_and_doubled_shards_are_refused(self, sharded: Path) -> None:
        shards = sorted(sharded.glob("model-*.safetensors"))
        both = load_file(shards[0]) | load_file(shards[1])
        kept = shards[1].read_bytes()
        save_file(both, shards[1], {"format": "pt"})
        with pytest.raises(DraftLoadError, match="which another file holds too"):
            SparrowDraftModel.from_pretrained(sharded)
        shards[1].write_bytes(kept)
        self.rename(sharded, "pytorch_model.bin")
        with pytest.raises(DraftLoadError, match="'pytorch_model.bin', which is not a .safetensors file"):
            SparrowDraftModel.from_pretrained(sharded)
        self.rename(sharded, "other.safetensors")
        with pytest.raises(DraftLoadError, match="names other.safetensors, which is missing"):
            SparrowDraftModel.from_pretrained(sharded)


def test_every_error_is_one_sentence_of_one_kind(folder: Path) -> None:
    set_config(folder, num_attention_heads=10**400)
    with pytest.raises(SparrowError) as caught:
        SparrowDraftModel.from_pretrained(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("without", ["config.json", "model.safetensors"])
def test_convert_replaces_no_model(folder: Path, without: str) -> None:
    (folder / without).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = ["convert", str(folder), "--target", "nowhere", "--output", str(folder)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "500"})
    assert result.exit_code == 2 and "draft holds a model, which would be replaced: name" in result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

"""Files beside the weights: the digest is checked, a user's card is kept, an upload holds four files."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from sparrow_hf import SparrowDraftConfig, SparrowDraftModel
from sparrow_hf.artifacts import tensor_digest
from sparrow_hf.errors import DraftLoadError
from sparrow_hf.model_card import CARD_MARK, model_card
from sparrow_hf.testbed.nano import ASSETS

from families import FAMILY_BY_NAME

FILES = {"config.json", "model.safetensors", "README.md", "PROVENANCE.json"}
PROVENANCE = {
    "data": "1,024 captions the target wrote.",
    "datasets": ["org/captions"],
    "license": "apache-2.0",
    "command": "sparrow train recipe.yaml",
    "recipe": {"learning_rate": 3e-5, "mtp_attention": "exact"},
    "acceptance": [{"visual tokens": 400, "τ": 4.91}, {"visual tokens": 8000, "τ": 4.7}],
}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return FAMILY_BY_NAME["qwen2_5_vl"].build_target()


@pytest.fixture
def draft(target: PreTrainedModel) -> SparrowDraftModel:
    draft = SparrowDraftModel.from_target(target)
    draft.config.target_name_or_path = "org/video-llm"
    draft.provenance = dict(PROVENANCE)
    return draft


@pytest.fixture
def folder(draft: SparrowDraftModel, tmp_path: Path) -> Path:
    draft.save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


@pytest.mark.parametrize("loader", [SparrowDraftModel, AutoModel])
def test_a_draft_of_the_first_version_loads(loader: Any) -> None:
    """Saved by version 0.1.0 on transformers 5.23: a published draft must load in every later version."""
    saved = Path(__file__).parent / "saved"
    draft = loader.from_pretrained(saved / "draft-0.1.0").eval()
    assert draft.config.tree_shape == (6, 5, 1) and draft.config.num_glimpse_tokens == 4
    assert torch.equal(draft.draft_to_target, torch.arange(120))
    assert draft.provenance["data"] == "None: random weights."
    expected = load_file(saved / "draft-0.1.0-outputs.safetensors")
    with torch.no_grad():
        outputs = draft(expected["inputs"], torch.arange(5)[None], is_causal=True).last_hidden_state
    torch.testing.assert_close(outputs, expected["outputs"])


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class TestDigest:
    @pytest.mark.parametrize("loader", [SparrowDraftModel, AutoModel])
    def test_a_flipped_bit_is_refused(self, folder: Path, loader: Any) -> None:
        loader.from_pretrained(folder)
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-3] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        with pytest.raises(DraftLoadError, match="not those that were saved"):
            loader.from_pretrained(folder)

    def test_another_drafts_weights_are_refused(self, folder: Path, target: PreTrainedModel, tmp_path: Path) -> None:
        SparrowDraftModel.from_target(target).save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
        with pytest.raises(DraftLoadError, match="not those that were saved"):
            SparrowDraftModel.from_pretrained(folder)

    def test_the_digest_does_not_depend_on_the_requested_dtype(self, folder: Path) -> None:
        assert SparrowDraftModel.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_shards_are_checked_too(self, draft: SparrowDraftModel, tmp_path: Path) -> None:
        draft.save_pretrained(tmp_path, max_shard_size="20KB")
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 1
        SparrowDraftModel.from_pretrained(tmp_path)
        tensors = load_file(shards[-1])
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 1}, shards[-1], metadata={"format": "pt"})
        with pytest.raises(DraftLoadError, match="not those that were saved"):
            SparrowDraftModel.from_pretrained(tmp_path)

    def test_files_without_a_digest_load_as_before(self, folder: Path) -> None:
        change_config(folder, tensors_sha256=None)
        tensors = load_file(folder / "model.safetensors")
        tensors["fc.weight"] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(SparrowDraftModel.from_pretrained(folder).fc.weight, tensors["fc.weight"])

    def test_the_draft_that_ships_has_one(self) -> None:
        assert SparrowDraftConfig.from_pretrained(ASSETS / "draft").tensors_sha256
        SparrowDraftModel.from_pretrained(ASSETS / "draft")

    def test_a_model_in_memory_carries_none(self, draft: SparrowDraftModel, folder: Path) -> None:
        """It may be trained on, and its configuration saved apart."""
        loaded = SparrowDraftModel.from_pretrained(folder)
        assert SparrowDraftConfig.from_pretrained(folder).tensors_sha256 == tensor_digest(draft.state_dict())
        assert loaded.config.tensors_sha256 is None and draft.config.tensors_sha256 is None
        with torch.no_grad():
            loaded.fc.weight.add_(1)
        loaded.save_pretrained(folder)
        SparrowDraftModel.from_pretrained(folder)


class TestCard:
    def test_the_card_holds_what_the_hub_and_a_reader_need(self, folder: Path) -> None:
        card = ModelCard.load(folder / "README.md")
        assert card.data.to_dict() == {
            "base_model": "org/video-llm",
            "base_model_relation": "adapter",
            "datasets": ["org/captions"],
            "library_name": "sparrow-hf",
            "license": "apache-2.0",
            "pipeline_tag": "video-text-to-text",
            "tags": ["speculative-decoding", "sparrow"],
        }
        for line in (
            "# Sparrow draft for org/video-llm",
            "1,024 captions the target wrote.",
            "sparrow train recipe.yaml",
            "| `learning_rate` | 3e-05 |",
            "| visual tokens | τ |",
            "| 8000 | 4.7 |",
        ):
            assert line in card.text.splitlines()
        assert 'from_pretrained("org/video-llm")' in card.text

    def test_the_card_of_a_draft_without_provenance(self, target: PreTrainedModel, tmp_path: Path) -> None:
        SparrowDraftModel.from_target(target).save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert not {"base_model", "base_model_relation", "datasets", "license"} & card.data.to_dict().keys()
        assert "Not measured." in card.text and "was not recorded" in card.text
        assert "None" not in card.content

    def test_a_target_that_transformers_does_not_know_is_a_video_llm(self, draft: SparrowDraftModel) -> None:
        config = copy.copy(draft.config)
        config.target_model_type = "code_of_its_own"
        card = model_card(SparrowDraftModel, config, {})
        assert card.data.pipeline_tag == "video-text-to-text" and "AutoModelForImageTextToText" in card.text

    def test_ours_is_renewed_and_the_users_is_not(self, draft: SparrowDraftModel, folder: Path) -> None:
        draft.provenance["data"] = "Other data."
        draft.save_pretrained(folder)
        assert "Other data." in (folder / "README.md").read_text()
        mine = (folder / "README.md").read_text().replace(CARD_MARK, "My own words.")
        (folder / "README.md").write_text(mine)
        draft.provenance["data"] = "Still other data."
        draft.save_pretrained(folder)
        assert (folder / "README.md").read_text() == mine
        (folder / "README.md").write_bytes("Meine Wörter.".encode("latin-1"))
        draft.save_pretrained(folder)
        assert (folder / "README.md").read_bytes() == b"Meine W\xf6rter."
        assert json.loads((folder / "PROVENANCE.json").read_text())["data"] == "Still other data."


class TestProvenance:
    def test_comes_back(self, draft: SparrowDraftModel, folder: Path, tmp_path: Path) -> None:
        loaded = AutoModel.from_pretrained(folder)
        assert loaded.provenance.items() >= PROVENANCE.items()
        assert loaded.provenance["target"] == "org/video-llm"
        assert loaded.provenance["saved_with"]["torch"] == torch.__version__
        assert copy.deepcopy(loaded).provenance == loaded.provenance
        loaded.save_pretrained(tmp_path / "again")
        for name in FILES:
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name

    def test_saved_with_is_of_the_last_time(self, draft: SparrowDraftModel, folder: Path) -> None:
        draft.provenance["saved_with"] = {"torch": "0.1"}
        draft.save_pretrained(folder)
        assert json.loads((folder / "PROVENANCE.json").read_text())["saved_with"]["torch"] == torch.__version__

    def test_a_foreign_provenance_does_not_prevent_saving(self, draft: SparrowDraftModel, folder: Path) -> None:
        draft.provenance |= {"recipe": ["sgd"], "warm_start": True, "acceptance": 4.9, "data": None}
        draft.provenance |= {"folder": Path("/data")}
        draft.save_pretrained(folder)
        assert "Not measured." in (folder / "README.md").read_text()
        assert json.loads((folder / "PROVENANCE.json").read_text())["recipe"] == ["sgd"]

    def test_tuples_and_paths_are_told_as_json_holds_them(self, draft: SparrowDraftModel, folder: Path) -> None:
        rows = ({"visual tokens": 400, "τ": 4.9},)
        draft.provenance |= {"datasets": ("org/captions", Path("org/others")), "acceptance": rows}
        draft.save_pretrained(folder)
        card = ModelCard.load(folder / "README.md")
        assert card.data.datasets == ["org/captions", "org/others"] and "| 400 | 4.9 |" in card.text

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_damaged(self, folder: Path, text: str) -> None:
        (folder / "PROVENANCE.json").write_text(text)
        with pytest.raises(DraftLoadError, match=r"PROVENANCE\.json"):
            SparrowDraftModel.from_pretrained(folder)


def test_another_revision_of_the_target_warns(draft: SparrowDraftModel, target: PreTrainedModel) -> None:
    draft.config.target_revision = "abc"
    target.config._name_or_path, target.config._commit_hash = "org/video-llm", "def"
    try:
        with pytest.warns(UserWarning, match="at revision abc and is used with 'org/video-llm' at revision def"):
            copy.deepcopy(draft).bind(target)
        fresh = SparrowDraftConfig.from_target_config(target.config)
        assert (fresh.target_name_or_path, fresh.target_revision) == ("org/video-llm", "def")
    finally:
        target.config._name_or_path = ""
        del target.config._commit_hash


class Uploads:
    """A stand-in for `HfApi` that records calls and uploaded bytes."""

    def __init__(self, patch: pytest.MonkeyPatch, published_card: Path | None = None):
        self.files: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.branches: list[str] = []

        def create_repo(api: HfApi, repo_id: str, **kwargs: Any) -> RepoUrl:
            return RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def upload_folder(api: HfApi, *, repo_id: str, folder_path: str, **kwargs: Any) -> CommitInfo:
            self.files = {
                str(path.relative_to(folder_path)): path.read_bytes()
                for path in Path(folder_path).rglob("*")
                if path.is_file()
            }
            self.commits.append(kwargs | {"repo_id": repo_id, "token": api.token})
            url = f"https://huggingface.co/{repo_id}/commit/123"
            return CommitInfo(commit_url=url, commit_message="", commit_description="", oid="123")

        patch.setattr(HfApi, "create_repo", create_repo)
        patch.setattr(HfApi, "upload_folder", upload_folder)
        patch.setattr(HfApi, "create_branch", lambda api, repo_id, *, branch, **kwargs: self.branches.append(branch))
        patch.setattr(HfApi, "file_exists", lambda *args, **kwargs: published_card is not None)
        patch.setattr(HfApi, "hf_hub_download", lambda *args, **kwargs: str(published_card))


class TestPush:
    def test_uploads_four_files(
        self, draft: SparrowDraftModel, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        uploads = Uploads(monkeypatch)
        url = draft.push_to_hub("my-draft", commit_message="First", token="secret")
        assert url == "https://huggingface.co/me/my-draft/commit/123"
        card = (folder / "README.md").read_text().replace("path/to/this/draft", "me/my-draft")
        (folder / "README.md").write_text(card)
        assert uploads.files == {name: (folder / name).read_bytes() for name in FILES}
        assert 'from_pretrained("me/my-draft")' in card
        assert uploads.commits[0]["repo_id"] == "me/my-draft"
        assert uploads.commits[0]["commit_message"] == "First" and uploads.commits[0]["token"] == "secret"
        for name, content in uploads.files.items():
            (tmp_path / name).write_bytes(content)
        assert torch.equal(AutoModel.from_pretrained(tmp_path).fc.weight, draft.fc.weight)

    def test_from_save_pretrained(
        self, draft: SparrowDraftModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        uploads = Uploads(monkeypatch)
        draft.save_pretrained(tmp_path / "named", push_to_hub=True, revision="trial")
        assert uploads.files.keys() == FILES == {path.name for path in (tmp_path / "named").iterdir()}
        assert uploads.commits[0]["repo_id"] == "me/named" and uploads.branches == ["trial"]

    def test_what_is_uploaded_is_what_was_saved(
        self, draft: SparrowDraftModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        uploads, zeros = Uploads(monkeypatch), {k: torch.zeros_like(v) for k, v in draft.state_dict().items()}
        saved = {"state_dict": zeros, "variant": "fp16", "max_shard_size": "20KB"}
        draft.save_pretrained(tmp_path / "a", push_to_hub=True, commit_description="Zeros.", **saved)
        weights = {path.name for path in (tmp_path / "a").glob("*.safetensors")}
        assert len(weights) > 1 and uploads.files.keys() >= weights
        assert all(uploads.files[name] == (tmp_path / "a" / name).read_bytes() for name in weights)
        assert uploads.commits[0]["commit_description"] == "Zeros."
        with pytest.raises(TypeError, match="has no argument tags: leave it out"):
            draft.save_pretrained(tmp_path / "b", push_to_hub=True, tags=["mine"])
        assert not (tmp_path / "b").exists() and len(uploads.commits) == 1

    def test_a_pull_request_is_no_branch(self, draft: SparrowDraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
        uploads = Uploads(monkeypatch)
        draft.push_to_hub("my-draft", revision="refs/pr/3")
        assert uploads.branches == [] and uploads.commits[0]["revision"] == "refs/pr/3"

    def test_a_card_written_on_the_hub_stays(
        self, draft: SparrowDraftModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        published = tmp_path / "published.md"
        published.write_bytes(b"My own w\xf6rds.\n")
        uploads = Uploads(monkeypatch, published)
        draft.push_to_hub("my-draft")
        assert uploads.files["README.md"] == published.read_bytes()
        published.write_text(f"{CARD_MARK}\nAn older one of ours.\n")
        draft.push_to_hub("my-draft")
        assert b"# Sparrow draft for org/video-llm" in uploads.files["README.md"]

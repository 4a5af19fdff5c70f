"""Saving a draft, uploading it and loading it again. `SparrowDraftModel` is what it is besides."""

import copy
import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from . import artifacts, hub
from .configuration_sparrow import SparrowDraftConfig
from .errors import DraftLoadError
from .model_card import CARD_FILE, read_provenance, write_companions

#: Arguments of `from_pretrained` that choose the files to load.
_HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")

#: Arguments of `push_to_hub` that say where a draft goes, and not how it is saved.
_UPLOAD_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


class SavedDraft(PreTrainedModel):
    """A draft as files: its tensors with their digest, its configuration, `PROVENANCE.json` and a model card.

    Nothing of the target is among them.
    """

    config_class = SparrowDraftConfig
    config: SparrowDraftConfig
    provenance: dict[str, Any]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers, with a digest of the tensors in `config.json`, `PROVENANCE.json` and a model card.

        A `README.md` that was written or changed by hand is not overwritten. An earlier draft in the folder stays
        complete until the new one is, also if the disk is full, so a process that loads it meanwhile gets either the
        old or the new draft.

        Args:
            push_to_hub: Save it to the Hub too, in the same way, see [`~SparrowDraftModel.push_to_hub`]; its
                arguments, `repo_id` among them (by default the folder's name), are then taken here too.
        """
        # A copy, because transformers removes tensors from what it saves.
        options = dict(kwargs, state_dict=None if state_dict is None else dict(state_dict))
        if push_to_hub:
            _refuse_unknown(options)
            kwargs = {name: value for name, value in kwargs.items() if name not in _UPLOAD_OPTIONS}
        folder, variant = Path(save_directory), kwargs.get("variant")
        # Computed before transformers removes tensors from it.
        digest = artifacts.tensor_digest(self.state_dict() if state_dict is None else state_dict)
        with artifacts.atomic_files(folder, CONFIG_NAME, lambda name: hub.is_weights_file(name, variant)) as partial:
            super().save_pretrained(partial, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
            if (partial / CONFIG_NAME).exists():
                # A copy, because other threads may be saving or using this draft.
                config = copy.deepcopy(self.config)
                config.tensors_sha256 = digest
                config.save_pretrained(partial)
            if is_main_process:
                write_companions(partial, type(self), self.config, self.provenance, destination=folder)
        if push_to_hub and is_main_process:
            self.push_to_hub(options.pop("repo_id", folder.name), **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a Sparrow draft",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Uploads configuration, weights, provenance and model card, and makes the repository if there is none.

        A card that was written by hand on the Hub is not overwritten.

        Args:
            repo_id: `"me/my-draft"`.
            revision: Branch to commit to, made if there is none, or a pull request (`"refs/pr/3"`) to go on with; by
                default the main branch.
            kwargs: How to save the draft, as for `save_pretrained`: `state_dict`, `variant`, `max_shard_size`.

        Returns:
            Address of the commit.
        """
        _refuse_unknown(kwargs)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            if api.file_exists(repo_id, CARD_FILE, revision=revision):
                published = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision))
                shutil.copyfile(published, Path(folder) / CARD_FILE)
            self.save_pretrained(folder, **kwargs)
            write_companions(Path(folder), type(self), self.config, self.provenance, repo_id)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            ).commit_url

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not hold exactly the draft's tensors is refused.

        transformers would initialise missing tensors at random and only log it, and such a draft would have almost no
        acceptance. If the folder is saved to meanwhile, either the old or the new draft is loaded.

        Raises:
            DraftLoadError: Tensors are missing, unexpected or of another shape, their bytes are not those that were
                saved, or the file is not readable safetensors. Pickled weights (`.bin`) are never read.
        """
        wants_info = kwargs.pop("output_loading_info", False)

        def load() -> tuple[Any, dict[str, Any]]:
            return cls._load(pretrained_model_name_or_path, *model_args, **kwargs)

        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        is_local = pretrained_model_name_or_path is not None and folder.is_dir()
        draft, info = artifacts.read_together(folder, CONFIG_NAME, load, DraftLoadError) if is_local else load()
        return (draft, info) if wants_info else draft

    @classmethod
    def _load(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        source, config = pretrained_model_name_or_path, kwargs.get("config")
        if source is not None and kwargs.get("state_dict") is None:
            with hub.reading(source):
                if isinstance(config, SparrowDraftConfig) and config.name_or_path == str(source):
                    # `AutoModel` has read it already; the draft may have been saved anew since.
                    if hub.stored_digest(source, **options) != config.tensors_sha256:
                        config = None
                if not isinstance(config, SparrowDraftConfig):
                    # Of the options, the configuration takes its own fields, but not how the weights are loaded.
                    held = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype", "config") if name in kwargs}
                    config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
                    kwargs |= held | options | {"config": config}
                hub.check_draft(source, cls, config, kwargs.get("variant"), **options)
        kwargs |= {"output_loading_info": True, "use_safetensors": True}
        try:
            draft, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise DraftLoadError(
                f"the weights of {pretrained_model_name_or_path} are damaged or cut short ({error}): get them again"
            ) from error
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            raise DraftLoadError(
                f"{pretrained_model_name_or_path} does not hold the tensors of a {cls.__name__} with this "
                f"configuration: {'; '.join(f'{kind}: {names}' for kind, names in wrong.items() if names)}"
            )
        draft.config.tensors_sha256 = None
        if pretrained_model_name_or_path is not None:
            draft.provenance = read_provenance(pretrained_model_name_or_path, **options)
        return draft, info


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Raises before anything is saved if there is an argument that would have no effect on the upload."""
    known = {*_UPLOAD_OPTIONS, *inspect.signature(PreTrainedModel.save_pretrained).parameters} - {"self", "kwargs"}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"push_to_hub() of a draft has no argument {', '.join(unknown)}: leave it out")

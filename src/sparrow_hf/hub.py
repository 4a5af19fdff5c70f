"""Files beside a draft's weights (digest of its tensors, provenance, model card), and finding files on the Hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from . import _transformers
from .artifacts import StoredTensors, tensor_digest, write_json, write_text
from .configuration_sparrow import SparrowDraftConfig
from .errors import DraftLoadError

PROVENANCE_FILE = "PROVENANCE.json"
CARD_FILE = "README.md"

#: A card with this line may be overwritten; a card without it belongs to the user.
CARD_MARK = "<!-- Written by sparrow-hf when the draft is saved. Delete this line to keep a card of your own. -->"


# -- files ------------------------------------------------------------------------------------------------------------


def find_file(source: str | Path, name: str, *, needs_hub: bool = True, **hub_options: Any) -> Path | None:
    """Local path of the file `name` of a folder or a Hub repository, downloaded if necessary.

    Args:
        needs_hub: Whether a Hub that cannot be reached is an error; otherwise the file counts as missing.
        hub_options: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, … of
            [`~transformers.utils.cached_file`].

    Returns:
        Its path, or `None` if the folder or repository has no such file.

    Raises:
        OSError: There is no such repository, or the Hub cannot be reached.
    """
    path = _transformers.find_file(source, name, needs_hub=needs_hub, **hub_options)
    return None if path is None else Path(path)


def find_weights(source: str | Path, variant: str | None = None, **hub_options: Any) -> list[Path]:
    """The safetensors files of a model: one, the shards its index names, or none."""

    single = find_file(source, _of_variant(SAFE_WEIGHTS_NAME, variant), **hub_options)
    if single is not None:
        return [single]
    index = find_file(source, _of_variant(SAFE_WEIGHTS_INDEX_NAME, variant), **hub_options)
    if index is None:
        return []
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found = {shard: find_file(source, shard, **hub_options) for shard in shards}
    return [path for path in found.values() if path is not None]


def is_weights_file(name: str, variant: str | None = None) -> bool:
    """Whether a saved model has its weights, a part of them or their index in a file of this name."""
    single, index = _of_variant(SAFE_WEIGHTS_NAME, variant), _of_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    stem = re.escape(single.removesuffix(".safetensors"))
    return name in (single, index) or re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors", name) is not None


def _of_variant(name: str, variant: str | None) -> str:
    # As transformers names them: model.fp16.safetensors and model.safetensors.index.fp16.json.
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


# -- digest -----------------------------------------------------------------------------------------------------------


def check_digest(source: str | Path, variant: str | None = None, **hub_options: Any) -> None:
    """Compares the stored tensors of a draft with the digest in its `config.json`, if it has one.

    Args:
        source: Folder or Hub repository.
        variant: Of the weights.
        hub_options: See [`find_file`].

    Raises:
        DraftLoadError: They are not those that were saved.
    """
    config = find_file(source, CONFIG_NAME, **hub_options)
    expected = None if config is None else json.loads(config.read_text()).get("tensors_sha256")
    if expected is None:
        return
    files = find_weights(source, variant, **hub_options)
    found = tensor_digest(StoredTensors(files))
    if found != expected:
        raise DraftLoadError(
            f"the tensors in {', '.join(map(str, files))} are not those that were saved: their digest is {found}, "
            f"config.json says {expected}. Get the files again; if you changed the tensors yourself, remove "
            "tensors_sha256 from config.json"
        )


# -- provenance and card ----------------------------------------------------------------------------------------------


def read_provenance(source: str | Path, **hub_options: Any) -> dict[str, Any]:
    """`PROVENANCE.json` of a saved draft, or `{}` if there is none or the Hub cannot be reached.

    Raises:
        DraftLoadError: The file is not a JSON object.
    """
    path = find_file(source, PROVENANCE_FILE, needs_hub=False, **hub_options)
    if path is None:
        return {}
    try:
        provenance = json.loads(path.read_text())
    except ValueError as error:
        raise DraftLoadError(f"{path} is not JSON ({error}): get it again, or remove it") from error
    if not isinstance(provenance, dict):
        raise DraftLoadError(f"{path} must hold a JSON object, found a {type(provenance).__name__}: remove it")
    return provenance


def write_companions(
    folder: Path,
    draft_class: type,
    config: SparrowDraftConfig,
    provenance: Mapping[str, Any],
    repo_id: str | None = None,
    destination: Path | None = None,
) -> None:
    """Writes `PROVENANCE.json`, and `README.md` unless the one that is there is the user's own.

    Args:
        repo_id: Where the draft will be found, for the card.
        destination: Folder that the files are moved to afterwards, if another one.
    """
    from . import __version__

    versions = {"sparrow_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    target = {"target": config.target_name_or_path, "target_revision": config.target_revision}
    facts = {**provenance, **target, "saved_with": versions}
    write_json(folder / PROVENANCE_FILE, facts, indent=2, default=str)
    present = (destination or folder) / CARD_FILE
    if not present.exists() or CARD_MARK in present.read_text():
        write_text(folder / CARD_FILE, str(model_card(draft_class, config, provenance, repo_id)))


def model_card(
    draft_class: type, config: SparrowDraftConfig, provenance: Mapping[str, Any], repo_id: str | None = None
) -> ModelCard:
    """The card of a draft.

    Args:
        draft_class: The draft's, whose `from_pretrained` loads it.
        config: The draft's.
        provenance: How it was trained. The card shows `license` (an identifier of the Hub), `datasets`
            (their ids), `data` (a sentence), `recipe` (name → value), `command`, and `acceptance` (rows of a table:
            mappings with the same keys); all are optional.
        repo_id: Where the draft is found, for the lines that load it.
    """
    target = config.target_name_or_path
    data = ModelCardData(
        base_model=target,
        # Of the four relations the Hub knows, the one of weights that only run attached to an unchanged base model.
        base_model_relation=None if target is None else "adapter",
        datasets=provenance.get("datasets"),
        license=provenance.get("license"),
        library_name="sparrow-hf",
        pipeline_tag="video-text-to-text",
        tags=["speculative-decoding", "sparrow"],
    )
    name = target or f"a {config.target_model_type} target"
    sections = [
        f"# Sparrow draft for {name}",
        f"A draft for lossless speculative decoding of {name} on videos: {config.num_hidden_layers} decoder layer(s) "
        f"of the {config.block_type} kind over the hidden states of the target's text tokens. The generated text is "
        "the target's own; the draft makes it arrive sooner. It holds neither embedding nor head and runs only with "
        "its target.",
        _usage(draft_class, target or "path/to/the/target", repo_id or "path/to/this/draft"),
        _making(provenance),
        _acceptance(provenance.get("acceptance")),
        _limits(config),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{CARD_MARK}\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _usage(draft_class: type, target: str, draft: str) -> str:
    from . import __all__ as public_names

    name = draft_class.__name__
    module = __package__ if name in public_names else draft_class.__module__
    return f"""## Use

```python
from {module} import {name}
from transformers import AutoModelForImageTextToText

target = AutoModelForImageTextToText.from_pretrained("{target}")
draft = {name}.from_pretrained("{draft}")
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
print(draft.last_generation)
```"""


def _making(provenance: Mapping[str, Any]) -> str:
    lines = []
    if provenance.get("data"):
        lines.append(str(provenance["data"]))
    if provenance.get("command"):
        lines.append(f"```\n{provenance['command']}\n```")
    recipe = provenance.get("recipe")
    # Files of other programs may use the name for something else, which must not prevent saving a draft.
    if isinstance(recipe, Mapping) and recipe:
        lines.append(_table([{"setting": f"`{key}`", "value": value} for key, value in recipe.items()]))
    if not lines:
        lines.append("How it was trained was not recorded.")
    return "\n\n".join(["## Training", *lines, f"Everything known is in [{PROVENANCE_FILE}]({PROVENANCE_FILE})."])


def _acceptance(rows: Any) -> str:
    if not rows or not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        return "## Acceptance\n\nNot measured."
    return "## Acceptance\n\n" + _table(rows)


def _limits(config: SparrowDraftConfig) -> str:
    layers, hidden, vocabulary = config.target_num_hidden_layers, config.hidden_size, config.vocab_size
    return f"""## Limits

* Made for targets of {layers} layers, hidden size {hidden} and a vocabulary of {vocabulary}; others are refused.
* A fine-tune of the target works, with fewer accepted tokens.
* One sequence per call; no beam search.
* How much time it saves depends on the target, the videos, the hardware and the length of the answers: measure it."""


def _table(rows: list[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

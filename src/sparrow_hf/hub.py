"""Files beside a draft's weights (digest of its tensors, provenance, model card), and finding files on the Hub."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from . import _transformers
from .artifacts import StoredTensors, tensor_digest, write_json, write_text
from .checksums import read_json
from .configuration_sparrow import SparrowDraftConfig
from .errors import DraftLoadError, SparrowError

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
    """The safetensors files of a model: one, the shards its index names, or none.

    Raises:
        DraftLoadError: The index is damaged, names a file that is missing, or one outside of its folder.
    """
    single = find_file(source, _of_variant(SAFE_WEIGHTS_NAME, variant), **hub_options)
    if single is not None:
        return [single]
    index = find_file(source, _of_variant(SAFE_WEIGHTS_INDEX_NAME, variant), **hub_options)
    if index is None:
        return []
    again = "get the files again"
    shards = read_json(index, DraftLoadError, again).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise DraftLoadError(f"{index} must map tensors to files in its weight_map: {again}")
    found = []
    for name in sorted(set(shards.values())):
        # Checked before it is looked for: on the Hub, nothing may be asked for outside of the repository.
        path = find_file(source, name, **hub_options) if _is_plain(name) else None
        if not _is_plain(name) or (path is not None and not _is_inside(path, index.parent)):
            raise DraftLoadError(
                f"{index} names {name!r:.200}, which is not a .safetensors file in its folder: do not use these files "
                "unless you know who made them"
            )
        if path is None:
            raise DraftLoadError(f"{index} names {name}, which is missing: {again}")
        found.append(path)
    return found


def _is_plain(name: str) -> bool:
    """Whether the name of a shard stays in the folder of its index, and is not one of pickled weights."""
    parts = re.split(r"[\\/]", name)
    return name.endswith(".safetensors") and not {"", "..", "."} & {*parts} and not re.search(r"[:\0]", name)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, links followed."""
    folder = folder.resolve()
    # In the cache of the Hub every file is a link: snapshots/REVISION/model.safetensors → blobs/DIGEST
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return any(path.resolve().is_relative_to(root) for root in (folder, *blobs))


def is_weights_file(name: str, variant: str | None = None) -> bool:
    """Whether a saved model has its weights, a part of them or their index in a file of this name."""
    single, index = _of_variant(SAFE_WEIGHTS_NAME, variant), _of_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    stem = re.escape(single.removesuffix(".safetensors"))
    return name in (single, index) or re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors", name) is not None


def _of_variant(name: str, variant: str | None) -> str:
    # As transformers names them: model.fp16.safetensors and model.safetensors.index.fp16.json.
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


# -- what loading checks ----------------------------------------------------------------------------------------------

AGAIN = "get the files again, or save the draft again"


def check_draft(
    source: str | Path,
    draft_class: Any,
    config: SparrowDraftConfig,
    variant: str | None = None,
    **hub_options: Any,
) -> None:
    """Checks the weights of a draft before any of them is loaded: the files, names and shapes, and the digest.

    Args:
        source: Folder or Hub repository.
        draft_class: What is to be loaded.
        config: Its configuration.
        variant: Of the weights.
        hub_options: See [`find_file`].

    Raises:
        DraftLoadError: There are no weights in safetensors, they are damaged, are not those of such a draft, or not
            those that were saved.
    """
    files = find_weights(source, variant, **hub_options)
    if not files:
        pickled = any(find_file(source, name, **hub_options) for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
        raise DraftLoadError(
            f"{source} holds no {_of_variant(SAFE_WEIGHTS_NAME, variant)}"
            + (
                ", only pickled weights, which are never loaded as a draft: `sparrow convert --weights-only-bin` "
                "makes a draft of those of the EAGLE family"
                if pickled
                else f": give the folder of a saved draft, or {AGAIN}"
            )
        )
    shapes = stored_shapes(files)
    # Quantised weights go by other names, which only their loader knows.
    if getattr(config, "quantization_config", None) is None:
        _check_shapes(source, shapes, draft_class, config)
    check_digest(source, variant, **hub_options)


def stored_shapes(files: Iterable[Path]) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Of every tensor in safetensors files, whether it is floating-point, and its shape; no tensor is read.

    Raises:
        DraftLoadError: A file is damaged, or two files hold the same tensor.
    """
    shapes: dict[str, tuple[bool, tuple[int, ...]]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as stored:
                slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DraftLoadError(f"{path} is damaged or cut short ({error}): {AGAIN}") from error
        twice = sorted(slices.keys() & shapes.keys())
        if twice:
            raise DraftLoadError(f"{path} holds {', '.join(twice[:5])}, which another file holds too: {AGAIN}")
        shapes |= {name: (_is_float(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
    return shapes


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def _check_shapes(
    source: str | Path,
    found: Mapping[str, tuple[bool, tuple[int, ...]]],
    draft_class: Any,
    config: SparrowDraftConfig,
) -> None:
    with torch.device("meta"):
        tensors = draft_class(copy.deepcopy(config)).state_dict()
    expected = {name: (tensor.is_floating_point(), tuple(tensor.shape)) for name, tensor in tensors.items()}
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another type or shape": [
            f"{name} {list(found[name][1])}, not {list(expected[name][1])}"
            for name in sorted(found.keys() & expected.keys())
            if found[name] != expected[name]
        ],
    }
    if any(wrong.values()):
        named = "; ".join(f"{kind}: {_first(names)}" for kind, names in wrong.items() if names)
        raise DraftLoadError(
            f"{source} does not hold the tensors of a {draft_class.__name__} with this configuration ({named}): "
            + AGAIN
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def stored_digest(source: str | Path, **hub_options: Any) -> str | None:
    """The digest of a draft's tensors in its `config.json`, or `None`."""
    config = find_file(source, CONFIG_NAME, **hub_options)
    return None if config is None else read_json(config, DraftLoadError, AGAIN).get("tensors_sha256")


def check_digest(source: str | Path, variant: str | None = None, **hub_options: Any) -> None:
    """Compares the stored tensors of a draft with the digest in its `config.json`, if it has one.

    Args:
        source: Folder or Hub repository.
        variant: Of the weights.
        hub_options: See [`find_file`].

    Raises:
        DraftLoadError: They are not those that were saved.
    """
    expected = stored_digest(source, **hub_options)
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


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turns what finding a draft's files can die of into one sentence.

    Raises:
        DraftLoadError: `source` is a file, there is no such folder or repository, or the Hub cannot be reached.
    """
    if Path(source).is_file():
        raise DraftLoadError(f"{source} is a file: give the folder that it is in, or another draft's")
    try:
        yield
    except OSError as error:
        if isinstance(error, SparrowError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DraftLoadError(
            f"the draft {source} cannot be read ({reason:.300}): "
            "give the folder of a saved draft, or the id of a repository on the Hub"
        ) from error


# -- provenance and card ----------------------------------------------------------------------------------------------


def read_provenance(source: str | Path, **hub_options: Any) -> dict[str, Any]:
    """`PROVENANCE.json` of a saved draft, or `{}` if there is none or the Hub cannot be reached.

    Raises:
        DraftLoadError: The file is not a JSON object.
    """
    path = find_file(source, PROVENANCE_FILE, needs_hub=False, **hub_options)
    if path is None:
        return {}
    return read_json(path, DraftLoadError, "get it again, or remove it")


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
* Several prompts in one call are drafted for with chains, not trees. No beam search.
* How much time it saves depends on the target, the videos, the hardware and the length of the answers: measure it."""


def _table(rows: list[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

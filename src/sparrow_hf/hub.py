"""Finding the files of a draft, in a folder or on the Hub, and checking them before they are loaded."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from . import _transformers
from .artifacts import StoredTensors, tensor_digest
from .checksums import read_json
from .configuration_sparrow import MERGED, SparrowDraftConfig
from .errors import DraftLoadError, OutputError, SparrowError

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


def holds_model(folder: str | Path) -> bool:
    """Whether a folder holds the configuration or weights of a model, which those of a model saved there replace."""
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    return any(name == CONFIG_NAME or is_weights_file(name) for name in names)


def refuse_to_replace(folder: str | Path, kind: str | None = None) -> None:
    """Raises if a folder to write a model to holds one.

    Args:
        kind: The `model_type` of models that may be replaced: earlier ones of what is to be written.

    Raises:
        OutputError: It holds a model, of another kind.
    """
    config = Path(folder) / CONFIG_NAME
    if kind is not None and config.is_file() and read_json(config, OutputError, "remove it").get("model_type") == kind:
        return
    if holds_model(folder):
        raise OutputError(f"{folder} holds a model, which would be replaced: name another folder")


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
    check_digest(files, stored_digest(source, **hub_options))


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
        if any("lora_" in name for name in wrong["unexpected"]):
            raise DraftLoadError(f"{source} holds LoRA adapters that are not merged ({named}): {MERGED}")
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


def check_digest(files: Sequence[Path], expected: str | None) -> None:
    """Compares the stored tensors of a draft with the digest in its `config.json`, if it has one.

    Raises:
        DraftLoadError: They are not those that were saved.
    """
    if expected is None:
        return
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

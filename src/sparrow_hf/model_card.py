"""What is saved beside a draft's weights for people: how it was trained (`PROVENANCE.json`), and its model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from .artifacts import write_json, write_text
from .checksums import read_json
from .configuration_sparrow import SparrowDraftConfig
from .errors import DraftLoadError
from .hub import find_file
from .markdown import table

PROVENANCE_FILE = "PROVENANCE.json"
CARD_FILE = "README.md"

#: A card with this line may be overwritten; a card without it belongs to the user.
CARD_MARK = "<!-- Written by sparrow-hf when the draft is saved. Delete this line to keep a card of your own. -->"


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
    if not present.exists() or CARD_MARK.encode() in present.read_bytes():
        write_text(folder / CARD_FILE, str(model_card(draft_class, config, provenance, repo_id)))


def model_card(
    draft_class: type, config: SparrowDraftConfig, provenance: Mapping[str, Any], repo_id: str | None = None
) -> ModelCard:
    """The card of a draft.

    Args:
        draft_class: The draft's, whose `from_pretrained` loads it.
        config: The draft's.
        provenance: How it was trained. The card shows `license` (an identifier of the Hub), `datasets`
            (their ids), `data` (a sentence), `recipe` (name → value), `command`, `warm_start` (the provenance of the
            draft it was trained on from, with that draft's name as `from`), and `acceptance` (rows of a table:
            mappings with the same keys); all are optional.
        repo_id: Where the draft is found, for the lines that load it.
    """
    # As `PROVENANCE.json` holds it: a card is YAML, which has neither tuples nor paths.
    provenance = json.loads(json.dumps(dict(provenance), default=str))
    target = config.target_name_or_path
    target_class = _target_class(config)
    sees = target_class is not AutoModelForCausalLM
    data = ModelCardData(
        base_model=target,
        # Of the four relations the Hub knows, the one of weights that only run attached to an unchanged base model.
        base_model_relation=None if target is None else "adapter",
        datasets=provenance.get("datasets"),
        license=provenance.get("license"),
        library_name="sparrow-hf",
        pipeline_tag="video-text-to-text" if sees else "text-generation",
        tags=["speculative-decoding", "sparrow"],
    )
    name = target or f"a {config.target_model_type} target"
    sections = [
        f"# Sparrow draft for {name}",
        f"A draft for lossless speculative decoding of {name}{' on videos' * sees}: {config.num_hidden_layers} "
        f"decoder layer(s) of the {config.block_type} kind over the hidden states of the target's text tokens. The "
        "generated text is the target's own; the draft makes it arrive sooner. It holds neither embedding nor head "
        "and runs only with its target.",
        _usage(draft_class, target_class, target or "path/to/the/target", repo_id or "path/to/this/draft"),
        _making(provenance),
        _acceptance(provenance.get("acceptance")),
        _limits(config),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{CARD_MARK}\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _target_class(config: SparrowDraftConfig) -> type:
    """The class that loads the target. One whose code is not in transformers is taken for a video LLM."""
    # With it come the processors of transformers, a second at every start of the package.
    from .loading import auto_class_of

    known = config.target_model_type in CONFIG_MAPPING
    return auto_class_of(CONFIG_MAPPING[config.target_model_type]) if known else AutoModelForImageTextToText


def _usage(draft_class: type, target_class: type, target: str, draft: str) -> str:
    from . import __all__ as public_names

    name = draft_class.__name__
    module = __package__ if name in public_names else draft_class.__module__
    return f"""## Use

```python
from {module} import {name}
from transformers import {target_class.__name__}

target = {target_class.__name__}.from_pretrained("{target}")
draft = {name}.from_pretrained("{draft}")
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
print(draft.last_generation)
```"""


def _making(provenance: Mapping[str, Any]) -> str:
    lines = []
    start = provenance.get("warm_start")
    # Files of other programs may use a name for something else, which must not prevent saving a draft.
    if isinstance(start, Mapping) and start.get("from"):
        lines.append(f"It was trained on from the draft `{start['from']}`.")
    if provenance.get("data"):
        lines.append(str(provenance["data"]))
    if provenance.get("command"):
        lines.append(f"```\n{provenance['command']}\n```")
    recipe = provenance.get("recipe")
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
* How much time it saves depends on the target, the prompts, the hardware and the length of the answers: measure it."""


def _table(rows: list[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    return table(columns, [[row.get(column, "") for column in columns] for row in rows]).rstrip("\n")

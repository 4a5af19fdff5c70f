"""Arms by name: what a command line calls them, and what they are made of."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..artifacts import tensor_digest
from ..configuration_sparrow import TREE_PRESETS, parse_tree_shape
from ..errors import BenchmarkError
from ..generation.integration import follow
from ..loading import told_if_not_loaded
from ..measurement import NO_DRAFT, PLAIN, Arm
from ..modeling_sparrow import SparrowDraftModel
from ..rows import EVERY_VISUAL_ROW
from . import baselines  # noqa: F401 - so that AutoModel knows their drafts
from .baselines.specvlm import PrunedPromptArm

PROMPT_LOOKUP_TOKENS = 5

_DRAFT = re.compile(r"draft(?::(?P<source>.+?))?(?:@(?P<tree>[^/@]+))?(?:/glimpse=(?P<glimpse>\d+|all))?")
_LOOKUP = re.compile(r"prompt-lookup(?:-(?P<tokens>[1-9]\d*))?")


class Arms:
    """Makes arms of one target from their names, loading every draft and assistant once.

    | name | arm |
    |---|---|
    | `plain` | `generate()` as it is |
    | `none` | our loop without a draft: what of a speed-up is not the draft's |
    | `prompt-lookup[-N]` | transformers copies up to N tokens per round from the context |
    | `assistant:ID` | transformers' assisted generation with a small model |
    | `specvlm:ID` | the same on a prompt whose visual tokens the target has sifted |
    | `draft[:ID][@TREE][/glimpse=M]` | a draft, `ID` a folder or Hub id, with a tree and M (or `all`) visual rows |

    Args:
        target: Every draft is bound to it.
        draft: Folder or Hub id of the draft that `none` and `draft` without an `ID` mean.
        folders: Short names for the `ID` of drafts and assistants → their folder or Hub id.

    Attributes:
        weights: Where drafts and assistants came from → digest of their tensors as they are stored (drafts), or in
            the target's dtype (assistants).
    """

    def __init__(self, target: PreTrainedModel, draft: str | None = None, folders: Mapping[str, str] | None = None):
        self.target = target
        self.weights: dict[str, str] = {}
        self._draft = draft
        self._folders = folders or {}
        self._loaded: dict[tuple[str, str], Any] = {}

    def parse(self, names: Iterable[str]) -> list[Arm]:
        """The arms of these names, plain `generate()` first whether it is named or not.

        Raises:
            BenchmarkError: A name is not understood, or its draft or assistant cannot be loaded.
            BindingError: A draft was made for another target.
        """
        return [self.arm(name) for name in dict.fromkeys((PLAIN, *names))]

    def arm(self, name: str) -> Arm:
        """The arm of one name; raises as [`parse`] does."""
        if name == PLAIN:
            return Arm(name)
        if name == NO_DRAFT:
            return Arm(name, self._bound_draft(name, None), TREE_PRESETS["none"])
        if found := _LOOKUP.fullmatch(name):
            return Arm(name, prompt_lookup_num_tokens=int(found["tokens"] or PROMPT_LOOKUP_TOKENS))
        kind, _, source = name.partition(":")
        if kind in ("assistant", "specvlm") and source:
            made = PrunedPromptArm if kind == "specvlm" else Arm
            return made(name, assistant=self._assistant(source))
        if found := _DRAFT.fullmatch(name):
            draft = self._bound_draft(name, found["source"])
            glimpse = found["glimpse"]
            return Arm(
                name,
                draft,
                parse_tree_shape(found["tree"]) if found["tree"] else draft.config.tree_shape,
                EVERY_VISUAL_ROW if glimpse == "all" else int(glimpse) if glimpse else draft.config.num_glimpse_tokens,
            )
        raise BenchmarkError(
            f"unknown arm {name!r}: give plain, none, prompt-lookup[-N], assistant:ID, specvlm:ID or "
            "draft[:ID][@TREE][/glimpse=M], such as draft@48-5-10/glimpse=0"
        )

    def _bound_draft(self, name: str, source: str | None) -> SparrowDraftModel:
        source = source or self._draft
        if source is None:
            raise BenchmarkError(f"arm {name!r} needs a draft: name one with --draft, or inside the arm as draft:ID")
        source = self._folders.get(source, source)
        draft = self._load("draft", source, AutoModel.from_pretrained)
        if not isinstance(draft, SparrowDraftModel):
            raise BenchmarkError(f"arm {name!r}: {source!r} is a {type(draft).__name__}, not a draft of this package")
        follow(draft, self.target)
        return draft

    def _assistant(self, source: str) -> PreTrainedModel:
        source = self._folders.get(source, source)

        def load(source: str) -> Any:
            try:
                assistant = AutoModelForImageTextToText.from_pretrained(source, dtype=self.target.dtype)
            except ValueError:
                assistant = AutoModelForCausalLM.from_pretrained(source, dtype=self.target.dtype)
            return assistant.to(self.target.device)

        return self._load("assistant", source, load)

    def _load(self, what: str, source: str, load: Any) -> Any:
        if (what, source) not in self._loaded:
            with told_if_not_loaded(what, source, BenchmarkError):
                model = load(source).eval()
            # Now: the target's dtype and device, which a draft follows, do not make other weights of it.
            self.weights[source] = tensor_digest(model.state_dict())
            self._loaded[what, source] = model
        return self._loaded[what, source]

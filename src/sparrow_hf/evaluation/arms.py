"""Makes arms from their names on the command line."""

import re
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from .._transformers import GROUPED_ATTENTION
from ..artifacts import tensor_digest
from ..configuration_sparrow import TREE_PRESETS, parse_tree_shape
from ..draft_inputs import EVERY_VISUAL_TOKEN
from ..errors import BenchmarkError, UnavailableArmError
from ..generation.integration import follow
from ..generation.refusals import check_request
from ..loading import load_model, told_if_not_loaded
from ..measurement import NO_DRAFT, PLAIN, Arm
from ..modeling_sparrow import SparrowDraftModel

PROMPT_LOOKUP_TOKENS = 5

METHODS_GROUP = "sparrow_hf.methods"
"""Entry points by which other packages add methods: name → a [`Method`] (docs/benchmark.md)."""

BASELINES = ("plain-grouped", "plain-compiled", "plain-grouped-compiled", "prompt-lookup")
"""What transformers can do without a draft of this package, beside plain eager `generate()`."""

_PLAIN = re.compile(r"plain(?P<grouped>-grouped)?(?P<compiled>-compiled)?")
_DRAFT = re.compile(
    r"draft(?::(?P<source>.+?))?(?:@(?P<tree>[^/@]+))?(?:/glimpse=(?P<glimpse>\d+|all))?(?P<compiled>/compiled)?"
)
_LOOKUP = re.compile(r"prompt-lookup(?:-(?P<tokens>[1-9]\d*))?")

Method = Callable[[str, str, "Arms"], Arm]
"""A method of another package: makes an arm from its full name, the text after the name's colon, and the [`Arms`]."""


def load_methods() -> dict[str, Method]:
    """The methods that installed packages add, by name. Loading them registers their draft classes with `AutoModel`.

    Raises:
        BenchmarkError: One of them cannot be imported.
    """
    methods: dict[str, Method] = {}
    for entry in entry_points(group=METHODS_GROUP):
        try:
            methods[entry.name] = entry.load()
        except (ImportError, AttributeError) as error:
            raise BenchmarkError(f"the method {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error
    return methods


class Arms:
    """Makes arms of one target from their names, loading every draft and assistant once.

    | name | arm |
    |---|---|
    | `plain` | `generate()` as it is |
    | `plain-grouped` | the same, with an attention that does not repeat the keys and values of grouped heads |
    | `plain-compiled`, `plain-grouped-compiled` | with a static cache and compiled forwards |
    | `none` | our loop without a draft: the part of a speed-up that is not due to the draft |
    | `prompt-lookup[-N]` | transformers copies up to N tokens per round from the context |
    | `assistant:ID` | transformers' assisted generation with a small model |
    | `draft[:ID][@TREE][/glimpse=M][/compiled]` | a draft, `ID` a folder or Hub id, with a tree and M (or `all`) \
        visual tokens |
    | `METHOD:TEXT` | what another package adds (see [`load_methods`]) |

    Args:
        target: Every draft is bound to it.
        draft: Folder or Hub id of the draft that `none` and `draft` without an `ID` mean.
        folders: Short names for the `ID` of drafts and assistants → their folder or Hub id.

    Attributes:
        target: As given.
        weights: Source of each draft and assistant → digest of its tensors as stored (drafts), or in
            the target's dtype (assistants).

    Raises:
        BenchmarkError: A method that another package adds cannot be imported.
    """

    def __init__(self, target: PreTrainedModel, draft: str | None = None, folders: Mapping[str, str] | None = None):
        self.target = target
        self.weights: dict[str, str] = {}
        self._draft = draft
        self._folders = folders or {}
        self._loaded: dict[tuple[str, str], Any] = {}
        self._methods = load_methods()

    def parse(self, names: Iterable[str]) -> list[Arm]:
        """The arms of these names, plain `generate()` first whether it is named or not.

        Raises:
            UnavailableArmError: The target, or what is installed, cannot run an arm.
            BenchmarkError: A name is not understood, or its draft or assistant cannot be loaded.
            BindingError: A draft was made for another target.
        """
        return [self.arm(name) for name in dict.fromkeys((PLAIN, *names))]

    def parse_available(self, names: Iterable[str]) -> tuple[list[Arm], list[str]]:
        """The arms of these names that can run here, and of the others the reasons why not; raises as [`parse`] does
        for other reasons."""
        arms, reasons = [], []
        for name in names:
            try:
                arms.append(self.arm(name))
            except UnavailableArmError as error:
                reasons.append(str(error))
        return arms, reasons

    def arm(self, name: str) -> Arm:
        """The arm of one name; raises as [`parse`] does."""
        if found := _PLAIN.fullmatch(name):
            attention = GROUPED_ATTENTION if found["grouped"] else None
            return self._able(Arm(name, attention=attention, is_compiled=bool(found["compiled"])))
        if name == NO_DRAFT:
            return Arm(name, self._bound_draft(name, None), TREE_PRESETS["none"])
        if found := _LOOKUP.fullmatch(name):
            return Arm(name, prompt_lookup_num_tokens=int(found["tokens"] or PROMPT_LOOKUP_TOKENS))
        method, _, text = name.partition(":")
        if method == "assistant" and text:
            return Arm(name, assistant=self.assistant(text))
        if found := _DRAFT.fullmatch(name):
            draft = self._bound_draft(name, found["source"])
            glimpse = found["glimpse"]
            return self._able(
                Arm(
                    name,
                    draft,
                    parse_tree_shape(found["tree"]) if found["tree"] else draft.config.tree_shape,
                    EVERY_VISUAL_TOKEN if glimpse == "all" else int(glimpse or draft.config.num_glimpse_tokens),
                    is_compiled=bool(found["compiled"]),
                )
            )
        if method in self._methods and text:
            return self._methods[method](name, text, self)
        added = "".join(f", {method}:TEXT" for method in sorted(self._methods))
        raise BenchmarkError(
            f"unknown arm {name!r}: give plain, none, plain[-grouped][-compiled], prompt-lookup[-N], assistant:ID"
            f"{added} or "
            "draft[:ID][@TREE][/glimpse=M][/compiled], such as draft@48-5-10/glimpse=0. Other packages add methods: "
            "see docs/benchmark.md"
        )

    def _able(self, arm: Arm) -> Arm:
        """The arm, if the target can run it here.

        Raises:
            UnavailableArmError: It cannot.
        """
        try:
            with arm.prepared(self.target) as arguments:
                if arm.draft is not None:
                    check_request(GenerationMode.ASSISTED_GENERATION, GenerationConfig(**arguments), {}, self.target)
        except (ValueError, ImportError) as error:
            # transformers goes on with a list of all it knows.
            reason = str(error).split(". ")[0]
            raise UnavailableArmError(f"arm {arm.name!r} cannot run here: {reason}") from error
        return arm

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

    def assistant(self, source: str) -> PreTrainedModel:
        """A small model in the target's dtype, loaded once.

        Args:
            source: A short name, a folder or a Hub id.

        Raises:
            BenchmarkError: It cannot be loaded.
        """
        source = self._folders.get(source, source)

        def load(source: str) -> Any:
            return load_model(source, dtype=self.target.dtype).to(self.target.device)

        return self._load("assistant", source, load)

    def _load(self, what: str, source: str, load: Any) -> Any:
        if (what, source) not in self._loaded:
            with told_if_not_loaded(what, source, BenchmarkError):
                model = load(source).eval()
            # Computed before binding, because a bound draft takes the target's dtype.
            self.weights[source] = tensor_digest(model.state_dict())
            self._loaded[what, source] = model
        return self._loaded[what, source]

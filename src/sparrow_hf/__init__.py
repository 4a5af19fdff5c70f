"""Sparrow: lossless speculative decoding for video LLMs on transformers.

Importing the package registers the draft class and wraps the methods that `generate(assistant_model=draft)` needs.
On a transformers that lacks what the package needs, the import still works, and a draft raises when it is used.
"""

from typing import Any

from . import signals

if signals.is_command():
    # The imports below take seconds.
    signals.end_at_once()

from . import _transformers
from .errors import SparrowError

__version__ = "0.2.0"

__all__ = [
    "TREE_PRESETS",
    "GenerationStats",
    "SparrowCandidateGenerator",
    "SparrowDraftConfig",
    "SparrowDraftModel",
    "SparrowError",
    "TreeShape",
]

if _transformers.missing_names():

    def __getattr__(name: str) -> Any:
        if name in __all__:
            _transformers.check_contract()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    from transformers import AutoConfig, AutoModel

    from .configuration_sparrow import TREE_PRESETS, SparrowDraftConfig, TreeShape
    from .generation.candidate_generator import SparrowCandidateGenerator
    from .generation.integration import install
    from .generation.stats import GenerationStats
    from .modeling_sparrow import SparrowDraftModel

    AutoConfig.register(SparrowDraftConfig.model_type, SparrowDraftConfig, exist_ok=True)
    AutoModel.register(SparrowDraftConfig, SparrowDraftModel, exist_ok=True)
    install()

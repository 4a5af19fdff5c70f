"""Sparrow: lossless speculative decoding for video LLMs on transformers.

Importing the package registers the draft class and installs the one seam `generate(assistant_model=draft)` needs.
"""

from transformers import AutoConfig, AutoModel

from .configuration_sparrow import TREE_PRESETS, SparrowDraftConfig, TreeShape
from .errors import SparrowError
from .generation.candidate_generator import SparrowCandidateGenerator
from .generation.integration import install
from .generation.stats import GenerationStats
from .modeling_sparrow import SparrowDraftModel

__version__ = "0.1.0"

AutoConfig.register(SparrowDraftConfig.model_type, SparrowDraftConfig, exist_ok=True)
AutoModel.register(SparrowDraftConfig, SparrowDraftModel, exist_ok=True)
install()

__all__ = [
    "TREE_PRESETS",
    "GenerationStats",
    "SparrowCandidateGenerator",
    "SparrowDraftConfig",
    "SparrowDraftModel",
    "SparrowError",
    "TreeShape",
]

"""HiViS-like: text rows only, and what the draft feeds itself is corrected by a vector of the step it takes.

After Xie et al., *HiViS: Hiding Visual Tokens from the Drafter for Speculative Decoding in Vision-Language Models*
(2025).
"""

from torch import Tensor, nn

from sparrow_hf.configuration_sparrow import SparrowDraftConfig
from sparrow_hf.modeling_sparrow import SparrowDraftModel


class HiViSDraftConfig(SparrowDraftConfig):
    """As [`SparrowDraftConfig`], without visual rows."""

    model_type = "hivis_draft"

    num_glimpse_tokens: int = 0


class HiViSDraftModel(SparrowDraftModel):
    """A text-only draft that adds a learned vector to the states of each step, step 0 (the target's) included.

    There are as many vectors as training passes (`num_mtp_steps`); deeper levels of a tree take the last one. They
    start at zero, where the draft is Sparrow's.
    """

    config_class = HiViSDraftConfig

    def __init__(self, config: HiViSDraftConfig):
        super().__init__(config)
        self.step_residuals = nn.Embedding(config.num_mtp_steps, config.hidden_size)
        self.post_init()
        nn.init.zeros_(self.step_residuals.weight)

    def read_states(self, states: Tensor, visual_summary: Tensor | None, step: int) -> Tensor:
        """`h + r(step)`."""
        return states + self.step_residuals.weight[min(step, self.config.num_mtp_steps - 1)]

"""The configuration of an exported draft. At module level: vLLM pickles it into the engine's process."""

import os
from importlib.metadata import version
from typing import Any

from transformers import PretrainedConfig

#: Of `config.json` and of the tensors' names; `sparrow export-vllm` writes the same number.
FORMAT = 3
#: The version of vLLM that is supported. Tried: 0.32.0.
SUPPORTED_VLLM = "0.32"


class DraftError(ValueError):
    """A draft cannot be served like this. One sentence: what was found, what was expected, what to do."""


def check_vllm() -> None:
    """Raises [`DraftError`] if the installed vLLM is not one that this plugin was tried on.

    `SPARROW_VLLM_CANARY=1` tries whatever there is (`make canary-vllm`).
    """
    from vllm import __version__ as found

    if not found.startswith(f"{SUPPORTED_VLLM}.") and os.environ.get("SPARROW_VLLM_CANARY") != "1":
        raise DraftError(
            f"sparrow-vllm {version('sparrow-vllm')} supports vLLM {SUPPORTED_VLLM}, found {found}: install that "
            "version, or the sparrow-vllm of yours"
        )


class SparrowVllmConfig(PretrainedConfig):
    """What `sparrow export-vllm` writes.

    The fields of the decoder layer have the names of a Llama configuration; vLLM itself reads
    `eagle_aux_hidden_state_layer_ids`. All that this plugin alone reads lies in `sparrow`:

        format          3
        method          "eagle3" or "eagle"
        target          model_type, num_hidden_layers, hidden_size, vocab_size, visual_token_ids, rms_norm_eps
        feature_layers  target layers whose text states are read; k = output of layer k, the last one normed
        feature_norm    whether the states of several layers are brought to the length of the latest layer's
        bridge_layer    target layer whose visual states are read
        glimpse_rows    visual rows that are kept, 0 being a prompt's first, or null: all
        after_visual    token that follows a visual run, or null
        qk_norm, input_norm, output_norm, fc_bias, project_visual, position_mode    as in the draft's configuration
    """

    model_type = "sparrow_vllm"
    sparrow: dict[str, Any] | None = None

    def __init__(self, **kwargs: Any):
        check_vllm()
        found = kwargs.get("sparrow", {}).get("format", "none")
        # transformers makes an empty one in order to compare.
        if kwargs and found != FORMAT:
            raise DraftError(
                f"these files of a draft have the export format {found}, and this sparrow-vllm reads {FORMAT}: run "
                "`sparrow export-vllm DRAFT OUTPUT` with the sparrow-hf of this version, and give OUTPUT to vLLM"
            )
        self.sparrow = kwargs.pop("sparrow", None)
        super().__init__(**kwargs)


class RawDraftConfig(SparrowVllmConfig):
    """The files of a draft that was not exported; they are refused, since they have no format."""

    model_type = "sparrow_draft"
    # transformers would make one that checks nothing.
    __init__ = SparrowVllmConfig.__init__

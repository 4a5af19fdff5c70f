"""Similarities are those of `output_hidden_states=True`."""

import torch
from subjects import Subject
from torch.nn import functional

from sparrow_hf.analysis import internalization
from sparrow_hf.analysis.internalization import InputSimilarity


def test_similarity_of_states_to_the_inputs_of_the_decoder(subject: Subject, monkeypatch) -> None:
    monkeypatch.setattr(internalization, "CHUNK_ROWS", 7)
    answered = subject.answered
    last_layer = []
    handle = subject.view.layers[-1].register_forward_hook(lambda module, args, output: last_layer.append(output))
    with torch.no_grad(), InputSimilarity(subject.view, answered).gathering() as found:
        states = subject.target(**answered.inputs, output_hidden_states=True).hidden_states
    handle.remove()
    # The last entry of `hidden_states` is after the final norm.
    states = [*states[:-1], last_layer[0]]
    for kind, rows in (("visual", answered.is_visual), ("text", ~answered.is_visual)):
        expected = [
            functional.cosine_similarity(state[0, rows], states[0][0, rows], dim=-1).mean() for state in states[1:]
        ]
        torch.testing.assert_close(found.similarity[kind], torch.stack(expected), atol=1e-5, rtol=0)
    assert (found.similarity["visual"] - found.similarity["text"]).abs().max() > 1e-3

"""The passes against decoding done by hand, and the shift and the losses against values written by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from sparrow_hf.draft_inputs import draft_positions
from sparrow_hf.training import TrainingStates, read_with_target
from sparrow_hf.training.passes import exact_passes, make_batch, reinput_passes

VISUAL = 9


def in_double(states):
    for name in ("text_states", "last_states", "visual_states"):
        setattr(states, name, getattr(states, name).double())
    return states


def fuse(draft, token_ids, states):
    """FC(e ⊕ h), written out."""
    return draft.fc(torch.cat((draft.embed(token_ids), states), dim=-1))


def decode_by_hand(draft, states, kept, chain_start, num_steps):
    """What decoding computes when the last text with a true state is the text token `chain_start`: (steps, H)."""
    text_ids = states.input_ids[kept.text]
    embeds, position_ids = [], []
    text, visual = 0, 0
    for is_visual, position in zip(
        kept.is_visual.tolist(), kept.position_ids(draft.config.position_mode).tolist(), strict=True
    ):
        if text > chain_start:
            break
        if is_visual:
            state = states.visual_states[states.visual_rows.tolist().index(int(kept.visual[visual]))]
            embeds.append(draft.fc(torch.cat((0 * state, state))) if draft.config.project_visual else state)
            visual += 1
        else:
            embeds.append(fuse(draft, text_ids[text + 1], draft.fuse(states.text_states[text])))
            text += 1
        position_ids.append(position)

    cache = DynamicCache()
    for row, position in zip(embeds, position_ids, strict=True):
        out = draft(row[None, None], torch.tensor([[position]]), None, cache)
    outputs = [out.last_hidden_state[0, 0]]
    for step in range(1, num_steps):
        row = fuse(draft, text_ids[chain_start + step + 1], outputs[-1])
        out = draft(row[None, None], torch.tensor([[position_ids[-1] + step]]), None, cache)
        outputs.append(out.last_hidden_state[0, 0])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_glimpse_tokens": 0, "project_visual": True},
        {"position_mode": "original", "input_norm": False, "output_norm": False},
        {"feature_layers": [2, -1], "num_hidden_layers": 2, "attn_implementation": "eager"},
    ],
    ids=["glimpse", "text-only", "original-positions", "two-features-two-layers-eager"],
)
def test_exact_passes_are_what_decoding_computes(make_draft, samples, target, overrides):
    overrides = dict(overrides)
    implementation = overrides.pop("attn_implementation", "sdpa")
    draft = make_draft(**overrides).double()
    draft.set_attn_implementation(implementation)
    read = []
    for sample in samples[:2]:
        states = in_double(read_with_target(draft, sample))
        kept = draft_positions(states.input_ids, draft.config.visual_token_ids, draft.config.num_glimpse_tokens)
        read.append((states, kept))
    batch = make_batch(read, draft.config.position_mode)
    with torch.no_grad():
        passes = exact_passes(draft, batch, num_passes=5)
        for index, (states, kept) in enumerate(read):
            num_losses = int(batch.num_losses[index])
            for chain in range(0, num_losses, 2):
                steps = min(5, num_losses - chain)
                expected = decode_by_hand(draft, states, kept, int(batch.first_loss[index]) + chain, steps)
                found = torch.stack([passes[step][index, chain] for step in range(steps)])
                # Eager attention and the norms compute in fp32 whatever the dtype.
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def hand_made_states(num_features=2, visual_rows=(2, 3, 4)):
    """Prompt `5 6 V V V 7`, answer `1 2 3 4`; the state of row i is filled with i, its bridge state with −i."""
    input_ids = torch.tensor([5, 6, VISUAL, VISUAL, VISUAL, 7, 1, 2, 3, 4])
    text = [0, 1, 5, 6, 7, 8, 9]
    fill = torch.tensor(text, dtype=torch.float)[:, None]
    return TrainingStates(
        input_ids=input_ids,
        answer_start=6,
        text_states=fill.expand(-1, num_features).clone(),
        last_states=fill.expand(-1, 2).clone() + 100,
        visual_rows=torch.tensor(visual_rows),
        visual_states=-torch.tensor(visual_rows, dtype=torch.float)[:, None].expand(-1, 2).clone(),
    )


@pytest.mark.parametrize(("mode", "positions"), [("compact", [0, 1, 2, 3, 4, 5]), ("original", [0, 1, 3, 5, 6, 7])])
def test_rows_and_shift_by_hand(mode, positions):
    states = hand_made_states()
    kept = draft_positions(states.input_ids, [VISUAL], num_glimpse_tokens=1)  # keeps position 3
    batch = make_batch([(states, kept)], mode)
    # text tokens 5 6 7 1 2 3 4 without their last two; each row holds the next *text* token: 6 is followed by 7
    assert batch.next_ids.tolist() == [[6, 7, 1, 2, 3]]
    assert batch.text_states[0, :, 0].tolist() == [0, 1, 5, 6, 7]
    assert batch.text_positions.tolist() == [[0, 1, 3, 4, 5]]
    assert batch.visual_positions.tolist() == [[2]]
    assert batch.visual_states[0, :, 0].tolist() == [-3]
    assert batch.position_ids.tolist() == [positions]
    # the row of the prompt's last token (7) is the first with a loss: it predicts the second answer token
    assert (batch.first_loss.tolist(), batch.num_losses.tolist()) == ([2], [3])
    # judged by the states of answer tokens 1 2 3, whose successors are 2 3 4 (the end of the answer included)
    assert batch.target_states[0, :, 0].tolist() == [106, 107, 108]
    assert [batch.has_loss(step).tolist() for step in range(3)] == [[[True] * 3], [[True] * 2], [[True]]]


def test_padding_changes_nothing(make_draft, recorded):
    """A sample alone and the same one beside a longer one: same outputs."""
    draft = make_draft()
    read = []
    for row in recorded[:2]:
        states = TrainingStates.from_row(row)
        read.append((states, draft_positions(states.input_ids, draft.config.visual_token_ids, num_glimpse_tokens=4)))
    with torch.no_grad():
        for passes in (exact_passes, reinput_passes):
            alone = passes(draft, make_batch(read[:1], "compact"), 3)
            together = passes(draft, make_batch(read, "compact"), 3)
            for step in range(3):
                width = alone[step].shape[1]
                torch.testing.assert_close(together[step][:1, :width], alone[step], rtol=1e-4, atol=1e-5)


def test_reinput_passes_shift_their_own_output(make_draft, recorded):
    """Against the definition: pass 1 is pass 0 with the answer rows' states replaced by outputs one row earlier."""
    draft = make_draft(feature_layers=[-1])
    states = TrainingStates.from_row(recorded[0])
    states = replace(states, text_states=states.last_states)
    kept = draft_positions(states.input_ids, draft.config.visual_token_ids, num_glimpse_tokens=4)
    first_answer = int((kept.text < states.answer_start).sum())

    def run(text_states):
        embeds = torch.zeros((1, len(kept.indices), draft.config.hidden_size))
        ids = states.input_ids[kept.text]
        next_ids = torch.cat((ids[1:], ids[-1:]))
        embeds[0, ~kept.is_visual] = fuse(draft, next_ids, text_states)
        at = torch.searchsorted(states.visual_rows, kept.visual)
        embeds[0, kept.is_visual] = states.visual_states[at]
        size = len(kept.indices)
        mask = torch.full((size, size), -1e9).triu(1)[None, None]
        return draft(embeds, torch.arange(size)[None], mask).last_hidden_state[0, ~kept.is_visual]

    with torch.no_grad():
        found = reinput_passes(draft, make_batch([(states, kept)], "compact"), 3)
        text_states = states.text_states
        for step in range(3):
            predicted = run(text_states)
            expected = predicted[first_answer - 1 + step : -2]
            torch.testing.assert_close(found[step][0], expected, rtol=1e-4, atol=1e-5)
            text_states = text_states.clone()
            text_states[first_answer:] = predicted[first_answer - 1 : -1]


def test_gradients_flow_through_earlier_passes(make_draft, recorded):
    """The last pass alone must reach FC through the keys and outputs of all earlier ones: compare with differences."""
    draft = make_draft().double()
    states = in_double(TrainingStates.from_row(recorded[0]))
    kept = draft_positions(states.input_ids, draft.config.visual_token_ids, num_glimpse_tokens=4)
    batch = make_batch([(states, kept)], "compact")

    # A direction, because the sum of squares of a normed state does not change.
    direction = torch.linspace(-1, 1, draft.config.hidden_size, dtype=torch.double)

    def loss():
        return (exact_passes(draft, batch, 3)[2] @ direction).sum()

    loss().backward()
    weight = draft.layers[0].self_attn.k_proj.weight
    row, column = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
    with torch.no_grad():
        weight[row, column] += 1e-3
        up = loss()
        weight[row, column] -= 2e-3
        down = loss()
    assert float((up - down) / 2e-3) == pytest.approx(float(weight.grad[row, column]), rel=1e-3)

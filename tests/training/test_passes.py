"""The passes against decoding done by hand, and the shift and loss rows against values written by hand."""

import pytest
import torch
from transformers import DynamicCache

from sparrow_hf.rows import draft_rows
from sparrow_hf.training import TrainingStates, read_with_target
from sparrow_hf.training.passes import exact_passes, make_batch, reinput_passes

VISUAL = 9


def in_double(states):
    for name in ("text_states", "last_states", "visual_states"):
        setattr(states, name, getattr(states, name).double())
    return states


def decode_by_hand(draft, states, rows, chain_start, num_steps):
    """What decoding computes when the last row with a true state is the text row `chain_start`: (steps, H)."""
    mode, window = draft.config.position_mode, draft.config.sliding_window
    text_ids = states.input_ids[rows.text]
    embeds, positions, text_index = [], [], []
    text, visual = 0, 0
    for is_visual, position in zip(rows.is_visual.tolist(), rows.positions(mode).tolist(), strict=True):
        if text > chain_start:
            break
        if is_visual:
            at = states.visual_rows.tolist().index(int(rows.visual[visual]))
            embeds.append(draft.fuse_visual(states.visual_states[at]))
            text_index.append(None)
            visual += 1
        else:
            token = draft.embed(text_ids[text + 1][None, None])[0, 0]
            embeds.append(draft.fuse(token, draft.reduce_features(states.text_states[text])))
            text_index.append(text)
            text += 1
        positions.append(position)

    def row_mask(query, num_keys):
        """Additive (1, 1, 1, keys): committed rows that slid out of the window are hidden, chain rows never."""
        hidden = [
            window is not None and index is not None and query - index >= window for index in text_index[:num_keys]
        ]
        hidden += [False] * (num_keys - len(hidden))
        return -1e9 * torch.tensor(hidden, dtype=draft.dtype)[None, None, None]

    cache = DynamicCache()
    for index, (row, position) in enumerate(zip(embeds, positions, strict=True)):
        query = sum(kind is not None for kind in text_index[: index + 1]) - 1
        out = draft(row[None, None], torch.tensor([[position]]), row_mask(query, index + 1), cache)
    outputs = [out.last_hidden_state[0, 0]]
    for step in range(1, num_steps):
        token = draft.embed(text_ids[chain_start + step + 1][None, None])[0, 0]
        row = draft.fuse(token, outputs[-1])[None, None]
        mask = row_mask(chain_start + step, len(embeds) + step)
        out = draft(row, torch.tensor([[positions[-1] + step]]), mask, cache)
        outputs.append(out.last_hidden_state[0, 0])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_glimpse_tokens": 0, "project_visual": True},
        {"position_mode": "original", "input_norm": False, "output_norm": False},
        {"sliding_window": 5},
        {"feature_layers": [2, -1], "num_hidden_layers": 2, "attn_implementation": "eager"},
    ],
    ids=["glimpse", "text-only", "original-positions", "window", "two-features-two-layers-eager"],
)
def test_exact_passes_are_what_decoding_computes(make_draft, samples, target, overrides):
    overrides = dict(overrides)
    implementation = overrides.pop("attn_implementation", "sdpa")
    draft = make_draft(**overrides).double()
    draft.set_attn_implementation(implementation)
    read = []
    for sample in samples[:2]:
        states = in_double(read_with_target(draft, sample))
        rows = draft_rows(states.input_ids, draft.config.visual_token_ids, draft.config.num_glimpse_tokens)
        read.append((states, rows))
    batch = make_batch(read, draft.config.position_mode)
    with torch.no_grad():
        passes = exact_passes(draft, batch, num_passes=5)
        for index, (states, rows) in enumerate(read):
            num_loss_rows = int(batch.num_loss_rows[index])
            for chain in range(0, num_loss_rows, 2):
                steps = min(5, num_loss_rows - chain)
                expected = decode_by_hand(draft, states, rows, int(batch.first_loss_row[index]) + chain, steps)
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
    rows = draft_rows(states.input_ids, [VISUAL], num_glimpse_tokens=1)  # keeps prompt row 3
    batch = make_batch([(states, rows)], mode)
    # text tokens 5 6 7 1 2 3 4 without their last two; each row holds the next *text* token: 6 is followed by 7
    assert batch.next_ids.tolist() == [[6, 7, 1, 2, 3]]
    assert batch.text_states[0, :, 0].tolist() == [0, 1, 5, 6, 7]
    assert batch.text_rows.tolist() == [[0, 1, 3, 4, 5]]
    assert batch.visual_rows.tolist() == [[2]]
    assert batch.visual_states[0, :, 0].tolist() == [-3]
    assert batch.positions.tolist() == [positions]
    # the row of the prompt's last token (7) is the first with a loss: it predicts the second answer token
    assert (batch.first_loss_row.tolist(), batch.num_loss_rows.tolist()) == ([2], [3])
    # judged by the states of answer tokens 1 2 3, whose successors are 2 3 4 (the end of the answer included)
    assert batch.target_states[0, :, 0].tolist() == [106, 107, 108]
    assert [batch.has_loss(step).tolist() for step in range(3)] == [[[True] * 3], [[True] * 2], [[True]]]


def test_padding_changes_nothing(make_draft, recorded):
    """A sample alone and the same one beside a longer one: same outputs."""
    draft = make_draft()
    read = []
    for row in recorded[:2]:
        states = TrainingStates.from_row(row)
        read.append((states, draft_rows(states.input_ids, draft.config.visual_token_ids, num_glimpse_tokens=4)))
    with torch.no_grad():
        for passes in (exact_passes, reinput_passes):
            alone = passes(draft, make_batch(read[:1], "compact"), 3)
            together = passes(draft, make_batch(read, "compact"), 3)
            for step in range(3):
                width = alone[step].shape[1]
                torch.testing.assert_close(together[step][:1, :width], alone[step], rtol=1e-4, atol=1e-5)


def test_reinput_passes_shift_their_own_output(make_draft, recorded):
    """Against the definition: pass 1 is pass 0 with the answer rows' states replaced by outputs one row earlier."""
    draft = make_draft()
    states = TrainingStates.from_row(recorded[0])
    rows = draft_rows(states.input_ids, draft.config.visual_token_ids, num_glimpse_tokens=4)
    first_answer = int((rows.text < states.answer_start).sum())

    def run(text_states):
        embeds = torch.zeros((1, len(rows.indices), draft.config.hidden_size))
        ids = states.input_ids[rows.text]
        next_ids = torch.cat((ids[1:], ids[-1:]))
        embeds[0, ~rows.is_visual] = draft.fuse(draft.embed(next_ids[None])[0], text_states)
        at = torch.searchsorted(states.visual_rows, rows.visual)
        embeds[0, rows.is_visual] = draft.fuse_visual(states.visual_states[at])
        size = len(rows.indices)
        mask = torch.full((size, size), -1e9).triu(1)[None, None]
        return draft(embeds, torch.arange(size)[None], mask).last_hidden_state[0, ~rows.is_visual]

    with torch.no_grad():
        found = reinput_passes(draft, make_batch([(states, rows)], "compact"), 3)
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
    rows = draft_rows(states.input_ids, draft.config.visual_token_ids, num_glimpse_tokens=4)
    batch = make_batch([(states, rows)], "compact")

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

"""The rows that `sparrow-vllm` finds, piece by piece and in any slots, are those of `sparrow_hf.draft_inputs`."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from sparrow_vllm.rows import MAX_FRAME_HEADER_TOKENS, Batch, describe

from sparrow_hf import draft_inputs

VISUAL, AFTER, BLOCK, LONGEST = 1, 2, 4, 1000
NUM_GLIMPSE = 10
NO_GLIMPSE = torch.zeros(LONGEST, dtype=torch.bool)
GLIMPSE = NO_GLIMPSE.clone()
GLIMPSE[draft_inputs.logarithmic(torch.arange(LONGEST), NUM_GLIMPSE)] = True


@dataclass
class Request:
    """A prompt with its KV blocks, and what was found of its rows so far."""

    ids: list[int]
    blocks: list[int]
    done: int = 0
    kept: dict[int, int] = field(default_factory=dict)
    joined: dict[int, int] = field(default_factory=dict)
    visual: set[int] = field(default_factory=set)


def run(requests: list[Request], sizes: list[int], memory: torch.Tensor, padding: int = 0, **options: object) -> None:
    """One forward with so many further rows of each request."""
    spans = [range(request.done, request.done + size) for request, size in zip(requests, sizes, strict=True)]
    following = [request.ids[i + 1] for request, span in zip(requests, spans, strict=True) for i in span]
    width = max(len(request.blocks) for request in requests)
    batch = Batch(
        num_rows=len(following) + padding,
        starts=torch.tensor([0, *sizes]).cumsum(0).int(),
        lengths=torch.tensor([span.stop for span in spans]).int(),
        blocks=torch.tensor([request.blocks + [0] * (width - len(request.blocks)) for request in requests]).int(),
        block_size=BLOCK,
        max_length=LONGEST,
    )
    ids = torch.tensor(following + [0] * padding)
    rows = describe(
        batch,
        next_ids=ids,
        next_is_visual=ids == VISUAL,
        memory=memory,
        **{"glimpse": GLIMPSE, "after_visual": AFTER, "compact": True} | options,
    )
    assert rows.slots[len(following) :].tolist() == [-1] * padding
    at = 0
    for request, span in zip(requests, spans, strict=True):
        for i in span:
            assert rows.slots[at] == request.blocks[i // BLOCK] * BLOCK + i % BLOCK
            if not rows.hidden[at]:
                request.kept[i] = int(rows.positions[at])
                request.joined[i] = int(rows.next_ids[at])
            if rows.is_visual[at]:
                request.visual.add(i)
            at += 1
        request.done = span.stop


def check(request: Request) -> None:
    """Compares with the whole prompt at once, as sparrow_hf reads it."""
    ids = torch.tensor(request.ids[: request.done])
    wanted = draft_inputs.draft_positions(ids, [VISUAL], NUM_GLIMPSE, "logarithmic")
    assert list(request.kept) == wanted.indices.tolist()
    assert list(request.kept.values()) == wanted.position_ids("compact").tolist()
    assert request.visual == set((ids == VISUAL).nonzero().flatten().tolist())
    text = wanted.text.tolist()
    behind = [request.ids[i] for i in text[1:]] + [request.ids[request.done]]
    assert [request.joined[i] for i in text] == behind


def prompt(random_: random.Random, runs: int, shortest_text: int, after: int | None = AFTER) -> list[int]:
    """Text, and visual runs between it, each followed by `after` or any token. The last token is a generated one."""
    ids = [random_.randint(3, 90) for _ in range(random_.randint(1, 6))]
    for _ in range(runs):
        ids += [VISUAL] * random_.randint(1, 12) + [after or random_.randint(3, 90)]
        ids += [random_.randint(3, 90) for _ in range(random_.randint(shortest_text, 30))]
    return [*ids, 95]


def with_blocks(prompts: list[list[int]]) -> list[Request]:
    free = list(range(1, 400))
    random.Random(0).shuffle(free)
    free.append(0)
    return [Request(ids, [free.pop() for _ in range(len(ids) // BLOCK + 4)]) for ids in prompts]


def new_memory() -> torch.Tensor:
    return torch.full((400 * BLOCK + 1,), -1)


@pytest.mark.parametrize("seed", range(20))
def test_whole_prompts_of_a_batch(seed: int) -> None:
    numbers = random.Random(seed)
    # Short stretches of text between the runs are frame headers, some of them longer than a header can be.
    requests = with_blocks([prompt(numbers, numbers.randint(0, 4), 0, after=None) for _ in range(3)])
    run(requests, [len(request.ids) - 1 for request in requests], new_memory(), padding=seed % 3)
    for request in requests:
        check(request)


@pytest.mark.parametrize("seed", range(20))
def test_prompts_in_pieces_among_others(seed: int) -> None:
    """Pieces of any size, and answers of some requests while others are still read."""
    numbers = random.Random(seed)
    prompts = [prompt(numbers, numbers.randint(0, 3), MAX_FRAME_HEADER_TOKENS) for _ in range(4)]
    requests = with_blocks([ids + [numbers.randint(3, 90) for _ in range(8)] for ids in prompts])
    memory = new_memory()
    while waiting := [request for request in requests if request.done < len(request.ids) - 1]:
        chosen = numbers.sample(waiting, numbers.randint(1, len(waiting)))
        sizes = [min(numbers.randint(1, 9), len(request.ids) - 1 - request.done) for request in chosen]
        run(chosen, sizes, memory, padding=numbers.randint(0, 2))
    for request in requests:
        check(request)


def test_a_cached_prefix_and_a_rejected_draft_leave_what_their_slots_hold() -> None:
    first = with_blocks([prompt(random.Random(5), 2, MAX_FRAME_HEADER_TOKENS) + [50, 51, 52, 53]])[0]
    memory, shared = new_memory(), 3 * BLOCK
    run([first], [len(first.ids) - 5], memory)
    # Its first three blocks serve another request, that goes on as it does up to the token behind them.
    other = Request([*first.ids[: shared + 1], AFTER, 60, 61], first.blocks[:3] + [390, 391], shared)
    other.kept = {i: position for i, position in first.kept.items() if i < shared}
    other.joined = {i: token for i, token in first.joined.items() if i < shared}
    other.visual = {i for i in first.visual if i < shared}
    run([other], [3], memory)
    check(other)
    # Three drafted tokens are read and rejected; the rows after the first of them are read again.
    draft = Request([*first.ids[: first.done + 1], 70, 71, 72], first.blocks, first.done)
    run([draft], [3], memory)
    run([first], [4], memory)
    check(first)


def test_a_header_that_begins_in_an_earlier_piece() -> None:
    """What was read before the next frame could be seen stays; the rest of the header is hidden."""
    request = with_blocks([[7, VISUAL, 8, 9, 10, 11, VISUAL, 12, 13, 95]])[0]
    memory = new_memory()
    run([request], [4], memory, glimpse=NO_GLIMPSE)
    run([request], [5], memory, glimpse=NO_GLIMPSE)
    assert request.kept == {0: 0, 2: 1, 3: 2, 7: 3, 8: 4}
    longer = with_blocks([[7, VISUAL, *range(20, 40), VISUAL, 12, 13, 95]])[0]
    run([longer], [14], memory, glimpse=NO_GLIMPSE)
    run([longer], [11], memory, glimpse=NO_GLIMPSE)
    assert list(longer.kept) == [0, *range(2, 22), 23, 24]


def test_positions_of_the_prompt_and_no_glimpse() -> None:
    request = with_blocks([[7, 8, VISUAL, VISUAL, VISUAL, AFTER, 9, 95]])[0]
    run([request], [7], new_memory(), glimpse=NO_GLIMPSE, compact=False)
    assert request.kept == {0: 0, 1: 1, 5: 5, 6: 6} and request.joined == {0: 8, 1: AFTER, 5: 9, 6: 95}


def test_a_row_before_a_run_whose_end_is_not_known() -> None:
    request = with_blocks([[7, 8, VISUAL, VISUAL, 30, 95]])[0]
    memory = new_memory()
    run([request], [3], memory)
    assert request.joined[1] == AFTER
    again = with_blocks([request.ids])[0]
    run([again], [3], memory, after_visual=None)
    assert again.joined[1] == VISUAL


def test_rows_beyond_the_longest_request_are_left_out() -> None:
    memory = new_memory()
    batch = Batch(2, torch.tensor([0, 2]), torch.tensor([11]), torch.tensor([[5, 6, 7]]), BLOCK, max_length=10)
    ids = torch.tensor([3, 4])
    rows = describe(batch, ids, ids == VISUAL, memory, GLIMPSE, AFTER, compact=True)
    assert rows.slots.tolist() == [7 * BLOCK + 1, -1]

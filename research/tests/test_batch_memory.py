"""The bytes of live tensors, where they are known."""

import torch

from sparrow_research.batch_memory import LiveBytes


def test_bytes_count_while_their_tensor_lives() -> None:
    given = torch.zeros(1000)
    with LiveBytes() as memory:
        kept = torch.zeros(10)
        view, same = kept[2:].reshape(2, 4), given.add_(1)
        assert memory.live == 40
        del kept
        assert memory.live == 40  # the view keeps them
        for _ in range(3):
            (torch.zeros(100) + 1).sum()
        assert memory.live == 40 and memory.peak == 40 + 800
        del view
        assert memory.live == 0
    assert same is given

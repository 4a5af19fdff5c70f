"""The bytes of live tensors, where they are known."""

import json
from pathlib import Path

import torch

from sparrow_research.batch_memory import LiveBytes, main


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


def test_a_single_call_is_measured_with_the_draft_as_it_ships(tmp_path: Path) -> None:
    words = ["--visual-tokens", "40", "--single", "--max-new-tokens", "6", "--output", str(tmp_path / "found.json")]
    main(words)
    found = json.loads((tmp_path / "found.json").read_text())["peak_bytes"]
    assert found.keys() == {"1"} and found["1"].keys() == {"plain", "draft", "in step"}
    # The first call with a draft makes something once. The second adds nothing to the peak of a prefill, and to the
    # rounds what lies behind the cache.
    assert found["1"]["in step"]["prefill"] == found["1"]["plain"]["prefill"] < found["1"]["draft"]["prefill"]
    assert found["1"]["in step"]["rounds"] > found["1"]["plain"]["rounds"]

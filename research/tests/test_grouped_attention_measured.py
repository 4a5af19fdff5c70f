"""The measurement of grouped heads: what it measures is the same attention in every variant."""

import torch

from sparrow_research.grouped_attention import NODES, attention_alone, measured


def test_every_way_to_verify_gives_the_same_states() -> None:
    torch.manual_seed(0)
    variants = attention_alone(40)
    with torch.no_grad():
        for size in NODES:
            expanded, folded = (variants[name](size)[0] for name in ("expanded", "folded"))
            torch.testing.assert_close(folded, expanded, rtol=0, atol=1e-5)
        torch.testing.assert_close(variants["plain"](1)[0], variants["plain, grouped"](1)[0], rtol=0, atol=1e-5)


def test_ratios_are_those_of_the_plain_step() -> None:
    found = measured(attention_alone(40), repeats=2, what="test")
    plain = found["in_plain_steps"]["plain, 1 nodes"]
    assert plain["median"] == 1.0 and plain["range"][0] <= 1.0 <= plain["range"][1]
    assert len(found["in_plain_steps"]) == 2 + 2 * len(NODES)

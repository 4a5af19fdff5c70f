"""Prompts of the real language model: as many as planned, all different, and no subject in two splits."""

import json
from pathlib import Path

import pytest

from sparrow_research.language.prompts import SIZES, SUBJECTS, tasks

KEPT = Path(__file__).parents[1] / "data" / "language" / "prompts"


def kept(split: str) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in (KEPT / f"{split}.jsonl").read_text().splitlines()]


def test_no_subject_is_in_two_splits() -> None:
    asked = {split: set(tasks(split, 10**6)) for split in SIZES}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())) == len(SUBJECTS) * 20


@pytest.mark.parametrize("split", SIZES)
def test_kept_prompts_are_those_that_are_made(split: str) -> None:
    prompts = kept(split)
    assert len(prompts) == len(set(prompts)) == SIZES[split]
    assert set(tasks(split, SIZES[split] // 2)) <= set(prompts)
    others = set().union(*(kept(other) for other in SIZES if other != split))
    assert not others & set(prompts)

"""Digests of files and of JSON objects: known values, and every single flipped bit is noticed."""

import json
from pathlib import Path

import pytest

from sparrow_hf.checksums import SEAL, Digests, sealed, unseal
from sparrow_hf.errors import TrainingDataError

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_every_flipped_bit_of_a_sealed_object_is_noticed() -> None:
    value = {"a": 1, "b": [0.5, "x"]}
    text = json.dumps(sealed(value)).encode()
    assert unseal(json.loads(text)) == (value, True) and unseal(value) == (value, False) and unseal({}) == ({}, False)
    for at in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[at // 8] ^= 1 << at % 8
        try:
            found = unseal(json.loads(bytes(flipped)))
        except ValueError:
            continue
        assert found == (value, True), flipped
    assert list(sealed(value))[-1] == SEAL


def test_a_folder_is_checked_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    digests = Digests(tmp_path, TrainingDataError, "write it again")
    digests.check(tmp_path / "a")
    digests.add(tmp_path / "a")
    assert (tmp_path / "digests.sha256").read_text() == f"{EMPTY}  a\n"
    (tmp_path / "a").write_text("b")
    with pytest.raises(TrainingDataError, match="a is not the file that was written .*: write it again"):
        digests.check(tmp_path / "a")
    with pytest.raises(TrainingDataError, match="b is not in digests.sha256, so it was not written completely"):
        digests.check(tmp_path / "b")

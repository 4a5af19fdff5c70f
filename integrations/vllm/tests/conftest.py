"""Skips what needs vLLM, or what transformers said, where they are not there."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

REFERENCES = "SPARROW_VLLM_REFERENCES"


def _folder() -> Path:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: `make test-vllm` runs these in an environment of their own")
    if REFERENCES not in os.environ:
        pytest.skip(f"{REFERENCES} does not name the folder that references.py wrote: see `make test-vllm`")
    return Path(os.environ[REFERENCES])


@pytest.fixture(scope="session")
def qwen():
    from engines import Family

    return Family(_folder() / "qwen2.5-vl", "eagle3")


@pytest.fixture(scope="session")
def llava():
    from engines import Family

    return Family(_folder() / "llava-onevision", "eagle")


@pytest.fixture(scope="session")
def qwen3():
    from engines import Family

    return Family(_folder() / "qwen3-vl", "eagle3")


@pytest.fixture(scope="session")
def plain(qwen):
    """What vLLM says to `others` without a draft. To the clips it says what transformers says."""
    from engines import engine, others

    with engine(qwen, draft=False) as without:
        answers = without.answer([qwen.request(clip) for clip in qwen.clips])
        assert answers.ids == [clip["vllm"]["ids"] for clip in qwen.clips]
        return without.answer(others(qwen)).ids

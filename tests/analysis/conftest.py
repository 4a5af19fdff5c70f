"""The targets of the analysis tests: each architecture, and one for all other tests."""

import pytest
from subjects import Subject

from families import FAMILIES, FAMILY_BY_NAME


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each of the first nine architectures in turn."""
    return Subject(request.param)


@pytest.fixture(scope="session")
def qwen() -> Subject:
    """Qwen2.5-VL alone, for what does not depend on the family."""
    return Subject(FAMILY_BY_NAME["qwen2_5_vl"])

"""Fixtures of every test, here and of research/, and the two conditions they all run under: no network, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from families import FAMILIES
from tiny_targets import Family

# The models of the tests are so small that a second thread costs more than it computes.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Any:
    """Lets a connection beyond this machine fail where it is made, instead of after a timeout or not at all."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Each of the nine first architectures in turn; `lossless.py` has cases of all."""
    return request.param


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A signal that what is tested does not handle fails the test, instead of ending them all."""

    def unhandled(number: int, _: object) -> None:
        raise AssertionError(f"{signal.Signals(number).name} was not handled")

    before = {number: signal.signal(number, unhandled) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

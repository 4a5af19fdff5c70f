"""`rounds`, `compiled`, `compiled_long`: whole calls of `generate()`, plain and with a draft."""

from typing import Any

from .calls import add_ratios, measure_arm
from .models import prompt
from .session import Part, Session

_STATIC: dict[str, Any] = {"cache_implementation": "static"}
_NOT_COMPILED = _STATIC | {"disable_compile": True}

Arms = list[tuple[str | None, dict[str, Any]]]


def rounds(session: Session, part: Part) -> None:
    """Without torch.compile: the middle length first, then the longest, then the shortest."""
    short, middle, _, longest = session.sizes.lengths
    arms: Arms = [
        (None, {}),
        ("chain-5", {}),
        ("chain-5", _NOT_COMPILED),
        (None, _NOT_COMPILED),
        ("chain-10", {}),
        ("chain-10", _NOT_COMPILED),
    ]
    for length in (middle, longest, short):
        _measure(session, part, length, arms, repeats=2)


def compiled(session: Session, part: Part) -> None:
    """What transformers compiles by itself on CUDA, at the middle length; then the same from its files."""
    middle = session.sizes.lengths[1]
    if not session.on_cuda:
        part.header["needs"] = "CUDA: elsewhere transformers compiles nothing by itself"
    _measure(session, part, middle, [(None, _STATIC), ("chain-5", _STATIC)], repeats=2)


def compiled_long(session: Session, part: Part) -> None:
    """The same at the longest; then longer chains, then compiling again, as far as there is time."""
    _, middle, _, longest = session.sizes.lengths
    if not session.on_cuda:
        part.header["needs"] = "CUDA: elsewhere transformers compiles nothing by itself"
    _measure(session, part, longest, [(None, _STATIC), ("chain-5", _STATIC)], repeats=2)
    if session.seconds_left > 90:
        # The compiler's files of `compiled` are there: how long a second process waits.
        _measure(session, part, middle, [(None, _STATIC)], repeats=1)
    if session.seconds_left > 90:
        _measure(session, part, middle, [("chain-10", _STATIC)], repeats=1)


def _measure(session: Session, part: Part, length: int, arms: Arms, repeats: int) -> None:
    inputs = prompt(session.target, session.sizes, length)
    found = []
    for shape, options in arms:
        with part.cell(prompt=length, shape=shape or "plain", options=options):
            session.forget_compiled()
            found.append(measure_arm(session, part, inputs, shape, repeats, **options))
    add_ratios(part, found)

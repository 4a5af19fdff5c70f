"""`rounds`, `compiled`, `compiled_long`: whole calls of `generate()`, plain and with a draft."""

from typing import Any

from .calls import COMPILED, NOT_COMPILED, call, first_difference, measure_arm
from .models import prompt
from .planting import expected_tau
from .session import Part, Session

Arms = list[tuple[str | None, dict[str, Any]]]


def rounds(session: Session, part: Part) -> None:
    """Without torch.compile: the middle length first, then the longest, then the shortest."""
    short, middle, _, longest = session.sizes.lengths
    arms: Arms = [
        (None, {}),
        ("chain-5", NOT_COMPILED),
        ("chain-5", {}),
        ("chain-10", NOT_COMPILED),
        (None, NOT_COMPILED),
        ("chain-10", {}),
    ]
    for shape in (None, "chain-5"):
        # What the process loads at first is not a cost of the first arm.
        call(session, prompt(session.target, session.sizes, short), session.sizes.few_tokens, shape)
    _measure(session, part, middle, arms, repeats=2)
    _measure(session, part, longest, arms[:5], repeats=1)
    _measure(session, part, short, arms[:3], repeats=2)


def compiled(session: Session, part: Part) -> None:
    """What transformers compiles by itself on CUDA, at the middle length."""
    _needs_cuda(session, part)
    _measure(session, part, session.sizes.lengths[1], [(None, COMPILED), ("chain-5", COMPILED)], repeats=2)


def compiled_long(session: Session, part: Part) -> None:
    """The longest length: what is compiled beside what is not, all in one run."""
    _needs_cuda(session, part)
    arms: Arms = [(None, {}), ("chain-5", {}), ("chain-5", NOT_COMPILED), (None, COMPILED), ("chain-5", COMPILED)]
    # Plain decoding with the attention that a draft gives the target.
    arms.append((None, COMPILED | {"attention": "packed"}))
    _measure(session, part, session.sizes.lengths[-1], arms, repeats=1)


def _needs_cuda(session: Session, part: Part) -> None:
    if not session.on_cuda:
        part.header["needs"] = "CUDA: elsewhere transformers compiles nothing by itself"


def _measure(session: Session, part: Part, length: int, arms: Arms, repeats: int) -> None:
    """Rows on the arms, then what each round of a draft costs and gives against each plain step of this run."""
    inputs = prompt(session.target, session.sizes, length)
    known, found = session.calls.setdefault(length, []), []
    for shape, options in arms:
        with part.cell(prompt=length, shape=shape or "plain", options=options):
            session.forget_compiled()
            found.append(measure_arm(session, part, inputs, shape, repeats, **options))
    for row in known + found:
        for plain in known + found:
            new = row in found or plain in found
            if new and not row["arm"].startswith("plain") and plain["arm"].startswith("plain"):
                _add_ratio(part, row, plain)
    known += found


def _add_ratio(part: Part, row: dict[str, Any], plain: dict[str, Any]) -> None:
    tau = expected_tau(int(row["arm"].split(",")[0].removeprefix("chain-")))
    steps = row["round_ms"] / plain["round_ms"]
    part.add(
        prompt=row["prompt"],
        arm=row["arm"],
        against=plain["arm"],
        steps_per_round=steps,
        ratio=tau / steps,
        how=f"projected from measured rounds to {tau:.1f} tokens in each",
        planted_ratio=plain["round_ms"] / row["planted_token_ms"] if "planted_token_ms" in row else None,
        planted_tau=row.get("planted_tau"),
        first_difference=first_difference(row["ids"], plain["ids"]),
    )

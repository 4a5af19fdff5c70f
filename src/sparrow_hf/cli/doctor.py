"""`sparrow doctor`: what is installed here and whether drafts can be used with it; how a video file is read; and
how a target verifies drafts."""

import platform
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import VideoError
from .common import (
    BAD_INPUT,
    AttentionOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    FpsOption,
    MaxFramesOption,
    quiet_transformers,
)

if TYPE_CHECKING:
    from ..data.video import Sampling

#: Longest list of times that is printed as a whole, and how much of a longer one is.
ALL_TIMES, FIRST_TIMES = 64, 32


def doctor(
    video: Annotated[
        str | None, typer.Option(help="Video file, or its URL, to look into, instead of the installation.")
    ] = None,
    fps: FpsOption = None,
    max_frames: MaxFramesOption = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Number of frames to read, instead of --fps.")] = None,
    start: Annotated[float | None, typer.Option(min=0, help="Second of the video at which reading begins.")] = None,
    end: Annotated[float | None, typer.Option(min=0, help="Second of the video at which reading ends.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Video LLM to look into, instead of the installation: a folder or a Hub id.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    attention: AttentionOption = None,
) -> None:
    """Prints versions, which extras are installed, the state of the contract with transformers, and the devices.

    Ends with 2 if drafts cannot be used with the installed transformers. Put its output into a report of a fault.
    With --video, prints what was found in a video file and which of its frames would be read.
    With --target, prints how its drafts are verified, and how far a chain and a tree in one forward differ from the
    same tokens one by one. Ends with 2 if drafts cannot be used with it.
    """
    if video is not None:
        from ..data.video import Sampling

        try:
            sampling = Sampling(fps, max_frames, num_frames, start=start, end=end)
        except ValueError as error:
            raise VideoError(str(error)) from None
        print_facts(facts_of_video(video, sampling))
    elif target is not None:
        quiet_transformers()
        print_facts(facts_of_target(target, dtype, device, attention))
    else:
        print_installation()


def print_facts(facts: dict[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))
    Console().print(table)


def facts_of_video(source: str, sampling: "Sampling") -> dict[str, str]:
    """What is in a video file, and which frames [`read_video`] would keep of it."""
    from ..data.video import plan_video

    video, times, choice = plan_video(source, sampling)
    facts = {"file": source} | video.description()
    seconds, constant = times.seconds, times.constant_rate()
    rate = f"{constant[0]:.5g} per second" if constant else "at no constant rate"
    if not constant:
        stays = times.stays()
        rate += f", each for {stays.min():.3f} s to {stays.max():.3f} s"
    facts["frames"] = f"{len(seconds)}, on screen from {seconds[0]:.3f} s to {times.end_seconds:.3f} s, {rate}"
    if sampling.start or sampling.end is not None:
        facts["frames"] += " (those around the window)"
    looked_at = [f"{second:.3f}" for second in choice.indices / choice.fps]
    if len(looked_at) > ALL_TIMES:
        left_out = len(looked_at) - FIRST_TIMES - 1
        looked_at = [*looked_at[:FIRST_TIMES], f"… ({left_out} more) …", looked_at[-1]]
    facts["read"] = f"{len(choice.picks)} frames ({len(set(choice.picks.tolist()))} different)"
    facts["at seconds"] = " ".join(looked_at)
    return facts


def facts_of_target(source: str, dtype: str, device: str | None, attention: str | None) -> dict[str, str]:
    """What decides how a target's drafts are verified, and the measurement that shows it.

    Raises:
        UnsupportedTargetError: They cannot be.
    """
    from collections import Counter

    from ..configuration_sparrow import SparrowDraftConfig
    from ..generation.self_check import measure, refuse_without_a_way
    from ..loading import load_without_processor
    from ..targets import TargetView

    model = load_without_processor(source, dtype, device)
    if attention is not None:
        model.set_attn_implementation(attention)
    view = TargetView(model)
    config = SparrowDraftConfig.from_target_config(model.config)
    found = measure(view)
    refuse_without_a_way(view, found)
    placeholders = ", ".join(map(str, config.visual_token_ids or []))
    borders = ", ".join(str(border) for border, _ in view.rope_borders)
    ways = {"own": "the target's attention function", "eager": "its model's eager attention function"}
    facts = {
        "target": f"{type(model).__name__} ({source}), {view.dtype}".replace("torch.", ""),
        "layers": ", ".join(f"{count} {kind}" for kind, count in Counter(view.layer_kinds).items()),
        "placeholders": placeholders or "none known: all positions count as text",
        "positions": f"RoPE changes at {borders}: no draft crosses it" if borders else "RoPE never changes",
        "draft layer": config.block_type,
        "chains": f"verified, by {ways[found.chains or 'own']}",
        "trees": f"verified, by {ways[found.trees]}" if found.trees else f"narrowed to chains: {found.why_no_trees}",
    }
    facts |= {f"difference ({what})": f"{size:.1e}" for what, size in found.differences.items()}
    return facts | {"tried on first use": "; ".join(found.untold) or "nothing: all of it could be read"}


def print_installation() -> None:
    import torch
    import transformers

    from .. import __version__
    from .._transformers import SUPPORTED_VERSIONS, TESTED_VERSIONS, contract_breaches
    from ..extras import EXTRAS, missing_packages

    quiet_transformers()
    breaches = contract_breaches()
    facts = {
        "sparrow-hf": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": (
            f"{transformers.__version__} (supported {SUPPORTED_VERSIONS}, tested {', '.join(TESTED_VERSIONS)})"
        ),
        "contract": "; ".join(breaches) or "kept: drafts can be used",
    }
    for extra in EXTRAS:
        missing = missing_packages(extra)
        facts[f"[{extra}]"] = f"without {', '.join(missing)}" if missing else "installed"
    print_facts(facts | {"devices": ", ".join(devices())})
    if breaches:
        raise typer.Exit(BAD_INPUT)


def devices() -> list[str]:
    """Names of what torch computes on here, the CPU last."""
    import torch

    found = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({torch.get_num_threads()} threads)"]

"""What all verbs share: options, help texts, and how a verb ends: exit codes, and errors printed as sentences."""

import os
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from typer.core import TyperCommand

from .. import signals
from ..errors import SparrowError, TargetLoadError

NOT_IDENTICAL, BAD_INPUT, BAD_ROWS, RAN_OUT, INTERRUPTED, UNREAD, TERMINATED = 1, 2, 3, 4, 130, 141, 143
"""Exit codes besides 0."""

EXIT_CODES = (
    "Exit codes: 0 done, 1 an fp32 text differs from plain generate(), 2 an input is wrong or missing, 3 done but "
    "some rows have an error, 4 disk or memory ran out, 130 Ctrl-C, 141 whoever read the output has gone, 143 "
    "SIGTERM. --debug shows the traceback of an error."
)

#: A dependency's error may hold whole files.
MAX_ERROR_CHARACTERS = 500

FAMILY_HELP = "The built-in models to use: qwen2.5-vl (the default) or llava-onevision."
FPS_HELP = "Maximum number of frames per second to read of a video."
VLLM_POSITIONS_HELP = (
    "Number the text after a video as vLLM does, for drafts of Qwen2-VL and Qwen2.5-VL that vLLM will serve "
    "(default: as transformers does)."
)
MAX_FRAMES_HELP = "Maximum number of frames to read of a video."
ROWS = "a .jsonl, .json or .parquet file, a folder of them or one of save_to_disk, or a Hub id"
PROCESSOR_HELP = "Processor of --target, if it is in another folder or Hub repository."


class OnBadRow(StrEnum):
    """What to do with a row that cannot be used."""

    refuse = "refuse"
    skip = "skip"


class Dtype(StrEnum):
    """Dtype of a target."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# -- options of several verbs -----------------------------------------------------------------------------------------

FamilyOption = Annotated[str | None, typer.Option(help=FAMILY_HELP)]
ProcessorOption = Annotated[str | None, typer.Option(help=PROCESSOR_HELP)]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the target.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Device of the target, such as cpu, cuda or cuda:1; auto spreads it over all GPUs."),
]
VllmPositionsOption = Annotated[bool, typer.Option("--vllm-positions", help=VLLM_POSITIONS_HELP)]
OneDeviceOption = Annotated[str | None, typer.Option(help="Device of the target, such as cpu, cuda or cuda:1.")]
AttentionOption = Annotated[
    str | None,
    typer.Option(help="Attention implementation of the target, such as sdpa (default: transformers' choice)."),
]
PromptsOption = Annotated[str, typer.Option(help=f"Data set whose rows hold 'messages': {ROWS}.")]
SplitOption = Annotated[str, typer.Option(help="Split of --prompts to read.")]
OnBadRowOption = Annotated[
    OnBadRow,
    typer.Option(help="What to do with a row that cannot be used: stop (refuse), or leave it out (skip)."),
]
FpsOption = Annotated[float | None, typer.Option(min=0.01, help=FPS_HELP)]
MaxFramesOption = Annotated[int | None, typer.Option(min=1, help=MAX_FRAMES_HELP)]
MaxNewTokensOption = Annotated[int, typer.Option(min=2, help="Maximum length of an answer, in tokens.")]
DoSampleOption = Annotated[bool, typer.Option("--do-sample", help="Sample the answers instead of decoding greedily.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(min=0.01, help="Temperature of sampled answers (default: 1). Samples, as --do-sample does."),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        min=0.01, max=1.0, help="Nucleus (top-p) of sampled answers (default: 1). Samples, as --do-sample does."
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Sample among so many of the most probable tokens (default: all). Samples, as --do-sample does."
    ),
]
#: torch takes no larger ones.
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of sampled answers.")]


# -- how a verb ends --------------------------------------------------------------------------------------------------


class Ending:
    """What a verb says if it stops early: what is kept, and the command that goes on.

    Args:
        words: The command line after `sparrow`.
    """

    def __init__(self, words: Sequence[str]):
        self._words = list(words)
        self._kept: Callable[[], str] | None = None
        self._further: Callable[[], Sequence[str]] = tuple

    def keeps(self, kept: Callable[[], str], further: Callable[[], Sequence[str]] = tuple) -> None:
        """Call it before work begins that can be continued.

        Args:
            kept: Says what is kept by then, such as "3 of 40 answers are kept in captions.jsonl".
            further: Options that the command needs in order to go on.
        """
        self._kept, self._further = kept, further

    @property
    def is_resumable(self) -> bool:
        return self._kept is not None

    def __str__(self) -> str:
        return self.told()

    def told(self, condition: str = "") -> str:
        """What is kept, and how to go on; `condition` says on what, such as "once this is mended, "."""
        words = self._words + [word for word in self._further() if word not in self._words]
        command = shlex.join([*program(), *words])
        if self._kept is None:
            return f"nothing new is kept; start again with: {command}"
        try:
            kept = self._kept()
        except Exception as error:
            # What stopped the verb may have left files that cannot be counted.
            kept = f"what is kept cannot be counted ({' '.join(str(error).split())})"
        return f"{kept}; {condition}go on with: {command}"


class Verb(TyperCommand):
    """A command that ends in one sentence, whatever happens. Its [`Ending`] is the context's `obj`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        def is_debug(index: int) -> bool:
            # A verb that hands its options on may have another --debug, which takes a value.
            following = args[index + 1 : index + 2]
            return args[index] == "--debug" and (
                not ctx.ignore_unknown_options or not following or following[0].startswith("--")
            )

        words = [word for index, word in enumerate(args) if not is_debug(index)]
        ctx.obj = Ending([self.name or "", *words])
        ctx.meta["sparrow.debug"] = len(words) < len(args) or ctx.parent.params.get("debug", False)
        return super().parse_args(ctx, list(words))

    def invoke(self, ctx: Any) -> Any:
        with errors_as_sentences(ctx.obj, ctx.meta["sparrow.debug"]):
            return super().invoke(ctx)


@contextmanager
def errors_as_sentences(ending: Ending | None = None, debug: bool = False) -> Iterator[None]:
    """Prints any error as one red sentence, and ends without a traceback on Ctrl-C and SIGTERM too.

    Args:
        ending: Says what is kept and how to go on.
        debug: Print the traceback before the sentence.
    """
    with signals.raising() as stops:
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, *signals.STOPS) as error:
            # A second Ctrl-C must not end the sentence.
            with signals.ignoring():
                if debug:
                    traceback.print_exception(error)
                code = _tell(stops[0] if stops else error, ending)
            raise typer.Exit(code) from None


def _tell(error: BaseException, ending: Ending | None) -> int:
    """Prints the sentence of an error, and returns its exit code."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    if isinstance(error, BrokenPipeError) and unread:
        for stream in unread:
            # Python would try to write the rest once more, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return UNREAD
    sentence, code = _sentence(error, ending)
    is_stop = isinstance(error, signals.STOPS)
    if not is_stop or signals.is_first_process():
        # On a line of its own, whatever progress bars are on the screen.
        with tqdm.external_write_mode(file=sys.stderr):
            Console(stderr=True).print(Text(sentence, style="" if is_stop else "bold red"), soft_wrap=True)
    return code


def _is_unread(stream: IO[str]) -> bool:
    """Whether whoever read our output (`| head`) has gone. Windows cannot tell."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError):
        return False


def _sentence(error: BaseException, ending: Ending | None) -> tuple[str, int]:
    from ..resources import ran_out

    rest = "" if ending is None else str(ending)
    if isinstance(error, signals.STOPS):
        number = signals.number_of(error)
        return _joined(f"Stopped by {signals.NAMES[number]}", rest), 128 + number
    what = ran_out(error)
    told = " ".join(str(error).split())
    if not isinstance(error, (SparrowError, OSError)) or what:
        told = f"{type(error).__name__}: {told}" if told else type(error).__name__
        told = told if len(told) <= MAX_ERROR_CHARACTERS else f"{told[:MAX_ERROR_CHARACTERS]} …"
    if what == "disk":
        return _joined(f"The disk is full, or a limit of its use is reached ({told})", rest), RAN_OUT
    if what == "memory":
        return _joined(f"Memory ran out ({told})", rest), RAN_OUT
    if ending is not None and ending.is_resumable:
        return f"Error: {told.rstrip('.')}; {ending.told('once this is mended, ')}", BAD_INPUT
    return f"Error: {told}", BAD_INPUT


def _joined(happened: str, rest: str) -> str:
    return f"{happened}: {rest}" if rest else f"{happened}."


def program() -> list[str]:
    """How this process was started, as the words before the verb."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        return ["accelerate", "launch", "--num_processes", str(processes), "-m", "sparrow_hf.cli"]
    if Path(sys.argv[0]).parts[-3:] == ("sparrow_hf", "cli", "__main__.py"):
        return [sys.executable, "-m", "sparrow_hf.cli"]
    return ["sparrow"]


# -- what verbs do alike ----------------------------------------------------------------------------------------------


def quiet_transformers() -> None:
    """Turns off transformers' progress bars and its log lines below errors: a command prints its own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def launched_processes(device: str | None) -> Any:
    """This process among those of `torchrun`, as accelerate's `PartialState`, which has to be told that they use CPUs.

    Otherwise each of them would take itself for the only one, and do all the work.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())


def built_in_family(family: str | None, target: str | None) -> str:
    """The family of the built-in models to use, where no target is named.

    Raises:
        TargetLoadError: Both are named.
    """
    from ..testbed import QWEN2_5_VL

    if family is not None and target is not None:
        raise TargetLoadError("--family chooses built-in models: leave it out beside --target.")
    return family or QWEN2_5_VL.name


def sampling_of(do_sample: bool, temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """How answers are chosen, as arguments of `generate()`: greedily, unless one of the four options samples.

    What is not said is 1, or all tokens, and not what the target's `generation_config` says: a `top_k=1` there would
    choose greedily.
    """
    if not do_sample and temperature is None and top_p is None and top_k is None:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": 0 if top_k is None else top_k,
    }


def counted(count: int, one: str, several: str) -> str:
    """A number with its word: "1 error", "2 errors"."""
    return f"{count} {one if count == 1 else several}"


def count_kept(folder: Path, count: int, what: str, of: int | None = None) -> str:
    """What a verb has kept, for its [`Ending`]: "3 of 40 answers are kept in captions.jsonl".

    Args:
        folder: Where; or a file.
        what: What is counted, in the singular.
        of: How many there will be, where that is known.
    """
    number, all_ = (f"{count}", count) if of is None else (f"{count} of {of}", of)
    return f"{number} {what}{'' if all_ == 1 else 's'} {'is' if count == 1 else 'are'} kept in {folder}"


def size(num_bytes: float) -> str:
    """A size on disk, for people: 10⁹ bytes are a GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def report_skipped(console: Console, skipped: dict[int, str], rows: int) -> None:
    """Names every row that was left out, with its reason, and how many they are."""
    for _, reason in sorted(skipped.items()):
        console.print(Text(f"left out {reason}", style="yellow"), soft_wrap=True)
    if skipped:
        console.print(f"{len(skipped)} of {rows} rows left out.")

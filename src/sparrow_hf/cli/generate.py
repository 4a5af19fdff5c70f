"""`sparrow generate`: answers about videos, the same text as plain generate(), faster with a draft."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..errors import CaptionError
from ..extras import require
from .common import (
    BAD_INPUT,
    BAD_ROWS,
    NOT_IDENTICAL,
    AttentionOption,
    DeviceOption,
    DoSampleOption,
    Dtype,
    DtypeOption,
    FamilyOption,
    FpsOption,
    MaxFramesOption,
    ProcessorOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    built_in_family,
    count_kept,
    counted,
    quiet_transformers,
    sampling_of,
)

#: fps and max_frames by default: for targets of your own, and for the built-in ones, which know dense clips.
SAMPLING, BUILT_IN_SAMPLING = (2.0, 128), (8.0, 768)
#: The progress shows the speed of the last answers.
RECENT = 32
#: Seconds between two lines of progress where stderr is no terminal.
LOG_SECONDS = 30.0


def generate(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="A video file or its URL, a folder of videos, or rows that hold 'messages': a .jsonl, .json or "
            ".parquet file, a folder of them or one of save_to_disk. Without it, the built-in models describe a "
            "generated clip."
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Argument(help="Question about each video (default: to describe it in detail).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON-lines file to write the answers to. The same command continues a stopped run."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Your own video LLM: a folder or a Hub id (default: a built-in one).")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A draft of the target: a folder or a Hub id; none for plain generate().")
    ] = None,
    family: FamilyOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 320,
    do_sample: DoSampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = 0,
    fps: FpsOption = None,
    max_frames: MaxFramesOption = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    attention: AttentionOption = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run plain generate() too, and say whether the text is identical.")
    ] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Answer the rows of --output that have an error once more.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON: one line per answer, or with --output the totals. The rest goes to stderr."
        ),
    ] = False,
) -> None:
    """Answers questions about videos. With a draft it writes the same text in less time.

    On a terminal the text appears as it is written, and the tokens that the draft proposed are marked.
    A row that cannot be answered gets one line with its error, and the run goes on.
    At most 2 frames per second and 128 frames of a video are read, if --fps and --max-frames do not say otherwise
    (built-in models: 8 and 768).
    """
    require("video", "sparrow generate")
    from tqdm import tqdm

    from .. import captioning
    from ..measurement import is_exact

    quiet_transformers()
    if source is None and (target or question or output):
        raise CaptionError("name a video, a folder or rows; only the built-in models have a clip to describe")
    if retry_errors and output is None:
        raise CaptionError("--retry-errors needs the --output of an earlier run")
    if compare and draft == captioning.NO_DRAFT:
        raise CaptionError("--compare compares plain generate() with a draft: name one with --draft")
    family = built_in_family(family, target)
    with ExitStack() as stack:
        if source is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            asked = captioning.built_in_clip(Path(scratch), family)
        else:
            asked = captioning.read_questions(source, question, output)
        if len(asked) > 1 and output is None and not as_json:
            raise CaptionError(f"{source} holds {len(asked)} rows: name a file for the answers with --output")
        if output is not None:
            captioning.check_writable(output)
        if asked.left_out:
            say(f"left out, no videos by their names: {', '.join(asked.left_out)}")

        usual_fps, usual_frames = BUILT_IN_SAMPLING if target is None else SAMPLING
        captioner = captioning.Captioner(
            *captioning.load_models(target, draft, family, processor, dtype.value, device, attention),
            compare=compare,
            fps=usual_fps if fps is None else fps,
            max_frames=usual_frames if max_frames is None else max_frames,
            seed=seed,
            settings={"max_new_tokens": max_new_tokens} | sampling_of(do_sample, temperature, top_p, top_k),
        )
        say(f"{target or f'built-in {family}'} in {captioner.told}")
        conditions = captioner.conditions(target or family, draft, asked.question, output is not None)
        answers = None
        if output is not None:
            answers = stack.enter_context(captioning.open_answers(output, conditions, asked))
            if retry_errors:
                # A file may hold errors of videos that are not asked about now: they stay.
                again = {line["name"] for line in captioning.given_before(answers, asked) if line["error"]}
                answers.remove(lambda line: line["name"] in again)
            context.obj.keeps(
                lambda: count_kept(output, len(captioning.given_before(answers, asked)), "answer", of=len(asked))
            )
        lines = [] if answers is None else captioning.given_before(answers, asked)
        is_single = len(asked) == 1
        # A comparison times both calls alike, with nothing to show meanwhile.
        is_streamed = is_single and not as_json and not compare and sys.stdout.isatty() and not lines
        streamer = stack.enter_context(text_on_screen(captioner)) if is_streamed else None
        with tqdm(total=len(asked), initial=len(lines), unit="video", disable=is_single or None) as progress:
            told_at = time.monotonic()
            for line in captioning.answer_all(captioner, asked, conditions, answers, streamer):
                lines.append(line)
                if line["error"] is not None:
                    told = line["error"] if is_single else f"{line['name']}: {line['error']}"
                    progress.write(told, file=sys.stderr)
                elif is_single and not as_json and streamer is None:
                    print(line["text"])
                if as_json and output is None:
                    print(json.dumps(line), flush=True)
                progress.set_postfix_str(rate := rate_of(captioning.total(lines[-RECENT:])))
                progress.update()
                if not sys.stderr.isatty() and time.monotonic() > told_at + LOG_SECONDS:
                    say(f"{len(lines)} of {len(asked)} videos, {rate}")
                    told_at = time.monotonic()
    totals = captioning.total(lines)
    if as_json and output is not None:
        print(json.dumps(asdict(totals) | {"output": str(output)}))
    exact = is_exact(conditions["dtype"])
    for sentence in told_of(totals, is_single, output, exact):
        say(sentence)
    if totals.different and exact:
        raise typer.Exit(NOT_IDENTICAL)
    if totals.errors:
        raise typer.Exit(BAD_INPUT if is_single else BAD_ROWS)


@contextmanager
def text_on_screen(captioner: Any) -> Iterator[Any]:
    """A streamer that prints the text of one answer as it is written, and ends its line whatever happens."""
    from ..data.prepare import tokenizer_of
    from ..streaming import DRAFTED_STYLE, OWN_STYLE, ProvenanceStreamer

    console = Console(highlight=False)
    if captioner.draft is not None:
        legend = Text.assemble(("accepted draft tokens", DRAFTED_STYLE), ", ", ("the target's own", OWN_STYLE), ":")
        Console(stderr=True).print(legend)

    def show(piece: str, drafted: bool) -> None:
        style = "" if captioner.draft is None else DRAFTED_STYLE if drafted else OWN_STYLE
        console.print(Text(piece, style=style), end="", soft_wrap=True)

    try:
        yield ProvenanceStreamer(tokenizer_of(captioner.processor), show, captioner.draft)
    finally:
        console.print()


def rate_of(totals: Any) -> str:
    """Speed and errors of the last answers."""
    errors = f", {counted(totals.errors, 'error', 'errors')}" if totals.errors else ""
    return f"{totals.tokens_per_second:.1f} tokens/s{errors}"


def told_of(totals: Any, is_single: bool, output: Path | None, exact: bool) -> Iterator[str]:
    """The figures of a run, one sentence after the other."""
    answered = totals.rows - totals.errors
    if not is_single:
        yield f"{answered} of {totals.rows} rows answered" + (
            f", {counted(totals.errors, 'has', 'have')} an error (--retry-errors answers such rows once more)"
            if totals.errors
            else ""
        )
    if answered:
        yield f"{totals.tokens} tokens in {totals.seconds:.2f} s, {totals.tokens_per_second:.1f} tokens/s"
    if totals.different is not None:
        compared = f"{totals.speedup:.2f}× as fast as plain generate()"
        if totals.different:
            yield f"NOT IDENTICAL to plain generate(): {', '.join(totals.different)}; {compared}" + (
                "" if exact else " (in bf16 and fp16 two nearly equal tokens may swap; fp32 is exact)"
            )
        else:
            yield f"IDENTICAL to plain generate(), {compared}"
    if output is not None:
        yield f"answers in {output}"


def say(sentence: str) -> None:
    """Prints a sentence beside the answers, on stderr."""
    Console(stderr=True).print(Text(sentence), soft_wrap=True)

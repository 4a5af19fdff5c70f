"""`sparrow bench`: several arms on the same prompts, and their conditions written beside every figure."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import BenchmarkError
from .common import (
    MAX_FRAMES_HELP,
    NOT_IDENTICAL,
    ROWS,
    Dtype,
    DtypeOption,
    FamilyOption,
    FpsOption,
    MaxNewTokensOption,
    OneDeviceOption,
    ProcessorOption,
    VllmPositionsOption,
    built_in_family,
    count_kept,
    quiet_transformers,
)

DEFAULT_ARMS = ["none", "prompt-lookup", "draft", "draft@48-5-10"]


class Format(StrEnum):
    """Layouts of a report."""

    tables = "tables"
    mmspec = "mmspec"


def bench(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="JSON file to write, with one record per arm, length, temperature and seed.")
    ],
    target: Annotated[
        str | None, typer.Option(help="The video LLM: a folder or a Hub id (default: a built-in one).")
    ] = None,
    family: FamilyOption = None,
    draft: Annotated[
        str | None, typer.Option(help="The draft that the arms `none` and `draft` use: a folder or a Hub id.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help=f"Data set whose rows hold 'messages' ({ROWS}), or a local copy of a public one: "
            "videodetailcaption:FOLDER, mvbench:FOLDER, longvideobench:FOLDER, mlvu:FOLDER."
        ),
    ] = None,
    testbed: Annotated[
        bool, typer.Option("--testbed", help="Use generated clips that the built-in models have not seen.")
    ] = False,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help="An arm, a way of generating to measure beside plain generate(): none, prompt-lookup[-N], "
            r"assistant:ID, draft[:ID]\[@TREE]\[/glimpse=M]\[/compiled], plain-grouped, plain-compiled, or METHOD:TEXT"
            " for a method of another package. Repeat the option for several arms."
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Add what transformers can do without a draft (grouped attention, compiled, both, prompt lookup) "
            "and the draft compiled. What cannot run here is left out, with the reason.",
        ),
    ] = False,
    visual_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=4,
            help="Length of the --testbed clips in visual tokens (default: 400). Repeat the option for several "
            "lengths.",
        ),
    ] = None,
    max_frames: Annotated[
        list[int] | None,
        typer.Option(min=1, help=f"{MAX_FRAMES_HELP} Repeat the option for several numbers."),
    ] = None,
    fps: FpsOption = None,
    temperatures: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            help="Temperature of sampling; 0 decodes greedily (default: 0). Repeat the option for several "
            "temperatures.",
        ),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="Seed of sampled answers (default: 0). Repeat the option for several seeds."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts of each length.")] = 16,
    max_new_tokens: MaxNewTokensOption = 320,
    shared_prefill: Annotated[
        bool,
        typer.Option(
            "--shared-prefill", help="Compute each prompt's prefill once for all arms. Use it for long videos."
        ),
    ] = False,
    repeats: Annotated[
        int,
        typer.Option(min=1, help="Number of times every arm answers each prompt. The call of median time counts."),
    ] = 1,
    name: Annotated[str, typer.Option(help="Name of this benchmark, in its run file and its records.")] = "bench",
    runs: Annotated[
        Path, typer.Option(help="Folder of the run files. The results are computed from all files in it.")
    ] = Path("runs/bench"),
    report: Annotated[Path | None, typer.Option(help="Markdown file to write the tables to.")] = None,
    layout: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Layout of --report: `mmspec` has mean accepted tokens and the wall-time ratio of each task, and "
            "measures at temperatures 0 and 1 unless --temperatures says otherwise.",
        ),
    ] = Format.tables,
    note: Annotated[str, typer.Option(help="A remark on the circumstances, written into the results.")] = "",
    split: Annotated[
        str | None, typer.Option(help="Split of --prompts to read, where it has several (default: train).")
    ] = None,
    processor: ProcessorOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: OneDeviceOption = None,
    vllm_positions: VllmPositionsOption = False,
) -> None:
    """Measures arms (ways of generating) against plain generate() on the same prompts, in one process.

    Prints the number of calls before it starts.
    The same command continues a stopped run.
    The exit code is 1 if the fp32 text of an arm of this benchmark differs from plain generate().
    Texts that transformers' own assisted loop samples do not count for it,
    nor do those of compiled or grouped arms, whose targets round differently.
    """
    from ..artifacts import tensor_digest
    from ..data.prepare import tokenizer_of
    from ..evaluation.arms import BASELINES, Arms
    from ..evaluation.benchmark import Benchmark
    from ..evaluation.prompts import conversation_prompts, read_conversations
    from ..evaluation.report import write_report
    from ..evaluation.results import refuse_run_files, write_results
    from ..loading import load_target
    from ..measurement import is_exact
    from ..testbed import named_or_built_in
    from ..testbed.benchmark_prompts import clip_prompts, knows_the_world, says_what_it_shows

    quiet_transformers()
    console = Console()
    if testbed == (prompts is not None):
        raise BenchmarkError(
            f"give either --testbed, or --prompts with a data set; found {'both' if testbed else 'neither'}"
        )
    if layout is Format.mmspec and report is None:
        raise BenchmarkError("--format mmspec is a layout of the report: name its file with --report")
    if testbed and (max_frames or fps is not None or split is not None):
        raise BenchmarkError(
            "--testbed makes clips of --visual-tokens visual tokens: leave out --max-frames, --fps and --split"
        )
    if not testbed and visual_tokens:
        raise BenchmarkError(
            "--visual-tokens is an option of --testbed: set the length of your own videos with --max-frames"
        )
    refuse_run_files(runs, output, report)
    target, draft, device = named_or_built_in(target, draft, device, built_in_family(family, target))
    conversations = None if prompts is None else read_conversations(prompts, split, limit)
    model, its_processor = load_target(target, processor, dtype.value, device, vllm_positions=vllm_positions)
    if conversations is None:
        chosen = clip_prompts(model, its_processor, limit, visual_tokens or [400])
    else:
        if missing := conversations.missing:
            console.print(f"[yellow]left out {len(missing)} questions without their video, such as {missing[0]}[/]")
        chosen = conversation_prompts(its_processor, conversations.rows, max_frames or [], fps)
    parser = Arms(model, draft)
    chosen_arms = parser.parse(DEFAULT_ARMS if arms is None else arms)
    if baselines:
        names = [*BASELINES, *(["draft/compiled"] if draft is not None else [])]
        found, left_out = parser.parse_available([name for name in names if name not in (arms or DEFAULT_ARMS)])
        chosen_arms += found
        for reason in left_out:
            console.print(Text(f"left out: {reason}", style="yellow"), soft_wrap=True)
    benchmark = Benchmark(
        name,
        model,
        chosen_arms,
        chosen,
        temperatures or ([0.0, 1.0] if layout is Format.mmspec else [0.0]),
        seeds or [0],
        max_new_tokens,
        shared_prefill,
        repeats,
        says_what_it_shows(its_processor) if testbed and knows_the_world(its_processor) else None,
        {
            "target_sha256": tensor_digest(model.state_dict()),
            "draft_sha256": sorted(parser.weights.values()),
            "prompts": "testbed" if testbed else prompts,
            "split": split,
            "fps": fps,
            "processor": processor,
            "dtype": str(model.dtype).removeprefix("torch."),
            # Files of earlier versions do not name it.
            "vllm_positions": vllm_positions or None,
        },
        tokenizer=tokenizer_of(its_processor),
    )
    measured = benchmark.open_runs(runs)
    todo = benchmark.calls_per_prompt * sum(len(settings) for _, settings in benchmark.missing(measured))
    console.print(
        f"{len(chosen)} prompts × {len(benchmark.settings)} temperatures and seeds × {len(benchmark.arms)} arms"
        + (f" × {repeats} repeats; " if repeats > 1 else "; ")
        + f"to do: {todo} calls of up to {max_new_tokens} tokens"
    )
    asked = {prompt.name for prompt in chosen}
    if others := sum(line["prompt"] not in asked for line in measured.lines):
        console.print(f"measurements of other prompts in {measured.path}, which do not count: {others}")
    context.obj.keeps(lambda: count_kept(measured.path, len(measured.lines), "measured prompt"))
    with measured:
        benchmark.measure(measured)
    rows = write_results(runs, output, note, {name: asked})
    if report is not None:
        write_report(output, report, layout.value)
    console.print(results_table(rows))
    console.print(f"results in {output}" + (f", tables in {report}" if report else ""))
    # The first arm is plain generate() itself. Compiled or grouped, the target rounds differently.
    counted = {arm.name for arm in chosen_arms[1:] if not arm.is_compiled and arm.attention is None}
    ours = [row for row in rows if row["benchmark"] == name and row["arm"] in counted]
    if any(row["first_differences"] and is_exact(row["provenance"]["dtype"]) for row in ours):
        raise typer.Exit(NOT_IDENTICAL)


def results_table(rows: list[dict[str, Any]]) -> Table:
    """The main figures, one line per record."""
    from ..evaluation.report import optional

    table = Table("benchmark", "visual tokens", "T", "seed", box=None)
    table.add_column("arm", overflow="fold")
    for name in ("identical", "τ", "k", "DSR", "over best", "ESR"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        measured = [optional(row.get(name), ".2f") for name in ("tau", "k", "dsr", "dsr_over_best", "esr")]
        table.add_row(
            row["benchmark"],
            str(row["visual_tokens"]),
            f"{row['temperature']:g}",
            str(row["seed"]),
            row["arm"],
            "" if row["identical"] is None else f"{row['identical']}/{row['prompts']}",
            *measured,
        )
    return table

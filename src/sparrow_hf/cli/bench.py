"""`sparrow bench`: arms side by side on the same prompts, with everything that makes a figure believable."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import BenchmarkError
from .common import FAMILY_HELP, NOT_IDENTICAL, Dtype, built_in_family, errors_as_sentences, quiet_transformers

DEFAULT_ARMS = ["none", "prompt-lookup", "draft@chain-5", "draft@48-5-10"]


def bench(
    output: Annotated[Path, typer.Option(help="JSON file of the results: one row per arm, length and temperature.")],
    target: Annotated[
        str | None, typer.Option(help="The video LLM: folder or Hub id (default: a built-in one).")
    ] = None,
    family: Annotated[str | None, typer.Option(help=FAMILY_HELP)] = None,
    draft: Annotated[
        str | None, typer.Option(help="The draft of the arms `none` and `draft`: folder or Hub id.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Rows of messages (.jsonl, .parquet, folder, Hub id), or a copy of a public data set: "
            "videodetailcaption:FOLDER, mvbench:FOLDER, longvideobench:FOLDER, mlvu:FOLDER."
        ),
    ] = None,
    testbed: Annotated[bool, typer.Option("--testbed", help="Ask about unseen clips of the built-in world.")] = False,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help="What to measure beside plain generate() (repeat for several): none, prompt-lookup[-N], "
            "assistant:ID, draft[:ID][@TREE][/glimpse=M], or METHOD:TEXT of another package."
        ),
    ] = None,
    visual_tokens: Annotated[
        list[int] | None, typer.Option(min=4, help="Length of --testbed clips (repeat for several; default 400).")
    ] = None,
    max_frames: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Frames to see of a video of --prompts, at most (repeat for several)."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Frames per second to see of --prompts, at most.")
    ] = None,
    temperatures: Annotated[
        list[float] | None, typer.Option(min=0.0, help="0 is greedy (repeat for several).")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option(help="Of sampled answers (repeat for several; default 0).")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most prompts, of each length.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 320,
    shared_prefill: Annotated[
        bool, typer.Option("--shared-prefill", help="Compute each prompt once for all arms: for long videos.")
    ] = False,
    repeats: Annotated[
        int,
        typer.Option(min=1, help="Rounds in which every arm answers each prompt; its median call counts."),
    ] = 1,
    name: Annotated[str, typer.Option(help="Of this benchmark: its run file, and its rows in the results.")] = "bench",
    runs: Annotated[Path, typer.Option(help="Folder of single measurements; all in it make the results.")] = Path(
        "runs/bench"
    ),
    report: Annotated[Path | None, typer.Option(help="Write the tables to this Markdown file.")] = None,
    note: Annotated[str, typer.Option(help="What readers must know about the circumstances.")] = "",
    split: Annotated[str | None, typer.Option(help="Split of --prompts with rows (default train).")] = None,
    processor: Annotated[str | None, typer.Option(help="Processor of --target, if it lies elsewhere.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the target computes in.")] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="Where the target runs: cpu, cuda, cuda:1, …")] = None,
) -> None:
    """Measures arms against plain generate() on the same prompts, in turns, in one process.

    Says how much there is to do before it starts; run it again to go on where it was stopped. Ends with 1 if an arm's
    fp32 text is not plain generate()'s; sampled texts of transformers' own assisted loop never are, and do not count.
    """
    with errors_as_sentences():
        import torch

        from ..artifacts import tensor_digest
        from ..evaluation.arms import Arms
        from ..evaluation.benchmark import Benchmark
        from ..evaluation.prompts import conversation_prompts, read_conversations
        from ..evaluation.report import write_report
        from ..evaluation.results import write_results
        from ..loading import load_target
        from ..testbed import shipped
        from ..testbed.benchmark_prompts import clip_prompts, knows_the_world, says_what_it_shows

        quiet_transformers()
        console = Console()
        if testbed == (prompts is not None):
            raise BenchmarkError("say what to ask: either --testbed, or --prompts with rows or a data set")
        if testbed and (max_frames or fps is not None or split is not None):
            raise BenchmarkError(
                "--testbed clips are made, and as long as --visual-tokens says: leave out --max-frames, --fps and "
                "--split"
            )
        if not testbed and visual_tokens:
            raise BenchmarkError("--visual-tokens is for --testbed: the length of your own videos is --max-frames")
        family = built_in_family(family, target)
        if target is None:
            # So small that a second thread costs more than it computes.
            torch.set_num_threads(1)
            folder = shipped(family)
            target, draft, device = str(folder / "target"), draft or str(folder / "draft"), device or "cpu"
        conversations = None if prompts is None else read_conversations(prompts, split, limit)
        model, its_processor = load_target(target, processor, dtype.value, device)
        if conversations is None:
            asked = clip_prompts(model, its_processor, limit, visual_tokens or [400])
        else:
            if missing := conversations.missing:
                console.print(
                    f"[yellow]left out {len(missing)} questions without their video, such as {missing[0]}[/]"
                )
            asked = conversation_prompts(its_processor, conversations.rows, max_frames or [], fps)
        parser = Arms(model, draft)
        benchmark = Benchmark(
            name,
            model,
            parser.parse(DEFAULT_ARMS if arms is None else arms),
            asked,
            temperatures or [0.0],
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
            },
        )
        measured = benchmark.open_runs(runs)
        todo = benchmark.calls_per_prompt * sum(len(settings) for _, settings in benchmark.missing(measured))
        console.print(
            f"{len(asked)} prompts × {len(benchmark.settings)} temperatures and seeds × {len(benchmark.arms)} arms"
            + (f" × {repeats} rounds; " if repeats > 1 else "; ")
            + f"to do: {todo} calls of up to {max_new_tokens} tokens"
        )
        benchmark.measure(measured)
        rows = write_results(runs, output, note)
        if report is not None:
            write_report(output, report)
        console.print(results_table(rows))
        console.print(f"results in {output}" + (f", tables in {report}" if report else ""))
        if any(row["first_differences"] and row["provenance"]["dtype"] == "float32" for row in rows):
            raise typer.Exit(NOT_IDENTICAL)


def results_table(rows: list[dict[str, Any]]) -> Table:
    """The figures that matter most, one line per row of the results."""
    from ..evaluation.report import optional

    table = Table("benchmark", "visual tokens", "T", "seed", box=None)
    table.add_column("arm", overflow="fold")
    for name in ("identical", "τ", "k", "DSR", "ESR"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        measured = [optional(row.get(name), ".2f") for name in ("tau", "k", "dsr", "esr")]
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

"""Measures drafts of a real language model on prompts they have not seen, and writes docs/language.md's tables.

    python -m sparrow_research.language.text --target FOLDER --draft DRAFT --compare NAME=DRAFT … --work DIR \
        --output research/data/language/text.json --report docs/language.md

Two benchmarks, one after the other, each on one thread and as `sparrow bench` measures: every shape of tree of
`--draft`, beside plain `generate()` and prompt lookup; and one chain and one tree of every draft of `--compare`. Both
are greedy and sampled. A draft's folder may hold `trained.json` with what its training was (`tokens`, `steps`,
`rows`). Run the command again to go on where it was stopped.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparrow_hf.artifacts import tensor_digest, write_json, write_text
from sparrow_hf.checksums import read_json, sealed
from sparrow_hf.errors import BenchmarkError
from sparrow_hf.evaluation.arms import Arms
from sparrow_hf.evaluation.benchmark import Benchmark
from sparrow_hf.evaluation.prompts import conversation_prompts, read_conversations
from sparrow_hf.evaluation.report import between, numbers, optional, table
from sparrow_hf.evaluation.results import pool_runs
from sparrow_hf.loading import load_target

from .. import baselines as baselines

PROMPTS = Path(__file__).parents[3] / "data" / "language" / "prompts" / "test.jsonl"
SHAPES = ("chain-3", "chain-5", "chain-7", "chain-10", "30-4-8", "48-5-10")
OTHERS = ("none", "prompt-lookup")
COMPARED_SHAPES = ("chain-5", "30-4-8")
TEMPERATURES = (0.0, 1.0)
COMMAND = "python -m sparrow_research.language.text --target FOLDER --draft DRAFT --compare NAME=DRAFT … --work DIR"
"""Kept with the figures. Where target and drafts lay says nothing to others; their digests are kept too."""
TRAINED_FILE = "trained.json"
BEGIN, END = "<!-- tables of language.text -->\n", "<!-- end of tables -->\n"
"""What stands between them in the report is written anew."""


def measure(
    target_folder: str,
    draft: Path,
    compared: dict[str, Path],
    work: Path,
    *,
    prompts: Path = PROMPTS,
    limit: int = 24,
    max_new_tokens: int = 192,
    repeats: int = 1,
    dtype: str = "float32",
    shapes: Sequence[str] = SHAPES,
    others: Sequence[str] = OTHERS,
) -> dict[str, Any]:
    """Measures what is missing in the run files of `work`.

    Args:
        target_folder: Of the language model.
        draft: The draft whose trees are measured.
        compared: Name → draft.

    Returns:
        `drafts`, what is known of each training, and `rows` as in any results file.
    """
    target, tokenizer = load_target(target_folder, dtype=dtype, device="cpu")
    folders = {"sparrow": draft, **compared}
    asked = conversation_prompts(tokenizer, read_conversations(str(prompts), limit=limit).rows)
    arms = Arms(target, folders={name: str(folder) for name, folder in folders.items()}, draft=str(draft))
    sha256 = tensor_digest(target.state_dict())

    def run(name: str, names: list[str], repeats: int) -> None:
        benchmark = Benchmark(
            name,
            target,
            arms.parse(names),
            asked,
            TEMPERATURES,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            command=f"{COMMAND} --limit {limit} --max-new-tokens {max_new_tokens} --shapes {' '.join(shapes)} "
            f"--others {' '.join(others)}",
            conditions={"target_sha256": sha256, "draft_sha256": sorted(arms.weights.values())},
        )
        with benchmark.open_runs(work) as runs:
            benchmark.measure(runs)

    trees = [*others, *(f"draft:sparrow@{shape}" for shape in shapes)]
    if trees:
        run("trees", trees, repeats)
    if compared:
        run("drafts", [f"draft:{name}@{shape}" for shape in COMPARED_SHAPES for name in folders], 1)
    names = {prompt.name for prompt in asked}
    rows = pool_runs(work, {"trees": names, "drafts": names})
    return {"drafts": {name: training_of(folder) for name, folder in folders.items()}, "rows": rows}


def training_of(folder: Path) -> dict[str, Any]:
    """What is written beside a draft of its training."""
    described = folder / TRAINED_FILE
    return read_json(described, BenchmarkError, "write it again") if described.exists() else {}


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = []
    for temperature in TEMPERATURES:
        decoded = "greedy" if temperature == 0 else f"sampled, T = {temperature:g}"
        for benchmark in ("trees", "drafts"):
            measured = (benchmark, temperature)
            rows = [row for row in found["rows"] if (row["benchmark"], row["temperature"]) == measured]
            if rows and benchmark == "trees":
                lines += [f"### Trees, {decoded}", "", arm_table(rows)]
            elif rows:
                compared = [row for row in rows if row["arm"] != "plain"]
                lines += [f"### Drafts, {decoded}", "", draft_table(compared, found["drafts"])]
    return "\n".join(lines)


def arm_table(rows: list[dict[str, Any]]) -> str:
    """Acceptance and speed of every arm."""
    head = ["arm", "identical", "τ", "95 % interval", "P(k ≥ 1, 2, …)", "DSR", "quartiles", "ms a token"]
    return table(
        head,
        [
            [
                row["arm"].removeprefix("draft:sparrow@"),
                "" if row["identical"] is None else f"{row['identical']}/{row['prompts']}",
                f"{row['tau']:.2f}",
                between(row["tau_interval"]),
                numbers(row["per_position"]),
                f"{row['dsr']:.2f}",
                between(row["dsr_quartiles"]),
                f"{row['ms_per_token']:.0f}",
            ]
            for row in rows
        ],
    )


def draft_table(rows: list[dict[str, Any]], trainings: dict[str, dict[str, Any]]) -> str:
    """Acceptance and speed of every draft, beside what it was trained on."""
    head = [
        "draft",
        "answer tokens",
        "steps × rows",
        "tree",
        "identical",
        "τ",
        "95 % interval",
        "P(k ≥ 1, 2, …)",
        "DSR",
    ]
    cells = []
    for row in rows:
        name, _, tree = row["arm"].removeprefix("draft:").partition("@")
        training = trainings[name]
        cells.append(
            [
                name,
                optional(training.get("tokens"), ",d"),
                f"{training['steps']} × {training['rows']}" if training else "",
                tree,
                f"{row['identical']}/{row['prompts']}",
                f"{row['tau']:.2f}",
                between(row["tau_interval"]),
                numbers(row["per_position"]),
                f"{row['dsr']:.2f}",
            ]
        )
    return table(head, cells)


def write_report(found: dict[str, Any], page: Path) -> None:
    """Writes the tables of a page anew, between its two marks."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise BenchmarkError(
            f"{page} has no place for the tables: it needs the line {BEGIN.strip()!r}, and after it {END.strip()!r}"
        )
    write_text(page, f"{before}{begin}\n{tables(found)}\n{end}{after}")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure drafts of a language model (resumes by itself).")
    parser.add_argument("--target", required=True, help="folder of the language model")
    parser.add_argument("--draft", type=Path, required=True, help="folder of the draft whose trees are measured")
    parser.add_argument("--compare", nargs="*", default=[], metavar="NAME=FOLDER", help="further drafts")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="file of conversations")
    parser.add_argument("--limit", type=int, default=24, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=1, help="calls of each arm; that of median time counts")
    parser.add_argument("--dtype", default="float32", help="of the target")
    parser.add_argument(
        "--shapes", nargs="*", default=SHAPES, help="trees of --draft; none, with no --others: only --compare"
    )
    parser.add_argument("--others", nargs="*", default=OTHERS, help="arms beside them, as `sparrow bench` names them")
    parser.add_argument("--note", default="", help="about the machine, kept with the figures")
    parser.add_argument("--work", type=Path, required=True, help="folder of single measurements")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    parser.add_argument("--report", type=Path, help="page whose tables are written anew")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    found = measure(
        options.target,
        options.draft,
        {name: Path(folder) for name, _, folder in (each.partition("=") for each in options.compare)},
        options.work,
        prompts=options.prompts,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
        dtype=options.dtype,
        shapes=options.shapes,
        others=options.others,
    )
    write_json(options.output, sealed({"note": options.note, **json.loads(json.dumps(found))}), indent=1)
    if options.report is not None:
        write_report(found, options.report)
    print(tables(found))


if __name__ == "__main__":
    main()

"""`sparrow vocab`: chooses the tokens that a draft can propose."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..extras import require
from .common import quiet_transformers

TABLE_SIZES = (4_096, 8_192, 16_384, 32_768, 65_536)
"""Sizes whose coverage is shown beside that of `--size`."""


def vocab(
    target: Annotated[str, typer.Option(help="The video LLM that wrote the answers: a folder or a Hub id.")],
    answers: Annotated[Path, typer.Option(help="Folder written by `sparrow regenerate`.")],
    output: Annotated[Path, typer.Option(help="File to write, or folder to write vocabulary.safetensors into.")],
    size: Annotated[
        int, typer.Option(min=1, help="Number of tokens in the draft's vocabulary (draft_vocab_size).")
    ] = 32_768,
) -> None:
    """Counts the tokens of the target's answers and keeps the most frequent ones for the draft.

    Reads the target's configuration, not its weights.
    """
    require("train", "sparrow vocab")
    from tqdm import tqdm

    from .. import __version__
    from ..data.answers import read_answers
    from ..training.vocabulary import (
        VOCABULARY_FILE,
        TargetTokens,
        choose_vocabulary,
        count_tokens,
        coverage,
        save_vocabulary,
    )

    quiet_transformers()
    tokens = TargetTokens.from_pretrained(target)
    rows = tqdm(read_answers(answers), desc="counting", unit=" answers", leave=False, disable=None)
    counts = count_tokens(rows, tokens.vocab_size)
    chosen = choose_vocabulary(counts, size, tokens)
    path = output if output.suffix == ".safetensors" else output / VOCABULARY_FILE
    save_vocabulary(path, chosen, counts, {"target": target, "sparrow_hf": __version__})

    largest = tokens.vocab_size - len(tokens.visual_ids)
    table = Table(title=f"{int(counts.sum()):,} answer tokens, {int((counts > 0).sum()):,} different ones")
    for column in ("draft vocabulary", "of the target's", "answer tokens covered"):
        table.add_column(column, justify="right")
    for shown in sorted({size, *(each for each in TABLE_SIZES if each <= largest)}):
        share = coverage(counts, choose_vocabulary(counts, shown, tokens))
        style = "bold" if shown == size else None
        table.add_row(f"{shown:,}", f"{shown / tokens.vocab_size:.1%}", f"{share:.3%}", style=style)
    console = Console()
    console.print(table)
    console.print(f"Wrote {path}", soft_wrap=True)

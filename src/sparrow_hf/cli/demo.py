"""`sparrow demo`: the same caption, plain and with the draft."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..artifacts import write_json
from ..errors import VideoError
from ..extras import require
from .common import FAMILY_HELP, NOT_IDENTICAL, built_in_family, errors_as_sentences, quiet_transformers


def demo(
    video: Annotated[Path | None, typer.Option(help="Caption this video instead of a new clip.")] = None,
    question: Annotated[str, typer.Option(help="What to ask about --video.")] = "Describe this video in detail.",
    clips: Annotated[int, typer.Option(min=1, help="How many unseen clips to write and caption.")] = 1,
    visual_tokens: Annotated[int, typer.Option(min=4, help="How long the clips are, in visual tokens.")] = 400,
    seed: Annotated[
        int, typer.Option(min=0, max=90_000_000, help="Which unseen clips: numbers SEED, SEED + 1, …")
    ] = 0,
    tree: Annotated[
        str | None,
        typer.Option(help="What the draft grows: chain-5, 30-4-8, 48-5-10, chain-LEVELS or NODES-LEVELS-BEAM."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest caption, in tokens.")] = 320,
    output: Annotated[Path | None, typer.Option(help="Folder to keep the clips in.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the verdict to this file.")] = None,
    family: Annotated[str | None, typer.Option(help=FAMILY_HELP)] = None,
    target: Annotated[str | None, typer.Option(help="Your own video LLM: folder or Hub id.")] = None,
    draft: Annotated[str | None, typer.Option(help="Your own draft: folder or Hub id.")] = None,
    processor: Annotated[str | None, typer.Option(help="Processor of --target, if it lies elsewhere.")] = None,
    device: Annotated[str | None, typer.Option(help="Where --target runs: cpu, cuda, cuda:1, …")] = None,
    fps: Annotated[float, typer.Option(min=0.01, help="Frames per second to see of --video, at most.")] = 8.0,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames to see of --video, at most.")] = 768,
) -> None:
    """Captions a video plain and with the draft: same text, less time.

    Without options, the built-in models caption a clip they have not seen. Ends with 1 if a single token differs from
    plain generate(), and with 2 if something is missing.
    """
    with errors_as_sentences():
        require("video", "sparrow demo")
        from ..configuration_sparrow import parse_tree_shape
        from ..evaluation.demo import load_models, print_verdict, question_about, run_demo, unseen_clips

        quiet_transformers()
        if video is not None and (clips > 1 or output is not None):
            raise VideoError("--video names the one clip to caption: leave out --clips and --output.")
        if video is not None and not video.is_file():
            raise VideoError(f"There is no video file at {video}. Check the path.")
        shape = None if tree is None else parse_tree_shape(tree)
        console = Console()
        with console.status("Loading the models"):
            models = load_models(target, draft, processor, device, built_in_family(family, target))
        with tempfile.TemporaryDirectory() as scratch:
            if video is None:
                prompts = unseen_clips(models.target, output or Path(scratch), seed, clips, visual_tokens)
            else:
                prompts = iter([question_about(video, question)])
            verdict = run_demo(
                models,
                prompts,
                clips,
                tree=shape or models.draft.config.tree_shape,
                max_new_tokens=max_new_tokens,
                console=console,
                fps=None if video is None else fps,
                max_frames=None if video is None else max_frames,
                seed=seed,
            )
        print_verdict(verdict, console)
        if json_file is not None:
            write_json(json_file, verdict.to_dict(), indent=2)
        if not verdict.identical:
            raise typer.Exit(NOT_IDENTICAL)

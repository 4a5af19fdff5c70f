"""`sparrow demo`: captions a video with and without the draft, and compares."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..artifacts import write_json
from ..errors import VideoError
from ..extras import require
from .common import (
    FPS_HELP,
    MAX_FRAMES_HELP,
    NOT_IDENTICAL,
    FamilyOption,
    ProcessorOption,
    built_in_family,
    quiet_transformers,
)


def demo(
    video: Annotated[Path | None, typer.Option(help="Video file to caption instead of a generated clip.")] = None,
    question: Annotated[
        str | None, typer.Option(help="Question to ask about --video (default: to describe it in detail).")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Number of clips to generate and caption.")] = 1,
    visual_tokens: Annotated[
        int | None, typer.Option(min=4, help="Length of the clips, in visual tokens (default: 400).")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=90_000_000, help="Number of the first clip; the others follow it (default: 0)."),
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(help="Shape of the draft tree: chain-LEVELS or NODES-LEVELS-BEAM, such as chain-5 or 48-5-10."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Maximum length of a caption, in tokens.")] = 320,
    output: Annotated[Path | None, typer.Option(help="Folder to keep the generated clips in.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file to write the results to.")] = None,
    family: FamilyOption = None,
    target: Annotated[str | None, typer.Option(help="Your own video LLM: a folder or a Hub id.")] = None,
    draft: Annotated[str | None, typer.Option(help="Your own draft: a folder or a Hub id.")] = None,
    processor: ProcessorOption = None,
    device: Annotated[str | None, typer.Option(help="Device of --target, such as cpu, cuda or cuda:1.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.01, help=f"{FPS_HELP} For --video (default: 8).")] = None,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help=f"{MAX_FRAMES_HELP} For --video (default: 768).")
    ] = None,
) -> None:
    """Captions a video with plain generate() and with the draft, and compares text and time.

    Without options, the built-in models caption a clip they have not seen.
    The exit code is 1 if a single token of an fp32 text differs from plain generate(),
    and 2 if an input is missing or wrong.
    """
    require("video", "sparrow demo")
    from ..captioning import QUESTION
    from ..configuration_sparrow import parse_tree_shape
    from ..evaluation.demo import load_models, print_verdict, question_about, run_demo, unseen_clips
    from ..measurement import is_exact

    quiet_transformers()
    if video is not None and (clips > 1 or any(given is not None for given in (visual_tokens, seed, output))):
        raise VideoError(
            "--video captions one file and generates no clips: leave out --clips, --visual-tokens, --seed and "
            "--output."
        )
    if video is None and any(given is not None for given in (question, fps, max_frames)):
        raise VideoError(
            "Generated clips have --visual-tokens and a question of their own: leave out --question, --fps and "
            "--max-frames, or name your own file with --video."
        )
    if video is not None and not video.is_file():
        raise VideoError(f"There is no video file at {video}. Check the path.")
    shape = None if tree is None else parse_tree_shape(tree)
    console = Console()
    with console.status("Loading the models"):
        models = load_models(target, draft, processor, device, built_in_family(family, target))
    with tempfile.TemporaryDirectory() as scratch:
        if video is None:
            seed = seed or 0
            prompts = unseen_clips(models.target, output or Path(scratch), seed, clips, visual_tokens or 400)
        else:
            fps, max_frames = fps or 8.0, max_frames or 768
            prompts = iter([question_about(video, question or QUESTION)])
        verdict = run_demo(
            models,
            prompts,
            clips,
            tree=shape or models.draft.config.tree_shape,
            max_new_tokens=max_new_tokens,
            console=console,
            fps=fps,
            max_frames=max_frames,
            seed=seed,
        )
    print_verdict(verdict, console)
    if json_file is not None:
        write_json(json_file, verdict.to_dict(), indent=2)
    if not verdict.identical and is_exact(verdict.provenance["dtype"]):
        raise typer.Exit(NOT_IDENTICAL)

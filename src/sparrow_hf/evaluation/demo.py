"""The demo: captions videos plain and with a draft, shows which tokens were drafted, and measures both."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from ..configuration_sparrow import TREE_PRESETS, TreeShape
from ..data.messages import messages_for, text_of
from ..data.prepare import prepare_prompt, to_target, tokenizer_of
from ..draft_inputs import visual_mask
from ..errors import SparrowError
from ..generation.integration import follow
from ..loading import load_target, told_if_not_loaded
from ..measurement import NO_DRAFT, PLAIN, Arm, compare, is_exact, warm_up
from ..metrics import Acceptance, Run, Speed, acceptance, decoded, speed
from ..modeling_sparrow import SparrowDraftModel
from ..streaming import DRAFTED_STYLE, OWN_STYLE, ProvenanceStreamer
from .provenance import provenance
from .results import figures

DRAFT = "draft"
#: A single clip is measured more than once, and in both orders.
SINGLE_CLIP_REPEATS = 2
#: The control (our loop without a draft) varies little between clips and is slow, so it runs on a few only.
MAX_CONTROL_RUNS = 8
#: Figures of a results file that a verdict leaves out, or tells under another name.
LEFT_OUT = ("output_tokens", "dsr_per_prompt", "dsr_interval", "forwards_per_token")


class DemoError(SparrowError, ValueError):
    """The models of the demo are missing or do not belong together."""


class Models(NamedTuple):
    """What the demo runs on."""

    target: PreTrainedModel
    processor: ProcessorMixin
    draft: SparrowDraftModel


class VideoQuestion(NamedTuple):
    """A video and a question about it."""

    name: str
    messages: list[dict[str, Any]]


@dataclass
class Verdict:
    """The measurements of a demo.

    Attributes:
        visual_tokens: Median over clips.
        runs: Arm name → its runs, all arms in the same order of clips; the control may have run on the first few only.
    """

    clips: int
    visual_tokens: int
    runs: dict[str, list[Run]]
    provenance: dict[str, Any]

    @property
    def identical(self) -> bool:
        """Whether every token of every run is plain `generate()`'s."""
        return all(run.differs_at is None for runs in self.runs.values() for run in runs)

    @property
    def acceptance(self) -> Acceptance:
        return acceptance(self.runs[DRAFT])

    @property
    def speed(self) -> Speed | None:
        """Over the clips whose answers are longer than a token; `None` if there are none."""
        return self._speed(DRAFT)

    @property
    def same_engine(self) -> Speed | None:
        """Speed-up of our loop without a draft: the part that is not due to the draft."""
        return self._speed(NO_DRAFT)

    def _speed(self, arm: str) -> Speed | None:
        plain, runs = decoded(self.runs[PLAIN][: len(self.runs[arm])], self.runs[arm])
        return speed(plain, runs) if runs else None

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON types."""
        plain, drafted = decoded(self.runs[PLAIN], self.runs[DRAFT])
        told, control = figures(plain, drafted) if drafted else {}, self.same_engine
        return {
            "identical": self.identical,
            "clips": self.clips,
            "visual_tokens": self.visual_tokens,
            **{name: figure for name, figure in told.items() if name not in LEFT_OUT},
            "target_forwards_per_token": self.acceptance.forwards_per_token,
            "same_engine_dsr": None if control is None else control.dsr.median,
            "same_engine_esr": None if control is None else control.esr.median,
            "draft_cache_rows": max(run.draft_cache_rows or 0 for run in self.runs[DRAFT]),
            "provenance": self.provenance,
        }


# -- models and clips -------------------------------------------------------------------------------------------------


def load_models(
    target: str | None,
    draft: str | None,
    processor: str | None = None,
    device: str | None = None,
    family: str = "qwen2.5-vl",
) -> Models:
    """Loads from folders or Hub ids; what is not named is the built-in model of a family.

    Raises:
        DemoError: The draft is not named, not there, or is not what it should be.
        TargetLoadError: The target or its processor is not there, or there is no such family.
    """
    from ..testbed import named_or_built_in

    target, draft, device = named_or_built_in(target, draft, device, family, DemoError)
    model, its_processor = load_target(target, processor, device=device)
    with told_if_not_loaded("draft", draft, DemoError):
        return Models(model, its_processor, SparrowDraftModel.from_pretrained(draft).eval())


def unseen_clips(target: Any, folder: Path, seed: int, count: int, visual_tokens: int) -> Iterator[VideoQuestion]:
    """Writes clips of the testbed's world that its models have not seen, one at a time.

    They have so many visual tokens for targets of the testbed's families; for others they are as long as for its
    Qwen2.5-VL.
    """
    from ..testbed import EVALUATION_SEEDS, FAMILIES, QWEN2_5_VL, make_clip

    family = next((family for family in FAMILIES if isinstance(target, family.model_class)), QWEN2_5_VL)

    for clip_seed in EVALUATION_SEEDS[seed : seed + count]:
        path = folder / f"clip-{clip_seed}.mp4"
        yield VideoQuestion(path.name, make_clip(path, clip_seed, visual_tokens, family.tokens_per_step).messages)


def question_about(video: Path, question: str) -> VideoQuestion:
    """The prompt of a user's own video."""
    return VideoQuestion(video.name, messages_for(str(video), question))


# -- running and printing ---------------------------------------------------------------------------------------------


def run_demo(
    models: Models,
    prompts: Iterator[VideoQuestion],
    clips: int,
    *,
    tree: TreeShape,
    max_new_tokens: int,
    console: Console,
    fps: float | None = None,
    max_frames: int | None = None,
    **details: Any,
) -> Verdict:
    """Shows the first clip, then measures all of them.

    Args:
        prompts: As many as `clips`; taken one by one.
        fps, max_frames: See [`~sparrow_hf.data.prepare_inputs`].
        details: Further entries of the provenance.

    Raises:
        VideoError: A video cannot be read.
        BindingError: The draft was made for another target.
    """
    target, processor, draft = models
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "tokenizer": tokenizer_of(processor)}
    arms = [Arm(PLAIN), Arm(DRAFT, draft, tree), Arm(NO_DRAFT, draft, TREE_PRESETS["none"])]
    repeats = SINGLE_CLIP_REPEATS if clips == 1 else 1
    runs: dict[str, list[Run]] = {arm.name: [] for arm in arms}
    lengths = []
    follow(draft, target)

    def prepare(prompt: VideoQuestion) -> BatchFeature:
        inputs = prepare_prompt(processor, {"messages": prompt.messages}, fps, max_frames)
        lengths.append(int(visual_mask(inputs["input_ids"], draft.config.visual_token_ids or []).sum()))
        return to_target(inputs, target)

    with console.status("Reading the video"):
        prompt = next(prompts)
        inputs = prepare(prompt)
    question = text_of(prompt.messages[0])
    console.print(Text.assemble((prompt.name, "bold"), f" · {lengths[0]} visual tokens · “{question}”\n"))
    _stream(models, arms[:2], inputs, settings, console)

    # The first two arms have run already.
    warm_up(target, arms[2:], inputs, settings)
    with _progress(console) as progress:
        task = progress.add_task("Measuring", total=clips * repeats)
        for turn in range(clips * repeats):
            if turn >= repeats:
                inputs = prepare(next(prompts))
            compared = arms if turn < MAX_CONTROL_RUNS else arms[:2]
            for name, run in compare(target, compared, inputs, settings, turn).items():
                runs[name].append(run)
            progress.update(task, advance=1, description=_so_far(runs))
    return Verdict(
        clips,
        round(statistics.median(lengths)),
        runs,
        provenance(target, tree="-".join(map(str, tree)), repeats=repeats, **details),
    )


def _stream(
    models: Models, arms: Sequence[Arm], inputs: dict[str, Tensor], settings: dict[str, Any], console: Console
) -> None:
    """Captions one clip with each arm, the text appearing as it is generated."""
    tokenizer = tokenizer_of(models.processor)
    for arm in arms:
        if arm.draft is None:
            legend = Text("plain generate()", style="bold")
        else:
            legend = Text("with the draft: ", style="bold")
            legend.append("accepted draft tokens", DRAFTED_STYLE).append(", the target's own", OWN_STYLE)
        text = Text()
        # Drawn again with each piece, so that lines break between words.
        with Live(Group(legend, text), console=console, auto_refresh=False, vertical_overflow="visible") as live:

            def show(piece: str, drafted: bool, arm: Arm = arm, text: Text = text, live: Live = live) -> None:
                style = "" if arm.draft is None else DRAFTED_STYLE if drafted else OWN_STYLE
                text.append(piece, style)
                live.refresh()

            with arm.options(models.target, inputs) as options:
                streamer = ProvenanceStreamer(tokenizer, show, arm.draft)
                models.target.generate(**inputs, **settings, **options, streamer=streamer)
        console.print()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _so_far(runs: dict[str, list[Run]]) -> str:
    same = sum(run.differs_at is None for run in runs[DRAFT])
    return f"Measuring: {same}/{len(runs[DRAFT])} identical, τ {acceptance(runs[DRAFT]).tau:.2f}"


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Prints the figures of a verdict, the verdict itself last."""
    taken, faster, control = verdict.acceptance, verdict.speed, verdict.same_engine
    positions = ", ".join(f"{share:.2f}" for share in taken.per_position)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    rows = [
        ("τ, tokens per forward", f"{taken.tau:.2f}", f"{taken.rounds} rounds after the prefill"),
        ("k, drafts per round", f"{taken.k:.2f}", f"accepted at position 1, 2, …: {positions}"),
        ("forwards per token", f"{taken.forwards_per_token:.2f}", "of the target; plain generate(): 1.00"),
    ]
    if faster is not None:
        per_token = f"{faster.plain_ms_per_token.median:.1f} → {faster.ms_per_token.median:.1f} ms per token"
        prefill = f"the prefill is {faster.prefill_share.median:.0%} of plain generate()"
        rows.append(("DSR, decode speed-up", f"{faster.dsr.median:.2f}×", per_token))
        rows.append(("ESR, end to end", f"{faster.esr.median:.2f}×", prefill))
    if control is not None:
        rows.append(("without a draft", f"{control.dsr.median:.2f}×", "DSR of the same loop drafting nothing"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()
    console.print(_verdict_line(verdict))


def _verdict_line(verdict: Verdict) -> Text:
    taken, faster = verdict.acceptance, verdict.speed
    different = [run for runs in verdict.runs.values() for run in runs if run.differs_at is not None]
    if different:
        where = f"NOT IDENTICAL in {len(different)} runs, first at token {different[0].differs_at}"
        if not is_exact(verdict.provenance["dtype"]):
            where += f" (in {verdict.provenance['dtype']} two nearly equal tokens may swap; fp32 is exact)"
        head = Text(where, style="bold red")
    else:
        head = Text("IDENTICAL", style="bold green")
        head.append(f" in {verdict.clips} {'clip' if verdict.clips == 1 else 'clips'}", style="green")
    positions = " ".join(f"{share:.2f}" for share in taken.per_position)
    speeds = (
        ("no speed, every answer is a single token",)
        if faster is None
        else (f"DSR {faster.dsr.median:.2f}×", f"ESR {faster.esr.median:.2f}×")
    )
    figures = (
        f"τ {taken.tau:.2f} (k {taken.k:.2f}: {positions})",
        f"{taken.forwards_per_token:.2f} forwards per token",
        *speeds,
    )
    return head.append("".join(f" · {figure}" for figure in figures), style="bold")

"""The picture of docs/language-video.md: τ of every draft over the length of the clip, and what is kept of it.

    python -m sparrow_research.language.video_figure [--data FILE] [--output FILE]

Reads what `video_lengths` measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparrow_hf.plotting import COLOURS, INK, dress, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPOSITORY = Path(__file__).parents[4]
DATA = REPOSITORY / "research" / "data" / "language" / "video.json"
OUTPUT = REPOSITORY / "docs" / "figures" / "language-video.png"
#: Draft → its name in the picture. The first one is drawn thick, with its interval.
CURVES = {
    "four-layers": "four layers, 300 steps",
    "last-layer": "last layer, 300 steps",
    "four-layers-100": "four layers, 100 steps",
    "last-layer-100": "last layer, 100 steps",
    "eagle-visual": "last layer and every visual row, 100 steps",
    "text-only": "no states, 100 steps",
}


def draw(drafts: Mapping[str, Any]) -> Figure:
    """A panel of τ, and one of the share that the clips of a length keep of their τ at the shortest."""
    figure, (taus, kept) = new_figure(2)
    for index, (name, label) in enumerate(CURVES.items()):
        draft = drafts[name]
        lengths = [row["visual_tokens"] for row in draft["lengths"]]
        # The shortest keeps all of it.
        shares = [draft["retention"].get(str(length), {"ratio": 1, "interval": (1, 1)}) for length in lengths]
        style: dict[str, Any] = {"color": COLOURS[index], "marker": "o", "ms": 3, "lw": 1.3 if index else 3}
        taus.plot(lengths, [row["tau"] for row in draft["lengths"]], label=label, **style)
        kept.plot(lengths, [share["ratio"] for share in shares], **style)
        if index == 0:
            low, high = zip(*(share["interval"] for share in shares), strict=True)
            kept.fill_between(lengths, low, high, color=style["color"], alpha=0.15, lw=0)
    kept.axhline(1, color=INK, lw=0.8, linestyle=":")
    for axes in (taus, kept):
        axes.set_xscale("log")
        labels = [f"{length:,}" if length < 10_000 else f"{length // 1000}k" for length in lengths]
        axes.set_xticks(lengths, labels, minor=False)
        axes.minorticks_off()
    taus.set_ylim(bottom=1)
    dress(taus, "chains of 3", "visual tokens", "τ, tokens per target forward", legend_columns=2)
    dress(kept, "of it kept, on the same clips", "visual tokens", "share of τ at 400")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="file of the figures")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="picture to write")
    options = parser.parse_args(arguments)
    drafts = json.loads(options.data.read_text())["draft"]["lengths"]["drafts"]
    print(save(draw(drafts), options.output))


if __name__ == "__main__":
    main()

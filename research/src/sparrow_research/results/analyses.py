"""What `sparrow analyze` finds out about the testbed's targets, on clips whose captions are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparrow_hf.analysis import Conversation, analyze
from sparrow_hf.artifacts import tensor_digest, write_json
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.testbed import SHIPPED
from sparrow_hf.testbed.captions import content_score
from sparrow_hf.testbed.families import Family
from sparrow_hf.testbed.nano import MAX_CAPTION_TOKENS, load_target
from sparrow_hf.testbed.world import EVALUATION_SEEDS, make_clip

CLIPS = {400: 6, 3000: 3}
"""Visual tokens → clips."""
ANALYSIS_FILE = "analysis.json"
COMMAND = "python -m sparrow_research.results --work DIR --output research/data/results.json --parts analyse"
DRAFT = "msd"
"""The draft whose visual rows are taken away: one that was trained with all of them."""


def score(caption: str, reference: str) -> float:
    """Share of the claims that a caption gets right."""
    agreed, claimed = content_score(caption, reference)
    return agreed / claimed


def analyse(family: Family, draft_folder: Path | None, work: Path) -> None:
    """Analyses a family's target, unless that was done; records of a stopped analysis are not made again.

    Args:
        draft_folder: The draft whose visual rows are taken away, if there is one.
    """
    folder, finished = work / "analysis", work / ANALYSIS_FILE
    target, processor = load_target(SHIPPED[family.name] / "target")
    details = {"target_sha256": tensor_digest(target.state_dict())}
    draft = None
    if draft_folder is not None:
        draft = SparrowDraftModel.from_pretrained(draft_folder).eval()
        draft.config.set_tree_shape("chain-5")
        details["draft_sha256"] = tensor_digest(draft.state_dict())
    if finished.exists() and details.items() <= json.loads(finished.read_text())["provenance"].items():
        return
    conversations = []
    for length, clips in CLIPS.items():
        for seed in EVALUATION_SEEDS[:clips]:
            clip = make_clip(folder / "clips" / f"{length}-{seed}.mp4", seed, length, family.tokens_per_step)
            conversations.append(Conversation(clip.messages, clip.caption))
    summary = analyze(
        target,
        processor,
        conversations,
        folder,
        draft=draft,
        score=score,
        max_new_tokens=MAX_CAPTION_TOKENS,
    )
    report: dict[str, Any] = {"provenance": provenance(target, command=COMMAND, **details)} | summary
    write_json(finished, report)

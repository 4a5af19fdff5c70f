"""Measures what a training step on a long video takes in memory, beside the target's own forward on the same tokens.

    python -m sparrow_research.memory --visual-tokens 25000 --output research/data/training_memory.json

Each figure comes from a fresh process: how far its resident memory rises above what it held when the models and the
processed video were loaded and a step on a short one was done. The testbed's draft has the target's width and one of
its 24 layers, as a real draft has. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen2_5_VLProcessor

from sparrow_hf.artifacts import write_json
from sparrow_hf.data.prepare import prepare_inputs
from sparrow_hf.evaluation.provenance import provenance
from sparrow_hf.testbed.nano import ASSETS, load_target
from sparrow_hf.testbed.world import TRAIN_SEEDS, make_clip
from sparrow_hf.training import ALL_VISUAL_ROWS, SparrowTrainer, SparrowTrainingArguments, append_answer

from .retrain import build_draft

SHORT_CLIP = 64
"""Visual tokens of the clip that everything is warmed up on."""

VARIANTS: dict[str, dict[str, Any] | None] = {
    "forward": None,
    "text rows": {"num_visual_rows_min": 0, "num_visual_rows_max": 0},
    "glimpse": {},
    "all visual rows": {"num_visual_rows_min": ALL_VISUAL_ROWS, "num_visual_rows_max": ALL_VISUAL_ROWS},
}
"""The target's forward alone, and training steps by what they differ in from the default."""


def processed_clip(processor: Qwen2_5_VLProcessor, visual_tokens: int) -> dict[str, Any]:
    """A processed conversation about a clip of about so many visual tokens, with the reference caption as answer."""
    with tempfile.TemporaryDirectory() as folder:
        clip = make_clip(Path(folder) / "clip.mp4", TRAIN_SEEDS[0], visual_tokens)
        inputs = prepare_inputs(processor, clip.messages)
    return append_answer(inputs, [*processor.tokenizer(clip.caption)["input_ids"], processor.tokenizer.eos_token_id])


def measure(variant: str, samples: Path) -> int:
    """Bytes by which this process, a fresh one, grows in one step on the second of the saved samples."""
    torch.set_num_threads(1)
    target, _ = load_target(ASSETS / "target")
    draft = build_draft(target)
    recipe = VARIANTS[variant]

    def step(sample: dict[str, Any]) -> None:
        if recipe is None:
            inputs = {name: value for name, value in sample.items() if name != "answer_start"}
            with torch.no_grad():
                target(**inputs, use_cache=False, logits_to_keep=1)
            return
        with tempfile.TemporaryDirectory() as folder:
            arguments = SparrowTrainingArguments(
                output_dir=folder,
                use_cpu=True,
                max_steps=1,
                per_device_train_batch_size=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **recipe,
            )
            SparrowTrainer(draft, target, arguments, train_dataset=[sample]).train()

    short, long = torch.load(samples, weights_only=True)
    step(short)
    pages_held = int(Path("/proc/self/statm").read_text().split()[1])
    step(long)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - pages_held * resource.getpagesize()


def main(arguments: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure the memory of training steps on one long video.")
    parser.add_argument("--visual-tokens", type=int, default=25_000, help="length of the video")
    parser.add_argument("--output", type=Path, required=True, help="file of the results")
    options = parser.parse_args(arguments)

    print(f"{len(VARIANTS)} processes, one after another; a few minutes each at 25,000 visual tokens.")
    target, processor = load_target(ASSETS / "target")
    grown: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Decoding a video leaves freed memory behind, which a step in the same process would use unseen.
        samples = [dict(processed_clip(processor, tokens)) for tokens in (SHORT_CLIP, options.visual_tokens)]
        torch.save(samples, Path(folder) / "samples.pt")
        for variant in tqdm(VARIANTS, desc="memory"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                grown[variant] = fresh.submit(measure, variant, Path(folder) / "samples.pt").result()
    shares = {variant: size / grown["forward"] for variant, size in grown.items()}
    for variant, size in grown.items():
        print(f"{variant}: {size / 1e6:.0f} MB, {shares[variant]:.2f} of the target's forward")
    results = {
        "visual_tokens": int((samples[1]["input_ids"] == processor.video_token_id).sum()),
        "bytes": grown,
        "of_forward": {variant: round(share, 3) for variant, share in shares.items()},
        "provenance": provenance(target, command="python -m sparrow_research.memory"),
    }
    write_json(options.output, results, indent=1)


if __name__ == "__main__":
    main()

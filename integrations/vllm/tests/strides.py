"""What the stride of the glimpse costs in transformers: the table of docs/serving.md. Runs where sparrow_hf is."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from references import SEEDS, acceptance_length, describe, glimpse_by_stride

from sparrow_hf import testbed
from sparrow_hf.video import prepare_inputs

#: Visual tokens → how many clips.
CLIPS = {400: 5, 3200: 3}
STRIDES = (None, 6, 12, 25, 50)
TOKENS = 60

if __name__ == "__main__":
    torch.set_num_threads(1)
    target, processor, draft = testbed.load()
    with tempfile.TemporaryDirectory() as folder:
        for visual_tokens, count in CLIPS.items():
            clips = [
                testbed.make_clip(Path(folder, f"{visual_tokens}-{seed}.mp4"), seed, visual_tokens)
                for seed in SEEDS[:count]
            ]
            inputs = [prepare_inputs(processor, clip.messages) for clip in clips]
            for stride in STRIDES:
                with glimpse_by_stride(stride) if stride else nullcontext():
                    found = [describe(target, draft, each, 64, TOKENS) for each in inputs]
                print(visual_tokens, f"every {stride}th" if stride else "evenly 64", f"{acceptance_length(found):.2f}")

"""What transformers says to the clips of the tests, for an environment that has vLLM and not this transformers.

`python references.py OUTPUT` in an environment of sparrow_hf; `make test-vllm` calls it. Writes the exported drafts, the
clips, and of every clip the ids and the rounds of `generate()` with the draft.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import Qwen2_5_VLModel
from transformers.video_utils import load_video

from sparrow_hf import draft_inputs, testbed
from sparrow_hf.export_vllm import DEFAULT_GLIMPSE_STRIDE, export_vllm
from sparrow_hf.video import prepare_inputs

#: Visual tokens of a clip → how many clips.
CLIPS = {400: 5, 3200: 2}
MAX_NEW_TOKENS = 100


@contextmanager
def glimpse_by_stride(stride: int) -> Iterator[None]:
    """Drafts keep every s-th visual token, as in vLLM."""
    with patch.object(draft_inputs, "strided", lambda positions, count: positions[stride // 2 :: stride]):
        yield


@contextmanager
def positions_of_vllm() -> Iterator[None]:
    """Text after the (one) video is numbered from the largest of the video's positions, as in vLLM."""
    own = Qwen2_5_VLModel.get_rope_index

    def get_rope_index(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        positions, _ = own(self, input_ids, *args, **kwargs)
        video = (input_ids[0] == self.config.video_token_id).nonzero().flatten()
        behind = int(video[-1]) + 1
        positions[:, :, behind:] += positions[:, :, : behind].max() + 1 - positions[:, :, behind : behind + 1]
        return positions, positions.max().reshape(1, 1) + 1 - input_ids.shape[1]

    with patch.object(Qwen2_5_VLModel, "get_rope_index", get_rope_index):
        yield


def describe(target: Any, draft: Any, inputs: Any, glimpse: int) -> dict[str, Any]:
    draft.config.num_glimpse_tokens = glimpse
    output = target.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, assistant_model=draft)
    stats = draft.last_generation
    return {
        "ids": output[0, inputs["input_ids"].shape[1] :].tolist(),
        "rounds": stats.rounds,
        "accepted": sum(stats.accepted),
    }


def write(output: Path) -> None:
    torch.set_num_threads(1)
    for family in ("qwen2.5-vl", "llava-onevision"):
        folder, shipped = output / family, testbed.shipped(family)
        export_vllm(shipped / "draft", folder / "draft", shipped / "target")
        target, processor, draft = testbed.load(family)
        clips = []
        for visual_tokens, count in CLIPS.items():
            for seed in list(testbed.EVALUATION_SEEDS)[:count]:
                name = f"{visual_tokens}-{seed}"
                path = folder / f"{name}.mp4"
                step = testbed.family_of(target).tokens_per_step
                clip = testbed.make_clip(path, seed, visual_tokens, step)
                inputs = prepare_inputs(processor, clip.messages)
                plain = target.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                found = {"even": describe(target, draft, inputs, 64), "none": describe(target, draft, inputs, 0)}
                assert found["even"]["ids"] == plain[0, inputs["input_ids"].shape[1] :].tolist()
                if family == "qwen2.5-vl":
                    with glimpse_by_stride(DEFAULT_GLIMPSE_STRIDE):
                        found["stride"] = describe(target, draft, inputs, 64)
                    with positions_of_vllm(), glimpse_by_stride(DEFAULT_GLIMPSE_STRIDE):
                        found["vllm"] = describe(target, draft, inputs, 64)
                frames, metadata = load_video(str(path), backend="pyav")
                np.save(folder / f"{name}.npy", frames)
                prompt = processor.apply_chat_template(clip.messages, add_generation_prompt=True, tokenize=False)
                clips.append(
                    {
                        "name": name,
                        "visual_tokens": visual_tokens,
                        "prompt": prompt,
                        "text": clip.messages[0]["content"][1]["text"],
                        "prompt_ids": inputs["input_ids"][0].tolist(),
                        "metadata": asdict(metadata) | {"do_sample_frames": False},
                        **found,
                    }
                )
                print(family, name, {k: 1 + v["accepted"] / v["rounds"] for k, v in found.items()}, flush=True)
        (folder / "target").write_text(str(shipped / "target"))
        (folder / "clips.json").write_text(json.dumps(clips, default=np.ndarray.tolist))


if __name__ == "__main__":
    write(Path(sys.argv[1]))

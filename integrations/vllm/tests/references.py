"""What transformers says to the clips of the tests, for an environment that has vLLM and not this transformers.

`python references.py OUTPUT` in an environment of sparrow_hf; `make test-vllm` calls it. Writes the exported drafts,
the clips, and of every clip the ids and the rounds of `generate()` with the draft.
"""

import copy
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.video_utils import load_video

from sparrow_hf import SparrowDraftModel, draft_inputs, testbed
from sparrow_hf._transformers import use_vllm_positions
from sparrow_hf.export_vllm import export_vllm
from sparrow_hf.generation.candidate_generator import SparrowCandidateGenerator
from sparrow_hf.video import prepare_inputs

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
from family_parts import MROPE

from families import FAMILY_BY_NAME
from tiny_targets import FRAME_SIZE

#: Family → visual tokens of a clip → how many clips.
CLIPS = {"qwen2.5-vl": {400: 5, 3200: 3}, "llava-onevision": {400: 5}}
SEEDS = list(testbed.EVALUATION_SEEDS[:5])
MAX_NEW_TOKENS = 100
#: Drafted tokens of a round.
CHAIN = 5
LARGER_VOCABULARY = 300
#: Of the glimpse, in vLLM.
SPACING = "logarithmic"


def describe(target: Any, draft: Any, inputs: Any) -> dict[str, Any]:
    """Ids of the answer; with a draft, its rounds."""
    output = target.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, assistant_model=draft)
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    if draft is None:
        return {"ids": ids}
    return {"ids": ids, "rounds": draft.last_generation.rounds}


def write(output: Path) -> None:
    torch.set_num_threads(1)
    for family, lengths in CLIPS.items():
        folder, shipped = output / family, testbed.shipped(family)
        export_vllm(shipped / "draft", folder / "draft", shipped / "target", SPACING)
        (folder / "target").write_text(str(served_target(shipped / "target", folder)))
        target, processor, draft = testbed.load(family)
        as_in_vllm, larger = copy.deepcopy(target), None
        if family == "qwen2.5-vl":
            use_vllm_positions(as_in_vllm)
            larger = exported_larger_draft(target, shipped / "target", folder)
        draft.config.set_tree_shape(f"chain-{CHAIN}")
        tokens_per_step = testbed.family_of(target).tokens_per_step
        clips = []
        for visual_tokens, seed in ((n, seed) for n, count in lengths.items() for seed in SEEDS[:count]):
            name = f"{visual_tokens}-{seed}"
            path = folder / f"{name}.mp4"
            clip = testbed.make_clip(path, seed, visual_tokens, tokens_per_step)
            inputs = prepare_inputs(processor, clip.messages)
            frames, metadata = load_video(str(path), backend="pyav")
            np.save(folder / f"{name}.npy", frames)
            clips.append(
                {
                    "name": name,
                    "visual_tokens": visual_tokens,
                    "prompt": processor.apply_chat_template(clip.messages, add_generation_prompt=True, tokenize=False),
                    "text": clip.messages[0]["content"][1]["text"],
                    "prompt_ids": inputs["input_ids"][0].tolist(),
                    "metadata": asdict(metadata) | {"do_sample_frames": False},
                    **answers(family, target, as_in_vllm, draft, inputs),
                }
            )
            if larger is not None and visual_tokens == min(lengths):
                states = states_of(as_in_vllm, larger, inputs)
                clips[-1]["larger"] = describe(as_in_vllm, larger, inputs) | {"states": states}
            print(family, name, flush=True)
            (folder / "clips.json").write_text(json.dumps(clips, default=np.ndarray.tolist))
        for visual_tokens in lengths:
            for arm in ("even", "logarithmic", "vllm", "none"):
                if found := [c[arm] for c in clips if c["visual_tokens"] == visual_tokens and arm in c]:
                    print(f"{family} {visual_tokens} {arm}: {acceptance_length(found):.2f}", flush=True)

    write_qwen3_vl(output / "qwen3-vl")
    (output / "complete").touch()


def write_qwen3_vl(folder: Path) -> None:
    """A random target whose prompts have a header before each frame, a random draft, and the rows that it reads."""
    family = FAMILY_BY_NAME["qwen3_vl"]
    # Heads of 32 channels: vLLM's attention on the CPU has none that are smaller.
    with patch.dict(MROPE, mrope_section=[8, 4, 4]):
        target = family.build_target(num_attention_heads=1, num_key_value_heads=1)
    target.save_pretrained(folder / "weights")
    family._processor.save_pretrained(folder / "weights")
    (folder / "target").write_text(str(folder.absolute() / "weights"))
    draft = SparrowDraftModel.from_target(target, copy_last_layer=True, glimpse_spacing=SPACING)
    draft.save_pretrained(folder / "saved")
    export_vllm(folder / "saved", folder / "draft", folder / "weights")
    frames = np.random.default_rng(0).integers(256, size=(16, FRAME_SIZE, FRAME_SIZE, 3), dtype=np.uint8)
    metadata = {"fps": 2.0, "total_num_frames": 16, "duration": 8.0, "frames_indices": list(range(16))}
    metadata |= {"width": FRAME_SIZE, "height": FRAME_SIZE, "video_backend": "none"}
    prompt = f"User: look at {family.video_prompt} and say what moves here\nAssistant:"
    inputs = family._processor(
        text=prompt, videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    inputs.pop("video_metadata", None)
    kept = SparrowCandidateGenerator(draft, inputs["input_ids"]).positions
    clip = {
        "name": "frames",
        "visual_tokens": int(draft_inputs.visual_mask(inputs["input_ids"], draft.config.visual_token_ids).sum()),
        "prompt": prompt,
        "prompt_ids": inputs["input_ids"][0].tolist(),
        "metadata": metadata | {"do_sample_frames": False},
        "kept": kept.indices.tolist(),
        "plain": describe(target, None, inputs),
    }
    np.save(folder / "frames.npy", frames)
    (folder / "clips.json").write_text(json.dumps([clip]))


def served_target(target: Path, folder: Path) -> Path:
    """The target, or a copy of it whose vision tower has the names of published files, which vLLM looks for."""
    tensors = load_file(target / "model.safetensors")
    wanted = {name: re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name) for name in tensors}
    if all(old == new for old, new in wanted.items()):
        return target
    served = folder.absolute() / "weights"
    shutil.copytree(target, served, dirs_exist_ok=True)
    save_file(
        {wanted[name]: tensor for name, tensor in tensors.items()}, served / "model.safetensors", {"format": "pt"}
    )
    return served


def answers(family: str, target: Any, as_in_vllm: Any, draft: Any, inputs: Any) -> dict[str, Any]:
    """Which rows the draft reads (and at which positions the target) → what came out."""
    if family != "qwen2.5-vl":
        draft.config.num_glimpse_tokens = 0
        found = {"none": describe(target, draft, inputs)}
        assert found["none"]["ids"] == describe(target, None, inputs)["ids"]
        return found
    found = {}
    for spacing in ("even", SPACING):
        draft.config.glimpse_spacing = spacing
        found[spacing] = describe(target, draft, inputs)
    found["vllm"] = describe(as_in_vllm, draft, inputs)
    assert found["vllm"]["ids"] == describe(as_in_vllm, None, inputs)["ids"]
    found["states"] = states_of(as_in_vllm, without_slowest_pair(draft), inputs)
    return found


def exported_larger_draft(target: Any, weights: Path, folder: Path) -> Any:
    """An untrained draft with four feature layers, two decoder layers and a vocabulary of its own, as it is exported.

    It weighs the layers at random: a fresh one reads the last alone.
    """
    draft = SparrowDraftModel.from_target(
        target,
        copy_last_layer=True,
        num_hidden_layers=2,
        feature_layers=[2, 12, 20, -1],
        glimpse_spacing=SPACING,
    )
    draft.set_vocabulary(range(draft.config.vocab_size - LARGER_VOCABULARY, draft.config.vocab_size))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft.feature_fc.weight.data.normal_(std=draft.config.hidden_size**-0.5)
    draft.config.set_tree_shape(f"chain-{CHAIN}")
    draft.save_pretrained(folder / "larger-saved")
    export_vllm(folder / "larger-saved", folder / "larger-draft", weights)
    return without_slowest_pair(draft)


def without_slowest_pair(draft: Any) -> Any:
    """The draft as it is exported: the pair of channels that RoPE turns slowest is not used."""
    draft = copy.deepcopy(draft)
    size = draft.config.head_dim
    for layer in draft.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for tensor in projection.parameters():
                tensor.data.unflatten(0, (-1, size))[:, [size // 2 - 1, size - 1]] = 0
    return draft


def states_of(target: Any, draft: Any, inputs: Any) -> list[list[float]]:
    """What the draft makes of the prompt's last token, and of the tokens that it drafts first, one after the other."""
    states: list[list[float]] = []
    own = SparrowCandidateGenerator.prefill

    def prefill(self: Any, *arguments: Any) -> None:
        own(self, *arguments)
        states[:] = [self.hidden.flatten().tolist()]

    def keep(norm: Any, given: Any, output: torch.Tensor) -> None:
        states.append(output[:, -1].flatten().tolist())

    with patch.object(SparrowCandidateGenerator, "prefill", prefill):
        hook = draft.norm.register_forward_hook(keep)
        target.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, assistant_model=draft)
        hook.remove()
    return states[:CHAIN]


def acceptance_length(found: list[dict[str, Any]]) -> float:
    return sum(len(answer["ids"]) - 1 for answer in found) / sum(answer["rounds"] for answer in found)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

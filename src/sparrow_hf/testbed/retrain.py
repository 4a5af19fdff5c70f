"""Trains the testbed's draft: the target captions unseen clips, its states are recorded, the draft learns from them.

    python -m sparrow_hf.testbed.retrain --target assets/target --output assets/draft

Clips are rendered, sent through the codec and captioned greedily; the target is frozen, so its states are recorded
once and any number of drafts can be trained from one recording (`--recording`). Run the command again to go on where
it was stopped. `--text-only` trains the baseline that reads no target states, with the same clips, steps and batches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.trainer_utils import get_last_checkpoint

from ..errors import TrainingDataError
from ..evaluation.provenance import commit
from ..modeling_sparrow import SparrowDraftModel
from ..training import SparrowTrainer, SparrowTrainingArguments, append_answer, read_with_target
from ..training.regenerate import generate_answers
from ..video import prepare_inputs
from .muon import Muon
from .nano import load_target
from .vision_pretraining import through_codec
from .world import FRAMES_PER_SECOND, TRAIN_SEEDS, VALIDATION_SEEDS, messages_for, render, write_script

SHORT_CLIPS, LONG_CLIPS = (32, 400), (400, 2048)
"""Visual tokens of a clip, drawn evenly on a logarithmic scale from one of the two."""
LONG_SHARE = 0.08
CLIPS_PER_SHARD = 64
CAPTION_BATCH_ROWS = 16_384
"""Prompt rows, padding included, of clips captioned together: a decoding step costs the same for few or many."""
MAX_CAPTION_TOKENS = 320

DRAFT: dict[str, Any] = {"num_mtp_steps": 5, "num_draft_levels": 5, "num_glimpse_tokens": 64}
"""What the testbed's draft is, where it differs from `SparrowDraftConfig`'s defaults: one pass per drafted token."""

MATRIX_LEARNING_RATE, VECTOR_LEARNING_RATE = 0.02, 2e-3
"""Of Muon for the matrices, and of Adam for norms and biases. Muon needs about half of AdamW's steps here."""

RECIPE: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "logging_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 300,
    "save_steps": 300,
    "save_total_limit": 1,
    "report_to": "none",
}


# -- recording --------------------------------------------------------------------------------------------------------


def clip_length(seed: int) -> int:
    """Visual tokens of the training or validation clip `seed`."""
    rng = np.random.default_rng([seed, 2])
    low, high = LONG_CLIPS if rng.random() < LONG_SHARE else SHORT_CLIPS
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def clip_prompt(processor: Qwen2_5_VLProcessor, seed: int) -> dict[str, Any]:
    """The processed prompt of one clip, its frames as a reader of its mp4 file gets them."""
    script = write_script(seed, clip_length(seed))
    frames = through_codec(render(script.story, script.timeline, np.random.default_rng([seed, 1])))
    messages = messages_for("", script.prompt)
    messages[0]["content"][0] |= {"video": frames, "fps": FRAMES_PER_SECOND}
    return dict(prepare_inputs(processor, messages))


def record_shard(
    target: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    draft: SparrowDraftModel,
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Captions some clips greedily and reads them with the target; rows for a [`SparrowTrainer`]."""
    # Clips of about one length share a batch.
    prompts = sorted((clip_prompt(processor, seed) for seed in seeds), key=lambda prompt: prompt["input_ids"].shape[1])
    rows = []
    while prompts:
        # Padded to the longest, the last one taken.
        size = max(
            size
            for size in range(1, len(prompts) + 1)
            if size == 1 or size * prompts[size - 1]["input_ids"].shape[1] <= CAPTION_BATCH_ROWS
        )
        batch, prompts = prompts[:size], prompts[size:]
        answers = generate_answers(
            target, batch, processor.tokenizer.pad_token_id, do_sample=False, max_new_tokens=MAX_CAPTION_TOKENS
        )
        for prompt, answer in zip(batch, answers, strict=True):
            rows.append(read_with_target(draft, append_answer(prompt, answer)).to_row())
    return rows


def record(
    target: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    draft: SparrowDraftModel,
    seeds: Sequence[int],
    folder: Path,
) -> list[dict[str, Any]]:
    """Rows of all clips, from the shards in `folder` as far as they are there; the rest is recorded and stored."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = json.dumps([draft.config.feature_layer_ids, draft.config.visual_bridge_layer])
    metadata = {"target": digest(target), "layers": layers}
    shards = []
    for start in tqdm(range(0, len(seeds), CLIPS_PER_SHARD), desc=f"recording {folder.name}"):
        chunk = seeds[start : start + CLIPS_PER_SHARD]
        shards.append(folder / f"clips-{chunk[0]}-{len(chunk)}.safetensors")
        if not shards[-1].exists():
            write_shard(shards[-1], record_shard(target, processor, draft, chunk), metadata)
    return [row for shard in shards for row in read_shard(shard, metadata)]


def write_shard(path: Path, rows: list[dict[str, Any]], metadata: dict[str, str]) -> None:
    """Stores rows as one safetensors file, by an atomic rename."""
    tensors = {}
    for index, row in enumerate(rows):
        for name, value in row.items():
            tensors[f"{index}.{name}"] = torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial, metadata | {"rows": str(len(rows))})
    os.replace(partial, path)


def read_shard(path: Path, metadata: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of a shard.

    Raises:
        TrainingDataError: It was recorded from another target, or from other layers of it.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = file.metadata()
    if any(found.get(name) != value for name, value in metadata.items()):
        raise TrainingDataError(f"{path} was recorded from another target or other layers: delete its folder")
    rows: list[dict[str, Any]] = [{} for _ in range(int(found["rows"]))]
    for name, tensor in load_file(path).items():
        index, field = name.split(".")
        rows[int(index)][field] = int(tensor) if field == "answer_start" else tensor
    return rows


def digest(target: Qwen2_5_VLForConditionalGeneration) -> str:
    """Fingerprint of the target's weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(target.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


# -- training ---------------------------------------------------------------------------------------------------------


def blindfold(draft: SparrowDraftModel) -> None:
    """Cuts the draft off from hidden states, the target's and its own: what is left is a small language model.

    The half of FC that reads states is set to zero and stays so, hence nothing but the weights tells it apart.
    """
    hidden = draft.config.hidden_size
    with torch.no_grad():
        draft.fc.weight[:, hidden:] = 0

    def keep_zero(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[:, hidden:] = 0
        return gradient

    draft.fc.weight.register_hook(keep_zero)


class MuonWithAdam(Muon):
    """Muon for the matrices of a draft, Adam for its vectors, as one optimizer with one state to resume from."""

    def __init__(self, draft: SparrowDraftModel):
        parameters = list(draft.parameters())
        super().__init__([parameter for parameter in parameters if parameter.ndim == 2], lr=MATRIX_LEARNING_RATE)
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        self.add_param_group({"params": vectors, "lr": VECTOR_LEARNING_RATE, "betas": (0.9, 0.98)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates all parameters from their gradients."""
        matrices, vectors = self.param_groups
        self.param_groups = [matrices]
        super().step()
        self.param_groups = [matrices, vectors]
        for parameter in vectors["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            state["step"] += 1
            (beta1, beta2), step = vectors["betas"], state["step"]
            mean = state["mean"].lerp_(parameter.grad, 1 - beta1) / (1 - beta1**step)
            square = state["square"].lerp_(parameter.grad.square(), 1 - beta2) / (1 - beta2**step)
            parameter.sub_(mean / (square.sqrt() + 1e-8), alpha=vectors["lr"])


def train(
    target: Qwen2_5_VLForConditionalGeneration,
    rows: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    output: Path,
    *,
    steps: int,
    seed: int = 0,
    text_only: bool = False,
    draft_overrides: dict[str, Any] | None = None,
    **recipe: Any,
) -> SparrowTrainer:
    """Trains one draft from recorded rows, from the last checkpoint in `output/training` if there is one.

    Args:
        target: The target the rows were recorded from.
        rows, validation: Recorded rows; the second ones are only measured on.
        output: Folder of the draft.
        steps: Optimizer steps.
        seed: Draws initial weights, order, visual rows and noise.
        text_only: Train the baseline without hidden states instead.
        draft_overrides: Fields of the draft's configuration, over `DRAFT`.
        recipe: Fields of [`SparrowTrainingArguments`], over `RECIPE`.

    Returns:
        The trainer: its draft, what it was trained with, and in its state the curve (loss and agreement per pass,
        validation figures).
    """
    fields = DRAFT | (draft_overrides or {})
    if text_only:
        # Without states to feed back, all passes are the first one.
        fields |= {"num_glimpse_tokens": 0, "num_mtp_steps": 1}
        recipe |= {"num_visual_rows_min": 0, "num_visual_rows_max": 0, "feature_smooth_l1_weight": 0.0}
    torch.manual_seed(seed)
    draft = SparrowDraftModel.from_target(target, **fields)
    if text_only:
        blindfold(draft)
    arguments = SparrowTrainingArguments(
        output_dir=str(output / "training"), max_steps=steps, seed=seed, **(RECIPE | recipe)
    )
    trainer = SparrowTrainer(
        draft,
        target,
        arguments,
        train_dataset=rows,
        eval_dataset=validation,
        optimizers=(MuonWithAdam(draft), None),
    )
    folder = Path(arguments.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.evaluate()
    draft.save_pretrained(output)
    return trainer


def main(arguments: list[str] | None = None) -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description="Train the testbed's draft (resumes by itself).")
    parser.add_argument("--target", type=Path, required=True, help="folder of the trained target")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained draft")
    parser.add_argument("--recording", type=Path, help="folder of the recorded states (default: OUTPUT/recording)")
    parser.add_argument("--clips", type=int, default=1024, help="training clips")
    parser.add_argument("--validation-clips", type=int, default=64, help="clips the curve is measured on")
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="draws initial weights, order, visual rows")
    parser.add_argument("--text-only", action="store_true", help="train the baseline that reads no target states")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more rarely help on a small machine")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    start = time.monotonic()
    target, processor = load_target(options.target)
    recorder = SparrowDraftModel.from_target(target)
    recording = options.recording or options.output / "recording"
    rows = record(target, processor, recorder, TRAIN_SEEDS[-options.clips :], recording / "train")
    validation = record(
        target, processor, recorder, VALIDATION_SEEDS[-options.validation_clips :], recording / "validation"
    )
    recorded = time.monotonic()
    trainer = train(
        target, rows, validation, options.output, steps=options.steps, seed=options.seed, text_only=options.text_only
    )
    curve, used = trainer.state.log_history, trainer.args
    provenance = {
        "command": "python -m sparrow_hf.testbed.retrain --target DIR --output DIR "
        f"--clips {options.clips} --validation-clips {options.validation_clips} --steps {options.steps} "
        f"--seed {options.seed}" + (" --text-only" if options.text_only else ""),
        "commit": commit(),
        "target_sha256": digest(target),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "clips": [min(TRAIN_SEEDS[-options.clips :]), options.clips],
        "answer_tokens": sum(len(row["input_ids"]) - row["answer_start"] for row in rows),
        "draft": {name: getattr(trainer.draft.config, name) for name in DRAFT},
        "recipe": RECIPE
        | used.loss_weights
        | {
            "visual_rows": [used.num_visual_rows_min, used.num_visual_rows_max],
            "mtp_attention": used.mtp_attention,
            "hidden_state_noise": used.hidden_state_noise,
            "matrix_learning_rate": MATRIX_LEARNING_RATE,
            "vector_learning_rate": VECTOR_LEARNING_RATE,
        },
        "seconds_of_recording": round(recorded - start),
        "seconds_of_training": round(time.monotonic() - recorded),
        "validation": {name: round(value, 4) for name, value in curve[-1].items()},
        "curve": [entry for entry in curve if "eval_tau" in entry or entry["step"] % 300 == 0],
    }
    (options.output / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"validation, chain of {trainer.draft.config.num_draft_levels}: tau {curve[-1]['eval_tau']:.2f}")


if __name__ == "__main__":
    main()

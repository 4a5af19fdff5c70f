"""Trains the testbed's draft: the target captions unseen clips, its states are recorded, the draft learns from them.

    python -m sparrow_research.retrain --target assets/target --output assets/draft

The target may be of either family of the testbed: its folder tells which.
Clips are rendered, sent through the codec and captioned greedily; the target is frozen, so its states are recorded
once and any number of drafts can be trained from one recording (`--recording`). Run the command again to go on where
it was stopped. `--text-only` trains the baseline that reads no target states, with the same clips, steps and batches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

from sparrow_hf.artifacts import tensor_digest, write_json
from sparrow_hf.data.messages import messages_for
from sparrow_hf.data.prepare import prepare_inputs
from sparrow_hf.evaluation.provenance import commit
from sparrow_hf.modeling_sparrow import SparrowDraftModel
from sparrow_hf.target_config import feature_layers_of
from sparrow_hf.testbed.families import family_of
from sparrow_hf.testbed.nano import load_target
from sparrow_hf.testbed.world import (
    FRAMES_PER_SECOND,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    render,
    write_script,
)
from sparrow_hf.training import SparrowTrainer, append_answer
from sparrow_hf.training.batched_answers import generate_answers
from sparrow_hf.training.checkpoints import last_checkpoint
from sparrow_hf.training.recording import RecordedDataset, Recorder

from .curriculum import CurriculumArguments
from .muon import Muon
from .vision_pretraining import through_codec

CLIPS, VALIDATION_CLIPS, STEPS = 1024, 64, 600
SHORT_CLIPS, LONG_CLIPS = (32, 400), (400, 2048)
"""Visual tokens of a clip, from one of the two."""
LONG_SHARE = 0.08
NUM_LENGTHS = 12
"""Lengths in each of the two, evenly spread on a logarithmic scale: few, because some processors take only clips of
one length together."""
CLIPS_PER_BATCH = 128
"""Clips captioned at a time, before they are read and stored."""
CAPTION_BATCH_ROWS = 16_384
"""Prompt rows, padding included, of clips captioned together: a decoding step costs the same for few or many."""
MAX_CAPTION_TOKENS = 320

DRAFT: dict[str, Any] = {
    "feature_layers": [-1],
    "num_mtp_steps": 5,
    "num_draft_levels": 5,
    "num_glimpse_tokens": 64,
}
"""What the testbed's draft is, where it differs from the package's: one pass per drafted token, and it reads the last
layer alone, as the package's did when it was trained."""

TEXT_ONLY_DRAFT: dict[str, Any] = {"num_glimpse_tokens": 0, "num_mtp_steps": 1}
TEXT_ONLY_RECIPE: dict[str, Any] = {
    "num_visual_rows_min": 0,
    "num_visual_rows_max": 0,
    "feature_smooth_l1_weight": 0.0,
}
"""The baseline without states; with none to feed back, all its passes would be the first one."""

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
    return round(low * (high / low) ** (rng.integers(NUM_LENGTHS) / (NUM_LENGTHS - 1)))


def clip_prompt(processor: Any, seed: int, visual_tokens: int, tokens_per_step: int) -> dict[str, Any]:
    """The processed prompt of one clip, its frames as a reader of its mp4 file gets them."""
    script = write_script(seed, visual_tokens, tokens_per_step)
    frames = through_codec(render(script.story, script.timeline, np.random.default_rng([seed, 1])))
    messages = messages_for("", script.prompt)
    messages[0]["content"][0] |= {"video": frames, "fps": FRAMES_PER_SECOND}
    return dict(prepare_inputs(processor, messages))


def caption_clips(
    target: Any,
    processor: Any,
    seeds: Sequence[int],
    visual_tokens: int | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index among `seeds` and sample of each clip, captioned greedily by the target in batches."""
    tokens_per_step = family_of(target).tokens_per_step
    prompts = [
        (index, clip_prompt(processor, seed, visual_tokens or clip_length(seed), tokens_per_step))
        for index, seed in enumerate(seeds)
    ]
    # Clips of about one length share a batch.
    prompts.sort(key=lambda indexed: indexed[1]["input_ids"].shape[1])
    while prompts:
        size = max(
            size
            for size in range(1, len(prompts) + 1)
            if size == 1 or _fit_together([each for _, each in prompts[:size]])
        )
        batch, prompts = prompts[:size], prompts[size:]
        answers = generate_answers(
            target,
            [prompt for _, prompt in batch],
            processor.tokenizer.pad_token_id,
            do_sample=False,
            max_new_tokens=MAX_CAPTION_TOKENS,
        )
        for (index, prompt), answer in zip(batch, answers, strict=True):
            yield index, append_answer(prompt, answer)


def _fit_together(prompts: list[dict[str, Any]]) -> bool:
    """Whether prompts, shortest first, can be captioned together."""
    # LLaVA-OneVision stacks videos, which must have one length then; Qwen2.5-VL's are patches one after another.
    shapes = {prompt["pixel_values_videos"].shape[1:] for prompt in prompts}
    # All are padded to the longest.
    return len(shapes) == 1 and len(prompts) * prompts[-1]["input_ids"].shape[1] <= CAPTION_BATCH_ROWS


def record(
    target: Any,
    processor: Any,
    seeds: Sequence[int],
    folder: Path,
    visual_tokens: int | None = None,
    projected: Path | None = None,
) -> None:
    """Records all clips in `folder`: what is not there yet is captioned, read and stored.

    Processes of one launch share the work. Clips have `visual_tokens`, or lengths drawn from their seeds. A second
    recording of the same captions, `projected`, has the projected visual features in place of the middle layer's.
    """
    processes = PartialState(cpu=True)
    source = {"first_clip": seeds[0], "clips": len(seeds), "visual_tokens": visual_tokens}
    features = recorded_features(target)
    recorders = [Recorder(SparrowDraftModel.from_target(target, feature_layers=features), folder, source=source)]
    if projected is not None:
        draft = SparrowDraftModel.from_target(target, feature_layers=features, visual_bridge_layer=0)
        recorders.append(Recorder(draft, projected, source=source))
    own = range(0, len(seeds), CLIPS_PER_BATCH)[processes.process_index :: processes.num_processes]
    for start in tqdm(own, desc=f"recording {folder.name}", disable=not processes.is_main_process):
        chunk = seeds[start : start + CLIPS_PER_BATCH]
        # Whole chunks: how captions are padded must not depend on where a run was stopped.
        paths = [recorder.path(start + offset) for recorder in recorders for offset in range(len(chunk))]
        if not all(path.exists() for path in paths):
            for offset, sample in caption_clips(target, processor, chunk, visual_tokens):
                for recorder in recorders:
                    recorder.write(start + offset, sample)
    processes.wait_for_everyone()


def recorded_features(target: Any) -> list[int]:
    """Text layers that are recorded: those of a new draft of the package, and one and two thirds of the depth."""
    depth = target.config.text_config.num_hidden_layers
    *earlier, last = feature_layers_of(depth)
    return [*sorted({*earlier, max(1, depth // 3), max(1, 2 * depth // 3)}), last]


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
        parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
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


def build_draft(
    target: Any,
    seed: int = 0,
    text_only: bool = False,
    draft_class: type[SparrowDraftModel] = SparrowDraftModel,
    **overrides: Any,
) -> SparrowDraftModel:
    """An untrained draft of the testbed; `overrides` are fields of its configuration, over `DRAFT`."""
    torch.manual_seed(seed)
    draft = draft_class.from_target(target, **(DRAFT | (TEXT_ONLY_DRAFT if text_only else {}) | overrides))
    if text_only:
        blindfold(draft)
    return draft


def build_trainer(
    draft: SparrowDraftModel, rows: RecordedDataset, validation: RecordedDataset | None, output: Path, **recipe: Any
) -> SparrowTrainer:
    """A trainer of the testbed.

    Args:
        draft: A draft bound to the target the rows were recorded from.
        rows, validation: Recorded rows; the second ones are only measured on.
        output: Its `training` folder takes the checkpoints; the finished draft is left to the caller to save.
        recipe: Fields of [`CurriculumArguments`], over `RECIPE`.
    """
    measured = {} if validation is not None else {"eval_strategy": "no"}
    arguments = CurriculumArguments(output_dir=str(output / "training"), **(RECIPE | measured | recipe))
    return SparrowTrainer(
        draft,
        draft.target.model,
        arguments,
        train_dataset=rows,
        eval_dataset=validation,
        optimizers=(MuonWithAdam(draft), None),
    )


def train(trainer: SparrowTrainer) -> None:
    """Trains to the end, from the last checkpoint if there is one, and measures once more if there is data for it.

    The state of the trainer then holds the curve: loss and agreement per pass, validation figures.
    """
    trainer.train(resume_from_checkpoint=last_checkpoint(str(trainer.args.output_dir)))
    if trainer.eval_dataset is not None:
        trainer.evaluate()


def main(arguments: list[str] | None = None) -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description="Train the testbed's draft (resumes by itself).")
    parser.add_argument("--target", type=Path, required=True, help="folder of the trained target")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained draft")
    parser.add_argument("--recording", type=Path, help="folder of the recorded states (default: OUTPUT/recording)")
    parser.add_argument("--clips", type=int, default=CLIPS, help="training clips")
    parser.add_argument(
        "--validation-clips", type=int, default=VALIDATION_CLIPS, help="clips the curve is measured on"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="draws initial weights, order, visual rows")
    parser.add_argument("--text-only", action="store_true", help="train the baseline that reads no target states")
    parser.add_argument("--record-only", action="store_true", help="stop before training; processes may share this")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more rarely help on a small machine")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    start = time.monotonic()
    target, processor = load_target(options.target)
    recording = options.recording or options.output / "recording"
    record(target, processor, TRAIN_SEEDS[-options.clips :], recording / "train")
    record(target, processor, VALIDATION_SEEDS[-options.validation_clips :], recording / "validation")
    if options.record_only:
        return
    recorded = time.monotonic()
    draft = build_draft(target, options.seed, options.text_only)
    rows = RecordedDataset(recording / "train", draft)
    trainer = build_trainer(
        draft,
        rows,
        RecordedDataset(recording / "validation", draft),
        options.output,
        max_steps=options.steps,
        seed=options.seed,
        **(TEXT_ONLY_RECIPE if options.text_only else {}),
    )
    train(trainer)
    draft.save_pretrained(options.output)
    curve, used = trainer.state.log_history, trainer.args
    provenance = {
        "command": "python -m sparrow_research.retrain --target DIR --output DIR "
        f"--clips {options.clips} --validation-clips {options.validation_clips} --steps {options.steps} "
        f"--seed {options.seed}" + (" --text-only" if options.text_only else ""),
        "commit": commit(),
        "target_sha256": tensor_digest(target.state_dict()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": options.steps,
        "clips": [min(TRAIN_SEEDS[-options.clips :]), options.clips],
        "answer_tokens": sum(rows.answer_length(index) for index in range(len(rows))),
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
    write_json(options.output / "PROVENANCE.json", provenance, indent=2)
    print(f"validation, chain of {trainer.draft.config.num_draft_levels}: tau {curve[-1]['eval_tau']:.2f}")


if __name__ == "__main__":
    main()

"""A short training that `test_processes.py` starts in one process or in several; writes its losses and weights.

python train_in_processes.py FOLDER BATCH_PER_PROCESS
"""

import json
import os
import sys
from pathlib import Path

import torch
from greedy import greedy
from safetensors.torch import save_file
from transformers import EvalPrediction

from sparrow_hf import SparrowDraftModel
from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments, append_answer
from sparrow_hf.training.acceptance import acceptance_metrics
from sparrow_hf.training.preview import estimate_cost

from families import FAMILY_BY_NAME


def main(folder: Path, batch_per_process: int) -> None:
    torch.set_num_threads(1)
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    samples = []
    for seed in range(8):
        prompt = family.build_inputs(target, num_frames=4 + 2 * (seed % 3), seed=seed)
        output = target.generate(**prompt, **greedy(5 + seed))
        samples.append(append_answer(prompt, output[0, prompt["input_ids"].shape[1] :].tolist()))
    torch.manual_seed(0)
    draft = SparrowDraftModel.from_target(target, num_mtp_steps=3)
    arguments = SparrowTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=3,
        logging_steps=1,
        learning_rate=2e-3,
        per_device_train_batch_size=batch_per_process,
        # The evaluation loss is a mean over batches, so these must not depend on the number of processes.
        per_device_eval_batch_size=1,
        num_visual_rows_max=6,
        hidden_state_noise=0.1,
    )

    def figures(prediction: EvalPrediction) -> dict[str, float]:
        return acceptance_metrics(prediction) | {"rounds": float(prediction.predictions[:, -1].sum())}

    trainer = SparrowTrainer(
        draft, target, arguments, train_dataset=samples, eval_dataset=samples, compute_metrics=figures
    )
    # A dry run before it changes nothing.
    planned = estimate_cost(trainer, target)
    trainer.train()
    measured = trainer.evaluate()
    # Four rows in a step, whatever the number of processes; the last step has three.
    arguments.per_device_eval_batch_size = batch_per_process
    of_seven = trainer.evaluate(samples[:7])
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        evaluated = {name: measured[name] for name in ("eval_loss", "eval_tau", "eval_k")}
        counted = {name: of_seven[name] for name in ("eval_tau", "eval_rounds", "eval_agreement_1")}
        report = {
            "processes": arguments.world_size,
            "losses": losses,
            "evaluated": evaluated,
            "of seven": counted,
            "planned": [planned.optimizer_steps, planned.batch_size],
        }
        (folder / "report.json").write_text(json.dumps(report))
        save_file(draft.state_dict(), folder / "weights.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

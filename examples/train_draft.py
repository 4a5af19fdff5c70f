"""Train a draft: the target answers your prompts, the draft is trained on these answers, and generate() uses it.

python examples/train_draft.py                         # the built-in target and a few clips, on a CPU
python examples/train_draft.py --target Qwen/Qwen2.5-VL-7B-Instruct --prompts prompts.jsonl --steps 20000

Each line of prompts.jsonl is {"messages": [...]} with videos as paths; the first eight are held out. The same
command continues a stopped run. The few steps with the built-in target are an example and give no good draft.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint

from sparrow_hf import SparrowDraftModel, testbed
from sparrow_hf.data import load_rows, prepare_prompt
from sparrow_hf.training import DecodingCallback, SparrowTrainer, SparrowTrainingArguments, plot_curves
from sparrow_hf.training.regenerate import read_answers, regenerate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="your video LLM: folder or Hub id")
    parser.add_argument("--prompts", type=Path, help="JSON lines of prompts for it")
    parser.add_argument("--output", type=Path, default=Path("runs/draft"), help="folder of the draft")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    options = parser.parse_args()

    if options.target:
        target = AutoModelForImageTextToText.from_pretrained(options.target, dtype="auto", device_map="auto")
        processor = AutoProcessor.from_pretrained(options.target)
        prompts = load_rows(options.prompts)
        num_held_out, longest, learning_rate = 8, 1024, 1e-4
        fps, max_frames = 2.0, 128  # of your videos when the draft is used, too
    else:
        target, processor = testbed.load_target()
        clips = options.output / "clips"
        clips.mkdir(parents=True, exist_ok=True)
        made = (testbed.make_clip(clips / f"{seed}.mp4", seed, visual_tokens=24) for seed in testbed.TRAIN_SEEDS[:5])
        prompts = [{"messages": clip.messages} for clip in made]
        num_held_out, longest, learning_rate = 1, 24, 2e-3
        fps, max_frames = None, None

    regenerate(
        target,
        processor,
        prompts,
        options.output / "answers",
        max_new_tokens=longest,
        do_sample=False,
        fps=fps,
        max_frames=max_frames,
    )
    rows = list(read_answers(options.output / "answers"))
    held_out, rows = rows[:num_held_out], rows[num_held_out:]

    # Weights of the target's bf16 would lose most of the steps to rounding.
    draft = SparrowDraftModel.from_target(target).float()
    args = SparrowTrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        eval_strategy="steps",
        eval_steps=max(options.steps // 2, 1),
        save_steps=max(options.steps // 2, 1),
        save_total_limit=2,
        metric_for_best_model="decoded_tau",
        load_best_model_at_end=True,
        logging_steps=max(options.steps // 100, 1),
    )
    trainer = SparrowTrainer(
        draft, target, args, train_dataset=rows, eval_dataset=held_out, processing_class=processor
    )
    trainer.add_callback(DecodingCallback(trainer, held_out, max_new_tokens=longest))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(options.output)))
    draft.save_pretrained(options.output)
    plot_curves(trainer.state.log_history, options.output / "curves.svg")

    inputs = prepare_prompt(processor, held_out[0]).to(target.device)
    output = target.generate(**inputs, assistant_model=draft.eval(), max_new_tokens=longest)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"τ = {draft.last_generation.tau:.2f}; the draft and its curves are in {options.output}")


if __name__ == "__main__":
    main()

"""From options to a trained draft: the work of `sparrow train`, which scripts can call too."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel, ProcessorMixin

from .._transformers import uses_vllm_positions
from ..data.datasets import load_rows
from ..errors import MissingDependencyError, TrainingDataError, TrainingOptionsError
from ..hub import holds_model
from ..modeling_sparrow import SparrowDraftModel
from ..tree_shapes import chain
from .acceptance import acceptance_metrics
from .arguments import DRAFT_PRESETS, SparrowTrainingArguments
from .callbacks import DecodingCallback, figures_of
from .card import acceptance_of, begin_anew, recipe_of
from .checkpoints import check_settings, describe_training, digest_of_rows, last_checkpoint, step_of
from .curves import plot_curves
from .depth import was_chosen, write_depth
from .first_weights import entry_layer, fit_fc, reader_of
from .leakage import refuse_shared_media
from .lora import add_lora, merge_lora
from .options import TrainingOptions
from .recording import PROVENANCE_FILE, RecordedDataset
from .refusals import all_left_out, check_answers
from .trainer import SparrowTrainer
from .vocabulary import REDUCED_SIZE, TargetTokens, default_vocabulary, load_vocabulary

#: Configuration of `accelerate launch` for the GPUs of one machine.
DDP_CONFIG = Path(__file__).parent / "accelerate" / "ddp.yaml"

DRAFT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: `--vocabulary` for a draft that proposes every token of its target.
FULL_VOCABULARY = "full"

#: Number of held-out rows that are decoded at every evaluation; all of them are evaluated teacher-forced.
DECODED_ROWS = 8


@dataclass
class TrainingRun:
    """A training that is ready to start.

    Attributes:
        trainer: The trainer.
        adapters: peft's view of its draft, if adapters are trained.
        checkpoint: The checkpoint to go on from, if any.
        output: Folder of the finished draft.
        decoding: What decodes the held-out rows, if they can be decoded.
        chooses_depth: Choose the depth of the draft's chains at the end (see [`write_depth`]).
        choices: What was chosen where nothing was asked for, one sentence each.
        notes: What there is to say about the finished training, one sentence each.
    """

    trainer: SparrowTrainer
    adapters: Any | None
    checkpoint: str | None
    output: Path
    decoding: DecodingCallback | None = None
    chooses_depth: bool = False
    choices: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> SparrowDraftModel:
        """Trains to the end and leaves the finished draft, its card and its curves in the output folder.

        Held-out rows are read once before the first step. With them, the depth of the draft's chains is chosen last,
        unless it was given.

        Raises:
            TrainingDataError: A row is bad, and bad rows are refused.
        """
        check_held_out(self.trainer)
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        metrics = self._metrics()
        draft = self.trainer.draft if self.adapters is None else merge_lora(self.adapters)
        made = {"recipe": recipe_of(self.trainer, adapters=None if self.adapters is None else "LoRA")}
        draft.provenance = {**draft.provenance, **made, "acceptance": acceptance_of(metrics)}
        if self.trainer.is_world_process_zero():
            draft.save_pretrained(self.output)
            try:
                plot_curves(self.trainer.state.log_history, self.output / "curves.png")
            except MissingDependencyError:
                # The figures are in the log; the plot needs an optional dependency.
                pass
            except TrainingDataError:
                self.notes.append(
                    f"There are no curves: nothing was logged in {self.trainer.state.global_step} steps "
                    f"(--logging-steps {self.trainer.args.logging_steps:g})."
                )
            if self.chooses_depth:
                self.notes.append(write_depth(draft, self.output, self.decoding, metrics))
        return draft

    def _metrics(self) -> dict[str, float]:
        """Figures of the finished draft on the held-out rows: those of its last step, if it was evaluated there."""
        if self.trainer.eval_dataset is None:
            return {}
        state = self.trainer.state
        last = [entry for entry in state.log_history if entry["step"] == state.global_step]
        known = {name: value for entry in last for name, value in entry.items() if name.startswith("eval_")}
        # Neither the best draft nor one that was resumed at its end is what this process evaluated last.
        nothing_trained = self.checkpoint is not None and step_of(self.checkpoint) >= state.global_step
        if not known or nothing_trained or self.trainer.args.load_best_model_at_end:
            return self.trainer.evaluate()
        return known


def check_held_out(trainer: SparrowTrainer) -> None:
    """Reads the held-out rows once, and makes the draft's inputs of them (of conversations, which the target has to
    read, only of the first).

    A checkpoint is evaluated before it is saved: an error there would lose the steps up to it. Each process reads a
    part of the rows.

    Raises:
        TrainingDataError: A row is bad, and bad rows are refused, or the draft's inputs cannot be made of it; or all
            of them are left out.
    """
    rows, args = trainer.eval_dataset, trainer.args
    if rows is None:
        return
    own = range(args.process_index, len(rows), args.world_size)
    good, skipped = 0, []
    for index in tqdm(own, desc="reading held-out rows", unit="row", leave=False, disable=args.disable_tqdm):
        try:
            batch = trainer.data_collator([rows[index]])
            skipped += batch.get("skipped", [])
            # Of conversations, which the target has to read, only the first.
            if batch["samples"] and (not good or isinstance(rows, RecordedDataset)):
                with torch.no_grad():
                    trainer.make_batch(batch["samples"], training=False)
            good += len(batch["samples"])
        except TrainingDataError as error:
            raise TrainingDataError(f"held-out rows: {error}") from error
    if not trainer.accelerator.gather(torch.tensor([good], device=args.device)).sum():
        raise all_left_out("held-out rows", skipped)


def check_best_metric(trainer: SparrowTrainer, decoding: DecodingCallback | None) -> None:
    """Raises unless evaluations have the figure that the best checkpoint is chosen by: the first one would be the end.

    Raises:
        TrainingOptionsError: They have not.
    """
    args, levels = trainer.args, trainer.draft.config.num_draft_levels
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == "no" or trainer.compute_metrics is not acceptance_metrics:
        # The figures of one's own `compute_metrics` are known when they are there.
        return
    known = {"loss", "runtime", "samples_per_second", "steps_per_second"}
    if not args.prediction_loss_only:
        known |= acceptance_metrics(EvalPrediction(np.ones((1, 3 * levels + 1)), None)).keys()
    if decoding is not None:
        known |= figures_of(levels)
    if wanted.removeprefix("eval_") not in known:
        undecoded = "" if decoding is not None else "; a recording holds no videos to decode"
        raise TrainingOptionsError(
            f"--metric-for-best-model {wanted}: evaluations on these held-out rows have no such figure, but "
            f"{', '.join(sorted(known))}{undecoded}"
        )


def check_output(options: TrainingOptions) -> str | None:
    """The checkpoint to resume from with `--resume`; otherwise the output folder must be free.

    `--inspect` and `--dry-run` write no draft, so they work beside the one that is there.

    Raises:
        TrainingOptionsError: The folder holds a training or a model, or there is nothing to resume.
    """
    output = Path(options.output)
    checkpoints = output / "checkpoints"
    last = last_checkpoint(checkpoints)
    if options.resume:
        if last is None:
            raise TrainingOptionsError(f"{checkpoints} holds no checkpoint to resume from: leave out --resume")
        return last
    writes_draft = options.inspect is None and not options.dry_run
    if writes_draft and (last is not None or holds_model(output)):
        raise TrainingOptionsError(
            f"{output} holds {'a training' if last else 'a model'} already: go on with --resume, start from it with "
            "--warm-start and another --output, or choose another folder"
        )
    return None


def build_draft(
    options: TrainingOptions, target: PreTrainedModel, draft_class: type[SparrowDraftModel] = SparrowDraftModel
) -> SparrowDraftModel:
    """The draft to train: fresh, or an existing one; in its training dtype, bound to the target.

    Args:
        draft_class: What a fresh draft is.

    Raises:
        TrainingOptionsError: There is no such dtype, or an existing draft contradicts the preset.
        DraftLoadError: There is no draft to start from, or its files are damaged.
        BindingError: The draft to start from fits another target.
        VocabularyError: The draft's vocabulary cannot be read, or was made for another target.
    """
    dtype = DRAFT_DTYPES.get(options.draft_dtype)
    if dtype is None:
        raise TrainingOptionsError(
            f"--draft-dtype must be float32, bfloat16 or float16, found {options.draft_dtype!r}"
        )
    if options.warm_start is not None:
        draft = draft_class.from_pretrained(options.warm_start)
        check_preset(options, draft)
        draft.bind(target)
        draft.to(draft.target.device)
    else:
        draft = draft_class.from_target(target, copy_last_layer=options.copy_last_layer, **options.draft_fields)
        if options.vocabulary not in (None, FULL_VOCABULARY):
            draft.set_vocabulary(load_vocabulary(options.vocabulary, draft.config.vocab_size))
    return draft.to(dtype)


def check_preset(options: TrainingOptions, draft: SparrowDraftModel) -> None:
    """Raises unless an existing draft has what the preset sets in a new one: the other half of its recipe.

    Raises:
        TrainingOptionsError: It has not, and so would be trained for another way of decoding than its own.
    """
    wanted = DRAFT_PRESETS[options.preset]
    found = {name: getattr(draft.config, name) for name in wanted}
    if found != wanted:
        told = [", ".join(f"{name} {value}" for name, value in fields.items()) for fields in (wanted, found)]
        raise TrainingOptionsError(
            f"--preset {options.preset} is a recipe for drafts of {told[0]}, but {options.warm_start} has {told[1]}, "
            "and --warm-start keeps its draft's configuration: leave out --preset and give the options that you want, "
            "or train a new draft"
        )


def rows_of(source: str, draft: SparrowDraftModel, streaming: bool = False) -> Any:
    """Rows of a recording, or of anything [`load_rows`] reads.

    Raises:
        TrainingOptionsError: A recording is to be streamed.
        TrainingDataError: There are no such rows.
    """
    if (Path(source) / PROVENANCE_FILE).is_file():
        if streaming:
            raise TrainingOptionsError(
                f"--streaming: {source} is a recording, whose rows are read one by one anyway; leave this option out"
            )
        return RecordedDataset(source, draft)
    return load_rows(source, streaming=True) if streaming else load_rows(source)


def start_as_last_layers(options: TrainingOptions, trainer: SparrowTrainer) -> str:
    """Fits FC of a draft whose layers are copies of the target's last ones, to rows drawn from those to be trained on.

    Returns:
        What was done, as a sentence.

    Raises:
        TrainingDataError: A row is bad, and bad rows are refused.
    """
    draft, recorded = trainer.draft, trainer.train_dataset
    entry = entry_layer(draft.config)
    if isinstance(recorded, RecordedDataset) and entry not in recorded.text_layers:
        return (
            f"FC starts at random, because {options.train} lacks layer {entry}: record it too "
            f"(`sparrow record --feature-layers {entry}`, beside the others) to start from a fit."
        )
    reader = reader_of(draft)
    rows = rows_of(options.train, reader, options.streaming)
    if not options.streaming:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trainer.args.seed))
        rows = map(rows.__getitem__, order.tolist())
    explained, count = fit_fc(draft, reader, rows, trainer.data_collator, show_progress=not trainer.args.disable_tqdm)
    return (
        f"FC starts as the best linear estimate of what enters layer {entry + 1} of the target: "
        f"fitted to {count:,} tokens, it explains {explained:.0%} of it."
    )


def prepare_training(
    options: TrainingOptions,
    arguments: SparrowTrainingArguments,
    target: PreTrainedModel,
    processor: ProcessorMixin,
    draft: SparrowDraftModel | None = None,
) -> TrainingRun:
    """Builds the draft, reads the rows and sets up the trainer.

    Args:
        options, arguments: See [`parse_options`].
        target: The target, on its device or devices.
        processor: Its processor.
        draft: The draft to train; by default [`build_draft`]'s.

    Raises:
        TrainingOptionsError: The options contradict each other or the files in the output folder, or differ from those
            of the training that is resumed.
        TrainingDataError: There are no rows, or training and held-out rows share a video, image or prompt; or they are
            answers that were written at other positions.
        BindingError: The draft to start from fits another target.
    """
    checkpoint = check_output(options)
    if draft is None:
        torch.manual_seed(arguments.seed)
        draft = build_draft(options, target)
    adapters = None if options.lora is None else add_lora(draft, options.lora)
    train = rows_of(options.train, draft, options.streaming)
    check_answers(options.train, draft.target)
    held_out = None
    if options.held_out is not None:
        held_out = rows_of(options.held_out, draft)
        check_answers(options.held_out, draft.target)
        with PartialState().main_process_first():
            refuse_shared_media(train, held_out)
    # An existing draft keeps its configuration, but not a depth that was chosen by what it then accepted.
    chosen_before = draft.config.beam_width == 1 and was_chosen(draft.provenance)
    keeps_depth = options.num_draft_levels is not None or (options.warm_start is not None and not chosen_before)
    chooses_depth = held_out is not None and not keeps_depth
    if options.warm_start is not None:
        if chooses_depth:
            draft.config.set_tree_shape(chain(type(draft.config).num_draft_levels))
        begin_anew(draft, options.warm_start)
    choices = []
    if options.vocabulary is None and options.warm_start is None and draft.config.vocab_size >= REDUCED_SIZE:
        # Neither a recording nor a stream can be counted before it is read.
        countable = [
            None if options.streaming or isinstance(rows, RecordedDataset) else rows for rows in (train, held_out)
        ]
        tokens = TargetTokens.from_configs(draft.target.model.config, draft.target.model.generation_config)
        chosen, sentence = default_vocabulary(tokens, *countable)
        choices.append(sentence)
        if chosen is not None:
            draft.set_vocabulary(chosen)
    trainer = SparrowTrainer(
        draft,
        target,
        arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
    )
    if options.copy_last_layer and checkpoint is None:
        choices.append(start_as_last_layers(options, trainer))
    decoding = None
    if held_out is not None and not isinstance(held_out, RecordedDataset):
        decoded = [held_out[index] for index in range(min(DECODED_ROWS, len(held_out)))]
        decoding = DecodingCallback(trainer, decoded)
        trainer.add_callback(decoding)
    check_best_metric(trainer, decoding)
    sources = {"train": digest_of_rows(options.train), "processor": options.processor}
    settings = describe_training(trainer, lora=options.lora, **sources)
    if checkpoint is not None:
        check_settings(checkpoint, settings)
    trainer.seal.settings = settings
    draft.provenance = {**draft.provenance, "vllm_positions": uses_vllm_positions(target)}
    return TrainingRun(trainer, adapters, checkpoint, Path(options.output), decoding, chooses_depth, choices)

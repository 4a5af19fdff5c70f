"""`SparrowTrainer`: trains a draft with its frozen target."""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from .._transformers import on_device, use_one_gpu
from ..data.prepare import kind_of, to_target
from ..draft_inputs import draft_positions, visual_mask
from ..errors import TrainingDataError, TrainingOptionsError
from ..modeling_sparrow import SparrowDraftModel
from .acceptance import acceptance_metrics, count_acceptance, summarize
from .arguments import SparrowTrainingArguments
from .card import begin_anew, is_of_other_weights
from .checkpoints import (
    RenewState,
    SealCheckpoints,
    check_checkpoint,
    check_settings,
    describe_training,
    last_checkpoint,
)
from .chunked_loss import chunked_loss
from .data import SparrowDataCollator, TrainingStates, check_sample, errors_of_workers, read_with_target
from .passes import DraftBatch, exact_passes, make_batch, reinput_passes
from .refusals import RefuseNothing, all_left_out, warn_of_16_bits

logger = logging.get_logger(__name__)


class SparrowTrainer(Trainer):
    """Trains a [`SparrowDraftModel`] on the states of its frozen target.

    Rows of the datasets are conversations, processed conversations or recorded states (see `data.py`). Conversations
    are processed by the target during training, without gradient; recorded states give bit-identical losses.

    All randomness of a step (which visual positions, the noise) is a function of `args.seed`, the step and the sample,
    so a resumed run repeats what the uninterrupted one would have drawn.

    Args:
        model: The draft. Only its own tensors are optimised and saved.
        target: The target it drafts for; put in evaluation mode and frozen.
        args: [`SparrowTrainingArguments`].
        data_collator: By default a [`SparrowDataCollator`] with `processing_class` and the `args` it shares a name
            with.
        compute_metrics: By default teacher-forced acceptance, see [`acceptance_metrics`].
        kwargs: Everything else [`~transformers.Trainer`] takes, `model_init` excepted.

    Raises:
        BindingError: The draft does not fit the target.
        TrainingOptionsError: `model_init` is given.
    """

    args: SparrowTrainingArguments
    # The loss below is divided by the number of losses of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: SparrowDraftModel,
        target: PreTrainedModel,
        args: SparrowTrainingArguments,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | Any | None = None,
        eval_dataset: Dataset | Any | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = acceptance_metrics,
        **kwargs: Any,
    ):
        if kwargs.get("model_init") is not None:
            raise TrainingOptionsError(
                "model_init is not supported: to compare settings, make a draft and a SparrowTrainer for each of them"
            )
        model.bind(target)
        if args.n_gpu > 1:
            # One process that sees several: the base class would wrap the draft in `nn.DataParallel`, whose copies are
            # bound to no target and cannot share the keys of the passes.
            use_one_gpu(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or SparrowDataCollator(
                processing_class,
                model.config.visual_token_ids,
                on_bad_row=args.on_bad_row,
                fps=args.fps,
                max_frames=args.max_frames,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        self.draft = model
        self.seal = SealCheckpoints()
        self.add_callback(self.seal)
        self.add_callback(RenewState())
        self.add_callback(RefuseNothing(self))
        target.eval().requires_grad_(False)
        if getattr(target, "hf_device_map", None) is None:
            target.to(device=args.device)
        self._pass_counts: dict[int, Tensor] = {}
        #: Rows of the last evaluation that were not left out, of those that this process has read.
        self._num_evaluated = 0
        #: Whether a row was trained on, by any of the processes.
        self.has_trained = False
        #: Index and reason of the rows left out so far (`args.on_bad_row`).
        self.skipped_rows: set[tuple[int | None, str]] = set()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; a checkpoint is resumed only if every part of it is there, as it was written, and with
        the settings that decided its weights. Rows are not compared.

        A draft that was trained before is told from then on by this training; what was told of it is kept in its
        provenance as `warm_start`.

        Args:
            resume_from_checkpoint: Its folder, or `True` for the last one in `args.output_dir`.

        Raises:
            TrainingOptionsError: A part of the checkpoint is missing, damaged or from elsewhere; or its arguments, its
                draft or its target were others.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            # A process that was killed while saving may have left a newer one, half written.
            checkpoint = last_checkpoint(self.args.output_dir) or True
        folder = checkpoint if isinstance(checkpoint, (str, os.PathLike)) else None
        if folder is not None:
            check_checkpoint(folder, self._parts())
        if not self.seal.settings:
            # `prepare_training`, which knows more of them, has not compared them.
            self.seal.settings = describe_training(self)
            if folder is not None:
                check_settings(folder, self.seal.settings)
        warn_of_16_bits(self.draft)
        if is_of_other_weights(self.draft):
            begin_anew(self.draft, self.draft.name_or_path)
        with errors_of_workers():
            return super().train(checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; a bad row is told in one sentence, whichever process has read it.

        Raises:
            TrainingDataError: All rows are left out. An evaluation within a training has no figures instead: an error
                would lose the steps since the last checkpoint.
        """
        self._num_evaluated = 0
        with errors_of_workers():
            output = super().evaluation_loop(*args, **kwargs)
        count = torch.tensor([self._num_evaluated], device=self.args.device)
        if not self.is_in_train and not self.accelerator.gather(count).sum():
            raise all_left_out("rows to evaluate", self.skipped_rows)
        return output

    def _parts(self) -> tuple[str, ...]:
        """Files of a checkpoint that a resumed training reads, beside the weights and the trainer's state."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # Their files go by other names.
            return ()
        own = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
        return ("optimizer.pt", "scheduler.pt", own)

    def add_callback(self, callback: Any) -> None:
        """As in the base class; what adds figures to evaluations (`adds_metrics`) comes before what may read them."""
        super().add_callback(callback)
        if getattr(callback, "adds_metrics", False):
            callbacks = self.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop())

    # -- inputs of a step ---------------------------------------------------------------------------------------------

    def make_batch(self, samples: list[Mapping[str, Any]], training: bool) -> DraftBatch:
        """Reads the samples with the target where that was not done before, and pads them into the draft's batch.

        Args:
            samples: Processed conversations or rows of [`TrainingStates`].
            training: Random visual positions and noise; otherwise the positions that decoding keeps, and no noise.
        """
        config = self.draft.config
        visual_ids = config.visual_token_ids or []
        read, noise = [], []
        for sample in samples:
            input_ids = sample["input_ids"] if kind_of(sample) == "states" else sample["input_ids"][0]
            check_sample(input_ids, int(sample["answer_start"]), visual_ids)
            generator = self._generator(input_ids) if training else None
            budget = config.num_glimpse_tokens
            if generator is not None:
                progress = self.state.global_step / max(self.state.max_steps, 1)
                num_visual = int(visual_mask(input_ids, visual_ids).sum())
                budget = self.args.draw_visual_rows(num_visual, progress, generator)
            positions = draft_positions(input_ids, visual_ids, budget, config.glimpse_spacing, generator=generator)
            if kind_of(sample) == "states":
                states = TrainingStates.from_row(sample)
            else:
                states = read_with_target(self.draft, to_target(sample, self.draft.target.model), positions)
            if generator is not None and self.args.hidden_state_noise:
                shape = states.text_states.shape
                scale = self.args.hidden_state_noise * 512 / len(positions.indices)
                drawn = (torch.rand(shape, generator=generator) - 0.5) * scale
                noise.append(drawn.to(states.text_states))
            read.append((states, positions))
        batch = make_batch(read, config.position_mode, noise or None)
        for name in ("text_states", "visual_states", "target_states"):
            setattr(batch, name, getattr(batch, name).to(self.draft.dtype))
        return batch

    def _generator(self, input_ids: Tensor) -> torch.Generator:
        """The generator of one sample in this step, the same on every process and after every resume."""
        fingerprint = zlib.crc32(input_ids.cpu().numpy().tobytes())
        key = f"{self.args.seed}-{self.state.global_step}-{fingerprint}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
        return torch.Generator().manual_seed(seed)

    # -- the loss -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over the passes of training of the weighted losses, summed over positions, over the number of losses of
        the first pass. In evaluation too, where the draft runs further passes if its chains are deeper.

        Args:
            inputs: `{"samples": [...]}` from the collator.
            num_items_in_batch: Losses of the first pass in all batches this optimizer step accumulates; by default in
                this one.
        """
        training = model.training
        self.report_skipped(inputs.get("skipped", []))
        if not inputs["samples"]:
            return self._no_loss(model, return_outputs)
        batch = self.make_batch(inputs["samples"], training=training)
        # Evaluation measures what decoding would accept, whatever the training recipe was.
        exact = self.args.mtp_attention == "exact" or not training
        trained, levels = self.draft.config.num_mtp_steps, self.draft.config.num_draft_levels
        num_passes = trained if training else max(trained, levels)
        # The forward goes through the model as it was wrapped: DDP averages no gradient of a forward it has not seen.
        passes = (exact_passes if exact else reinput_passes)(self.draft, batch, num_passes, forward=model)

        has_loss = batch.has_loss(0)
        target_states = batch.target_states[has_loss]
        # (B, J) → index into the (n, H) states of the target
        target_index = has_loss.flatten().cumsum(0).reshape(has_loss.shape) - 1

        valid = [batch.has_loss(step) for step in range(len(passes))]
        losses, agrees = chunked_loss(
            self.draft,
            self.args.loss_weights,
            torch.cat([hidden[kept] for hidden, kept in zip(passes, valid, strict=True)]),
            target_states,
            torch.cat([target_index[:, step:][kept] for step, kept in enumerate(valid)]),
        )
        counts = [int(kept.sum()) for kept in valid]
        total = torch.zeros((), device=target_states.device)
        matches = []
        for step, (of_pass, agreed, kept) in enumerate(
            zip(losses.split(counts), agrees.split(counts), valid, strict=True)
        ):
            if step < trained:
                total = total + self.args.mtp_loss_decay**step * of_pass.sum()
            match = torch.zeros_like(kept)
            match[kept] = agreed
            matches.append(match)
            if training:
                figures = torch.stack((of_pass.detach().sum(), match.sum(), kept.sum()))
                self._pass_counts[step] = self._pass_counts.get(step, 0) + figures
        num_items = int(has_loss.sum()) if num_items_in_batch is None else num_items_in_batch
        loss = total / num_items
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, but every process has divided by the losses of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, count_acceptance(batch, matches, levels)) if return_outputs else loss

    def report_skipped(self, skipped: list[tuple[int | None, str]]) -> None:
        """Notes rows that were left out, as (index, reason), and warns of each once."""
        for row in skipped:
            if row not in self.skipped_rows:
                self.skipped_rows.add(row)
                logger.warning("left out %s (%d rows so far)", row[1], len(self.skipped_rows))

    def _no_loss(self, model: nn.Module, return_outputs: bool) -> Any:
        """The loss of a batch of skipped rows only: zero, with zero gradients that other processes wait for."""
        row = torch.zeros((1, 1, self.draft.config.hidden_size), dtype=self.draft.dtype, device=self.args.device)
        position = torch.zeros((1, 1), dtype=torch.long, device=self.args.device)
        everything = [model(row, position).last_hidden_state, *self.draft.parameters()]
        # Of the types that a batch with samples gives: processes gather both.
        loss = sum(part.sum() for part in everything).float() * 0.0
        width = 3 * self.draft.config.num_draft_levels + 1
        counts = torch.zeros((1, width), dtype=torch.long, device=self.args.device)
        return (loss, counts) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in the base class, with a batch at least.

        Raises:
            TrainingDataError: There is none.
        """
        loader = super().get_train_dataloader()
        # A stream has no length.
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        if rows is not None and not len(loader):
            raise TrainingDataError(
                f"{rows} training rows fill no batch of {self.args.train_batch_size} on {self.args.world_size} "
                "processes, and dataloader_drop_last leaves out what is not full: give more rows, or not this option"
            )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As in the base class, with the number of losses of the accumulated batches as `num_items_in_batch`."""
        if 0 < self.state.max_steps <= self.state.global_step:
            # A training that is resumed at its last step: the base class would train one more.
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # One loss per answer token but the first.
        losses = sum(
            sample["input_ids"].shape[-1] - int(sample["answer_start"]) - 1
            for batch in batches
            for sample in batch["samples"]
        )
        count = torch.tensor(losses, device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        self.has_trained = self.has_trained or bool(count)
        return batches, count.clamp(min=1)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss and acceptance counts of one batch, the latter in the place of logits. Each row counts once."""
        inputs = on_device(self, self._without_repeated(inputs))
        self._num_evaluated += len(inputs["samples"])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, counts = self.compute_loss(model, inputs, return_outputs=True)
        if not inputs["samples"]:
            # Processes gather one loss each; the base class leaves one that is no number out of the mean.
            loss = torch.full_like(loss, torch.nan)
        if prediction_loss_only:
            return loss, None, None
        # The evaluation loop calls compute_metrics only if there are labels.
        return loss, counts, torch.zeros_like(counts)

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch without the rows with which accelerate fills up the last batches of several processes.

        rows of the last batches     process 0 │ process 1 │ …      each has `size` of them
        of the dataset               0 … remainder−1                the others are its first rows again
        """
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        size = state.active_dataloader.total_batch_size // self.args.world_size
        own = state.remainder - self.args.process_index * size
        samples = inputs["samples"]
        places = inputs.get("places", range(len(samples)))
        return inputs | {"samples": [sample for sample, place in zip(samples, places, strict=True) if place < own]}

    # -- what it reports ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds, per pass since the last report, the mean loss (`loss_s`) and the agreement with the target."""
        if "loss" in logs and self._pass_counts:
            losses, agreed, rows = torch.stack(list(self._pass_counts.values()), dim=1).tolist()
            for step, (loss, count) in enumerate(zip(losses, rows, strict=True), start=1):
                logs[f"loss_{step}"] = loss / max(count, 1)
            logs |= summarize(agreed, rows)
            self._pass_counts = {}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the draft's own card (`hub.py`), saved with its weights; the base class would overwrite it."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the cost of a step is the target's, not the draft's."""
        return 0

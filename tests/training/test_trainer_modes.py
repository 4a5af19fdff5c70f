"""Options of `Trainer` that change how a step is computed, not what: the losses are those of the plain step."""

import copy
import warnings

import pytest
import torch

from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments


def losses(target, make_draft, samples, folder, **options) -> list[float]:
    draft = make_draft()
    runs = []
    for layer in draft.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    arguments = SparrowTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=3,
        logging_steps=1,
        learning_rate=2e-3,
        **options,
    )
    trainer = SparrowTrainer(draft, target, arguments, train_dataset=samples)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    assert (folder / "saved" / "model.safetensors").exists()
    return [len(runs), *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)]


@pytest.mark.parametrize("attention", ["exact", "reinput"])
def test_gradient_checkpointing(target, make_draft, samples, tmp_path, attention) -> None:
    plain = losses(target, make_draft, samples, tmp_path, mtp_attention=attention)
    spared = losses(target, make_draft, samples, tmp_path, mtp_attention=attention, gradient_checkpointing=True)
    assert spared[1:] == plain[1:]
    assert spared[0] == 2 * plain[0], "the layers must run a second time in the backward pass"


@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_reentrant_checkpointing_is_refused(tmp_path, name) -> None:
    # It would drop the gradients between the passes without a word.
    with pytest.raises(ValueError, match="use_reentrant must stay False"):
        SparrowTrainingArguments(str(tmp_path), **{name: {"use_reentrant": True}})


@pytest.mark.full
@pytest.mark.parametrize("attention", ["exact", "reinput"])
def test_a_compiled_training(target, make_draft, samples, tmp_path, attention) -> None:
    torch._dynamo.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain = losses(target, make_draft, samples, tmp_path, mtp_attention=attention)
    assert losses(target, make_draft, samples, tmp_path, mtp_attention=attention, **compiled)[1:] == plain[1:]


def test_one_process_trains_on_one_gpu(target, make_draft, tmp_path) -> None:
    arguments = SparrowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert arguments.device.type == "cpu"
    # As if it saw two.
    arguments._n_gpu = 2
    draft = make_draft()
    trainer = SparrowTrainer(draft, target, arguments)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == arguments.per_device_train_batch_size
    assert trainer._wrap_model(draft) is draft


@pytest.mark.parametrize("attention", ["exact", "reinput"])
def test_a_16_bit_draft_trains_in_mixed_precision_too_and_is_warned_of(
    target, make_draft, samples, tmp_path, attention
) -> None:
    low = copy.deepcopy(target).bfloat16()

    def train(draft, **options) -> list[float]:
        arguments = SparrowTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=2,
            logging_steps=1, learning_rate=1e-3, mtp_attention=attention, **options,
        )  # fmt: skip
        trainer = SparrowTrainer(draft, low, arguments, train_dataset=samples)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with pytest.warns(UserWarning, match=r"trained in torch\.bfloat16, .* give SparrowTrainer draft\.float\(\)"):
        plain = train(make_draft().bfloat16())
    with pytest.warns(UserWarning, match="draft.float"):
        mixed = train(make_draft().bfloat16(), bf16=True)
    # The gradients are rounded in other places.
    assert mixed[0] == plain[0] and mixed[1] == pytest.approx(plain[1], rel=1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the draft is trained in")
        train(make_draft().float(), bf16=True)


def test_a_search_over_drafts_is_refused(target, make_draft, tmp_path) -> None:
    arguments = SparrowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for draft in (None, make_draft()):
        with pytest.raises(TrainingOptionsError, match="model_init is not supported"):
            SparrowTrainer(draft, target, arguments, model_init=make_draft)

"""Samples of rows in every family's processor; bad ones are named, and never trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows import ANSWER, ask, make_media, video

from sparrow_hf.draft_inputs import visual_mask
from sparrow_hf.errors import TrainingDataError
from sparrow_hf.testbed.nano import build_processor
from sparrow_hf.training import (
    SparrowDataCollator,
    SparrowTrainer,
    SparrowTrainingArguments,
    append_answer,
)

from families import FAMILY_BY_NAME


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips and a picture."""
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def collate(processor):
    ids = [processor.video_token_id, processor.image_token_id]
    return lambda **options: SparrowDataCollator(processor, ids, **options)


BAD_ROWS = {
    "no messages": ({"messages": []}, "'messages' must be a list of turns"),
    "no role": ({"messages": [{"content": "x"}]}, "needs a 'role'"),
    "unknown part": (ask({"type": "audio", "audio": "a.wav"}), "a part must be"),
    "no source": (ask({"type": "video"}), "placeholder for video but no video"),
    "missing video": (ask(video("nowhere.mp4")), "no video file"),
    "empty video": (ask(video(b"")), "empty file"),
    "damaged video": (ask(video(b"no video")), "cannot be read as a video"),
    "missing image": (ask({"type": "image", "image": "nowhere.png"}), "no image file"),
    "no pixels": (ask({"type": "text", "text": "<|video_pad|>"}), ""),
    "no answer": ({"messages": ask()["messages"][:1]}, "no answer"),
    "short answer": (ask() | {"answer_ids": [5]}, "at least 2 tokens"),
    "visual answer": (ask(answer={"role": "assistant", "content": "<|video_pad|> dot"}), "placeholders"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_by_index_or_left_out(tmp_path, collate, name):
    bad, reason = BAD_ROWS[name]
    good = ask()
    rows = [good | {"row_index": 6}, bad | {"row_index": 7}, good | {"row_index": 8}]
    with pytest.raises(TrainingDataError, match=f"row 7: .*{reason}"):
        collate()(rows)
    batch = collate(on_bad_row="skip")(rows)
    assert len(batch["samples"]) == 2
    ((index, said),) = batch["skipped"]
    assert index == 7 and reason in said


def test_pixels_are_missing_also_where_the_processor_does_not_notice(collate, processor):
    sample = collate().prepare(ask())
    sample["input_ids"][0, 1] = processor.video_token_id
    with pytest.raises(TrainingDataError, match="row 4: .*no pixel values"):
        collate()([sample | {"row_index": 4}])


def test_skipped_rows_are_reported_and_never_trained_on(tmp_path, target, make_draft, samples, caplog):
    def train(rows, **settings):
        draft = make_draft()
        args = SparrowTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            per_device_train_batch_size=1, per_device_eval_batch_size=1, max_steps=4, num_visual_rows_max=4,
            logging_steps=1, **settings,
        )  # fmt: skip
        trainer = SparrowTrainer(draft, target, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        return trainer

    length = samples[0]["input_ids"].shape[1]
    bad = [samples[0] | {"answer_start": length - 1, "row_index": index} for index in range(2)]
    with pytest.raises(TrainingDataError, match="row [01]: "):
        train([*samples[:2], *bad])
    trainer = train([*samples[:2], *bad], on_bad_row="skip")
    assert {index for index, _ in trainer.skipped_rows} == {0, 1}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sorted(loss > 0 for loss in losses) == [False, False, True, True]
    measured, good = trainer.evaluate(), trainer.evaluate(samples[:2])
    assert measured["eval_tau"] == good["eval_tau"] and measured["eval_loss"] == pytest.approx(good["eval_loss"])
    with pytest.raises(TrainingDataError, match="^training rows: not one of them can be used, for example: row 0: "):
        train(bad, on_bad_row="skip")
    # No batch at all, without a row that is bad.
    args = SparrowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", dataloader_drop_last=True)
    with pytest.raises(TrainingDataError, match="^4 training rows fill no batch of 8 on 1 processes"):
        SparrowTrainer(make_draft(), target, args, train_dataset=samples).train()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_is_one_sentence_whichever_process_reads_it(tmp_path, target, make_draft, samples, workers):
    bad = [sample | {"answer_start": sample["input_ids"].shape[1] - 1, "row_index": 5} for sample in samples[:1]]
    args = SparrowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", dataloader_num_workers=workers)
    trainer = SparrowTrainer(make_draft(), target, args, train_dataset=bad, eval_dataset=bad)
    length = bad[0]["input_ids"].shape[1]
    for start in (trainer.train, trainer.evaluate):
        with pytest.raises(TrainingDataError) as refused:
            start()
        assert str(refused.value) == (
            "row 5: the answer must have at least 2 tokens and follow a prompt: "
            f"answer_start is {length - 1} of {length} tokens (the first answer token is never drafted)"
        )


def test_rows_set_the_sampling_of_their_videos(collate, folder):
    row = ask(video(str(folder / "2.mp4")))

    def steps(collator, **fields):
        return int(collator.prepare(row | fields)["video_grid_thw"][0, 0])

    assert (steps(collate()), steps(collate(max_frames=4)), steps(collate(max_frames=4), max_frames=8)) == (6, 2, 4)
    assert steps(collate(), fps=4) == 3


CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {% if turn['content'] is string %}{{ turn['content'] }}{% else %}"
    "{% for part in turn['content'] %}{% if 'video' in part %}VIDEO{% elif 'image' in part %}IMAGE{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_videos_images_and_text_turns_in_one_row_of_every_family(family, folder):
    processor = family.processor(family.tokenizer)
    processor.chat_template = CHAT_TEMPLATE.replace("VIDEO", family.video_prompt).replace("IMAGE", family.image_prompt)
    collator = SparrowDataCollator(processor, family.visual_token_ids, max_frames=4)
    clips = [video(str(folder / f"{seed}.mp4")) for seed in (1, 2)]
    image = {"type": "image", "image": str(folder / "picture.png")}
    rest = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and ?"}, ANSWER]

    def visual_tokens(*parts):
        row = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what ?"}]}, *rest]}
        sample = collator.prepare(row)
        return int(visual_mask(sample["input_ids"], family.visual_token_ids).sum())

    one, picture = visual_tokens(clips[0]), visual_tokens(image)
    assert visual_tokens() == 0 and one > 0 and picture > 0
    assert visual_tokens(*clips) == 2 * one
    assert visual_tokens(image, image) == 2 * picture
    if family.mixes_modalities:
        assert visual_tokens(clips[0], image, clips[1]) == 2 * one + picture


def test_the_error_of_videos_of_different_lengths_says_what_to_do(folder):
    family = FAMILY_BY_NAME["llava_onevision"]
    processor = family.processor(family.tokenizer)
    processor.chat_template = CHAT_TEMPLATE.replace("VIDEO", family.video_prompt)
    row = ask(video(str(folder / "1.mp4")), video(str(folder / "2.mp4")))
    with pytest.raises(TrainingDataError, match="different shapes .* max_frames"):
        SparrowDataCollator(processor, family.visual_token_ids).prepare(row)


@pytest.mark.parametrize("answer", [[8, 9], (8, 9), torch.tensor([8, 9]), torch.tensor([[8, 9]]), np.array([8, 9])])
def test_an_answer_may_be_a_list_or_a_tensor(answer: Any) -> None:
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    sample = append_answer(prompt, answer)
    assert sample["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and sample["answer_start"] == 3
    assert sample["attention_mask"].tolist() == [[0, 1, 1, 1, 1]]


def test_placeholder_ids_may_be_a_tensor() -> None:
    assert SparrowDataCollator(None, torch.tensor([7, 8])).visual_token_ids == [7, 8]

"""The video LLM around a language model, on a tiny random one: what is packed, merged and assembled is what is run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparrow_hf import SparrowDraftModel
from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.loading import load_target
from sparrow_hf.testbed.scenes import BLANK, Glyph, Scene, Step, sample_story, sample_timeline
from sparrow_hf.testbed.world import make_clip, write_script
from sparrow_hf.training import SparrowDataCollator
from sparrow_hf.training.recording import record
from sparrow_hf.video import prepare_inputs
from sparrow_research.language import (
    video_answers,
    video_check,
    video_clips,
    video_lengths,
    video_target,
    video_tau,
    video_tower,
    video_training,
)
from sparrow_research.language.sampling import sample
from sparrow_research.language.video_answers import faithfulness
from sparrow_research.language.video_checkpoints import load_checkpoint, save_checkpoint
from sparrow_research.language.video_facts import (
    BLACK,
    SLOTS,
    candidate_words,
    clip_words,
    frame_words,
    plain_facts,
    questions,
)
from sparrow_research.language.video_rows import IGNORED, Asked, clip_prompt, pack_clip
from sparrow_research.language.video_tower import Montages, Tower, TowerTraining, Words, montage, pixels_of
from sparrow_research.language.video_training import Lessons, answer_loss, embed, shown, stretched

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
STAR = Scene(Glyph("red", "star", "small"), "right", "forest", None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like SmolLM2's: a tokenizer to which every word of a frame is one token, a Llama of two layers."""
    folder = tmp_path_factory.mktemp("text")
    words = [word for slot in candidate_words() for word in slot]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(words * 2, vocab_size=1200, min_frequency=1, show_progress=False)
    trained.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 512},
        **{"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id},
        **{"pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True, "initializer_range": 0.3},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(saved: Path) -> tuple[Any, Any]:
    return video_target.load_text(saved, torch.float32)


def captions(model: Any, tokenizer: Any, frames: list[tuple[str, ...]]) -> torch.Tensor:
    """The embeddings of the words of frames, `(frames · SLOTS, hidden)`."""
    ids = [tokenizer(word)["input_ids"][0] for words in frames for word in words]
    return model.get_input_embeddings().weight.detach()[ids]


def test_every_frame_has_a_word_in_each_slot() -> None:
    known = candidate_words()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        story = sample_story(rng)
        for words in clip_words(story, sample_timeline(rng, story, 16)):
            assert len(words) == SLOTS
            assert all(word in slot for word, slot in zip(words, known, strict=True)), words


def test_a_motion_is_the_change_of_its_digits() -> None:
    columns, rows = (
        [int(frame_words((STAR,), Step(0, moment // 2), moment % 2)[slot]) for moment in range(8)] for slot in (7, 8)
    )
    assert columns == list(range(columns[0], columns[0] + 8))
    assert len(set(rows)) == 1
    assert frame_words((STAR,), Step(BLANK), 0) == BLACK


def test_different_stories_have_different_facts_and_answers() -> None:
    stories = [write_script(seed, 400).story for seed in range(50)]
    assert len({plain_facts(story) for story in stories}) == 50
    asked = list(questions((STAR,)))
    assert {each.kind: each.answer for each in asked}["motion"] == "It moves to the right."
    assert faithfulness("A red star, and a blue heart.", (STAR,)) == (2, 2)


def test_questions_of_one_sequence_are_answered_as_if_alone(text: tuple[Any, Any]) -> None:
    model, tokenizer = text
    image = tokenizer.convert_tokens_to_ids("<image>")
    visual = captions(model, tokenizer, clip_words((STAR,), [Step(0, 0), Step(0, 1)]))
    asked = [Asked(each.text, tokenizer(each.answer)["input_ids"]) for each in list(questions((STAR,)))[:3]]
    together = pack_clip(tokenizer, 4, asked)
    separator = tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
    jumped = stretched(together, np.random.default_rng(0), separator, 4000)
    for packed in (together, jumped):
        with torch.no_grad():
            rows = embed(model, packed, visual, image)
            states = model.model(
                inputs_embeds=rows, attention_mask=packed.mask(), position_ids=packed.positions[None]
            ).last_hidden_state[0]
            for owner in range(1, 4):
                mine = (packed.segments == 0) | (packed.segments == owner)
                alone = model.model(inputs_embeds=rows[:, mine], position_ids=packed.positions[None, mine])
                expected = alone.last_hidden_state[0][packed.segments[mine] == owner]
                torch.testing.assert_close(states[packed.segments == owner], expected, atol=1e-4, rtol=1e-4)
    assert jumped.positions.max() > together.positions.max()
    assert (jumped.positions.diff()[: jumped.prefix - 1] >= 1).all()
    part = (embed(model, together, visual, image), together)
    loss, likeliest, labels = answer_loss(model, [part])
    assert labels.tolist() == [token for each in asked for token in each.answer_ids]
    assert loss.isfinite() and likeliest.shape == labels.shape
    assert (together.labels == IGNORED).sum() == len(together.labels) - len(labels)
    shorter = pack_clip(tokenizer, 2, asked[:1])
    other = (embed(model, shorter, visual[: 2 * SLOTS], image), shorter)
    alone, others, more = answer_loss(model, [other])
    both, found, wanted = answer_loss(model, [other, part])
    torch.testing.assert_close(both, (alone + loss) / 2)
    assert found.tolist() == [*others.tolist(), *likeliest.tolist()] and wanted.tolist() == [*more, *labels]


def test_clips_are_packed_as_the_processor_writes_them(text: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = text
    processor = video_target.make_processor(tokenizer)
    clip = make_clip(tmp_path / "clip.mp4", 3, visual_tokens=320, tokens_per_step=2 * SLOTS)
    question = clip.messages[0]["content"][1]["text"]
    inputs = prepare_inputs(processor, clip.messages)
    frames = inputs["pixel_values"].shape[1]
    assert frames == 20
    packed = pack_clip(tokenizer, frames, [Asked(question, [5])])
    assert packed.input_ids[:-1].tolist() == inputs["input_ids"][0].tolist()
    assert tokenizer(clip_prompt(frames, question))["input_ids"] == inputs["input_ids"][0].tolist()


def test_the_assembled_target_sees_what_its_parts_see(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = video_target.load_text(saved, torch.float32)
    changes = video_target.adapt(model, 2)
    torch.manual_seed(1)
    for change in changes.values():
        change.up.data.normal_(std=0.1).copy_(change.up.bfloat16())
        change.down.data.copy_(change.down.bfloat16())
    vlm = video_target.build_vlm(video_target.load_text(saved)[0], tokenizer)
    kept = {name: each.contiguous() for name, each in Tower(vlm).bfloat16().state_dict().items()}
    save_file(kept, tmp_path / "tower.safetensors")
    save_file(video_target.factors(changes), tmp_path / "adapters.safetensors")

    target, processor = video_target.assemble(saved, tmp_path, torch.float32)
    target.save_pretrained(tmp_path / "target")
    processor.save_pretrained(tmp_path / "target")
    target = type(target).from_pretrained(tmp_path / "target", dtype=torch.float32)
    clip = make_clip(tmp_path / "clip.mp4", 3, visual_tokens=160, tokens_per_step=2 * SLOTS)
    inputs = prepare_inputs(processor, clip.messages)
    with torch.no_grad():
        logits = target(**inputs).logits
        visual = torch.cat(target.get_image_features(inputs["pixel_values"]).pooler_output)
        assert visual.shape == (10 * SLOTS, 48)
        ids = inputs["input_ids"][0]
        rows = model.get_input_embeddings()(ids)
        rows[ids == tokenizer.convert_tokens_to_ids("<image>")] = visual
        expected = model(inputs_embeds=rows[None]).logits
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    rows[ids == tokenizer.convert_tokens_to_ids("<image>")] = captions(model, tokenizer, [BLACK] * 10)
    unchanged = video_target.load_text(saved, torch.float32)[0]
    with torch.no_grad():
        assert (model(inputs_embeds=rows[None]).logits - expected).abs().max() > 0.1
        assert (unchanged(inputs_embeds=rows[None]).logits - model(inputs_embeds=rows[None]).logits).abs().max() > 0.1


def test_frames_reach_the_tower_as_the_processor_makes_them(text: tuple[Any, Any]) -> None:
    frames, _ = montage(0, 3)
    processor = video_target.make_processor(text[1])
    made = processor.video_processor(videos=[frames], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(made, pixels_of(frames), atol=1e-5, rtol=0)


def test_a_tower_learns_the_words(text: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_tower, "BATCH_STEPS", 12)
    model, tokenizer = text
    words = Words(model.get_input_embeddings().weight, tokenizer)
    torch.manual_seed(0)
    tower = Tower(video_target.build_vlm(model, tokenizer, TOWER))
    training = TowerTraining(tower, words, 12)
    frames, told = montage(1, 8)
    exact = torch.stack(
        [torch.stack([words.embeddings[slot][label] for slot, label in enumerate(row)]) for row in words.labels(told)]
    )
    assert all((each.argmax(-1) == words.labels(told)[:, slot]).all() for slot, each in enumerate(words.logits(exact)))
    before = training.losses(frames, told)[2].item()
    for number in range(6):
        training.step(*Montages()[number])
    training.save(tmp_path / "tower.checkpoint", {})
    again = TowerTraining(Tower(video_target.build_vlm(model, tokenizer, TOWER)), words, 12)
    again.load(tmp_path / "tower.checkpoint", {})
    assert again.steps_done == 6
    for number in range(6, 12):
        assert training.step(*Montages()[number]) == again.step(*Montages()[number])
    assert training.losses(frames, told)[2].item() < 0.8 * before


def test_lessons_are_short_clips_or_fewer_long_ones(text: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"messages": [{"role": "user", "content": "red"}], "answer_ids": [5, 6, 7]}
    monkeypatch.setattr(video_training, "conversations", lambda: iter([plain]))
    answers = [{"seed": seed, "prompt": "What is it?", "answer_ids": [5, 6]} for seed in range(3)]
    lessons = Lessons(text[1], answers, 8, 160)
    image = text[1].convert_tokens_to_ids("<image>")
    found = [lessons[step] for step in range(24)]
    counts, plain_rows, longest = set(), 0, 0
    for lesson in found:
        frames = [each for _, each in lesson if each is not None]
        plain_rows += len(lesson) - len(frames)
        counts.add(len(lesson))
        longest = max([longest, *map(len, frames)])
        for packed, each in lesson:
            assert (packed.input_ids == image).sum() == SLOTS * (0 if each is None else len(each))
        if len(lesson) < 8:
            assert len({len(each) for each in frames}) <= 1 and sum(map(len, frames)) <= max(160 * 2, 8 * 20 * 2)
    assert counts >= {8} and min(counts) < 5 and plain_rows > 3 and 2 * 40 <= longest <= 2 * 160
    for (packed, frames), (again, same) in zip(found[3], lessons[3], strict=True):
        assert torch.equal(packed.input_ids, again.input_ids) and torch.equal(packed.positions, again.positions)
        assert frames is None or np.array_equal(frames, same)


def test_a_lesson_shows_the_language_model_what_the_target_will_see(text: tuple[Any, Any]) -> None:
    model, tokenizer = text
    vlm = video_target.build_vlm(model, tokenizer, TOWER)
    frames = shown((STAR,), 3, np.random.default_rng(0))
    with torch.no_grad():
        seen = torch.cat(vlm.get_image_features(pixels_of(frames)[None]).pooler_output)
    training = video_training.VideoTraining(model, Tower(vlm), tokenizer, 1)
    packed = pack_clip(tokenizer, len(frames), [Asked("What is it?", [5])])
    ((rows, moved),) = training.on_device([(packed, frames)])
    torch.testing.assert_close(rows[0, moved.input_ids == training.image], seen)


def test_many_answers_are_those_of_generate(text: tuple[Any, Any]) -> None:
    model, tokenizer = text
    tokenizer.padding_side = "left"
    batch = tokenizer(["red star", "no dot at all in forest", "Scene three:"], return_tensors="pt", padding=True)
    found = sample(model, batch.input_ids, batch.attention_mask, 12, 0.0, 5, tokenizer.eos_token_id)
    plain = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch.input_ids.shape[1] :].tolist()
    for mine, theirs in zip(found, plain, strict=True):
        assert mine == theirs[: len(mine)]
        assert len(mine) == 12 or mine[-1] == tokenizer.eos_token_id


def test_every_command_runs_on_a_tiny_model(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From answers to a target, its figures and the τ of a draft: the commands of the road, smaller."""
    text, work = str(saved), tmp_path / "work"
    parts = work / "parts"
    parts.mkdir(parents=True)
    monkeypatch.setattr(video_answers, "SAMPLING", {"max_new_tokens": 16, "temperature": 0.8, "top_k": 50})
    monkeypatch.setattr(video_tower, "BATCH_STEPS", 6)
    monkeypatch.setattr(video_tower, "SAVE_EVERY", 2)
    monkeypatch.setattr(video_training, "STEPS", (5, 6))
    monkeypatch.setattr(video_training, "LONG_SHARE", 0.0)
    plain = {"messages": [{"role": "user", "content": "red"}], "answer_ids": [5, 6, 7]}
    monkeypatch.setattr(video_training, "conversations", lambda: iter([plain]))
    monkeypatch.setattr(video_training, "VALIDATION_SEEDS", range(1))
    monkeypatch.setattr(video_training, "VALIDATION_STEPS", {"400": 5})
    monkeypatch.setattr(video_tower, "VALIDATION_SEEDS", range(1))
    monkeypatch.setattr(video_check, "LONG", {"max_new_tokens": 6, "do_sample": True})
    monkeypatch.setattr(video_tau, "NEW_TOKENS", 6)
    monkeypatch.setattr(video_tau, "LENGTHS", {160: 2})
    for module in (video_clips, video_lengths):
        monkeypatch.setattr(module, "LENGTHS", {160: 2, 320: 1})

    video_answers.main(["--target", text, "--output", f"{work}/answers.jsonl", "--rows", "3"])
    video_answers.main(["--target", text, "--output", f"{work}/answers.jsonl", "--rows", "5"])
    rows = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
    seen = ["--smollm2", text, "--output", f"{parts}/tower.safetensors", "--steps", "2"]
    video_tower.main(seen)
    learned = ["--smollm2", text, "--tower", f"{parts}/tower.safetensors", "--answers", f"{work}/answers.jsonl"]
    learned += ["--output", f"{parts}/adapters.safetensors", "--steps", "2", "--clips", "2"]
    video_training.main(learned)
    refuses_other_options(seen, learned, work)
    video_target.main(["--smollm2", text, "--parts", str(parts), "--output", f"{work}/target"])

    looked = ["--target", f"{work}/target", "--lengths", "160", "--clips", "1", "--work", f"{work}/check"]
    video_check.main([*looked, "--output", f"{work}/check.json"])
    (row,) = json.loads((work / "check.json").read_text())["lengths"]
    assert row["questions"] > 10 and row["right"]["all"] < 0.5

    video_clips.main(["--output", f"{work}/prompts", "--train", "1", "--validation", "1"])
    asked = [json.loads(line) for line in (work / "prompts" / "train.jsonl").read_text().splitlines()]
    assert len(asked) == 2 and (work / "prompts" / asked[0]["messages"][0]["content"][0]["video"]).exists()

    target, processor = load_target(str(work / "target"), dtype="bfloat16", device="cpu")
    draft = SparrowDraftModel.from_target(target)
    draft.save_pretrained(work / "draft")
    for length in (160, 320):
        rows = [json.loads(line) for line in (work / "prompts" / f"length-{length}.jsonl").read_text().splitlines()]
        for row in rows:
            row["messages"][0]["content"][0]["video"] = f"{work}/prompts/{row['messages'][0]['content'][0]['video']}"
        answered = [{**row, "answer_ids": list(range(5, 15))} for row in rows]
        record(draft, answered, work / f"recording-length-{length}", SparrowDataCollator(processor))
    known = ["--target", f"{work}/target", "--recordings", str(work), "--drafts", f"{work}/draft"]
    video_lengths.main([*known, "--output", f"{work}/lengths.json"])
    found = json.loads((work / "lengths.json").read_text())["drafts"]["draft"]
    assert [(row["visual_tokens"], row["clips"]) for row in found["lengths"]] == [(160, 2), (320, 1)]
    assert found["retention"]["320"]["clips"] == 1 and found["retention"]["320"]["ratio"] > 0
    drafted = ["--target", f"{work}/target", "--draft", f"{work}/draft", "--lengths", "160", "--work", f"{work}/tau"]
    video_tau.main([*drafted, "--output", f"{work}/tau.json"])
    found = json.loads((work / "tau.json").read_text())
    assert found["lengths"][0]["clips"] == 2 and found["lengths"][0]["tau"] >= 1


def refuses_other_options(seen: list[str], learned: list[str], work: Path) -> None:
    """Both trainings have a checkpoint, and go on from it with the options that it was written with only."""
    lines = (work / "answers.jsonl").read_text().splitlines(keepends=True)
    (work / "fewer.jsonl").write_text("".join(lines[:-1]))
    save_file(load_file(work / "parts/tower.safetensors"), work / "same.safetensors", {"made": "later"})
    for main, words, other, difference in (
        (video_tower.main, seen, ["--steps", "3"], "steps: 2, now 3"),
        (video_tower.main, seen, ["--seed", "1"], "seed: 0, now 1"),
        (video_training.main, learned, ["--steps", "3"], "steps: 2, now 3"),
        (video_training.main, learned, ["--clips", "1"], "clips_per_step: 2, now 1"),
        (video_training.main, learned, ["--longest", "50"], "longest: 94, now 50"),
        (video_training.main, learned, ["--answers", f"{work}/fewer.jsonl"], "answers_sha256: '"),
        (video_training.main, learned, ["--tower", f"{work}/same.safetensors"], "tower_sha256: '"),
    ):
        with pytest.raises(TrainingOptionsError, match=rf"checkpoint was made differently \({difference}"):
            main([*words, *other])


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "tower.checkpoint"
    save_checkpoint(file, {"done": 25}, {"steps": 900})
    assert load_checkpoint(file, {"steps": 900})["done"] == 25
    torch.save({"done": 25}, file)
    with pytest.warns(UserWarning, match="without settings"):
        assert load_checkpoint(file, {"steps": 900})["done"] == 25


def test_one_forward_tells_what_generate_would_say(text: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = text
    target = video_target.build_vlm(model, tokenizer, TOWER)
    processor = video_target.make_processor(tokenizer)
    clip = make_clip(tmp_path / "clip.mp4", 3, visual_tokens=160, tokens_per_step=2 * SLOTS)
    video = clip.messages[0]["content"][0]
    asked = []
    for question in ("red?", "What is it?"):
        messages = [{"role": "user", "content": [video, {"type": "text", "text": question}]}]
        inputs = prepare_inputs(processor, messages)
        output = target.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
        said = output[0, inputs["input_ids"].shape[1] :].tolist()
        asked += [Asked(question, said), Asked(question, [*said[:-1], said[-1] ^ 1])]
    packed = pack_clip(tokenizer, inputs["pixel_values"].shape[1], asked)
    assert video_check.answered(target, packed, inputs["pixel_values"]) == [True, False, True, False]

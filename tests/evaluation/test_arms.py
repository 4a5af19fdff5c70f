"""Arms by name, and what they are made of."""

from pathlib import Path

import pytest
from noise import LENGTH, read
from transformers import PreTrainedModel

from sparrow_hf import TREE_PRESETS
from sparrow_hf.draft_inputs import EVERY_VISUAL_TOKEN
from sparrow_hf.errors import BenchmarkError
from sparrow_hf.evaluation import Arm, compare, measure
from sparrow_hf.evaluation.arms import METHODS_GROUP, Arms


def test_arms_by_name(target: PreTrainedModel, draft_folder: str):
    parser = Arms(target, draft_folder)
    plain, none, lookup, draft, tree, blind, other = parser.parse(
        "none prompt-lookup-3 draft draft@10-2-4/glimpse=all draft/glimpse=0".split()
        + [f"draft:{draft_folder}@chain-2"]
    )
    assert (plain.name, plain.draft, plain.runs_stock_loop) == ("plain", None, False)
    assert none.tree == TREE_PRESETS["none"]
    assert lookup.prompt_lookup_num_tokens == lookup.num_draft_levels == 3
    assert (draft.tree, draft.num_glimpse_tokens) == (draft.draft.config.tree_shape, 4)
    assert (tree.tree, tree.num_glimpse_tokens) == ((10, 2, 4), EVERY_VISUAL_TOKEN)
    assert blind.num_glimpse_tokens == 0
    assert (other.name, other.num_draft_levels) == (f"draft:{draft_folder}@chain-2", 2)
    # One checkpoint, one model.
    assert none.draft is draft.draft is other.draft
    assert set(parser.weights) == {draft_folder}
    assert Arms(target, draft_folder).parse(["plain"]) == [plain]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("oak", "unknown arm 'oak'"),
        (
            "oak:3",
            "unknown arm 'oak:3': give plain, none, .* or draft.*Other packages add methods: see docs/benchmark.md",
        ),
        ("prompt-lookup-0", "unknown arm"),
        ("draft/glimpse=-1", "unknown arm"),
        ("draft@oak", "unknown tree 'oak'"),
        ("draft:nowhere", "draft 'nowhere' cannot be loaded"),
        ("assistant:nowhere", "assistant 'nowhere' cannot be loaded"),
    ],
)
def test_a_wrong_arm_is_named(target: PreTrainedModel, draft_folder: str, name: str, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Arms(target, draft_folder).arm(name)


def test_an_arm_without_its_draft_is_refused(target: PreTrainedModel, tmp_path: Path):
    with pytest.raises(BenchmarkError, match="arm 'none' needs a draft"):
        Arms(target).arm("none")
    target.save_pretrained(tmp_path)
    with pytest.raises(BenchmarkError, match="not a draft of this package"):
        Arms(target).arm(f"draft:{tmp_path}")


def test_the_glimpse_of_an_arm_changes_the_rows_and_is_taken_back(target: PreTrainedModel, draft_folder: str):
    arms = Arms(target, draft_folder).parse(["draft@chain-2/glimpse=0", "draft@chain-2", "draft@chain-2/glimpse=all"])
    runs = compare(target, arms, read(target, 8, 0), {"max_new_tokens": LENGTH, "do_sample": False})
    blind, glimpse, all_rows = (runs[arm.name].draft_cache_rows for arm in arms[1:])
    assert glimpse == blind + 4
    assert all_rows == blind + 16  # 8 frames, 4 merged patches every 2 frames
    assert arms[1].draft.config.num_glimpse_tokens == 4


def test_a_small_assistant(target: PreTrainedModel, tmp_path: Path):
    target.save_pretrained(tmp_path)
    arms = Arms(target).parse([f"assistant:{tmp_path}"])
    run = compare(target, arms, read(target, 4, 0), {"max_new_tokens": LENGTH, "do_sample": False})[arms[1].name]
    assert run.differs_at is None
    # The target is its own assistant: it agrees with itself, at least where the video does not matter.
    assert run.rounds < LENGTH - 1


def test_transformers_assistants_do_not_see_the_video(target: PreTrainedModel, tmp_path: Path):
    """The limitation in docs/benchmark.md. If this fails, transformers passes the video on: change that page."""
    target.save_pretrained(tmp_path)
    arm = Arms(target).arm(f"assistant:{tmp_path}")
    seen: list[set[str]] = []
    hook = arm.assistant.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({name for name, value in kwargs.items() if value is not None}),
        with_kwargs=True,
    )
    measure(target, arm, read(target, 4, 0), {"max_new_tokens": LENGTH, "do_sample": False})
    hook.remove()
    assert seen
    assert not any(names & {"pixel_values_videos", "mm_encoder_outputs"} for names in seen)


def install_method(folder: Path, value: str) -> None:
    """What pip leaves of a package that adds the method `oak`."""
    installed = folder / "oak_methods-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: oak-methods\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[{METHODS_GROUP}]\noak = {value}\n")
    (folder / "oak_methods.py").write_text(
        "from sparrow_hf.evaluation import Arm\n"
        "def arm(name, text, arms):\n"
        "    return Arm(name, prompt_lookup_num_tokens=int(text) + arms.target.config.text_config.num_hidden_layers)\n"
    )


def test_other_packages_add_methods(target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install_method(tmp_path, "oak_methods:arm")
    monkeypatch.syspath_prepend(tmp_path)
    parser = Arms(target)
    arms = parser.parse(["oak:3"])
    assert arms[1] == Arm("oak:3", prompt_lookup_num_tokens=3 + target.config.text_config.num_hidden_layers)
    run = compare(target, arms, read(target, 4, 0), {"max_new_tokens": LENGTH, "do_sample": False})["oak:3"]
    assert run.differs_at is None
    for name in ("oak", "oak:", "elm:3"):
        with pytest.raises(BenchmarkError, match=f"unknown arm '{name}': .*, oak:TEXT"):
            parser.arm(name)


def test_a_method_that_cannot_be_imported_is_named(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install_method(tmp_path, "oak_methods:gone")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BenchmarkError, match="'oak' .oak_methods:gone. cannot be loaded"):
        Arms(target)

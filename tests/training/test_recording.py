"""Recordings: the same training to the last bit, the same files after a kill, never more disk than allowed."""

import contextlib
import copy
import json

import pytest
import torch
from kills import die, files_of, kill_this_process

from sparrow_hf import SparrowDraftModel
from sparrow_hf.artifacts import earlier_target_digest, tensor_digest
from sparrow_hf.checksums import DIGESTS_FILE
from sparrow_hf.errors import DiskBudgetError, TrainingDataError
from sparrow_hf.training import (
    SparrowDataCollator,
    SparrowTrainer,
    SparrowTrainingArguments,
    recording,
)
from sparrow_hf.training.recording import RecordedDataset, Recorder, record
from sparrow_hf.training.recording_size import estimate_recording_bytes


def train(folder, draft, target, rows, **settings):
    args = SparrowTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=2, max_steps=5, learning_rate=2e-3, **({"num_visual_rows_max": 6} | settings),
    )  # fmt: skip
    SparrowTrainer(draft, target, args, train_dataset=rows).train()
    return draft.state_dict()


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ({}, {"hidden_state_noise": 0.2}),
        ({"feature_layers": [2, 3, -1], "num_glimpse_tokens": 0}, {"num_visual_rows_max": 0}),
    ],
    ids=["bridge", "text-only"],
)
def test_training_from_a_recording_equals_training_beside_the_target(
    tmp_path, target, make_draft, samples, overrides, settings
):
    visual = settings.get("num_visual_rows_max") != 0
    skipped = record(make_draft(**overrides), samples, tmp_path / "r", SparrowDataCollator(), visual_rows=visual)
    assert skipped == {}
    rows = RecordedDataset(tmp_path / "r", make_draft(**overrides))
    assert len(rows) == len(samples)
    beside = train(tmp_path, make_draft(**overrides), target, samples, **settings)
    recorded = train(tmp_path, make_draft(**overrides), target, rows, **settings)
    untrained = make_draft(**overrides).state_dict()
    for name, tensor in beside.items():
        assert torch.equal(tensor, recorded[name]), name
    assert not torch.equal(beside["fc.weight"], untrained["fc.weight"])


def test_the_estimate_is_near_and_visual_rows_are_what_costs(tmp_path, make_draft, samples):
    draft, sizes = make_draft(), {}
    for visual in (True, False):
        folder = tmp_path / str(visual)
        expected = estimate_recording_bytes(draft, samples, SparrowDataCollator(), visual_rows=visual)
        record(draft, samples, folder, SparrowDataCollator(), visual_rows=visual)
        sizes[visual] = Recorder(draft, folder, visual_rows=visual, source={"rows": 4}).bytes_on_disk()
        assert expected == pytest.approx(sizes[visual], rel=0.05)
    num_visual = sum(
        int(torch.isin(s["input_ids"], torch.tensor(draft.config.visual_token_ids)).sum()) for s in samples
    )
    # Each visual position: 32 numbers of the bridge layer, and its index.
    assert sizes[True] - sizes[False] == pytest.approx(num_visual * (32 * 4 + 8), abs=100)


def test_one_recording_serves_drafts_of_other_layers(tmp_path, target, make_draft, samples):
    record(make_draft(feature_layers=[1, 3, -1]), samples, tmp_path, SparrowDataCollator())
    wide, narrow = (RecordedDataset(tmp_path, make_draft(feature_layers=layers))[0] for layers in ([3, 1], [-1]))
    assert wide["text_states"].shape[1] == 2 * narrow["text_states"].shape[1] == 64
    assert torch.equal(narrow["text_states"], narrow["last_states"])
    with pytest.raises(TrainingDataError, match="lacks text layer 2"):
        RecordedDataset(tmp_path, make_draft(feature_layers=[2]))
    with pytest.raises(TrainingDataError, match="lacks visual layer 1"):
        RecordedDataset(tmp_path, make_draft(feature_layers=[-1], visual_bridge_layer=1))


def test_layers_that_a_draft_does_not_read_stay_on_the_disk(tmp_path, make_draft, samples, monkeypatch):
    record(make_draft(feature_layers=[1, 3, -1]), samples, tmp_path, SparrowDataCollator())
    read, safe_open = [], recording.safe_open

    class Watched(contextlib.AbstractContextManager):
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __exit__(self, *arguments):
            return self.file.__exit__(*arguments)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(recording, "safe_open", Watched)
    rows = RecordedDataset(tmp_path, make_draft(feature_layers=[3]))
    rows[0]
    last = rows.config.target_num_hidden_layers
    assert sorted(name for name in read if name.startswith("text_states")) == ["text_states.3", f"text_states.{last}"]


def test_text_only_recordings_refuse_visual_rows(tmp_path, target, make_draft, samples):
    record(make_draft(), samples, tmp_path / "r", SparrowDataCollator(), visual_rows=False)
    rows = RecordedDataset(tmp_path / "r", make_draft())
    with pytest.raises(TrainingDataError, match="keeps only some of them"):
        train(tmp_path, make_draft(), target, rows, num_visual_rows_min=2)


def test_disk_space_is_not_exceeded(tmp_path, make_draft, samples):
    draft, collator = make_draft(), SparrowDataCollator()
    expected = estimate_recording_bytes(draft, samples, collator)
    limit = 0.6 * expected / 1e9
    with pytest.raises(DiskBudgetError, match="--max-disk-gb"):
        record(draft, samples, tmp_path / "a", collator, max_disk_gb=limit)
    kept = files_of(tmp_path / "a")
    # Beside the rows, their description and their digests.
    assert 3 <= len(kept) < 6 and sum(map(len, kept.values())) < limit * 1e9 + 1000
    # What is complete can be trained on, and is not read again.
    assert len(RecordedDataset(tmp_path / "a", draft)) == len(kept) - 2
    record(draft, samples, tmp_path / "a", collator, max_disk_gb=2 * limit)
    record(draft, samples, tmp_path / "b", collator)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_bad_rows_are_left_out_by_index(tmp_path, make_draft, samples):
    rows = [samples[0], samples[0] | {"answer_start": 10**6}, samples[1]]
    with pytest.raises(TrainingDataError, match="row 1: "):
        record(make_draft(), rows, tmp_path / "a", SparrowDataCollator())
    skipped = record(make_draft(), rows, tmp_path / "b", SparrowDataCollator(on_bad_row="skip"))
    assert list(skipped) == [1]
    with pytest.raises(TrainingDataError, match="row 0: .* need the target's processor"):
        record(make_draft(), [{"messages": []}], tmp_path / "c", SparrowDataCollator(on_bad_row="skip"))
    assert [RecordedDataset(tmp_path / "b", make_draft()).answer_length(index) for index in range(2)] == [7, 12]
    assert [path.name for path in RecordedDataset(tmp_path / "b", make_draft()).paths] == [
        "row-000000.safetensors",
        "row-000002.safetensors",
    ]


def test_damaged_and_foreign_recordings_are_refused(tmp_path, make_draft, samples):
    with pytest.raises(TrainingDataError, match="not a recording"):
        RecordedDataset(tmp_path, make_draft())
    record(make_draft(), samples[:2], tmp_path, SparrowDataCollator())
    with pytest.raises(TrainingDataError, match="rows: 2, now 4"):
        record(make_draft(), samples, tmp_path, SparrowDataCollator())
    rows = RecordedDataset(tmp_path, make_draft())
    rows.paths[0].write_bytes(rows.paths[0].read_bytes()[:-50])
    with pytest.raises(TrainingDataError, match="row-000000.safetensors is not the file that was written"):
        rows[0]
    provenance = tmp_path / recording.PROVENANCE_FILE
    provenance.write_text(json.dumps(json.loads(provenance.read_text()) | {"target_sha256": "0" * 64}))
    rows.digests.write([provenance, *rows.paths])
    with pytest.raises(TrainingDataError, match="another target"):
        RecordedDataset(tmp_path, make_draft())


def test_a_target_in_another_dtype_is_told_which_one_was_recorded(tmp_path, target, make_draft, samples):
    half = SparrowDraftModel.from_target(copy.deepcopy(target).bfloat16())
    drafts = {"float32": make_draft(), "bfloat16": half}
    for recorded, loaded in (("float32", "bfloat16"), ("bfloat16", "float32")):
        record(drafts[recorded], samples[:1], tmp_path / recorded, SparrowDataCollator())
        RecordedDataset(tmp_path / recorded, drafts[recorded])
        with pytest.raises(TrainingDataError) as error:
            RecordedDataset(tmp_path / recorded, drafts[loaded])
        assert str(error.value) == (
            f"{tmp_path / recorded} was recorded from a target in {recorded}, and this one is in {loaded}: train with "
            f"--target-dtype {recorded}, or record again with --dtype {loaded} into another folder"
        )


def test_a_recording_of_an_earlier_version_is_gone_on_with(tmp_path, target, make_draft, samples):
    """It identifies the same target by another digest."""
    record(make_draft(), samples, tmp_path, SparrowDataCollator())
    provenance = tmp_path / recording.PROVENANCE_FILE
    written, weights = json.loads(provenance.read_text()), target.state_dict()
    assert written["target_sha256"] == tensor_digest(weights)
    provenance.write_text(json.dumps(written | {"target_sha256": earlier_target_digest(weights)}))
    (tmp_path / "rows" / "row-000001.safetensors").unlink()
    # It has no digests of its files either, which is said; from now on it has them.
    (tmp_path / DIGESTS_FILE).unlink()
    with pytest.warns(UserWarning, match="carries no digests"):
        assert len(RecordedDataset(tmp_path, make_draft())) == len(samples) - 1
    with pytest.warns(UserWarning, match="carries no digests"):
        record(make_draft(), samples, tmp_path, SparrowDataCollator())
    assert len(RecordedDataset(tmp_path, make_draft()).digests.known) == len(samples) + 1


def test_a_killed_recording_goes_on_and_ends_the_same(tmp_path, make_draft, samples, monkeypatch):
    def run(name):
        record(make_draft(), samples, tmp_path / name, SparrowDataCollator())

    save = recording.save_file

    def save_and_die(tensors, path):
        save(tensors, path)
        if "row-000002" in path.name:
            kill_this_process()

    with monkeypatch.context() as patch:
        patch.setattr(recording, "save_file", save_and_die)
        die(lambda: run("killed"))
    names = sorted(path.name for path in (tmp_path / "killed" / "rows").iterdir())
    assert names[:2] == ["row-000000.safetensors", "row-000001.safetensors"]
    assert len(names) == 3 and names[2].endswith(".partial")
    run("killed")
    run("whole")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert len(files_of(tmp_path / "whole")) == 6


def test_a_recording_goes_on_with_the_same_rows_read_the_same_way_only(tmp_path, make_draft, samples):
    def run(source="a", **sampling):
        record(make_draft(), samples, tmp_path, SparrowDataCollator(**sampling), source={"answers": source})

    run(max_frames=8)
    run(max_frames=8)
    with pytest.raises(TrainingDataError, match="max_frames: 8, now None"):
        run()
    with pytest.raises(TrainingDataError, match="fps: None, now 2.0"):
        run(max_frames=8, fps=2.0)
    with pytest.raises(TrainingDataError, match="answers: 'a', now 'b'"):
        run("b", max_frames=8)
    # An earlier version did not write these down.
    provenance = tmp_path / recording.PROVENANCE_FILE
    written = json.loads(provenance.read_text())
    provenance.write_text(
        json.dumps({name: written[name] for name in written if name not in ("answers", "fps", "max_frames")})
    )
    (tmp_path / DIGESTS_FILE).unlink()
    with pytest.warns(UserWarning, match="carries no digests"):
        run("b", fps=2.0)

"""Two processes give the same weights as one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sparrow_hf.training import SparrowTrainer, SparrowTrainingArguments
from sparrow_hf.training.run import DDP_CONFIG

HERE = Path(__file__).parent


def train(folder: Path, processes: int) -> dict:
    folder.mkdir()
    path = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, str(HERE / "train_in_processes.py"), str(folder), str(4 // processes)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.full
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == 3 and two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["evaluated"] == pytest.approx(one["evaluated"], abs=1e-5)
    assert two["of seven"] == pytest.approx(one["of seven"], abs=1e-5)
    assert (one["planned"], two["planned"]) == ([3, 4], [3, 2])
    expected = load_file(tmp_path / "one" / "weights.safetensors")
    for name, weights in load_file(tmp_path / "two" / "weights.safetensors").items():
        torch.testing.assert_close(weights, expected[name], atol=1e-5, rtol=1e-4)


def test_the_preset_for_several_gpus_is_what_accelerate_reads():
    config = load_config_from_file(str(DDP_CONFIG))
    assert (config.distributed_type, config.num_processes) == ("MULTI_GPU", 8)


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("length", [3, 5, 6, 7, 8])
def test_rows_that_fill_up_the_last_batches_count_once(
    tmp_path, target, make_draft, recorded, monkeypatch, length, split_batches
):
    bad = recorded[0] | {"answer_start": 10**6}
    rows = [*recorded, bad, *recorded[:3]][:length]
    args = SparrowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", on_bad_row="skip")
    trainer = SparrowTrainer(make_draft(), target, args)

    def counts(processes, process):
        """What one of several processes counts, with four rows in a step of all of them."""
        monkeypatch.setattr(SparrowTrainingArguments, "world_size", processes)
        monkeypatch.setattr(SparrowTrainingArguments, "process_index", process)
        size = 4 if split_batches else 4 // processes
        loader = DataLoader(rows, batch_size=size, collate_fn=trainer.data_collator)
        shard = prepare_data_loader(
            loader, num_processes=processes, process_index=process, split_batches=split_batches, put_on_device=False
        )
        steps = [trainer.prediction_step(trainer.draft.eval(), batch, prediction_loss_only=False) for batch in shard]
        assert {(loss.dtype, found.dtype) for loss, found, _ in steps} == {(torch.float32, torch.long)}
        return sum(found for _, found, _ in steps)

    expected = counts(1, 0)
    assert torch.equal(counts(2, 0) + counts(2, 1), expected)
    assert torch.equal(sum(counts(4, process) for process in range(4)), expected)

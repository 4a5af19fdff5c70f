"""Two processes give the same weights as one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

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
    expected = load_file(tmp_path / "one" / "weights.safetensors")
    for name, weights in load_file(tmp_path / "two" / "weights.safetensors").items():
        torch.testing.assert_close(weights, expected[name], atol=1e-5, rtol=1e-4)


def test_the_preset_for_several_gpus_is_what_accelerate_reads():
    config = load_config_from_file(str(DDP_CONFIG))
    assert (config.distributed_type, config.num_processes) == ("MULTI_GPU", 8)

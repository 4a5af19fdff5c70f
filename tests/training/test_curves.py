"""The figure shows the logged points, and the error names what is missing."""

import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.axes import Axes

from sparrow_hf import extras
from sparrow_hf.errors import MissingDependencyError, TrainingDataError
from sparrow_hf.training.curves import plot_curves

LOG = [
    {"step": 10, "loss": 8.0, "learning_rate": 1e-3},
    {"step": 20, "loss": 6.0, "learning_rate": 5e-4},
    {"step": 20, "eval_loss": 7.0, "eval_tau": 1.5, "eval_accepted_1": 0.4, "eval_accepted_2": 0.1},
    {"step": 20, "eval_decoded_tau": 1.4, "eval_decoded_accepted_1": 0.35, "eval_decoded_accepted_2": 0.05},
]


@pytest.fixture
def plotted(monkeypatch):
    """Label → points of everything drawn."""
    drawn = {}
    plot = Axes.plot

    def record(self, steps, values, *args, label, **kwargs):
        drawn[label] = list(zip(steps, values, strict=True))
        return plot(self, steps, values, *args, label=label, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    return drawn


def test_every_logged_point_is_drawn(tmp_path, plotted):
    plot_curves(LOG, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plotted == {
        "training": [(10, 8.0), (20, 6.0)],
        "held out": [(20, 7.0)],
        "teacher-forced": [(20, 1.5)],
        "decoded": [(20, 1.4)],
        "token 1": [(20, 0.35)],
        "token 2": [(20, 0.05)],
    }


def test_without_decoding_the_teacher_forced_acceptance_is_drawn(tmp_path, plotted):
    plot_curves(LOG[:3], tmp_path / "curves.svg")
    assert plotted["token 1"] == [(20, 0.4)] and "decoded" not in plotted
    first = (tmp_path / "curves.svg").read_bytes()
    assert ElementTree.fromstring(first).tag.endswith("svg")
    plot_curves(LOG[:3], tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first


def test_panels_without_a_curve_are_left_out(tmp_path, plotted):
    plot_curves(LOG[:2], tmp_path / "curves.png")
    assert plotted.keys() == {"training"}
    with pytest.raises(TrainingDataError, match="nothing to draw"):
        plot_curves([{"step": 3, "train_runtime": 1.0}], tmp_path / "none.png")


def test_without_matplotlib_the_install_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "\.\[plot\]"'):
        plot_curves(LOG, tmp_path / "curves.png")

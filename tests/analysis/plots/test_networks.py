"""Plots of networks: their content."""

import numpy as np

from mdistiller.analysis.measures import calibration
from mdistiller.analysis.plots.networks import cka_figure, matrices_figure, reliability_figure, tsne_figure


def test_tsne_marks_ten_classes_and_greys_the_others():
    targets = np.arange(24) % 12
    figure = tsne_figure({"a": np.arange(48.0).reshape(24, 2), "b": np.ones((24, 2))}, targets)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["other classes", *map(str, range(10))]
    grey, first, *_ = figure.axes[0].collections
    assert len(grey.get_offsets()) == 4 and first.get_offsets().tolist() == [[0, 1], [24, 25]]
    looks = {(tuple(c.get_facecolor()[0]), len(c.get_paths()[0])) for c in figure.axes[0].collections[1:]}
    assert len(looks) == 10, "colour and marker together distinguish the ten"


def test_matrices_keep_their_values_and_signs():
    figure = matrices_figure({"plain": np.array([[0.0, 3]]), "signed": np.array([[-2.0, 1]])}, "x", "y", ["signed"])
    plain, signed = (ax.images[0] for ax in figure.axes[:2])
    assert plain.get_array().tolist() == [[0, 3]] and plain.get_clim() == (0, 3)
    assert signed.get_clim() == (-2, 2)


def test_cka_has_its_values_written_in():
    figure = cka_figure(np.array([[1.0, 0.25], [0.5, 0.75]]), "small", "large")
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.texts] == ["1.00", "0.25", "0.50", "0.75"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("stage of the student small", "stage of the teacher large")


def test_reliability_has_a_line_for_each_network_with_its_ece():
    logits = np.log(np.array([[0.75, 0.25], [0.75, 0.25]]))
    figure = reliability_figure({"net": calibration(logits, np.array([0, 1]), bins=10)})
    _, line = figure.axes[0].lines
    assert line.get_label() == "net, ECE 25.0 %"
    assert (line.get_xdata().round(6).tolist(), line.get_ydata().tolist()) == ([75.0], [50.0])

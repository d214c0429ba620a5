"""experiments/plot.py: what it draws is what the logs and results say; what it can't draw is said in one line."""

import json
import shutil

import numpy as np
import pytest
from conftest import trained
from matplotlib.backends.backend_agg import FigureCanvasAgg

import glue
import plot
import train


def axes_of(figure):
    """{(title or y label): axis}, of the first column where several have a label."""
    found = {}
    for axis in figure.get_axes():
        for name in (axis.get_title(), axis.get_ylabel()):
            found.setdefault(name, axis)
    return found


def lines_of(axis):
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axis.get_lines()}


@pytest.fixture(scope="session")
def scored(demo, tmp_path_factory):
    flags = "--tasks sst2,mrpc --methods single,joint,ortho --steps 6 --eval-every 2 --seeds 0,1"
    return trained(demo, tmp_path_factory.mktemp("scored") / "out", flags)[0]


@pytest.fixture
def on_the_way(scored, tmp_path):
    """A run that was scored on its way, to do with as one likes."""
    return shutil.copytree(scored, tmp_path / "out")


def test_scores_and_losses_are_the_logs(on_the_way):
    axes = axes_of(plot.draw(on_the_way))
    logs = [on_the_way / "joint" / f"seed{seed}" / "log.jsonl" for seed in (0, 1)]
    entries = [[json.loads(line) for line in path.read_text().splitlines()] for path in logs]
    expected = np.mean([[e["scores"]["sst2"] for e in log if "scores" in e] for log in entries], axis=0)
    steps, scores = lines_of(axes["sst2"])["joint"]
    assert list(steps) == [2, 4, 6] and np.allclose(scores, expected)
    assert lines_of(axes["sst2"]).keys() == {"single", "joint", "ortho"}
    losses = np.mean([[e["loss"]["sst2"] for e in log if "loss" in e] for log in entries], axis=0)
    _, drawn = axes["training loss"].get_lines()[1].get_data()
    assert drawn[3] == pytest.approx(losses[1:6].mean()) and drawn[0] == pytest.approx(losses[:3].mean())


def test_weights_lengths_and_conflicts_are_the_results(on_the_way):
    axes = axes_of(plot.draw(on_the_way))
    found = [json.loads((on_the_way / f"ortho/seed{seed}/result.json").read_text())["conflicts"] for seed in (0, 1)]
    steps, lengths = lines_of(axes["length of the gradient"])["mrpc"]
    assert np.allclose(lengths, np.mean([x["fifths"]["norms"]["mrpc"] for x in found], axis=0)) and steps[-1] < 6
    assert {"sst2", "mrpc"} < lines_of(axes["effective weight (joint: 1)"]).keys()
    layers, rates = lines_of(axes["pairs in conflict, %"])["factor B"]
    names = [name for name in found[0]["blocks"] if ".0." in name and name.endswith("B")]
    assert rates[list(layers).index(0)] == pytest.approx(
        100 * np.mean([x["blocks"][n][0] for x in found for n in names])
    )


def test_a_mean_s_lengths_and_weights_are_those_of_the_table(on_the_way, tmp_path):
    out = shutil.copytree(on_the_way, tmp_path / "mean")
    about = json.loads((out / "settings.json").read_text())
    about["settings"]["combine"] = "mean"  # as if the rows had half of each of the two tasks' gradients
    (out / "settings.json").write_text(json.dumps(about))
    for label, factor in (("length of the gradient", 2), ("effective weight (joint: 1)", 0.5)):
        sums, means = (lines_of(axes_of(plot.draw(folder))[label])["mrpc"][1] for folder in (on_the_way, out))
        assert np.allclose(means, factor * sums)


@pytest.mark.parametrize(
    ("setting", "labels"),
    [
        ({"balance": True}, {"weight after balancing", "length after balancing"}),
        ({"holdout": 50}, {"score on held-out rows"}),
    ],
)
def test_what_is_not_the_usual_is_said_on_the_axis(setting, labels, on_the_way):
    about = json.loads((on_the_way / "settings.json").read_text())
    about["settings"] |= setting
    (on_the_way / "settings.json").write_text(json.dumps(about))
    assert labels <= {axis.get_ylabel() for axis in plot.draw(on_the_way).get_axes()}


def test_without_scores_on_the_way_the_end_is_a_point_and_without_projection_there_is_no_third_row(finished, tmp_path):
    out, results = finished
    found = lines_of(axes_of(plot.draw(out))["mnli"])
    expected = np.mean([seed["tasks"]["mnli"]["score"] for seed in results["methods"]["pcgrad"].values()])
    assert found["pcgrad"][1] == pytest.approx([expected])
    plain = shutil.copytree(out, tmp_path / "plain")
    for method in ("pcgrad", "ortho"):
        shutil.rmtree(plain / method)
    assert len(plot.draw(plain).get_axes()) == 2 * 3


@pytest.mark.parametrize("name", ["plot.svg", "plot.png"])
def test_the_file_is_written_and_its_words_do_not_overlap(name, on_the_way, capsys):
    """The same run, the same bytes; and no axis label on another axis."""
    path = on_the_way / name
    assert not plot.main([str(on_the_way), "--file", str(path)])
    first = path.read_bytes()
    assert not plot.main([str(on_the_way), "--file", str(path)]) and path.read_bytes() == first
    figure = plot.draw(on_the_way)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, boxes = canvas.get_renderer(), [axis.get_window_extent() for axis in figure.get_axes()]
    for axis in figure.get_axes():
        for label in (axis.xaxis.label, axis.yaxis.label, axis.title):
            box = label.get_window_extent(renderer)
            assert not label.get_text() or not any(box.overlaps(other) for other in boxes), label.get_text()


def test_a_run_that_is_still_going_is_drawn(on_the_way):
    for path in on_the_way.rglob("result.json"):
        path.unlink()
    with open(on_the_way / "ortho" / "seed1" / "log.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # being written
    assert lines_of(axes_of(plot.draw(on_the_way))["sst2"])["ortho"][0].tolist() == [2, 4, 6]


def test_a_run_that_has_just_begun_is_drawn(on_the_way):
    for path in on_the_way.rglob("log.jsonl"):
        path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    steps, losses = axes_of(plot.draw(on_the_way))["training loss"].get_lines()[1].get_data()
    assert list(steps) == [1, 2] and losses[0] == pytest.approx(losses[1])  # each the mean of both


def test_the_end_is_drawn_where_it_was_not_scored_on_the_way(on_the_way):
    for path in on_the_way.rglob("log.jsonl"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join(x for x in lines if not ('"scores"' in x and '"step": 5' in x)) + "\n")
    drawn = [line.get_xdata().tolist() for line in axes_of(plot.draw(on_the_way))["sst2"].get_lines()]
    assert drawn == 3 * [[2, 4], [6]]


def test_there_is_a_colour_for_each_task_and_each_trained_method():
    trained = [m for m in train.METHODS.values() if not m.source or m.own]
    assert len({*plot.COLORS}) == len({*plot.DASHES}) >= max(len(glue.TRAINED), len(trained))


def test_what_can_not_be_drawn_is_said_in_one_line(on_the_way, tmp_path, capsys):
    for arguments, words in (
        ([str(tmp_path / "none")], "has no settings.json"),
        ([str(on_the_way), "--method", "joint"], "has no such projected method; it has ortho"),
        ([str(on_the_way), "--file", str(tmp_path / "x.nonsense")], "nonsense"),
        ([str(on_the_way), "--file", str(tmp_path / "no" / "x.png")], "no/x.png"),
    ):
        assert plot.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("plot.py: ") and words in error and "\n" not in error
    for method in ("single", "joint", "ortho"):
        shutil.rmtree(on_the_way / method)
    assert plot.main([str(on_the_way)]) == 2 and "nothing has been logged" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        plot.main(["."])
    assert stopped.value.code == 2 and "needs matplotlib" in capsys.readouterr().err

"""experiments/report.py: intervals against scipy's t test, words, blocks of the pages, --check."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import report  # noqa: E402

GENERATOR = np.random.default_rng(0)


def test_interval_is_the_t_tests():
    x = GENERATOR.normal(1, 2, 7)
    mean, low, high = report.interval(x)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert mean == pytest.approx(x.mean()) and (low, high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_fieller_ends_where_the_t_test_of_gain_less_theta_gap_is_at_five_percent(n):
    gap = GENERATOR.normal(5, 1, n)
    gain = 0.3 * gap + GENERATOR.normal(0, 0.5, n)
    low, high = report.fieller(gain, gap)
    for theta in (low, high):
        assert stats.ttest_1samp(gain - theta * gap, 0).pvalue == pytest.approx(0.05, abs=1e-6)
    assert low < gain.mean() / gap.mean() < high


def test_no_share_where_the_gap_may_be_zero_or_is_the_other_way_round():
    gain = np.array([0.1, 0.2, 0.3])
    assert report.fieller(gain, np.array([-1.0, 0.5, 1.0])) is None
    assert report.fieller(gain, np.array([-5.0, -5.1, -5.2])) is None
    assert report.share(gain, np.array([-1.0, 0.5, 1.0])) == "no gap to recover"


def test_words_go_as_far_as_the_interval():
    assert report.verdict((1, 0.1, 2), "up", "down", "neither") == "up"
    assert report.verdict((-1, -2, -0.1), "up", "down", "neither") == "down"
    assert report.verdict((1, -0.1, 2), "up", "down", "neither") == "neither"


def test_cosine_without_noise_of_a_known_pair():
    """Two directions at 60°, each batch's gradient the direction plus noise: the noise drops out of the ratio."""
    directions, n = np.array([[1.0, 0.0], [0.5, 3**0.5 / 2]]), 200_000
    halves = directions + GENERATOR.normal(0, 2, (2, n, 2, 2))  # (half, sample, task, coordinate)
    halves /= np.linalg.norm(halves, axis=3, keepdims=True)
    c = np.einsum("nid,njd->ij", *halves) / n
    assert abs(c[0, 1]) < 0.15  # buried in noise
    assert report.clean(c)[0, 1] == pytest.approx(0.5, abs=0.03)


def test_pages_and_results_agree():
    command = [sys.executable, "experiments/report.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_check_fails_where_a_number_of_a_page_is_changed(page, tmp_path, monkeypatch, capsys):
    for path in ROOT.glob("[!.]*"):  # a copy of the tree, but for what is looked at
        if path.name not in ("README.md", "experiments"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "results").symlink_to(ROOT / "experiments" / "results")
    text = (ROOT / page).read_text()
    block = re.search(r"<!-- experiments/results/\S+ -->\n.*?(\d+\.\d)", text, re.S)
    changed = text[: block.start(1)] + "99.9" + text[block.end(1) :]
    (tmp_path / page).write_text(changed)
    monkeypatch.setattr(report, "PAGES", [tmp_path / page])
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "experiments" / "results")
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert stopped.value.code == 1 and f"{page} differs" in capsys.readouterr().out
    assert report.embed(changed, tmp_path / page) == text  # and writing it puts the number back


def test_the_readme_shows_a_first_table_and_the_other_page_all(tmp_path, monkeypatch):
    """Links of a results file are right from where the page is; what follows <!-- more --> is on neither."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    results = tmp_path / "experiments" / "results" / "x"
    results.mkdir(parents=True)
    (results / "results.md").write_text("Two.\n\n| a |\n|---|\n| [y](y.md) |\n\nMore.\n\n<!-- more -->\n\nNo.\n")
    start, end = "<!-- experiments/results/x/results.md -->\n", "<!-- end -->"
    brief = report.embed(start + end, tmp_path / "README.md")
    whole = report.embed(start + end, tmp_path / "experiments" / "README.md")
    assert brief == f"{start}Two.\n\n| a |\n|---|\n| [y](experiments/results/x/y.md) |\n{end}"
    assert whole == f"{start}Two.\n\n| a |\n|---|\n| [y](results/x/y.md) |\n\nMore.\n{end}"
    with pytest.raises(SystemExit, match="not there"):
        report.embed("<!-- experiments/results/z/results.md -->\n<!-- end -->", tmp_path / "README.md")
    with pytest.raises(SystemExit, match="starts 1 blocks, of which 0 end"):
        report.embed(start, tmp_path / "README.md")


@pytest.mark.parametrize(
    "script, package",
    [
        ("experiments/report.py --check", "scipy"),
        ("experiments/report.py", "matplotlib"),
        ("tests/fuzz.py", "safetensors"),
        ("experiments/reproduce.py trust", "safetensors"),
    ],
)
def test_what_train_does_without_is_asked_for_in_one_line(script, package, tmp_path):
    """Before anything is written: with requirements.txt alone these scripts can't do what they are for."""
    code = (
        "import runpy, sys; sys.modules[sys.argv.pop(1)] = None\nrunpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    path, *flags = script.split() + ["--results", str(tmp_path)] * ("trust" in script)
    done = subprocess.run(
        [sys.executable, "-c", code, package, path, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "experiments"},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"needs {package}" in last and "requirements-dev.txt" in last

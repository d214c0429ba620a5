"""experiments/report.py: intervals against scipy's t test, words, blocks of the pages, --check."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import plan
import report
import reproduce

ROOT = Path(__file__).parent.parent


def test_interval_is_the_t_tests():
    x = np.random.default_rng(0).normal(1, 2, 7)
    mean, low, high = report.interval(x)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert mean == pytest.approx(x.mean()) and (low, high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_fieller_ends_where_the_t_test_of_gain_less_theta_gap_is_at_five_percent(n):
    generator = np.random.default_rng(0)
    gap = generator.normal(5, 1, n)
    gain = 0.3 * gap + generator.normal(0, 0.5, n)
    low, high = report.fieller(gain, gap)
    for theta in (low, high):
        assert stats.ttest_1samp(gain - theta * gap, 0).pvalue == pytest.approx(0.05, abs=1e-6)
    assert low < gain.mean() / gap.mean() < high


def test_no_share_where_the_gap_may_be_zero_or_is_the_other_way_round():
    gain = np.array([0.1, 0.2, 0.3])
    assert report.fieller(gain, np.array([-1.0, 0.5, 1.0])) is None
    assert report.fieller(gain, np.array([-5.0, -5.1, -5.2])) is None
    assert report.share(gain, np.array([-1.0, 0.5, 1.0])) == "no gap seen"


def test_holm_by_hand():
    """0.01 · 3 = 0.03; 0.02 · 2 = 0.04; 0.03 · 1 = 0.03, but no less than the one before it."""
    assert report.holm({"a": 0.03, "b": 0.01, "c": 0.02}) == pytest.approx({"b": 0.03, "c": 0.04, "a": 0.04})
    assert report.holm({"a": 0.6, "b": 0.7}) == {"a": 1, "b": 1}
    assert report.holm({"a": float("nan"), "b": 0.01}) == {"a": 1, "b": 0.02}


@pytest.mark.parametrize("n", [2, 3, 4, 8, 15, 60])
def test_what_could_have_been_seen_is_seen_in_four_of_five_trials(n):
    """A true difference of that size, in units of the spread: the t test's power, by scipy's noncentral t."""
    x = np.linspace(-1, 1, n)
    difference = report.detectable(x) / x.std(ddof=1)
    critical = stats.t.ppf(0.975, n - 1)
    power = 1 - stats.nct.cdf(critical, n - 1, difference * np.sqrt(n))
    assert power == pytest.approx(0.8, abs=1e-6)


def test_sign_flips_by_hand():
    """Of (3, 2, -1), sum 4, the eight sums are ±6, ±4, ±2, 0, 0: four are as far from 0. All of one sign: 2 of 2^n."""
    assert report.sign_flips(np.array([3.0, 2.0, -1.0])) == 4 / 8
    assert report.sign_flips(np.arange(1.0, 9.0)) == 2 / 2**8


def unit(seed, sst2, mrpc, experiment="toy", commonest=0.6):
    """A unit's file, as far as report.py reads it."""
    tasks = {"sst2": {"score": sst2, "accuracy": sst2 / 100, "loss": 0.5, "commonest": commonest}}
    tasks["mrpc"] = {"score": mrpc, "accuracy": mrpc / 100, "loss": 0.7, "commonest": 0.5}
    about = {"seed": seed, "data": "glue", "majority": {"sst2": 50.0, "mrpc": 70.0}}
    return about | {"results": {"joint": {"tasks": tasks}}}


def test_tables_pair_by_seed_and_take_each_task_by_itself():
    rows = {
        "single": {0: unit(0, 90, 80), 1: unit(1, 92, 79), 2: unit(2, 91, 82, commonest=1)},
        "joint": {0: unit(0, 70, 81), 1: unit(1, 74, 81), 2: unit(2, 69, 84), 3: unit(3, 0, 0)},
        "ortho": {1: unit(1, 80, 80), 2: unit(2, 78, 85)},
        "ortho, agree": {seed: unit(seed, 80, 80) for seed in range(4)},
    }
    assert report.differences(*(report.values(rows[r], "sst2") for r in ("single", "joint"))).tolist() == [20, 18, 22]
    assert report.values(rows["ortho"]) == {1: 80, 2: 81.5}
    assert report.values(rows["ortho"], "sst2", "accuracy") == {1: 80, 2: 78}
    table = report.difference_table("less joint", report.less(rows, "joint"), ["sst2", "mrpc"])
    assert [row[0] for row in table] == ["less joint", "single", "ortho, agree"]  # of ortho there are two seeds
    assert [row[-1] for row in table] == ["seeds", "3", "4"]
    rows["joint"].pop(3)
    table = report.difference_table("less joint", report.less(rows, "joint"), ["sst2", "mrpc"])
    assert [row[-1] for row in table] == ["seeds", "3", "3"]  # of the sham's four
    rows["ortho, agree"].pop(3)
    table = report.difference_table("less joint", report.less(rows, "joint"), ["sst2", "mrpc"])
    assert "seeds" not in table[0]
    mean, low, high = report.interval([20, 18, 22])
    assert table[1][1] == f"+{mean:.1f} [+{low:.1f}, +{high:.1f}]"
    assert table[1][-1] == "+0.000 [+0.000, +0.000]"  # the losses are alike
    scores = report.score_table(rows, ["sst2", "mrpc"])
    assert scores[1][:4] == ["majority class", "50.0", "70.0", "60.0"]
    assert scores[2][0] == "single" and scores[2][-2:] == ["sst2 1", "3"]
    assert "of sst2 " in report.recovered(rows, ["sst2", "mrpc"], "ortho")


def test_where_joint_mostly_says_one_class_losses_are_told_by_task():
    """Of three seeds two collapse: 0.4, 0.3, 0.2 less 0.5 each is -0.2 ± t(0.975; 2) 0.1 / √3 = 0.248."""
    joint = {seed: unit(seed, 50, 80, commonest=share) for seed, share in enumerate((1, 0.96, 0.6))}
    single = {seed: unit(seed, 90, 80) for seed in range(3)}
    for seed, loss in enumerate((0.4, 0.3, 0.2)):
        report.entry(single[seed])["tasks"]["sst2"]["loss"] = loss
    rows = {"joint": joint, "single": single, "ortho": {0: unit(0, 60, 80)}}
    (said,) = report.losses_by_task(rows, ["sst2", "mrpc"])
    expected = "sst2 -0.200 [-0.448, +0.048], mrpc +0.000 [+0.000, +0.000]"
    assert said == f"- Loss by task, `single` less joint: {expected}."
    report.entry(joint[1])["tasks"]["sst2"]["commonest"] = 0.9
    assert not report.losses_by_task(rows, ["sst2", "mrpc"])


def flat(text):
    """Without the columns' padding."""
    return re.sub(" +", " ", "\n".join(text) if isinstance(text, list) else text)


def test_merging_is_measured_against_the_same_adapters_alone():
    """sst2 loses 10, 12 and 11 points by LoRA's merging, mrpc 4; LoRI's lose 1, and nothing."""

    def of(seed, **scores):
        made = {m: unit(seed, *pair)["results"]["joint"] | {"adapter_parameters": 5000} for m, pair in scores.items()}
        return unit(seed, 0, 0) | {"results": made}

    rows = {
        "lora-merged": {
            0: of(0, **{"single": (90, 80), "lora-merged": (80, 76)}),
            1: of(1, **{"single": (91, 80), "lora-merged": (79, 76)}),
            2: of(2, **{"single": (92, 80), "lora-merged": (81, 76)}),
        },
        "lori-d-merged": {
            0: of(0, **{"lori-d": (88, 80), "lori-d-merged": (87, 80)}),
            1: of(1, **{"lori-d": (89, 80), "lori-d-merged": (88, 80)}),
            2: of(2, **{"lori-d": (90, 80), "lori-d-merged": (89, 80)}),
        },
    }
    for made in rows.values():
        for entry in (x for found in made.values() for x in found["results"].values()):
            for scores in entry["tasks"].values():
                del scores["loss"]  # as train.py's units are, which controls.py did not run
    for method, cosines in (("lora-merged", (0.1, -0.3, 0.2)), ("lori-d-merged", (0.01, -0.01, 0.01))):
        for seed, cosine in enumerate(cosines):
            rows[method][seed]["results"][method]["cosines"] = [[1.0, cosine], [cosine, 1.0]]
    _, scores, alone, merged, lost, beside, trained, cosines = map(flat, report.lori_text("one", rows))
    assert "| lori-d | -2.0 [-2.0, -2.0] | +0.0 [+0.0, +0.0] | -1.0 [-1.0, -1.0] |" in alone
    assert "| lori-d-merged | +8.0 " in merged and "| lora-merged" not in merged
    assert "| lora-merged | -11.0 " in lost and "| lori-d-merged | -1.0 [-1.0, -1.0] | +0.0 " in lost
    assert "| lori-d-merged | +10.0 [+7.5, +12.5] | +4.0 [+4.0, +4.0] | +7.0 " in beside and "| lora-" not in beside
    assert all("loss" not in table for table in (scores, alone, merged, lost, beside))  # an empty column
    assert "collapsed" not in scores  # not looked at
    assert trained == "Trained scalars of all adapters: single 5,000, lori-d 5,000."
    assert cosines.endswith("before merging: single 0.200, at most 0.300; lori-d 0.010, at most 0.010.")


def test_what_is_forgotten_is_shown_by_task():
    def of(first, before, end):
        entry = {"matrix": [[first], [before, 70.0], [end, 65.0, 50.0]]}
        entry |= {"average": (end + 115) / 3, "forgetting": (first - end + 5) / 2}
        return {"tasks": ["sst2", "mrpc", "qnli"], "results": {"any": entry}}

    rows = {"single": {0: of(90, 80, 60), 1: of(92, 82, 64)}, "lori-s": {0: of(88, 87, 86), 1: of(89, 88, 86)}}
    report.entry(rows["lori-s"][0])["overlap"] = 0.12
    _, table, apart, note = map(flat, report.continual_text("one", rows))
    assert note.startswith("Forgetting, seed by seed: single 17.5, 16.5; lori-s 3.5, 4.0. ") and "share 12 %" in note
    assert "| single | 91.0 → 81.0 → 62.0 | 70.0 → 65.0 | 50.0 | 59.0 ± 0.9 | 17.0 ± 0.7 | 2 |" in table
    gains, zero = ([26, 22], [26 / 3, 22 / 3], [-14, -12.5]), "+0.0 [+0.0, +0.0]"
    sst2, average, forgotten = (report.signed(report.interval(x), 1) for x in gains)
    assert f"| lori-s, less single | {sst2} | {zero} | {zero} | {average} | {forgotten} |" in apart
    assert "| single" not in apart and "less lori-s" not in apart
    rows["lori-d"] = rows["lori-s"]
    assert f"| lori-s, less lori-d | {zero} |" in flat(report.continual_text("one", rows)[2])


def test_mean_gradients_are_counted_pair_by_pair_and_seed_by_seed():
    """Of two tasks: conflict in one seed, agreement in the other; in the third a gradient is not there."""

    def of(cosine, error, signal, A, B):
        square = lambda x: [[1.0, x], [x, 1.0]]  # noqa: E731
        point = {"rate": 0.5, "A and B": {"signal": [9.0, signal], "cosine": square(cosine), "error": square(error)}}
        point["A and B"]["snr"] = [0.1, 0.2]
        alone = {"signal": [5.0, signal], "error": square(0.1)}
        point |= {f: alone | {"cosine": square(x)} for f, x in (("A", A), ("B", B))}
        return point | {"A less B": {"cosine": square(A - B), "error": square(0.1)}}

    points = [of(-0.5, 0.1, 4.0, -0.7, -0.4), of(0.6, 0.2, 4.0, 0.3, 0.2), of(0.9, 0.1, 2.9, 0.9, 0.9)]
    rows = {
        "rank 8": {
            seed: {"tasks": ["sst2", "mrpc"], "results": {"joint": {"points": {"25": x}}}}
            for seed, x in enumerate(points)
        }
    }
    _, table, ranks, signal, note = map(flat, report.premise_text("one", rows))
    assert "| sst2-mrpc | -0.50 ± 0.10; +0.60 ± 0.20; — |" in table
    # sizes: (0.7 + 0.3) / 2 and (0.4 + 0.2) / 2; A less B is -0.3 and 0.1, of error 0.1
    assert "| rank 8 | 25 | 2 of 3 | 1: 1, 0, 0 | 1: 0, 1, 0 | 0.50 | 0.30 | 1 of 2; 1 | 0 | 50.0 to 50.0 % |" in ranks
    assert "| rank 8, after 25 | 0.100 ± 0.000 | 0.200 ± 0.000 |" in signal
    assert "of 1 such pairs with an error, 1 are more than 2 errors from it" in note  # 0.9 ± 0.1, of a signal of 2.9


def test_a_search_marks_the_best_rate():
    rows = {"single at 0.001": {0: unit(0, 60, 80)}, "single at 0.01": {0: unit(0, 70, 70)}}
    table = report.search_table(rows, whole=True)
    assert table[0] == ["held out", "score", "0.001", "0.01", "seeds"]
    assert table[1:] == [
        ["single", "sst2", "60.0", "**70.0**", "1"],
        ["single", "mrpc", "**80.0**", "70.0", "1"],
        ["single", "average", "**70.0**", "70.0", "1"],
    ]
    rows["single at 0.01"][1] = unit(1, 90, 70)  # one rate has a seed more, so that none is the best yet
    assert report.search_table(rows, whole=False)[1] == ["single", "sst2", "60.0", "80.0", "1 to 2"]


def test_weights_and_what_is_changed():
    def of(weight, norm, removed):
        fifths = {"effective": {"sst2": [weight, 1.0], "mrpc": [1.0, 1.0]}, "norms": {"sst2": [norm], "mrpc": [2.0]}}
        made = unit(0, 60, 80)
        report.entry(made)["conflicts"] = {"rate": 0.5, "cosine": 0.1, "removed": removed, "fifths": fifths}
        return made

    rows = {"joint, balanced": {0: of(1.0, 9.0, 0.0)}, "ortho": {0: of(3.0, 0.5, 0.25), 1: of(4.0, 0.7, 0.35)}}
    rows["ortho, agree"] = {seed: of(5.0, 8.0, 0.4) for seed in (0, 1)}
    table, note = report.weight_table(rows, ["sst2", "mrpc"])
    (name, sst2, mrpc, rate, _, changed), _ = table[1:]  # joint's weights are 1
    assert (name, sst2, mrpc, rate, changed) == ("ortho", "3.5 → 1.0", "1.0 → 1.0", "50.0 %", "30 %")
    assert "`ortho`, first → last fifth: sst2 0.6 → 0.6, mrpc 2 → 2." in note and "balanced" not in note
    rows["ortho, balanced"] = {seed: of(1.2, 2.0, 0.2) for seed in (0, 1)}
    assert "Of balanced gradients, a weight comes on top" in report.weight_table(rows, ["sst2", "mrpc"])[1]


def test_the_majority_class_is_that_of_all_worlds():
    rows = {"joint": {0: unit(0, 60, 80), 1: unit(1, 60, 80) | {"majority": {"sst2": 60.0, "mrpc": 30.0}}}}
    assert report.score_table(rows, ["sst2", "mrpc"])[1][:4] == ["majority class", "55.0", "50.0", "52.5"]


def test_merges_are_searched_by_the_rate_of_what_they_are_made_of():
    names = "lori-s-merged at 0.5", "lori-s-merged at 1"

    def of(alone, *merged):
        scores = {"lori-d": 0, "lori-s": alone} | dict(zip(names, merged, strict=True))
        return {0: unit(0, 0, 0) | {"results": {m: unit(0, x, 80)["results"]["joint"] for m, x in scores.items()}}}

    rows = {"lori-s at 0.001": of(70, 60, 64), "lori-s at 0.01": of(72, 68, 66)}
    trained, merges = (report.search_table(x, whole=True) for x in report.trained_and_merged(rows))
    assert trained == [
        ["held out", "score", "0.001", "0.01", "seeds"],
        ["lori-s", "sst2", "70.0", "**72.0**", "1"],
        ["lori-s", "mrpc", "**80.0**", "80.0", "1"],
        ["lori-s", "average", "75.0", "**76.0**", "1"],
    ]
    assert merges == [
        ["held out", "score", "0.5", "1", "seeds"],
        ["lori-s-merged of 0.001", "average", "70.0", "**72.0**", "1"],
        ["lori-s-merged of 0.01", "average", "**74.0**", "73.0", "1"],
    ]


def test_a_contrast_is_shown_only_by_holm_and_only_when_it_is_whole(tmp_path, monkeypatch):
    cell = plan.Cell("", {"ortho": "", "joint": ""}, range(4))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "EXPERIMENTS", {"toy": ("", {"one": cell}), "other": ("", {"two": cell})})
    contrasts = [plan.Contrast("toy", "one", "ortho", "joint"), plan.Contrast("other", "two", "ortho", "joint")]
    monkeypatch.setattr(report, "CONTRASTS", contrasts)
    assert report.contrast_table().count("not yet: 0 of 4 seeds") == 2
    gains = np.array([1.0, 1.2, 0.9, 1.4])
    for row, gain in (("ortho", gains), ("joint", 0 * gains)):
        (tmp_path / "toy" / "units").mkdir(parents=True, exist_ok=True)
        for seed in range(4):
            found = unit(seed, 70 + gain[seed], 80 + gain[seed]) | {"cell": "one", "row": row}
            (tmp_path / "toy" / "units" / f"{row}{seed}.json").write_text(json.dumps(found))
    text = report.contrast_table()
    p = stats.ttest_1samp(gains, 0).pvalue
    assert f"| 0.12 | {2 * p:.2g} | shown |" in re.sub(" +", " ", text)  # all four of one sign: 2 of 16
    assert text.count("not yet") == 1 and "counts as p = 1" in text


@pytest.mark.parametrize("script", ["experiments/controls.py", "experiments/premise.py", "experiments/continual.py"])
def test_a_cell_that_is_half_there_does_not_stop_the_report(script, tmp_path, monkeypatch):
    """Three seeds of one row and one of the other, or none: the first is shown, or, where all are wanted, none is."""
    cell = plan.Cell("--steps 1", {"joint": "", "single": ""}, range(3), script=script)
    monkeypatch.setattr(report, "EXPERIMENTS", {"x": ("", {"one": cell})})
    (tmp_path / "x" / "units").mkdir(parents=True)
    about = dict.fromkeys(("hardware", "processor", "torch", "commit", "date"), "") | {"seconds": 1.0, "cell": "one"}
    there = [("joint", 0), ("joint", 1), ("joint", 2), ("single", 0)][: 3 if "premise" in script else 4]
    for row, seed in there:
        found = unit(seed, 70 + seed, 80) | about | {"row": row}
        (tmp_path / "x" / "units" / f"{row}{seed}.json").write_text(json.dumps(found))
    text = report.experiment_table(tmp_path / "x")
    assert ("Not there yet: `single`." if "controls" in script else f"{len(there)} of 6 units: not yet.") in text
    assert ("71.0 ± 1.0" in text) == ("controls" in script)


def test_a_cell_that_is_half_there_does_not_stop_the_figure(tmp_path, monkeypatch):
    """Three seeds of one cell, two of the other: the first is drawn."""
    cells = {name: plan.Cell("", {"joint": "", "ortho": ""}, range(3)) for name in ("one", "other")}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "CONTRASTS", [])
    monkeypatch.setattr(report, "EXPERIMENTS", {"x": ("", cells)})
    monkeypatch.setattr(report, "DIFFERENCES", {"x": (("one", "other"), ("", "sst2"))})
    (tmp_path / "x" / "units").mkdir(parents=True)
    for cell, row, seed in [(c, r, s) for c in cells for r in ("joint", "ortho") for s in range(3)]:
        if cell == "one" or seed < 2:
            made = unit(seed, 70 + seed, 80) | {"cell": cell, "row": row}
            (tmp_path / "x" / "units" / f"{cell}{row}{seed}.json").write_text(json.dumps(made))
    _, figure = report.draw({"x": ""})["x"]
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["one"]


def test_a_cell_without_single_takes_anothers_for_its_gap(tmp_path, monkeypatch):
    """sst2: joint 60, ortho 65 to 69, single 80 in the other cell: 5 to 9 of 20 points, so 35 %, as of the average."""
    cells = {
        "W = 10": plan.Cell("", {"joint": "", "ortho": ""}, range(3)),
        "W = 1": plan.Cell("", {"single": ""}, range(3)),
    }
    monkeypatch.setattr(report, "EXPERIMENTS", {"x": ("", cells)})
    (tmp_path / "x" / "units").mkdir(parents=True)
    about = dict.fromkeys(("hardware", "processor", "torch", "commit", "date"), "") | {"seconds": 1.0}
    scores = {"joint": (60, 60, 60), "ortho": (65, 69, 67), "single": (80, 80, 80)}
    for row, of_seeds in scores.items():
        for seed, x in enumerate(of_seeds):
            found = unit(seed, x, 80) | about | {"row": row, "cell": "W = 1" if row == "single" else "W = 10"}
            (tmp_path / "x" / "units" / f"{row}{seed}.json").write_text(json.dumps(found))
    text = report.experiment_table(tmp_path / "x")
    mean, low, high = 5 * np.array(report.interval([5, 9, 7]))
    assert (
        f"W = 1:\n\n- Share of the gap, `ortho`: of the average {mean:.0f} % [{low:.0f}, {high:.0f}]; of sst2" in text
    )
    shown, _, folded = text.partition("<details><summary>W = 1</summary>")
    assert shown.startswith("### W = 10") and "</details>" in folded


def test_units_of_a_cell_that_read_other_weights_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EXPERIMENTS", {"x": ("", {"one": plan.Cell("", {"joint": ""}, range(3))})})
    (tmp_path / "x" / "units").mkdir(parents=True)
    for seed, weights in enumerate((None, 7, 7)):  # the first is of before units said so
        found = unit(seed, 70, 80) | {"cell": "one", "row": "joint"}
        found |= {"checksums": {"the weights of the model": weights}} if weights else {}
        (tmp_path / "x" / "units" / f"{seed}.json").write_text(json.dumps(found))
    assert len(report.units_of(tmp_path / "x")["one"]["joint"]) == 3
    found["checksums"]["the weights of the model"] = 8
    (tmp_path / "x" / "units" / "2.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="2.json: the weights of the model is not that of other units of 'one'"):
        report.units_of(tmp_path / "x")
    for path in (tmp_path / "x" / "units").glob("*"):  # each a world of its own
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "toy 0.5"}))
    assert report.units_of(tmp_path / "x")


def test_every_unit_is_of_the_plan_as_it_stands():
    for path in report.RESULTS.glob("*/units/*.json"):
        said = json.loads(path.read_text())
        cell = plan.EXPERIMENTS[said["experiment"]][1][said["cell"]]
        unit = reproduce.Unit(said["experiment"], said["cell"], cell, said["row"], said["seed"])
        assert path == unit.path(report.RESULTS) and said["seed"] in cell.seeds
        command = shlex.join(["python", *reproduce.words(unit, "MODEL", "GLUE")])
        if said["cell"] == "search, 1600 steps":  # some are of before it was stacked: the same, to rounding
            command, said["command"] = (x.replace(" --per-task stacked", "") for x in (command, said["command"]))
        assert said["command"] == command, path


def test_a_construction_is_not_called_by_the_names_of_glue(tmp_path, monkeypatch):
    cell = plan.Cell("", {"joint": ""}, range(1))
    monkeypatch.setattr(report, "EXPERIMENTS", {"x": ("", {"one": cell})})
    (tmp_path / "x" / "units").mkdir(parents=True)
    for data, names in (("flipped 0.5", ["A", "B"]), ("glue", ["mrpc", "qqp"])):
        tasks = {task: {"score": 50.0} for task in ("mrpc", "qqp")}
        found = {"cell": "one", "row": "joint", "seed": 0, "data": data, "results": {"joint": {"tasks": tasks}}}
        (tmp_path / "x" / "units" / "one.json").write_text(json.dumps(found))
        assert list(report.entry(report.units_of(tmp_path / "x")["one"]["joint"][0])["tasks"]) == names


def test_pages_and_results_agree():
    command = [sys.executable, "experiments/report.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_fails_where_a_number_of_a_page_is_changed(tmp_path, monkeypatch, capsys):
    for path in ROOT.glob("[!.]*"):  # a copy of the tree, but for what is looked at
        if path.name not in ("README.md", "experiments"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "results").symlink_to(ROOT / "experiments" / "results")
    pages = {}
    for page in ("README.md", "experiments/README.md"):
        text = (ROOT / page).read_text()
        block = re.search(r"<!-- experiments/results/\S+ -->\n.*?(\d+\.\d)", text, re.S)
        pages[page] = text, text[: block.start(1)] + "99.9" + text[block.end(1) :]
        (tmp_path / page).write_text(pages[page][1])
    monkeypatch.setattr(report, "PAGES", [tmp_path / page for page in pages])
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "experiments" / "results")
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    said = capsys.readouterr().out
    for page, (text, changed) in pages.items():
        assert stopped.value.code == 1 and f"{page} differs" in said
        assert report.embed(changed, tmp_path / page) == text  # and writing it puts the number back


def test_the_readme_shows_a_first_table_and_the_other_page_all(tmp_path, monkeypatch):
    """Links of a results file are right from where the page is."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    results = tmp_path / "experiments" / "results" / "x"
    results.mkdir(parents=True)
    (results / "results.md").write_text("Two.\n\n| a |\n|---|\n| [y](y.md) |\n\nMore.\n")
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
def test_what_train_does_without_is_asked_for_in_one_line(script, package, tmp_path, monkeypatch, capsys):
    """Before anything is written: with requirements.txt alone these scripts can't do what they are for."""
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    path, *flags = script.split() + ["--results", str(tmp_path)] * ("trust" in script)
    monkeypatch.setattr(sys, "argv", [path, *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and f"needs {package}" in last and "requirements-dev.txt" in last

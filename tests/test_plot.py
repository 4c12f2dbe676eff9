"""Figures: what is aggregated, by hand; every picture is drawn; bad input ends in one line and exit code 2."""

import csv
import itertools
import json
import math

import numpy as np
import pytest

import plot
from harness import COLUMNS

NAN = math.nan


def write_run(folder, marks, returns, env="Hopper-v4", name="a", seed=0, phase="target", end="", **columns):
    """A run folder as a run leaves it: a row per mark, empty cells where nothing is given, then the text `end`."""
    path = folder / f"{env}__{name}__{seed}"
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "progress.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*COLUMNS, *columns])))
        writer.writeheader()
        for i, (mark, value) in enumerate(zip(marks, returns)):
            row = {"phase": phase, plot.STEPS[phase]: mark, "return_mean": value}
            writer.writerow({**row, **{key: values[i] for key, values in columns.items()}})
        file.write(end)
    return path


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def draw(folder, *flags):
    return plot.main([str(folder), *map(str, flags)])


def assert_picture(path):
    """A PNG at 200 dpi, with more than a blank page in it."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    at = data.index(b"pHYs") + 4
    assert int.from_bytes(data[at : at + 4]) == round(200 / 0.0254)


def assert_refused(capsys, *words):
    """One line on stderr, which holds these words."""
    error = capsys.readouterr().err
    assert error.startswith("plot.py: ") and error.endswith("\n") and error.count("\n") == 1
    for word in words:
        assert word in error


# ---------------------------------------------------------------------------------------------------------- aggregation


def curves(*seeds):
    return [(np.array(x, float), np.array(y, float)) for x, y in seeds]


def test_common_marks_of_unequal_lengths():
    marks, values = plot.aggregate(curves(([0, 10, 20, 30], [1, 2, 3, 9]), ([0, 10, 20], [3, 6, 5]), ([0, 10], [5, 1])))
    assert marks.tolist() == [0, 10]
    assert values.tolist() == [[1, 2], [3, 6], [5, 1]]
    mean, std = plot.statistics([values])[:2]
    assert mean.tolist() == [3, 3]
    np.testing.assert_allclose(std, [2, math.sqrt((1 + 9 + 4) / 2)])


def test_nested_grids_use_measured_values_only():
    marks, values = plot.aggregate(curves(([0, 5, 10, 15, 20], [0, 99, 1, 99, 2]), ([0, 10, 20], [4, 5, 6])))
    assert marks.tolist() == [0, 10, 20] and values.tolist() == [[0, 1, 2], [4, 5, 6]]


def test_other_grids_are_interpolated():
    marks, values = plot.aggregate(curves(([2, 4, 6, 8], [0, 20, 40, 80]), ([3, 7, 9], [1, 2, 3])))
    assert marks.tolist() == [3, 7] and values.tolist() == [[10, 60], [1, 2]]


def test_one_seed_has_no_spread():
    mean, std, iqm, low, high = plot.statistics([np.array([[1.0, 2.0]])])
    assert mean.tolist() == iqm.tolist() == [1, 2] and np.isnan([std, low, high]).all()


def test_curve_takes_its_phase_its_steps_and_the_later_of_two_rows():
    run = {"phase": np.array(["source", "target", "target", "target", "target", "target"]),
           "env_steps": np.array([0.0, 0, 20, 10, 20, 30]), "source_steps": np.array([7.0, 8, 8, 8, 8, 8]),
           "return_mean": np.array([1.0, 2, 3, 4, 5, NAN])}
    assert [a.tolist() for a in plot.curve(run, "return_mean", "target")] == [[0, 10, 20], [2, 4, 5]]
    assert [a.tolist() for a in plot.curve(run, "return_mean", "source")] == [[7], [1]]
    assert [a.tolist() for a in plot.curve(run, "return_mean", "target", all_steps=True)] == [[8, 18, 28], [2, 4, 5]]
    assert len(plot.curve(run, "q_error", "target")[0]) == 0  # of a run from before there was such a column


def table(*flags):
    return plot.plot_runs(plot.build_parser().parse_args([*map(str, flags)]))[1]


@pytest.mark.parametrize("kind", ["curves", "bars"])
def test_table(tmp_path, capsys, kind):
    write_run(tmp_path, [0, 2500, 5000], [1, 2, 3], seed=0)
    write_run(tmp_path, [0, 2500], [3, 6], seed=1)
    write_run(tmp_path, [0], [7.5], env="Ant-v4", name="b__c")
    rows = table(tmp_path, "--kind", kind)
    expected = [["Ant-v4", "b__c", 0, 7.5, NAN, 7.5, NAN, NAN, 1],
                ["Hopper-v4", "a", 0, 2, math.sqrt(2), 2, 1, 3, 2],
                ["Hopper-v4", "a", 2500, 4, math.sqrt(8), 4, 2, 6, 2]]
    if kind == "bars":
        del expected[1]
    assert [[*row[:2]] for row in rows] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2:] for row in rows], [row[2:] for row in expected])
    capsys.readouterr()
    assert draw(tmp_path, "--kind", kind) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["env", "name", "env_steps", "mean", "std", "iqm", "low", "high", "seeds"]
    assert out.splitlines()[1].split() == ["Ant-v4", "b__c", "0", "7.50", "-", "7.50", "-", "-", "1"]
    assert out.splitlines()[-2].split() == ["Hopper-v4", "a", "2500", "4.00", "2.83", "4.00", "2.00", "6.00", "2"]
    assert err == "note: Hopper-v4 a ends at 2500 of 5000 steps, as its shortest seed\n"
    assert_picture(tmp_path / f"{kind}.png")


def test_source_phase(tmp_path, capsys):
    write_run(tmp_path, [1000, 2000], [1, 2], phase="source")
    assert draw(tmp_path, "--phase", "source") == 0
    lines = [line.split()[2:4] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert lines == [["source_steps", "mean"], ["1000", "1.00"], ["2000", "2.00"]]
    assert draw(tmp_path) == 2  # it has no target rows yet
    assert_refused(capsys, "target")


def test_seeds_of_other_flags_are_named(tmp_path, capsys):
    """They are drawn, for a budget or a folder may differ; what else does is said, a flag that some lack, too."""
    for seed, more in enumerate(({"utd": 8, "lr": 1e-3}, {"utd": 4, "target_steps": 9, "out": "x"}, {"utd": 8})):
        folder = write_run(tmp_path, [0, 10], [1, 2], seed=seed)
        speed = {"dtype": "bfloat16", "precision": "medium" if seed == 1 else "high", "compile": seed == 1}
        (folder / "config.json").write_text(json.dumps({"flags": {"seed": seed, **more}, "speed": speed}))
    write_run(tmp_path, [0, 10], [1, 2], name="b")  # without config.json
    assert draw(tmp_path) == 0
    assert capsys.readouterr().err == (
        "note: Hopper-v4 a: lr is 0.001 in seed 0, not there in seeds 1, 2\n"
        "note: Hopper-v4 a: precision is high in seeds 0, 2, is medium in seed 1\n"
        "note: Hopper-v4 a: utd is 8 in seeds 0, 2, is 4 in seed 1\n")


@pytest.mark.parametrize("end", ["target,20", "target,20,,,,9,,,,,,,,,,,-1e-", "target,20,,,,9,,,,,,,,,,,\r\ntar", "\r\n"])
def test_half_written_last_line(tmp_path, end):
    write_run(tmp_path, [0, 10], [1, 2], end=end)
    assert [row[2] for row in table(tmp_path)] == ([0, 10, 20] if "\r\ntar" in end else [0, 10])


@pytest.mark.parametrize("text", ["", "phase,env_st", ",".join(COLUMNS), ",".join(COLUMNS) + "\n"])
def test_a_run_that_has_only_begun_is_left_out(tmp_path, text):
    write_run(tmp_path, [0, 10], [1, 2])
    (write_run(tmp_path, [], [], seed=1) / "progress.csv").write_text(text)
    assert [row[-1] for row in table(tmp_path)] == [1, 1]


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("ours, theirs, low, high", [(5, 5, 0.07, 0.13), (5, 3, 0.07, 0.13), (3, 3, 0.16, 0.24)])
def test_intervals_of_few_seeds_are_too_narrow(ours, theirs, low, high):
    """How often they leave out one half where the two are the same, which results/README.md says: not 5 %."""
    rng = np.random.default_rng(0)
    groups = [([rng.normal(size=(ours, 1))], [rng.normal(size=(theirs, 1))]) for _ in range(600)]
    ends = np.array([plot.interval(plot.improvement, *pair)[:, 0] for pair in groups])
    assert low < np.mean((ends[:, 0] > 0.5) | (ends[:, 1] < 0.5)) < high


def column(*values):
    """Returns of one mark, a seed a row."""
    return np.array(values, float)[:, None]


def test_iqm_by_hand():
    assert plot.iqm([column(9, 1, 5, 100, 3)]) == pytest.approx((3 + 5 + 9) / 3)  # five seeds: one cut at either end
    assert plot.iqm([column(0, 0, 90)]) == pytest.approx(30)  # of three none
    assert plot.iqm([column(1, 2, 3), column(40, 50, 60, 70, 80)]) == pytest.approx((3 + 40 + 50 + 60) / 4)


def test_improvement_by_hand():
    assert plot.improvement([column(1, 4)], [column(2, 3, 4)]) == pytest.approx((0 + 0 + 0 + 1 + 1 + 0.5) / 6)
    two_tasks = plot.improvement([column(1, 4), column(9)], [column(2, 3, 4), column(5, 6)])
    assert two_tasks == pytest.approx((2.5 / 6 + 1) / 2)  # a task counts once, however many seeds it has


def test_steps_to_reach_by_hand():
    ours = [np.array([[0.0, 4, 2, 9], [0, 6, 6, 9]])]  # means 0, 5, 4, 9
    marks = np.array([0.0, 10, 20, 30])
    for goal, step in ((-1, 0), (5, 10), (5.1, 30), (9.1, math.inf)):
        assert plot.steps_to_reach(marks, ours, [column(goal - 1, goal + 1)]) == step


def test_interval_equals_all_resamples_enumerated():
    """Two tasks of three seeds: 27 x 27 equally likely resamples, each within its task."""
    tasks = [column(1, 2, 6), column(10, 30, 31)]
    draws = [[task[list(pick)] for pick in itertools.product(range(3), repeat=3)] for task in tasks]
    exact = np.sort([plot.iqm([a, b])[0] for a, b in itertools.product(*draws)])
    low, high = plot.interval(plot.iqm, tasks, samples=100_000)
    share = [(exact < low).mean(), (exact <= low).mean(), (exact < high).mean(), (exact <= high).mean()]
    assert share[0] - 0.003 < 0.025 < share[1] + 0.003 and share[2] - 0.003 < 0.975 < share[3] + 0.003
    pooled = plot.interval(plot.iqm, [np.concatenate(tasks)])
    assert pooled[0] < low and pooled[1] > high  # without strata, tasks would be drawn as well


def test_interval_by_hand():
    assert plot.interval(plot.iqm, [column(0, 8)]).ravel().tolist() == [0, 8]  # 0, 4, 4, 8 with a quarter each
    assert np.isnan(plot.interval(plot.iqm, [column(0, 8), column(1)])).all()  # one seed tells no spread


def test_an_interval_of_steps_is_a_mark_or_never():
    """Of the resamples of two seeds, 0 and 9, a quarter reach a goal of 5; nothing between a step and inf is drawn."""
    steps = lambda *groups: plot.steps_to_reach(np.array([10.0]), *groups)
    assert plot.interval(steps, [column(0, 9)], [column(5, 5)]).ravel().tolist() == [10, math.inf]


def test_intervals_cover():
    """Of 400 experiments of ten seeds each, about 95 % of the intervals hold the true centre (a bootstrap's fewer)."""
    values = np.random.default_rng(0).normal(size=(400, 10, 1))
    low, high = np.array([plot.interval(plot.iqm, [x], samples=400) for x in values])[..., 0].T
    assert 0.86 < ((low <= 0) & (0 <= high)).mean() < 0.97


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def results(tmp_path):
    """Two environments, two groups, two seeds; `b` has no alpha; a folder that is no run."""
    for env in ("Hopper-v4", "Pusher-v5"):
        for name in ("a", "b"):
            for seed in range(2):
                more = {"alpha": [0.5, 0.4, 0.2]} if name == "a" else {}
                write_run(tmp_path / "results", [0, 2500, 5000], [-1 - seed, 2, 4 + seed], env, name, seed,
                          td_error=[3, 2, 1], **more)
    (tmp_path / "results" / "figures").mkdir()
    return tmp_path / "results"


@pytest.mark.parametrize("kind", ["curves", "bars", "alpha", "q-error"])
def test_pictures(results, kind):
    if kind == "q-error":
        write_run(results, [0, 2500], [-1, 2], q_error=[20, 10])
    assert draw(results, "--kind", kind, *([] if kind == "bars" else ["--per-seed"])) == 0
    assert_picture(results / f"{kind}.png")
    run = results / "Hopper-v4__a__0"
    assert draw(run, "--kind", kind, "--out", "new/one.pdf") == 0
    assert (run.parent.parent / "new" / "one.pdf").read_bytes()[:5] == b"%PDF-"


def figure(*flags):
    return plot.plot_runs(plot.build_parser().parse_args([*map(str, flags)]))[0]


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def test_curves_show_the_mean_the_band_and_the_seeds(results):
    ax = figure(results).axes[0]
    x, y = ax.lines[0].get_data()
    assert ax.get_title() == "Hopper-v4" and "target" in ax.get_xlabel().lower() and "thousand" in ax.get_xlabel()
    assert x.tolist() == [0, 2.5, 5] and y.tolist() == [-1.5, 2, 4.5] and len(ax.lines) == 2
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [-1.5 - math.sqrt(0.5), 4.5 + math.sqrt(0.5)])
    assert len(figure(results, "--per-seed").axes[0].lines) == 2 + 4
    lines = figure(results, "--per-seed", "--names", "a").axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [[-1.5, 2, 4.5], [-1, 2, 4], [-2, 2, 5]]
    assert figure(results, "--until", "2500").axes[0].lines[0].get_xdata().tolist() == [0, 2.5]
    whole, cut = (figure(results, *flags).axes[0].get_ylim() for flags in ([], ["--y-min", "1"]))
    assert whole[0] < -1.5 and cut == (1, whole[1])


def test_bars_show_every_seed_at_the_last_mark(results):
    ax = figure(results, "--kind", "bars").axes[0]
    assert [bar.get_height() for bar in ax.patches] == [4.5, 4.5]
    seeds = [dots.get_offsets()[:, 1].tolist() for dots in ax.collections if len(dots.get_offsets()) == 2]
    assert seeds == [[4, 5], [4, 5]] and ax.get_title() == "Hopper-v4 at 5k steps"
    write_run(results, [0, 2500], [1, 2], name="c")
    fig = figure(results, "--kind", "bars")
    assert [tick.get_text() for tick in fig.axes[0].get_xticklabels()] == ["5k", "5k", "2.5k"]  # not to be compared
    assert legend(fig) == ["a (2 seeds)", "b (2 seeds)", "c (1 seed)"]


def test_bars_reach_to_the_ends_of_what_is_drawn(results):
    """At the end 4, 5 and 9, whose interval is not about its middle."""
    write_run(results, [0, 5000], [6, 9], seed=2, name="a")
    ax = figure(results, "--kind", "bars", "--average", "iqm", "--names", "a").axes[0]
    (bar,), (_, _, (whisker,)) = ax.containers
    low, high = whisker.get_segments()[0][:, 1]
    assert (bar.get_height(), low, high) == (6, 4, 9)


def test_alpha_stands_above_the_td_error(results):
    above, below = [ax for ax in figure(results, "--kind", "alpha").axes if ax.get_subplotspec().colspan.start == 0]
    assert len(above.lines) == 1 and above.lines[0].get_ydata().tolist() == [0.5, 0.4, 0.2]  # b has none
    assert len(below.lines) == 2 and below.lines[1].get_ydata().tolist() == [3, 2, 1]
    assert above.get_shared_x_axes().joined(above, below)


def test_iqm_curves_show_the_interval(results):
    write_run(results, [0, 2500, 5000], [6, 2, 9], seed=2, name="a")
    fig = figure(results, "--average", "iqm", "--names", "a")
    assert fig.axes[0].lines[0].get_ydata().tolist() == [1, 2, 6]
    band = fig.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert [band.min(), band.max()] == [-2, 9]


def test_normalised_with_a_panel_over_all_tasks(tmp_path, capsys):
    for env, returns in (("Hopper-v4", [18.8, 3226]), ("HalfCheetah-v4", [-289.4, 10574]), ("Pusher-v5", [-50, -40])):
        for seed in range(2):
            write_run(tmp_path, [0, 2500], returns, env, seed=seed)
    write_run(tmp_path, [0, 2500], [1, 2], name="b")
    fig = figure(tmp_path, "--normalise", "td3-1m", "--average", "iqm")
    assert [ax.get_title() for ax in fig.axes] == ["HalfCheetah-v4", "Hopper-v4", "All 2 tasks"]
    assert all(ax.lines[0].get_ydata().tolist() == [0, 100] for ax in fig.axes) and len(fig.axes[2].lines) == 1
    assert "TD3 at 1M" in fig.axes[0].get_ylabel()
    assert "all tasks, as not run on each of HalfCheetah-v4, Hopper-v4: b\n" in capsys.readouterr().err
    other = figure(tmp_path, "--normalise", "d4rl-v2", "--names", "a").axes
    assert len(other) == 2 and other[0].lines[0].get_ydata()[1] == pytest.approx(100 * 10854.18 / 12415.18)


def test_all_steps_begin_after_the_source_phase(results):
    write_run(results, [0, 2500], [3, 4], name="w", source_steps=[50000, 50000])
    ax = figure(results, "--all-steps", "--names", "w", "a").axes[0]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[50, 52.5], [0, 2.5, 5]]
    assert "source and target" in ax.get_xlabel().lower()


def test_offline_bars_and_the_line(tmp_path):
    write_run(tmp_path, [5000, 10000], [1, 2], name="bc", phase="offline")
    for seed in range(2):
        write_run(tmp_path, [0, 2500], [5, 6 + 2 * seed], name="wombet", seed=seed)
    fig = figure(tmp_path, "--kind", "bars", "--phase", "offline", "--line", "wombet=WOMBET")
    ax = fig.axes[0]
    assert [bar.get_height() for bar in ax.patches[:1]] == [2] and ax.get_title() == "Hopper-v4 at 10k updates"
    line, = [line for line in ax.lines if line.get_color() == plot.LINE["color"]]
    assert line.get_ydata()[0] == 7 and legend(fig) == ["bc (1 seed)", "WOMBET, last target return"]


def test_q_error(results):
    write_run(results, [0, 2500], [3, 4], name="q", q_error=[20, -5])
    ax, = figure(results, "--kind", "q-error").axes
    line, zero = ax.lines
    assert line.get_ydata().tolist() == [20, -5] and set(zero.get_ydata()) == {0}


def test_normalised_references(results, published):
    ax, = figure(results, "--normalise", "td3-1m", "--published", published, "--reference", "sac@50000").axes
    line, = [line for line in ax.lines if line.get_color() == "#555555"]
    assert line.get_ydata()[0] == pytest.approx(100 * (530 - 18.8) / (3226 - 18.8))


def test_legend_counts_seeds_and_names_choose(results):
    write_run(results, [0, 5000], [1, 2], name="b", seed=2)
    write_run(results, [0, 5000], [1, 2], env="Ant-v4", name="c")
    assert legend(figure(results)) == ["a (2 seeds)", "b (2 to 3 seeds)", "c (1 seed)"]
    assert legend(figure(results, "--names", "c", "a=WOMBET")) == ["c (1 seed)", "WOMBET (2 seeds)"]


def test_a_method_looks_alike_in_every_figure():
    """WOMBET, its control, scratch and the online baselines, whatever stands beside them; and no two look alike."""
    some, others = plot.places(["BC", "WOMBET", "scratch"]), plot.places(["wombet", "IQL", "SAC", "control", "scratch"])
    assert some["WOMBET"] == others["wombet"] and some["scratch"] == others["scratch"]
    assert plot.places(["nothing imagined"]) == {"nothing imagined": others["control"]}
    twice = plot.places(["a", "control", "b", "nothing imagined", "WOMBET"])
    assert len(set(twice.values())) == 5 and list(twice) == ["a", "control", "b", "nothing imagined", "WOMBET"]


def test_bands_are_left_out_where_they_would_hide_each_other(results):
    for i in range(6):
        assert len(figure(results).axes[0].collections) == 2 + i
        write_run(results, [0, 5000], [1, 2], name=f"b{i}")
    assert not figure(results).axes[0].collections


def test_groups_look_different():
    looks = [plot.style(i) for i in range(28)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 28
    assert len({look["color"] for look in looks[:7]}) == 7 and len({look["marker"] for look in looks[:8]}) == 8


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text("method,env,env_steps,seeds,mean_return,std_return\nsac,Hopper-v4,50000,10,530,99\n"
                    "sac,Hopper-v4,100000,10,1104,99\nppo,Ant-v4,50000,5,1,1\n")
    return path


@pytest.mark.parametrize("kind", ["curves", "bars"])
def test_reference_lines(results, published, kind):
    fig = figure(results, "--kind", kind, "--published", published, "--reference", "SAC@50000")
    hopper, pusher = ([line for line in ax.lines if line.get_color() == "#555555"] for ax in fig.axes)
    assert [line.get_ydata()[0] for line in hopper] == [530] and not pusher
    assert legend(fig)[-1] == "sac at 50k steps (published, 10 seeds)"


def test_reference_curve_ends_where_the_runs_do(results, published):
    fig = figure(results, "--published", published, "--reference", "sac")
    hopper, pusher = ([line for line in ax.lines if line.get_color() == "#555555"] for ax in fig.axes)
    end = max(line.get_xdata()[-1] for line in fig.axes[0].lines if line not in hopper)
    x, y = hopper[0].get_data()
    assert x[-1] == end and y[-1] == pytest.approx(np.interp(end, [50, 100], [530, 1104])) and not pusher
    assert legend(fig)[-1] == "sac (published, 10 seeds)"


@pytest.mark.parametrize("flags, scale", [([], 1), (["--normalise", "td3-1m"], 100 / (3226 - 18.8))])
def test_a_reference_curves_band_is_its_standard_deviation(results, published, flags, scale):
    write_run(results, [0, 60000], [3, 4], name="c")
    ax = figure(results, "--published", published, "--reference", "sac", "--names", "c", *flags).axes[0]
    band, = [area for area in ax.collections if np.allclose(area.get_facecolor()[0, :3], 0x55 / 255)]
    at_50 = [y for x, y in band.get_paths()[0].vertices if x == 50]
    assert max(at_50) - min(at_50) == pytest.approx(2 * 99 * scale)


def test_spearman_by_hand():
    x = np.array([1.0, 2, 3, 4, 5])
    assert plot.spearman(x, x**3) == pytest.approx(1) and plot.spearman(x, -np.exp(x)) == pytest.approx(-1)
    assert plot.spearman(x, np.array([2.0, 1, 4, 3, 5])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    tied = np.array([7.0, 7, 8, 9])  # ranks 1.5, 1.5, 3, 4
    assert plot.spearman(tied, x[:4]) == pytest.approx(math.sqrt(0.9))
    assert math.isnan(plot.spearman(x, np.ones(5)))


def test_binned_median_by_hand():
    x = np.arange(40.0)[::-1]
    mid_x, mid_y = plot.binned_median(x, 2 * x)
    assert mid_x.tolist() == [9.5, 29.5] and mid_y.tolist() == [19, 59]


def test_model_error(tmp_path):
    u = np.linspace(0.1, 1, 100)
    for seed, error in enumerate((u, u**2)):
        path = tmp_path / f"Hopper-v4__a__{seed}"
        path.mkdir()
        np.savetxt(path / "model_error.csv", np.stack([u, error], 1), delimiter=",", header="u,error", comments="")
    assert draw(tmp_path, "--kind", "model-error") == 0
    assert_picture(tmp_path / "model-error.png")
    ax = plot.plot_model_error(plot.build_parser().parse_args([str(tmp_path)]))[0].axes[0]
    rho = plot.spearman(np.r_[u, u], np.r_[u, u**2])
    assert 0.5 < rho < 0.95 and f"= {rho:.2f}, n = 200" in ax.get_title()


# -------------------------------------------------------------------------------------------------------------- summary


def test_summary(tmp_path, published):
    for env, shift in (("Hopper-v4", 0), ("HalfCheetah-v4", 3)):
        for seed in range(2):
            write_run(tmp_path / "fig2", [0, 2500, 5000], [1, 5 + seed, 9 + seed], env, "wombet", seed,
                      q_error=[3, 2, 1], length_mean=[9, 10 + seed, 20])
            write_run(tmp_path / "fig2", [2500, 5000, 10000], [0, 1, 5 + seed - shift], env, "sac", seed)
    write_run(tmp_path / "fig2", [5000, 10000, 15000, 20000], [2, 8, 9.5, 0], name="ppo")
    write_run(tmp_path / "fig2", [5000], [2], name="scratch")  # as older runs, without step 0
    for name in ("stand", "stand-new", "stand-control", "backward"):
        write_run(tmp_path / "shift", [0, 5000], [1, 2], name=name)
    write_run(tmp_path / "shift", [10000], [1], name="stand-bc", phase="offline")
    for topic, *names in (("parts", "model", "data", "first"), ("preset", "preset", "preset-scratch")):
        for name in names:
            write_run(tmp_path / topic, [0, 5000], [1, 2], name=name)
    write_run(tmp_path / "fig4", [0, 5000], [5, 20], name="iql")
    for seed in range(2):
        write_run(tmp_path / "control", [0, 2500, 5000], [1, 7, 10], name="control", seed=seed, length_mean=[9, 9, 31])
    write_run(tmp_path / "fig4", [10000], [5], name="iql", seed=1, phase="offline")
    assert draw(tmp_path, "--kind", "summary", "--published", published) == 0
    header, *rows = read_table(tmp_path / "summary.csv")
    assert header == ["topic", "phase", "env", "method", "quantity", "step", *plot.MEASURES, "seeds"]
    found = {tuple(row[:6]): row[6:] for row in rows}
    assert len(found) == len(rows)
    hopper = found["fig2", "target", "Hopper-v4", "wombet", "return", "5000"]
    assert [float(x) for x in hopper] == pytest.approx([9.5, math.sqrt(0.5), 9.5, 9, 10, 2])
    assert found["fig2", "target", "Hopper-v4", "wombet", "q_error", "0"][0] == "3"
    assert found["fig4", "offline", "Hopper-v4", "iql", "return", "10000"] == ["5", "", "5", "", "", "1"]
    assert found["published", "target", "Hopper-v4", "sac", "return", "50000"] == ["530", "99", "", "", "", "10"]
    both = found["fig2", "target", "HalfCheetah-v4+Hopper-v4", "wombet", "normalised by td3-1m", "0"]
    each = [100 * (1 + 289.4) / (10574 + 289.4), 100 * (1 - 18.8) / (3226 - 18.8)]
    assert float(both[0]) == pytest.approx(np.mean(each)) and both[1] == ""  # tasks are no seeds

    def compared(topic, env, words, step):
        return found[topic, "target", env, "wombet", words, step]

    assert compared("fig2", "Hopper-v4", "probability of improvement on sac@5000", "5000")[0] == "1"
    assert compared("fig2", "Hopper-v4", "probability of improvement on sac@10000", "5000")[0] == "1"
    assert compared("fig2", "HalfCheetah-v4+Hopper-v4", "probability of improvement on sac@5000", "5000")[3] == "1"
    # of a longer run at twice and at three times our steps, too
    assert [compared("fig2", "Hopper-v4", f"probability of improvement on ppo@{step}", "5000")[0]
            for step in (5000, 10000, 15000, 20000)] == ["1", "1", "0.5", "1"]
    # sac ends at 5.5, what wombet's mean is at 2,500; on HalfCheetah at 2.5, which one of 5 and 6 reaches too
    assert compared("fig2", "Hopper-v4", "steps to reach sac@10000", "5000") == ["2500", "", "", "2500", "5000", "2"]
    assert compared("fig2", "HalfCheetah-v4", "steps to reach sac@10000", "5000")[0] == "2500"
    # means over the marks after the first step: returns 7 and 8, lengths 15 and 15.5, of the control 8.5 and 20
    over = found["fig2", "target", "Hopper-v4", "wombet", "return over the marks", "5000"]
    assert [float(x) for x in over] == pytest.approx([7.5, math.sqrt(0.5), 7.5, 7, 8, 2])
    assert found["control", "target", "Hopper-v4", "control", "length over the marks", "5000"][0] == "20"
    words = "probability of a higher {} over the marks than {}"
    assert compared("control", "Hopper-v4", words.format("return", "control"), "5000")[0] == "0"
    assert compared("control", "Hopper-v4", words.format("length", "control"), "5000") == ["0", "", "", "0", "0", "2"]
    assert not any("than sac" in key[4] for key in found)  # which was evaluated at other steps
    assert found["shift", "target", "Hopper-v4", "stand", words.format("return", "scratch"), "5000"][0] == "0.5"
    # fig4 has no wombet of its own: fig2's; it never reaches 20
    assert compared("fig4", "Hopper-v4", "steps to reach iql@5000", "5000")[0] == "inf"
    assert compared("fig4", "Hopper-v4", "probability of improvement on iql@5000", "5000")[0] == "0"
    # offline it counts updates: the end against the end
    offline = [key for key in found if key[1] == "offline" and "iql@" in key[4]]
    assert [key[3:] for key in offline] == [("wombet", "probability of improvement on iql@10000", "5000"),
                                            ("wombet", "steps to reach iql@10000", "5000")]
    # under a shift an agent is compared with all of the same source, and with scratch
    assert {(key[1], *key[3:5]) for key in found if key[0] == "shift" and "improvement" in key[4]} == {
        *(("target", name, f"probability of improvement on {rival}@5000") for name, *rivals in (
            ("stand", "stand-new", "stand-control", "scratch"), ("stand-new", "stand", "stand-control", "scratch"),
            ("backward", "scratch"), ("stand-control", "scratch")) for rival in rivals),
        *(("offline", name, "probability of improvement on stand-bc@10000") for name in ("stand", "stand-new"))}
    # so are new agents, to which one thing crosses
    assert {key[3:5] for key in found if key[0] == "parts" and "improvement" in key[4] and key[3] != "wombet"} == {
        (name, f"probability of improvement on {rival}@5000") for name, rival in (
            ("model", "data"), ("model", "first"), ("model", "scratch"), ("data", "scratch"), ("first", "scratch"))}
    # and the literal paper's, beside WOMBET, with its own agent from scratch
    assert {key[3:5] for key in found if key[0] == "preset" and "improvement" in key[4] and key[3] != "wombet"} == {
        ("preset", f"probability of improvement on {rival}@5000") for rival in ("preset-scratch", "scratch")}
    before = (tmp_path / "summary.csv").read_text()
    assert draw(tmp_path, "--kind", "summary", "--published", published) == 0
    assert (tmp_path / "summary.csv").read_text() == before


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", ["curves", "bars", "alpha", "model-error"])
def test_no_runs(tmp_path, capsys, kind):
    assert draw(tmp_path, "--kind", kind) == 2
    assert_refused(capsys, "no runs found", str(tmp_path))
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("text, words", [
    ("phase,return_mean\ntarget,1\n", ["no column env_steps"]),
    (",".join(COLUMNS) + "\ntarget,1,2\n", ["line 2", "3 cells"]),
    (",".join(COLUMNS) + "\n" + "target,0,,,,x" + (len(COLUMNS) - 6) * "," + "\ntarget,1\n", ["line 2", "'x'"]),
    ("\x00\x01\nPNG\n", ["no column phase"])])
def test_malformed_csv(tmp_path, capsys, text, words):
    path = write_run(tmp_path, [], []) / "progress.csv"
    path.write_text(text)
    assert draw(tmp_path) == 2
    assert_refused(capsys, "malformed CSV", str(path), *words)


@pytest.mark.parametrize("wanted", ["td3@50000", "sac@50001", "ppo", "ppo@50000"])
def test_unknown_reference(results, published, capsys, wanted):
    assert draw(results, "--published", published, "--reference", "sac@50000", wanted) == 2
    assert_refused(capsys, f"unknown reference {wanted}", "Hopper-v4")


def test_bars_take_no_published_curve(results, published, capsys):
    assert draw(results, "--kind", "bars", "--published", published, "--reference", "sac") == 2
    assert_refused(capsys, "unknown reference sac", "METHOD@STEPS")


@pytest.mark.parametrize("flags, word", [
    (["--reference", "sac@50000"], "--published"), (["--names", "a", "z"], "no run is named z"),
    (["--published", "none.csv", "--reference", "sac@1"], "none.csv"), (["--out", "picture.xyz"], "xyz"),
    (["--kind", "summary", "--names", "a"], "--names"), (["--kind", "summary", "--phase", "offline"], "--phase"),
    (["--kind", "model-error", "--average", "iqm"], "--average"), (["--kind", "bars", "--per-seed"], "--per-seed"),
    (["--kind", "bars", "--y-min", "0"], "--y-min"), (["--y-min", "9"], "--y-min 9"),
    (["--kind", "summary", "--until", "9"], "--until"), (["--until", "-1"], "nothing to draw"),
    (["--kind", "summary", "--all-steps"], "--all-steps"), (["--published", "none.csv"], "--reference"),
    (["--line", "a"], "--line"), (["--kind", "bars", "--line", "z"], "no run is named z"),
    (["--kind", "alpha", "--normalise", "td3-1m"], "--normalise"),
    (["--all-steps", "--phase", "offline"], "--all-steps"), (["--kind", "q-error"], "nothing to draw"),
    (["--kind", "alpha", "--phase", "source"], "nothing to draw"), (["--kind", "pie"], "--kind")])
def test_other_bad_input(results, capsys, flags, word):
    assert draw(results, *flags) == 2
    assert_refused(capsys, word)


def test_two_topics_of_one_name_are_refused(tmp_path, capsys):
    """One would take the other's place in the summary without a word."""
    for place in ("a", "b"):
        write_run(tmp_path / place / "fig2", [100], [1.0])
    assert draw(tmp_path / "a", tmp_path / "b", "--kind", "summary") == 2
    assert_refused(capsys, "two topics are of one name", "fig2")


def test_a_name_with_an_equals_sign(results, capsys):
    """--name may have one; what --names puts behind it is a label."""
    write_run(results, [100, 200], [1.0, 2.0], name="lr=3e-4")
    assert draw(results) == 0 and "lr=3e-4" in capsys.readouterr().out


def test_one_run_is_not_counted_twice(results, capsys):
    assert draw(results, results / "Hopper-v4__a__0") == 2
    assert_refused(capsys, "two runs are named Hopper-v4__a__0")


def test_one_label_for_two_names_is_refused(results, capsys):
    """Their runs would be drawn as seeds of one."""
    write_run(results, [100, 200], [1.0, 2.0], name="b")
    assert draw(results, "--names", "a=A", "b=A") == 2
    assert_refused(capsys, "a and b", "A")


@pytest.mark.parametrize("name", ["Hopper-v4__0", "old", "Hopper-v4__a__0.bak"])
def test_a_folder_of_another_name_is_named(tmp_path, capsys, name):
    """A backup, say, which else would count as one more seed."""
    write_run(tmp_path, [0], [1]).rename(tmp_path / name)
    assert draw(tmp_path) == 2
    assert_refused(capsys, name)


@pytest.mark.parametrize("text", ["", "[]", '{"flags": null}', '{"speed": 3}'])
def test_a_damaged_config_is_named(tmp_path, capsys, text):
    (write_run(tmp_path, [0], [1]) / "config.json").write_text(text)
    assert draw(tmp_path) == 2
    assert_refused(capsys, "config.json")


@pytest.mark.parametrize("out, word", [
    ("file/a.png", "file"), ("folder.png", "folder.png"), ("a.jpeg", ".png or .pdf"), ("noending", ".png"),
    (300 * "a" + ".png", "too long"), ("/proc/none/a.png", "/proc"), ("/proc/a.png", "/proc")])
def test_what_cannot_be_written_is_refused_before_the_work(results, capsys, monkeypatch, out, word):
    (results / "file").write_text("kept")
    (results / "folder.png").mkdir()
    monkeypatch.setattr(plot, "read_columns", lambda *args: pytest.fail("began to read"))
    before = sorted(results.rglob("*"))
    assert draw(results, "--out", results / out) == 2
    assert_refused(capsys, "cannot write", word)
    assert sorted(results.rglob("*")) == before and (results / "file").read_text() == "kept"


def test_a_summary_is_csv_and_a_refused_one_leaves_the_old(results, capsys):
    assert draw(results.parent, "--kind", "summary", "--out", results / "s.png") == 2
    assert_refused(capsys, "cannot write", ".csv")
    (results / "s.csv").write_text("old")
    assert draw(results / "figures", "--kind", "summary", "--out", results / "s.csv") == 2
    assert_refused(capsys, "no runs found")
    assert (results / "s.csv").read_text() == "old"


def test_a_folder_that_is_not_there_is_not_made(tmp_path, capsys):
    assert draw(tmp_path / "typo") == 2
    assert_refused(capsys, "no runs found", "typo")
    assert not (tmp_path / "typo").exists()


def test_an_interval_needs_two_seeds_of_every_group():
    """Nor is a spread known where the rival alone has one seed."""
    assert np.isnan(plot.interval(plot.improvement, [column(1, 2, 3)], [column(2)])).all()
    assert np.isnan(plot.interval(plot.improvement, [column(2)], [column(1, 2, 3)])).all()


def test_steps_to_reach_are_of_the_mean_not_of_the_iqm():
    assert plot.steps_to_reach(np.array([10.0]), [column(0, 0, 0, 8)], [column(1, 1)]) == 10  # mean 2, iqm 0


def test_a_summary_counts_the_fewest_seeds_and_compares_within_a_topic(tmp_path):
    for env, seeds in (("HalfCheetah-v4", 3), ("Hopper-v4", 2)):
        for seed in range(seeds):
            write_run(tmp_path / "fig2", [0, 5000], [1, 9], env, "wombet", seed)
    write_run(tmp_path / "fig2", [0, 5000], [1, 2], name="sac")
    write_run(tmp_path / "own", [0, 5000], [1, 3], name="wombet")  # of this topic, which is below iql
    write_run(tmp_path / "own", [0, 5000], [1, 5], name="iql")
    assert draw(tmp_path, "--kind", "summary") == 0
    found = {tuple(row[:6]): row[6:] for row in read_table(tmp_path / "summary.csv")}
    both = found["fig2", "target", "HalfCheetah-v4+Hopper-v4", "wombet", "normalised by td3-1m", "5000"]
    ours, own = (found[topic, "target", "Hopper-v4", "wombet", f"probability of improvement on {rival}@5000", "5000"]
                 for topic, rival in (("fig2", "sac"), ("own", "iql")))
    assert both[-1] == "2" and ours[0] == "1" and ours[-1] == "1" and own[0] == "0"


def test_a_bad_line_before_a_half_written_one_is_refused(tmp_path, capsys):
    path = write_run(tmp_path, [0], [1]) / "progress.csv"
    path.write_text(path.read_text() + "target,10,x\ntarget,2")
    assert draw(tmp_path) == 2
    assert_refused(capsys, "malformed CSV", "line 3")


def test_a_table_that_begins_with_a_byte_order_mark(tmp_path):
    """As spreadsheets save one."""
    path = tmp_path / "published.csv"
    path.write_text("method,seeds\nsac,5\n", encoding="utf-8-sig")
    assert plot.read_columns(path, ("method",), ("method",))["method"].tolist() == ["sac"]


def test_medians_are_of_twenty_bins_at_most():
    x = np.arange(1000.0)
    assert len(plot.binned_median(x, x)[0]) == 20


def test_the_correlation_is_over_all_points_that_are_finite(tmp_path):
    """Also over those that log axes cannot show; not over one without an error."""
    u, error = np.linspace(0.1, 1, 50), np.linspace(0.1, 1, 50) ** 2
    u, error = np.r_[u, np.zeros(50), 5], np.r_[error, np.linspace(1, 2, 50), np.nan]
    path = tmp_path / "Hopper-v4__a__0"
    path.mkdir()
    np.savetxt(path / "model_error.csv", np.stack([u, error], 1), delimiter=",", header="u,error", comments="")
    ax = plot.plot_model_error(plot.build_parser().parse_args([str(tmp_path)]))[0].axes[0]
    assert f"= {plot.spearman(u[:-1], error[:-1]):.2f}, n = 100" in ax.get_title()


def test_a_note_on_the_shortest_of_all_tasks(tmp_path, capsys):
    for env, marks in (("HalfCheetah-v4", [0, 2500]), ("Hopper-v4", [0, 2500, 5000])):
        write_run(tmp_path, marks, marks, env)
    plot.collect(plot.find_runs([tmp_path], "progress.csv"), ["normalised"], "target", "td3-1m")
    assert "HalfCheetah-v4+Hopper-v4 a ends at 2500 of 5000 steps" in capsys.readouterr().err

"""Every figure and every number, from the CSV files that runs leave.

    python plot.py results/fig2                       learning curves, results/fig2/curves.png, and their table
    python plot.py results/fig2 --normalise td3-1m --average iqm         normalised, with a panel over all tasks
    python plot.py results/fig2 --all-steps           the same over source and target steps together
    python plot.py results/fig2 --published results/published_curves.csv --reference sac@50000
    python plot.py results/fig3 results/fig2 --kind bars --phase offline --line wombet     offline, and WOMBET's line
    python plot.py results/fig5 --kind alpha          alpha and TD error over target steps; likewise q-error
    python plot.py runs/fig2 --kind model-error       u against the model's true error, from model_error.csv
    python plot.py results --kind summary --published results/published_curves.csv --out results/summary.csv

A run is a folder <env>__<name>__<seed>: an environment is a panel, runs that share <name> are a group. A group is drawn
as the mean over its seeds with one sample standard deviation (n - 1) on each side, or as the interquartile mean with
its 95 % stratified bootstrap interval (Agarwal et al. 2021, rliable). More than seven groups are drawn without bands,
which would hide each other.
"""

import argparse
import csv
import functools
import itertools
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure  # without pyplot: no window, no display
from matplotlib.lines import Line2D

# Okabe and Ito's colour-blind-safe palette, less its yellow, which is faint on white; then four of Paul Tol's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
           "#882255", "#999933", "#888888", "#332288")
# which of the looks a method has in every figure
LOOKS = {"wombet": 0, "control": 1, "nothing imagined": 1, "scratch": 2, "sac": 3, "td3": 4, "ppo": 5}
LINES = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = "osD^vPX*"
STYLE = {"font.size": 9, "axes.titlesize": 10, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8.5,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
         "grid.linewidth": 0.6, "axes.axisbelow": True, "pdf.fonttype": 42}
# the column that counts a phase's steps
STEPS = {"target": "env_steps", "source": "source_steps", "offline": "updates"}
MEASURES = ("mean", "std", "iqm", "low", "high")  # the last two: the 95 % interval of iqm
PUBLISHED = ("method", "env", "env_steps", "seeds", "mean_return", "std_return")
XLABEL = {"target": "Target environment steps (thousands)", "source": "Source environment steps (thousands)",
          "offline": "Updates before the first step (thousands)"}
DRAWN = ("curves", "bars")
COLUMNS = {"curves": {"return_mean": "Evaluation return"}, "bars": {"return_mean": "Evaluation return"},
           "alpha": {"alpha": r"Share of $D_S$, $\alpha$", "td_error": "TD error (reward)"},
           "q-error": {"q_error": "q_error: $Q(s_0, a_0)$ less\nthe discounted return"}}
# published returns that count as 0 and 100: a random policy's and a good one's
SCALES = {"td3-1m": ("TD3 at 1M steps", {"HalfCheetah-v4": (-289.4, 10574), "Hopper-v4": (18.8, 3226),
                     "Walker2d-v4": (2.8, 3946), "Ant-v4": (-70.3, 3942), "Humanoid-v4": (120.4, 5165)}),
          "d4rl-v2": ("D4RL's expert, v2", {"HalfCheetah-v4": (-280.18, 12135), "Hopper-v4": (-20.27, 3234.3),
                      "Walker2d-v4": (1.63, 4592.3), "Ant-v4": (-325.6, 3879.7)})}


def build_parser():
    def error(message):  # argparse's own prints the usage too
        raise ValueError(message)

    parser = argparse.ArgumentParser(description="Draw the figures, and sum up the numbers, from run folders.")
    parser.error = error
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run folder, or a folder of run folders")
    parser.add_argument("--kind", default="curves", choices=(*COLUMNS, "model-error", "summary"),
                        help="the figure (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="picture, .png, .pdf or .svg (default: <FOLDER>/<kind>.png); "
                        "of summary: <FOLDER>/summary.csv")
    parser.add_argument("--names", nargs="+", metavar="NAME[=LABEL]", help="these groups only, in this order, under "
                        "these labels (default: all, by name)")
    parser.add_argument("--phase", default="target", choices=tuple(STEPS), help="the phase drawn, over its own steps "
                        "(default: %(default)s)")
    parser.add_argument("--all-steps", action=argparse.BooleanOptionalAction, default=False, help="target phase: x is "
                        "source and target steps together")
    parser.add_argument("--until", type=float, default=math.inf, metavar="STEPS", help="leave out what comes later")
    parser.add_argument("--average", default="mean", choices=("mean", "iqm"), help="mean and standard deviation, or "
                        "interquartile mean and 95 %% bootstrap interval (default: %(default)s)")
    parser.add_argument("--normalise", choices=tuple(SCALES), help="curves, bars: 0 is a random policy, 100 is "
                        "published " + ", ".join(f"{words} ({key})" for key, (words, _) in SCALES.items()) + "; with "
                        "--average iqm, a panel over all tasks")
    parser.add_argument("--line", metavar="NAME[=LABEL]", help="bars: a line at this group's last target return")
    parser.add_argument("--per-seed", action=argparse.BooleanOptionalAction, default=False,
                        help="not bars: a thin line for each seed too")
    parser.add_argument("--y-min", type=float, metavar="VALUE", help="curves, q-error: where the y axis begins; what "
                        "is below is not seen, such as the return of a source agent that runs the other way")
    parser.add_argument("--published", metavar="FILE", help="CSV of known results, for --reference and summary; "
                        "its columns: " + ", ".join(PUBLISHED))
    parser.add_argument("--reference", nargs="+", default=[], metavar="METHOD[@STEPS]", help="curves, bars: a "
                        "horizontal line at that method's published mean return after so many environment steps; "
                        "curves, without @STEPS: its published curve, with its standard deviation")
    return parser


# ------------------------------------------------------------------------------------------------------------ reading


def read_columns(path, needed, words=()):
    """A CSV file -> {column: array (rows,)}, floats except `words`; an empty cell is nan, a half-written end is cut."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    lines, whole = text.splitlines(), text.endswith("\n")
    if len(lines) < 2 and not whole:  # a run that has only just opened its file
        return {column: np.empty(0) for column in needed}
    header = lines[0].split(",")
    missing = [column for column in needed if column not in header]
    if missing:
        raise ValueError(f"malformed CSV {path}: no column {missing[0]}")
    rows = []
    for number, cells in enumerate(csv.reader(lines[1:]), 2):
        try:
            if len(cells) not in (0, len(header)):
                raise ValueError(f"{len(cells)} cells under {len(header)} columns")
            if cells:
                rows.append([c if h in words else float(c or "nan") for h, c in zip(header, cells)])
        except ValueError as error:
            if number == len(lines) and not whole:  # the run is writing this line now
                break
            raise ValueError(f"malformed CSV {path}: line {number}: {error}") from None
    return {column: np.array([row[i] for row in rows]) for i, column in enumerate(header)}


def find_runs(folders, filename, names=None):
    """[(env, label, path of `filename`)] of the run folders among `folders` and just below them, in `names`' order."""
    runs = {}
    candidates = [[folder / filename, *sorted(folder.glob(f"*/{filename}"))] for folder in map(Path, folders)]
    for path in filter(Path.is_file, sum(candidates, [])):
        parts = path.resolve().parent.name.split("__")
        if len(parts) < 3 or not parts[-1].isdecimal():
            raise ValueError(f"{path.parent} is not named <env>__<name>__<seed>: name it so, or move it away")
        runs.setdefault((parts[0], "__".join(parts[1:-1]), parts[-1]), []).append(path)
    if not runs:
        raise ValueError(f"no runs found: no {filename} in {', '.join(map(str, folders))} or in its subfolders")
    known = sorted({name for _, name, _ in runs})
    split = (item.partition("=") for item in names or ())
    labels = {name: label or name for name, _, label in split} or {name: name for name in known}
    for name in labels:
        if name not in known:
            raise ValueError(f"no run is named {name}: there are {', '.join(known)}")
    for label in labels.values():
        if len(same := [name for name in labels if labels[name] == label]) > 1:
            raise ValueError(f"--names calls {' and '.join(same)} {label}: give each a label of its own")
    for key, paths in runs.items():
        if key[1] in labels and len(paths) > 1:
            raise ValueError(f"two runs are named {'__'.join(key)}: plot one folder of them")
    found = [(env, label, path) for wanted, label in labels.items() for (env, name, _), (path, *_) in runs.items()
             if name == wanted]
    for line in sorted(mixed_flags(found)):
        print(f"note: {line}", file=sys.stderr)
    return found


# flags in which the seeds of a group may differ
MAY_DIFFER = ("seed", "out", "name", "source_run", "dataset", "offline_data", "device", "threads", "fast", "eval_every",
              "checkpoint_every", "target_steps", "online_steps")


def mixed_flags(runs):
    """A line for each flag, and each precision of products, that is not the same in all seeds of a group, by their
    config.json."""
    groups, lines = {}, set()
    for env, label, path in runs:
        if (file := path.with_name("config.json")).exists():
            try:
                config = json.loads(file.read_text())
                flags = {**config.get("flags", {}), **config.get("speed", {})}
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
            flags.pop("compile", None)
            groups.setdefault((env, label), {})[path.resolve().parent.name.split("__")[-1]] = flags
    for (env, label), seeds in groups.items():
        for key in set().union(*seeds.values()) - set(MAY_DIFFER):
            values = {}
            for seed, flags in seeds.items():
                values.setdefault(f"is {flags[key]}" if key in flags else "not there", []).append(seed)
            if len(values) > 1:
                parts = (f"{value} in seed{'s' * (len(has) > 1)} {', '.join(has)}" for value, has in values.items())
                lines.add(f"{env} {label}: {key} {', '.join(parts)}")
    return lines


def curve(run, column, phase, all_steps=False, until=math.inf):
    """Steps (k,) up to `until`, ascending, and values (k,) of a column; where a resumed run repeats a mark, the later
    row stands."""
    steps, values = run[STEPS[phase]], run.get(column, np.full(len(run["phase"]), np.nan))
    if all_steps:
        steps = steps + np.nan_to_num(run["source_steps"])
    keep = (run["phase"] == phase) & np.isfinite(steps) & np.isfinite(values) & (steps <= until)
    points = sorted(dict(zip(steps[keep], values[keep])).items())
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def aggregate(curves):
    """Curves of S seeds -> marks (m,), values (S, m).

    The marks are those of the seed that has fewest inside the span that all seeds cover, so where one grid holds the
    other no value is made up; a seed that was not evaluated at such a mark is interpolated linearly.
    """
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    inside = [x[(x >= first) & (x <= last)] for x, _ in curves]
    marks = min((x for x in inside if len(x)), key=len, default=np.empty(0))
    return marks, np.stack([np.interp(marks, x, y) for x, y in curves])


def collect(runs, columns, phase, scale, all_steps=False, until=math.inf):
    """Runs -> {env: {label: {column: (marks (m,), group)}}}, group a list of one array (S, m) a task; a run without
    values of a column is left out.

    The column "normalised" is return_mean, of which SCALES[scale] counts as 0 and 100. Of it there is an entry over
    all tasks too, under their names joined by "+", for each label that has run on all of them.
    """
    curves, groups, notes = {}, {}, set()
    for env, label, path in runs:
        data = read_columns(path, ("phase", STEPS[phase], *["source_steps"] * all_steps), ("phase",))
        if env in SCALES[scale][1] and "return_mean" in data:
            data["normalised"] = normalise(data["return_mean"], *SCALES[scale][1][env])
        for column in columns:
            points = curve(data, column, phase, all_steps, until)
            if len(points[0]):
                curves.setdefault((env, label, column), [[]])[0].append(points)
    scaled = [(env, label) for env, label, column in curves if column == "normalised"]
    tasks = sorted({env for env, _ in scaled})
    missing = []
    for label in dict.fromkeys(label for _, label in scaled) if len(tasks) > 1 else ():
        if all((env, label) in scaled for env in tasks):
            curves["+".join(tasks), label, "normalised"] = [curves[env, label, "normalised"][0] for env in tasks]
        else:
            missing.append(label)
    if missing:
        notes.add(f"left out of what is over all tasks, as not run on each of {', '.join(tasks)}: {', '.join(missing)}")
    for (env, label, column), seeds in curves.items():
        flat = sum(seeds, [])
        marks, values = aggregate(flat)
        if not len(marks):
            raise ValueError(f"the seeds of {env} {label} share no {phase} steps")
        longest = max(x[-1] for x, _ in flat)
        if marks[-1] < longest:
            notes.add(f"{env} {label} ends at {marks[-1]:g} of {longest:g} steps, as its shortest seed")
        group = np.split(values, np.cumsum([len(task) for task in seeds])[:-1])
        groups.setdefault(env, {}).setdefault(label, {})[column] = (marks, group)
    for note in sorted(notes):
        print(f"note: {note}", file=sys.stderr)
    return dict(sorted(groups.items(), key=lambda item: ("+" in item[0], item[0])))


def normalise(returns, low, high):
    """Returns, of which `low` counts as 0 and `high` as 100."""
    return 100 * (returns - low) / (high - low)


def read_references(path, wanted, envs, kind, scale=None):
    """METHOD@STEPS and METHOD strings -> {legend label: {env: (steps, means, stds), an array each}}, for those of
    `envs` that the file knows; of METHOD@STEPS one step, of METHOD (kind "curves" only) all. In units of `scale`."""
    if wanted and not path:
        raise ValueError("--reference reads a CSV of known results: give --published FILE")
    references, rows, ends = {}, [], SCALES[scale][1] if scale else dict.fromkeys(envs, (0, 100))
    table = read_columns(path, PUBLISHED, PUBLISHED[:2]) if wanted else dict.fromkeys(PUBLISHED, ())
    for method, env, step, seeds, mean, std in zip(*(table[column] for column in PUBLISHED)):
        if env in envs:
            low, high = ends[env]
            rows.append((method, env, step, seeds, normalise(mean, low, high), normalise(std, 0, high - low)))
    for want in wanted:
        at = "@" in want
        found = [row for row in rows if want.lower() == (f"{row[0]}@{row[2]:.0f}" if at else row[0]).lower()]
        if not found or not at and kind != "curves":
            known = ", ".join(sorted({row[0] for row in rows})) or "no method"
            raise ValueError(f"unknown reference {want}: for {', '.join(envs)} {path} has {known}, not that one at "
                             "those steps (write METHOD@STEPS, or METHOD for a curve)")
        seeds = " or ".join(f"{n:.0f}" for n in sorted({row[3] for row in found}))
        label = f"{found[0][0]}{f' at {found[0][2] / 1000:g}k steps' if at else ''} (published, {seeds} seeds)"
        references[label] = {env: np.array(sorted((row[2], *row[4:]) for row in found if row[1] == env)).T
                             for env in {row[1] for row in found}}
    return references


# --------------------------------------------------------------------------------------------------------- statistics
# a group is a list of arrays (..., S, m), one a task: S seeds, m marks


def iqm(group):
    """Interquartile mean (..., m) over all seeds of all tasks; the quarter cut at either end is rounded down."""
    values = np.sort(np.concatenate(group, -2), -2)
    cut = values.shape[-2] // 4
    return values[..., cut : values.shape[-2] - cut, :].mean(-2)


def improvement(ours, theirs):
    """Probability (..., m) that a run of ours is above one of theirs, a tie half: by task, then the tasks' mean."""
    wins = [np.sign(x[..., :, None, :] - y[..., None, :, :]) / 2 + 0.5 for x, y in zip(ours, theirs)]
    return np.mean([win.mean((-3, -2)) for win in wins], axis=0)


def steps_to_reach(marks, ours, theirs):
    """The first of marks (m,) at which our mean is at or above theirs, which is of one mark; inf where none is."""
    reached = np.concatenate(ours, -2).mean(-2) >= np.concatenate(theirs, -2).mean(-2)
    return np.where(reached.any(-1), marks[reached.argmax(-1)], np.inf)


def interval(statistic, *groups, samples=2000):
    """95 % interval (low, high) of statistic(*groups), by percentiles of a stratified bootstrap: the seeds of each task
    are drawn anew, with replacement. nan where a task has one seed."""
    if min(len(values) for group in groups for values in group) < 2:
        return np.full((2, *statistic(*groups).shape), np.nan)
    rng = np.random.default_rng(0)
    drawn = [[x[rng.integers(len(x), size=(samples, len(x)))] for x in group] for group in groups]
    return np.percentile(statistic(*drawn), (2.5, 97.5), axis=0, method="nearest")  # no mean of a step and inf


def statistics(group):
    """mean, sample standard deviation, interquartile mean and its interval, each (m,). The second is over the seeds of
    one task: nan with one seed, and over several tasks."""
    values = np.concatenate(group)
    std = values.std(0, ddof=1) if len(values) > 1 and len(group) == 1 else np.full(values.shape[1], np.nan)
    return values.mean(0), std, iqm(group), *interval(iqm, group)


# ------------------------------------------------------------------------------------------------------------ drawing


def new_figure(count, legend, stacked=1, height=3.0):
    """A figure and axes (stacked, count), 3.3 x `height` inches, three a row (one alone is wider), above a legend that
    hides none."""
    columns = count if stacked > 1 else 2 if count == 4 else min(count, 3)
    rows = stacked * math.ceil(count / columns)
    longest = max((len(handle.get_label()) for handle in legend), default=1)
    width = 3.3 * columns if count > 1 else 5.5
    per_line = max(1, min(len(legend), int(width * 72 / (4.6 * longest + 42))))
    fig = Figure((width, height * rows + 0.2 * math.ceil(len(legend) / per_line)), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharex="col" if stacked > 1 else False).reshape(stacked, -1)
    for ax in axes[:, count:].flat:
        ax.remove()
    if legend:
        fig.legend(handles=legend, loc="outside lower center", ncols=per_line, frameon=False, handlelength=3.2)
    return fig, axes[:, :count]


def style(i):
    """How group i looks; no two of the first 28 look alike."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % 4], "marker": MARKERS[i % 8]}


def places(labels):
    """{label: which look}: that of LOOKS, where it has one that no other took; the rest take what is left, in order."""
    fixed = {}
    for label in labels:
        if (i := LOOKS.get(label.lower())) is not None and i not in fixed.values():
            fixed[label] = i
    free = (i for i in itertools.count() if i not in fixed.values())
    return {label: fixed[label] if label in fixed else next(free) for label in labels}


def reference_style(i):
    """How published mean i looks."""
    return {"color": "#555555", "linestyle": ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))[i % 3], "lw": 1.2}


LINE = {"color": "#CC0000", "linestyle": "--", "lw": 1.4}  # WOMBET's, as in the paper's figure 3


def draw_reference(ax, points, look):
    """A published mean (steps, means, stds) as a horizontal line, or several as a curve up to where ax ends."""
    steps, means, stds = points
    if len(steps) == 1:
        ax.axhline(means[0], **look)
        return
    end = ax.dataLim.x1
    x = np.append(steps[steps / 1000 < end] / 1000, end)
    mean, std = (np.interp(x, steps / 1000, y) for y in (means, stds))
    ax.plot(x, mean, **look)
    ax.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.12, lw=0)


def band(group, average):
    """Centre, low and high (m,) of what is drawn."""
    mean, std, *interquartile = statistics(group)
    return (mean, mean - std, mean + std) if average == "mean" else interquartile


def draw_curves(ax, marks, group, look, args, bands):
    """Centre and band over marks (m,), shown in thousands of steps."""
    (centre, low, high), x = band(group, args.average), marks / 1000
    ax.plot(x, centre, lw=1.6, ms=4, markevery=max(1, len(x) // 10), zorder=3, **look)
    if bands:
        ax.fill_between(x, low, high, color=look["color"], alpha=0.18, lw=0)
    if args.per_seed:
        ax.plot(x, np.concatenate(group).T, color=look["color"], lw=0.6, alpha=0.6)


def draw_bars(ax, groups, looks, args):
    """Centre, band and seeds (dots, in order) of each {label: (marks (m,), group)} at its last mark."""
    present = [label for label in looks if label in groups]
    ends = [groups[label][0][-1] / 1000 for label in present]
    for i, label in enumerate(present):
        group, look = [values[:, -1:] for values in groups[label][1]], looks[label]
        (centre, low, high), values = band(group, args.average), np.concatenate(group)
        ax.bar(i, centre, width=0.65, color=look["color"], alpha=0.55)
        ax.errorbar(i, centre, yerr=(centre - low, high - centre), color="black", capsize=4, lw=1.2)
        ax.scatter(i + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1], values, s=16, color="white", edgecolor="black",
                   lw=0.9, marker=look["marker"], zorder=3)
    alike = len(set(ends)) == 1
    ax.set_xticks([] if alike else range(len(present)), [] if alike else [f"{end:g}k" for end in ends])
    middle, half = (len(present) - 1) / 2, max(len(present), 3) / 2
    ax.set_xlim(middle - half, middle + half)
    ax.grid(False, axis="x")
    ax.axhline(0, color="black", lw=0.8)
    unit = "updates" if args.phase == "offline" else "steps"
    ax.set_xlabel("" if alike else unit)
    ax.set_title(ax.get_title() + (f" at {ends[0]:g}k {unit}" if alike else ", each at its last mark"))


def plot_runs(args):
    """Curves, bars or traces: a panel per environment and column -> figure, table rows (env, name, step, *MEASURES)."""
    columns, scale = COLUMNS[args.kind], args.normalise or "td3-1m"
    if args.normalise:
        columns = {"normalised": f"Normalised return\n(100: {SCALES[scale][0]})"}
    runs = find_runs(args.folders, "progress.csv", args.names)
    groups = collect(runs, columns, args.phase, scale, args.all_steps, args.until)
    if args.average == "mean":  # over tasks there is no standard deviation to show
        groups = {env: group for env, group in groups.items() if "+" not in env}
    if not groups:
        raise ValueError(f"nothing to draw: no run has {' or '.join(columns)} in its {args.phase} phase")
    drawn = {name for env in groups.values() for name in env}
    labels = [name for name in dict.fromkeys(name for _, name, _ in runs) if name in drawn]
    envs = [env for env in groups if "+" not in env]
    references = read_references(args.published, args.reference, envs, args.kind, args.normalise)
    lines = collect(find_runs(args.folders, "progress.csv", [args.line]), columns, "target", scale) if args.line else {}
    looks, legend = {name: style(i) for name, i in places(labels).items()}, []
    for name in labels:
        n = sorted({len(task) for env in groups.values() for _, group in env.get(name, {}).values() for task in group})
        seeds = f"{n[0]} seed{'s' if n[0] > 1 else ''}" if len(n) == 1 else f"{n[0]} to {n[-1]} seeds"
        look = {**looks[name], "linestyle": "", "ms": 8} if args.kind == "bars" else {**looks[name], "ms": 4.5}
        legend.append(Line2D([], [], lw=1.6, label=f"{name} ({seeds})", **look))
    legend += [Line2D([], [], label=label, **reference_style(i)) for i, label in enumerate(references)]
    if lines:
        legend.append(Line2D([], [], label=f"{args.line.split('=')[-1]}, last target return", **LINE))
    fig, axes = new_figure(len(groups), legend, len(columns), height=1.9 if len(columns) > 1 else 2.6)
    table = []
    for j, (env, panel) in enumerate(groups.items()):
        axes[0, j].set_title(f"All {env.count('+') + 1} tasks" if "+" in env else env)
        for ax, (column, title) in zip(axes[:, j], columns.items()):
            series = {name: panel[name][column] for name in labels if column in panel.get(name, {})}
            if args.kind == "bars":
                draw_bars(ax, series, looks, args)
            else:
                for name, (marks, group) in series.items():
                    draw_curves(ax, marks, group, looks[name], args, bands=len(labels) <= 7)
                if args.kind == "alpha":
                    ax.set_ylim(bottom=0)
                if args.kind == "q-error":
                    ax.axhline(0, color="black", lw=0.8)
                axes[-1, j].set_xlabel("Source and target steps (thousands)" if args.all_steps else XLABEL[args.phase])
            for i, points in enumerate(references.values()):
                if env in points:
                    draw_reference(ax, points[env], reference_style(i))
            for marks, group in (line[column] for line in lines.get(env, {}).values()):
                centre, low, high = (values[-1] for values in band(group, args.average))
                ax.axhline(centre, **LINE)
                ax.axhspan(low, high, color=LINE["color"], alpha=0.12, lw=0, zorder=0.5)
            if args.y_min is not None:
                if args.y_min >= (top := ax.get_ylim()[1]):
                    raise ValueError(f"--y-min {args.y_min:g}: all of {env} is below {top:g}: give a lower one")
                ax.set_ylim(args.y_min, top)
            ax.set_ylabel(title if ax.get_subplotspec().is_first_col() else "")
            for name, (marks, group) in series.items():
                rows = [(env, name, *numbers, min(map(len, group))) for numbers in zip(marks, *statistics(group))]
                table += rows[-1:] if args.kind == "bars" else rows
    return fig, table if args.kind in DRAWN else []


def spearman(x, y):
    """Rank correlation of x (n,) and y (n,); ties share their mean rank. nan where either is constant."""
    def ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else math.nan


def binned_median(x, y, bins=20):
    """Medians of x and of y in bins of x that hold equally many points, 20 or more: two arrays (at most `bins`,)."""
    parts = np.array_split(np.argsort(x, kind="stable"), max(1, min(bins, len(x) // 20)))
    return np.array([np.median(x[p]) for p in parts]), np.array([np.median(y[p]) for p in parts])


def plot_model_error(args):
    """u against the true one-step error, both delta-normalised: a panel per environment and group, seeds pooled."""
    pooled = {}
    for env, name, path in find_runs(args.folders, "model_error.csv", args.names):
        table = read_columns(path, ("u", "error"))
        points = np.stack([table["u"], table["error"]])
        pooled.setdefault((env, name), []).append(points[:, np.isfinite(points).all(0)])
    pooled = {key: np.concatenate(points, 1) for key, points in sorted(pooled.items())}
    pooled = {key: points for key, points in pooled.items() if (points > 0).all(0).any()}
    if not pooled:
        raise ValueError("nothing to draw: no model_error.csv has a row with u and error above zero")
    legend = [Line2D([], [], color=COLOURS[1], marker="o", ms=4, lw=1.6, label="median error, bins of equal counts"),
              Line2D([], [], color="black", lw=1, linestyle="--", label="error = u")]
    fig, axes = new_figure(len(pooled), legend)
    blues = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.25, 1, 256)))  # a single point stays visible
    for ax, ((env, name), points) in zip(axes[0], pooled.items()):
        u, error = points[:, (points > 0).all(0)]  # what log axes can show; the correlation is over all points
        cells = ax.hexbin(u, error, gridsize=40, xscale="log", yscale="log", bins="log", mincnt=1, cmap=blues, lw=0.1)
        fig.colorbar(cells, ax=ax, label="Transitions")
        ends = max(u.min(), error.min()), min(u.max(), error.max())
        ax.plot(ends, ends, color="black", lw=1, linestyle="--")
        ax.plot(*binned_median(u, error), color=COLOURS[1], marker="o", ms=3, lw=1.6)
        ax.set(title=f"{env}, {name}\nSpearman $\\rho$ = {spearman(*points):.2f}, n = {points.shape[1]:,}",
               xlabel="Uncertainty u (delta-normalised)",
               ylabel="True error (delta-normalised)" if ax.get_subplotspec().is_first_col() else "")
    return fig, []


# -------------------------------------------------------------------------------------------------------------- tables


def write_csv(path, rows):
    """Rows to a CSV file: floats with eight digits, nan as an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            ["" if x != x else f"{x:.8g}" if isinstance(x, float) else x for x in row] for row in rows)


def print_table(rows):
    """A header and rows of two words, a step, measures and a number of seeds, in columns."""
    text = [[str(x) if i > 7 or isinstance(x, str) else "-" if x != x else f"{x:.{0 if i == 2 else 2}f}"
             for i, x in enumerate(row)] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*text)]
    for row in text:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def summarise(args):
    """Every number of the topics (folders of run folders) in or among args.folders -> rows, a header first.

    WOMBET is compared with every other group of a topic, and is fig2's where the topic has none; in the topic shift,
    each agent from a source task, <source> and <source>-new…, is compared with all from there, and with fig2's scratch,
    as is <source>-control; in parts, the new agents with one another and with fig2's scratch; in preset, the literal
    paper with its own agent from scratch and with fig2's scratch.
    """
    scale = args.normalise or "td3-1m"
    columns = {"return_mean": "return", "normalised": f"normalised by {scale}", "q_error": "q_error",
               "length_mean": "length", "discounted_mean": "discounted return"}
    folders = [place for folder in map(Path, args.folders) for place in (folder, *sorted(folder.glob("*/")))]
    places = {place.resolve(): place for place in folders if any(place.glob("*/progress.csv"))}
    topics = {path.name: find_runs([place], "progress.csv") for path, place in places.items()}
    if not topics:
        raise ValueError(f"no runs found: no <topic>/<run>/progress.csv in {', '.join(args.folders)}")
    if len(topics) < len(places):
        names = [path.name for path in places]
        twice = [str(place) for path, place in places.items() if names.count(path.name) > 1]
        raise ValueError(f"two topics are of one name: {', '.join(twice)}: give one of them")
    found = {(topic, phase): collect(runs, columns, phase, scale) for topic, runs in topics.items()
             for phase in ("target", "offline")}
    rows = [("topic", "phase", "env", "method", "quantity", "step", *MEASURES, "seeds")]
    for (topic, phase), envs in found.items():
        for env, labels in envs.items():
            for label, series in labels.items():
                for column, (marks, group) in series.items():
                    quantity, seeds = columns[column], min(map(len, group))
                    rows += [(topic, phase, env, label, quantity, *numbers, seeds)
                             for numbers in zip(marks, *statistics(group))]
                    if quantity in ("return", "length") and marks[-1] > 0:
                        rows += [(topic, phase, env, label, f"{quantity} over the marks", marks[-1], *numbers, seeds)
                                 for numbers in zip(*statistics(over_marks(marks, group)))]
            known = {**found.get(("fig2", "target"), {}).get(env, {}), **found[topic, "target"].get(env, {})}
            pairs = [("wombet", label) for label in labels]
            if topic == "parts" and phase == "target":
                pairs += [("model", "data"), ("model", "first"),
                          ("data", "scratch"), ("first", "scratch"), ("model", "scratch")]
            if topic == "preset":
                pairs += [("preset", "preset-scratch"), ("preset", "scratch")]
            if topic == "shift":
                rivals = [*labels, "scratch"] if phase == "target" else labels
                agents = [re.fullmatch(r"(\w+)(-new.*)?", name) for name in found[topic, "target"].get(env, {})]
                pairs = [(agent[0], rival) for agent in filter(None, agents) for rival in rivals
                         if rival.split("-")[0] in (agent[1], "scratch")]
                pairs += [(name, "scratch") for name in rivals if name.endswith("-control")]
            for name, rival in pairs:
                for column in ("normalised" if "+" in env else "return_mean", "length_mean"):
                    ours, theirs = known.get(name, {}).get(column), {**known, **labels}.get(rival, {}).get(column)
                    if not ours or not theirs or name == rival:
                        continue
                    same = phase == "target"  # the two count the same steps
                    compared = [] if column == "length_mean" else list(compare(ours, theirs, rival, same))
                    compared += compare_means(ours, theirs, rival, columns[column]) if same else []
                    rows += [(topic, phase, env, name, words, step, value, math.nan, math.nan, *ends,
                              min(map(len, ours[1] + theirs[1]))) for words, step, value, *ends in compared]
    if args.published:
        table = read_columns(args.published, PUBLISHED, PUBLISHED[:2])
        rows += [("published", "target", env, method, "return", step, mean, std, *3 * [math.nan], int(seeds))
                 for method, env, step, seeds, mean, std in zip(*(table[column] for column in PUBLISHED))]
    return rows


def over_marks(marks, group):
    """A column's (marks (m,), group) -> a group of its mean over the marks after step 0: a list of (S, 1) a task."""
    return [values[:, marks > 0].mean(1, keepdims=True) for values in group]


def compare(ours, theirs, rival, same_steps):
    """Two (marks (m,), group) -> (words, our mark, value, low, high) of each comparison: who is better at the last
    mark of both and, ours against theirs, at twice and three times our steps (if they count the same ones: half the
    interaction, and the default source's steps counted), and at the last of each; when we are where they end."""
    (marks, our_group), (their_marks, their_group) = ours, theirs
    common = sorted(set(marks) & set(their_marks))[-1:] if same_steps else []
    longer = [(marks[-1], n * marks[-1]) for n in (2, 3) if same_steps and n * marks[-1] in their_marks]
    for mine, other in dict.fromkeys([*zip(common, common), *longer, (marks[-1], their_marks[-1])]):
        at = [x[:, marks == mine] for x in our_group], [x[:, their_marks == other] for x in their_group]
        yield (f"probability of improvement on {rival}@{other:.0f}", mine, improvement(*at)[0],
               *interval(improvement, *at)[:, 0])
    first, goal = functools.partial(steps_to_reach, marks), [values[:, -1:] for values in their_group]
    yield (f"steps to reach {rival}@{their_marks[-1]:.0f}", marks[-1], float(first(our_group, goal)),
           *interval(first, our_group, goal))


def compare_means(ours, theirs, rival, quantity):
    """The same of whose mean over the marks is higher, where both have the same marks after step 0."""
    marks, their_marks = (steps[steps > 0] for steps, _ in (ours, theirs))
    if np.array_equal(marks, their_marks) and len(marks):
        means = over_marks(*ours), over_marks(*theirs)
        yield (f"probability of a higher {quantity} over the marks than {rival}", marks[-1], improvement(*means)[0],
               *interval(improvement, *means)[:, 0])


def check_writable(path, endings):
    """Refuses a file that could not be written, before the work, and leaves nothing behind."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"cannot write {path}: give a name that ends in {' or '.join(endings)}")
    try:
        if path.parent.is_dir():
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()
        else:
            tempfile.TemporaryFile(dir=next(place for place in path.absolute().parents if place.exists())).close()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}: give another place") from None


def main(argv=None):
    """Draws what argv asks for; returns 0, or 2 after one line on stderr for bad input."""
    try:
        args = build_parser().parse_args(argv)
        for flag, given, kinds in (("--names", args.names, ("model-error", *COLUMNS)), ("--line", args.line, ("bars",)),
                                   ("--reference", args.reference, DRAWN),
                                   ("--normalise", args.normalise, ("summary", *DRAWN)),
                                   ("--phase", args.phase != "target", COLUMNS),
                                   ("--all-steps", args.all_steps, COLUMNS),
                                   ("--until", args.until < math.inf, COLUMNS),
                                   ("--average", args.average != "mean", COLUMNS),
                                   ("--per-seed", args.per_seed, [kind for kind in COLUMNS if kind != "bars"]),
                                   ("--y-min", args.y_min is not None, ("curves", "q-error")),
                                   ("--published", args.published, ("summary", *DRAWN))):
            if given and args.kind not in kinds:
                raise ValueError(f"{flag} goes with --kind {' and '.join(kinds)} only")
        if args.published and not args.reference and args.kind != "summary":
            raise ValueError("--published is read for --reference, or --kind summary")
        if args.all_steps and args.phase != "target":
            raise ValueError("--all-steps goes with --phase target only")
        summary = args.kind == "summary"
        out = Path(args.out or Path(args.folders[0]) / f"{args.kind}.{'csv' if summary else 'png'}")
        check_writable(out, (".csv",) if summary else (".png", ".pdf", ".svg"))
        if summary:
            write_csv(out, summarise(args))
        else:
            with matplotlib.rc_context(STYLE):
                fig, table = plot_model_error(args) if args.kind == "model-error" else plot_runs(args)
                out.parent.mkdir(parents=True, exist_ok=True)
                fig.savefig(out, dpi=200)
            print_table([("env", "name", STEPS[args.phase], *MEASURES, "seeds"), *table] if table else [])
    except (ValueError, OSError, csv.Error) as error:
        print(f"plot.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every figure, from the CSV files that runs leave.

    python plot.py results/transfer                      learning curves, results/transfer/curves.png, and their table
    python plot.py results/transfer --published published_curves.csv --reference sac@50000
    python plot.py results/filter --kind bars            return at the last mark, with the seeds
    python plot.py results/alpha --kind alpha            alpha and |TD error| over target steps
    python plot.py results/model --kind model-error      u against the model's true error, from model_error.csv

A run is a folder <env>__<name>__<seed>: an environment is a panel, runs that share <name> are a group, and a group is
drawn as the mean over its seeds and a band of one sample standard deviation (n - 1) on each side.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure  # without pyplot: no window, no display
from matplotlib.lines import Line2D

# Okabe and Ito's colour-blind-safe palette, less its yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = "osD^vPX*"
STYLE = {"font.size": 9, "axes.titlesize": 10, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8.5,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
         "grid.linewidth": 0.6, "axes.axisbelow": True, "pdf.fonttype": 42}
# the column that counts a phase's steps
STEPS = {"target": "env_steps", "source": "source_steps", "offline": "updates"}
XLABEL = {"target": "Target environment steps (thousands)", "source": "Source environment steps (thousands)",
          "offline": "Gradient updates on the dataset (thousands)"}
COLUMNS = {"curves": {"return_mean": "Evaluation return"}, "bars": {"return_mean": "Evaluation return"},
           "alpha": {"alpha": r"Share of $D_S$, $\alpha$", "td_error": "|TD error| (reward)"}}


def build_parser():
    parser = argparse.ArgumentParser(description="Draw the figures from run folders.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run folder, or a folder of run folders")
    parser.add_argument("--kind", default="curves", choices=(*COLUMNS, "model-error"),
                        help="the figure (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="picture, .png, .pdf or .svg (default: <FOLDER>/<kind>.png)")
    parser.add_argument("--names", nargs="+", metavar="NAME[=LABEL]", help="these groups only, in this order, under "
                        "these labels (default: all, by name)")
    parser.add_argument("--phase", default="target", choices=tuple(STEPS), help="the phase drawn, over its own steps "
                        "(default: %(default)s)")
    parser.add_argument("--per-seed", action=argparse.BooleanOptionalAction, default=False,
                        help="curves, alpha: a thin line for each seed too")
    parser.add_argument("--published", metavar="FILE", help="CSV of known results, for --reference; its columns: "
                        "method, env, env_steps, seeds, mean_return, std_return")
    parser.add_argument("--reference", nargs="+", default=[], metavar="METHOD[@STEPS]", help="curves, bars: a "
                        "horizontal line at that method's published mean return after so many environment steps; "
                        "curves, without @STEPS: its published curve, with its standard deviation")
    parser.add_argument("--table", metavar="FILE", help="curves, bars: the printed table as CSV, unrounded")
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
        folder = path.resolve().parent.name
        env, *name, seed = folder.split("__")
        if not name:
            raise ValueError(f"{path.parent} is not named <env>__<name>__<seed>")
        if folder in runs:
            raise ValueError(f"two runs are named {folder}: plot one folder of them")
        runs[folder] = (env, "__".join(name), path)
    if not runs:
        raise ValueError(f"no runs found: no {filename} in {', '.join(map(str, folders))} or in its subfolders")
    known = sorted({name for _, name, _ in runs.values()})
    labels = {name: label or name for name, _, label in (item.partition("=") for item in names or known)}
    for name in labels:
        if name not in known:
            raise ValueError(f"no run is named {name}: there are {', '.join(known)}")
    order = list(labels)
    runs = sorted((run for run in runs.values() if run[1] in labels), key=lambda run: order.index(run[1]))
    return [(env, labels[name], path) for env, name, path in runs]


def curve(run, column, phase):
    """Steps (k,), ascending, and values (k,) of a column; where a resumed run repeats a mark, the later row stands."""
    steps, values = run[STEPS[phase]], run[column]
    keep = (run["phase"] == phase) & np.isfinite(steps) & np.isfinite(values)
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


def mean_std(values):
    """values (S, m) -> mean (m,) and sample standard deviation (m,) over seeds; of one seed the latter is nan."""
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def collect(runs, columns, phase):
    """Runs -> {env: {label: {column: (marks (m,), values (S, m))}}}; a run without values of a column is left out."""
    curves, groups = {}, {}
    for env, label, path in runs:
        data = read_columns(path, ("phase", STEPS[phase], *columns), ("phase",))
        for column in columns:
            curves.setdefault((env, label, column), []).append(curve(data, column, phase))
    for (env, label, column), seeds in curves.items():
        seeds = [seed for seed in seeds if len(seed[0])]
        if seeds:
            marks, values = aggregate(seeds)
            if not len(marks):
                raise ValueError(f"the seeds of {env} {label} share no {phase} steps")
            longest = max(x[-1] for x, _ in seeds)
            if marks[-1] < longest:
                print(f"note: {env} {label}: {column} ends at {marks[-1]:g} of {longest:g} steps, as its shortest seed",
                      file=sys.stderr)
            groups.setdefault(env, {}).setdefault(label, {})[column] = (marks, values)
    if not groups:
        raise ValueError(f"nothing to draw: no run has {' or '.join(columns)} in its {phase} phase")
    return dict(sorted(groups.items()))


def read_references(path, wanted, envs, kind):
    """METHOD@STEPS and METHOD strings -> {legend label: {env: (steps, means, stds), an array each}}, for those of
    `envs` that the file knows; of METHOD@STEPS one step, of METHOD (kind "curves" only) all."""
    if wanted and not path:
        raise ValueError("--reference reads a CSV of known results: give --published FILE")
    references, needed = {}, ("method", "env", "env_steps", "seeds", "mean_return", "std_return")
    table = read_columns(path, needed, ("method", "env")) if wanted else {}
    rows = [row for row in zip(*(table[column] for column in needed)) if row[1] in envs] if wanted else []
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


# ------------------------------------------------------------------------------------------------------------ drawing


def new_figure(count, legend, stacked=1, height=3.0):
    """A figure and axes (stacked, count), 3.3 x `height` inches, three a row, above a legend that hides none."""
    columns = count if stacked > 1 else 2 if count == 4 else min(count, 3)
    rows = stacked * math.ceil(count / columns)
    longest = max((len(handle.get_label()) for handle in legend), default=1)
    per_line = max(1, min(len(legend), int(3.3 * columns * 72 / (4.6 * longest + 42))))
    fig = Figure((3.3 * columns, height * rows + 0.2 * math.ceil(len(legend) / per_line)), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharex="col" if stacked > 1 else False).reshape(stacked, -1)
    for ax in axes[:, count:].flat:
        ax.remove()
    if legend:
        fig.legend(handles=legend, loc="outside lower center", ncols=per_line, frameon=False, handlelength=3.2)
    return fig, axes[:, :count]


def style(i):
    """How group i looks; no two of the first 28 look alike."""
    return {"color": COLOURS[i % 7], "linestyle": LINES[i % 4], "marker": MARKERS[i % 8]}


def reference_style(i):
    """How published mean i looks."""
    return {"color": "#555555", "linestyle": ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))[i % 3], "lw": 1.2}


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


def draw_curves(ax, marks, values, look, per_seed):
    """Mean and band of values (S, m) over marks (m,), shown in thousands of steps."""
    (mean, std), x = mean_std(values), marks / 1000
    ax.plot(x, mean, lw=1.6, ms=4, markevery=max(1, len(x) // 10), zorder=3, **look)
    ax.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.18, lw=0)
    if per_seed:
        ax.plot(x, values.T, color=look["color"], lw=0.6, alpha=0.6)


def draw_bars(ax, groups, labels):
    """Mean, standard deviation and seeds (dots) of each group {label: (marks (m,), values (S, m))} at its last mark."""
    present = [label for label in labels if label in groups]
    ends = [groups[label][0][-1] / 1000 for label in present]
    for i, label in enumerate(present):
        values, look = groups[label][1][:, -1:], style(labels.index(label))
        mean, std = mean_std(values)
        ax.bar(i, mean, width=0.65, color=look["color"], alpha=0.55)
        ax.errorbar(i, mean, yerr=std, color="black", capsize=4, lw=1.2)
        ax.scatter(i + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1], values, s=16, color="white", edgecolor="black",
                   lw=0.9, marker=look["marker"], zorder=3)
    alike = len(set(ends)) == 1
    ax.set_xticks([] if alike else range(len(present)), [] if alike else [f"{end:g}k" for end in ends])
    middle, half = (len(present) - 1) / 2, max(len(present), 3) / 2
    ax.set_xlim(middle - half, middle + half)
    ax.grid(False, axis="x")
    ax.axhline(0, color="black", lw=0.8)
    ax.set_title(ax.get_title() + (f" at {ends[0]:g}k steps" if alike else ", each at its last mark"))


def plot_runs(args):
    """Curves, bars or alpha: a panel per environment and column -> figure, table rows (env, name, steps, mean, ...)."""
    columns = COLUMNS[args.kind]
    runs = find_runs(args.folders, "progress.csv", args.names)
    groups = collect(runs, columns, args.phase)
    drawn = {name for env in groups.values() for name in env}
    labels = [name for name in dict.fromkeys(name for _, name, _ in runs) if name in drawn]
    references = read_references(args.published, args.reference, list(groups), args.kind)
    legend = []
    for i, name in enumerate(labels):
        n = sorted({len(values) for env in groups.values() for _, values in env.get(name, {}).values()})
        seeds = f"{n[0]} seed{'s' if n[0] > 1 else ''}" if len(n) == 1 else f"{n[0]} to {n[-1]} seeds"
        look = {**style(i), "linestyle": "", "ms": 8} if args.kind == "bars" else {**style(i), "ms": 4.5}
        legend.append(Line2D([], [], lw=1.6, label=f"{name} ({seeds})", **look))
    legend += [Line2D([], [], label=label, **reference_style(i)) for i, label in enumerate(references)]
    fig, axes = new_figure(len(groups), legend, len(columns), height=1.9 if len(columns) > 1 else 2.6)
    table = []
    for j, (env, group) in enumerate(groups.items()):
        axes[0, j].set_title(env)
        for ax, (column, title) in zip(axes[:, j], columns.items()):
            series = {name: group[name][column] for name in labels if column in group.get(name, {})}
            if args.kind == "bars":
                draw_bars(ax, series, labels)
            else:
                for name, (marks, values) in series.items():
                    draw_curves(ax, marks, values, style(labels.index(name)), args.per_seed)
                if args.kind == "alpha":
                    ax.set_ylim(bottom=0)
                axes[-1, j].set_xlabel(XLABEL[args.phase])
            for i, points in enumerate(references.values()):
                if env in points:
                    draw_reference(ax, points[env], reference_style(i))
            ax.set_ylabel(title if j == 0 or len(columns) == 1 and j % 3 == 0 else "")
            for name, (marks, values) in series.items():
                rows = [(env, name, *numbers, len(values)) for numbers in zip(marks, *mean_std(values))]
                table += rows[-1:] if args.kind == "bars" else rows
    return fig, table if args.kind != "alpha" else []


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
    for j, (ax, ((env, name), points)) in enumerate(zip(axes[0], pooled.items())):
        u, error = points[:, (points > 0).all(0)]  # what log axes can show; the correlation is over all points
        cells = ax.hexbin(u, error, gridsize=40, xscale="log", yscale="log", bins="log", mincnt=1, cmap=blues, lw=0.1)
        fig.colorbar(cells, ax=ax, label="Transitions")
        ends = max(u.min(), error.min()), min(u.max(), error.max())
        ax.plot(ends, ends, color="black", lw=1, linestyle="--")
        ax.plot(*binned_median(u, error), color=COLOURS[1], marker="o", ms=3, lw=1.6)
        ax.set(title=f"{env}, {name}\nSpearman $\\rho$ = {spearman(*points):.2f}, n = {points.shape[1]:,}",
               xlabel="Uncertainty u (delta-normalised)", ylabel="" if j % 3 else "True error (delta-normalised)")
    return fig, []


def print_table(table, phase, out=None):
    """Rows (env, name, steps, mean, std, seeds) to stdout, and unrounded to the CSV file `out`."""
    header = ("env", "name", STEPS[phase], "mean", "std", "seeds")
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", newline="") as file:
            csv.writer(file).writerows([header, *((env, name, f"{x:.0f}", m, "" if np.isnan(s) else s, n)
                                                  for env, name, x, m, s, n in table)])
    text = [header, *((env, name, f"{x:.0f}", f"{m:.2f}", "-" if np.isnan(s) else f"{s:.2f}", f"{n}")
                      for env, name, x, m, s, n in table)]
    widths = [max(map(len, cells)) for cells in zip(*text)]
    for row in text:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def write_gif(frames, path, size=240, milliseconds=40):
    """Writes pictures (each (h, w, 3) uint8) as an animation of size x size pixels."""
    from PIL import Image  # matplotlib brings it

    pictures = [Image.fromarray(frame).resize((size, size)) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)


def main(argv=None):
    """Draws what argv asks for; returns 0, or 2 after one line on stderr for bad input."""
    args = build_parser().parse_args(argv)
    try:
        if args.kind not in ("curves", "bars") and (args.reference or args.table):
            raise ValueError("--reference and --table go with --kind curves and bars only")
        out = Path(args.out or Path(args.folders[0]) / f"{args.kind}.png")
        with matplotlib.rc_context(STYLE):
            fig, table = plot_model_error(args) if args.kind == "model-error" else plot_runs(args)
            out.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(out, dpi=200)
        if table:
            print_table(table, args.phase, args.table)
    except (ValueError, OSError, csv.Error) as error:
        print(f"plot.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

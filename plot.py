"""Every figure, from the CSV files that runs leave.

    python plot.py results/transfer                                    learning curves -> results/transfer/curves.png
    python plot.py results/transfer --published published_curves.csv --reference sac@50000
    python plot.py results/filter --kind bars                          return at the last mark, with the seeds
    python plot.py results/alpha --kind alpha                          alpha and |TD error| over target steps
    python plot.py results/model --kind model-error                    u against the model's true error

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
from matplotlib.figure import Figure  # without pyplot: no window, no display
from matplotlib.lines import Line2D

# Okabe and Ito's colour-blind-safe palette, less its yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = "osD^vPX*"
REFERENCE_LINES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (9, 3)))
STEPS = {"target": "env_steps", "source": "source_steps"}  # the column that counts a phase's steps
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
         "legend.fontsize": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True, "pdf.fonttype": 42}


def build_parser():
    parser = argparse.ArgumentParser(description="Draw the figures from run folders.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run folder, or a folder of run folders")
    parser.add_argument("--kind", default="curves", choices=tuple(KINDS), help="the figure")
    parser.add_argument("--out", metavar="FILE", help="picture, .png, .pdf or .svg (default: <FOLDER>/<kind>.png)")
    parser.add_argument("--names", nargs="+", metavar="NAME[=LABEL]", help="these groups only, in this order, with a "
                        "label for the legend (default: all, by name)")
    parser.add_argument("--phase", default="target", choices=tuple(STEPS), help="the phase drawn, with its own steps")
    parser.add_argument("--per-seed", action=argparse.BooleanOptionalAction, default=False,
                        help="curves, alpha: a thin line for each seed too")
    parser.add_argument("--published", metavar="FILE", help="CSV of known results, for --reference: method, env, "
                        "env_steps, seeds, mean_return, std_return")
    parser.add_argument("--reference", nargs="+", default=[], metavar="METHOD@STEPS", help="curves, bars: a "
                        "horizontal line at that method's published mean return")
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
    """{(env, name, seed): path of `filename`} of the run folders among `folders` and just below them."""
    runs = {}
    for folder in map(Path, folders):
        for path in [folder / filename, *sorted(folder.glob(f"*/{filename}"))]:
            if path.is_file():
                env, *name, seed = path.resolve().parent.name.split("__")
                if not name:
                    raise ValueError(f"{path.parent} is not named <env>__<name>__<seed>")
                if (env, "__".join(name), seed) in runs:
                    raise ValueError(f"two runs are named {path.resolve().parent.name}: plot one folder of them")
                runs[env, "__".join(name), seed] = path
    if not runs:
        raise ValueError(f"no runs found: no {filename} in {', '.join(map(str, folders))} or in its subfolders")
    for name in names or ():
        if name not in {run[1] for run in runs}:
            raise ValueError(f"no run is named {name}: there are {', '.join(sorted({run[1] for run in runs}))}")
    return {run: path for run, path in runs.items() if not names or run[1] in names}


def curve(run, column, phase):
    """Steps (k,), ascending, and values (k,) of a column; where a resumed run repeats a mark, the later row stands."""
    steps, values = run[STEPS[phase]], run.get(column, np.full(len(run["phase"]), np.nan))
    keep = (run["phase"] == phase) & np.isfinite(steps) & np.isfinite(values)
    points = sorted(dict(zip(steps[keep], values[keep])).items())
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def aggregate(curves):
    """Curves of S seeds -> marks (m,), values (S, m).

    The marks are those of the seed that has fewest inside the span that all seeds cover, so of grids of which one holds
    the other no value is made up; a seed that was not evaluated at such a mark is interpolated linearly.
    """
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    inside = [x[(x >= first) & (x <= last)] for x, _ in curves]
    marks = min((x for x in inside if len(x)), key=len, default=np.empty(0))
    return marks, np.stack([np.interp(marks, x, y) for x, y in curves])


def mean_std(values):
    """values (S, m) -> mean (m,) and sample standard deviation (m,) over seeds; of one seed the latter is nan."""
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def collect(runs, columns, phase):
    """Run paths -> {column: {env: {name: (marks (m,), values (S, m))}}}, without runs that have no such values."""
    data = {run: read_columns(path, ("phase", STEPS[phase]), ("phase",)) for run, path in runs.items()}
    groups = {column: {} for column in columns}
    for column in columns:
        curves = {}
        for (env, name, seed), run in data.items():
            x, y = curve(run, column, phase)
            if len(x):
                curves.setdefault((env, name), {})[seed] = (x, y)
        for (env, name), seeds in sorted(curves.items()):
            marks, values = aggregate(list(seeds.values()))
            if not len(marks):
                raise ValueError(f"the seeds of {env} {name} have no {phase} mark of {column} in common")
            if marks[-1] < (longest := max(x[-1] for x, _ in seeds.values())):
                shortest = min(seeds, key=lambda seed: seeds[seed][0][-1])
                print(f"note: {env} {name}: {column} is cut at {marks[-1]:g} of {longest:g} steps, where seed {shortest} "
                      "ends", file=sys.stderr)
            groups[column].setdefault(env, {})[name] = (marks, values)
    if not any(groups.values()):
        raise ValueError(f"nothing to draw: no run has {' or '.join(columns)} in its {phase} phase")
    return groups


def read_references(path, wanted, envs):
    """METHOD@STEPS strings -> {legend label: {env: mean return}}, for those of `envs` that the file knows."""
    if wanted and not path:
        raise ValueError("--reference reads a CSV of known results: give --published FILE")
    if not wanted:
        return {}
    table = read_columns(path, ("method", "env", "env_steps", "seeds", "mean_return"), ("method", "env"))
    rows = list(zip(table["method"], table["env"], table["env_steps"], table["seeds"], table["mean_return"]))
    references = {}
    for want in wanted:
        method, _, steps = want.partition("@")
        found = {row[1]: row for row in rows if row[0].lower() == method.lower() and f"{row[2]:.0f}" == steps
                 and row[1] in envs}
        if not found:
            known = ", ".join(sorted({row[0] for row in rows if row[1] in envs})) or "none"
            raise ValueError(f"unknown reference {want}: {path} has no such row for {', '.join(envs)} (its methods "
                             f"there: {known}; write METHOD@STEPS)")
        n_seeds = " to ".join(f"{n:.0f}" for n in sorted({row[3] for row in found.values()}))
        label = f"{next(iter(found.values()))[0]} at {thousands(float(steps))}k steps (published, {n_seeds} seeds)"
        references[label] = {env: row[4] for env, row in found.items()}
    return references


# ------------------------------------------------------------------------------------------------------------ drawing


def thousands(steps):
    """Steps as the text of a number of thousands."""
    return f"{steps / 1000:g}"


def styles(names):
    """{name: keywords of a line}, no two alike among the first 28."""
    return {name: {"color": COLOURS[i % 7], "linestyle": LINES[i % 4], "marker": MARKERS[i % 8]}
            for i, name in enumerate(names)}


def new_figure(rows, columns, legend=(), width=3.3, height=2.6, **keywords):
    """A figure and its axes (rows, columns), panels of `width` x `height` inches above a legend that covers none."""
    longest = max((len(handle.get_label()) for handle in legend), default=1)
    ncols = max(1, min(len(legend), int(width * columns * 72 / (4.6 * longest + 42))))
    fig = Figure((width * columns, height * rows + 0.2 * math.ceil(len(legend) / ncols)), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **keywords)
    if legend:
        fig.legend(handles=legend, loc="outside lower center", ncols=ncols, frameon=False, handlelength=3.2)
    return fig, axes


def panels(count, legend=(), **keywords):
    """A figure and `count` axes, three a row."""
    columns = min(count, 3)
    fig, axes = new_figure(math.ceil(count / columns), columns, legend, **keywords)
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, list(axes.flat[:count])


def group_handles(groups, labels):
    """Legend lines of the groups {env: {name: (marks, values)}}, which state the number of seeds (of each panel)."""
    handles = []
    for name, style in styles(labels).items():
        n = sorted({len(env[name][1]) for env in groups.values() if name in env})
        if n:
            span = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
            text = f"{labels[name]} ({span} seed{'s' if n[-1] > 1 else ''})"
            handles.append(Line2D([], [], lw=1.6, ms=4.5, label=text, **style))
    return handles


def reference_handles(references):
    """Legend lines of the published means: grey, and thin."""
    return [Line2D([], [], color="#555555", lw=1.1, linestyle=REFERENCE_LINES[i % len(REFERENCE_LINES)], label=label)
            for i, label in enumerate(references)]


def draw_references(ax, references, handles, env):
    for handle, means in zip(handles, references.values()):
        if env in means:
            ax.axhline(means[env], color=handle.get_color(), lw=1.1, linestyle=handle.get_linestyle(), zorder=1.5)


def draw_curves(ax, groups, labels, per_seed):
    """Mean and band of each group {name: (marks (m,), values (S, m))} over thousands of steps."""
    for name, style in styles(labels).items():
        if name in groups:
            marks, values = groups[name]
            mean, std = mean_std(values)
            x = marks / 1000
            ax.plot(x, mean, lw=1.6, ms=4, markevery=max(1, len(x) // 10), zorder=3, **style)
            if len(values) > 1:
                ax.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.18, lw=0)
            if per_seed:
                ax.plot(x, values.T, color=style["color"], lw=0.6, alpha=0.6)


def print_table(rows, phase, out=None):
    """Rows (env, name, steps, mean, std, seeds) to stdout, and unrounded to the CSV file `out`."""
    header = ("env", "name", STEPS[phase], "mean", "std", "seeds")
    widths = [max(len(header[i]), *(len(row[i]) for row in rows)) for i in (0, 1)]
    line = f"{{:{widths[0]}}}  {{:{widths[1]}}}  {{:>12}}  {{:>10}}  {{:>10}}  {{:>5}}"
    shown = lambda value: "-" if np.isnan(value) else f"{value:.2f}"
    print(line.format(*header))
    for env, name, steps, mean, std, seeds in rows:
        print(line.format(env, name, f"{steps:g}" if steps < 1e6 else f"{steps:.0f}", shown(mean), shown(std), seeds))
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([e, n, f"{x:.0f}", float(m), "" if np.isnan(s) else float(s), k] for e, n, x, m, s, k in rows)


def table_rows(groups, labels, last_only=False):
    """{env: {name: (marks, values)}} -> rows (env, name, steps, mean, std, seeds), a row a mark."""
    return [(env, name, *row, len(group[name][1])) for env, group in groups.items() for name in labels if name in group
            for row in list(zip(group[name][0], *mean_std(group[name][1])))[-1 if last_only else 0:]]


# ------------------------------------------------------------------------------------------------------------ figures


def plot_curves(args, labels):
    """Evaluation return over steps, a panel per environment."""
    groups = collect(find_runs(args.folders, "progress.csv", labels), ["return_mean"], args.phase)["return_mean"]
    labels = labels or {name: name for name in sorted({name for env in groups.values() for name in env})}
    references = read_references(args.published, args.reference, list(groups))
    lines = reference_handles(references)
    fig, axes = panels(len(groups), group_handles(groups, labels) + lines)
    for i, (ax, (env, group)) in enumerate(zip(axes, groups.items())):
        draw_curves(ax, group, labels, args.per_seed)
        draw_references(ax, references, lines, env)
        ax.set(title=env, xlabel=f"{args.phase.capitalize()} environment steps (thousands)")
        ax.set_ylabel("Evaluation return" if i % 3 == 0 else "")
    print_table(table_rows(groups, labels), args.phase, args.table)
    return fig


def plot_bars(args, labels):
    """Evaluation return at each group's last mark, a panel per environment; dots are the seeds."""
    groups = collect(find_runs(args.folders, "progress.csv", labels), ["return_mean"], args.phase)["return_mean"]
    labels = labels or {name: name for name in sorted({name for env in groups.values() for name in env})}
    references = read_references(args.published, args.reference, list(groups))
    lines = reference_handles(references)
    fig, axes = panels(len(groups), lines, width=max(3.0, 0.6 * len(labels)), height=2.9)
    for i, (ax, (env, group)) in enumerate(zip(axes, groups.items())):
        names = [name for name in labels if name in group]
        ends = {group[name][0][-1] for name in names}
        for x, name in enumerate(names):
            values, style = group[name][1][:, -1:], styles(labels)[name]
            mean, std = (number.item() for number in mean_std(values))
            ax.bar(x, mean, width=0.65, color=style["color"], alpha=0.55, edgecolor=style["color"])
            ax.errorbar(x, mean, yerr=std, color="black", capsize=4, lw=1.2)
            ax.scatter(x + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1], values, s=16, color="white", lw=0.9,
                       edgecolor="black", marker=style["marker"], zorder=3)
        ticks = [f"{labels[n]}\nn = {len(group[n][1])}" + (f", {thousands(group[n][0][-1])}k" if len(ends) > 1 else "")
                 for n in names]
        tilt = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 36 // len(names) else {}
        ax.set_xticks(range(len(names)), ticks, **tilt)
        ax.grid(False, axis="x")
        ax.axhline(0, color="black", lw=0.8)
        draw_references(ax, references, lines, env)
        ax.set_title(f"{env}, last mark" if len(ends) > 1 else f"{env} at {thousands(ends.pop())}k steps")
        ax.set_ylabel("Evaluation return" if i % 3 == 0 else "")
    print_table(table_rows(groups, labels, last_only=True), args.phase, args.table)
    return fig


def plot_alpha(args, labels):
    """The share of D_S and the |TD error| that sets it, one above the other, a column per environment."""
    columns = {"alpha": r"Share of $D_S$, $\alpha$", "td_error": "|TD error| (reward units)"}
    groups = collect(find_runs(args.folders, "progress.csv", labels), list(columns), args.phase)
    envs = sorted({env for column in groups.values() for env in column})
    labels = labels or {name: name for name in sorted({n for c in groups.values() for env in c.values() for n in env})}
    both = {env: {**groups["td_error"].get(env, {}), **groups["alpha"].get(env, {})} for env in envs}
    fig, axes = new_figure(2, len(envs), group_handles(both, labels), height=1.9, sharex="col")
    for j, env in enumerate(envs):
        for i, (column, label) in enumerate(columns.items()):
            draw_curves(axes[i, j], groups[column].get(env, {}), labels, args.per_seed)
            axes[i, j].set_ylabel(label if j == 0 else "")
            axes[i, j].set_ylim(bottom=0)
        axes[0, j].set_title(env)
        axes[1, j].set_xlabel(f"{args.phase.capitalize()} environment steps (thousands)")
    return fig


def spearman(x, y):
    """Rank correlation of x (n,) and y (n,); ties share their mean rank."""
    def ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    constant = len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0
    return math.nan if constant else float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def binned_median(x, y, bins=20):
    """Medians of x and of y, (<= bins,) each, in bins of x of equal counts (20 points or more, unless there are less)."""
    parts = np.array_split(np.argsort(x, kind="stable"), max(1, min(bins, len(x) // 20)))
    return np.array([np.median(x[p]) for p in parts]), np.array([np.median(y[p]) for p in parts])


def plot_model_error(args, labels):
    """Uncertainty u against the model's true one-step error, delta-normalised, a panel per environment and name."""
    points = {}
    for (env, name, _), path in sorted(find_runs(args.folders, "model_error.csv", labels).items()):
        table = read_columns(path, ("u", "error"))
        points.setdefault((env, name), []).append(np.stack([table["u"], table["error"]]))
    points = {group: np.concatenate(seeds, 1) for group, seeds in points.items()}
    points = {group: xy[:, (np.isfinite(xy) & (xy > 0)).all(0)] for group, xy in points.items()}  # for log axes
    points = {group: xy for group, xy in points.items() if xy.size}
    if not points:
        raise ValueError("nothing to draw: no model_error.csv has a row with u and error above zero")
    legend = [Line2D([], [], color=COLOURS[1], marker="o", ms=4, lw=1.6, label="median error, bins of equal counts"),
              Line2D([], [], color="black", lw=1, linestyle="--", label="error = u")]
    fig, axes = panels(len(points), legend, height=3.0)
    for i, (ax, ((env, name), (u, error))) in enumerate(zip(axes, points.items())):
        cells = ax.hexbin(u, error, gridsize=40, xscale="log", yscale="log", bins="log", mincnt=1, cmap="Blues", lw=0.1)
        fig.colorbar(cells, ax=ax, label="transitions" if i % 3 == 2 or i == len(points) - 1 else "")
        ends = max(u.min(), error.min()), min(u.max(), error.max())
        ax.plot(ends, ends, color="black", lw=1, linestyle="--")
        ax.plot(*binned_median(u, error), color=COLOURS[1], marker="o", ms=3, lw=1.6)
        ax.set_title(f"{env}, {(labels or {}).get(name, name)}\nSpearman $\\rho$ = {spearman(u, error):.2f}, n = {len(u):,}")
        ax.set_xlabel("Uncertainty u (delta-normalised)")
        ax.set_ylabel("True model error (delta-normalised)" if i % 3 == 0 else "")
    return fig


KINDS = {"curves": plot_curves, "bars": plot_bars, "alpha": plot_alpha, "model-error": plot_model_error}


def main(argv=None):
    """Draw what argv asks for; 0, or 2 with one line on stderr for bad input."""
    args = build_parser().parse_args(argv)
    try:
        if args.kind not in ("curves", "bars") and (args.reference or args.table):
            raise ValueError("--reference and --table go with --kind curves and bars only")
        labels = {name: label or name for name, _, label in (item.partition("=") for item in args.names or ())}
        out = Path(args.out or Path(args.folders[0]) / f"{args.kind}.png")
        with matplotlib.rc_context(STYLE):
            fig = KINDS[args.kind](args, labels)
            out.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(out, dpi=200)
    except (ValueError, OSError, csv.Error) as error:
        print(f"plot.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

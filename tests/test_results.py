"""Every number in a page's result table is results/summary.csv's, and that file is what the runs in results/ give.

A table is marked by a comment before it, which names what each column after the first holds:

    <!-- table: summary.csv fig2/wombet@0 fig2/wombet@25000 control/control@25000 published/*@100000 -->
    | Task | zero-shot | WOMBET | without imagination | best published |
    |---|---|---|---|---|
    | HalfCheetah-v4 | 2,751 | 6,040 ± 1,595 | 5,123 [4,207, 6,801] | 8,330 (BRO) |

The first cell is the environment, or begins with "All" for the row over all tasks, normalised. A cell is a mean, a
mean ± standard deviation, or an interquartile mean [interval], rounded as it likes; words do not count; – is not
measured.
@mean is the mean over the marks after step 0, and method:length the length of the episodes. wombet>sac@50000 is the
probability that a run of WOMBET is above one of SAC at that step of SAC's.

Anywhere in a page, a value with an interval, as 0.52 [0.12, 0.92], is some row's of that file.

A table by seed is marked, too, by the groups of its columns, and comes from the runs; its first cell names the rest:

    <!-- by seed: fig2/wombet control/control -->
    | Hopper-v4, seeds 0, 1 | WOMBET | nothing imagined |
    |---|---|---|
    | at 25,000 steps | 950, 951 | 886, 1,133 |
"""

import csv
import re
from pathlib import Path

import pytest

import plot

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- table: summary.csv"
NUMBER = r"(-?[\d.]+)"
BETTER = re.compile(r"probability of (?:improvement on ([\w-]+)@(\d+)|a higher (\w+).* over the marks than ([\w-]+))")
CELL = re.compile(rf"^{NUMBER}(?: ± {NUMBER}| \[{NUMBER}, {NUMBER}\])?$")


def read_summary(path):
    """{(topic, environment or "All", method, step or "mean"): row} of returns in the target phase, of method:offline
    before it, where step counts updates, and of method:length; over all tasks of normalised returns. And of
    probabilities, whose method is wombet>rival or wombet:length>rival, and whose step is the rival's."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] in ("target", "offline")]
    found = {}
    for row in rows:
        env, offline = "All" if "+" in row["env"] else row["env"], ":offline" * (row["phase"] == "offline")
        if match := BETTER.fullmatch(row["quantity"]):
            rival, step, length, other = match.groups()
            method = f"{row['method']}{offline}{':length' * (length == 'length')}>{rival or other}"
            found[row["topic"], env, method, step or "mean"] = row
            continue
        quantity, over, _ = row["quantity"].partition(" over the marks")
        if quantity == "length" or quantity.startswith("normalised" if "+" in row["env"] else "return"):
            method = row["method"] + offline + ":length" * (quantity == "length")
            found[row["topic"], env, method, "mean" if over else row["step"]] = row
    return found


INTERVAL = re.compile(r"([−-]?\d[\d.,]*) \[([−-]?\d[\d.,]*), ([−-]?\d[\d.,]*)\]")


def unknown_intervals(text, path):
    """The values with an interval in a text that are no row of that summary."""
    with open(path, newline="") as file:
        rows = [(row["iqm"] or row["mean"], row["low"], row["high"]) for row in csv.DictReader(file) if row["low"]]
    found = []
    for match in INTERVAL.finditer(text):
        numbers = [number.replace(",", "").replace("−", "-") for number in match.groups()]
        digits = [len(number.partition(".")[2]) for number in numbers]
        if not any([f"{float(x):.{d}f}" for x, d in zip(row, digits)] == numbers for row in rows):
            found.append(match[0])
    return found


def look_up(summary, env, column):
    """The row that `topic/method@step` names; of topic/*@step the one with the highest mean. None without one."""
    topic, method, step = re.fullmatch(r"([\w-]+)/([\w*:>-]+)@(\d+|mean)", column).groups()
    rows = [row for (t, e, m, s), row in summary.items()
            if (t, e, s) == (topic, env, step) and method in ("*", m)]
    return max(rows, key=lambda row: float(row["mean"]), default=None)


def faults(text, summary):
    """What is wrong with the marked tables of a page, a line each; None if it has none."""
    found, parts = [], text.split(MARK)[1:]
    for part in parts:
        columns, _, below = part.partition("-->")
        table = re.match(r"\s*((?:\|.*\n)+)", below + "\n")
        rows = [line.strip().strip("|").split("|") for line in table[1].splitlines()] if table else []
        if len(rows) < 3 or any(len(row) != len(columns.split()) + 1 for row in rows):
            found.append(f"the comment must name every column but the first of the table below it:{columns}")
            continue
        for env, *cells in rows[2:]:
            env = "All" if env.strip().startswith("All") else env.strip()
            for column, cell in zip(columns.split(), cells):
                plain = re.sub(r"(?<=\d),(?=\d{3})", "", re.sub(r"[*()]|\b[A-Za-z]\w*", "", cell).replace("−", "-"))
                row, match = look_up(summary, env, column), CELL.match(plain.strip())
                if row is None and plain.strip() in ("–", ""):
                    continue
                if row is None or not match:
                    found.append(f"{env} {column}: {cell.strip()!r} " + ("cannot be read" if row else "is not in it"))
                    continue
                keys = ("iqm", "low", "high") if match[3] else ("mean", "std")
                if match[3] and not row["iqm"]:  # a probability
                    keys = ("mean", "low", "high")
                for number, key in zip((n for n in match.groups() if n), keys):
                    digits = len(number.partition(".")[2])
                    if not row[key] or f"{float(row[key]):.{digits}f}" != f"{float(number):.{digits}f}":
                        found.append(f"{env} {column}: {number} for {key} {row[key] or '(none)'}")
    return found if parts else None


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "baselines/README.md"])
def test_tables_hold_the_summarys_numbers(page):
    path = ROOT / page
    if not path.exists() or MARK not in path.read_text(encoding="utf-8"):
        pytest.skip(f"{page} has no table marked {MARK} -->")
    assert faults(path.read_text(encoding="utf-8"), read_summary(ROOT / "results" / "summary.csv")) == []


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_each_interval_is_in_the_summary(page):
    assert unknown_intervals((ROOT / page).read_text(encoding="utf-8"), ROOT / "results" / "summary.csv") == []


SEEDS = "<!-- by seed:"


def number(value):
    return f"{value:,.{0 if abs(value) >= 99.5 else 1}f}".replace("-", "−")


def of_a_run(folder):
    """{row's name: cell} of one run: what tables by seed may say of it."""
    with open(folder / "progress.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "target"]
    column = lambda key: {int(row["env_steps"]): float(row.get(key) or "nan") for row in rows}
    returns, lengths, errors = map(column, ("return_mean", "length_mean", "q_error"))
    marks = [step for step in returns if step > 0]
    mean = lambda values: number(sum(values[step] for step in marks) / len(marks))
    cells = {}
    if len(marks) == 10:
        cells = {"return over the ten marks": mean(returns), "length over the ten marks": mean(lengths),
                 "of 10 evaluations, without a fall in ten episodes": str([lengths[s] for s in marks].count(1000.0))}
        if all(errors[step] == errors[step] for step in marks):  # older runs have none
            cells["`q_error` over the ten marks"] = mean(errors)
    if rows[-1].get("acceptance"):
        cells["trajectories of the first D_S that pass"] = f"{100 * float(rows[-1]['acceptance']):.0f} %"
    if 0 in returns and rows[-1].get("source_steps") != "0":  # from scratch nothing is switched
        cells["at the switch"] = number(returns[0])
        cells["at 2,500 over row 0"] = f"{100 * returns[2500] / returns[0]:.0f} %"
    return {**cells, **{f"at {step:,} steps": number(value) for step, value in returns.items()}}


def by_seed(text, results):
    """What is wrong with a page's tables by seed, a line each."""
    found = []
    for part in text.split(SEEDS)[1:]:
        groups, _, below = part.partition("-->")
        lines = re.match(r"\s*((?:\|.*\n)+)", below + "\n")[1].splitlines()
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        env, _, seeds = header[0].partition(", seeds ")
        if any(len(row) != 1 + len(groups.split()) for row in (header, *rows)):
            found.append(f"the comment must name every column but the first of the table below it:{groups}")
            continue
        for column, group in enumerate(groups.split(), 1):
            topic, _, method = group.partition("/")
            folders = [results / topic / f"{env}__{method}__{seed}" for seed in seeds.split(", ")]
            runs = [of_a_run(folder) if folder.exists() else {} for folder in folders]
            for name, *cells in rows:
                right = ", ".join(run.get(name, "–") for run in runs) if any(name in run for run in runs) else "–"
                if cells[column - 1] not in (right, "the same" if column == 2 and right == cells[0] else right):
                    found.append(f"{env} {group} {name}: {cells[column - 1]!r} is {right!r}")
    return found


def test_tables_by_seed_hold_the_runs_numbers():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert text.count(SEEDS) == text.count(", seeds 0, 1, 2 |") + text.count(", seeds 0, 1, 2, 3, 4 |") > 4  # all
    assert by_seed(text, ROOT / "results") == []


def test_a_wrong_table_by_seed_is_named(tmp_path):
    for seed, (first, last, whole) in enumerate(((100.2, 1234.6, 3), (2000.0, -2.0, 0))):
        folder = tmp_path / "t" / f"Hopper-v4__a__{seed}"
        folder.mkdir(parents=True)
        lines = [f"target,{2500 * k},{value},{1000 if 0 < k <= whole else 500}"
                 for k, value in enumerate([first, *9 * [90.0], last])]
        (folder / "progress.csv").write_text("\n".join(["phase,env_steps,return_mean,length_mean", *lines]))
    right = """<!-- by seed: t/a -->
| Hopper-v4, seeds 0, 1 | A |
|---|---|
| at the switch | 100, 2,000 |
| at 25,000 steps | 1,235, −2.0 |
| at 2,500 over row 0 | 90 %, 4 % |
| return over the ten marks | 204, 80.8 |
| length over the ten marks | 650, 500 |
| of 10 evaluations, without a fall in ten episodes | 3, 0 |
| at 7 steps | – |
"""
    assert by_seed(right, tmp_path) == []
    for wrong in (right.replace("1,235", "1,234"), right.replace("90 %", "91 %"), right.replace("| – |", "| 3 |")):
        fault, = by_seed(wrong, tmp_path)
        assert "Hopper-v4 t/a at " in fault
    assert "every column" in by_seed(right.replace("100, 2,000 |", "100, 2,000 | 9 |"), tmp_path)[0]


def test_summary_is_what_the_runs_give(tmp_path):
    kept = ROOT / "results" / "summary.csv"
    if not kept.exists():
        pytest.skip("results/summary.csv is not there yet")
    assert plot.main([str(ROOT / "results"), "--kind", "summary", "--published",
                      str(ROOT / "results" / "published_curves.csv"), "--out", str(tmp_path / "summary.csv")]) == 0
    assert (tmp_path / "summary.csv").read_text() == kept.read_text(), (
        "run python plot.py results --kind summary --published results/published_curves.csv --out results/summary.csv")


# the check itself: a right table passes, each wrong one is named

SUMMARY = """topic,phase,env,method,quantity,step,mean,std,iqm,low,high,seeds
fig2,target,Hopper-v4,wombet,return,0,1234.56,300.4,1200.2,900,1500.7,5
fig2,target,Hopper-v4,wombet,q_error,0,7,1,7,7,7,5
fig2,target,Hopper-v4,wombet,return over the marks,0,600,1,600,500,700,5
fig2,target,Hopper-v4,wombet,length over the marks,0,80,1,80,70,90,5
fig2,target,Hopper-v4,wombet,probability of improvement on sac@0,0,0.5,,,0.123,1,5
fig2,target,Hopper-v4,wombet,probability of improvement on sac@9,7,0.6,,,0.2,0.9,5
fig2,target,Hopper-v4,wombet,probability of a higher length over the marks than sac,7,0.7,,,0.3,1,5
fig2,target,Hopper-v4,wombet,probability of a higher return over the marks than sac,7,0.8,,,0.4,1,5
fig2,offline,Hopper-v4,wombet,return,0,8,1,8,8,8,5
fig2,target,Hopper-v4+Walker2d-v4,wombet,normalised by td3-1m,0,38.25,,37.2,30,41,5
control,target,Hopper-v4,control,return,25000,-1234.5,,,,,1
published,target,Hopper-v4,sac,return,50000,530,99,,,,10
published,target,Hopper-v4,bro_utd10,return,50000,2485,99,,,,10
"""
PAGE = """text
<!-- table: summary.csv fig2/wombet@0 control/control@25000 published/*@50000 -->
| Task | one | two | three |
|---|---|---|---|
| Hopper-v4 | {} | {} | {} |
| All tasks | {} | – | – |
more text
"""


def check(tmp_path, *cells):
    (tmp_path / "summary.csv").write_text(SUMMARY)
    return faults(PAGE.format(*cells), read_summary(tmp_path / "summary.csv"))


@pytest.mark.parametrize("cells", [
    ("1,235", "−1,234.5", "2,485", "38"), ("**1,234.6 ± 300**", "−1234.5", "2,485 (BRO)", "37 [30, 41]"),
    ("1,200 [900, 1,501]", "-1234.5", "2485 (bro_utd10)", "38.2")])
def test_right_tables_pass(tmp_path, cells):
    assert check(tmp_path, *cells) == []


def test_what_is_before_the_first_step_has_a_name_of_its_own(tmp_path):
    (tmp_path / "summary.csv").write_text(SUMMARY)
    page = PAGE.replace("wombet@0", "wombet:offline@0").format("8 ± 1", "-1234.5", "2,485", "–")
    assert faults(page, read_summary(tmp_path / "summary.csv")) == []


def test_means_over_the_marks_and_lengths_have_names_of_their_own(tmp_path):
    page = PAGE.replace("wombet@0", "wombet@mean").replace("control/control@25000", "fig2/wombet:length@mean")
    (tmp_path / "summary.csv").write_text(SUMMARY)
    assert faults(page.format("600 ± 1", "80", "2,485", "–"), read_summary(tmp_path / "summary.csv")) == []
    assert len(faults(page.format("601", "81", "2,485", "–"), read_summary(tmp_path / "summary.csv"))) == 2


@pytest.mark.parametrize("column, right", [
    ("wombet>sac@9", "0.60 [0.20, 0.90]"), ("wombet:length>sac@mean", "0.7 [0.3, 1]"),
    ("wombet>sac@mean", "0.80 [0.40, 1.00]")])
def test_probabilities_have_names_of_their_own(tmp_path, column, right):
    (tmp_path / "summary.csv").write_text(SUMMARY)
    page, summary = PAGE.replace("wombet@0", column), read_summary(tmp_path / "summary.csv")
    assert faults(page.format(right, "-1234.5", "2,485", "–"), summary) == []
    assert "for mean" in faults(page.format("0.61 [0.20, 0.90]", "-1234.5", "2,485", "–"), summary)[0]


def test_intervals_in_prose(tmp_path):
    (tmp_path / "summary.csv").write_text(SUMMARY)
    right = "is 0.50 [0.12, 1.00], 1,200 [900, 1,501] and 37 [30, 41]; as [7, 8] and 3 of [1, 2]"
    assert unknown_intervals(right, tmp_path / "summary.csv") == []
    wrong = ["0.51 [0.12, 1.00]", "0.5 [0.13, 1]", "1,235 [900, 1,501]", "−37 [30, 41]"]
    assert unknown_intervals(", ".join(wrong), tmp_path / "summary.csv") == wrong


@pytest.mark.parametrize("at, cell, words", [
    (0, "1,234", "1234 for mean"), (0, "1,235 ± 301", "301 for std"), (0, "1,235 [900, 1501]", "1235 for iqm"),
    (0, "1,200 [900, 1,502]", "1502 for high"), (0, "7", "7 for mean"), (0, "8", "8 for mean"),
    (0, "–", "cannot be read"),
    (1, "1,234.5", "1234.5 for mean"), (1, "-1234.5 ± 3", "3 for std"), (2, "530", "530 for mean"),
    (2, "2,485 of 3", "cannot be read"), (3, "38 ± 2", "2 for std"), (3, "1,235", "1235 for mean")])
def test_wrong_tables_are_named(tmp_path, at, cell, words):
    cells = ["1,235", "-1234.5", "2,485", "38"]
    cells[at] = cell
    fault, = check(tmp_path, *cells)
    assert words in fault


def test_what_the_summary_lacks_and_a_wrong_comment_are_named(tmp_path):
    (tmp_path / "summary.csv").write_text(SUMMARY)
    summary = read_summary(tmp_path / "summary.csv")
    page = PAGE.format("1,235", "-1234.5", "2,485", "38")
    assert "is not in it" in faults(page.replace("wombet@0", "wombet@5000"), summary)[0]
    assert "every column" in faults(page.replace(" control/control@25000", ""), summary)[0]
    assert "every column" in faults(page.replace("| Task", "text\n| Task"), summary)[0]
    assert faults("no table", summary) is None

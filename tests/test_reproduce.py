"""experiments/reproduce.py: its grid against the programs' flags, its runner with stubs, quick runs, also in Slurm."""

import csv
import fcntl
import getpass
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import common
import sac
import wombet
from experiments import reproduce

SCRIPT = Path(reproduce.__file__)

STUB = """import pathlib, sys, time
folder, mode, *more = sys.argv[1:]
if folder == "--resume":
    folder, mode = mode, "resumed"
folder = pathlib.Path(folder)
folder.mkdir(parents=True, exist_ok=True)
print(mode, flush=True)
if mode == "fail":
    sys.exit("one\\ntwo: what went wrong")
if mode == "slow":
    (folder / "checkpoint.pt").touch()
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        sys.exit(130)
if mode == "source":  # it goes on until the run that waits for source.pt has begun
    (folder / "source.pt").touch()
    while not pathlib.Path(more[0]).exists():
        time.sleep(0.05)
(folder / "progress.csv").write_text(mode)
"""


# ------------------------------------------------------------------------------------------------------------- the grid


def budget(name):
    return SimpleNamespace(**reproduce.BUDGETS[name], runs="runs", results="results")


@pytest.mark.parametrize("name", reproduce.BUDGETS)
def test_every_command_is_one_that_its_program_takes(name, monkeypatch):
    monkeypatch.setattr(wombet, "train", lambda args: None)
    monkeypatch.setattr(common, "train", lambda *args: None)
    jobs, checked = reproduce.grid(budget(name), ["all", "baselines"]), set()
    flags = {(job.topic, job.folder): job.flags for job in jobs}
    for job in jobs:
        kind = (job.topic, job.script, job.folder.split("__")[0])
        if kind not in checked and job.script != "experiments/bound.py":
            checked.add(kind)
            # of a run that goes on, all that it is given together
            words = (*flags[Path(job.base).parts[-2:]], *job.flags[2:]) if job.base else job.flags
            assert importlib.import_module(Path(job.script).stem).main(list(words)) == 0, job
    assert {script for _, script, _ in checked} >= {"wombet.py", "baselines/ppo.py", "baselines/combo.py"}


def test_the_grid_is_the_issues():
    jobs = reproduce.grid(budget("cpu"), ["all"])
    assert len(jobs) == len({(job.topic, job.folder) for job in jobs})
    count = lambda topic, name: len([job for job in jobs if job.topic == topic and f"__{name}__" in job.folder])
    assert [count("fig2", name) for name in ("wombet", "scratch", "sac", "td3", "ppo")] == [20, 20, 12, 12, 12]
    assert [count("control", name) for name in ("control", "scratch-long")] == [20, 12]
    assert [count("parts", name) for name in ("model", "first", "data")] == [12, 12, 12]
    assert [count("fig3", name) for name in ("bc", "iql", "cql", "mopo", "combo")] == [6] * 5
    assert [count("fig4", name) for name in ("bc", "iql", "cql", "mopo", "combo", "awac")] == [6] * 6
    assert count("fig5", "half") == count("fig5", "tenth") == 12 and count("preset", "preset") == 12
    assert count("preset", "preset-scratch") == 12
    assert [count("shift", f"{kind}-{name}") for kind in ("backward", "stand")
            for name in ("control", "nokeep", "new", "new-model", "new-data", "iql")] == [6] * 12
    assert [count("fig6", f"filter-{kind}") for kind in ("dual", "return", "uncertainty", "none")] == [12] * 4
    # what a run needs, a run before it leaves
    left = set()
    for job in jobs:
        assert left.issuperset(job.needs)
        left |= {f"runs/{job.topic}/{job.folder}/{name}" for name in ("source.pt", "first_dataset.npz", "done")}
        left |= {str(Path(job.result).with_name(name)) for name in job.kept}
    paper = reproduce.grid(budget("paper"), ["fig2", "preset"])
    assert len([job for job in paper if "__sac__" in job.folder]) == 6 * 5
    assert not any("--imagined-trajectories" in job.flags for job in paper)  # the default's number


GIVEN = {
    "control/control": "--alpha-rule fixed --alpha 0",
    "parts/data": "--no-warm-start --alpha-rule fixed --alpha 0",
    "parts/model": "--no-warm-start --no-keep-source-data --alpha-gain 0.3",
    "parts/first": "--no-warm-start --no-keep-source-data --alpha-gain 0.3 --imagine-every 0",
    "fig2/scratch": "--no-prior",
    "fig3/bc": "--offline-updates 20000", "fig3/cql": "--offline-updates 10000",
    "fig3/combo": "--offline-updates 10000",
    "fig4/bc": "--online-steps 25000", "fig4/awac": "--online-steps 25000",
    "fig5/half": "--alpha-rule fixed --alpha 0.5",
    "fig6/filter-none": "--imagine-every 0 --filter none",
    "preset/preset": "--preset paper --snapshot-window 2000 --imagined-trajectories 16 "
                     "--source-run runs/fig2/HalfCheetah-v4__wombet__0",
    "preset/preset-scratch": "--no-prior --target-steps 25000 --preset paper",
    "shift/stand-nokeep": "--source stand --no-keep-source-data",
    "shift/stand-new": "--source stand --no-warm-start",
    "shift/backward-control": "--source backward --alpha-rule fixed --alpha 0",
}


def test_what_each_group_is_given():
    """Its flags one behind the other; and of what results/ keeps the last is what says that a run is done."""
    jobs = {reproduce.title(job): job for job in reproduce.grid(budget("cpu"), ["all"])}
    for group, flags in GIVEN.items():
        topic, name = group.split("/")
        assert f"{flags} " in " ".join(jobs[f"{topic}/HalfCheetah-v4__{name}__0"].flags) + " ", group
    assert all(job.kept[-1] == Path(job.result).name for job in jobs.values() if job.topic != "bound")


def test_list_prints_commands_one_a_line(capsys):
    assert reproduce.main(["control", "--seeds", "3", "--list", "--only", "*Hopper*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("python wombet.py --env Hopper-v4 --name wombet --seed 3 --source-steps 50000 "
                        "--target-steps 25000 --out runs/fig2")
    assert "--alpha-rule fixed --alpha 0 --source-run runs/fig2/Hopper-v4__wombet__3 --out runs/control" in lines[1]
    assert "--no-prior --target-steps 25000 --out runs/fig2" in lines[2]
    base, copy = "runs/fig2/Hopper-v4__scratch__3", "runs/control/Hopper-v4__scratch-long__3"
    assert lines[3:] == [f"mkdir -p runs/control && {{ [ -d {copy} ] || {{ cp -r {base} {copy} && rm -f {copy}/done; "
                         f"}}; }} && python wombet.py --resume {copy} --target-steps 75000"]


def test_a_listed_command_copies_from_a_folder_with_a_space(tmp_path, capsys):
    out = tmp_path / "my runs"
    base, folder = (out / "runs" / topic / "Hopper-v4__bc__0" for topic in ("fig3", "fig4"))
    base.mkdir(parents=True)
    (base / "checkpoint.pt").write_text("offline")
    (base / "done").touch()
    assert reproduce.main(["fig4", "--budget", "quick", "--out", str(out), "--list", "--only", "fig4/*bc*"]) == 0
    copy = capsys.readouterr().out.rpartition(" && ")[0]
    assert subprocess.run(copy, shell=True, cwd=tmp_path).returncode == 0
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"] and [*tmp_path.iterdir()] == [out]
    (folder / "checkpoint.pt").write_text("online")  # as the run leaves it: a second time the line goes on from there
    (folder / "done").touch()  # as the runner does
    assert subprocess.run(copy, shell=True, cwd=tmp_path).returncode == 0
    assert (folder / "checkpoint.pt").read_text() == "online" and (folder / "done").exists()


README = (SCRIPT.parent / "README.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^python experiments/reproduce.py ([^#\n]*)", README, re.M))
def test_each_command_of_the_readme_is_understood(command, capsys):
    assert reproduce.main([*shlex.split(command), "--list"]) == 0, capsys.readouterr().err


def test_the_readme_has_every_topic():
    assert sorted(re.findall(r"^\| `(\w+)` \|", README, re.M)) == sorted(reproduce.TOPICS)


@pytest.mark.parametrize("flags", [["figure"], ["fig2", "--jobs", "0"], ["fig2", "--only", "fig3/*"], ["fig2", "--x"],
                                   ["fig2", "--budget", "quick", "--out", "/dev/null"], ["fig2", "--seeds", "-1"],
                                   ["fig2", "--list", "--slurm-args=--partition=gpu"],
                                   ["baselines", "--budget", "quick"]])
def test_bad_input_is_one_line(flags, capsys):
    assert reproduce.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("reproduce.py: ") and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- the runner


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """The runner looks for what has ended every half second; stubs take less."""
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(0.02)))


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Makes a topic of stubs: call it with {name: (mode, names of those whose source.pt it needs)}."""
    (tmp_path / "stub.py").write_text(STUB)

    def topic(**modes):
        def jobs(b):
            for name, (mode, needs) in modes.items():
                more = [f"{b.runs}/t/b"] if mode == "source" else []
                yield reproduce.Job("t", name, str(tmp_path / "stub.py"), (f"{b.runs}/t/{name}", mode, *more),
                                    f"{b.results}/t/{name}/progress.csv",
                                    tuple(f"{b.runs}/t/{need}/source.pt" for need in needs), None)
        monkeypatch.setitem(reproduce.TOPICS, "t", jobs)

    topic.run = lambda *flags: reproduce.main(["t", "--out", str(tmp_path), *flags])
    topic.said = lambda name: (tmp_path / "results" / "t" / name / "progress.csv").read_text()
    return topic


def test_a_failed_run_is_reported_and_the_rest_goes_on(stubs, tmp_path, capsys):
    stubs(a=("fail", []), b=("ok", ["a"]), c=("ok", []))
    assert stubs.run("--jobs", "1") == 1
    out = capsys.readouterr().out
    assert "failed: t/a: exit code 1" in out and "    two: what went wrong\n" in out  # its log's last lines
    assert "failed: t/b: needs " in out and "done: t/c" in out and out.endswith("1 done, 2 failed\n")
    assert stubs.said("c") == "ok" and not (tmp_path / "results" / "t" / "a").exists()


def test_a_source_phase_is_waited_for_but_not_the_run_that_leaves_it(stubs, capsys):
    stubs(b=("ok", ["a"]), a=("source", []))
    assert stubs.run("--jobs", "2") == 0  # a ends once b has begun
    assert stubs.said("a") == "source" and stubs.said("b") == "ok"


def test_only_brings_what_its_runs_need(stubs, tmp_path, capsys):
    """Also with --again, which would else delete a result, and then miss what it needs."""
    stubs(a=("source", []), b=("ok", ["a"]), c=("ok", []))
    assert stubs.run("--jobs", "2", "--only", "t/b") == 0
    assert stubs.said("b") == "ok" and not (tmp_path / "results" / "t" / "c").exists()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results" / "t" / "b" / "progress.csv").write_text("kept")
    assert stubs.run("--jobs", "2", "--only", "t/b", "--again") == 0
    assert stubs.said("b") == "ok" and not (tmp_path / "results" / "t" / "c").exists()


def test_again_is_for_each_topic_that_is_named(tmp_path, monkeypatch):
    """"all" does not hold `baselines`."""
    monkeypatch.setattr(reproduce, "forget", lambda jobs, b: seen.extend(jobs))
    monkeypatch.setattr(reproduce, "run_all", lambda *_: 0)
    for topics, wanted in ((["all", "baselines"], {*reproduce.ALL, "baselines"}), (["all"], {*reproduce.ALL}),
                           (["fig5"], {"fig5"})):
        seen = []
        assert reproduce.main([*topics, "--again", "--out", str(tmp_path)]) == 0
        assert {job.topic for job in seen} == wanted


def test_the_bound_of_another_seed_is_another_result(tmp_path):
    jobs = []
    for seed in (0, 7):
        b = SimpleNamespace(**{**vars(budget("quick")), "few": [seed], "many": [seed]})
        jobs += [job for job in reproduce.bound(b) if job.topic == "bound"]
    assert len({job.folder for job in jobs}) == len({job.result for job in jobs}) == 2
    assert all(Path(job.result).parent == Path(job.flags[-1]) for job in jobs)  # --out


def test_a_run_a_core_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    assert reproduce.parse_args(["fig2"]).jobs == 1


def test_an_offline_method_learns_from_the_data_in_results(tmp_path, monkeypatch, capsys):
    """So the run that imagined them need not be made again; --again takes them away."""
    monkeypatch.setattr(reproduce, "start", lambda job, b: started.append(reproduce.title(job)))
    source, method = "shift/Hopper-v4__backward__0", "shift/Hopper-v4__backward-bc__0"
    folder = tmp_path / "results" / source
    run = lambda *flags: reproduce.main(["shift", "--budget", "quick", "--out", str(tmp_path), "--jobs", "1", *flags])
    for files, first in (((), source), (("progress.csv",), source), (("progress.csv", "first_dataset.npz"), method)):
        started = []
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / name).touch()
        assert run("--only", source, method) == 1 and started[0] == first, files
    assert run("--only", source, "--again") == 1 and not any(folder.iterdir())


def test_what_goes_on_is_a_copy_that_is_not_done_yet(stubs, tmp_path):
    b = SimpleNamespace(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"))
    base, folder = tmp_path / "runs" / "t" / "a", tmp_path / "runs" / "t" / "c"
    base.mkdir(parents=True)
    for name in ("checkpoint.pt", "done"):
        (base / name).touch()
    job = reproduce.Job("t", "c", str(tmp_path / "stub.py"), ("--resume", str(folder)), "none", (), str(base))
    assert reproduce.start(job, b).wait(60) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "progress.csv"]
    assert sorted(path.name for path in base.iterdir()) == ["checkpoint.pt", "done"]


def test_done_is_skipped_and_named_until_again(stubs, tmp_path, capsys):
    stubs(a=("ok", []), b=("ok", []))
    assert stubs.run("--only", "t/a") == 0
    capsys.readouterr()
    (tmp_path / "results" / "t" / "a" / "progress.csv").write_text("kept")
    assert stubs.run() == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped, for it is done: ") and "results/t/a\n" in out and "done: t/b" in out
    assert stubs.said("a") == "kept"
    assert stubs.run("--again") == 0
    assert stubs.said("a") == "ok" and "2 done, 0 failed" in capsys.readouterr().out


def test_what_is_done_with_other_flags_is_named(tmp_path, monkeypatch, capsys):
    """As where a default has changed since; not a flag that was not there then, nor one of imagination with none."""
    flags = ("--env", "Hopper-v4", "--name", "a", "--seed", "0", "--target-steps", "500", "--out", "runs/t")
    control = ("--alpha-rule", "fixed", "--alpha", "0")
    result = "results/t/Hopper-v4__{}__0/progress.csv"
    jobs = [reproduce.Job("t", f"Hopper-v4__{name}__0", script, (*flags, *more), str(tmp_path / result.format(name)),
                          (), None)
            for name, script, *more in (("same", "wombet.py"), ("other", "wombet.py"), ("sac", "baselines/sac.py"),
                                        ("control", "wombet.py", *control))]
    monkeypatch.setitem(reproduce.TOPICS, "t", lambda b: jobs)
    before = ({"device": "cuda"}, {"utd": 5, "lr": 0.1, "alpha_gain": 0.7}, {}, {"alpha_gain": 0.7})
    for job, module, more in zip(jobs, (wombet, wombet, sac, wombet), before):
        kept = {**vars(module.build_parser().parse_args(list(job.flags))), **more}
        kept.pop("hidden")
        Path(job.result).parent.mkdir(parents=True)
        Path(job.result).with_name("config.json").write_text(json.dumps({"flags": kept}))
        Path(job.result).touch()
    assert reproduce.main(["t"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(Path(job.result).parent.name) for line, job in zip(lines, jobs)] == [True, False, True, True]
    assert lines[1].endswith("Hopper-v4__other__0, though with --alpha-gain 0.7, --lr 0.1, --utd 5")


def test_what_was_begun_with_other_flags_does_not_go_on(tmp_path, monkeypatch, capsys):
    """It would end in results/ as if it were what the command gives now."""
    flags = ("--env", "Hopper-v4", "--name", "a", "--target-steps", "2", "--random-steps", "1", "--no-prior",
             "--out", str(tmp_path / "runs" / "t"))
    job = reproduce.Job("t", "Hopper-v4__a__0", "wombet.py", flags, f"{tmp_path}/results/t/x/progress.csv", (), None)
    monkeypatch.setitem(reproduce.TOPICS, "t", lambda b: [job])
    folder = tmp_path / "runs" / "t" / job.folder
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    then = {**vars(wombet.build_parser().parse_args(list(flags))), "alpha_gain": 0.3}
    (folder / "config.json").write_text(json.dumps({"flags": then}))
    assert reproduce.main(["t", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--alpha-gain 0.3" in error and "--again" in error and error.count("\n") == 1
    assert (folder / "checkpoint.pt").exists() and not (tmp_path / "results").exists()


def test_where_runs_is_gone_what_others_need_runs_anew(stubs, tmp_path, capsys):
    stubs(a=("source", []), b=("ok", ["a"]), c=("ok", []))
    for name in ("a", "c"):  # as in a fresh clone: results/ has them, runs/ is empty
        (tmp_path / "results" / "t" / name).mkdir(parents=True)
        (tmp_path / "results" / "t" / name / "progress.csv").write_text("kept")
    assert stubs.run("--jobs", "2") == 0
    assert [stubs.said(name) for name in "abc"] == ["kept", "ok", "kept"]  # what others compare with stays
    assert "made again in " in capsys.readouterr().out
    assert not (tmp_path / "runs" / "t" / "c").exists()
    assert stubs.run("--only", "t/c", "--fill-runs") == 0  # as a task of Slurm asks for a source phase alone
    assert (tmp_path / "runs" / "t" / "c" / "done").exists() and stubs.said("c") == "kept"


@pytest.mark.parametrize("sigint", [signal.default_int_handler, signal.SIG_IGN])
def test_interrupted_goes_on(stubs, tmp_path, capsys, sigint):
    """Also where SIGINT is ignored, as in what a script starts with `&`."""
    stubs(a=("slow", []))
    program = (f"import sys; sys.path.insert(0, {str(reproduce.ROOT)!r})\n"
               "from experiments import reproduce\n"
               f"job = lambda b: [reproduce.Job('t', 'a', {str(tmp_path / 'stub.py')!r}, (b.runs + '/t/a', 'slow'), "
               "b.results + '/t/a/progress.csv', (), None)]\n"
               f"reproduce.TOPICS['t'] = job; sys.exit(reproduce.main(['t', '--out', {str(tmp_path)!r}]))")
    before = signal.signal(signal.SIGINT, sigint)
    try:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: (tmp_path / "runs" / "t" / "a" / "checkpoint.pt").exists())
    assert stubs.run() == 1  # another process is at it
    assert stubs.run("--again") == 2 and "another process is at t/a" in capsys.readouterr().err
    assert (tmp_path / "runs" / "t" / "a" / "checkpoint.pt").exists()
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate(timeout=60)[0] and process.returncode == 130
    assert stubs.run() == 0 and stubs.said("a") == "resumed"


def test_a_reader_that_has_gone_ends_no_run(stubs, tmp_path):
    """As behind `| head`."""
    stubs(a=("ok", []))
    reader, writer = os.pipe()
    os.close(reader)
    before = os.dup(1)
    try:
        os.dup2(writer, 1)
        with open(writer, "w") as out, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert stubs.run() == 0
    finally:
        os.dup2(before, 1)
    assert stubs.said("a") == "ok"


def test_a_damaged_config_is_named(stubs, tmp_path, capsys):
    stubs(a=("ok", []))
    assert stubs.run() == 0
    (tmp_path / "results" / "t" / "a" / "config.json").write_text("")
    capsys.readouterr()
    assert stubs.run() == 2 and "config.json cannot be read" in capsys.readouterr().err


def test_again_leaves_a_run_that_was_started_by_hand(stubs, tmp_path, capsys):
    """It has no log of the runner's, but it holds its folder."""
    stubs(a=("ok", []))
    folder = tmp_path / "runs" / "t" / "a"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert stubs.run("--again") == 2 and "another process is at t/a" in capsys.readouterr().err
    assert (folder / "checkpoint.pt").exists()
    os.close(held)
    assert stubs.run("--again") == 0 and stubs.said("a") == "ok"


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it took too long"
        time.sleep(0.2)


@pytest.mark.slow
def test_one_figure_quickly(tmp_path):
    """Figure 4's shape: a source, what learns from its D_S, and what goes on online from a copy of that."""
    flags = ["fig4", "--budget", "quick", "--out", str(tmp_path), "--jobs", "2", "--only", "*wombet*", "*bc*"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = tmp_path / "results"
    assert {path.name for path in (kept / "fig2" / "Hopper-v4__wombet__0").iterdir()} == {
        "config.json", "progress.csv", "model_error.csv", "first_dataset.npz"}
    with open(kept / "fig4" / "Hopper-v4__bc__0" / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["phase"] for row in rows} == {"offline", "target"} and rows[-1]["env_steps"] == "200"
    with open(kept / "fig3" / "Hopper-v4__bc__0" / "progress.csv") as file:
        assert rows[0] == next(csv.DictReader(file))  # fig3's run is the beginning, and stays as it was


# --------------------------------------------------------------------------------------------------------------- Slurm


def test_slurm_gets_one_array_a_stage(tmp_path, monkeypatch, capsys):
    """A stub in sbatch's place keeps what it is given."""
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/bash\nn=$(ls {tmp_path}/bin | wc -l)\necho "$@" > {tmp_path}/bin/args$n\n'
                    f'cat > {tmp_path}/bin/script$n\necho "$n;cluster"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    assert reproduce.main(["control", "--budget", "quick", "--out", str(tmp_path / "out"), "--slurm",
                           "--slurm-args=--time=1:00:00 --partition='big one'"]) == 0
    first, second = (shlex.split((tmp_path / "bin" / name).read_text()) for name in ("args1", "args3"))
    assert "--array=0-1" in first and not any("dependency" in flag for flag in first) and "--time=1:00:00" in first
    assert "--array=0-1" in second and "--dependency=afterany:1" in second
    script = (tmp_path / "bin" / "script3").read_text()
    assert "names=(control/Hopper-v4__control__0 control/Hopper-v4__scratch-long__0)" in script
    assert "--budget quick" in script and "--fill-runs" in script
    assert "job array 1: 2 runs" in capsys.readouterr().out


def test_slurm_that_refuses_loses_nothing(stubs, tmp_path, monkeypatch, capsys):
    stubs(a=("ok", []))
    assert stubs.run() == 0
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text("#!/bin/bash\necho 'unrecognized option' >&2\nexit 1\n")
    stub.chmod(0o755)
    for path, says in ((f"{stub.parent}:{os.environ['PATH']}", "sbatch says: unrecognized option"),
                       ("/nowhere", "there is no sbatch on PATH")):
        monkeypatch.setenv("PATH", path)
        assert stubs.run("--again", "--slurm", "--slurm-args=--x") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"reproduce.py: --slurm: {says}") and error.count("\n") == 1
        assert stubs.said("a") == "ok" and (tmp_path / "runs" / "t" / "a" / "done").exists()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of one node, this machine, with munge; it ends with the test."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch", "squeue"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"{program} is not installed (Debian: slurm-wlm, munge)")
    if os.getuid():
        pytest.skip("slurmd wants to be root")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    place, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    place.mkdir(mode=0o755)
    (place / "key").write_bytes(os.urandom(128))
    (place / "key").chmod(0o600)
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    (place / "slurm.conf").write_text(f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={getpass.getuser()}
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={place}/munge
CredType=cred/munge
StateSaveLocation={place}
SlurmdSpoolDir={place}
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=ALL Default=YES State=UP
""")
    monkeypatch.setenv("SLURM_CONF", str(place / "slurm.conf"))
    daemons = [["munged", "--foreground", "--force", f"--socket={place}/munge", f"--key-file={place}/key",
                f"--pid-file={place}/munged.pid", f"--log-file={place}/munged.log", f"--seed-file={place}/seed"],
               ["slurmctld", "-D"], ["slurmd", "-D"]]
    with open(place / "daemons.log", "w") as log:
        processes = [subprocess.Popen(daemon, stdout=log, stderr=log) for daemon in daemons]
    try:
        wait_for(lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout)
        yield place
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()


def test_a_real_slurm(slurm, tmp_path):
    out = tmp_path / "out"
    flags = ["control", "--budget", "quick", "--out", str(out), "--only", "*wombet*", "*control__*", "--slurm",
             "--slurm-args=--time=30"]
    sent = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert sent.stdout.count("job array") == 2
    wait_for(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout, 600)
    logs = sorted((out / "runs" / "slurm").iterdir())
    said = "\n".join(log.read_text() for log in logs)
    assert len(logs) == 2 and said.count("done: ") == 2, said  # a log per task
    for folder in ("fig2/Hopper-v4__wombet__0", "control/Hopper-v4__control__0"):
        assert (out / "results" / folder / "progress.csv").exists(), said


def test_flags_of_imagination_matter_where_the_share_is_fixed_above_0(tmp_path):
    for alpha, found in (("0.5", ["--imagine-every 7"]), ("0", [])):
        flags = ("--env", "Hopper-v4", "--alpha-rule", "fixed", "--alpha", alpha)
        then = {**vars(wombet.build_parser().parse_args(list(flags))), "imagine_every": 7}
        (tmp_path / "config.json").write_text(json.dumps({"flags": then}))
        job = reproduce.Job("t", "Hopper-v4__a__0", "wombet.py", flags, "none", (), None)
        assert reproduce.other_flags(job, tmp_path) == found


def test_what_a_run_needs_needs_others_and_comes_first(tmp_path):
    b = SimpleNamespace(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"))
    needs = {"a": (), "b": (f"{b.runs}/t/a/source.pt",), "c": (f"{b.runs}/t/b/done",), "d": ()}
    whole = [reproduce.Job("t", name, "x", (), f"{b.results}/t/{name}/progress.csv", need, None)
             for name, need in needs.items()]
    for name in "ab":  # as in a fresh clone
        (tmp_path / "results" / "t" / name).mkdir(parents=True)
        (tmp_path / "results" / "t" / name / "progress.csv").touch()
    assert reproduce.to_do(whole[2:3], whole, [], False, b) == whole[:3]


def test_the_owner_of_data_that_were_taken_from_results(tmp_path):
    """As --again does of the source alone: its D_S was read from there."""
    b = SimpleNamespace(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"))
    source = reproduce.Job("fig2", "s", "x", (), f"{b.results}/fig2/s/progress.csv", (), None)
    method = reproduce.Job("fig3", "m", "x", (), f"{b.results}/fig3/m/progress.csv",
                           (f"{b.results}/fig2/s/first_dataset.npz",), None)
    assert reproduce.owners(method, [source, method], b) == [source]


def test_a_task_of_slurm_is_given_the_same_grid_and_stages_wait_one_for_the_other(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(reproduce, "sbatch", lambda *given: sent.append(given) or f"{len(sent)};cluster")
    assert reproduce.main(["fig4", "--budget", "quick", "--seeds", "3", "4", "--out", str(tmp_path), "--slurm"]) == 0
    assert len(sent) == 3  # a source, what learns from its data, what goes on
    assert [[flag for flag in flags if "dependency" in flag] for flags, _ in sent] == [
        [], ["--dependency=afterany:1"], ["--dependency=afterany:2"]]
    for _, script in sent:
        assert "--seeds 3 4" in script and f"--out {tmp_path}" in script and "fig4 --budget quick" in script


def test_flags_by_environment():
    jobs = {reproduce.title(job): " ".join(job.flags) for job in reproduce.grid(budget("cpu"), ["fig2", "fig3"])}
    for env, start in (("HalfCheetah-v4", 10000), ("Hopper-v4", 1000), ("Walker2d-v4", 1000), ("Pusher-v5", 1000)):
        assert f"--random-steps {start} " in jobs[f"fig2/{env}__td3__0"]
    for method in ("mopo", "combo"):
        assert "--rollout-length 1 " in jobs[f"fig3/Walker2d-v4__{method}__0"]
        assert "--rollout-length" not in jobs[f"fig3/HalfCheetah-v4__{method}__0"]
    assert "--no-scale-rewards" in jobs["fig3/HalfCheetah-v4__iql__0"]


def test_as_many_at_a_time_as_jobs_says(tmp_path, monkeypatch):
    running, most = [], []

    class Process:
        returncode = 0

        def __init__(self):
            self.polled = 0
            running.append(self)

        def poll(self):
            most.append(len(running))
            self.polled += 1
            if self.polled < 3:
                return None
            running.remove(self)
            return 0

    b = SimpleNamespace(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"))
    jobs = [reproduce.Job("t", f"e__{name}__0", "x", (), f"{b.results}/t/{name}/progress.csv", (), None)
            for name in "abcde"]
    monkeypatch.setattr(reproduce, "start", lambda job, b: Process())
    monkeypatch.setattr(reproduce, "keep", lambda job, b: None)
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(time=lambda: 0.0, sleep=lambda seconds: None))
    assert reproduce.run_all(jobs, 2, b) == 0 and max(most) == 2

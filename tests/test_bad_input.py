"""Nothing is silent: every flag takes effect or is refused, every file is checked, nothing is lost.

Tables of commands, each with the words that its one line on stderr must hold; the programs are started in this process.
"""

import importlib
import contextlib
import csv
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import harness
import tasks
import wombet
from filter import accept, thresholds
from harness import claimed, load, load_dataset, recent_return, run_folder, save
from replay import ReplayBuffer
from task_env import TaskEnv
from world_model import WorldModel

COMMON = """--env Hopper-v4 --seed 0 --eval-every 20 --eval-episodes 1 --checkpoint-every 20 --hidden 8 --device cpu
            --threads 1""".split()
TINY = {
    "wombet": """--source-steps 60 --target-steps 40 --random-steps 20 --snapshot-window 20 --model-hidden 8
                 --model-layers 1 --model-epochs 1 --refit-epochs 1 --refit-every 0 --members 2 --horizon 2
                 --imagined-trajectories 4 --imagined-length 5 --population 4 --elites 2 --policy-samples 2 --utd 1
                 --batch-size 8 --filter none""".split(),
    "sac": "--target-steps 40 --random-steps 20 --batch-size 8".split(),
    "td3": "--target-steps 40 --random-steps 20 --batch-size 8".split(),
    "ppo": "--target-steps 40 --rollout-steps 20 --minibatches 2".split(),
    "bc": "--offline-updates 40 --dataset DATA --batch-size 8 --critic-steps 8".split(),
    "iql": "--offline-updates 40 --dataset DATA --batch-size 8".split(),
    "mopo": """--offline-updates 40 --dataset DATA --model-hidden 8 --model-layers 1 --model-epochs 1 --members 2
               --rollout-length 1 --rollout-batch 8 --batch-size 8""".split(),
}


def start(program, *flags, data=None):
    """The program's exit code; DATA among the flags stands for a dataset."""
    argv = [str(data if flag == "DATA" else flag) for flag in flags]
    return importlib.import_module(program).main(argv)


def tiny(program, out, *flags, name="a", data=None):
    """A tiny run's exit code and folder; flags win over the tiny ones."""
    code = start(program, "--out", out, "--name", name, *COMMON, *TINY[program], *flags, data=data)
    return code, Path(out) / f"Hopper-v4__{name}__0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of every kind, by program, and "data", a dataset; no test may write to them."""
    out = tmp_path_factory.mktemp("runs")
    made = {}
    code, made["wombet"] = tiny("wombet", out, name="wombet")
    made["data"] = made["wombet"] / "dataset.npz"
    assert code == 0
    for program in ("sac", "bc"):
        code, made[program] = tiny(program, out, name=program, data=made["data"])
        assert code == 0
    return made


@pytest.fixture(scope="module")
def contents(runs):
    """What the files of those runs hold: changed by no refused command."""
    return {file: file.read_bytes() for folder in runs.values() if folder.is_dir() for file in folder.iterdir()}


def refuses(capsys, program, words, *flags, data=None, code=2):
    """Starts the program: one line on stderr, which holds all words, and the exit code."""
    capsys.readouterr()
    found = start(program, *flags, data=data)
    error = capsys.readouterr().err
    assert error.startswith(f"{program}.py: ") and error.count("\n") == 1, (flags, error)
    assert all(word in error for word in words), error
    assert found == code


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# ---------------------------------------------------------------------------------------------------------------- flags

LONG = "n" * 300
BAD = [
    # program, flags, words
    *[("wombet", [f"--{flag}={value}"], [flag, value]) for flag, values in {
        "lr": ("inf", "nan", "0", "-1", "x", "1e400"), "model-lr": ("inf", "nan"), "discount": ("5", "nan", "-0.1"),
        "plan-penalty-coef": ("inf", "nan", "-1", "1e39"), "target-penalty-coef": ("inf", "nan"),
        "target-entropy": ("nan", "inf", "-inf"), "polyak": ("nan", "2"),
        "return-threshold": ("nan", "inf", "-inf"), "u-threshold": ("nan", "inf"), "init-temperature": ("inf", "0"),
        "init-std": ("inf", "nan"), "noise-beta": ("inf",), "alpha": ("nan", "1.5"), "alpha-gain": ("inf", "nan"),
        "alpha-ema": ("nan",), "source-speed-cap": ("nan", "inf"), "source-ctrl-cost-factor": ("inf", "nan"),
        "source-reset-noise-factor": ("inf", "0"), "return-percentile": ("nan", "101"), "u-percentile": ("-1",),
        "trust-percentile": ("inf",), "momentum": ("nan",), "keep-elites": ("nan",), "reset-share": ("2",),
        "seed": ("-1", "18446744073709551616", "9223372036854775808", "1.5", "nan"), "utd": ("0", "1e3", "nan"),
        "batch-size": ("0", "-1"), "eval-every": ("0",), "checkpoint-every": ("0", "-5"), "eval-episodes": ("0",),
        "threads": ("0", "-1"), "episode-steps": ("0", "-1"), "members": ("0",), "hidden": ("0", str(10**30)),
        "filter": ("foo",), "uncertainty": ("x",), "actor-q": ("x",),
        "source-steps": ("0",), "target-steps": ("0", "-3", str(2**64))}.items() for value in values],
    ("wombet", ["--threads", "4096"], ["--threads 4096", "may use"]),
    *[("wombet", ["--device", name], ["--device", name]) for name in ("meta", "cuda:7", "abacus", "", "cpu:x",
                                                                      "vulkan")],
    *[("wombet", [f"--{flag}", ""], [flag, "empty"]) for flag in ("resume", "evaluate", "out", "source-run",
                                                                  "offline-data", "gif")],
    ("wombet", ["--resume", " "], ["resume", "empty"]),
    ("sac", ["--resume", ""], ["resume", "empty"]), ("bc", ["--dataset", ""], ["dataset", "empty"]),
    ("wombet", ["--name", ""], ["name"]), ("wombet", ["--name", "a/b"], ["a/b"]),
    ("wombet", ["--name", "a\nb"], ["name"]),
    ("wombet", ["--name", LONG], ["too long", "--name"]), ("sac", ["--name", LONG], ["too long", "--name"]),
    *[("wombet", [f"--env={name}"], ["unknown environment", repr(name)]) for name in (
        "", "Hopper", "Hopper-v", "Hopper-v04", "Hopper-v²", "-v4", "Nope-v4", "hopper-v4", "Hopper-v4 ")],
    ("wombet", ["--env", "Hopper-v3"], ["Hopper-v3"]), ("wombet", ["--env", "Hopper-v99"], ["Hopper-v99"]),
    ("wombet", ["--source", "foo"], ["'foo'"]), ("wombet", ["--source", "foo", "--no-prior"], ["'foo'"]),
    ("wombet", ["--source", ""], ["''"]), ("bc", ["--source", "foo"], ["'foo'"]),
    ("wombet", ["--source-goal-shift", "1"], ["goal_shift"]),
    # sizes that no machine holds
    *[("wombet", [flag, str(10**12)], ["GiB", flag]) for flag in (
        "--source-steps", "--target-steps", "--offline-capacity", "--hidden", "--critics",
        "--members", "--model-hidden", "--model-layers", "--population", "--batch-size", "--utd", "--eval-episodes",
        "--model-batch-size", "--policy-samples")],
    *[("wombet", [flag, str(10**12)], ["--offline-capacity", flag]) for flag in (
        "--imagined-trajectories", "--imagined-length", "--rollouts", "--rollout-length")],
    *[("sac", [flag, str(10**12)], ["GiB", flag]) for flag in ("--target-steps", "--hidden", "--batch-size",
                                                               "--layers")],
    ("bc", ["--online-steps", str(10**12)], ["GiB", "--online-steps"]),
    ("ppo", ["--rollout-steps", str(10**12)], ["--rollout-steps", "--target-steps 40"]),
    *[("sac", [f"--{flag}", value], [flag, value]) for flag, value in (
        ("actor-lr", "inf"), ("critic-lr", "nan"), ("target-entropy", "nan"), ("policy-delay", "0"))],
    *[("ppo", [f"--{flag}", value], [flag, value]) for flag, value in (
        ("clip", "inf"), ("entropy-coef", "nan"), ("value-coef", "inf"), ("max-grad-norm", "nan"),
        ("gae-lambda", "2"))],
    ("mopo", ["--rollout-batch", str(10**12)], ["GiB", "--rollout-batch"]),
    ("iql", ["--beta", "inf"], ["beta", "inf"]), ("mopo", ["--penalty-coef", "nan"], ["penalty-coef"]),
    # places
    ("wombet", ["--out", "FILE"], ["FILE", "cannot be made"]), ("wombet", ["--out", "FILE/deeper"], ["cannot be made"]),
    ("sac", ["--out", "FILE"], ["FILE", "cannot be made"]), ("wombet", ["--out", "/proc/x"], ["/proc/x"]),
    ("wombet", ["--out", "/dev/null"], ["/dev/null"]),
    ("wombet", ["--evaluate", "WOMBET", "--gif", "a.xyz"], ["--gif a.xyz", ".gif"]),
    ("wombet", ["--evaluate", "WOMBET", "--gif", "nowhere/a.gif"], ["--gif nowhere/a.gif"]),
    ("wombet", ["--evaluate", "WOMBET", "--gif", "/proc/a.gif"], ["--gif /proc/a.gif"]),
    ("wombet", ["--evaluate", "WOMBET", "--gif", "FOLDER.gif"], ["--gif FOLDER.gif"]),
    ("wombet", ["--gif", "a.gif"], ["--evaluate"]),
    ("wombet", ["--resume", "WOMBET", "--gif", "a.gif"], ["--evaluate"]),
    ("wombet", ["--resume", "WOMBET", "--evaluate", "WOMBET"], ["not both"]),
    *[("wombet", [flag, name], [name]) for flag in ("--resume", "--evaluate", "--source-run", "--offline-data")
      for name in ("nowhere", "FILE", "FOLDER.gif")],
    ("sac", ["--resume", "BC"], ["of another program"]), ("bc", ["--evaluate", "SAC"], ["of another program"]),
    ("wombet", ["--source-run", "SAC"], ["of another program"]), ("bc", ["--dataset", "nowhere.npz"], ["nowhere.npz"]),
]


@pytest.mark.parametrize("program, flags, words", BAD, ids=[f"{p} {' '.join(f)}"[:60] for p, f, _ in BAD])
def test_bad_flags(runs, contents, capsys, tmp_path, program, flags, words):
    """One line, exit code 2; what was there stays, and nothing new is left."""
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "FOLDER.gif").mkdir()
    before = files(tmp_path)
    given = [str(runs[flag.lower()]) if flag in ("WOMBET", "SAC", "BC") else flag for flag in flags]
    rest = [] if flags[0] in ("--resume", "--evaluate") else [*COMMON, *TINY[program]]
    refuses(capsys, program, words, *rest, *given, data=runs["data"])
    assert files(tmp_path) == before
    assert all(path.read_bytes() == held for path, held in contents.items())


ANOTHER = {"wombet": """--env Hopper-v5|--seed 7|--discount 0.9|--uncertainty variance|--model-epochs 9|--hidden 16
                        --critics 3|--filter return|--no-layer-norm|--batch-size 9|--name b|--out elsewhere|--utd 2
                        --offline-data DATA|--source-run x|--no-prior|--random-steps 5|--episode-steps 9|--source stand
                        --source-steps 70|--source-steps 50|--target-steps 39|--alpha-rule fixed""",
           "sac": """--env Hopper-v5|--seed 7|--discount 0.9|--hidden 16|--policy-delay 1|--layer-norm|--batch-size 9
                     --target-steps 39|--polyak 0.5|--target-entropy 1""",
           "bc": """--env Hopper-v5|--seed 7|--hidden 16|--dataset x|--batch-size 9|--source stand|--offline-updates 39
                    --source-rewards|--discount 0.9"""}


@pytest.mark.parametrize("how", ["--resume", "--evaluate"])
@pytest.mark.parametrize("program, flag", [(p, f.strip()) for p, fs in ANOTHER.items()
                                           for line in fs.split("\n") for f in line.split("|")])
def test_a_run_takes_no_flag_that_its_state_depends_on(runs, contents, capsys, tmp_path, program, flag, how):
    refuses(capsys, program, [flag.split()[0]], how, runs[program], *flag.split(), data=runs["data"])
    assert all(path.read_bytes() == held for path, held in contents.items()) and not files(tmp_path)


OF_ANOTHER_SOURCE = """--env Hopper-v5|--seed 7|--discount 0.9|--model-epochs 9|--hidden 16|--members 3|--source stand|
                       --source-speed-cap 2|--source-steps 70|--random-steps 19|--snapshot-window 0|
                       --episode-steps 9|--init-temperature 0.5|--source-ctrl-cost-factor 2|
                       --source-reset-noise-factor 3"""


@pytest.mark.parametrize("flag", [f.strip() for f in OF_ANOTHER_SOURCE.split("|")])
def test_a_source_run_is_of_the_same_source(runs, capsys, tmp_path, flag):
    words = ["other flags", flag.split()[0]]
    refuses(capsys, "wombet", words, *COMMON, *TINY["wombet"], "--source-run", runs["wombet"], *flag.split())
    assert not files(tmp_path)


def strip(rows):
    """Rows of progress.csv without the time that they took."""
    return [{key: value for key, value in row.items() if key != "wall_clock"} for row in rows]


def config(folder):
    return json.loads((folder / "config.json").read_text())["flags"]


def rates(state):
    """All learning rates in a checkpoint."""
    if isinstance(state, dict):
        return {state["lr"]} if "lr" in state and "betas" in state else set().union(*map(rates, state.values()))
    return set().union(*map(rates, state)) if isinstance(state, list) else set()


GOOD = [
    ("wombet", ["--target-steps", "60", "--lr", "1e-5"], {"target_steps": 60, "lr": 1e-5}),
    ("wombet", ["--target-steps", "50", "--eval-every", "5", "--eval-episodes", "2", "--checkpoint-every", "7"],
     {"eval_every": 5, "eval_episodes": 2, "checkpoint_every": 7, "lr": 1e-3}),
    ("sac", ["--target-steps", "60", "--actor-lr", "1e-5", "--critic-lr", "1e-5"], {"actor_lr": 1e-5}),
    ("bc", ["--offline-updates", "60", "--lr", "1e-5"], {"offline_updates": 60, "lr": 1e-5}),
    ("bc", ["--online-steps", "20", "--lr", "1e-5"], {"online_steps": 20}),
    ("bc", ["--offline-updates", "60", "--online-steps", "20"], {"offline_updates": 60, "online_steps": 20}),
]


@pytest.mark.parametrize("program, flags, held", GOOD, ids=[" ".join(f) for _, f, _ in GOOD])
def test_what_is_given_anew_takes_effect(runs, tmp_path, program, flags, held):
    """In the loop, in the optimisers and in config.json."""
    folder = Path(shutil.copytree(runs[program], tmp_path / "run"))
    assert start(program, "--resume", folder, *flags) == 0
    now = config(folder)
    assert {name: now[name] for name in held} == held
    assert {k: v for k, v in now.items() if f"--{k.replace('_', '-')}" not in flags} == {
        k: v for k, v in config(runs[program]).items() if f"--{k.replace('_', '-')}" not in flags}
    state = load(folder / "checkpoint.pt", "cpu", program)
    if "1e-5" in flags:
        learner = state["target"]["agent"] if program == "wombet" else state["agent"]
        assert rates(learner) == {1e-5}
    rows = [(row["phase"], int(row["updates"]), int(row["env_steps"])) for row in state["rows"]]
    if program == "bc":
        updates = now["offline_updates"]
        assert [r for r in rows if r[0] == "offline"] == [("offline", n, 0) for n in range(20, updates + 1, 20)]
        assert [r for r in rows if r[0] == "target"] == [
            ("target", updates + n, n) for n in range(0, now["online_steps"] + 1, 20)]
    else:
        assert rows[-1][2] == now["target_steps"]
    if "--eval-every" in flags:
        assert [r[2] for r in rows[-2:]] == [45, 50]


def test_an_offline_phase_is_over_once_steps_are_taken(runs, tmp_path, capsys):
    folder = Path(shutil.copytree(runs["bc"], tmp_path / "run"))
    assert start("bc", "--resume", folder, "--online-steps", "20") == 0
    for updates in ("60", "30"):
        refuses(capsys, "bc", ["--offline-updates", "over", "40"], "--resume", folder, "--offline-updates", updates)
    refuses(capsys, "bc", ["--online-steps 10", "20"], "--resume", folder, "--online-steps", "10")


def test_the_learning_rate_of_a_run_that_takes_anothers_source(runs, tmp_path):
    code, folder = tiny("wombet", tmp_path, "--source-run", runs["wombet"], "--lr", "1e-5")
    assert code == 0
    state = load(folder / "checkpoint.pt", "cpu", "wombet")
    assert rates(state["target"]["agent"]) == rates(state["source"]["agent"]) == {1e-5} and config(folder)["lr"] == 1e-5


def test_a_checkpoint_from_before_a_column(runs, tmp_path):
    """It goes on; what it has not measured is empty."""
    code, folder = tiny("wombet", tmp_path)
    state = load(folder / "checkpoint.pt", "cpu", "wombet")
    for row in state["rows"]:
        del row["discounted_mean"]
    save(folder / "checkpoint.pt", state)
    assert start("wombet", "--resume", folder, "--target-steps", "60") == 0
    with open(folder / "progress.csv", newline="") as file:
        column = [row["discounted_mean"] for row in csv.DictReader(file)]
    assert column[-1] and not any(column[:-1])


def test_evaluate_takes_episodes_of_its_own(runs, capsys):
    assert start("wombet", "--evaluate", runs["wombet"], "--eval-episodes", "3") == 0
    assert "over 3 episodes" in capsys.readouterr().out
    assert start("wombet", "--evaluate", runs["wombet"]) == 0
    out = capsys.readouterr().out
    assert "over 1 episodes" in out
    # the last row of the run says the same of the same episode, with the discount, too
    last = load(runs["wombet"] / "checkpoint.pt", "cpu", "wombet")["rows"][-1]
    assert f"{last['discounted_mean']:.1f} discounted" in out and last["discounted_mean"] < last["return_mean"]


# ---------------------------------------------------------------------------------------------------------------- files

CONFIGS = {  # what is written into config.json's flags; None: the key is taken out
    **{f"{key} {value!r}": ({key: value}, [key.replace("_", "-")]) for key, values in {
        "discount": (5, "x", True, [0.9], {}, float("nan")), "filter": ("foo", 3), "critics": (None, 0, 2.5, "two"),
        "checkpoint_every": (0, -1), "eval_every": (0,), "eval_episodes": (10**15,), "lr": (float("inf"), -1, ""),
        "layer_norm": (1, "yes", None), "env": (None, 5, ""), "name": (None, ""), "seed": (-1, 2**64, 0.5),
        "prior": ("no",), "threads": (0,), "out": ("", "\0"), "device": ("abacus", "meta", 3), "hidden": (10**12,),
        "target_steps": ("many", 0)}.items() for value in values},
    "a key too many": ({"nonsense": 1}, ["has nonsense"]),
    "a key too few": ({"discount": "DELETE"}, ["lacks discount"]),
    "another size": ({"hidden": 16}, ["does not fit"]),
    "another environment": ({"env": "Walker2d-v4"}, ["does not fit"]),
}


@pytest.mark.parametrize("how", ["--resume", "--evaluate", "--source-run"])
@pytest.mark.parametrize("changed, words", CONFIGS.values(), ids=CONFIGS)
def test_config_is_held_to_what_flags_are_held_to(runs, tmp_path, capsys, changed, words, how):
    if how != "--resume" and set(changed) & {"device", "threads", "eval_episodes"} and list(changed.values())[0] != 0:
        return  # this machine's, or of no matter there
    folder = Path(shutil.copytree(runs["wombet"], tmp_path / "run"))
    whole = json.loads((folder / "config.json").read_text())
    for key, value in changed.items():
        whole["flags"].pop(key) if value == "DELETE" else whole["flags"].update({key: value})
    (folder / "config.json").write_text(json.dumps(whole))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    if how == "--source-run":
        words = ["other flags"] if "does not fit" in words or 10**12 in changed.values() else words
        refuses(capsys, "wombet", words, *COMMON, *TINY["wombet"], how, folder)
    else:
        refuses(capsys, "wombet", words, how, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


NO_CONFIG = {"a list": "[1]", "a string": '"x"', "null": "null", "flags are a list": '{"flags": [1]}', "no flags": "{}",
             "flags are null": '{"flags": null}', "empty": "", "cut short": '{"flags": {"env": "Hop',
             "binary": "\udcff", "deep": "[" * 100_000, "a long number": "1" * 5000}


@pytest.mark.parametrize("how", ["--resume", "--evaluate", "--source-run"])
@pytest.mark.parametrize("text", NO_CONFIG.values(), ids=NO_CONFIG)
def test_no_config(runs, tmp_path, capsys, text, how):
    folder = Path(shutil.copytree(runs["wombet"], tmp_path / "run"))
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    rest = [*COMMON, *TINY["wombet"]] if how == "--source-run" else []
    refuses(capsys, "wombet", ["config.json"], *rest, how, folder)


def damaged(data, n):
    """n copies with a byte flipped at places over the whole length, then some cut short, empty and foreign ones."""
    places = [*np.linspace(0, len(data) - 1, n - 20).astype(int), *range(len(data) - 20, len(data))]
    for place in places:
        yield data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
    for size in (0, 1, 39, 40, 41, 200, len(data) // 2, len(data) - 1):
        yield data[:size]
    yield data + b"\0"
    yield b"not a file of ours"


@pytest.mark.parametrize("file", ["checkpoint.pt", "source.pt", "dataset.npz"])
def test_damaged_files(runs, tmp_path, file):
    """Every flipped byte and every cut is found by those who load the file."""
    data, path = (runs["wombet"] / file).read_bytes(), tmp_path / file
    shapes = TaskEnv("Hopper-v4").shapes
    read = (lambda: load_dataset(path, **shapes)) if file == "dataset.npz" else (lambda: load(path, "cpu", "wombet"))
    path.write_bytes(data)
    read()
    accepted = []
    for i, bad in enumerate(damaged(data, 200)):
        path.write_bytes(bad)
        try:
            read()
            accepted.append(i)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    if file == "dataset.npz":  # bytes of a zip that hold nothing of the arrays: dates, attributes
        whole = load_dataset(runs["data"], **shapes).filled()
        for i, bad in enumerate(damaged(data, 200)):
            if i in accepted:
                path.write_bytes(bad)
                assert all(torch.equal(values, whole[key]) for key, values in read().filled().items())
    else:
        assert accepted == []


@pytest.mark.parametrize("how, file", [("--resume", "checkpoint.pt"), ("--evaluate", "checkpoint.pt"),
                                       ("--source-run", "source.pt"), ("--offline-data", "dataset.npz")])
def test_damaged_files_at_the_command_line(runs, tmp_path, capsys, how, file):
    folder = Path(shutil.copytree(runs["wombet"], tmp_path / "run"))
    data = (folder / file).read_bytes()
    given = folder / file if how == "--offline-data" else folder
    rest = [] if how in ("--resume", "--evaluate") else [*COMMON, *TINY["wombet"]]
    middle = len(data) // 2
    for bad in (data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], data[:-50], b""):
        (folder / file).write_bytes(bad)
        refuses(capsys, "wombet", [str(folder / file)], *rest, how, given)
        assert (folder / file).read_bytes() == bad
    (folder / file).unlink()
    refuses(capsys, "wombet", [str(folder / file), "does not exist"], *rest, how, given)
    assert sorted(os.listdir(tmp_path)) == ["run"]


def paths_of(state, depth, path=()):
    """The keys that lead to every part of nested dicts."""
    for key, value in state.items():
        yield (*path, key)
        if isinstance(value, dict) and depth > 1:
            yield from paths_of(value, depth - 1, (*path, key))


WRONG = {"taken out": None, "a string": "nonsense", "a list": [1, 2], "a number": -7.5}


@pytest.mark.parametrize("program", ["wombet", "sac", "bc"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_missing_and_wrong_parts_of_a_checkpoint(runs, tmp_path, capsys, monkeypatch, program, wrong):
    """Each part in turn: what loads a state refuses it in one line, or the part is of no matter; one of them, with a
    checksum that fits, from the command line."""
    folder = Path(shutil.copytree(runs[program], tmp_path / "run"))
    whole, tried = load(folder / "checkpoint.pt", "cpu", program), 0
    load_into_new_run = loader(program, folder)
    make = functools.cache(TaskEnv._make)
    monkeypatch.setattr(TaskEnv, "_make", staticmethod(make))  # MuJoCo's part, which takes the longest, is made once
    for path in paths_of(whole, 2):
        parent = state = {key: dict(part) if isinstance(part, dict) else part for key, part in whole.items()}
        for key in path[:-1]:
            parent = parent[key]
        old = parent.pop(path[-1])
        if wrong is not None:
            parent[path[-1]] = wrong
        if path[0] in (program, "info") or path[-1] == "online_since" or isinstance(path[-1], int) or (
                wrong is not None and isinstance(old, type(wrong))):
            continue  # names the program; is logged alone; is None at first; is of that type
        with pytest.raises(ValueError, match="the checkpoint does not fit these flags") as caught:
            load_into_new_run(state)
        assert "\n" not in str(caught.value)
        tried += 1
        last = state
    assert tried > 10
    load_into_new_run(whole)  # which fits
    save(folder / "checkpoint.pt", last)
    refuses(capsys, program, ["does not fit"], "--resume", folder)


def loader(program, folder):
    """A function that loads a state into a new run of that folder's flags, as --resume does, without the rest of it."""
    module, seen = wombet if program == "wombet" else importlib.import_module("common"), []
    build = module.build

    def watch(*given):
        seen.append(given)
        return build(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build", watch)
        assert start(program, "--resume", folder) == 0  # there is nothing left to do
    return lambda state: module.load_state_dict(build(*seen[0]), state)


def test_an_unknown_phase(runs, tmp_path, capsys):
    for program in ("wombet", "sac", "bc"):
        folder = Path(shutil.copytree(runs[program], tmp_path / program))
        save(folder / "checkpoint.pt", {**load(folder / "checkpoint.pt", "cpu", program), "phase": "later"})
        refuses(capsys, program, ["unknown phase", "later"], "--resume", folder)


DATA = {  # name: (key, what is put there, words); a function gets the whole dictionary
    "nan": ("rewards", lambda d: d["rewards"] * np.nan, ["rewards", "not finite"]),
    "beyond float32": ("rewards", lambda d: d["rewards"].astype(float) + 1e300, ["rewards", "not finite"]),
    "infinite observations": ("observations", lambda d: d["observations"] + np.inf, ["observations", "not finite"]),
    "raw actions": ("actions", lambda d: d["actions"] * 0 - 2, ["actions reach 2", "[-1, 1]", "scale", "[1., 1., 1.]"]),
    "terminals 2": ("terminals", lambda d: d["terminals"] * 1.0 + 2, ["terminals", "0 and 1"]),
    "terminals .5": ("terminals", lambda d: d["terminals"] * 0.0 + 0.5, ["terminals", "0 and 1"]),
    "timeouts -1": ("timeouts", lambda d: d["timeouts"] * 1.0 - 1, ["timeouts", "0 and 1"]),
    "negative u": ("uncertainty", lambda d: d["uncertainty"] - 1e6, ["uncertainty", "negative"]),
    "strings": ("rewards", lambda d: d["rewards"].astype(str), ["rewards", "no numbers"]),
    "complex": ("actions", lambda d: d["actions"].astype(complex), ["actions", "no numbers"]),
    "objects": ("rewards", lambda d: d["rewards"].astype(object), [".npz"]),
    "dates": ("rewards", lambda d: d["rewards"].astype("datetime64[s]"), ["rewards", "no numbers"]),
    "a column": ("rewards", lambda d: d["rewards"][:, None], ["rewards", "shape"]),
    "another length": ("actions", lambda d: d["actions"][:-1], ["actions", "shape"]),
    "another width": ("observations", lambda d: d["observations"][:, :-1], ["observations", "shape"]),
    "a number": ("observations", lambda d: np.float32(1), ["no transition"]),
    "empty": ("observations", lambda d: d["observations"][:0], ["no transition"]),
    "no actions": ("actions", None, ["lacks actions"]), "no terminals": ("terminals", None, ["lacks terminals"]),
}


@pytest.mark.parametrize("key, change, words", DATA.values(), ids=DATA)
@pytest.mark.parametrize("program, flag", [("wombet", "--offline-data"), ("bc", "--dataset")])
def test_bad_datasets(runs, tmp_path, capsys, key, change, words, program, flag):
    data = dict(np.load(runs["data"]))
    data.pop(key) if change is None else data.update({key: change(data)})
    np.savez(tmp_path / "bad.npz", **data)
    refuses(capsys, program, [str(tmp_path / "bad.npz"), *words], *COMMON, *TINY[program], flag, tmp_path / "bad.npz",
            data=runs["data"])
    assert files(tmp_path) == ["bad.npz"]


def episodes(*ends):
    """Columns by D4RL's names: a step counter as the observation, that starts anew after a row of `ends`."""
    n = max(ends) + 1
    start = np.zeros(n, dtype=bool)
    start[[0, *[e + 1 for e in ends if e + 1 < n]]] = True
    obs = (np.arange(n) - np.maximum.accumulate(np.where(start, np.arange(n), 0))).astype(np.float32)[:, None]
    timeouts = np.zeros(n, dtype=bool)
    timeouts[list(ends)] = True
    return {"observations": obs, "actions": np.zeros((n, 1)), "rewards": np.arange(n), "next_observations": obs + 1,
            "terminals": np.zeros(n, dtype=bool), "timeouts": timeouts}


LAYOUT = {"obs": (1,), "action": (1,), "reward": (), "next_obs": (1,), "terminated": (), "timeout": (),
          "uncertainty": (), "features": (0,)}


def loaded(tmp_path, data):
    np.savez(tmp_path / "d.npz", **data)
    return load_dataset(tmp_path / "d.npz", **LAYOUT).filled()


def test_a_coordinate_that_never_changes_leaves_no_row_out(tmp_path, capsys):
    """As Pusher's goal: one coordinate that is the same in the next row does not make the row the next."""
    data = episodes(4, 9, 11)
    for key in ("observations", "next_observations"):
        data[key] = np.concatenate([data[key], np.full((12, 1), 7.0, dtype=np.float32)], 1)
    np.savez(tmp_path / "d.npz", **data)
    assert load_dataset(tmp_path / "d.npz", **{**LAYOUT, "obs": (2,), "next_obs": (2,)}).size == 12
    assert capsys.readouterr().out == ""


def test_a_whole_file_is_taken_whole(tmp_path, capsys):
    data = episodes(4, 9, 11)
    found = loaded(tmp_path, data)
    assert found["reward"].tolist() == list(range(12)) and capsys.readouterr().out == ""
    assert found["timeout"].nonzero()[:, 0].tolist() == [4, 9, 11]


def test_rows_that_hold_the_next_episodes_first_observation_are_left_out(tmp_path, capsys):
    """D4RL's fault, at timeouts and at terminals; the row before is then the last of its episode. A terminal row stays:
    no target needs what follows it."""
    data = episodes(4, 9, 11)
    data["next_observations"][[4, 9]] = data["observations"][[5, 10]]
    data["timeouts"][9], data["terminals"][9] = False, True
    found = loaded(tmp_path, data)
    assert "1 of 12 rows left out" in (said := capsys.readouterr().out) and "of 1 terminal row" in said
    assert found["reward"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert found["reward"][found["timeout"] > 0].tolist() == [3, 11]
    assert found["reward"][found["terminated"] > 0].tolist() == [9]
    assert (found["next_obs"] - found["obs"]).flatten().tolist() == [1 - x for x in found["terminated"].tolist()]


def test_a_file_without_next_observations(tmp_path, capsys):
    """They are the next row's; ends, which have none, are left out."""
    data = episodes(4, 9, 11)
    del data["next_observations"]
    found = loaded(tmp_path, data)
    assert "3 of 12 rows left out" in capsys.readouterr().out
    assert found["reward"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    assert ((found["next_obs"] - found["obs"]) == 1).all()
    data["timeouts"][11] = False  # cut within an episode: the last row's is unknown too
    assert loaded(tmp_path, data)["reward"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    data["timeouts"][9], data["terminals"][9] = False, True
    assert loaded(tmp_path, data)["reward"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    del data["timeouts"]
    with pytest.raises(ValueError, match="lacks next_observations.*timeouts"):
        loaded(tmp_path, data)
    with pytest.raises(ValueError, match="no row"):
        loaded(tmp_path, {key: values for key, values in episodes(0).items() if key != "next_observations"})


# -------------------------------------------------------------------------------------------------- folders and process


def test_a_run_that_left_no_checkpoint_starts_over(tmp_path, monkeypatch):
    """Killed between config.json and its first checkpoint, then again within its first steps."""
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("common.save", killed)
        with pytest.raises(Killed):
            tiny("sac", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("common.store_step", killed)
        with pytest.raises(Killed):
            tiny("sac", tmp_path)  # the same command
    folder = tmp_path / "Hopper-v4__a__0"
    assert start("sac", "--resume", folder) == 0
    assert tiny("sac", tmp_path / "again")[0] == 0
    states = [load(f / "checkpoint.pt", "cpu", "sac") for f in (folder, tmp_path / "again" / folder.name)]
    assert torch.equal(states[0]["torch_rng"], states[1]["torch_rng"])


def test_a_folder_with_other_things_in_it_is_not_written_to(tmp_path, capsys):
    folder = tmp_path / "Hopper-v4__a__0"
    folder.mkdir()
    (folder / "progress.csv").write_text("evidence")
    assert tiny("sac", tmp_path)[0] == 2 and "exists" in capsys.readouterr().err
    assert files(folder) == ["progress.csv"]


def test_two_processes_in_one_folder(runs, tmp_path, capsys):
    """The second is refused, new or resumed; a dead one's hold is gone."""
    pytest.importorskip("fcntl")
    folder = Path(shutil.copytree(runs["sac"], tmp_path / "Hopper-v4__a__0"))
    flags = ["--out", str(tmp_path / "new"), *COMMON, *TINY["wombet"]]
    args = wombet.parse_args(flags)
    with claimed(args):
        refuses(capsys, "wombet", ["another process", str(run_folder(args))], *flags)
    assert not (tmp_path / "new").exists()
    child = os.fork()
    if child == 0:
        try:
            args.resume = str(folder)
            with claimed(args):
                (tmp_path / "held").write_text("")
                signal.pause()
        finally:
            os._exit(1)
    for _ in range(100):
        time.sleep(0.0 if (tmp_path / "held").exists() else 0.05)
    refuses(capsys, "sac", ["another process", str(folder)], "--resume", folder, "--target-steps", "41")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert start("sac", "--resume", folder, "--target-steps", "41") == 0


@pytest.mark.parametrize("program", ["wombet", "sac"])
def test_a_run_without_a_gpu_plays_where_there_is_one(runs, monkeypatch, program):
    """A checkpoint has the same parts on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.get_rng_state()])
    assert start(program, "--evaluate", runs[program], "--device", "cpu") == 0


@pytest.mark.parametrize("file", ["checkpoint.pt", "progress.csv", "nonfinite.pt"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, capsys, file):
    """One line, exit code 1, the last checkpoint whole."""
    original, calls = os.replace, [0]

    def full(source, target):
        calls[0] += Path(target).name == file
        if Path(target).name == file and calls[0] > (file == "checkpoint.pt"):
            raise OSError(28, "No space left on device")
        return original(source, target)

    monkeypatch.setattr(os, "replace", full)
    if file == "nonfinite.pt":
        monkeypatch.setattr("common.stop_if_not_finite", lambda run, loss, *rest: harness.stop_if_not_finite(
            run, float("nan"), *rest))
    code, folder = tiny("sac", tmp_path)
    error = capsys.readouterr().err
    assert code == 1 and error.count("\n") == 1, error
    assert all(word in error for word in (file, "No space left", "the last good one in checkpoint.pt"))
    assert load(folder / "checkpoint.pt", "cpu", "sac")["step"] in (0, 20)
    assert not list(folder.glob("*.tmp"))


def test_a_checkpoint_that_torch_cannot_write(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        save(tmp_path / "gone" / "checkpoint.pt", {"a": torch.zeros(3)})


def test_a_folder_that_goes_away(tmp_path, monkeypatch, capsys):
    import common

    original, count = common.store_step, [0]

    def step(*args):
        count[0] += 1
        if count[0] == 30:
            shutil.rmtree(tmp_path / "Hopper-v4__a__0")
        return original(*args)

    monkeypatch.setattr(common, "store_step", step)
    assert tiny("sac", tmp_path)[0] == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Hopper-v4__a__0" in error and "last good" not in error


def test_memory_that_is_not_there(tmp_path, monkeypatch, capsys):
    def greedy(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 68 bytes\nstack")

    monkeypatch.setattr("common.learn", greedy)
    assert tiny("sac", tmp_path)[0] == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "can't allocate memory" in error
    monkeypatch.setattr("common.learn", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):  # a fault is told by its traceback
        tiny("sac", tmp_path, name="b")


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, folder = tiny("sac", tmp_path)
    assert code == 0 and json.loads((folder / "config.json").read_text())["commit"] is None


def test_outside_the_main_thread(tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(tiny("sac", tmp_path)[0]))
    thread.start()
    thread.join()
    assert codes == [0]


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    tiny("sac", tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number, before, stops", [
    (signal.SIGHUP, signal.SIG_DFL, True), (signal.SIGHUP, signal.SIG_IGN, False), (signal.SIGINT, signal.SIG_IGN, True)])
def test_what_stops_a_run(number, before, stops):
    """A terminal that closes, but for nohup; SIGINT also where a script has started the run in the background."""
    run, handlers = SimpleNamespace(), [(name, signal.getsignal(name)) for name in harness.SIGNALS]
    signal.signal(number, before)
    try:
        harness.catch_interrupts(run)
        signal.raise_signal(number)
        assert bool(run.interrupted) is stops
    finally:
        for name, handler in handlers:
            signal.signal(name, handler)


def test_a_system_without_hangups_and_file_locks():
    """As Windows."""
    code = ("import signal, sys, types; del signal.SIGHUP; sys.modules['fcntl'] = None; import harness; "
            "run = types.SimpleNamespace(); harness.catch_interrupts(run); signal.raise_signal(signal.SIGINT); "
            "assert run.interrupted == [signal.SIGINT]")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(harness.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("second, at_once", [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_second_signal(second, at_once):
    """The same again means at once. Another kind does not: a time limit signals this process, and the program that
    started it passes its own on."""
    before = [signal.getsignal(name) for name in harness.SIGNALS]
    run = SimpleNamespace()
    try:
        harness.catch_interrupts(run)
        assert not run.interrupted
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) if at_once else contextlib.nullcontext():
            signal.raise_signal(second)
        assert run.interrupted
    finally:
        for name, handler in zip(harness.SIGNALS, before):
            signal.signal(name, handler)


class Broken(io.TextIOBase):
    encoding = "utf-8"

    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("stream", ["none", "closed", "broken", "ascii", "full"])
def test_stdout_never_ends_a_run(tmp_path, monkeypatch, stream):
    raw = io.BytesIO()
    streams = {"none": None, "closed": open(os.devnull, "w"), "broken": Broken(),
               "ascii": io.TextIOWrapper(raw, "ascii")}
    streams["closed"].close()
    streams["full"] = open("/dev/full", "w") if Path("/dev/full").exists() else Broken()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, streams[stream])
    assert tiny("sac", tmp_path)[0] == 0
    assert start("sac", "--evaluate", tmp_path / "Hopper-v4__a__0") == 0
    assert start("sac", "--resume", "nowhere") == 2
    assert stream != "ascii" or b" ? " in raw.getvalue()


SHELL = "cd {root} && {python} baselines/sac.py {flags} --name {name} {rest}; echo ${{PIPESTATUS[0]}}"


@pytest.mark.parametrize("rest", ["| head -1", ">&-"])
def test_stdout_of_a_real_process(tmp_path, rest):
    flags = " ".join(["--out", str(tmp_path), *COMMON, *TINY["sac"]])
    line = SHELL.format(root=Path(harness.__file__).parent, python=sys.executable, flags=flags, name="a", rest=rest)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "0" and done.stderr == ""
    assert len((tmp_path / "Hopper-v4__a__0" / "progress.csv").read_text().splitlines()) == 3


def sigterm_at(monkeypatch, module, name, number):
    """Sends SIGTERM as that call of the module's function begins."""
    original, count = getattr(module, name), [0]

    def counted(*args):
        count[0] += 1
        if count[0] == number:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("program", ["wombet", "sac", "bc"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_sigterm_during_an_evaluation(runs, tmp_path, monkeypatch, program, number):
    """The evaluation ends, its row is kept, the run stops with a checkpoint and goes on as if nothing had happened."""
    sigterm_at(monkeypatch, harness, "evaluate", number)
    code, folder = tiny(program, tmp_path, data=runs["data"])
    if code == 0:  # it was the last thing to do
        assert program != "wombet" and number >= 2
        return
    assert code == 130 and start(program, "--resume", folder) == 0
    ours, theirs = (load(f / "checkpoint.pt", "cpu", program) for f in (folder, runs[program]))
    assert torch.equal(ours["torch_rng"], theirs["torch_rng"])
    assert strip(ours["rows"]) == strip(theirs["rows"])


def test_sigterm_while_pretraining(runs, tmp_path, monkeypatch):
    """As many updates as without it, and the same; the same rows."""
    flags = ["--source-run", runs["wombet"], "--pretrain-updates", "50"]
    _, whole = tiny("wombet", tmp_path, *flags, name="whole")
    sigterm_at(monkeypatch, wombet, "update", 20)
    code, folder = tiny("wombet", tmp_path, *flags)
    assert code == 130 and load(folder / "checkpoint.pt", "cpu", "wombet")["target"]["updates"] == 20
    assert start("wombet", "--resume", folder) == 0
    ours, theirs = (load(f / "checkpoint.pt", "cpu", "wombet") for f in (folder, whole))
    assert ours["target"]["updates"] == theirs["target"]["updates"] == 90
    weights = [state["target"]["agent"]["critic"]["weights.0"] for state in (ours, theirs)]
    assert torch.equal(*weights) and strip(ours["rows"]) == strip(theirs["rows"])


def test_a_kill_while_pretraining(runs, tmp_path, monkeypatch):
    """What a process that gets no signal leaves: the last of --checkpoint-every's."""
    def killed(*args):
        if args[1].updates == 40:
            raise KeyError("killed")
        return update(*args)

    update = wombet.update
    monkeypatch.setattr(wombet, "update", killed)
    with pytest.raises(KeyError):
        tiny("wombet", tmp_path, "--source-run", runs["wombet"], "--pretrain-updates", "50", "--checkpoint-every", "15")
    assert load(tmp_path / "Hopper-v4__a__0" / "checkpoint.pt", "cpu", "wombet")["target"]["updates"] == 30


def test_threads_follow_the_affinity_mask(monkeypatch, capsys):
    assert wombet.parse_args([]).threads == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert wombet.parse_args(["--threads", "3"]).threads == 3
    refuses(capsys, "wombet", ["--threads 4", "3 CPUs"], "--threads", "4")


# -------------------------------------------------------------------------------------------- environments and the rest


class Odd(gym.Env):
    """An environment with any spaces."""

    def __init__(self, seen=None, acts=None, **_):
        box = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space, self.action_space = seen or box, acts or box

    def reset(self, seed=None, options=None):
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(2, dtype=np.float32), 0.0, False, False, {}


class OddTask:
    SOURCES, FEATURES, env_kwargs = ("near",), (), {}

    def __init__(self, name, version, source=None):
        pass

    def reward(self, obs, action, next_obs, features):
        return obs[..., 0] * 0

    def terminated(self, next_obs):
        return next_obs[..., 0] > 9


BOX = gym.spaces.Box
SPACES = {
    "dict": (dict(seen=gym.spaces.Dict({"a": BOX(-1, 1, (2,))})), ["observations", "Dict", "one vector"]),
    "pictures": (dict(seen=BOX(0, 1, (4, 4, 3))), ["observations", "(4, 4, 3)", "one vector"]),
    "discrete observations": (dict(seen=gym.spaces.Discrete(4)), ["observations", "Discrete", "one vector"]),
    "discrete actions": (dict(acts=gym.spaces.Discrete(4)), ["actions", "Discrete"]),
    "many discrete actions": (dict(acts=gym.spaces.MultiDiscrete([3, 3])), ["actions", "MultiDiscrete"]),
    "a matrix of actions": (dict(acts=BOX(-1, 1, (2, 2))), ["actions", "(2, 2)"]),
    "unbounded actions": (dict(acts=BOX(-np.inf, np.inf, (2,))), ["actions", "-inf", "bounds"]),
    "half bounded actions": (dict(acts=BOX(0, np.inf, (2,))), ["actions", "inf", "bounds"]),
    "no time limit": ({}, ["time limit", "--episode-steps"]),
}


@pytest.mark.parametrize("program", ["wombet", "sac"])
@pytest.mark.parametrize("kwargs, words", SPACES.values(), ids=SPACES)
def test_environments_of_others(tmp_path, capsys, monkeypatch, kwargs, words, program):
    monkeypatch.setitem(tasks.TASKS, "Odd", OddTask)
    monkeypatch.setitem(gym.registry, "Odd-v0", gym.envs.registration.EnvSpec(
        "Odd-v0", entry_point=lambda **k: Odd(**kwargs), max_episode_steps=9 if kwargs else None))
    refuses(capsys, program, ["Odd-v0", *words], *COMMON, *TINY[program], "--env", "Odd-v0")
    assert not files(tmp_path)


def test_a_time_limit_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "Odd", OddTask)
    monkeypatch.setitem(gym.registry, "Odd-v0", gym.envs.registration.EnvSpec("Odd-v0", entry_point=lambda **k: Odd()))
    assert TaskEnv("Odd-v0", max_steps=7).max_steps == 7
    code = start("sac", "--out", tmp_path, *COMMON, *TINY["sac"], "--env", "Odd-v0", "--episode-steps", "7")
    length = lambda env: load(tmp_path / f"{env}__sac__0" / "checkpoint.pt", "cpu", "sac")["rows"][-1]["length_mean"]
    assert code == 0 and length("Odd-v0") == 7
    assert start("sac", "--out", tmp_path, *COMMON, *TINY["sac"], "--env", "Reacher-v5", "--episode-steps", "7") == 0
    assert length("Reacher-v5") == 7


def test_percentile_thresholds_can_always_be_met():
    """The better a trajectory, the less certain: no one is in the upper half by J and in the lower quarter by u."""
    returns, mean_u = torch.arange(20.0), torch.arange(20.0) / 10
    j_th, u_th = thresholds(returns, mean_u, 50, 25)
    passed = accept(returns, mean_u, j_th, u_th)
    assert passed.nonzero()[:, 0].tolist() == [2, 3, 4]  # the better half of the five within u_th
    assert thresholds(returns, mean_u, 50, 25, mode="return") == (9.5, u_th)
    assert thresholds(returns, -mean_u, 50, 25)[0] == 9.5  # some meet both
    assert thresholds(returns, mean_u, 50, 25, 18.0) == (18.0, u_th)  # one's own J_th is never lowered
    assert thresholds(returns, mean_u, 50, 25, u_threshold=-1.0) == (9.5, -1.0)  # nothing meets that u_th


def test_a_first_round_that_no_trajectory_passes_goes_on(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wombet, "score_trajectories", lambda reward, u, valid, ended, discount: (
        torch.arange(float(len(u))), torch.arange(float(len(u)))))
    flags = ["--source-run", runs["wombet"], "--filter", "dual", "--u-percentile", "25"]
    assert tiny("wombet", tmp_path, *flags)[0] == 0
    assert "(dual: J_th 0, " in capsys.readouterr().out
    assert tiny("wombet", tmp_path, *flags, "--return-threshold", "9", name="b")[0] == 2  # one's own threshold is kept


def test_a_dimension_that_hardly_varies():
    """Std 1e-5 about .5, and about 0: a deviation of .01 from it stays a small part of the input."""
    rows = torch.randn(2000, 6)
    rows[:, 1], rows[:, 2], rows[:, 3] = 0.5 + 1e-5 * rows[:, 1], 1e-5 * rows[:, 2], 0.45  # .45: never
    rows[:, 4] = 1000 + 0.5 * rows[:, 4]  # far from 0, and it tells something
    model = WorldModel(5, 1, members=2, hidden=8, layers=1)
    model._normalise(rows, rows[:, :5] * 0.1)
    assert (0.01 / model.input_std[1:3] <= 25).all() and model.input_std[3] == 1
    assert 0.9 < model.input_std[0] < 1.1 and 0.4 < model.input_std[4] <= 1.01


def test_recent_return_without_float64_on_the_device(monkeypatch):
    """Devices such as Apple's have no float64: what is cast to it has come to the CPU before."""
    buffer = ReplayBuffer(4, "cpu", reward=(), terminated=(), timeout=())
    for reward in (1.0, 2.0, 3.0):
        buffer.add(reward=reward, terminated=reward == 2.0, timeout=False)
    moved, double = [], torch.Tensor.double

    def to_cpu(tensor):
        moved.append(tensor.clone())
        return moved[-1]

    def cast(tensor):
        assert any(tensor is copy for copy in moved)
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)
    monkeypatch.setattr(torch.Tensor, "double", cast)
    assert recent_return(buffer, 3) == 3.0


def test_the_memory_of_a_buffer_in_bytes(monkeypatch):
    """Of four bytes a number; PPO's buffer is a batch, however long it runs."""
    env = SimpleNamespace(obs_dim=3, action_dim=1, shapes={"obs": (3,), "reward": ()})
    flags = {"device": "cpu", "eval_episodes": 0, "target_steps": 1000}
    for more, steps in (({}, 1000), ({"rollout_steps": 10}, 10)):
        args = SimpleNamespace(**flags, **more)
        monkeypatch.setattr(harness, "memory_of", lambda device: 16 * steps)
        harness.require_memory(args, env)
        monkeypatch.setattr(harness, "memory_of", lambda device: 16 * steps - 1)
        with pytest.raises(ValueError, match="rollout-steps" if more else "target-steps"):
            harness.require_memory(args, env)


def test_a_container_may_have_less_memory(monkeypatch):
    whole = harness.memory_of("cpu")
    for text, expected in (("4096\n", 4096), (str(10**18), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))):
        monkeypatch.setattr(Path, "read_text", lambda path: text)
        assert harness.memory_of("cpu") == expected >= 4096 <= whole

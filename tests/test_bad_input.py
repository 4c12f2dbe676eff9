"""Nothing is silent: every flag takes effect or is refused, every file is checked, nothing is lost.

Tables of commands, each with the words that its one line on stderr must hold; the programs are started in this process.
"""

import importlib
import io
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import harness
import tasks
import wombet
from agent import ReplayBuffer
from filter import accept, met_threshold, thresholds
from harness import claimed, load, load_dataset, recent_return, run_folder, save
from tasks import TaskEnv
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
    "bc": "--offline-updates 40 --dataset DATA --batch-size 8".split(),
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
    assert error.startswith(f"{program}.py: ") and error.count("\n") == 1, error
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
        "collect-penalty-coef": ("inf",), "target-entropy": ("nan", "inf", "-inf"), "polyak": ("nan", "2"),
        "return-threshold": ("nan", "inf", "-inf"), "u-threshold": ("nan", "inf"), "init-temperature": ("inf", "0"),
        "init-std": ("inf", "nan"), "noise-beta": ("inf",), "alpha": ("nan", "1.5"), "alpha-gain": ("inf", "nan"),
        "alpha-ema": ("nan",), "source-speed-cap": ("nan", "inf"), "source-ctrl-cost-factor": ("inf", "nan"),
        "source-reset-noise-factor": ("inf", "0"), "return-percentile": ("nan", "101"), "u-percentile": ("-1",),
        "trust-percentile": ("inf",), "momentum": ("nan",), "keep-elites": ("nan",), "reset-share": ("2",),
        "seed": ("-1", "18446744073709551616", "9223372036854775808", "1.5", "nan"), "utd": ("0", "1e3", "nan"),
        "batch-size": ("0", "-1"), "eval-every": ("0",), "checkpoint-every": ("0", "-5"), "eval-episodes": ("0",),
        "threads": ("0", "-1"), "episode-steps": ("0", "-1"), "members": ("0",), "hidden": ("0", str(10**30)),
        "filter": ("foo",), "precision": ("low",), "uncertainty": ("x",), "actor-q": ("x",),
        "source-steps": ("0",), "target-steps": ("0", "-3", str(2**64))}.items() for value in values],
    ("wombet", ["--threads", "4096"], ["--threads 4096", "may use"]),
    *[("wombet", ["--device", name], ["--device", name]) for name in ("meta", "cuda:7", "abacus", "", "cpu:x", "vulkan")],
    *[("wombet", [f"--{flag}", ""], [flag, "empty"]) for flag in ("resume", "evaluate", "out", "source-run",
                                                                  "offline-data", "gif")],
    ("wombet", ["--resume", " "], ["resume", "empty"]),
    ("sac", ["--resume", ""], ["resume", "empty"]), ("bc", ["--dataset", ""], ["dataset", "empty"]),
    ("wombet", ["--name", ""], ["name"]), ("wombet", ["--name", "a/b"], ["a/b"]), ("wombet", ["--name", "a\nb"], ["name"]),
    ("wombet", ["--name", LONG], ["too long", "--name"]), ("sac", ["--name", LONG], ["too long", "--name"]),
    *[("wombet", [f"--env={name}"], ["unknown environment", repr(name)]) for name in (
        "", "Hopper", "Hopper-v", "Hopper-v04", "Hopper-v²", "-v4", "Nope-v4", "hopper-v4", "Hopper-v4 ")],
    ("wombet", ["--env", "Hopper-v3"], ["Hopper-v3"]), ("wombet", ["--env", "Hopper-v99"], ["Hopper-v99"]),
    ("wombet", ["--source", "foo"], ["'foo'"]), ("wombet", ["--source", "foo", "--no-prior"], ["'foo'"]),
    ("wombet", ["--source", ""], ["''"]), ("bc", ["--source", "foo"], ["'foo'"]),
    ("wombet", ["--source-goal-shift", "1"], ["goal_shift"]),
    # sizes that no machine holds
    *[("wombet", [flag, str(10**12)], ["GiB", flag]) for flag in (
        "--source-steps", "--target-steps", "--imagined-trajectories", "--imagined-length", "--hidden", "--critics",
        "--members", "--model-hidden", "--model-layers", "--population", "--batch-size", "--utd", "--eval-episodes",
        "--model-batch-size", "--policy-samples")],
    *[("sac", [flag, str(10**12)], ["GiB", flag]) for flag in ("--target-steps", "--hidden", "--batch-size", "--layers")],
    ("bc", ["--online-steps", str(10**12)], ["GiB", "--online-steps"]),
    ("ppo", ["--rollout-steps", str(10**12)], ["GiB", "--rollout-steps"]),
    *[("sac", [f"--{flag}", value], [flag, value]) for flag, value in (
        ("actor-lr", "inf"), ("critic-lr", "nan"), ("target-entropy", "nan"), ("policy-delay", "0"))],
    *[("ppo", [f"--{flag}", value], [flag, value]) for flag, value in (
        ("clip", "inf"), ("entropy-coef", "nan"), ("value-coef", "inf"), ("max-grad-norm", "nan"), ("gae-lambda", "2"))],
    ("iql", ["--beta", "inf"], ["beta", "inf"]), ("mopo", ["--penalty-coef", "nan"], ["penalty-coef"]),
    # places
    ("wombet", ["--out", "FILE"], ["FILE", "cannot be made"]), ("wombet", ["--out", "FILE/deeper"], ["cannot be made"]),
    ("sac", ["--out", "FILE"], ["FILE", "cannot be made"]), ("wombet", ["--out", "/proc/x"], ["/proc/x"]),
    ("wombet", ["--out", "/dev/null"], ["/dev/null"]),
    ("wombet", ["--evaluate", "WOMBET", "--gif", "a.xyz"], ["--gif a.xyz", ".gif"]),
    ("wombet", ["--evaluate", "WOMBET", "--gif", "nowhere/a.gif"], ["--gif nowhere/a.gif"]),
    ("wombet", ["--evaluate", "WOMBET", "--gif", "/proc/a.gif"], ["--gif /proc/a.gif"]),
    ("wombet", ["--evaluate", "WOMBET", "--gif", "FOLDER.gif"], ["--gif FOLDER.gif"]),
    ("wombet", ["--gif", "a.gif"], ["--evaluate"]), ("wombet", ["--resume", "WOMBET", "--gif", "a.gif"], ["--evaluate"]),
    ("wombet", ["--resume", "WOMBET", "--evaluate", "WOMBET"], ["not both"]),
    *[("wombet", [flag, "nowhere"], ["nowhere"]) for flag in ("--resume", "--evaluate", "--source-run", "--offline-data")],
    *[("wombet", [flag, "FILE"], ["FILE"]) for flag in ("--resume", "--evaluate", "--source-run", "--offline-data")],
    *[("wombet", [flag, "FOLDER.gif"], ["FOLDER.gif"]) for flag in ("--resume", "--evaluate", "--source-run",
                                                                    "--offline-data")],
    ("sac", ["--resume", "BC"], ["of another program or version"]), ("bc", ["--evaluate", "SAC"], ["of another program"]),
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


ANOTHER = {"wombet": """--env Hopper-v5|--seed 7|--discount 0.9|--uncertainty variance|--model-epochs 9|--hidden 16|--utd 2
                        --critics 3|--filter return|--no-layer-norm|--batch-size 9|--name b|--out elsewhere|--source stand
                        --offline-data DATA|--source-run x|--no-prior|--random-steps 5|--episode-steps 9
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


OF_ANOTHER_SOURCE = """--env Hopper-v5|--seed 7|--discount 0.9|--model-epochs 9|--hidden 16|--members 3|--source stand
                       --source-speed-cap 2|--source-steps 70|--random-steps 19|--snapshot-window 0""".replace("\n", "|")


@pytest.mark.parametrize("flag", [f.strip() for f in OF_ANOTHER_SOURCE.split("|")])
def test_a_source_run_is_of_the_same_source(runs, capsys, tmp_path, flag):
    refuses(capsys, "wombet", ["other flags", flag.split()[0]], *COMMON, *TINY["wombet"], "--source-run", runs["wombet"],
            *flag.split())
    assert not files(tmp_path)


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
        learners = [state["target"]["agent"] if program == "wombet" else state["agent"]]
        assert rates(learners) == ({1e-5} if program != "bc" else {1e-5})
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


def test_evaluate_takes_episodes_of_its_own(runs, capsys):
    assert start("wombet", "--evaluate", runs["wombet"], "--eval-episodes", "3") == 0
    assert "over 3 episodes" in capsys.readouterr().out
    assert start("wombet", "--evaluate", runs["wombet"]) == 0
    assert "over 1 episodes" in capsys.readouterr().out


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
             "flags are null": '{"flags": null}', "empty": "", "cut short": '{"flags": {"env": "Hop', "binary": "\udcff",
             "deep": "[" * 100_000, "a long number": "1" * 5000}


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
def test_missing_and_wrong_parts_of_a_checkpoint(runs, tmp_path, capsys, program, wrong):
    """Each part in turn, with a checksum that fits: one line, or the part is of no matter and the run goes on."""
    folder = Path(shutil.copytree(runs[program], tmp_path / "run"))
    whole, tried = load(folder / "checkpoint.pt", "cpu", program), 0
    for path in paths_of(whole, 3 if wrong is None else 2):
        state = load(runs[program] / "checkpoint.pt", "cpu", program)
        parent = state
        for key in path[:-1]:
            parent = parent[key]
        old = parent.pop(path[-1])
        if wrong is not None:
            parent[path[-1]] = wrong
        if path[0] in (program, "info") or path[-1] == "online_since" or isinstance(path[-1], int) or (
                wrong is not None and isinstance(old, type(wrong))):
            continue  # names the program; is logged alone; may be there or not; is of that type
        save(folder / "checkpoint.pt", state)
        refuses(capsys, program, ["does not fit"], "--resume", folder)
        tried += 1
    assert tried > 10


def test_an_unknown_phase(runs, tmp_path, capsys):
    for program in ("wombet", "sac", "bc"):
        folder = Path(shutil.copytree(runs[program], tmp_path / program))
        save(folder / "checkpoint.pt", {**load(folder / "checkpoint.pt", "cpu", program), "phase": "later"})
        refuses(capsys, program, ["unknown phase", "later"], "--resume", folder)

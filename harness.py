"""What every run shares, of wombet.py and of the baselines: flags, run folder, log, checkpoints, datasets, exit codes.

A `run` here is a namespace with at least args, dir, log (a Log), rng (NumPy's generator) and interrupted.

What a run leaves in <out>/<env>__<name>__<seed>/:
    config.json          flags in force, what --fast stands for, versions, commit, machine
    progress.csv         a row per evaluation (`COLUMNS`); WOMBET's target phase begins with the row of step 0
    model_error.csv      u and the true error of held-out transitions, of the last fit
    first_dataset.npz    the first D_S; dataset.npz: D_S at the end, both under D4RL's names (`DATASET_NAMES`)
    checkpoint.pt        everything, for --resume and --evaluate; source.pt: the same after the source phase
    nonfinite.pt         the state in which a loss was not finite

Exit codes: 0 done, 1 a fault (what was saved stays), 2 bad input, 130 interrupted, with a checkpoint.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are then not noticed
    fcntl = None

import numpy as np
import torch
from PIL import Image  # matplotlib brings it

from replay import ReplayBuffer
from task_env import evaluate, first_observations
from tasks import make_task

# env_steps: of the target; updates: of the critics; wall_clock: s; return_*, length_mean, discounted_mean: over the
# evaluation's episodes, the last with the agent's discount; td_error: what sets alpha, of a baseline the last batch's;
# q_error: Q(s_0, a_0) less the discounted return; offline_size: transitions in D_S; acceptance: share that passed the
# last filter; model_holdout_mse: of the variance
COLUMNS = ("phase", "env_steps", "source_steps", "updates", "wall_clock", "return_mean", "return_std", "length_mean",
           "discounted_mean", "alpha", "td_error", "q_mean", "q_error", "temperature", "offline_size", "acceptance",
           "model_holdout_mse")


# ------------------------------------------------------------------------------------------------------------ arguments


def number(kind, words, low=-3e38, high=3e38):
    """An argparse type: an int or a float within [low, high], by default what float32 holds; never nan."""
    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a {words}")
        return value
    return parse


LARGEST = 2**63 - 1
count = number(int, "whole number above zero and below 2^63", 1, LARGEST)
amount = number(int, "whole number from zero and below 2^63", 0, LARGEST)
positive, nonnegative = number(float, "finite number above zero", 1e-12), number(float, "finite number from zero", 0)
real = number(float, "finite number")
fraction, percent = number(float, "number in [0, 1]", 0, 1), number(float, "number in [0, 100]", 0, 100)
rate = number(float, "number above 0, 1 at most", 1e-12, 1)


def some_path(text):
    """An argparse type: a path that is not empty."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("the path is empty" if not text.strip() else "a path holds no zero byte")
    return text


def label(text):
    """An argparse type: a part of a folder's name."""
    if not text.strip() or not text.isprintable() or "/" in text or os.sep in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a folder's name")
    return text


def usable_cpus():
    """The CPUs that this process may use: its affinity mask, where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SWITCH = {"action": argparse.BooleanOptionalAction}


class Help(argparse.HelpFormatter):
    """Appends a flag's default where it has one."""

    def _get_help_string(self, action):
        silent = any(action.default is x for x in (None, False, argparse.SUPPRESS))
        return action.help if silent else f"{action.help} (%(default)s)"


def new_parser(doc, name, source=True):
    """A parser with the flags that every program has (source: those of the source task too), and the group of those
    that matter most."""
    def error(message):  # argparse's own prints the usage, two pages of it
        raise ValueError(message)

    wide = functools.partial(Help, max_help_position=40, width=118)
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=wide, usage="%(prog)s [flags]",
                                     allow_abbrev=False)
    parser.error = error

    first = g = parser.add_argument_group("what matters most")
    g.add_argument("--env", default="Walker2d-v4", help="target: a stock Gymnasium MuJoCo environment")
    if source:
        g.add_argument("--source", default="near", help="source task: near, or (locomotion) backward or stand")
    g.add_argument("--seed", type=amount, default=0, help="of networks, exploration and initial states")
    g.add_argument("--name", type=label, default=name, help="second part of the run folder's name; plots group by it")
    g.add_argument("--out", type=some_path, default="runs", help="folder of run folders <env>__<name>__<seed>")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto: cuda where there is one")
    g.add_argument("--fast", default="auto", choices=("auto", "on", "off"), help="compile, and multiply in bfloat16 "
                   "(PPO, TD3, BC, IQL, AWAC: neither); auto: where the machine can, and, compiling, where it pays")
    g.add_argument("--resume", type=some_path, metavar="RUN_DIR", help="continue that run, with its own flags "
                   "(budgets, learning rates, evaluations, checkpoints, the machine's may be given anew)")
    g.add_argument("--evaluate", type=some_path, metavar="RUN_DIR", help="only play that run's policy, and print its "
                   "return")
    g.add_argument("--gif", type=some_path, metavar="FILE", help="with --evaluate: draw the first episode")

    g = parser.add_argument_group("run")
    g.add_argument("--eval-every", type=count, default=2500, help="environment steps between evaluations")
    g.add_argument("--eval-episodes", type=count, default=10, help="episodes in an evaluation (deterministic policy)")
    g.add_argument("--checkpoint-every", type=count, default=5000, help="environment steps between checkpoints")
    g.add_argument("--threads", type=count, default=1, help=f"CPU threads, at most {usable_cpus()} here; more than one "
                   "gain little, and lose on a busy machine")
    g.add_argument("--episode-steps", type=count, help="time limit of an episode, in place of the environment's own")

    if source:
        g = parser.add_argument_group("source task (in place of the environment's own values)")
        g.add_argument("--source-speed-cap", type=real, help="m/s that near pays up to (HalfCheetah: 3, "
                       "Swimmer: no cap, others: 1)")
        g.add_argument("--source-ctrl-cost-factor", type=nonnegative, help="source control cost / stock (Swimmer: 100)")
        g.add_argument("--source-goal-shift", type=real, help="the goal's shift, m (Pusher .15, Reacher .05)")
        g.add_argument("--source-reset-noise-factor", type=positive, help="source reset noise / stock (2; "
                       "Pusher: of .05 rad on the arm's joints, where stock has none)")
    return parser, first


def source_quantities(args):
    names = ("speed_cap", "ctrl_cost_factor", "goal_shift", "reset_noise_factor")
    return {name: getattr(args, f"source_{name}") for name in names}


def source_flags(args):
    """The flags given that shape a source task, as on the command line; of no use to a run without one."""
    given = {f"source_{key}": value for key, value in source_quantities(args).items() if value is not None}
    given.update({"source": args.source} if args.source != "near" else {})
    return ", ".join(as_flag(key, value) for key, value in given.items())


UNKEPT = ("help", "resume", "evaluate", "gif", "speed")  # what config.json does not keep
MACHINE = ("device", "threads", "fast")
# what a resumed run may be given anew and heeds at once; its state depends on the others
ANEW = (*MACHINE, "checkpoint_every", "eval_every", "eval_episodes")


def read_flags(argv, parser, check, anew=(), compiles=True):
    """The flags, with --resume or --evaluate those of that run. Bad ones raise ValueError, as does check(args) where
    they contradict each other. anew: flags beside ANEW that --resume takes, and the program heeds, with a new value.
    compiles: whether the program can compile, and multiply in bfloat16."""
    args = parser.parse_args(argv)
    require(not (args.resume and args.evaluate), "give --resume or --evaluate, not both")
    require(not args.gif or args.evaluate, "--gif draws an evaluation: give --evaluate RUN_DIR too")
    if args.resume:
        args = flags_of_run(args.resume, argv, parser, (*ANEW, *anew))
    elif args.evaluate:
        ours = {name: getattr(args, name) for name in MACHINE}  # of this machine, not of the one that trained
        args = flags_of_run(args.evaluate, argv, parser, (*MACHINE, "eval_episodes"), **ours)
    if args.gif:
        require(Path(args.gif).suffix.lower() == ".gif", f"--gif {args.gif}: the name must end in .gif")
        check_place(args.gif, "--gif")
    args.device = check_device(args.device)
    cpus = usable_cpus()
    require(args.threads <= cpus, f"--threads {args.threads}: this process may use {cpus} CPU{'s' * (cpus > 1)}")
    make_task(args.env)
    if getattr(args, "source", None) != parser.get_default("source"):  # also where no source task is made
        make_task(args.env, args.source, **source_quantities(args))
    check(args)
    args.speed = speed_settings(args, compiles)
    return args


def speed_settings(args, compiles):
    """What --fast stands for here: {"compile": bool, "dtype": of products in learning and planning, "precision": of
    float32 products}."""
    if args.fast == "off":
        return {"compile": False, "dtype": "float32", "precision": "highest"}
    if not compiles:
        return {"compile": False, "dtype": "float32", "precision": "high"}
    if args.device.startswith("cuda"):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bfloat16 = args.device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    require(compiler or args.fast != "on", "--fast on needs a C++ compiler: install one, or leave --fast auto")
    flags = dict(vars(args))
    if flags.get("source_run") or flags.get("offline_data") or not flags.get("prior", True):
        flags["source_steps"] = 0  # none of them is learned in
    steps = sum(flags.get(name, 0) for name in ("source_steps", "target_steps", "pretrain_updates", "offline_updates",
                                              "online_steps"))
    pays = compiler is not None and steps >= 10_000  # compiling takes a minute or so
    return {"compile": args.fast == "on" or pays, "dtype": "bfloat16" if args.fast == "on" or bfloat16 else "float32",
            "precision": "high"}  # TF32 on a GPU; "medium" would round to 8 bits what a network asks for in float32


def flags_of_run(run_dir, argv, parser, anew, **others):
    """A run's own flags, with those of `anew` that argv gives; any other that argv gives must be the run's. others:
    values that count as the run's own."""
    kept = vars(config_flags(run_dir, parser))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(kept))))  # None: not given
    changed = {name: given[name] for name in kept if given[name] is not None and given[name] != kept[name]}
    refused = [f"{as_flag(name, value)} (the run has {kept[name]})" for name, value in changed.items()
               if name not in anew]
    require(not refused, f"{run_dir} cannot take {', '.join(refused)}: leave that out, or start a new run")
    return argparse.Namespace(**{**given, **kept, **others, **changed})


def as_flag(name, value):
    """As it is written on the command line."""
    flag = name.replace("_", "-")
    return f"--{flag} {value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"


def config_flags(run_dir, parser):
    """The flags in a run's config.json, held to the types and choices that the command line is held to: a Namespace."""
    file, flags = Path(run_dir) / "config.json", read_config(run_dir)["flags"]
    actions = {action.dest: action for action in parser._actions if action.dest not in UNKEPT}
    few = lambda names: ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
    lacks, foreign = (few(sorted(a - b)) for a, b in ((set(actions), set(flags)), (set(flags), set(actions))))
    require(not lacks and not foreign, f"{file} is of another program or version: it "
            + " and ".join([f"lacks {lacks}"] * bool(lacks) + [f"has {foreign}"] * bool(foreign)))
    argv = []
    for name, value in flags.items():
        action, flag = actions[name], actions[name].option_strings[0]
        if action.nargs == 0:  # a switch
            require(isinstance(value, bool), f"{file}: {flag} is {value!r}, neither true nor false")
            argv += [flag if value else f"--no-{flag[2:]}"] if value or len(action.option_strings) > 1 else []
        elif value is not None or action.default is not None:
            known = isinstance(value, (str, int, float)) and not isinstance(value, bool)
            require(known, f"{file}: {flag} is {value!r}, neither a number nor a string")
            argv.append(f"{flag}={value}")
    try:
        args = parser.parse_args(argv)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in UNKEPT})


def same_flags(args, run_dir, parser, names):
    """ValueError, which names them, where another run's flags differ from these."""
    theirs, ours = vars(config_flags(run_dir, parser)), vars(args)
    differ = [as_flag(name, theirs[name]) for name in names if ours[name] != theirs[name]]
    require(not differ, f"--source-run {run_dir} has other flags: {', '.join(differ)}")


def check_device(name):
    """The device's name, of "auto" what it stands for here; ValueError where tensors cannot be held on it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:
        raise ValueError(f"--device {name} is not there: {first_line(error)}") from None
    return name


def check_place(path, flag):
    """ValueError where a file of that name could not be written."""
    was_there = os.path.lexists(path)
    try:
        open(path, "ab").close()
        if not was_there:
            os.unlink(path)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from None


def require(ok, message):
    if not ok:
        raise ValueError(message)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------------------------- memory


def require_memory(args, env, **rows):
    """ValueError, with the memory needed, for sizes that this machine cannot hold: a rough count, of the large parts.

    rows: transitions of buffers beside those that --target-steps, --online-steps and --source-steps ask for, by flag.
    """
    f = {"hidden": 0, "layers": 2, "critics": 2, "batch_size": 0, "utd": 1, "members": 0, "model_hidden": 0,
         "model_layers": 1, "model_batch_size": 0, "imagined_trajectories": 0, "population": 0, "policy_samples": 0,
         **vars(args)}
    inputs, row = env.obs_dim + env.action_dim, sum(math.prod(shape) for shape in env.shapes.values())
    net = lambda hidden, layers: inputs * hidden + (layers - 1) * hidden**2
    steps = {name: f.get(name) or 0 for name in ("target_steps", "online_steps", "source_steps")}
    if f.get("rollout_steps"):  # PPO's buffer is a batch
        steps = {"rollout_steps": f["rollout_steps"]}
    numbers = {name: row * n for name, n in {**steps, **rows}.items()}
    model = "members, model_hidden, model_layers"
    rollouts = [f.get(f"rollout_{name}", 0) for name in ("batch", "length", "retain")]
    numbers["rollout_batch, rollout_length, rollout_retain"] = row * math.prod(rollouts)
    plans = f["imagined_trajectories"] * (f["population"] + f["policy_samples"])
    numbers.update({
        "critics, hidden, layers": 5 * f["critics"] * net(f["hidden"], f["layers"]),  # target, gradient, Adam's two
        model: 4 * f["members"] * net(f["model_hidden"], f["model_layers"]),
        "batch_size, utd, critics, hidden, layers": f["batch_size"] * (
            f["utd"] * row + 3 * f["critics"] * f["layers"] * f["hidden"]),
        f"model_batch_size, {model}": 3 * f["model_batch_size"] * f["members"] * f["model_layers"] * f["model_hidden"],
        f"imagined_trajectories, population, policy_samples, {model}": plans * 2 * f["members"] * f["model_hidden"],
        "eval_episodes": f["eval_episodes"] * 2**18})  # an environment takes about 1 MiB
    needed, held = 4 * sum(numbers.values()), memory_of(args.device)
    most = max(numbers, key=numbers.get)
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in most.split(", "))
    require(needed <= held, f"{needed / 2**30:,.0f} GiB of memory are needed, most of them for {flags}; "
            f"{args.device} has {held / 2**30:,.1f}")


def memory_of(device):
    """Bytes in all."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return math.inf
    bytes_here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # a container may have less ("max": it has not)
        bytes_here = min(bytes_here, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return bytes_here


# -------------------------------------------------------------------------------------------- files, log, interruptions


def run_folder(args):
    return Path(args.resume or args.evaluate or Path(args.out) / f"{args.env}__{args.name}__{args.seed}")


@contextlib.contextmanager
def claimed(args):
    """The run's folder, made where it is not there, and held against a second process for as long as this one works.
    What stays empty is removed."""
    run_dir = run_folder(args)
    with contextlib.ExitStack() as undo:
        try:
            for folder in (*reversed(run_dir.parents), run_dir):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    undo.callback(remove_if_empty, folder)
            require(os.access(run_dir, os.W_OK), f"{run_dir} cannot be written to: choose another --out")
            if fcntl:
                handle = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
                undo.callback(os.close, handle)
        except OSError as error:
            raise ValueError(f"{run_dir} cannot be made: {error.strerror}; choose another --out or --name") from None
        if fcntl:
            lock(handle, run_dir)
        yield


def remove_if_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def lock(handle, run_dir):
    """Locks an open folder until its handle is closed, also by the process's death."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work in {run_dir}: wait for it, or choose another --name") from None
    except OSError:  # a file system without locks
        pass


def open_run(args, program):
    """The folder of the run, and the checkpoint that it goes on from (None for a new run)."""
    run_dir = run_folder(args)
    if args.resume:
        return run_dir, load(run_dir / "checkpoint.pt", args.device, program)
    # killed before its first checkpoint, a run leaves no more than this, and starts over
    left = set(os.listdir(run_dir)) - {"config.json", "config.json.tmp", "checkpoint.pt.tmp"}
    require(not left, f"{run_dir} exists: continue it with --resume {run_dir}, or choose another --name")
    return run_dir, None


def read_config(run_dir):
    path = Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{run_dir} is no run folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    require(isinstance(config, dict) and isinstance(config.get("flags"), dict), f"{path} holds no flags")
    return config


def write_config(run_dir, args):
    """config.json: flags, code, command and machine; of a resumed run, under "before", those that it had, oldest
    first."""
    before = []
    if args.resume:
        earlier = read_config(run_dir)
        before = [*earlier.pop("before", []), earlier]
    try:
        commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = None
    packages = ("torch", "gymnasium", "mujoco", "numpy")
    flags = {key: value for key, value in vars(args).items() if key not in UNKEPT}
    config = {"flags": flags, "speed": args.speed, "commit": commit or None, "command": " ".join(sys.argv),
              "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
              "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
              **({"before": before} if before else {})}
    with replacing(run_dir / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n")


@contextlib.contextmanager
def replacing(path, suffix=".tmp"):
    """A name to write under, beside `path`, which then takes its place: a reader sees the old file or the new one,
    whole. OSError where it cannot be written."""
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OSError(f"{path} cannot be written: {reason}") from None


MARK = b"sha256\0\0"  # ends a checkpoint, with the 32 bytes of the checksum of all before it; torch.load skips them


def save(path, state):
    """Writes a checkpoint, with its checksum."""
    with replacing(path) as temporary:
        torch.save(state, temporary)
        with open(temporary, "r+b") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.write(MARK + digest)


def load(path, device, program):
    """Reads a checkpoint; ValueError where it is missing, cut short, changed by a single bit, or of another program."""
    state, reason = None, "its checksum does not fit"
    try:
        whole = Path(path).read_bytes()
        body, end = whole[: -len(MARK) - 32], whole[-len(MARK) - 32 :]
        if end == MARK + hashlib.sha256(body).digest():
            state = torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    except FileNotFoundError:
        why = "the run has left no checkpoint yet"
        if Path(path).name == "source.pt":
            why = ("the run has no source phase, or not a whole one yet, or took another run's, which its config.json "
                   "names as source_run")
        raise ValueError(f"{path} does not exist: {why}") from None
    except Exception as error:
        reason = first_line(error)
    require(state is not None, f"{path} is no checkpoint of this version, or is damaged or cut short: {reason}")
    require(isinstance(state, dict) and program in state, f"{path} is not a checkpoint of {program}.py")
    return state


@contextlib.contextmanager
def must_fit(what, there):
    """What does not load from a checkpoint, for any reason, is bad input: ValueError, `what` does not fit `there`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} does not fit {there}: {first_line(error)}") from None


def must_match(state, template, where="it"):
    """ValueError where a checkpoint lacks a part that `template`, the state of a new run, has, or has one of another
    type there. What is None or empty in the template may be anything."""
    if isinstance(template, dict):
        require(isinstance(state, dict), f"{where} is no dict")
        for key, value in template.items():
            if key == "mps_rng":  # of a machine that has one; the checkpoint may come from another
                continue
            require(key in state, f"{where} lacks {key!r}")
            must_match(state[key], value, f"{where}.{key}".removeprefix("it."))
    elif isinstance(template, torch.Tensor):
        ok = isinstance(state, torch.Tensor) and (state.dtype, state.dim()) == (template.dtype, template.dim())
        require(ok, f"{where} is no {template.dim()}-dimensional tensor of {template.dtype}")
    elif template is not None:
        kind = (int, float) if isinstance(template, float) else type(template)
        require(isinstance(state, kind), f"{where} is {str(state)[:20]!r}, no {type(template).__name__}")


def load_agent(agent, state):
    """Loads an agent's state; its learning rates stay those of the flags, which may have been given anew."""
    optimizers = [part for part in vars(agent).values() if isinstance(part, torch.optim.Optimizer)]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    agent.load_state_dict(state)
    for optimizer, kept in zip(optimizers, rates):
        for group, rate in zip(optimizer.param_groups, kept):
            group["lr"] = rate


def not_below(flag, value, done):
    require(value >= done, f"{flag} {value} is below the {done} that are done")


# D4RL's names, for what a file of transitions holds; the last three may be missing from it
DATASET_NAMES = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations",
                 "terminated": "terminals", "timeout": "timeouts", "uncertainty": "uncertainty", "features": "features"}


def save_dataset(buffer, path):
    """Writes a ReplayBuffer's filled rows to an .npz file under D4RL's names."""
    with replacing(path, ".tmp.npz") as temporary:
        np.savez_compressed(temporary, **{
            DATASET_NAMES[key]: values.cpu().numpy().astype(bool if key in ("terminated", "timeout") else np.float32)
            for key, values in buffer.filled().items()})


def load_dataset(path, device="cpu", action_scale=None, **shapes):
    """A full ReplayBuffer from an .npz file; ValueError where it is missing, foreign, damaged or not what it should be.

    A row may hold no next observation: an episode's last, where the file has no next_observations or has the next
    episode's first observation there (D4RL's known fault at timeouts). A terminal one keeps its own observation there,
    for no critic's target needs another; the others are left out. Both are counted on stdout.

    action_scale: half the width of the environment's raw actions, which the message for too large ones names.
    """
    arrays = read_arrays(path)
    n = arrays["obs"].shape[0] if arrays["obs"].ndim else 0
    require(n, f"{path} holds no transition")
    derived = "next_obs" not in arrays
    if derived:
        require("timeout" in arrays, f"{path} lacks next_observations (D4RL's names), and timeouts to derive them by")
        arrays["next_obs"] = np.concatenate([arrays["obs"][1:], arrays["obs"][:1]])
    for key, shape in shapes.items():
        array = arrays.setdefault(key, np.zeros((n, *shape), dtype=np.float32))
        name = f"{path}: {DATASET_NAMES[key]}"
        require(array.shape == (n, *shape), f"{name} has shape {array.shape} where {(n, *shape)} is needed")
        require(array.dtype.kind in "biuf", f"{name} holds {array.dtype}, no numbers")
        with np.errstate(over="ignore"):
            arrays[key] = array = array.astype(np.float32)
        require(np.isfinite(array).all(), f"{name} holds values that are not finite in float32")
        if key in ("terminated", "timeout"):
            require(np.isin(array, (0, 1)).all(), f"{name} holds values other than 0 and 1")
    reach = np.abs(arrays["action"]).max()
    scale = "" if action_scale is None else f", here {np.array2string(np.asarray(action_scale), separator=', ')}"
    require(reach <= 1 + 1e-4, f"{path}: actions reach {reach:.4g} where [-1, 1] is needed: divide raw actions by the "
            f"environment's scale{scale}")
    arrays["action"] = arrays["action"].clip(-1, 1)  # what rounding left beyond
    require((arrays["uncertainty"] >= 0).all(), f"{path}: uncertainty is negative somewhere")

    ends = (arrays["terminated"] + arrays["timeout"]) > 0
    follows = np.append((arrays["next_obs"][:-1] == arrays["obs"][1:]).all(1), derived)
    unknown = ends & follows
    unknown[-1] |= derived
    fallen = unknown & (arrays["terminated"] > 0)
    arrays["next_obs"][fallen], unknown[fallen] = arrays["obs"][fallen], False
    if fallen.any():
        say(f"{path}: of {fallen.sum():,} terminal rows the next observation is not known; no critic needs it")
    if unknown.any():
        require(not unknown.all(), f"{path}: no row holds its next observation")
        last = np.append(unknown[1:], False) & ~ends  # what is then the last row of its episode
        arrays["timeout"] = np.maximum(arrays["timeout"], last)
        say(f"{path}: {unknown.sum():,} of {n:,} rows left out: at an episode's end "
            + ("there is no next observation" if derived else "their next observation is the next episode's first"))
    buffer = ReplayBuffer(int((~unknown).sum()), device, **shapes)
    buffer.add(**{key: arrays[key][~unknown] for key in shapes})
    return buffer


def read_arrays(path):
    """The arrays of an .npz file by our names, as they are; ValueError where it is none, or lacks one that it must have
    (next_obs aside)."""
    try:
        with zipfile.ZipFile(path) as file:
            require(file.testzip() is None, "a checksum does not fit")
            infos = sorted(file.infolist(), key=lambda info: info.header_offset)
            begin = [*(info.header_offset for info in infos), file.start_dir]
            end = [0, *(info.header_offset + 30 + len(info.filename) + info.compress_size for info in infos)]
            # between two arrays lie at most a size field and a descriptor: more is an array that the index has lost
            require(all(b - e <= 64 for b, e in zip(begin, end)), "its index lacks an array")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[name] for key, name in DATASET_NAMES.items() if name in file}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:
        raise ValueError(f"{path} is no .npz file, or is damaged or cut short: {first_line(error)}") from None
    missing = [DATASET_NAMES[key] for key in ("obs", "action", "reward", "terminated") if key not in arrays]
    require(not missing, f"{path} lacks {', '.join(missing)} (D4RL's names)")
    return arrays


def say(text, end="\n", error=False):
    """Prints to stdout, or with `error` to stderr. No reader, no terminal or a full disk behind it never ends a run."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(Exception):  # what is left in its buffer goes nowhere too, at the exit
            number, nowhere = stream.fileno(), open(os.devnull, "w")
            os.dup2(nowhere.fileno(), number)
            nowhere.close()


def on_terminal():
    with contextlib.suppress(Exception):  # closed
        return sys.stdout.isatty()
    return False


def open_streams():
    """Characters that stdout and stderr cannot show are replaced; what is closed is opened to nowhere, lest the next
    file that the run opens takes its place."""
    for number in range(3):
        try:
            os.set_inheritable(number, True)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(Exception):
            getattr(sys, name).reconfigure(errors="replace")


class Log:
    """progress.csv and the live line on stdout."""

    def __init__(self, path):
        self.path, self.rows, self.start, self.shown = path, [], time.time(), 0.0
        self.pace = (time.time(), 0)  # when and at which step this phase began in this process

    @property
    def wall_clock(self):
        """Seconds of work, those before a resume included."""
        return time.time() - self.start

    def row(self, values):
        values = {**values, "wall_clock": round(self.wall_clock, 1)}
        self.rows.append({key: values.get(key, "") for key in COLUMNS})
        self.write()

    def write(self):
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def live(self, phase, step, steps, text, force=False):
        """A line that rewrites itself on a terminal, and one per evaluation elsewhere."""
        terminal = on_terminal()
        if not force and (not terminal or time.time() - self.shown < 1.0):
            return
        self.shown = time.time()
        done, speed = step - self.pace[1], 27 * " "  # nothing is known of a phase that begins
        if done > 0:
            rate = done / max(self.shown - self.pace[0], 1e-9)
            minutes, seconds = divmod(int((steps - step) / rate), 60)
            speed = f"{rate:5.{0 if rate >= 1 else 2}f} steps/s  {minutes:3}:{seconds:02} left"
        line = f"{phase:<6} {step:>7,}/{steps:,}  {speed}  {text}"
        say(("\r\033[K" if terminal else "") + line, end="" if terminal and not force else "\n")

    def counted(self, function, phase, calls):
        """`function`, which shows a live line at each of its `calls` calls, at a pace of their own."""
        log, done = copy.copy(self), itertools.count()
        log.pace = (time.time(), 0)

        def shown(*values):
            log.live(phase, next(done), calls, "")
            return function(*values)

        return shown

    def leave_out(self, began):
        """What has run since the time `began` is not the loop, whose speed is shown."""
        self.pace = (self.pace[0] + time.time() - began, self.pace[1])

    def note(self, text):
        say(("\r\033[K" if on_terminal() else "") + text)


def log_and_generators(run):
    return {"rows": run.log.rows, "wall_clock": run.log.wall_clock, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(), "numpy_rng": run.rng.bit_generator.state,
            **({"mps_rng": torch.mps.get_rng_state()} if torch.backends.mps.is_available() else {})}


def load_log_and_generators(run, state):
    # a checkpoint may be from before a column
    run.log.rows = [{key: row.get(key, "") for key in COLUMNS} for row in state["rows"]]
    run.log.start = time.time() - min(max(state["wall_clock"], 0.0), 1e9)
    run.rng.bit_generator.state = state["numpy_rng"]
    torch.set_rng_state(state["torch_rng"].cpu())
    # a source.pt from before commit 9487398 may lack it
    for i, rng in enumerate(state.get("cuda_rng", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(rng.cpu(), i)
    if "mps_rng" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps_rng"].cpu())


SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([SIGHUP] if SIGHUP else []))


def catch_interrupts(run):
    """Ctrl-C (SIGTERM, a terminal that closes) ends the run after the step under way, with a checkpoint; the same again
    at once, without.

    One of either is no second one: a time limit's SIGTERM may reach the run and the program that started it, which
    passes on a SIGINT."""
    def ask(number, _):
        if number in run.interrupted:
            raise KeyboardInterrupt
        run.interrupted.append(number)
        say("\nstopping after this step (or this round), with a checkpoint; again: at once", error=True)

    run.interrupted = []  # the signals that came
    if threading.current_thread() is threading.main_thread():  # Python lets no other set a handler
        for name in SIGNALS:
            if name != SIGHUP or signal.getsignal(name) != signal.SIG_IGN:  # as nohup has it
                signal.signal(name, ask)


def stop_if_interrupted(run, state_dict):
    """Ends a run that was asked to stop, with a checkpoint."""
    if run.interrupted:
        save(run.dir / "checkpoint.pt", state_dict(run))
        raise KeyboardInterrupt


def keep_freed_memory():
    """Lets glibc reuse large blocks instead of returning them to the kernel: updates of 10 critics on batches of 256
    took 0.9 of their time so, the default ones about 0.97. Without glibc nothing is done."""
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 1 << 30)


# ------------------------------------------------------------------------------------------------------ parts of a loop


def store_step(env, buffer, action):
    """Takes one step and stores it; `env.obs` is None after an episode's last."""
    obs = env.obs
    next_obs, reward, terminated, truncated, features = env.step(action)
    # a truncated step is stored as not terminated: its value goes on (the target bootstraps)
    buffer.add(obs=obs, action=action, reward=reward, next_obs=next_obs, terminated=terminated,
               timeout=truncated and not terminated, features=features, uncertainty=0.0)
    if terminated or truncated:
        env.obs = None


def recent_return(buffer, window):
    """Mean undiscounted return of the episodes that ended in the buffer's last `window` steps (one or more; the buffer
    has not wrapped). Summed on the CPU: not every device has float64."""
    reward, terminated, timeout = (buffer.data[key][: buffer.size].cpu() for key in ("reward", "terminated", "timeout"))
    ends = ((terminated + timeout) > 0).nonzero()[:, 0]
    totals = reward.double().cumsum(0)[ends]
    returns = totals.diff(prepend=totals.new_zeros(1))
    return returns[ends >= buffer.size - window].mean().item()


def stop_if_not_finite(run, loss, updates, state_dict):
    """Raises FloatingPointError, and leaves state_dict(run) in nonfinite.pt, where a loss is not finite."""
    if not math.isfinite(loss):
        save(run.dir / "nonfinite.pt", state_dict(run))
        raise FloatingPointError(f"the loss is not finite after {updates} updates; the state is in "
                                 f"{run.dir / 'nonfinite.pt'}{last_good(run.dir)}")


def last_good(run_dir):
    """What a message about a run's end says of its checkpoint, if it has one."""
    return ", the last good one in checkpoint.pt" if (run_dir / "checkpoint.pt").exists() else ""


def evaluation_row(agent, envs, frames=None):
    """Plays an episode of the deterministic policy in each of envs: what progress.csv and the live line say of it."""
    act = lambda obs: agent.act(obs, deterministic=True)
    critical = hasattr(agent, "q_value")
    returns, lengths, discounted = evaluate(act, envs, frames, agent.discount if critical else 1.0)
    row = {"return_mean": float(returns.mean()), "return_std": float(returns.std()),
           "length_mean": float(lengths.mean())}
    # eq. 10's error with its sign, at the episodes' first states; Q holds SAC's entropy term and eq. 7's penalty, too,
    # and past a time limit returns go on unseen
    if critical:
        starts = torch.as_tensor(first_observations(envs), device=agent.device)
        row["discounted_mean"] = float(discounted.mean())
        row["q_error"] = float(agent.q_value(starts, act(starts)).cpu().numpy().mean() - discounted.mean())
    return row, f"return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"


def show(side, name, gif):
    """Plays a side's evaluation episodes, prints their return, draws the first to the file `gif`, if one is given."""
    frames = [] if gif else None
    if gif:
        side.evaluation[0] = side.make_env(render_mode="rgb_array")
    row, text = evaluation_row(side.agent, side.evaluation, frames)
    discounted = f", {row['discounted_mean']:.1f} discounted" if "discounted_mean" in row else ""
    say(f"{name} task, step {side.step:,}: {text} of {row['length_mean']:.0f} steps on average{discounted}")
    if gif:
        pictures = [Image.fromarray(frame).resize((240, 240)) for frame in frames[:600:2]]
        pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=40, loop=0)
        say(f"{gif}: the first episode, every second step, 300 pictures at most")


# ----------------------------------------------------------------------------------------------------------------- main


def raised_here(error):
    """Whether this repository's code raised it: then it is a message to the user."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    here = Path(__file__).resolve().parent  # a virtual environment may lie in it
    return Path(trace.tb_frame.f_code.co_filename).resolve().parent in (here, here / "baselines")


def run_program(program, parse, train, play):
    """args = parse(), then train(args), or with --evaluate play(args); returns the exit code."""
    open_streams()
    args, handlers = None, {name: signal.getsignal(name) for name in SIGNALS}
    say_why = lambda text: say(f"{program}.py: {' '.join(text.split())}", error=True)
    try:
        args = parse()
        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision(args.speed["precision"])
        keep_freed_memory()
        if args.evaluate:
            play(args)
        else:
            with claimed(args):
                say(f"speed   {'compiled' if args.speed['compile'] else 'not compiled'}, products in "
                    f"{args.speed['dtype']} (--fast {args.fast}), on {args.device}")
                train(args)
    except (ValueError, FloatingPointError) as error:
        if not raised_here(error):
            raise  # a library's: a fault, told by its traceback
        say_why(str(error))
        return 2 if isinstance(error, ValueError) else 1
    except (OSError, MemoryError, RuntimeError) as error:
        # a full disk, a folder that is gone, memory that is not there; any other RuntimeError is a fault
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("memory", "overflowed")):
            raise
        say_why(f"{error}{last_good(run_folder(args)) if args else ''}")
        return 1
    except KeyboardInterrupt:
        saved = args and not args.evaluate and (run_folder(args) / "checkpoint.pt").exists()
        how = f"; --resume {run_folder(args)} continues from the checkpoint" if saved else ""
        say(f"\n{program}.py: interrupted{how}", error=True)
        return 130
    finally:
        if threading.current_thread() is threading.main_thread():
            for name, handler in handlers.items():
                signal.signal(name, handler or signal.SIG_DFL)
    return 0

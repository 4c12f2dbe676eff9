"""What every run shares, of wombet.py and of the baselines: flags, run folder, log, checkpoints, datasets, exit codes.

A `run` here is a namespace with at least args, dir, log (a Log), rng (NumPy's generator) and interrupted.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from agent import ReplayBuffer
from tasks import evaluate, first_observations

COLUMNS = ("phase", "env_steps", "source_steps", "updates", "wall_clock", "return_mean", "return_std", "length_mean",
           "alpha", "td_error", "q_mean", "q_error", "temperature", "offline_size", "acceptance", "model_holdout_mse")


# ------------------------------------------------------------------------------------------------------------ arguments


def number(kind, words, low, high=math.inf):
    """An argparse type: an int or a float within [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a {words}")
        return value
    return parse


count, amount = number(int, "whole number above zero", 1), number(int, "whole number from zero", 0)
positive, nonnegative = number(float, "number above zero", 1e-12), number(float, "number from zero", 0)
fraction, percent = number(float, "number in [0, 1]", 0, 1), number(float, "number in [0, 100]", 0, 100)

SWITCH = {"action": argparse.BooleanOptionalAction}


def new_parser(doc, name, source=True):
    """A parser with the flags that every program has (source: those of the source task too), and its budget group."""
    wide = functools.partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=48, width=128)
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=wide)

    g = parser.add_argument_group("task")
    g.add_argument("--env", default="Walker2d-v4", help="target: a stock Gymnasium MuJoCo environment")
    if source:
        g.add_argument("--source", default="near", help="source task: near, or (locomotion) backward or stand")
        g.add_argument("--source-speed-cap", type=float, help="m/s that near pays up to (HalfCheetah: 3, others: 1)")
        g.add_argument("--source-ctrl-cost-factor", type=nonnegative, help="source control cost / stock (Swimmer: 100)")
        g.add_argument("--source-goal-shift", type=float, help="the goal's shift, m (Pusher .15, Reacher .05)")
        g.add_argument("--source-reset-noise-factor", type=positive, help="source reset noise / stock (2)")

    g = parser.add_argument_group("run")
    g.add_argument("--seed", type=amount, default=0, help="of networks, exploration and initial states")
    g.add_argument("--name", default=name, help="second part of the run folder's name; plots group by it")
    g.add_argument("--out", default="runs", help="folder of run folders <env>__<name>__<seed>")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto: cuda where there is one")
    g.add_argument("--threads", type=count, default=1, help="CPU threads; more gain little, and lose on a busy machine")
    g.add_argument("--fast", default="auto", choices=("auto", "on", "off"), help="compile, and multiply in bfloat16; auto: "
                   "what this machine has, in runs that are long enough to gain by it")
    g.add_argument("--checkpoint-every", type=count, default=5000, help="environment steps between checkpoints")
    g.add_argument("--resume", metavar="RUN_DIR", help="continue that run, with its flags unless given anew here")
    g.add_argument("--evaluate", metavar="RUN_DIR", help="only play that run's policy, and print its return")
    g.add_argument("--gif", metavar="FILE", help="with --evaluate: draw the first episode")

    g = parser.add_argument_group("budget")
    g.add_argument("--eval-every", type=count, default=2500, help="environment steps between evaluations")
    g.add_argument("--eval-episodes", type=count, default=10, help="episodes in an evaluation (deterministic policy)")
    return parser, g


def source_quantities(args):
    names = ("speed_cap", "ctrl_cost_factor", "goal_shift", "reset_noise_factor")
    return {name: getattr(args, f"source_{name}") for name in names}


def read_flags(argv, parser, check):
    """The flags; of a resumed run its own, where argv does not give them anew. Bad ones raise ValueError, as does
    check(args) where they contradict each other."""

    def error(message):  # argparse's own prints the usage, two pages of it
        raise ValueError(message)

    parser.error = error
    args = parser.parse_args(argv)
    if args.resume:
        parser.set_defaults(**read_config(args.resume)["flags"])
        args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device)
    except Exception as error:
        raise ValueError(f"--device {args.device} is not there: {str(error).splitlines()[0]}") from None
    require(not (args.gif and not args.evaluate), "--gif draws an evaluation: give --evaluate RUN_DIR too")
    check(args)
    args.speed = speed_settings(args)
    return args


def speed_settings(args):
    """What --fast stands for here: {"compile": bool, "dtype": of products in learning and planning, "precision": of
    float32 products}."""
    if args.fast == "off":
        return {"compile": False, "dtype": "float32", "precision": "highest"}
    if args.device.startswith("cuda"):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bfloat16 = args.device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    steps = sum(value for key, value in vars(args).items() if key in ("source_steps", "target_steps"))
    pays = compiler is not None and steps >= 20_000  # compiling takes a minute or so
    return {"compile": args.fast == "on" or pays, "dtype": "bfloat16" if args.fast == "on" or bfloat16 else "float32",
            "precision": "medium"}


def require(ok, message):
    if not ok:
        raise ValueError(message)


# -------------------------------------------------------------------------------------------- files, log, interruptions


def open_run(args, program):
    """The folder of the run, and the checkpoint that it goes on from (None for a new run)."""
    if args.resume:
        return Path(args.resume), load(Path(args.resume) / "checkpoint.pt", args.device, program)
    run_dir = Path(args.out) / f"{args.env}__{args.name}__{args.seed}"
    require(not run_dir.exists(), f"{run_dir} exists: continue it with --resume {run_dir}, or choose another --name")
    return run_dir, None


def read_config(run_dir):
    path = Path(run_dir) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{run_dir} is no run folder: it has no config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def write_config(run_dir, args):
    commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip()
    packages = ("torch", "gymnasium", "mujoco", "numpy")
    flags = {key: value for key, value in vars(args).items() if key not in ("resume", "evaluate", "gif", "speed")}
    config = {"flags": flags, "speed": args.speed, "commit": commit or None, "command": " ".join(sys.argv),
              "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
              "machine": {"platform": platform.platform(), "cpus": os.cpu_count()}}
    (run_dir / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def save(path, state):
    """Writes a checkpoint beside its place and moves it there: a reader sees the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load(path, device, program):
    """Reads a checkpoint; ValueError where it is missing, cut short or of another program."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: the run has left no checkpoint yet") from None
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint, or is cut short: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or program not in state:
        raise ValueError(f"{path} is not a checkpoint of {program}.py")
    return state


@contextlib.contextmanager
def must_fit(what, there):
    """What does not load from a checkpoint is bad input: ValueError, `what` does not fit `there`."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{what} does not fit {there}: {str(error).splitlines()[0]}") from None


# D4RL's names, for what a file of transitions holds; the last three may be missing from it
DATASET_NAMES = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations",
                 "terminated": "terminals", "timeout": "timeouts", "uncertainty": "uncertainty", "features": "features"}


def save_dataset(buffer, path):
    """Writes a ReplayBuffer's filled rows to an .npz file under D4RL's names."""
    temporary = f"{path}.tmp.npz"  # a reader sees the old file or the new one, whole
    np.savez_compressed(temporary, **{
        DATASET_NAMES[key]: values.cpu().numpy().astype(bool if key in ("terminated", "timeout") else np.float32)
        for key, values in buffer.filled().items()})
    os.replace(temporary, path)


def load_dataset(path, device="cpu", **shapes):
    """A full ReplayBuffer from an .npz file; ValueError where it is missing, foreign, not finite or of other shapes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[name] for key, name in DATASET_NAMES.items() if name in file}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:
        raise ValueError(f"{path} is no .npz file, or is cut short: {error}") from None
    missing = [DATASET_NAMES[key] for key in list(DATASET_NAMES)[:5] if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} (D4RL's names)")
    n = len(arrays["obs"])
    if n == 0:
        raise ValueError(f"{path} holds no transition")
    for key, shape in shapes.items():
        array = arrays.setdefault(key, np.zeros((n, *shape), dtype=np.float32))
        if array.shape != (n, *shape):
            raise ValueError(f"{path}: {DATASET_NAMES[key]} has shape {array.shape} where {(n, *shape)} is needed")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {DATASET_NAMES[key]} holds values that are not finite")
    buffer = ReplayBuffer(n, device, **shapes)
    buffer.add(**arrays)
    return buffer


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
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def live(self, phase, step, steps, text, force=False):
        """A line that rewrites itself on a terminal, and one per evaluation elsewhere."""
        terminal = sys.stdout.isatty()
        if not force and (not terminal or time.time() - self.shown < 1.0):
            return
        self.shown = time.time()
        rate = (step - self.pace[1]) / max(self.shown - self.pace[0], 1e-9)
        minutes, seconds = divmod(int((steps - step) / max(rate, 1e-9)), 60)
        line = f"{phase:<6} {step:>7,}/{steps:,}  {rate:5.0f} steps/s  {minutes:3}:{seconds:02} left  {text}"
        print(("\r\033[K" if terminal else "") + line, end="" if terminal and not force else "\n", flush=True)

    def note(self, text):
        print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)


def log_and_generators(run):
    state = {"rows": run.log.rows, "wall_clock": run.log.wall_clock, "torch_rng": torch.get_rng_state(),
             "numpy_rng": run.rng.bit_generator.state}
    return {**state, "cuda_rng": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else state


def load_log_and_generators(run, state):
    run.log.rows, run.log.start = list(state["rows"]), time.time() - state["wall_clock"]
    run.rng.bit_generator.state = state["numpy_rng"]
    torch.set_rng_state(state["torch_rng"].cpu())
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])


def catch_interrupts(run):
    """Ctrl-C (or SIGTERM) ends the run after the step under way, with a checkpoint; a second one at once, without."""
    def ask(*_):
        if run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True
        print("\nstopping after this step (or this round), with a checkpoint; again: at once", file=sys.stderr)

    run.interrupted = False
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, ask)


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
    has not wrapped)."""
    data = buffer.filled()
    ends = ((data["terminated"] + data["timeout"]) > 0).nonzero()[:, 0]
    totals = data["reward"].double().cumsum(0)[ends]
    returns = totals.diff(prepend=totals.new_zeros(1))
    return returns[ends >= buffer.size - window].mean().item()


def stop_if_not_finite(run, loss, updates, state_dict):
    """Raises FloatingPointError, and leaves state_dict(run) in nonfinite.pt, where a loss is not finite."""
    if not math.isfinite(loss):
        save(run.dir / "nonfinite.pt", state_dict(run))
        raise FloatingPointError(f"the loss is not finite after {updates} updates; the state is in "
                                 f"{run.dir / 'nonfinite.pt'}, the last good one in checkpoint.pt")


def evaluation_row(agent, envs, frames=None):
    """Plays an episode of the deterministic policy in each of envs: what progress.csv and the live line say of it."""
    act = lambda obs: agent.act(obs, deterministic=True)
    critical = hasattr(agent, "q_value")
    returns, lengths, discounted = evaluate(act, envs, frames, agent.discount if critical else 1.0)
    row = {"return_mean": float(returns.mean()), "return_std": float(returns.std()),
           "length_mean": float(lengths.mean())}
    if critical:  # the left side of eq. 10, at the episodes' first states; past a time limit the return goes on unseen
        starts = torch.as_tensor(first_observations(envs), device=agent.device)
        row["q_error"] = float(agent.q_value(starts, act(starts)).cpu().numpy().mean() - discounted.mean())
    return row, f"return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"


def show(side, name, gif):
    """Plays a side's evaluation episodes, prints their return, draws the first to the file `gif`, if one is given."""
    frames = [] if gif else None
    if gif:
        side.evaluation[0] = side.make_env(render_mode="rgb_array")
    row, text = evaluation_row(side.agent, side.evaluation, frames)
    print(f"{name} task, step {side.step:,}: {text} of {row['length_mean']:.0f} steps on average")
    if gif:
        from plot import write_gif  # matplotlib is slow to import

        write_gif(frames[:600:2], gif)
        print(f"{gif}: the first episode, every second step, 300 pictures at most")


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
    try:
        args = parse()
        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision(args.speed["precision"])
        keep_freed_memory()
        play(args) if args.evaluate else train(args)
    except (ValueError, FloatingPointError) as error:
        if not raised_here(error):
            raise  # a library's: a fault, told by its traceback
        print(f"{program}.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print(f"\n{program}.py: interrupted; --resume continues from the checkpoint", file=sys.stderr)
        return 130
    return 0

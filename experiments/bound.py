"""Is the planned return a lower bound on the real one? Eqs. 3 to 5, checked step by step in the source environment.

    python experiments/bound.py runs/Walker2d-v4__wombet__0 runs/Hopper-v4__wombet__0 --out results/bound

A run's source phase gives the model, the source agent and the planner, which acts in real episodes. On the way, from
the very states it meets, sequences of H actions are each carried out twice, in the model and in the environment: a
plan made anew there, the source policy's proposal (where it guides the planner), and uniform actions. Returns are
undiscounted and end with the H steps, as in eqs. 3 to 5; the bound holds where

    J_P >= J_model - lambda sum_k u(s_k, a_k),   so from  lambda = (J_model - J_P) / sum_k u  on.

What eq. 2 assumes is counted, too: the share of each sequence's real steps at which u covers the model's error, and
at which it would without its scale.

Writes bound.csv, a row per sequence, and bound.png, the share of sequences for which the bound holds over lambda.
"""

import argparse
import csv
import functools
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

import wombet  # noqa: E402
from mpc import MPC  # noqa: E402
from plot import STYLE, new_figure, style  # noqa: E402
from harness import check_place, count, require  # noqa: E402
from task_env import lockstep  # noqa: E402

KINDS = {"plan": "penalised plan", "policy": "source policy", "uniform": "uniform actions"}
COLUMNS = ("run", "kind", "step", "covered", "covered_unscaled", "model_return", "real_return", "sum_u")


def load_source(run_dir):
    """A run as its source phase left it: agent, data and model, and none of its files touched."""
    flags = ["--evaluate", str(run_dir), "--device", "cpu", "--fast", "off"]
    run = wombet.build(wombet.parse_args(flags), Path(run_dir))
    wombet.reuse_source(run, run_dir)
    return run


def model_returns(step, task, obs, actions):
    """What the model says of action sequences: obs (B, d), actions (B, H, A) -> returns (B,) and sums of u (B,)."""
    scores = [MPC(step, task.reward, task.terminated, actions.shape[-1], horizon=actions.shape[1], discount=1.0,
                  penalty_coef=penalty).rollout(obs, actions)[1] for penalty in (0.0, 1.0)]
    return scores[0], scores[0] - scores[1]


def real_steps(env, state, actions):
    """The steps of actions (H, A) in the environment, from the state that `state` replays to a fall or the end:
    {"obs", "action", "reward", "next_obs", "features"}, a row each."""
    env.load_state_dict(state)
    rows = []
    for action in actions:
        obs = env.obs
        next_obs, reward, terminated, _, features = env.step(action)
        rows.append((obs, action, reward, next_obs, features))
        if terminated:
            break
    return {key: torch.as_tensor(np.array(column, dtype=np.float32))
            for key, column in zip(("obs", "action", "reward", "next_obs", "features"), zip(*rows))}


def covered(model, steps):
    """The shares of real steps at which u, and u without its scale, is at least the model's error (eq. 2)."""
    obs, action, next_obs, features = (steps[key] for key in ("obs", "action", "next_obs", "features"))
    u, error = model.uncertainty(obs, action), model.error(obs, action, next_obs, features)
    return [(u / scale >= error).float().mean().item() for scale in (1.0, model.scale)]


def check(run, episodes, length, every):
    """Rows, COLUMNS without the run, from `episodes` real episodes under the planner."""
    horizon, source, task = run.args.horizon, run.source, run.source.env.task
    envs, probe = [source.make_env(seed=i) for i in range(episodes)], source.make_env()
    obs, step = torch.as_tensor(np.stack([env.reset() for env in envs])), lockstep(envs, run.model.uncertainty)
    running, rows, mpc = torch.ones(episodes, dtype=torch.bool), [], wombet.planner(run)
    for t in range(min(length, source.env.max_steps)):
        action = mpc.act(obs)
        if t % every == 0 and t + horizon <= length:
            sequences = {"plan": mpc.plan(obs)[0]}
            if mpc.policy:
                sequences["policy"] = mpc.rollout(obs)[0]
            sequences["uniform"] = 2 * torch.rand(episodes, horizon, source.env.action_dim) - 1
            for kind, sequence in sequences.items():
                imagined, sum_u = model_returns(run.model.step, task, obs, sequence)
                for i in running.nonzero().flatten().tolist():
                    steps = real_steps(probe, envs[i].state_dict(), sequence[i])
                    rows.append((kind, t, *covered(run.model, steps), imagined[i].item(),
                                 steps["reward"].sum().item(), sum_u[i].item()))
        obs = step(obs, action)[0]
        running &= ~task.terminated(obs)
        if not running.any():
            break
    return rows


def needed(rows):
    """The lambda from which on the bound holds, of rows (..., model's return, real return, sum of u); 0 where it
    holds without a penalty, up to 1e-4 of reward: the model's capped reward differs from the real one by rounding."""
    model, real, sum_u = np.array([row[-3:] for row in rows], dtype=float).T
    return np.where(model - real > 1e-4, model - real, 0.0) / np.maximum(sum_u, 1e-12)


def summary(rows, coefs):
    """A line per run and kind: share of sequences for which the bound holds at each lambda, the lambda that 95 % need,
    the mean error of the model's return, and the shares of real steps that u covers, scaled and not (means over
    sequences)."""
    yield ("run", "kind", "sequences", *(f"holds at {c:g}" for c in coefs), "lambda for 95%", "mean J_model - J_P",
           "u covers", "unscaled u")
    for run in dict.fromkeys(row[0] for row in rows):
        for kind in KINDS:
            some = [row for row in rows if row[:2] == (run, kind)]
            if some:
                least = needed(some)
                yield (run, kind, str(len(some)), *(f"{(least <= c).mean():.2f}" for c in coefs),
                       f"{np.quantile(least, 0.95):.1f}", f"{np.mean([row[-3] - row[-2] for row in some]):.3f}",
                       *(f"{np.mean([row[column] for row in some]):.2f}" for column in (-5, -4)))


def draw(rows, used, path):
    """Share of sequences for which the bound holds over lambda: a panel per run; `used`: {run: its lambda}."""
    looks = {kind: {**style(i), "marker": ""} for i, kind in enumerate(KINDS)}
    legend = [Line2D([], [], label=KINDS[kind], **look) for kind, look in looks.items()]
    legend.append(Line2D([], [], color="#555555", lw=1, label=r"$\lambda$ of the run's planner"))
    fig, axes = new_figure(len(used), legend)
    coefs = np.geomspace(0.01, 100, 200)
    for ax, (run, coef) in zip(axes[0], used.items()):
        for kind, look in looks.items():
            if some := [row for row in rows if row[:2] == (run, kind)]:
                least = needed(some)
                ax.plot(coefs, [(least <= c).mean() for c in coefs], **look)
        ax.axvline(coef, color="#555555", lw=1)
        parts = run.split("__")
        ax.set(title=f"{parts[0]}, seed {parts[-1]}", xlabel=r"$\lambda$ (reward per unit of u)", xscale="log",
               ylim=(0, 1.02), ylabel="Share for which the bound holds" if ax.get_subplotspec().is_first_col() else "")
    fig.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run folders with a source.pt")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for bound.csv and bound.png")
    parser.add_argument("--episodes", type=count, default=20, help="real episodes a run (default: %(default)s)")
    parser.add_argument("--length", type=count, default=200, help="steps an episode at most (default: %(default)s)")
    parser.add_argument("--every", type=count, default=10, help="steps between checks (default: %(default)s)")
    parser.error = functools.partial(require, False)
    rows, used = [], {}
    try:
        args = parser.parse_args(argv)
        out, names = Path(args.out), [Path(folder).resolve().name for folder in args.runs]
        for name in names:
            require(names.count(name) == 1, f"two runs are named {name}: give one of them")
        require(not out.exists() or out.is_dir(), f"--out {out} is no folder")
        out.mkdir(parents=True, exist_ok=True)
        for name in ("bound.png", "bound.csv"):
            check_place(out / name, "--out")
        for folder, name in zip(args.runs, names):
            run = load_source(folder)
            require(args.length >= run.args.horizon, f"--length {args.length} is below {folder}'s horizon of "
                    f"{run.args.horizon}: no sequence fits in")
            torch.manual_seed(run.args.seed)
            rows += [(name, *row) for row in check(run, args.episodes, args.length, args.every)]
            used[name] = run.args.plan_penalty_coef
    except (ValueError, OSError) as error:
        print(f"bound.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    with matplotlib.rc_context(STYLE):
        draw(rows, used, out / "bound.png")
    with open(out / "bound.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    for line in summary(rows, sorted({0, 1, 5, *used.values()})):
        print("  ".join(f"{cell:<14}" for cell in line))
    return 0


if __name__ == "__main__":
    sys.exit(main())

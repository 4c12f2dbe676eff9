"""WOMBET: World Model-based Experience Transfer (Kim & Sreenath, 2026), the whole method as one loop.

    python wombet.py --env Walker2d-v4

1. Source    an agent learns in the source task; its real transitions train a probabilistic ensemble (section 4.1).
2. Generate  uncertainty-penalised MPC acts inside that model (eqs. 1 to 5); what passes the dual filter (eq. 6) is
             relabelled with the target's reward: the first D_S (section 4.3).
3. Target    the source's agent goes on learning online, from alpha D_S + (1 - alpha) real data (sections 4.4 to 4.6).
             Every --imagine-every steps it is rolled out in the model under the target's reward, and D_S keeps the
             newest; every --refit-every steps the model is refit on all real data.

The maths is in tasks.py, world_model.py, mpc.py, filter.py, replay.py and agent.py; this file wires them. What it
shares with the baselines (common flags, run folder, log, checkpoints, exit codes) is in harness.py.
"""

import argparse
import copy
import functools
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from agent import SAC
from filter import MODES, accept, relabel, score_trajectories, thresholds, to_transitions
from mpc import MPC, imagine
from harness import (SWITCH, Log, amount, as_flag, catch_interrupts, count, evaluation_row, fraction, load, load_agent,
                     load_dataset, load_log_and_generators, log_and_generators, must_fit, must_match, new_parser,
                     nonnegative, not_below, open_run, percent, positive, rate, read_flags, real, recent_return,
                     require, require_memory, run_program, same_flags, save, save_dataset, show, some_path,
                     source_flags, source_quantities, stop_if_interrupted, stop_if_not_finite, store_step, write_config)
from replay import AdaptiveMix, ReplayBuffer, mixed_batch
from task_env import TaskEnv, lockstep
from world_model import WorldModel

# ---------------------------------------------------------------------------------------------------------- arguments


def build_parser():
    parser, g = new_parser(__doc__, "wombet")
    g.add_argument("--source-steps", type=count, default=50_000, help="environment steps in the source task")
    g.add_argument("--target-steps", type=count, default=25_000, help="environment steps in the target task")
    g.add_argument("--preset", choices=("paper",), help="paper: the literal method; flags given beside it win")
    g.add_argument("--prior", **SWITCH, default=True, help="transfer; --no-prior: from scratch, by agent flags alone")
    g.add_argument("--source-run", type=some_path, metavar="RUN_DIR", help="take its source phase")

    g = parser.add_argument_group("transfer (section 4.6)")
    g.add_argument("--offline-data", type=some_path, metavar="FILE", help="D_S from an .npz with D4RL's keys; no model")
    g.add_argument("--warm-start", **SWITCH, default=True, help="the target's agent starts as the source's, not anew")
    g.add_argument("--keep-source-data", **SWITCH, default=True, help="the source's real data, relabelled, join D_T's")
    g.add_argument("--pretrain-updates", type=amount, default=0, help="critic updates before the first target "
                   "step; there --eval-every and --checkpoint-every count them, --imagine-every actor updates")
    g.add_argument("--alpha-rule", default="adaptive", choices=("adaptive", "fixed"), help="share of D_S in a batch")
    g.add_argument("--alpha", type=fraction, default=0.5, help="the share with --alpha-rule fixed; 0: no imagination")
    g.add_argument("--alpha-gain", type=nonnegative, default=0.1, help="adaptive: clip(gain * TD error, min, max)")
    g.add_argument("--alpha-min", type=fraction, default=0.05, help="lower end of the adaptive alpha")
    g.add_argument("--alpha-max", type=fraction, default=0.5, help="upper end of the adaptive alpha")
    g.add_argument("--alpha-ema", type=rate, default=0.005, help="rate of the TD error's running mean, per step")
    g.add_argument("--td-error", default="absolute", choices=("absolute", "signed"), help="signed: the paper's formula")

    g = parser.add_argument_group("imagining in the target task (sections 4.1 and 4.3)")
    g.add_argument("--imagine-every", type=amount, default=250, help="target steps between rounds; 0: the first alone")
    g.add_argument("--imagine-with", default="policy", choices=("policy", "mpc"), help="policy: the present agent, "
                   "under the target's reward; mpc: as the first D_S")
    g.add_argument("--rollouts", type=count, default=2000, help="the policy's rollouts in a round")
    g.add_argument("--rollout-length", type=count, default=5, help="their length, steps")
    g.add_argument("--offline-capacity", type=count, default=50_000, help="transitions in D_S, which keeps the newest")
    g.add_argument("--refit-every", type=amount, default=1000, help="target steps between fits of the model; 0: none")
    g.add_argument("--refit-epochs", type=count, default=3, help="most epochs of such a fit, a warm start")
    g.add_argument("--refit-on-imagined", **SWITCH, default=False, help="refit on D_S and the target's buffer alone")

    g = parser.add_argument_group("the first D_S: generating and filtering (section 4.3, eq. 6)")
    g.add_argument("--generate-in", default="model", choices=("model", "env"), help="env: by more real source steps")
    g.add_argument("--imagined-trajectories", type=count, default=64, help="trajectories in a round of MPC")
    g.add_argument("--imagined-length", type=count, default=200, help="their length, steps; at most an episode")
    g.add_argument("--reset-share", type=fraction, default=0.5, help="in the model: share from resets, not source data")
    g.add_argument("--trust-percentile", type=percent, default=99.0, help="percentile of real u that cuts; 0: never")
    g.add_argument("--filter", default="dual", choices=MODES, help="criteria of eq. 6")
    g.add_argument("--return-percentile", type=percent, default=50.0, help="of the first round, becomes J_th")
    g.add_argument("--u-percentile", type=percent, default=75.0, help="of the first round, becomes u_th")
    g.add_argument("--return-threshold", type=real, help="J_th itself, discounted source return")
    g.add_argument("--u-threshold", type=real, help="u_th itself")

    g = parser.add_argument_group("planning (section 4.2, eqs. 1 to 5)")
    g.add_argument("--horizon", type=count, default=5, help="H, steps planned ahead")
    g.add_argument("--population", type=count, default=32, help="candidates drawn in a CEM iteration")
    g.add_argument("--elites", type=count, default=8, help="candidates that refit the distribution")
    g.add_argument("--iterations", type=count, default=1, help="CEM iterations, beside the policy's proposals")
    g.add_argument("--momentum", type=fraction, default=0.1, help="share of the old mean and std kept by a refit")
    g.add_argument("--init-std", type=positive, default=0.3, help="std of the first iteration, actions in [-1, 1]")
    g.add_argument("--noise-beta", type=nonnegative, default=0.25, help="colour of the candidates' noise; 0 is white")
    g.add_argument("--keep-elites", type=fraction, default=0.3, help="share of elites kept as candidates, 1 at least")
    g.add_argument("--replan-every", type=count, default=1, help="steps of a plan executed before the next")
    g.add_argument("--expectation", default="mean", choices=("mean", "members"), help="eq. 1: states move by the "
                   "ensemble's mean; or by each member's, then a plan's return is averaged over members")
    g.add_argument("--guide", **SWITCH, default=True, help="candidates from the source policy, value at the horizon")
    g.add_argument("--policy-samples", type=count, default=16, help="candidates from the policy, with --guide")
    g.add_argument("--plan-penalty-coef", type=nonnegative, default=4.0, help="lambda of eqs. 3 to 5")

    g = parser.add_argument_group("world model (section 4.1)")
    g.add_argument("--members", type=count, default=5, help="ensemble members E")
    g.add_argument("--model-hidden", type=count, default=200, help="width of a hidden layer")
    g.add_argument("--model-layers", type=count, default=3, help="hidden layers")
    g.add_argument("--model-lr", type=positive, default=1e-3, help="learning rate")
    g.add_argument("--model-batch-size", type=count, default=256, help="transitions per member in a gradient step")
    g.add_argument("--model-epochs", type=count, default=60, help="most epochs of the first fit")
    g.add_argument("--uncertainty", default="std", choices=WorldModel.UNCERTAINTIES, help="u(s, a), normalised")
    g.add_argument("--coverage", type=fraction, default=0.95, help="held-out errors that u is scaled to cover; 0: not")

    g = parser.add_argument_group("agent (sections 4.4 and 4.5)")
    g.add_argument("--critics", type=count, default=5, help="N, critics in the ensemble")
    g.add_argument("--min-critics", type=amount, default=2, help="M, random critics under the target's min; 0: all")
    g.add_argument("--actor-q", default="mean", choices=("min", "mean"), help="over critics, what the actor maximises")
    g.add_argument("--actor-average", type=rate, default=1e-3, help="rate of the evaluated actor's average")
    g.add_argument("--utd", type=count, default=8, help="critic updates per environment step")
    g.add_argument("--batch-size", type=count, default=128, help="transitions per critic update")
    g.add_argument("--hidden", type=count, default=256, help="width of the two hidden layers")
    g.add_argument("--layer-norm", **SWITCH, default=True, help="LayerNorm in the critics (eq. 8)")
    g.add_argument("--lr", type=positive, default=1e-3, help="learning rate of actor, critics and temperature")
    g.add_argument("--discount", type=fraction, default=0.99, help="gamma, also of planning and of J in eq. 6")
    g.add_argument("--polyak", type=rate, default=0.01, help="rate of the target networks")
    g.add_argument("--init-temperature", type=positive, default=1.0, help="of SAC's entropy term")
    g.add_argument("--target-entropy", type=real, help="nats; unless given, -action dimension / 2")
    g.add_argument("--backup-entropy", **SWITCH, default=True, help="entropy term in the critics' target")
    g.add_argument("--actor-entropy", **SWITCH, default=True, help="entropy term in the actor's loss")
    # Deviation 5: the paper has one lambda; a plan's and a target's are one value here, too, but can be set apart
    g.add_argument("--target-penalty-coef", type=nonnegative, default=4.0, help="lambda of eq. 7, on D_S samples")
    g.add_argument("--floor-penalty", **SWITCH, default=True, help="lambda u takes no reward below 0")
    g.add_argument("--random-steps", type=amount, default=1000, help="uniform actions first; with --offline-data none")
    g.add_argument("--snapshot-window", type=amount, default=2000, help="so many steps' training episodes tell which "
                   "source agent goes on, the one of the highest return; 0, or too few steps: the last one")
    return parser


# --preset paper: the literal reading; each is a numbered row of the README's table of departures
PAPER = {"warm_start": False, "keep_source_data": False, "imagine_with": "mpc", "imagine_every": 10_000,
         "refit_every": 10_000, "refit_epochs": 10, "offline_capacity": 200_000, "refit_on_imagined": True,
         "reset_share": 1.0, "trust_percentile": 0.0, "guide": False, "horizon": 15, "population": 128, "elites": 16,
         "iterations": 3, "init_std": 0.5, "momentum": 0.0, "noise_beta": 0.0, "keep_elites": 0.0,
         "expectation": "members", "uncertainty": "variance", "coverage": 0.0, "plan_penalty_coef": 1.0,
         "target_penalty_coef": 1.0, "floor_penalty": False, "min_critics": 0, "actor_q": "min", "actor_average": 1.0,
         "backup_entropy": False, "actor_entropy": False, "snapshot_window": 0, "td_error": "signed"}


def check_args(args):
    for name, flag, modes in (("alpha", "alpha_rule", ("fixed",)), ("return_threshold", "filter", ("dual", "return")),
                              ("u_threshold", "filter", ("dual", "uncertainty")),
                              *((n, "alpha_rule", ("adaptive",)) for n in ("alpha_gain", "alpha_min", "alpha_max"))):
        require(vars(args)[flag] in modes or vars(args)[name] == build_parser().get_default(name),
                f"{as_flag(name, vars(args)[name])} needs {as_flag(flag, ' or '.join(modes))}")
    learns_source, mixes = args.prior and not args.offline_data, args.alpha_rule == "adaptive" or args.alpha > 0
    share, most = ("alpha", args.batch_size) if args.alpha_rule == "fixed" else ("alpha_max", args.batch_size - 1)
    rows = round(vars(args)[share] * args.batch_size)  # the adaptive share needs a real row: the TD error is theirs
    require(not (mixes and args.prior) or 1 <= rows <= most, f"{as_flag(share, vars(args)[share])} gives D_S {rows} "
            f"of the {args.batch_size} rows in a batch: give it 1 to {most}")
    for low, high in (("alpha_min", "alpha_max"), ("min_critics", "critics"), ("elites", "population"),
                      *[("horizon", "imagined_length")] * (learns_source and mixes), ("replan_every", "horizon")):
        require(vars(args)[low] <= vars(args)[high], f"{as_flag(low, vars(args)[low])} is above "
                f"{as_flag(high, vars(args)[high])}")
    rounds = args.imagine_every and args.imagine_with == "policy"
    for n, length, used in (("imagined_trajectories", "imagined_length", True), ("rollouts", "rollout_length", rounds)):
        size, steps = vars(args)[n], vars(args)[length]
        require(not (learns_source and mixes and used) or size * steps <= args.offline_capacity,
                f"--offline-capacity {args.offline_capacity} is below {as_flag(n, size)} x {as_flag(length, steps)}")
    where = "source_steps" if args.prior else "target_steps"
    require(args.offline_data or args.source_run or args.random_steps < vars(args)[where], f"--random-steps "
            f"{args.random_steps} leaves none of {as_flag(where, vars(args)[where])} to learn in")
    require([not args.prior, bool(args.offline_data), bool(args.source_run)].count(True) < 2,
            "give one of --no-prior, --offline-data and --source-run")
    data = mixes or args.keep_source_data and not args.offline_data
    require(not args.pretrain_updates or args.prior and data, "--pretrain-updates needs data before the first target "
            "step: imagined, of the source, or a file's")
    unused = "" if learns_source else source_flags(args)
    require(not unused, f"{unused}: there is no source task with --no-prior or --offline-data")


def parse_args(argv=None):
    """This program's flags; bad ones raise ValueError."""
    parser, first = build_parser(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")
    if first.parse_known_args(argv)[0].preset == "paper":
        parser.set_defaults(**PAPER)
    return read_flags(argv, parser, check_args, anew=("source_steps", "target_steps", "lr", "model_lr"))


# --------------------------------------------------------------------------------------------------------------- set-up


def build(args, run_dir, state=None):
    """Everything that a run holds and a checkpoint, `state`, keeps."""
    torch.manual_seed(args.seed)
    learns_source = args.prior and not args.offline_data
    pooled = args.source_steps if learns_source and args.keep_source_data else 0  # first rows of the target's buffer
    require_memory(args, TaskEnv(args.env, max_steps=args.episode_steps), **{
        "offline_capacity": learns_source * args.offline_capacity,
        "source_steps": learns_source * args.source_steps + pooled})
    run = SimpleNamespace(args=args, dir=run_dir, log=Log(run_dir / "progress.csv"),
                          phase="source" if learns_source else "switch", thresholds=None, acceptance=None,
                          best=None, holdout_mse=None, rng=np.random.default_rng(args.seed), pooled=pooled)

    def side(source, capacity, offset):
        """One task's environments, agent and data."""
        make_env = functools.partial(TaskEnv, args.env, source, max_steps=args.episode_steps,
                                     **(source_quantities(args) if source else {}))
        env = make_env(seed=2 * args.seed + offset)
        evaluation = [make_env() for _ in range(args.eval_episodes)]
        agent = SAC(env.obs_dim, env.action_dim, n_critics=args.critics, min_critics=args.min_critics or args.critics,
                    hidden=(args.hidden, args.hidden), layer_norm=args.layer_norm, lr=args.lr, discount=args.discount,
                    polyak=args.polyak, init_temperature=args.init_temperature, target_entropy=args.target_entropy,
                    backup_entropy=args.backup_entropy, actor_entropy=args.actor_entropy, actor_q=args.actor_q,
                    actor_average=args.actor_average, penalty_coef=args.target_penalty_coef,
                    floor_penalty=args.floor_penalty, dtype=args.speed["dtype"], compile=args.speed["compile"],
                    device=args.device)
        return SimpleNamespace(env=env, make_env=make_env, evaluation=evaluation, agent=agent, step=0, updates=0,
                               buffer=ReplayBuffer(capacity, args.device, **env.shapes))

    run.target = side(None, pooled + args.target_steps, 0)
    run.mix = AdaptiveMix(args.alpha_gain, args.alpha_min, args.alpha_max, args.alpha_ema,
                          args.alpha if args.alpha_rule == "fixed" else None, args.td_error == "signed")
    run.offline_data, run.source, run.model, env = None, None, None, run.target.env
    if args.offline_data and state:  # the checkpoint has the file's rows
        with must_fit("the checkpoint", "these flags"):
            run.offline_data = ReplayBuffer(len(state["offline_data"]["rows"]["obs"]), args.device, **env.shapes)
    elif args.offline_data:
        run.offline_data = load_dataset(args.offline_data, args.device, env.action_scale, **env.shapes)
    elif learns_source:
        run.source = side(args.source, args.source_steps, 1)
        run.model = WorldModel(env.obs_dim, env.action_dim, env.n_features, members=args.members,
                               hidden=args.model_hidden, layers=args.model_layers,
                               uncertainty_kind=args.uncertainty, coverage=args.coverage,
                               inference_dtype=args.speed["dtype"], fit_dtype=args.speed["dtype"],
                               compile=args.speed["compile"]).to(args.device)
        run.model_step = run.model.member_step if args.expectation == "members" else run.model.step
        run.offline_data = ReplayBuffer(args.offline_capacity, args.device, **env.shapes)
    return run


def planner(run):
    """MPC in the world model under the source task's reward, guided by the source agent."""
    args, source, task = run.args, run.source, run.source.env.task
    return MPC(run.model_step, task.reward, task.terminated, source.env.action_dim, horizon=args.horizon,
               population=args.population, elites=args.elites, iterations=args.iterations, momentum=args.momentum,
               init_std=args.init_std, noise_beta=args.noise_beta, keep_elites=args.keep_elites,
               discount=args.discount, penalty_coef=args.plan_penalty_coef, execute_steps=args.replan_every,
               particles=args.members if args.expectation == "members" else 1, policy_samples=args.policy_samples,
               policy=source.agent.propose if args.guide else None, value=source.agent.value if args.guide else None)


SIDE_VALUES = ("step", "updates")  # of a side, and below of a run, what a checkpoint keeps as it is
RUN_VALUES = ("phase", "thresholds", "acceptance", "best", "holdout_mse")


def state_dict(run):
    """The whole run as tensors and plain values."""
    state = {"wombet": 1, **{name: getattr(run, name) for name in RUN_VALUES}, "mix": run.mix.state_dict(),
             **log_and_generators(run)}
    for name in ("source", "target"):
        if (side := getattr(run, name)) is not None:
            state[name] = {part: getattr(side, part).state_dict() for part in ("env", "agent", "buffer")}
            state[name].update({key: getattr(side, key) for key in SIDE_VALUES})
    state.update({n: getattr(run, n).state_dict() for n in ("model", "offline_data") if getattr(run, n) is not None})
    return state


def load_side(side, state):
    for part in ("env", "buffer"):
        getattr(side, part).load_state_dict(state[part])
    load_agent(side.agent, state["agent"])
    vars(side).update({key: state[key] for key in SIDE_VALUES})


def load_state_dict(run, state):
    with must_fit("the checkpoint", "these flags"):
        must_match(state, state_dict(run))
        kinds = {"thresholds": list, "acceptance": float, "holdout_mse": float, "best": dict}  # None in a new run
        for name, kind in kinds.items():
            require(isinstance(state[name], (kind, type(None))), f"{name} is {state[name]!r}")
        vars(run).update({name: state[name] for name in RUN_VALUES})
        require(run.phase in ("source", "generate", "switch", "target", "done"), f"unknown phase {run.phase!r}")
        for name in ("source", "target"):
            if getattr(run, name) is not None:
                steps, done = vars(run.args)[f"{name}_steps"], state[name]["step"]
                if name == "source":  # --generate-in env takes steps that are not learned from
                    done = len(state[name]["buffer"]["rows"]["obs"])
                not_below(f"--{name}-steps", steps, done)
                require(name == "target" or run.phase == "source" or steps == done,
                        f"--source-steps {steps}: the source phase is over, after {done}")
                load_side(getattr(run, name), state[name])
        for name in ("model", "offline_data", "mix"):
            if getattr(run, name) is not None:
                getattr(run, name).load_state_dict(state[name])
        load_log_and_generators(run, state)


def reuse_source(run, source_run):
    """The source phase of another run: its agent, its data, its model, and its generators' states, so that a run of
    the same seed, flags and speed goes on as that one did."""
    # what sets the sizes and the meaning of its state, and what acts in the source phase alone
    names = ("env", "source", "seed", "episode_steps", "critics", "hidden", "layer_norm", "discount", "members",
             "model_hidden", "model_layers", "model_epochs", "snapshot_window", "random_steps", "init_temperature")
    quantities = [key for key in vars(run.args) if key.startswith("source_") and key != "source_run"]
    same_flags(run.args, source_run, build_parser(), (*names, *quantities))
    state = load(Path(source_run) / "source.pt", run.args.device, "wombet")
    with must_fit(f"{source_run}/source.pt", "this version"):  # the agent or the model of another may have other parts
        load_side(run.source, state["source"])
        run.model.load_state_dict(state["model"])
        data = run.source.buffer.filled()  # what the model was fit on; the other run's u may be of another kind
        run.model.calibrate(*(data[key] for key in ("obs", "action", "next_obs", "features")))
        run.holdout_mse, run.phase = state["holdout_mse"], "generate"
        load_log_and_generators(run, state)


# --------------------------------------------------------------------------------------------------------------- phases


def report(run, phase, info):
    """Evaluates the policy in a phase's task: one row of progress.csv, one line on stdout."""
    args, side = run.args, run.source if phase == "source" else run.target
    row, text = evaluation_row(side.agent, side.evaluation)
    row.update({key: float(info[key]) for key in ("q_mean", "temperature") if info}, phase=phase, updates=side.updates,
               env_steps=run.target.step, source_steps=run.source.step if run.source else 0,
               model_holdout_mse=run.holdout_mse)
    if phase != "source":
        row["td_error"] = run.mix.td_error
        if run.offline_data is not None:
            row.update(alpha=run.mix.alpha, offline_size=run.offline_data.size, acceptance=run.acceptance)
            text += f", alpha {run.mix.alpha:.2f}"
    run.log.row(row)
    run.log.live(phase, *((side.updates, args.pretrain_updates) if phase == "offline" else
                          (side.step, vars(args)[f"{phase}_steps"])), text, force=True)
    return text


def learn(run, name):
    """Online learning in one task: act, store, update on the mix; in the target task with rounds of imagination."""
    args, side, steps = run.args, getattr(run, name), vars(run.args)[f"{name}_steps"]
    env, agent, buffer = side.env, side.agent, side.buffer
    run.log.pace, text, info = (time.time(), side.step), "", {}
    while side.step < steps:
        stop_if_interrupted(run, state_dict)
        if name == "target" and side.step:
            if imagines(run) and args.refit_every and side.step % args.refit_every == 0:
                fit(run, args.refit_epochs)
                refresh_uncertainty(run)
            imagine_round(run, side.step)
        obs = env.reset() if env.obs is None else env.obs
        acts_randomly = (name == "source" or not args.prior) and side.step < args.random_steps
        action = (run.rng.uniform(-1.0, 1.0, env.action_dim).astype(np.float32) if acts_randomly
                  else agent.act(obs).cpu().numpy())
        store_step(env, buffer, action)
        side.step += 1
        if not acts_randomly:
            info = update(run, side)
        if name == "source" and args.snapshot_window and env.obs is None and (
                side.step >= args.random_steps + args.snapshot_window):
            keep_best(run)
        if side.step % args.eval_every == 0 or side.step == steps:
            text = report(run, name, info)
        if side.step % args.checkpoint_every == 0:
            save(run.dir / "checkpoint.pt", state_dict(run))
        run.log.live(name, side.step, steps, text)


def keep_best(run):
    """Keeps a copy of the source agent when its recent training episodes return more than at any time before."""
    mean = recent_return(run.source.buffer, run.args.snapshot_window)
    if run.best is None or mean > run.best["return"]:
        run.best = {"return": mean, "step": run.source.step, "agent": copy.deepcopy(run.source.agent.state_dict())}


def choose_best(run):
    """Goes on with the agent that `keep_best` kept, if there is one."""
    # Deviation 12: the last agent may be in one of the falls that policies take between one evaluation and the next
    if run.best is not None:
        load_agent(run.source.agent, run.best["agent"])
        run.log.note(f"source  the agent of step {run.best['step']:,} goes on: its recent training episodes return "
                     f"{run.best['return']:.1f}")
        run.best = None


def update(run, side):
    """UTD critic updates and one actor update on a batch of the mix; stops the run when the loss is not finite."""
    args, offline = run.args, run.offline_data if side is run.target else None
    batch, n_offline = mixed_batch(offline, side.buffer, run.mix.alpha, args.batch_size, args.utd)
    info = side.agent.update(batch, n_offline)
    side.updates += args.utd
    stop_if_not_finite(run, info["critic_loss"] + info["actor_loss"], side.updates, state_dict)
    if side is run.target:
        run.mix.update(info)
    return info


def pretrain(run):
    """Learns before the first target step, from rounds of imagination and the source's real data, or from a file's."""
    args, side, text = run.args, run.target, ""
    run.log.pace = (time.time(), side.updates)
    while side.updates < args.pretrain_updates:
        stop_if_interrupted(run, state_dict)
        if side.updates == 0:
            text = report(run, "offline", {})
        imagine_round(run, side.updates // args.utd)
        info = update(run, side)
        if side.updates % args.eval_every < args.utd or side.updates >= args.pretrain_updates:
            text = report(run, "offline", info)
        if side.updates % args.checkpoint_every < args.utd:
            save(run.dir / "checkpoint.pt", state_dict(run))
        run.log.live("offline", side.updates, args.pretrain_updates, text)


def fit(run, epochs):
    """Fits the model (section 4.1) on the real data of both tasks, or, `refit_on_imagined`, of the target's and D_S."""
    args, began = run.args, time.time()
    # rows are only ever appended, so that what the fit holds out stays held out
    target, imagined = run.target.buffer.filled(), []
    collected = parts = [run.source.buffer.filled(), {key: values[run.pooled:] for key, values in target.items()}]
    if args.refit_on_imagined and run.phase == "target":
        # Deviation 9: the paper's D is D_S and D_T; the default leaves out what the model itself has imagined
        parts, imagined = [target], [run.offline_data.filled()]
    n_real = sum(len(part["obs"]) for part in parts)
    columns = {k: torch.cat([part[k] for part in parts + imagined]) for k in ("obs", "action", "next_obs", "features")}
    rows = torch.arange(len(columns["obs"]), device=args.device)
    result = run.model.fit(**columns, held_out=(rows % 10 == 0) & (rows < n_real), lr=args.model_lr,
                           bounds=torch.cat([part[key] for part in collected for key in ("obs", "next_obs")]),
                           batch_size=args.model_batch_size, max_epochs=epochs)
    run.holdout_mse = result["holdout_mse"]
    pairs = torch.stack([result["holdout_u"], result["holdout_error"]], 1).cpu().numpy()
    np.savetxt(run.dir / "model_error.csv", pairs, "%.5g", ",", header="u,error", comments="")
    run.log.note(f"model   fit on {len(rows):,} transitions: {result['epochs']} epochs, holdout MSE "
                 f"{run.holdout_mse:.4f} of the variance, u scaled by {run.model.scale.item():.3g}, "
                 f"{time.time() - began:.0f} s")
    run.log.leave_out(began)


# ---------------------------------------------------------------------------------------------------------- imagination


def imagine_round(run, number):
    """Adds a round of imagination to D_S where `number`, of steps or of actor updates, is one of --imagine-every's."""
    if number and imagines(run) and run.args.imagine_every and number % run.args.imagine_every == 0:
        (generate if run.args.imagine_with == "mpc" else imagine_policy)(run)


def imagines(run):
    """Whether there is a model and a use for what it imagines."""
    return run.model is not None and run.mix.fixed != 0


def trust_limit(run):
    """The uncertainty beyond which what is imagined is cut: a percentile of u on the source's real data."""
    if not run.args.trust_percentile:
        return math.inf
    data = run.source.buffer.sample(5000)
    return run.model.uncertainty(data["obs"], data["action"]).quantile(run.args.trust_percentile / 100).item()


def imagine_policy(run):
    """The present agent in the model under the target's reward, a few steps from real states, half of them D_T's.

    Deviation 8: section 4.3 imagines with the planner under r_S alone. In place of eq. 6 each step passes
    `trust_limit`; eq. 7 penalises it.
    """
    args, target = run.args, run.target
    n_new = args.rollouts // 2 if target.buffer.size > run.pooled else 0  # none before D_T begins
    starts = [run.source.buffer.sample(args.rollouts - n_new)["obs"]]
    starts += [target.buffer.sample(n_new, first=run.pooled)["obs"]] if n_new else []
    trajectories = imagine(run.model.step, target.env.task.terminated, target.agent.act, torch.cat(starts),
                           args.rollout_length, trust_limit(run))
    run.offline_data.add(**to_transitions(trajectories, trajectories["valid"][:, 0], target.env.task.reward))


def generate(run):
    """One round of section 4.3: imagine with MPC under the source's reward, score, filter, append to D_S."""
    args, began = run.args, time.time()
    trajectories = imagine_mpc(run)
    rewards = relabel(trajectories, run.source.env.task.reward)["reward"]
    returns, mean_u = score_trajectories(rewards, trajectories["uncertainty"], trajectories["valid"],
                                         trajectories["terminated"], args.discount)
    try:
        if run.thresholds is None:
            run.thresholds = list(thresholds(returns, mean_u, args.return_percentile, args.u_percentile,
                                             args.return_threshold, args.u_threshold, args.filter))
        passed = accept(returns, mean_u, *run.thresholds, args.filter)
    except ValueError as error:
        if run.offline_data.size == 0:
            raise ValueError(f"{error}; see --return-threshold, --u-threshold and --trust-percentile with --source-run "
                             f"{args.source_run or run.dir} and another --name, or take more --source-steps") from None
        run.log.note(f"D_S     {error}")  # a later round that adds nothing leaves D_S as it is
        passed = torch.zeros_like(returns, dtype=torch.bool)
    run.acceptance = passed.float().mean().item()
    run.offline_data.add(**to_transitions(trajectories, passed, run.target.env.task.reward))
    steps = trajectories["valid"].sum(1).float().mean()
    run.log.note(f"D_S     {run.acceptance:.0%} of {len(returns)} trajectories pass ({args.filter}: J_th "
                 f"{run.thresholds[0]:.4g}, u_th {run.thresholds[1]:.3g}); mean valid length {steps:.0f}; "
                 f"{run.offline_data.size:,} transitions, {time.time() - began:.0f} s")
    run.log.leave_out(began)


def imagine_mpc(run):
    """Trajectories of penalised MPC in the model, or in real source environments, N at once."""
    args, source, n = run.args, run.source, run.args.imagined_trajectories
    length = min(args.imagined_length, source.env.max_steps)
    act = run.log.counted(planner(run).act, "plan", length)  # a plan may take long, and a round has `length`
    if args.generate_in == "env":
        envs = [source.make_env(seed=int(run.rng.integers(2**31))) for _ in range(n)]
        starts = torch.as_tensor(np.stack([env.reset() for env in envs]), device=args.device)
        trajectories = imagine(lockstep(envs, run.model.uncertainty), source.env.task.terminated, act, starts, length)
        source.step += int(trajectories["valid"].sum())  # real steps count
        return trajectories
    # Deviation 6: some start from states of the source data, for trajectories from resets are nearly alike; a reset
    # draws from the initial-state distribution and takes no step in the environment
    env, n_reset = source.evaluation[0], round(args.reset_share * n)
    env.seed(int(run.rng.integers(2**31)))
    resets = [torch.as_tensor(env.reset(), device=args.device)[None] for _ in range(n_reset)]
    starts = torch.cat([*resets, source.buffer.sample(n - n_reset)["obs"]])
    return imagine(run.model_step, source.env.task.terminated, act, starts, length, trust_limit(run))


def refresh_uncertainty(run):
    """u of all of D_S, by the model as it is now."""
    data = run.offline_data.filled()
    chunks = zip(data["obs"].split(8192), data["action"].split(8192))
    data["uncertainty"][:] = torch.cat([run.model.uncertainty(*chunk) for chunk in chunks])


# ----------------------------------------------------------------------------------------------------------------- main


def train(args):
    """The method, from the first phase that is not done yet."""
    run_dir, state = open_run(args, "wombet")
    run = build(args, run_dir, state)
    if state is not None:
        load_state_dict(run, state)
        run.log.write()  # without the rows that came after the checkpoint
        if run.phase == "done" and run.target.step < args.target_steps:
            run.phase = "target"
    elif args.source_run:
        reuse_source(run, args.source_run)
    if run.phase != "done":  # else nothing would be made with these flags
        write_config(run_dir, args)  # from here on they are known to be good
    if state is None:
        save(run_dir / "checkpoint.pt", state_dict(run))  # from here on --resume goes on, whatever happens
    catch_interrupts(run)

    if run.phase == "source":  # 1. learn the source task, then the model
        learn(run, "source")
        save(run.dir / "checkpoint.pt", state_dict(run))
        stop_if_interrupted(run, state_dict)
        choose_best(run)  # not in that checkpoint, from which more --source-steps may be taken
        fit(run, args.model_epochs)
        run.phase = "generate"
        save(run.dir / "source.pt", state_dict(run))
    if run.phase == "generate":  # 2. imagine the first D_S, and prepare what the target task starts from
        save(run.dir / "checkpoint.pt", state_dict(run))
        stop_if_interrupted(run, state_dict)
        if imagines(run):
            generate(run)
            save_dataset(run.offline_data, run.dir / "first_dataset.npz")
        if args.keep_source_data:
            # Deviation 10: the dynamics are shared, so real source data are as true as D_T's, and train with them
            run.target.buffer.add(**relabel(run.source.buffer.filled(), run.target.env.task.reward))
        if args.warm_start:
            # Deviation 11: the paper plans without a policy and learns one in the target task alone
            run.target.agent.load_state_dict(run.source.agent.state_dict())
        run.phase = "switch"
        save(run.dir / "checkpoint.pt", state_dict(run))
    if run.phase == "switch":
        pretrain(run)
        report(run, "target", {})  # row 0: the return before the first target step
        run.phase = "target"
        save(run.dir / "checkpoint.pt", state_dict(run))
    if run.phase == "target":  # 3. learn the target task, with rounds of imagination
        learn(run, "target")
        run.phase = "done"
    save(run.dir / "checkpoint.pt", state_dict(run))
    if imagines(run):
        save_dataset(run.offline_data, run.dir / "dataset.npz")
    run.log.note(f"done in {run.log.wall_clock / 60:.1f} min: {run.dir}/progress.csv, checkpoint.pt"
                 + (", dataset.npz" if imagines(run) else ""))


def play(args):
    """`--evaluate`: plays a run's policy on the episodes of its own evaluations, prints its return, draws the first."""
    state = load(Path(args.evaluate) / "checkpoint.pt", args.device, "wombet")
    run = build(args, Path(args.evaluate), state)
    load_state_dict(run, state)
    name = "source" if run.phase in ("source", "generate") else "target"
    show(getattr(run, name), name, args.gif)


def main(argv=None):
    return run_program("wombet", lambda: parse_args(argv), train, play)


if __name__ == "__main__":
    sys.exit(main())

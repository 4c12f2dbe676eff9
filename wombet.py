"""WOMBET: World Model-based Experience Transfer (Kim & Sreenath, 2026), the whole method as one loop.

    python wombet.py --env Walker2d-v4

1. Source    an agent learns in the source task; its real transitions train a probabilistic ensemble (section 4.1).
2. Generate  uncertainty-penalised MPC acts inside that model (eqs. 1 to 5); what passes the dual filter (eq. 6) is
             relabelled with the target's reward and becomes, beside the real source data, D_S (section 4.3).
3. Target    the source's agent goes on learning online, from alpha D_S + (1 - alpha) D_T (sections 4.4 to 4.6);
             every --refit-every steps the model is refit on all real data and step 2 adds to D_S.

The maths is in tasks.py, world_model.py, mpc.py, filter.py and agent.py; this file wires them. What it shares with
the baselines (common flags, run folder, log, checkpoints, exit codes) is in harness.py.
"""

import copy
import functools
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from agent import SAC, AdaptiveMix, ReplayBuffer, mixed_batch
from filter import MODES, accept, met_threshold, relabel, score_trajectories, thresholds, to_transitions
from mpc import MPC, imagine
from harness import (SWITCH, Log, amount, catch_interrupts, count, evaluation_row, fraction, load, load_agent,
                     load_dataset, load_log_and_generators, log_and_generators, must_fit, must_match, new_parser,
                     nonnegative, not_below, open_run, percent, positive, read_flags, real, recent_return, require,
                     require_memory, run_program, same_flags, save, save_dataset, show, some_path, source_quantities,
                     stop_if_interrupted, stop_if_not_finite, store_step, write_config)
from tasks import TaskEnv, lockstep
from world_model import WorldModel

# ---------------------------------------------------------------------------------------------------------- arguments


def build_parser():
    parser, g = new_parser(__doc__, "wombet")
    g.add_argument("--source-steps", type=count, default=20_000, help="environment steps in the source task")
    g.add_argument("--target-steps", type=count, default=25_000, help="environment steps in the target task")

    g = parser.add_argument_group("world model (section 4.1)")
    g.add_argument("--members", type=count, default=5, help="ensemble members E")
    g.add_argument("--model-hidden", type=count, default=200, help="width of a hidden layer")
    g.add_argument("--model-layers", type=count, default=3, help="hidden layers")
    g.add_argument("--model-lr", type=positive, default=1e-3, help="learning rate")
    g.add_argument("--model-batch-size", type=count, default=256, help="transitions per member in a gradient step")
    g.add_argument("--model-epochs", type=count, default=60, help="most epochs of the first fit")
    g.add_argument("--refit-epochs", type=count, default=10, help="most epochs of a later, warm-started fit")
    g.add_argument("--uncertainty", default="std", choices=WorldModel.UNCERTAINTIES, help="u(s, a), normalised")

    g = parser.add_argument_group("source exploration")
    g.add_argument("--explore", default="policy", choices=("policy", "mpc", "mix"), help="who acts in the source task")
    g.add_argument("--mpc-every", type=count, default=4, help="with --explore mix: one episode in so many is MPC's")
    g.add_argument("--explore-refit-every", type=count, default=2500, help="source steps between fits for MPC episodes")
    g.add_argument("--snapshot-window", type=amount, default=2000, help="steps of training episodes that the source "
                   "agent to go on with is chosen by, the one of the highest mean return; 0: the last agent")

    g = parser.add_argument_group("planning (section 4.2, eqs. 1 to 5)")
    g.add_argument("--horizon", type=count, default=5, help="H, steps planned ahead")
    g.add_argument("--population", type=count, default=32, help="candidates drawn in a CEM iteration")
    g.add_argument("--elites", type=count, default=8, help="candidates that refit the distribution")
    g.add_argument("--iterations", type=count, default=1, help="CEM iterations, beside the policy's proposals")
    g.add_argument("--momentum", type=fraction, default=0.1, help="share of the old mean and std kept by a refit")
    g.add_argument("--init-std", type=positive, default=0.3, help="std of the first iteration, actions in [-1, 1]")
    g.add_argument("--noise-beta", type=nonnegative, default=0.25, help="colour of the candidates' noise; 0 is white")
    g.add_argument("--keep-elites", type=fraction, default=0.3, help="share of elites kept as candidates")
    g.add_argument("--execute", default="mean", choices=("mean", "best"), help="plan executed: elites' mean or best")
    g.add_argument("--replan-every", type=count, default=1, help="steps of a plan executed before the next")
    g.add_argument("--guide", **SWITCH, default=True, help="candidates from the source policy, value at the horizon")
    g.add_argument("--policy-samples", type=count, default=16, help="candidates from the policy, with --guide")
    g.add_argument("--plan-dtype", default="float32", choices=("float32", "bfloat16"), help="the model's, in planning")
    g.add_argument("--collect-penalty-coef", type=nonnegative, default=0.0, help="lambda while collecting source data")
    g.add_argument("--plan-penalty-coef", type=nonnegative, default=20.0, help="lambda for generating D_S")

    g = parser.add_argument_group("generating and filtering D_S (section 4.3, eq. 6)")
    g.add_argument("--generate-in", default="model", choices=("model", "env"), help="where trajectories are rolled out")
    g.add_argument("--imagined-trajectories", type=count, default=64, help="trajectories per round")
    g.add_argument("--imagined-length", type=count, default=200, help="their length, steps")
    g.add_argument("--reset-share", type=fraction, default=0.5, help="share from resets; others: source data")
    g.add_argument("--restart", **SWITCH, default=False, help="start others in place of trajectories that end early")
    g.add_argument("--trust-percentile", type=percent, default=95.0, help="cut beyond it, of u on source data; 0: no")
    g.add_argument("--filter", default="dual", choices=MODES, help="criteria of eq. 6")
    g.add_argument("--return-percentile", type=percent, default=50.0, help="of the first round, becomes J_th")
    g.add_argument("--u-percentile", type=percent, default=75.0, help="of the first round, becomes u_th")
    g.add_argument("--return-threshold", type=real, help="J_th itself, discounted source return")
    g.add_argument("--u-threshold", type=real, help="u_th itself")

    g = parser.add_argument_group("agent (sections 4.4 and 4.5)")
    g.add_argument("--critics", type=count, default=5, help="N, critics in the ensemble")
    g.add_argument("--min-critics", type=count, default=2, help="M, size of the random subset under the target's min")
    g.add_argument("--actor-q", default="mean", choices=("min", "mean"), help="over critics, what the actor maximises")
    g.add_argument("--actor-average", type=fraction, default=1e-3, help="rate of the actor's average, which is evaluated")
    g.add_argument("--utd", type=count, default=8, help="critic updates per environment step")
    g.add_argument("--batch-size", type=count, default=128, help="transitions per critic update")
    g.add_argument("--hidden", type=count, default=256, help="width of the two hidden layers")
    g.add_argument("--layer-norm", **SWITCH, default=True, help="LayerNorm in the critics (eq. 8)")
    g.add_argument("--lr", type=positive, default=1e-3, help="learning rate of actor, critics and temperature")
    g.add_argument("--discount", type=fraction, default=0.99, help="gamma, also of planning and of J in eq. 6")
    g.add_argument("--polyak", type=fraction, default=0.01, help="rate of the target networks")
    g.add_argument("--init-temperature", type=positive, default=1.0, help="of SAC's entropy term")
    g.add_argument("--target-entropy", type=real, help="nats (default: -action dimension / 2)")
    g.add_argument("--backup-entropy", **SWITCH, default=True, help="entropy term in the critics' target")
    g.add_argument("--target-penalty-coef", type=nonnegative, default=1.0, help="lambda of eq. 7, on D_S samples")
    g.add_argument("--update-dtype", default="float32", choices=("float32", "bfloat16"), help="of products in learning")
    g.add_argument("--compile", **SWITCH, default=False, help="torch.compile the gradients: faster after half a minute")
    g.add_argument("--random-steps", type=amount, default=1000, help="uniform actions before learning without D_S")

    g = parser.add_argument_group("transfer (section 4.6)")
    g.add_argument("--prior", **SWITCH, default=True, help="learn from D_S; --no-prior: from scratch")
    g.add_argument("--offline-data", type=some_path, metavar="FILE", help="D_S from an .npz with D4RL's keys, no "
                   "phases 1 and 2")
    g.add_argument("--source-run", type=some_path, metavar="RUN_DIR", help="take the source phase from that run "
                   "(ablations share it)")
    g.add_argument("--warm-start", **SWITCH, default=True, help="the target's agent starts as the source's, not anew")
    g.add_argument("--keep-source-data", **SWITCH, default=True, help="D_S holds the source's real data too")
    g.add_argument("--pretrain-updates", type=amount, default=0, help="critic updates before the first target step")
    g.add_argument("--alpha-rule", default="adaptive", choices=("adaptive", "fixed"), help="share of D_S in a batch")
    g.add_argument("--alpha", type=fraction, default=0.5, help="the share with --alpha-rule fixed")
    g.add_argument("--alpha-gain", type=nonnegative, default=0.1, help="alpha = clip(gain * |TD error|, min, max)")
    g.add_argument("--alpha-min", type=fraction, default=0.05, help="lower end of alpha")
    g.add_argument("--alpha-max", type=fraction, default=0.5, help="upper end of alpha")
    g.add_argument("--alpha-ema", type=fraction, default=0.005, help="rate of the |TD error|'s running mean, per step")
    g.add_argument("--refit-every", type=amount, default=10_000, help="target steps between rounds; 0: one round only")
    g.add_argument("--refit-on-imagined", **SWITCH, default=False, help="refit the model on D_S too")
    return parser


def check_args(args):
    require(args.alpha_min <= args.alpha_max, f"--alpha-min {args.alpha_min} is above --alpha-max {args.alpha_max}")
    require(args.actor_average > 0, "--actor-average 0 would evaluate the actor of the start: give a rate above 0")
    require(args.min_critics <= args.critics, f"--min-critics {args.min_critics} is above --critics {args.critics}")
    require(args.elites <= args.population, f"--elites {args.elites} is above --population {args.population}")
    require(args.horizon <= args.imagined_length,
         f"--horizon {args.horizon} is longer than --imagined-length {args.imagined_length}")
    require(args.replan_every <= args.horizon, f"--replan-every {args.replan_every} is above --horizon {args.horizon}")
    if not (args.offline_data or args.source_run):
        where = "source" if args.prior else "target"
        steps = vars(args)[f"{where}_steps"]
        require(args.random_steps < steps, f"--random-steps {args.random_steps} leaves none of --{where}-steps {steps} to "
             "learn in")
    require(not (args.restart and args.generate_in == "env"), "--restart is for --generate-in model alone")
    require(not (args.offline_data and args.source_run), "give --offline-data or --source-run, not both")
    require(args.prior or not (args.offline_data or args.source_run),
         "--no-prior learns from scratch: it takes neither --offline-data nor --source-run")


ANEW = ("source_steps", "target_steps", "lr", "model_lr")  # what --resume takes and heeds, beside harness.ANEW


def parse_args(argv=None):
    """This program's flags; bad ones raise ValueError."""
    return read_flags(argv, build_parser(), check_args, ANEW)


# --------------------------------------------------------------------------------------------------------------- set-up


def build(args, run_dir):
    """Everything that a run holds and a checkpoint keeps."""
    torch.manual_seed(args.seed)
    rounds = 1 + (args.target_steps // args.refit_every if args.refit_every else 0)
    imagined = rounds * args.imagined_trajectories * args.imagined_length
    models = args.prior and not args.offline_data  # then there is a source phase, whose data D_S may hold once more
    require_memory(args, TaskEnv(args.env, max_steps=args.episode_steps), **{
        "imagined_trajectories, imagined_length": models * imagined,
        "source_steps": models * (1 + args.keep_source_data) * args.source_steps})
    run = SimpleNamespace(args=args, dir=run_dir, log=Log(run_dir / "progress.csv"), episodes=0, fitted_at=0,
                          phase="source" if args.prior else "target", thresholds=None, acceptance=None,
                          best=None, holdout_mse=None, rng=np.random.default_rng(args.seed))

    def side(source, steps, offset):
        """One task's environments, agent and data."""
        make_env = functools.partial(TaskEnv, args.env, source, max_steps=args.episode_steps,
                                     **(source_quantities(args) if source else {}))
        env = make_env(seed=2 * args.seed + offset)
        evaluation = [make_env() for _ in range(args.eval_episodes)]
        agent = SAC(env.obs_dim, env.action_dim, n_critics=args.critics, min_critics=args.min_critics,
                    hidden=(args.hidden, args.hidden), layer_norm=args.layer_norm, lr=args.lr, discount=args.discount,
                    polyak=args.polyak, init_temperature=args.init_temperature, target_entropy=args.target_entropy,
                    backup_entropy=args.backup_entropy, actor_q=args.actor_q, actor_average=args.actor_average,
                    penalty_coef=args.target_penalty_coef, dtype=args.update_dtype, compile=args.compile,
                    device=args.device)
        return SimpleNamespace(env=env, make_env=make_env, evaluation=evaluation, agent=agent, step=0, updates=0,
                               buffer=ReplayBuffer(steps, args.device, **env.shapes), planned=False)

    run.target = side(None, args.target_steps, 0)
    run.mix = AdaptiveMix(args.alpha_gain, args.alpha_min, args.alpha_max, args.alpha_ema,
                          args.alpha if args.alpha_rule == "fixed" else None)
    run.offline_data = run.source = run.model = run.explorer = None
    env = run.target.env
    if args.offline_data:
        run.offline_data = load_dataset(args.offline_data, args.device, env.action_scale, **env.shapes)
        run.phase = "pretrain"
    elif args.prior:
        run.source = side(args.source, args.source_steps, 1)
        run.model = WorldModel(env.obs_dim, env.action_dim, env.n_features, members=args.members,
                               hidden=args.model_hidden, layers=args.model_layers,
                               uncertainty_kind=args.uncertainty, inference_dtype=args.plan_dtype,
                               fit_dtype=args.update_dtype, compile=args.compile).to(args.device)
        size = imagined + args.keep_source_data * args.source_steps
        run.offline_data = ReplayBuffer(size, args.device, **env.shapes)
        run.explorer = planner(run, args.collect_penalty_coef)
    return run


def planner(run, penalty_coef):
    """MPC in the world model under the source task's reward, guided by the source agent."""
    args, source, task = run.args, run.source, run.source.env.task
    # Deviation: two lambdas, for a penalty while collecting suppresses the exploration that the model needs
    return MPC(run.model.step, task.reward, task.terminated, source.env.action_dim, horizon=args.horizon,
               population=args.population, elites=args.elites, iterations=args.iterations, momentum=args.momentum,
               init_std=args.init_std, noise_beta=args.noise_beta, keep_elites=args.keep_elites,
               discount=args.discount, penalty_coef=penalty_coef, execute=args.execute,
               execute_steps=args.replan_every, policy=source.agent.propose if args.guide else None,
               policy_samples=args.policy_samples, value=source.agent.value if args.guide else None)


SIDE_VALUES = ("step", "updates", "planned")  # of a side, and below of a run, what a checkpoint keeps as it is
RUN_VALUES = ("phase", "thresholds", "acceptance", "best", "holdout_mse", "episodes", "fitted_at")


def state_dict(run):
    """The whole run as tensors and plain values."""
    state = {"wombet": 1, **{name: getattr(run, name) for name in RUN_VALUES}, "td_error": run.mix.td_error,
             **log_and_generators(run)}
    for name in ("source", "target"):
        if (side := getattr(run, name)) is not None:
            state[name] = {part: getattr(side, part).state_dict() for part in ("env", "agent", "buffer")}
            state[name].update({key: getattr(side, key) for key in SIDE_VALUES})
    if run.model is not None:
        state["model"], state["explorer"] = run.model.state_dict(), run.explorer.state_dict()
    if run.offline_data is not None:
        state["offline_data"] = run.offline_data.state_dict()
    return state


def load_side(side, state):
    for part in ("env", "buffer"):
        getattr(side, part).load_state_dict(state[part])
    load_agent(side.agent, state["agent"])
    for key in SIDE_VALUES:
        setattr(side, key, state[key])


PHASES = ("source", "generate", "pretrain", "target", "done")


def load_state_dict(run, state):
    with must_fit("the checkpoint", "these flags"):
        must_match(state, state_dict(run))
        for name, kind in {"thresholds": list, "acceptance": float, "holdout_mse": float, "best": dict,
                           "td_error": float}.items():  # None in a new run
            require(isinstance(state[name], (kind, type(None))), f"{name} is {state[name]!r}")
        for name in RUN_VALUES:
            setattr(run, name, state[name])
        require(run.phase in PHASES, f"unknown phase {run.phase!r}")
        for name in ("source", "target"):
            if getattr(run, name) is not None:
                steps, done = vars(run.args)[f"{name}_steps"], len(state[name]["buffer"]["rows"]["obs"])
                not_below(f"--{name}-steps", steps, done)
                require(name == "target" or run.phase == "source" or steps == done,
                        f"--source-steps {steps}: the source phase is over, after {done}")
                load_side(getattr(run, name), state[name])
        for name in ("model", "explorer", "offline_data"):
            if getattr(run, name) is not None:
                getattr(run, name).load_state_dict(state[name])
        run.mix.td_error = state["td_error"]
        load_log_and_generators(run, state)


# what the source phase's state depends on, and what acts in the source phase alone
OF_THE_SOURCE = ("env", "source", "seed", "episode_steps", "critics", "hidden", "layer_norm", "discount", "members",
                 "model_hidden", "model_layers", "model_epochs", "explore", "mpc_every", "explore_refit_every",
                 "collect_penalty_coef", "snapshot_window", "random_steps", "init_temperature")


def reuse_source(run, source_run):
    """The source phase of another run: its agent, its data, its model, and its generators' states, so that a run of
    the same seed and flags goes on as that one did."""
    quantities = [key for key in vars(run.args) if key.startswith("source_") and key != "source_run"]
    same_flags(run.args, source_run, build_parser(), (*OF_THE_SOURCE, *quantities))
    state = load(Path(source_run) / "source.pt", run.args.device, "wombet")
    with must_fit(f"{source_run}/source.pt", "this version"):  # the agent or the model of another may have other parts
        load_side(run.source, state["source"])
        run.model.load_state_dict(state["model"])
        run.holdout_mse, run.phase = state["holdout_mse"], "generate"
        load_log_and_generators(run, state)


# --------------------------------------------------------------------------------------------------------------- phases


def report(run, name, info):
    """Evaluates a side's policy: one row of progress.csv, one line on stdout."""
    side = getattr(run, name)
    row, text = evaluation_row(side.agent, side.evaluation)
    row.update({key: float(info[key]) for key in ("q_mean", "temperature") if info}, phase=name, updates=side.updates,
               env_steps=run.target.step, source_steps=run.source.step if run.source else 0,
               model_holdout_mse=run.holdout_mse)
    if name == "target":
        row["td_error"] = run.mix.td_error
        if run.offline_data is not None:
            row.update(alpha=run.mix.alpha, offline_size=run.offline_data.size, acceptance=run.acceptance)
            text += f", alpha {run.mix.alpha:.2f}"
    run.log.row(row)
    run.log.live(name, side.step, vars(run.args)[f"{name}_steps"], text, force=True)
    return text


def learn(run, name):
    """Online learning in one task: act, store, update on the mix; in the target task with refit rounds."""
    args, side, steps = run.args, getattr(run, name), vars(run.args)[f"{name}_steps"]
    env, agent, buffer = side.env, side.agent, side.buffer
    offline = run.offline_data if name == "target" else None
    run.log.pace, text, info = (time.time(), side.step), "", {}
    while side.step < steps:
        stop_if_interrupted(run, state_dict)
        if env.obs is None:
            start_episode(run, name)
        obs = env.obs
        acts_randomly = offline is None and side.step < args.random_steps
        if acts_randomly:
            action = run.rng.uniform(-1.0, 1.0, env.action_dim).astype(np.float32)
        elif side.planned:
            action = run.explorer.act(torch.as_tensor(obs, device=args.device)[None])[0].cpu().numpy()
        else:
            action = agent.act(obs).cpu().numpy()
        store_step(env, buffer, action)
        side.step += 1
        if not acts_randomly:
            info = update(run, side, offline)
        if name == "source" and args.snapshot_window and env.obs is None and (
                side.step >= args.random_steps + args.snapshot_window):
            keep_best(run)
        if name == "target" and offline is not None and not args.offline_data and args.refit_every and (
                side.step % args.refit_every == 0 and side.step < steps):
            began = time.time()
            fit(run, args.refit_epochs)
            generate(run)
            run.log.pace = (run.log.pace[0] + time.time() - began, run.log.pace[1])  # the round is not the loop
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
    # Deviation: the last agent may be in one of the falls that policies take between one evaluation and the next
    if run.best is not None:
        load_agent(run.source.agent, run.best["agent"])
        run.log.note(f"source  the agent of step {run.best['step']:,} goes on: its recent training episodes return "
                     f"{run.best['return']:.1f}")
        run.best = None


def start_episode(run, name):
    """Resets; in the source task, decides who acts in the episode and brings the planner's model up to date."""
    args, side = run.args, getattr(run, name)
    side.env.reset()
    if name == "target" or args.explore == "policy" or side.step < args.random_steps:
        return
    run.episodes += 1
    side.planned = args.explore == "mpc" or run.episodes % args.mpc_every == 0
    if side.planned:
        if run.fitted_at == 0 or side.step - run.fitted_at >= args.explore_refit_every:
            fit(run, args.model_epochs if run.fitted_at == 0 else args.refit_epochs)
            run.fitted_at = side.step
        run.explorer.reset()


def update(run, side, offline):
    """UTD critic updates and one actor update on a batch of the mix; stops the run when the loss is not finite."""
    args = run.args
    batch, n_offline = mixed_batch(offline, side.buffer, run.mix.alpha, args.batch_size, args.utd)
    info = side.agent.update(batch, n_offline)
    side.updates += args.utd
    stop_if_not_finite(run, info["critic_loss"] + info["actor_loss"], side.updates, state_dict)
    if side is run.target:
        run.mix.update(float(info["td_error"]))
    return info


def fit(run, epochs):
    """Fits the model on all real data: the source's and, later, D_T (section 4.1)."""
    args = run.args
    # Deviation: the paper refits on D_S and D_T; here the model's own samples, the rest of D_S, only by flag
    parts = [run.target.buffer.filled(), run.source.buffer.filled()]
    if args.refit_on_imagined:
        first = run.source.buffer.size if args.keep_source_data else 0  # the rows before it are the source's
        parts.append({key: values[first:] for key, values in run.offline_data.filled().items()})
    keys, began = ("obs", "action", "next_obs", "features"), time.time()
    columns = {key: torch.cat([part[key] for part in parts]) for key in keys}
    result = run.model.fit(**columns, lr=args.model_lr, batch_size=args.model_batch_size, max_epochs=epochs)
    run.holdout_mse = result["holdout_mse"]
    pairs = torch.stack([result["holdout_u"], result["holdout_error"]], 1).cpu().numpy()
    np.savetxt(run.dir / "model_error.csv", pairs, "%.5g", ",", header="u,error", comments="")
    run.log.note(f"model   fit on {len(columns['obs']):,} transitions: {result['epochs']} epochs, holdout MSE "
                 f"{run.holdout_mse:.4f} of the variance, {time.time() - began:.0f} s")


def generate(run):
    """One round of section 4.3: imagine, filter, relabel, append to D_S; then u anew for all of D_S."""
    args, source, model, began = run.args, run.source, run.model, time.time()
    n, device = args.imagined_trajectories, args.device
    length = min(args.imagined_length, source.env.max_steps or args.imagined_length)
    limit = math.inf
    if args.trust_percentile and args.generate_in == "model":
        real = source.buffer.sample(5000)
        limit = model.uncertainty(real["obs"], real["action"]).quantile(args.trust_percentile / 100).item()
    mpc = planner(run, args.plan_penalty_coef)
    if args.generate_in == "model":
        # Deviation: some start from states of the source data, for trajectories from resets are nearly alike; a reset
        # draws from the initial-state distribution and takes no step in the environment
        env = source.evaluation[0]
        env.seed(int(run.rng.integers(2**31)))

        def starts(n_reset, n_source):
            resets = [torch.as_tensor(env.reset(), device=device)[None] for _ in range(n_reset)]
            return torch.cat([*resets, source.buffer.sample(n_source)["obs"]])

        def restart(rows):
            mpc.forget(rows)
            n_reset = int(run.rng.binomial(len(rows), args.reset_share))
            return starts(n_reset, len(rows) - n_reset)

        n_reset = round(args.reset_share * n)
        start, step = starts(n_reset, n - n_reset), model.step
    else:
        # real steps, n environments at once; they count as source steps
        envs = [source.make_env(seed=int(run.rng.integers(2**31))) for _ in range(n)]
        start = torch.as_tensor(np.stack([env.reset() for env in envs]), device=device)
        step = lockstep(envs, model.uncertainty)
    trajectories = imagine(step, source.env.task.terminated, mpc.act, start, length, limit,
                           restart if args.restart else None)
    if args.generate_in == "env":
        source.step += int(trajectories["valid"].sum())
    rewards = source.env.task.reward(*(trajectories[key] for key in ("obs", "action", "next_obs", "features")))
    returns, mean_u = score_trajectories(rewards, trajectories["uncertainty"], trajectories["valid"],
                                         trajectories["terminated"], args.discount)
    if run.thresholds is None:
        found = thresholds(returns, mean_u, args.return_percentile, args.u_percentile)
        given = (args.return_threshold, args.u_threshold)
        run.thresholds = [f if g is None else g for f, g in zip(found, given)]
        if args.filter == "dual" and args.return_threshold is None:
            lowered = met_threshold(returns, mean_u, *run.thresholds, args.return_percentile)
            if lowered < run.thresholds[0]:
                run.log.note(f"D_S     no trajectory meets both percentiles: J_th is lowered from "
                             f"{run.thresholds[0]:.4g} to {lowered:.4g}, that percentile of those within u_th")
                run.thresholds[0] = lowered
    try:
        passed = accept(returns, mean_u, *run.thresholds, args.filter)
        if args.keep_source_data and run.offline_data.size == 0:
            # Deviation: section 4.3's D_S is imagined alone; the real data show what no filtered trajectory does, falls
            run.offline_data.add(**relabel(source.buffer.filled(), run.target.env.task.reward))
        run.offline_data.add(**to_transitions(trajectories, passed, run.target.env.task.reward))
        run.acceptance = passed.float().mean().item()
    except ValueError as error:
        if run.offline_data.size == 0:
            raise
        run.acceptance = 0.0  # a later round that adds nothing leaves D_S as it is
        run.log.note(f"D_S     {error}")
    data = run.offline_data.filled()
    for rows in torch.arange(run.offline_data.size, device=device).split(8192):
        data["uncertainty"][rows] = model.uncertainty(data["obs"][rows], data["action"][rows])
    save_dataset(run.offline_data, run.dir / "dataset.npz")
    run.log.note(f"D_S     {run.acceptance:.0%} of {len(returns)} trajectories pass (J >= {run.thresholds[0]:.4g}, "
                 f"u <= {run.thresholds[1]:.3g}); mean valid length {trajectories['valid'].sum(1).float().mean():.0f}; "
                 f"{run.offline_data.size:,} transitions, {time.time() - began:.0f} s")


# ----------------------------------------------------------------------------------------------------------------- main


def train(args):
    """The method, from the first phase that is not done yet."""
    run_dir, state = open_run(args, "wombet")
    run = build(args, run_dir)
    if state is not None:
        load_state_dict(run, state)
        run.log.write()  # without the rows that came after the checkpoint
        if run.phase == "done" and run.target.step < args.target_steps:
            run.phase = "target"
    elif args.source_run:
        reuse_source(run, args.source_run)
    write_config(run_dir, args)  # from here on the flags are known to be good
    if state is None:
        save(run_dir / "checkpoint.pt", state_dict(run))  # from here on --resume goes on, whatever happens
    catch_interrupts(run)

    if run.phase == "source":  # 1. learn the source task, then the model
        learn(run, "source")
        choose_best(run)
        save(run.dir / "checkpoint.pt", state_dict(run))
        stop_if_interrupted(run, state_dict)
        fit(run, args.model_epochs)
        run.phase = "generate"
        save(run.dir / "source.pt", state_dict(run))
    if run.phase == "generate":  # 2. imagine D_S
        save(run.dir / "checkpoint.pt", state_dict(run))
        stop_if_interrupted(run, state_dict)
        generate(run)
        if args.warm_start:
            # Deviation: the paper plans without a policy and learns one in the target task alone
            run.target.agent.load_state_dict(copy.deepcopy(run.source.agent.state_dict()))
        run.phase = "pretrain"
    if run.phase == "pretrain":
        save(run.dir / "checkpoint.pt", state_dict(run))
        while run.target.updates < args.pretrain_updates:
            stop_if_interrupted(run, state_dict)
            update(run, run.target, run.offline_data)
        run.phase = "target"
    if run.phase == "target":  # 3. learn the target task, with refit rounds
        learn(run, "target")
        run.phase = "done"
    save(run.dir / "checkpoint.pt", state_dict(run))
    run.log.note(f"done in {run.log.wall_clock / 60:.1f} min: {run.dir}/progress.csv, checkpoint.pt"
                 + (", dataset.npz" if run.source else ""))


def play(args):
    """`--evaluate`: plays a run's policy on the episodes of its own evaluations, prints its return, draws the first."""
    run_dir = Path(args.evaluate)
    if args.offline_data:
        args.offline_data, args.prior = None, False  # the file is not needed to play
    state = load(run_dir / "checkpoint.pt", args.device, "wombet")
    run = build(args, run_dir)
    load_state_dict(run, state)
    name = "source" if run.phase in ("source", "generate") else "target"
    show(getattr(run, name), name, args.gif)


def main(argv=None):
    return run_program("wombet", lambda: parse_args(argv), train, play)


if __name__ == "__main__":
    sys.exit(main())

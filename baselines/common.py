"""What the baselines share: flags, the online and the offline loop, checkpoints, and a few small networks.

A baseline is a parser and an agent. The agent has
    act(obs, deterministic=False) -> action     obs (..., d), array or tensor -> tensor (..., A)
    learn(buffer) -> {name: scalar}             one training step ({} where it waits); stops the run if a *loss is not
                                                finite; q_mean, temperature, td_error, model_holdout_mse are logged
    updates                                     gradient steps so far (of the critics, where there are any)
    state_dict(), load_state_dict(state)        all that it has learned, optimisers included
and, optionally,
    prepare(buffer, note)                       once, before it learns from a dataset (it may return a dict as learn)
    start_online()                              once, between the dataset and the target environment

A run is a folder as wombet.py leaves it. Its phases: "offline", counted by `updates`, on --dataset; then "target",
counted by `env_steps`, online in the target environment. The target's first row, at step 0, is the offline result.
"""

import copy
import functools
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files that this one builds on lie there

import numpy as np
import torch
from torch import nn

from agent import soft_bounds
from harness import (COLUMNS, SWITCH, Log, amount, catch_interrupts, count, evaluation_row, fraction, load, load_agent,
                     load_dataset, load_log_and_generators, log_and_generators, must_fit, must_match, new_parser,
                     nonnegative, not_below, open_run, positive, rate, read_flags, real, require, require_memory,
                     run_program, save, save_dataset, show, some_path, source_flags, source_quantities,
                     stop_if_interrupted, stop_if_not_finite, store_step, write_config)
from replay import ReplayBuffer
from task_env import TaskEnv

# ---------------------------------------------------------------------------------------------------------- arguments


def online_parser(doc, name, steps, eval_every=5000):
    """A parser with the flags of an online baseline."""
    parser, g = new_parser(doc, name, source=False)
    parser.set_defaults(eval_every=eval_every)
    g.add_argument("--target-steps", type=count, default=steps, help="environment steps")
    return parser


def offline_parser(doc, name):
    """A parser with the flags of a baseline that learns from a dataset."""
    parser, g = new_parser(doc, name)
    g.description = "--eval-every and --checkpoint-every count gradient updates offline, environment steps online"
    parser.set_defaults(eval_every=5000)
    # Deviation: D4RL's runs take 1,000,000 updates
    g.add_argument("--offline-updates", type=amount, default=100_000, help="gradient updates on the dataset")
    g.add_argument("--online-steps", type=amount, default=0, help="steps in the target environment after that")
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", type=some_path, metavar="FILE", help=".npz with D4RL's keys, such as a run's "
                   "dataset.npz (required)")
    g.add_argument("--source-rewards", action="store_true", help="the file's rows take the source task's rewards, "
                   "recomputed, instead of their own")
    return parser


def agent_flags(parser, title, **defaults):
    """A group with those of the flags below that `defaults` names; returns it."""
    known = {"batch_size": (count, "transitions per update"), "hidden": (count, "width of a hidden layer"),
             "layers": (count, "hidden layers"), "lr": (positive, "learning rate of every network"),
             "actor_lr": (positive, "learning rate of the actor"),
             "critic_lr": (positive, "learning rate of the critics"), "discount": (fraction, "gamma"),
             "polyak": (rate, "rate of the target networks"),
             "init_temperature": (positive, "of SAC's entropy term"),
             "target_entropy": (real, "nats (default: -action dimension)"),
             "random_steps": (amount, "uniform actions, without learning, at the start")}
    group = parser.add_argument_group(title)
    for name, default in defaults.items():
        kind, words = known[name]
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=words)
    return group


def agent_arguments(args, env, *names):
    """What an agent takes: sizes, device, and the flags `names`, of which a method need not have all."""
    given = {name: getattr(args, name) for name in names if name in args}
    return {"obs_dim": env.obs_dim, "action_dim": env.action_dim, "hidden": (args.hidden,) * args.layers,
            "device": args.device, **given}


def check_online(args):
    for flag in ("random_steps", "rollout_steps"):
        first = vars(args).get(flag, 0)
        least = first + (flag == "random_steps")  # a batch that is just full is learned from
        require(least <= args.target_steps, f"--{flag.replace('_', '-')} {first} leaves none of --target-steps "
                                            f"{args.target_steps} to learn in")


def check_offline(args):
    require(args.dataset or args.evaluate, "--dataset FILE.npz is required")
    require(args.offline_updates or args.online_steps, "--offline-updates 0 and --online-steps 0 leave nothing to do")
    unused = "" if args.source_rewards else source_flags(args)
    require(not unused, f"{unused}: of use with --source-rewards alone")


# ------------------------------------------------------------------------------------------------------------- set-up


def read_dataset(args, env):
    """The dataset with room for the online steps behind it, on the device; ValueError where it does not fit `env`."""
    data = load_dataset(args.dataset, args.device, env.action_scale, **env.shapes).filled()
    data["uncertainty"].zero_()  # it is WOMBET's; to these methods all data is real
    if args.source_rewards:
        task = TaskEnv(args.env, args.source, max_steps=args.episode_steps, **source_quantities(args)).task
        require(not task.FEATURES or data["features"].any(),
             f"{args.dataset} lacks {', '.join(task.FEATURES)} (features), which the source's reward needs")
        data["reward"] = task.reward(data["obs"], data["action"], data["next_obs"], data["features"])
    buffer = ReplayBuffer(len(data["obs"]) + args.online_steps, args.device, **env.shapes)
    buffer.add(**data)
    return buffer


def build(args, run_dir, make_agent, program):
    """Everything that a run holds and a checkpoint keeps."""
    torch.manual_seed(args.seed)
    make_env = functools.partial(TaskEnv, args.env, max_steps=args.episode_steps)
    require_memory(args, make_env())
    env, offline = make_env(seed=2 * args.seed), "dataset" in args
    run = SimpleNamespace(args=args, dir=run_dir, program=program, log=Log(run_dir / "progress.csv"), env=env, step=0,
                          evaluation=[make_env() for _ in range(args.eval_episodes)], make_env=make_env, info={},
                          phase="prepare" if offline else "target", rng=np.random.default_rng(args.seed),
                          dataset_size=0)
    run.random_steps = vars(args).get("random_steps", 0)
    run.agent = make_agent(args, env)
    if offline and not (args.resume or args.evaluate):
        run.buffer = read_dataset(args, env)
        run.dataset_size = run.buffer.size
    else:
        make_buffer(run)
    return run


def make_buffer(run):
    """An empty buffer for all that the run will hold; of an on-policy method, which forgets, for one batch."""
    flags = vars(run.args)
    steps = flags.get("rollout_steps") or flags.get("target_steps") or run.dataset_size + flags["online_steps"]
    run.buffer = ReplayBuffer(steps, run.args.device, **run.env.shapes)


def state_dict(run):
    return {run.program: 1, "phase": run.phase, "step": run.step, "dataset_size": run.dataset_size,
            "info": {key: float(value) for key, value in run.info.items()}, "agent": run.agent.state_dict(),
            "env": run.env.state_dict(), "buffer": run.buffer.state_dict(), **log_and_generators(run)}


def load_state_dict(run, state):
    with must_fit("the checkpoint", "these flags"):
        must_match(state, state_dict(run))
        run.phase, run.step, run.info, run.dataset_size = (state[k] for k in ("phase", "step", "info", "dataset_size"))
        require(run.phase in PHASES, f"unknown phase {run.phase!r}")
        load_agent(run.agent, state["agent"])
        load_log_and_generators(run, state)
        if not run.args.evaluate:
            heed_budgets(run)
            make_buffer(run)  # a dataset's rows are in the checkpoint
            run.env.load_state_dict(state["env"])
            run.buffer.load_state_dict(state["buffer"])


PHASES = ("prepare", "offline", "between", "start", "target")
# beside harness.ANEW
ANEW = ("target_steps", "offline_updates", "online_steps", "critic_steps", "lr", "actor_lr", "critic_lr", "model_lr")


def heed_budgets(run):
    """Budgets that a resumed run is given anew: ValueError for one below what is done, or of a phase that is over."""
    args = run.args
    if "dataset" not in args:
        return not_below("--target-steps", args.target_steps, run.step)
    not_below("--online-steps", args.online_steps, run.step)
    if run.phase == "target":
        done = max([int(row["updates"]) for row in run.log.rows if row["phase"] == "offline"], default=0)
        require(args.offline_updates == done, f"--offline-updates {args.offline_updates}: the offline phase is over, "
                f"after {done}, and online steps are taken")
        return
    not_below("--offline-updates", args.offline_updates, run.agent.updates)
    if run.phase in ("between", "start") and args.offline_updates > run.agent.updates:
        run.phase, run.log.rows = "offline", [row for row in run.log.rows if row["phase"] == "offline"]


# --------------------------------------------------------------------------------------------------------------- loops


def report(run, phase):
    """Evaluates the policy: one row of progress.csv; returns what the live line says of it."""
    row, text = evaluation_row(run.agent, run.evaluation)
    row.update({key: float(value) for key, value in run.info.items() if key in COLUMNS}, phase=phase,
               updates=run.agent.updates, env_steps=run.step, source_steps=0, offline_size=run.dataset_size or "")
    run.log.row(row)
    return text


def learn(run):
    """One training step of the agent; stops the run when a loss is not finite."""
    info = run.agent.learn(run.buffer)
    loss = sum(float(value) for key, value in info.items() if key.endswith("loss"))
    stop_if_not_finite(run, loss, run.agent.updates, state_dict)
    run.info.update(info)


def offline(run):
    """Updates on the dataset alone."""
    args, agent, text = run.args, run.agent, ""
    run.log.pace = (time.time(), agent.updates)
    while agent.updates < args.offline_updates:
        stop_if_interrupted(run, state_dict)
        learn(run)
        done = agent.updates
        marked = done % args.eval_every == 0 or done == args.offline_updates
        if marked:
            text = report(run, "offline")
        run.log.live("offline", done, args.offline_updates, text, force=marked)
        if done % args.checkpoint_every == 0:
            save(run.dir / "checkpoint.pt", state_dict(run))


def online(run, steps):
    """Act, store, learn, in the target environment."""
    args, env, agent, buffer, text = run.args, run.env, run.agent, run.buffer, ""
    run.log.pace = (time.time(), run.step)
    while run.step < steps:
        stop_if_interrupted(run, state_dict)
        obs = env.reset() if env.obs is None else env.obs
        acts_randomly = run.step < run.random_steps
        if acts_randomly:
            action = run.rng.uniform(-1.0, 1.0, env.action_dim).astype(np.float32)
        else:
            action = agent.act(obs).cpu().numpy()
        store_step(env, buffer, action)
        run.step += 1
        if not acts_randomly:
            learn(run)
        marked = run.step % args.eval_every == 0 or run.step == steps
        if marked:
            text = report(run, "target")
        run.log.live("target", run.step, steps, text, force=marked)
        if run.step % args.checkpoint_every == 0:
            save(run.dir / "checkpoint.pt", state_dict(run))


# ---------------------------------------------------------------------------------------------------------------- main


def train(args, make_agent, program):
    """The phases that are not done yet."""
    run_dir, state = open_run(args, program)
    run = build(args, run_dir, make_agent, program)
    if state is not None:
        load_state_dict(run, state)
        run.log.write()  # without the rows that came after the checkpoint
    steps = args.online_steps if "dataset" in args else args.target_steps
    if run.phase not in ("start", "target") or run.step < steps:  # else nothing would be made with these flags
        write_config(run_dir, args)  # from here on they are known to be good
    if state is None:
        save(run_dir / "checkpoint.pt", state_dict(run))  # from here on --resume goes on, whatever happens
    catch_interrupts(run)

    if run.phase == "prepare":
        if hasattr(run.agent, "prepare"):
            run.info.update(run.agent.prepare(run.buffer, run.log.note) or {})
        run.phase = "offline"
        save(run.dir / "checkpoint.pt", state_dict(run))
    if run.phase == "offline":
        offline(run)
        run.phase = "between"
    if run.phase == "between":
        report(run, "target")
        run.phase = "start"
    if run.phase == "start" and steps:
        if hasattr(run.agent, "start_online"):
            run.agent.start_online()
        run.phase = "target"
    online(run, steps)
    save(run.dir / "checkpoint.pt", state_dict(run))
    if vars(args).get("save_dataset"):
        save_dataset(run.buffer, run.dir / "dataset.npz")
    run.log.note(f"done in {run.log.wall_clock / 60:.1f} min: {run.dir}/progress.csv, checkpoint.pt")


def play(args, make_agent, program):
    """`--evaluate`: plays a run's policy on the episodes of its own evaluations."""
    state = load(Path(args.evaluate) / "checkpoint.pt", args.device, program)
    run = build(args, Path(args.evaluate), make_agent, program)
    load_state_dict(run, state)
    show(run, "target", args.gif)


def main(program, parser, make_agent, argv=None, check=lambda args: None, compiles=False):
    """Runs a baseline; returns the exit code.

    Args:
        program: the script's name without .py. make_agent(args, env): the agent. check(args): raises ValueError.
        compiles: whether make_agent heeds args.speed, and so --fast, in more than float32's precision.
    """
    def check_all(args):
        (check_offline if "dataset" in args else check_online)(args)
        check(args)

    return run_program(program, lambda: read_flags(argv, parser, check_all, ANEW, compiles),
                       lambda args: train(args, make_agent, program), lambda args: play(args, make_agent, program))


# ------------------------------------------------------------------------------------------------- agents' small parts


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def step(optimizer, loss):
    """One gradient step on a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def follow(target, network, polyak):
    """theta' <- (1 - polyak) theta' + polyak theta."""
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), polyak)


def update_critics(agent, batch, y):
    """One step of the agent's critics on (Q_i(s, a) - y)^2, y (B,): what a baseline logs of it."""
    q = agent.critic(batch["obs"], batch["action"])
    loss = (q - y).square().mean(1).sum()
    step(agent.critic_optimizer, loss)
    q = q.detach()
    return {"critic_loss": loss.detach() / len(q), "q_mean": q.mean(), "td_error": (q.mean(0) - y).abs().mean()}


def frozen_copy(network):
    """A target network: a copy without gradients."""
    return copy.deepcopy(network).requires_grad_(False)


def mlp(inputs, hidden, outputs, activation=nn.ReLU, last=nn.Identity):
    """inputs -> hidden (a tuple of widths) -> outputs."""
    sizes = [inputs, *hidden]
    parts = [part for i, o in zip(sizes, sizes[1:]) for part in (nn.Linear(i, o), activation())]
    return nn.Sequential(*parts, nn.Linear(sizes[-1], outputs), last())


def log_normal(x, mean, log_std):
    """log N(x; mean, exp(log_std)^2), summed over the last dimension."""
    return (-0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class GaussianPolicy(nn.Module):
    """a ~ N(tanh(f(s)), diag(std)^2), cut to [-1, 1]; std does not depend on s (IQL's and AWAC's actor)."""

    LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.mean = mlp(obs_dim, hidden, action_dim, last=nn.Tanh)
        self.free_log_std = nn.Parameter(torch.zeros(action_dim))

    @property
    def log_std(self):
        return soft_bounds(self.free_log_std, self.LOG_STD_MIN, self.LOG_STD_MAX)

    def log_prob(self, obs, action):
        """log-density before the cut: obs (B, d), action (B, A) -> (B,)."""
        return log_normal(action, self.mean(obs), self.log_std)

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        mean = self.mean(torch.as_tensor(obs, device=self.free_log_std.device))
        return mean if deterministic else self.sample(mean)

    def sample(self, mean):
        return (mean + self.log_std.exp() * torch.randn_like(mean)).clamp(-1.0, 1.0)


def state_of(agent):
    """A `state_dict` for agents that name what they learned in PARTS (networks, optimisers) and VALUES (numbers,
    tensors)."""
    return {**{name: getattr(agent, name).state_dict() for name in agent.PARTS},
            **{name: getattr(agent, name) for name in agent.VALUES}}


def load_state_of(agent, state):
    for name in agent.PARTS:
        getattr(agent, name).load_state_dict(state[name])
    for name in agent.VALUES:
        setattr(agent, name, state[name])

"""What a run spends its time on, measured: against this machine's limit, and against peers on equal work.

    python experiments/benchmark.py                          the table: median, spread, GFLOP/s, share of the peak
    python experiments/benchmark.py --peers --json out.json  and Stable-Baselines3, sbx-rl, mbrl, where installed
    python experiments/benchmark.py --before REV             and an older revision of this repository
    python experiments/benchmark.py --scaling                results/scaling.csv, results/figures/scaling.png instead

Each side runs in a process of its own, bound to --threads cores, and all take turns: one measurement each, then the
next round. A measurement repeats short work for 0.1 s, after a warm-up. GFLOP are those of the matrix products that
the work needs, by formula, whatever the program does; the peak is the best product that torch's kernels reach here.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
ENV = "HalfCheetah-v4"  # Walker2d's sizes, and no termination, so no imagined trajectory ends before its length
OBS, ACTION, FEATURES = 17, 6, 1
PRECISIONS = ("highest", "high", "medium")
FULL = dict(utd=20, batch=256, hidden=256, model_batch=256, model_hidden=200, population=400, elites=40, horizon=15,
            trajectories=64, length=200, loop=200, rows=20_000, peak=(512, 1024, 2048), seconds=0.1)
QUICK = dict(utd=2, batch=32, hidden=32, model_batch=32, model_hidden=32, population=40, elites=4, horizon=3,
             trajectories=4, length=5, loop=10, rows=2000, peak=(64, 128), seconds=0.0)

# row: letter, or quantity that is scaled; name: equal for equal work, whoever does it; gflop: of one call;
# call: does the work; per: environment steps in a call, 0 where it takes none; transitions: model evaluations, each of
# one member, in a call
Work = namedtuple("Work", "row name gflop call per transitions", defaults=(0, 0))


# ------------------------------------------------------------------------------------------------- counted operations


def products(*sizes):
    """Multiply-adds of one row in each layer of a dense network."""
    return [i * o for i, o in zip(sizes, sizes[1:])]


def training(layers):
    """Multiply-adds of a forward and a backward pass of one row; the inputs need no gradient."""
    return 3 * sum(layers) - layers[0]


def agent_layers(hidden):
    """Actor's and one critic's layers; the critic's last has one column and is left out."""
    return products(OBS, hidden, hidden, 2 * ACTION), products(OBS + ACTION, hidden, hidden)


def model_layers(hidden, layers, heads):
    """One member's layers; heads: 2 with the log variance, 1 for the mean alone."""
    return products(OBS + ACTION, *[hidden] * layers, heads * (OBS + FEATURES))


def rlpd_gflop(critics, min_critics, batch, utd, hidden, actor_updates=1):
    """Of `utd` critic updates and one (or more) of actor and temperature; M target critics are enough for the target,
    and the critics have no weight gradient in the actor's update."""
    actor, critic = agent_layers(hidden)
    critic_update = sum(actor) + min_critics * sum(critic) + critics * training(critic)
    actor_update = training(actor) + critics * 2 * sum(critic)
    return 2e-9 * batch * (utd * critic_update + actor_updates * actor_update)


def model_gflop(members, batch, hidden, layers):
    """Of one training step of the ensemble."""
    return 2e-9 * members * batch * training(model_layers(hidden, layers, 2))


def plan_work(mpc, states, members, member, hidden, critics):
    """Model transitions and GFLOP of one plan, a transition taking `member` multiply-adds."""
    candidates = states * (mpc.population * mpc.iterations + mpc.policy_samples)
    transitions = candidates * mpc.horizon * members
    actor, critic = map(sum, agent_layers(hidden))
    guide = states * mpc.policy_samples * mpc.horizon * actor
    guide += candidates * (actor + critics * critic) if mpc.value else 0
    return transitions, 2e-9 * (transitions * member + guide)


# ----------------------------------------------------------------------------------------------------------- our work


def prepare(o):
    """A run of wombet.py with default flags, its buffers and D_S full and its model roughly fit."""
    import wombet  # here and below: of the repository that this process was given, see --before

    flags = shlex.split(o.flags) + ["--compile"] * o.compile
    args = wombet.parse_args([*flags, "--env", ENV, "--device", o.device, "--eval-episodes", "1"])
    run = wombet.build(args, Path(o.folder))
    run.interrupted, args.random_steps = False, 1000
    args.eval_every = args.checkpoint_every = args.refit_every = 10**9  # the loops alone
    loop(wombet, run, "source", args.random_steps)  # random actions: real transitions at little cost
    keys = ("obs", "action", "next_obs", "features")
    run.model.fit(*(run.source.buffer.filled()[key] for key in keys), max_epochs=1)
    for buffer in (run.offline_data, run.target.buffer, run.source.buffer):
        buffer.add(**run.source.buffer.sample(buffer.capacity))
    return run


def loop(wombet, run, name, steps):
    """`steps` more steps of that phase, environment included, evaluation left out."""
    setattr(run.args, f"{name}_steps", getattr(run, name).step + steps)
    with mock.patch.object(wombet, "report", lambda *_: ""), contextlib.redirect_stdout(io.StringIO()):
        wombet.learn(run, name)


def fast(o, **names):
    """What makes our networks fast, as keywords; none that an older revision lacks."""
    flags = {name: vars(o.run.args)[flag] for name, flag in names.items() if flag in o.run.args}
    return {**flags, "compile": True} if o.compile else flags


def rlpd_step(o, critics, min_critics, batch, layer_norm=True, actor_updates=1):
    """One step of learning, sampling included, at alpha = 0.5; the critic updates are shared out evenly among
    `actor_updates` steps of the agent."""
    from agent import SAC, mixed_batch

    agent = SAC(OBS, ACTION, n_critics=critics, min_critics=min_critics, hidden=(o.hidden, o.hidden),
                layer_norm=layer_norm, device=o.device, **fast(o, dtype="update_dtype"))

    def call():
        for _ in range(actor_updates):
            agent.update(*mixed_batch(o.run.offline_data, o.run.target.buffer, 0.5, batch, o.utd // actor_updates))

    return rlpd_gflop(critics, min_critics, batch, o.utd, o.hidden, actor_updates), call


def world_model(o, members):
    """A 4-layer ensemble with the fitted model's normalisation."""
    from world_model import WorldModel

    model = WorldModel(OBS, ACTION, FEATURES, members=members, hidden=o.model_hidden, layers=4,
                       **fast(o, inference_dtype="plan_dtype", fit_dtype="update_dtype")).to(o.device)
    model.load_state_dict(dict(o.run.model.named_buffers()), strict=False)
    return model


def model_step(o, members):
    """One gradient step, the gather of the members' batches included."""
    model = world_model(o, members)
    data = o.run.target.buffer.filled()
    inputs = torch.cat([data["obs"], data["action"]], -1)
    targets = torch.cat([data["next_obs"] - data["obs"], data["features"]], -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)  # as in WorldModel.fit

    def call():
        rows = torch.randint(len(inputs), (members, o.model_batch), device=o.device)
        model.train_step(optimizer, inputs[rows], targets[rows])

    return model_gflop(members, o.model_batch, o.model_hidden, 4), call


def plain_plan(o, population, states):
    """One plan by CEM without a guide."""
    from mpc import MPC

    task = o.run.source.env.task
    mpc = MPC(world_model(o, 5).step, task.reward, task.terminated, ACTION, horizon=o.horizon,
              population=population, elites=min(o.elites, population), iterations=5)
    obs = o.run.source.buffer.sample(states)["obs"]
    transitions, gflop = plan_work(mpc, states, 5, sum(model_layers(o.model_hidden, 4, 1)), o.hidden, 0)
    return gflop, lambda: mpc.plan(obs), 0, transitions


def default_plan(o, states, length=0):
    """The planner that generates D_S: one plan, or so many steps imagined with it."""
    import wombet
    from mpc import imagine

    args = o.run.args
    mpc = wombet.planner(o.run, args.plan_penalty_coef)
    obs, terminated = o.run.source.buffer.sample(states)["obs"], o.run.source.env.task.terminated
    member = sum(model_layers(args.model_hidden, args.model_layers, 1))
    transitions, gflop = plan_work(mpc, states, args.members, member, args.hidden, args.critics)
    if not length:
        return gflop, lambda: mpc.plan(obs), 0, transitions
    plans, steps = math.ceil(length / args.replan_every), states * length * args.members

    def call():
        mpc.reset()
        imagine(o.run.model.step, terminated, mpc.act, obs, length)

    return plans * gflop + 2e-9 * steps * member, call, 0, plans * transitions + steps


def learning_loop(o, name):
    """Default steps of learning, environment included: acting, storing, learning."""
    import wombet

    args = o.run.args
    gflop = rlpd_gflop(args.critics, args.min_critics, args.batch_size, args.utd, args.hidden)
    gflop += 2e-9 * sum(agent_layers(args.hidden)[0])
    return o.loop * gflop, lambda: loop(wombet, o.run, name, o.loop), o.loop


def rlpd_name(o, critics, min_critics, extra="LayerNorm, 1 actor update"):
    return f"{o.utd} critic updates, N={critics}, M={min_critics}, {extra}"


def model_name(o):
    return f"ensemble training step, 7x4x{o.model_hidden}"


def plan_name(o, states):
    return f"CEM plan, {o.population}x5, H={o.horizon}, E=5" + (f", {states} states" if states > 1 else "")


def our_rows(o, row):
    """The rows of the table under one letter; the run behind them is prepared once."""
    if not hasattr(o, "run"):
        o.run = prepare(o)
    if row == "a":
        for n, m in ((2, 2), (5, 2), (5, 5), (10, 2), (10, 10)):
            yield Work(row, rlpd_name(o, n, m), *rlpd_step(o, n, m, o.batch))
        for n in (2, 10) if o.peers else ():  # what Stable-Baselines3 can do
            yield Work(row, rlpd_name(o, n, n, f"plain, {o.utd} actor updates"),
                       *rlpd_step(o, n, n, o.batch, False, o.utd))
    elif row == "b":
        yield Work(row, model_name(o), *model_step(o, 7))
    elif row == "c":
        for states in (1, 4) if o.peers else (1,):
            yield Work(row, plan_name(o, states), *plain_plan(o, o.population, states))
        yield Work(row, "default guided plan", *default_plan(o, 1))
        yield Work(row, f"default guided plan, {o.trajectories} states", *default_plan(o, o.trajectories))
    elif row == "d":
        yield Work(row, f"imagine {o.trajectories} x {o.length}", *default_plan(o, o.trajectories, o.length))
    elif row == "e":
        for name in ("target", "source"):
            yield Work(row, f"default {name} loop, an environment step", *learning_loop(o, name))
    elif row == "scaling":
        yield from scaling_rows(o)


def scaling_rows(o):
    """What grows with what: the quantity is the row, its value the name."""
    from agent import ReplayBuffer, mixed_batch

    def values(*all):
        return all[:2] if o.quick else all

    for e in values(1, 2, 4, 8, 16):
        yield Work("members E", e, *model_step(o, e))
    for n in values(1, 2, 5, 10, 20):
        yield Work("critics N", n, *rlpd_step(o, n, n, o.batch))
    for population in values(50, 100, 200, 400, 800, 1600):
        yield Work("population", population, *plain_plan(o, population, 1))
    for batch in values(32, 64, 128, 256, 512, 1024):
        yield Work("batch size", batch, *rlpd_step(o, 2, 2, batch))
    for n in values(4, 16, 64, 256, 1024):
        yield Work("imagined trajectories", n, *default_plan(o, n, 5))
    for size in values(1000, 10_000, 100_000, 1_000_000):
        buffer = ReplayBuffer(size, o.device, **o.run.target.env.shapes)
        buffer.add(**o.run.offline_data.sample(size))
        yield Work("buffer size", size, 0, functools.partial(mixed_batch, buffer, buffer, 0.5, o.batch, o.utd))


# --------------------------------------------------------------------------------------------------------------- peers


def peer_env():
    """Only its spaces are used."""
    import gymnasium as gym

    class Spaces(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)

    return Spaces()


def sac_rows(o, row, SAC, kind, actor_updates, policy, **kwargs):
    """SAC of Stable-Baselines3 or sbx, sampling from its own buffer included."""
    from stable_baselines3.common.logger import Logger

    for n in (2, 10):
        policy_kwargs = {"n_critics": n, "net_arch": [o.hidden, o.hidden], **policy}
        agent = SAC("MlpPolicy", peer_env(), buffer_size=o.rows, device=o.device, policy_kwargs=policy_kwargs, **kwargs)
        agent.set_logger(Logger(None, []))
        buffer = agent.replay_buffer
        for part in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
            part[:] = np.random.default_rng(0).uniform(-1, 1, part.shape)
        buffer.full = True
        yield Work(row, rlpd_name(o, n, n, kind), rlpd_gflop(n, n, o.batch, o.utd, o.hidden, actor_updates),
                   functools.partial(agent.train, o.utd, o.batch))


def stable_baselines3_rows(o, row):
    """Equal: critics, batches, widths, and as many actor and temperature updates as critic updates, which is all that
    it offers. No LayerNorm on either side."""
    from stable_baselines3 import SAC

    yield from sac_rows(o, row, SAC, f"plain, {o.utd} actor updates", o.utd, {})


def sbx_rows(o, row):
    """Equal: critics with LayerNorm, batches, widths, the minimum over all N, one actor and temperature update. Its
    actor maximises the minimum over the critics, ours the mean."""
    import jax
    from sbx import SAC

    if o.device != "cpu" and jax.default_backend() == "cpu":
        raise RuntimeError("jax sees no GPU")
    yield from sac_rows(o, row, SAC, "LayerNorm, 1 actor update", 1, {"layer_norm": True}, policy_delay=o.utd)


def mbrl_rows(o, row):
    """Equal, training: members, layers, SiLU, likelihood, batches, one gather. Planning: population, iterations,
    elites, horizon, layers, and transitions of one member each. Ours takes every candidate through all 5 members;
    there a particle stays with its member, so 5 particles are as many transitions. Its 20, which its PETS uses, are as
    many as our plan for 4 states at once. Beside the mean it draws from the variance; ours also scores u."""
    import mbrl.models
    import mbrl.planning
    from mbrl.env.termination_fns import no_termination

    def gaussian(members, **kwargs):
        return mbrl.models.GaussianMLP(OBS + ACTION, OBS + FEATURES, o.device, 4, members, o.model_hidden,
                                       activation_fn_cfg={"_target_": "torch.nn.SiLU"}, **kwargs)

    if row == "b":
        model = gaussian(7, learn_logvar_bounds=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)  # as its ModelTrainer's
        inputs = torch.randn(o.rows, OBS + ACTION, device=o.device)
        targets = torch.randn(o.rows, OBS + FEATURES, device=o.device)

        def call():
            rows = torch.randint(o.rows, (7, o.model_batch), device=o.device)
            model.update(inputs[rows], optimizer, targets[rows])

        yield Work(row, model_name(o), model_gflop(7, o.model_batch, o.model_hidden, 4), call)
    elif row == "c":
        model = mbrl.models.OneDTransitionRewardModel(gaussian(5, propagation_method="fixed_model"), normalize=True)
        env = mbrl.models.ModelEnv(peer_env(), model, no_termination)
        member = sum(model_layers(o.model_hidden, 4, 1))
        size, obs = (o.horizon, ACTION), np.zeros(OBS, dtype=np.float32)
        cem = mbrl.planning.CEMOptimizer(5, o.elites / o.population, o.population, np.full(size, -1.0).tolist(),
                                         np.full(size, 1.0).tolist(), 0.1, o.device, return_mean_elites=True)
        shape = SimpleNamespace(population=o.population, iterations=5, policy_samples=0, horizon=o.horizon, value=None)
        for particles in (5, 20):
            transitions, gflop = plan_work(shape, particles // 5, 5, member, o.hidden, 0)

            def call(particles=particles):
                cem.optimize(lambda plans: env.evaluate_action_sequences(plans, obs, particles),
                             torch.zeros(size, device=o.device))

            yield Work(row, plan_name(o, particles // 5), gflop, call, 0, transitions)


BUILDERS = {"wombet": our_rows, "stable_baselines3": stable_baselines3_rows, "sbx": sbx_rows, "mbrl": mbrl_rows}
PEERS = {"stable_baselines3": "a", "sbx": "a", "mbrl": "bc"}  # and the rows that each can do


# ----------------------------------------------------------------------------------------------------------- measuring


def seconds(call, calls, o):
    """Time of one call, averaged over `calls` of them: on the wall, or the CPU time of this process's threads."""
    wait = torch.cuda.synchronize if o.device.startswith("cuda") else lambda: None
    clock = time.process_time if o.clock == "cpu" else time.perf_counter
    wait()
    began = clock()
    for _ in range(calls):
        call()
    wait()
    return (clock() - began) / calls


def warm_up(call, o):
    """How many calls make one measurement."""
    took = seconds(call, 1, o)
    if 0 < o.seconds and took < 1.0:  # the first call may have compiled something
        took = seconds(call, 1, o)
    return max(1, math.ceil(o.seconds / max(took, 1e-6)))


def peak(o):
    """{precision: (best GFLOP/s, largest relative error)} of float32 matrix products, square and batched; an error far
    above 1e-6 says that the kernel rounds its inputs (to TF32 or bfloat16)."""
    before, best = torch.get_float32_matmul_precision(), {}
    shapes = [(1, n, n, n) for n in o.peak]
    shapes += [(10, o.batch, o.hidden, o.hidden), (7, o.batch, o.model_hidden, o.model_hidden)]
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        rates, errors = [], []
        for e, b, i, k in shapes:
            x, w = torch.randn(e, b, i, device=o.device), torch.randn(e, i, k, device=o.device)
            if e == 1:
                x, w = x[0], w[0]
            call = functools.partial(torch.matmul, x, w)
            exact = x[..., :8, :].double() @ w.double()
            errors.append(((call()[..., :8, :] - exact).abs().max() / exact.abs().max()).item())
            took = seconds(call, 1, o)
            calls = max(1, math.ceil(o.seconds / 5 / took))
            rates.append(2e-9 * e * b * i * k / min(seconds(call, calls, o) for _ in range(5)))
        best[precision] = (max(rates), max(errors))
    torch.set_float32_matmul_precision(before)
    return best


def serve(pipe, root, who, tuned, rows, o):
    """A side's process: builds its work, tells what it has, then answers "peak" or the number of a work with one
    measurement. tuned: with our allocator and precision settings, else with the libraries' own."""
    warnings.simplefilter("ignore")
    if o.device == "cpu" and hasattr(os, "sched_setaffinity"):  # thread pools that no flag reaches keep to it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: o.threads])
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    sys.path.insert(0, str(root))
    works, calls, skipped, problem = [], [], [], None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, and ends this process with it
    with tempfile.TemporaryDirectory() as o.folder:
        os.chdir(o.folder)  # MuJoCo logs to the working directory
        if tuned:
            try:
                from harness import keep_freed_memory
            except ImportError:  # a revision that had no harness.py
                from wombet import keep_freed_memory

            keep_freed_memory()
            if root == ROOT:
                torch.set_float32_matmul_precision(o.precision)
            else:  # an older revision keeps what it had
                o.flags, o.compile = "", False
        for row in (row for row in rows if row in PEERS.get(who, row)):
            try:
                for work in BUILDERS[who](o, row):
                    calls.append(warm_up(work.call, o))
                    works.append(work)
            except ImportError as error:
                skipped = [f"not installed ({error})"]
            except Exception as error:  # a peer's other version, or an old revision without that row
                problem = error
                skipped.append(f"row {row}: {type(error).__name__}: {str(error).splitlines()[0]}")
        with contextlib.suppress(EOFError, BrokenPipeError):  # the parent was killed
            pipe.send(([work._replace(call=None) for work in works], skipped, problem))
            while (asked := pipe.recv()) is not None:
                pipe.send(peak(o) if asked == "peak" else seconds(works[asked].call, calls[asked], o))


def start(root, who, tuned, rows, o):
    """A side's process; returns how to ask it, its works and what it had to skip."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, root, who, tuned, rows, o), daemon=True).start()
    theirs.close()

    def ask(index):
        pipe.send(index)
        return None if index is None else pipe.recv()

    works, skipped, problem = pipe.recv()
    if problem and who == "wombet" and root == ROOT:
        raise problem
    return ask, works, skipped


def measure(sides, o):
    """[{...}] of all works of all sides, [(label, settings, ask, works)]; equal work in turn, round by round."""
    jobs = [(label, settings, functools.partial(ask, i), work)
            for label, settings, ask, works in sides for i, work in enumerate(works)]
    results = []
    for row in dict.fromkeys(work.row for *_, work in jobs):
        names = dict.fromkeys(work.name for *_, work in jobs if work.row == row)
        group = [job for name in names for job in jobs if (job[3].row, job[3].name) == (row, name)]
        print(f"row {row}: {len(group)} work(s)", file=sys.stderr, flush=True)
        repetitions = min(o.repetitions, 3) if row == "d" else o.repetitions  # half a minute each
        rounds = [[ask() for _, _, ask, _ in group] for _ in range(repetitions)]
        for (label, settings, _, work), times in zip(group, zip(*rounds)):
            ms = [1e3 * t / (work.per or 1) for t in times]
            results.append({"row": row, "work": work.name, "by": label, "settings": settings,
                            "ms": statistics.median(ms), "ms_low": min(ms), "ms_high": max(ms), "ms_all": ms,
                            "gflop": work.gflop / (work.per or 1), "transitions": work.transitions})
    for result in results:
        ours = [r["ms"] for r in results if (r["work"], r["row"], r["by"]) == (result["work"], result["row"], "wombet")]
        result["gflop_per_s"] = 1e3 * result["gflop"] / result["ms"]
        result["times_ours"] = result["ms"] / ours[0] if ours else None
        result["steps_per_s"] = 1e3 / result["ms"] if result["row"] == "e" else None
    return results


# -------------------------------------------------------------------------------------------------------------- output


def table(report):
    """The report as text."""
    machine = report["machine"]
    lines = [f"{machine['processor']}, {machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, "
             f"precision {machine['precision']}, {report['flags']['clock']} time"
             + (", ours compiled" if report["flags"]["compile"] else "")]
    for precision, (rate, error) in report["peaks"].items():
        lines.append(f"peak of float32 matrix products at {precision}: {rate:.0f} GFLOP/s, relative error {error:.0e}")
    lines += ["", f"{'':2}{'work':58}{'by':28}{'ms':>9}  {'min..max':17}{'x ours':>7}{'GFLOP/s':>9}{'of peak':>8}"]
    for r in report["rows"]:
        by = r["by"] + (f", {r['settings']}" if r["by"] != "wombet" else "")
        ratio = f"{r['times_ours']:.2f}" if r["times_ours"] and r["by"] != "wombet" else ""
        note = f"  {r['transitions']:,} transitions" if r["transitions"] else ""
        note += f"  {r['steps_per_s']:.0f} steps/s" if r["steps_per_s"] else ""
        spread = f"{r['ms_low']:.2f}..{r['ms_high']:.2f}"
        lines.append(f"{r['row']:<2}{r['work']!s:58}{by:28}{r['ms']:9.2f}  {spread:17}{ratio:>7}{r['gflop_per_s']:9.1f}"
                     f"{r['share_of_peak']:8.0%}{note}")
    return "\n".join(lines + [f"skipped: {line}" for line in report["skipped"]])


def write_scaling(results, folder):
    """scaling.csv and figures/scaling.png: median time over each quantity, with the proportional line."""
    sys.path.insert(0, str(ROOT))
    import matplotlib
    from matplotlib.figure import Figure

    from plot import COLOURS, STYLE

    about = {"members E": "ensemble training step", "critics N": "RLPD step, M = N", "population": "plain CEM plan",
             "batch size": "RLPD step, N = 2", "imagined trajectories": "5 imagined steps",
             "buffer size": "sampling a step's batches"}
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    with open(folder / "scaling.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["quantity", "value", "work", "ms_median", "ms_min", "ms_max"])
        writer.writerows([r["row"], r["work"], about[r["row"]], *(f"{r[k]:.5g}" for k in ("ms", "ms_low", "ms_high"))]
                         for r in results)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 5.5), layout="constrained")
        for axes, (quantity, title) in zip(figure.subplots(2, 3).flat, about.items()):
            some = [r for r in results if r["row"] == quantity]
            x, y = [r["work"] for r in some], [r["ms"] for r in some]
            axes.fill_between(x, [r["ms_low"] for r in some], [r["ms_high"] for r in some], color=COLOURS[0], alpha=0.2,
                              linewidth=0)
            axes.plot(x, y, "o-", color=COLOURS[0], markersize=4, label="median, min to max")
            axes.plot(x, [y[-1] * v / x[-1] for v in x], "--", color="#888888", linewidth=1, label="proportional")
            axes.set(title=title, xlabel=quantity, ylabel="Time (ms)", xscale="log", yscale="log")
            axes.set_xticks(x, [f"{value:,}" for value in x])
            axes.set_xticks([], minor=True)
        figure.axes[0].legend(frameon=False)
        figure.savefig(folder / "figures" / "scaling.png", dpi=150)


def processor():
    """The CPU's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list("abcde"), choices=list("abcde"), metavar="ROW",
                        help="a: RLPD step, b: model training step, c: plans, d: imagining, e: loops (default: all)")
    parser.add_argument("--json", metavar="FILE", help="the table, with every measurement")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads and cores (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--precision", default="highest", choices=PRECISIONS,
                        help="torch.set_float32_matmul_precision (default: highest)")
    parser.add_argument("--compile", action="store_true", help="our gradients compiled")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: CPU time, where other programs "
                        "run too; with one thread only (default: wall)")
    parser.add_argument("--repetitions", type=int, default=7, help="measurements of each work (default: 7)")
    parser.add_argument("--flags", default="", metavar="'FLAGS'", help="of wombet.py, for its plans and loops, and its "
                        "dtypes for all rows: --flags='--update-dtype bfloat16'")
    parser.add_argument("--peers", action="store_true", help="also what is installed of stable_baselines3, sbx and "
                        "mbrl, under our allocator and precision settings and under their own")
    parser.add_argument("--before", metavar="REV", help="also that git revision of this repository")
    parser.add_argument("--scaling", nargs="?", const=str(ROOT / "results"), metavar="FOLDER",
                        help="instead: how time grows with sizes (default folder: results)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast")

    def error(message):
        raise ValueError(message)

    parser.error = error
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        raise ValueError(f"--repetitions {args.repetitions}: at least 1")
    if not 1 <= args.threads <= os.cpu_count():
        raise ValueError(f"--threads {args.threads}: this machine has {os.cpu_count()} core(s)")
    if args.clock == "cpu" and (args.threads > 1 or args.device != "cpu"):
        raise ValueError("--clock cpu adds up the time of all threads: use it with --threads 1 on the CPU")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist")
    try:
        torch.empty(1, device=args.device)
    except Exception as problem:
        raise ValueError(f"--device {args.device} is not there: {str(problem).splitlines()[0]}") from None
    return args


def benchmark(args):
    """The whole report."""
    o = SimpleNamespace(**vars(args), **(QUICK if args.quick else FULL))
    if args.device != "cpu" and not args.quick:
        o.peak = (2048, 4096, 8192)  # small products do not fill a GPU
    rows = ["scaling"] if args.scaling else args.only
    sides, skipped = [], []
    with tempfile.TemporaryDirectory() as older:
        plan = [("wombet", "wombet", ROOT, True)]
        if args.before:
            archive = subprocess.run(["git", "-C", str(ROOT), "archive", args.before], capture_output=True)
            if archive.returncode:
                raise ValueError(f"--before {args.before}: {archive.stderr.decode().strip().splitlines()[0]}")
            subprocess.run(["tar", "-x", "-C", older], input=archive.stdout, check=True)
            plan.append((f"wombet {args.before}", "wombet", Path(older), True))
        if args.peers:
            plan += [(who, who, ROOT, tuned) for who in PEERS if set(PEERS[who]) & set(rows) for tuned in (True, False)]
        for label, who, root, tuned in plan:
            print(f"starting {label}", file=sys.stderr, flush=True)
            ask, works, missing = start(root, who, tuned, rows, o)
            sides.append((label, "as ours" if tuned else "its own", ask, works))
            skipped += [line for line in (f"{label}: {text}" for text in missing) if line not in skipped]
        peaks = sides[0][2]("peak")
        results = measure(sides, o)
        again = sides[0][2]("peak")  # a machine's clock and its neighbours change
        for *_, ask, _ in sides:
            ask(None)
        peaks = {key: max(peaks[key], again[key]) for key in peaks}
    limit = max(rate for rate, _ in peaks.values())
    for result in results:
        result["share_of_peak"] = result["gflop_per_s"] / limit
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    machine = {"processor": processor(), "cpus": os.cpu_count(), "device": device, "threads": args.threads,
               "precision": args.precision, "torch": torch.__version__, "platform": platform.platform()}
    return {"machine": machine, "flags": vars(args), "peaks": peaks, "peak_gflop_per_s": limit, "rows": results,
            "skipped": skipped}


def main(argv=None):
    try:
        args = parse_args(argv)
        report = benchmark(args)
        if args.scaling:
            write_scaling(report["rows"], Path(args.scaling))
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
        print(table(report))
    except ValueError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

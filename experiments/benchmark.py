"""What a run spends its time on, measured: against this machine's limit, and against peers on equal work.

    python experiments/benchmark.py                          the table: median, spread, GFLOP/s, share of the peak
    python experiments/benchmark.py --peers --json out.json  and Stable-Baselines3, sbx-rl, mbrl, where installed
    python experiments/benchmark.py --scaling                results/scaling.csv, results/figures/scaling.png instead

Equal work of all sides takes turns; a measurement repeats short work for 0.1 s, after a warm-up. GFLOP are those of
our matrix products, counted by torch; a peer's equal work counts as ours does. The peak is torch's best float32 product
here. All run on --threads cores, under our precision and allocator settings.
"""

import argparse
import csv
import functools
import importlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import wombet  # noqa: E402
from agent import SAC  # noqa: E402
from harness import count, keep_freed_memory, require  # noqa: E402
from mpc import MPC, imagine  # noqa: E402
from replay import mixed_batch  # noqa: E402
from world_model import WorldModel  # noqa: E402

# HalfCheetah has Walker2d's sizes, and no termination, so that no rollout ends before its length; and the loops alone
FIXED = ("--env HalfCheetah-v4 --eval-episodes 1 --random-steps 1000 --refit-every 0 --imagine-every 0 "
         "--eval-every 1000000000 --checkpoint-every 1000000000").split()
OBS, ACTION, FEATURES = 17, 6, 1
FULL = dict(utd=20, batch=256, hidden=256, model_batch=256, model_hidden=200, population=400, elites=40, horizon=15,
            rows=20_000, peak=(512, 1024, 2048), seconds=0.1)
QUICK = dict(utd=2, batch=32, hidden=32, model_batch=32, model_hidden=32, population=40, elites=4, horizon=3,
             rows=2000, peak=(64, 128), seconds=0.0)


# ----------------------------------------------------------------------------------------------------------- our work


def prepare(flags):
    """A run of wombet.py, its buffers and D_S full and its model roughly fit."""
    run = wombet.build(flags, Path("none"))
    run.interrupted, run.log.live = [], lambda *_, **__: None
    learn(run, "source", flags.random_steps)  # random actions: real transitions at little cost
    run.model.fit(*(run.source.buffer.filled()[key] for key in ("obs", "action", "next_obs", "features")), max_epochs=1)
    for buffer in (run.offline_data, run.target.buffer, run.source.buffer):
        buffer.add(**run.source.buffer.sample(buffer.capacity))
    return run


def learn(run, name, steps=1):
    """So many more steps of that phase, environment included; evaluation, rounds and refits left out."""
    setattr(run.args, f"{name}_steps", getattr(run, name).step + steps)
    with mock.patch.object(wombet, "report", lambda *_: ""):
        wombet.learn(run, name)


def rlpd_step(o, critics, min_critics, batch, layer_norm=True, actor_updates=1):
    """One step of learning, sampling included, at alpha = 0.5, with so many updates of the actor."""
    agent = SAC(OBS, ACTION, n_critics=critics, min_critics=min_critics, hidden=(o.hidden, o.hidden),
                layer_norm=layer_norm, dtype=o.speed["dtype"], compile=o.speed["compile"], device=o.device)

    def call():
        for _ in range(actor_updates):
            agent.update(*mixed_batch(o.run.offline_data, o.run.target.buffer, 0.5, batch, o.utd // actor_updates))

    return call


def world_model(o, members):
    """A 4-layer ensemble with the fitted model's normalisation."""
    dtype, compile = o.speed["dtype"], o.speed["compile"]
    kind = "std" if members > 1 else "aleatoric"  # one has no disagreement
    model = WorldModel(OBS, ACTION, FEATURES, members=members, hidden=o.model_hidden, layers=4, uncertainty_kind=kind,
                       inference_dtype=dtype, fit_dtype=dtype, compile=compile).to(o.device)
    model.load_state_dict(dict(o.run.model.named_buffers()), strict=False)
    return model


def model_step(o, members):
    """One gradient step, the gather of the members' batches included."""
    model, data = world_model(o, members), o.run.target.buffer.filled()
    inputs = torch.cat([data["obs"], data["action"]], -1)
    targets = torch.cat([data["next_obs"] - data["obs"], data["features"]], -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)  # as in WorldModel.fit

    def call():
        rows = torch.randint(len(inputs), (members, o.model_batch), device=o.device)
        model.train_step(optimizer, inputs[rows], targets[rows])

    return call


def plain_plan(o, population, states):
    """One plan by CEM without a guide, 5 iterations in 5 members."""
    task, obs = o.run.source.env.task, o.run.source.buffer.sample(states)["obs"]
    mpc = MPC(world_model(o, 5).step, task.reward, task.terminated, ACTION, horizon=o.horizon, population=population,
              elites=min(o.elites, population), iterations=5)
    return functools.partial(mpc.plan, obs)


def imagining(o, rollouts):
    """The policy's rollouts in the model, as in a round of the target phase."""
    return functools.partial(imagine, o.run.model.step, o.run.target.env.task.terminated, o.run.target.agent.act,
                             o.run.source.buffer.sample(rollouts)["obs"], o.run.args.rollout_length)


def our_rows(o, row):
    """[(name, call)] of the table's rows under one letter."""
    if row == "a":  # the latter are what Stable-Baselines3 can do
        return [*((f"{o.utd} critic updates, 1 of actor, N={n}, M={m}", rlpd_step(o, n, m, o.batch))
                  for n, m in ((2, 2), (5, 2), (5, 5), (10, 2), (10, 10))),
                *((f"{o.utd} updates of both, no LayerNorm, N={n}", rlpd_step(o, n, n, o.batch, False, o.utd))
                  for n in (2, 10) if o.peers)]
    if row == "b":
        return [("ensemble training step, 7 members", model_step(o, 7))]
    if row == "c":
        guided = functools.partial(wombet.planner(o.run).plan, o.run.source.buffer.sample(64)["obs"])
        return [*((f"CEM plan, states: {n}", plain_plan(o, o.population, n)) for n in ((1, 4) if o.peers else (1,))),
                ("default guided plan, states: 64", guided)]
    if row == "d":
        return [("default round of rollouts", imagining(o, o.run.args.rollouts))]
    return [(f"default {name} loop, a step", functools.partial(learn, o.run, name)) for name in ("target", "source")]


def scaling_rows(o):
    """What grows with what: (quantity, value, work, call)."""
    for quantity, what, call, *values in (
            ("members E", "ensemble training step", lambda n: model_step(o, n), 1, 2, 4, 8, 16),
            ("critics N", "RLPD step, M = N", lambda n: rlpd_step(o, n, n, o.batch), 1, 2, 5, 10, 20),
            ("population", "plain CEM plan", lambda n: plain_plan(o, n, 1), 50, 100, 200, 400, 800, 1600),
            ("batch size", "RLPD step, N = 2", lambda n: rlpd_step(o, 2, 2, n), 32, 64, 128, 256, 512, 1024),
            ("rollouts", "5 imagined steps", lambda n: imagining(o, n), 125, 500, 2000, 8000)):
        yield from ((quantity, n, what, call(n)) for n in (values[:2] if o.quick else values))


# --------------------------------------------------------------------------------------------------------------- peers


def spaces():
    """An environment of which only the spaces are used."""
    env = gym.Env()
    env.observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    env.action_space = gym.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)
    return env


def sac_rows(by, o, row):
    """SAC of Stable-Baselines3 or sbx, sampling from its own buffer included. Equal: critics, batches, widths, updates,
    LayerNorm (sbx) or none. Their actors maximise the critics' minimum."""
    SAC, sbx = importlib.import_module(by).SAC, by == "sbx"
    name = "{utd} critic updates, 1 of actor, N={n}, M={n}" if sbx else "{utd} updates of both, no LayerNorm, N={n}"
    for n in (2, 10):
        policy = {"n_critics": n, "net_arch": [o.hidden, o.hidden], **({"layer_norm": True} if sbx else {})}
        agent = SAC("MlpPolicy", spaces(), buffer_size=o.rows, device=o.device, policy_kwargs=policy,
                    **({"policy_delay": o.utd} if sbx else {}))
        agent.set_logger(importlib.import_module("stable_baselines3.common.logger").Logger(None, []))
        buffer = agent.replay_buffer
        for part in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
            part[:] = np.random.default_rng(0).uniform(-1, 1, part.shape)
        buffer.full = True
        yield name.format(utd=o.utd, n=n), functools.partial(agent.train, o.utd, o.batch)


def mbrl_rows(o, row):
    """Equal, training: members, layers, SiLU, likelihood, batches, a gather; planning: population, iterations, elites,
    horizon, layers, transitions: ours takes a candidate through all 5 members, a particle there stays with its own, so
    that the 20 of its PETS are our 4 states. It also draws from the variance; ours scores u."""
    import mbrl.models
    import mbrl.planning
    from mbrl.env.termination_fns import no_termination

    gaussian = functools.partial(mbrl.models.GaussianMLP, OBS + ACTION, OBS + FEATURES, o.device, 4,
                                 hid_size=o.model_hidden, activation_fn_cfg={"_target_": "torch.nn.SiLU"})
    if row == "b":
        model = gaussian(ensemble_size=7, learn_logvar_bounds=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)  # as its ModelTrainer's
        inputs, targets = (torch.randn(o.rows, size, device=o.device) for size in (OBS + ACTION, OBS + FEATURES))

        def call():
            rows = torch.randint(o.rows, (7, o.model_batch), device=o.device)
            model.update(inputs[rows], optimizer, targets[rows])

        return [("ensemble training step, 7 members", call)]
    members = gaussian(ensemble_size=5, propagation_method="fixed_model")
    env = mbrl.models.ModelEnv(spaces(), mbrl.models.OneDTransitionRewardModel(members, normalize=True), no_termination)
    low = np.full((o.horizon, ACTION), -1.0)
    cem = mbrl.planning.CEMOptimizer(5, o.elites / o.population, o.population, low.tolist(), (-low).tolist(), 0.1,
                                     o.device, return_mean_elites=True)
    start, obs = torch.zeros(low.shape, device=o.device), np.zeros(OBS, dtype=np.float32)
    score = lambda plans, particles: env.evaluate_action_sequences(plans, obs, particles)
    return [(f"CEM plan, states: {n // 5}", lambda n=n: cem.optimize(lambda plans: score(plans, n), start))
            for n in (5, 20)]


PEERS = {"a": {name: functools.partial(sac_rows, name) for name in ("stable_baselines3", "sbx")},
         "b": {"mbrl": mbrl_rows}, "c": {"mbrl": mbrl_rows}}


# ------------------------------------------------------------------------------------------------ measuring and output


def seconds(call, calls, o):
    """Time of one call, averaged over `calls` of them."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if o.device != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - began) / calls


def warm_up(call, o):
    """How many calls make one measurement."""
    call()  # it may compile something
    return 1 + int(o.seconds / seconds(call, 1, o))


def peak(o):
    """The best GFLOP/s of float32 matrix products."""
    calls = {n: functools.partial(torch.matmul, *torch.randn(2, n, n, device=o.device)) for n in o.peak}
    return max(2e-9 * n**3 / seconds(call, warm_up(call, o), o) for n, call in calls.items() for _ in range(5))


def measure(works, o):
    """[{...}] of works [(row, name, whose, call)]; works of one row and name take turns, and ours is the first."""
    results = []
    for key in dict.fromkeys(work[:2] for work in works):
        names, calls = zip(*(work[2:] for work in works if work[:2] == key))
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            calls[0]()
        counts = [warm_up(call, o) for call in calls]
        rounds = [[1e3 * seconds(call, n, o) for call, n in zip(calls, counts)] for _ in range(o.repetitions)]
        medians = np.median(rounds, 0).tolist()
        results += [{"row": key[0], "work": key[1], "by": name, "ms": median, "ms_low": min(ms), "ms_high": max(ms),
                     "ms_all": ms, "gflop": counter.get_total_flops() / 1e9, "times_ours": median / medians[0]}
                    for name, median, ms in zip(names, medians, zip(*rounds))]
    return results


def table(report):
    """The report's lines."""
    yield "{processor}, {device}, {threads} thread(s), torch {torch}, {speed}".format(**report["machine"])
    yield f"peak of float32 matrix products: {report['peak_gflop_per_s']:.0f} GFLOP/s\n"
    yield f"  {'work':45}{'by':24}{'ms':>9}  {'min..max':19}{'x ours':>6}{'GFLOP/s':>9}{'of peak':>9}"
    for r in report["rows"]:
        rate, spread = 1e3 * r["gflop"] / r["ms"], f"{r['ms_low']:.2f}..{r['ms_high']:.2f}"
        yield (f"{r['row'] + ' ' + str(r['work']):47}{r['by']:24}{r['ms']:9.2f}  {spread:19}{r['times_ours']:6.2f}"
               f"{rate:9.1f}{rate / report['peak_gflop_per_s']:9.0%}")
    yield from (f"skipped: {line}" for line in report["skipped"])


def write_scaling(results, folder):
    """scaling.csv and figures/scaling.png: median time over each quantity, with the proportional line."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    with open(folder / "scaling.csv", "w", newline="") as file:
        csv.writer(file).writerows([["quantity", "value", "work", "ms_median", "ms_min", "ms_max"], *(
            [r["row"], r["work"], r["by"], *(f"{r[k]:.5g}" for k in ("ms", "ms_low", "ms_high"))] for r in results)])
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    for ax, (quantity, title) in zip(figure.subplots(2, 3).flat, dict.fromkeys((r["row"], r["by"]) for r in results)):
        x, y = zip(*((r["work"], r["ms"]) for r in results if r["row"] == quantity))
        ax.loglog(x, y, "o-", label="median")
        ax.loglog(x, [y[-1] * v / x[-1] for v in x], "--", color="gray", label="proportional")
        ax.set(title=title, xlabel=quantity, ylabel="Time (ms)")
    figure.axes[0].legend()
    figure.axes[-1].set_visible(False)
    figure.savefig(folder / "figures" / "scaling.png", dpi=150)


def processor():
    """The CPU's name, where the system tells it, and the instructions that torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return ", ".join([*names[:1], torch.backends.cpu.get_cpu_capability()])


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list("abcde"), choices=list("abcde"), metavar="ROW",
                        help="a: RLPD step, b: model training step, c: plans, d: rollouts, e: loops (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table, with every measurement")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads and cores (default: 1)")
    parser.add_argument("--repetitions", type=count, default=7, help="measurements of each work (default: 7)")
    parser.add_argument("--flags", default="", metavar="'FLAGS'", help="of wombet.py; --fast, --device: of all rows")
    parser.add_argument("--peers", action="store_true", help="also what is installed of stable_baselines3, sbx, mbrl")
    parser.add_argument("--scaling", nargs="?", type=Path, const=ROOT / "results", metavar="FOLDER",
                        help="instead: how time grows with sizes (default folder: results)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast")
    parser.error = functools.partial(require, False)
    args = parser.parse_args(argv)
    require(not args.json or args.json.resolve().parent.is_dir(), f"--json {args.json}: its folder does not exist")
    require(not args.scaling or not args.peers and args.only == list("abcde"), "--scaling measures our own work: "
            "leave --only and --peers out")
    kept = args.scaling and args.scaling.resolve() == ROOT / "results"
    require(not args.quick or not kept, "--scaling --quick: give --scaling a folder, for the "
            "default one keeps real measurements")
    return args


def benchmark(args):
    """The whole report."""
    given = shlex.split(args.flags)
    set_here = {flag for flag in FIXED if flag.startswith("--")} & {flag.split("=")[0] for flag in given}
    require(not set_here, f"--flags: the benchmark sets {', '.join(sorted(set_here))} itself: leave it out")
    flags = wombet.parse_args(["--device", "cpu", *given, *FIXED])
    require(flags.prior and not flags.offline_data, "--flags: the rows need a source task: leave --no-prior and "
            "--offline-data out")
    o = SimpleNamespace(**vars(args), **(QUICK if args.quick else FULL), device=flags.device, speed=flags.speed)
    if hasattr(os, "sched_setaffinity"):  # jax's threads, which no flag reaches, keep to it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: o.threads])
    torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision(o.speed["precision"])
    torch.manual_seed(0)
    keep_freed_memory()
    limit, o.run = peak(o), prepare(flags)
    works, skipped = list(scaling_rows(o)) if o.scaling else [], []
    for row in [] if o.scaling else o.only:
        for by, rows in {"wombet": our_rows, **(PEERS.get(row, {}) if o.peers else {})}.items():
            try:
                works += [(row, name, by, call) for name, call in rows(o, row)]
            except ImportError as error:
                skipped.append(f"{by}, row {row}: {error}")
    results = measure(works, o)
    machine = {"processor": processor(), "cpus": os.cpu_count(), "device": o.device,
               "threads": o.threads, "speed": o.speed, "torch": torch.__version__}
    return {"machine": machine, "command": shlex.join(sys.argv), "peak_gflop_per_s": max(limit, peak(o)),
            "rows": results, "skipped": skipped}


def main(argv=None):
    try:
        args = parse_args(argv)
        report = benchmark(args)
        print("\n".join(table(report)))
        if args.scaling:
            write_scaling(report["rows"], args.scaling)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

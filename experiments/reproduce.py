"""The runs behind the paper's figures, a process a core; what is done is skipped, what was cut short goes on.

    python experiments/reproduce.py fig2 --jobs 2            runs figure 2 here
    python experiments/reproduce.py fig2 --list              only prints its commands
    python experiments/reproduce.py all --slurm --slurm-args='--partition=cpu --time=12:00:00'
    python experiments/reproduce.py fig5 --budget quick      a figure in minutes, to see that it works

A run goes to runs/<topic>/<env>__<name>__<seed>/, with its output in <env>__<name>__<seed>.log beside it; as it ends,
its config.json, progress.csv and model_error.csv are copied to results/<topic>/, and the first D_S that offline methods
learn from. Topics share runs: WOMBET itself is fig2's everywhere. Exit code 0: all done, 1: a run failed, 2: bad input,
130: interrupted.
"""

import argparse
import contextlib
import fcntl
import fnmatch
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
NEAR_FOUR = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Pusher-v5")
PAIR = ("HalfCheetah-v4", "Walker2d-v4")

# envs, pair: environments, and those of the offline methods and of the moderate shift. many, few: seeds.
# source, target, online: steps of WOMBET's phases and of SAC, TD3 and PPO, twice the target's, for the claim is "less
# than half". offline, slow_offline: updates on D_S, and those of CQL and COMBO, which take ten times as long.
# window: the --snapshot-window of WOMBET's source phase.
# wombet, preset, baseline, bound: flags of WOMBET's runs, of the literal paper's beside them, of every baseline, of
# bound.py; more: of single baselines. A round of the literal paper takes 50 minutes of a core with 64 trajectories.
FEW_ACTIONS = ("--cql-actions", 4)
CPU = dict(envs=NEAR_FOUR, pair=PAIR, many=range(5), few=range(3), source=50_000, target=25_000, online=50_000,
           offline=20_000, slow_offline=10_000, window=2000, wombet=(), preset=("--imagined-trajectories", 16),
           baseline=("--eval-every", 2500), bound=(), more={"cql": FEW_ACTIONS, "combo": FEW_ACTIONS})
BUDGETS = {
    "cpu": CPU,
    "paper": {**CPU, "envs": (*NEAR_FOUR, "Ant-v4", "Swimmer-v4"), "few": range(5), "offline": 100_000,
              "slow_offline": 100_000, "preset": (), "more": {}},
    "quick": {**CPU, "envs": ("Hopper-v4",), "pair": ("Hopper-v4",), "many": range(1), "few": range(1), "source": 400,
              "target": 200, "online": 400, "offline": 100, "slow_offline": 50, "window": 100, "preset": (),
              "wombet": shlex.split("--fast off --eval-every 100 --eval-episodes 2 --checkpoint-every 100 --utd 2 "
                                    "--hidden 64 --model-hidden 64 --random-steps 100 --snapshot-window 100 "
                                    "--model-epochs 2 --rollouts 100 --imagine-every 100 --imagined-trajectories 8 "
                                    "--imagined-length 15 --return-percentile 30"),
              "baseline": shlex.split("--fast off --eval-every 50 --eval-episodes 2 --checkpoint-every 50 --hidden 64"),
              "bound": ("--episodes", 2, "--length", 20),
              "more": {"sac": ("--random-steps", 100), "td3": ("--random-steps", 100), "ppo": ("--rollout-steps", 128),
                       "cql": FEW_ACTIONS, "combo": FEW_ACTIONS, "bc": ("--critic-steps", 50)}}}

# flags of offline methods on D_S, by method, or method and environment. IQL scales rewards by the returns of whole
# episodes, which D_S has not: its trajectories are cut. Rollouts of one step: OfflineRL-Kit's for narrow data there
ON_D_S = {"iql": ("--no-scale-rewards",), **{(m, "Walker2d-v4"): ("--rollout-length", 1) for m in ("mopo", "combo")}}

KEPT = ("config.json", "model_error.csv", "progress.csv")  # progress.csv last: it says that a run is done

# folder: of the run below runs/<topic>/ and results/<topic>/. flags: of the command, with everything. result: the file
# that says that it is done. needs: files of other runs without which it cannot start. base: a finished run, a copy of
# which it continues (None: it starts from nothing). kept: its files that go to results/
Job = namedtuple("Job", "topic folder script flags result needs base kept", defaults=[KEPT])


# ------------------------------------------------------------------------------------------------------------ the grid


def new_job(b, topic, script, env, name, seed, *flags, needs=(), base=None, kept=KEPT):
    folder = f"{env}__{name}__{seed}"
    if base is None:
        flags = ("--env", env, "--name", name, "--seed", seed, *flags, "--out", f"{b.runs}/{topic}")
    else:
        flags = ("--resume", f"{b.runs}/{topic}/{folder}", *flags)
    result = f"{b.results}/{topic}/{folder}/progress.csv"
    return Job(topic, folder, script, tuple(map(str, flags)), result, needs, base, kept)


def run_dir(b, job):
    return f"{b.runs}/{job.topic}/{job.folder}"


def scratch(b, env, seed, topic="fig2", name="scratch", *flags):
    return new_job(b, topic, "wombet.py", env, name, seed, *b.wombet, "--no-prior", "--target-steps", b.target, *flags)


def goes_on(b, topic, name, job, *flags):
    """That run with more steps, in a copy of its folder."""
    env, _, seed = job.folder.split("__")
    base = run_dir(b, job)
    return new_job(b, topic, job.script, env, name, seed, *flags, needs=(f"{base}/done",), base=base)


def wombet(b, topic, name, env, seed, *flags, source=None):
    """WOMBET with those flags; source: the run whose source phase it takes."""
    flags = (*b.wombet, "--source-steps", b.source, "--target-steps", b.target, *flags)
    if source is None:
        # its first D_S is kept for the offline methods, so that they need no source phase
        data = ("first_dataset.npz",) if env in b.pair and seed in b.few and topic in ("fig2", "shift") else ()
        return new_job(b, topic, "wombet.py", env, name, seed, *flags, kept=(*data, *KEPT))
    return new_job(b, topic, "wombet.py", env, name, seed, *flags, "--source-run", run_dir(b, source),
               needs=(f"{run_dir(b, source)}/source.pt",))


def default(b, env, seed):
    """WOMBET as it is, which most topics compare with and take the source phase from."""
    return wombet(b, "fig2", "wombet", env, seed)


def variant(b, topic, name, env, seed, *flags):
    return wombet(b, topic, name, env, seed, *flags, source=default(b, env, seed))


NOTHING_IMAGINED = ("--alpha-rule", "fixed", "--alpha", 0)


def control(b):
    """Nothing imagined, all else equal; and from scratch for as many steps as source and target together."""
    for env in b.envs:
        yield from (default(b, env, seed) for seed in b.many)
        yield from (variant(b, "control", "control", env, seed, *NOTHING_IMAGINED) for seed in b.many)
        for job in (scratch(b, env, seed) for seed in b.few):
            yield job
            yield goes_on(b, "control", "scratch-long", job, "--target-steps", b.source + b.target)


# a new agent to which one thing crosses: imagined data (the paper's transfer; it takes more of them), or real data
ALONE = {"model": ("--no-warm-start", "--no-keep-source-data", "--alpha-gain", 0.3),
         "data": ("--no-warm-start", *NOTHING_IMAGINED)}
# imagined data again, but the first D_S is all: what do the rounds add?
FIRST = (*ALONE["model"], "--imagine-every", 0)


def parts(b):
    """A new agent in the target task, given what is imagined alone, the first D_S alone, or the real data alone."""
    for env in b.envs:
        yield from (default(b, env, seed) for seed in b.few)
        for name, flags in {**ALONE, "first": FIRST}.items():
            yield from (variant(b, "parts", name, env, seed, *flags) for seed in b.few)


def fig2(b):
    """WOMBET against the same agent from scratch, and against SAC, TD3 and PPO with twice the target steps."""
    for env in b.envs:
        yield from (default(b, env, seed) for seed in b.many)
        yield from (scratch(b, env, seed) for seed in b.many)
        # TD3's published runs begin to learn then (the paper's appendix C), not at CleanRL's 25,000 steps
        start = 10_000 if env in ("HalfCheetah-v4", "Ant-v4") else 1_000
        for name, flags in {"sac": (), "td3": ("--random-steps", start), "ppo": ()}.items():
            yield from (new_job(b, "fig2", f"baselines/{name}.py", env, name, seed, "--target-steps", b.online,
                                *b.baseline, *flags, *b.more.get(name, ())) for seed in b.few)


def fig3(b):
    """Offline methods on WOMBET's first D_S alone."""
    for env in b.pair:
        yield from (default(b, env, seed) for seed in b.few)
        for method in OFFLINE:
            yield from (offline(b, "fig3", method, method, default(b, env, seed)) for seed in b.few)


OFFLINE = ("bc", "iql", "mopo", "cql", "combo")


def offline(b, topic, name, method, source, *flags):
    """An offline method on the first D_S of the run `source`: as results/ has it, so that no source phase is needed."""
    env, _, seed = source.folder.split("__")
    data = str(Path(source.result).with_name("first_dataset.npz"))
    data = data if (ROOT / data).exists() else f"{run_dir(b, source)}/first_dataset.npz"
    slow = method in ("cql", "combo")
    more = (*b.more.get(method, ()), *ON_D_S.get(method, ()), *ON_D_S.get((method, env), ()))
    return new_job(b, topic, f"baselines/{method}.py", env, name, seed, "--dataset", data, "--offline-updates",
               b.slow_offline if slow else b.offline, *b.baseline, *more, *flags, needs=(data,))


def fig4(b):
    """These go on online, and AWAC."""
    for job in fig3(b):
        yield job
        if job.topic == "fig3":
            yield goes_on(b, "fig4", job.folder.split("__")[1], job, "--online-steps", b.target)
    for env in b.pair:
        yield from (offline(b, "fig4", "awac", "awac", default(b, env, seed), "--online-steps", b.target)
                    for seed in b.few)


def fig5(b):
    """The adaptive share against a fixed half, and against a fixed tenth: what it is on the mean after 2,500 steps."""
    for env in b.envs:
        yield from (default(b, env, seed) for seed in b.few)
        for name, alpha in {"half": 0.5, "tenth": 0.1}.items():
            yield from (variant(b, "fig5", name, env, seed, "--alpha-rule", "fixed", "--alpha", alpha)
                        for seed in b.few)


def fig6(b):
    """The dual filter against one criterion and none; no rounds, which would replace the first D_S at once."""
    for env in b.envs:
        yield from (default(b, env, seed) for seed in b.few)
        for kind in ("dual", "return", "uncertainty", "none"):
            yield from (variant(b, "fig6", f"filter-{kind}", env, seed, "--imagine-every", 0, "--filter", kind)
                        for seed in b.few)


def preset(b):
    """The literal paper, and its agent from scratch. It says nothing of who collects the source data: they and the
    first model are WOMBET's."""
    for env in b.envs:
        yield from (default(b, env, seed) for seed in b.few)
        yield from (variant(b, "preset", "preset", env, seed, "--preset", "paper", "--snapshot-window", b.window,
                            *b.preset) for seed in b.few)
        yield from (scratch(b, env, seed, "preset", "preset-scratch", "--preset", "paper") for seed in b.few)


def shift(b):
    """A source task further away: WOMBET, its control, the source's agent without its real data, a new agent given both
    kinds of data, imagined alone, or real alone, and the offline methods on D_S; scratch: fig2's."""
    others = {"control": NOTHING_IMAGINED, "nokeep": ("--no-keep-source-data",), "new": ("--no-warm-start",),
              **{f"new-{name}": flags for name, flags in ALONE.items()}}
    for kind in ("backward", "stand"):
        for env in b.pair:
            for seed in b.few:
                source = wombet(b, "shift", kind, env, seed, "--source", kind)
                yield source
                yield from (wombet(b, "shift", f"{kind}-{name}", env, seed, "--source", kind, *flags, source=source)
                            for name, flags in others.items())
                yield from (offline(b, "shift", f"{kind}-{method}", method, source) for method in OFFLINE)
    for env in b.pair:
        yield from (scratch(b, env, seed) for seed in b.few)


def bound(b):
    """Eqs. 3 to 5 in the real source environment, from the first seed's source phases."""
    sources = [default(b, env, b.few[0]) for env in b.envs]
    yield from sources
    folders = [run_dir(b, job) for job in sources]
    name = "bound" if b.few[0] == 0 else f"bound-{b.few[0]}"
    yield Job("bound", name, "experiments/bound.py", (*folders, *map(str, b.bound), "--out", f"{b.results}/{name}"),
              f"{b.results}/{name}/bound.csv", tuple(f"{folder}/source.pt" for folder in folders), None)


def baselines(b):
    """The online baselines against their published means: SAC and TD3 at 100,000 steps, PPO (one seed) at 1,000,000.
    Not part of "all"."""
    for seed in b.few:
        for env, start in (("HalfCheetah-v4", 10_000), ("Hopper-v4", 1_000)):
            yield new_job(b, "baselines", "baselines/sac.py", env, "sac", seed, "--target-steps", 100_000)
            yield new_job(b, "baselines", "baselines/td3.py", env, "td3", seed, "--target-steps", 100_000,
                      "--random-steps", start)
    for env in ("Hopper-v4", "Walker2d-v4"):
        yield new_job(b, "baselines", "baselines/ppo.py", env, "ppo", b.few[0])


ALL = {f.__name__: f for f in (control, parts, fig2, fig5, fig6, preset, shift, fig3, fig4, bound)}
TOPICS = {**ALL, "baselines": baselines}


def spelt_out(topics):
    """Names of topics, with those that "all" stands for in its place."""
    return [name for topic in topics for name in (ALL if topic == "all" else [topic])]


def grid(b, topics):
    """The jobs of those topics, each once, what another needs before it."""
    return list(dict.fromkeys(job for name in spelt_out(topics) for job in TOPICS[name](b)))


# -------------------------------------------------------------------------------------------------------------- states


def title(job):
    return f"{job.topic}/{job.folder}"


def command(job):
    """One line for a shell in ROOT."""
    line = shlex.join(["python", job.script, *job.flags])
    if job.base:
        above, folder, base = map(shlex.quote, (str(Path(job.flags[1]).parent), job.flags[1], job.base))
        copy = f"{{ cp -r {base} {folder} && rm -f {folder}/done; }}"
        line = f"mkdir -p {above} && {{ [ -d {folder} ] || {copy}; }} && {line}"
    return line


def missing(job):
    return [need for need in job.needs if not (ROOT / need).exists()]


def owners(job, jobs, b):
    """Those of `jobs` that leave what this one still needs."""
    folders = {str(Path(need).parent) for need in missing(job)}
    return [other for other in jobs if folders & {run_dir(b, other), str(Path(other.result).parent)}]


def to_do(jobs, whole, again, fill_runs, b):
    """The jobs that results/ has not (fill_runs: or runs/), those of `again`, and those of the whole grid that leave
    what these need, as where runs/ was deleted."""
    pending = [job for job in jobs if job in again or not (ROOT / job.result).exists()
               or fill_runs and not (ROOT / run_dir(b, job) / "done").exists()]
    for job in pending:  # it grows
        pending += [other for other in owners(job, whole, b) if other not in pending]
    return [job for job in whole if job in pending]


# flags of a run that do not tell what it computes
NO_MATTER = ("out", "name", "source_run", "dataset", "device", "threads", "fast", "checkpoint_every")
# and of one that imagines nothing
NOT_IMAGINED = ("alpha_gain", "alpha_min", "alpha_max", "target_penalty_coef", "floor_penalty", "imagine_every",
                "rollouts", "rollout_length", "refit_every", "refit_epochs", "offline_capacity")


def other_flags(job, folder):
    """Those flags, as the run in that folder has them, that are not what its command gives now: a default may have
    changed."""
    if job.base or not (ROOT / folder / "config.json").exists():
        return []
    places = [str(ROOT), str(ROOT / "baselines")]  # where the programs lie
    sys.path[:0] = [place for place in places if place not in sys.path]
    from harness import as_flag, read_config
    then = read_config(ROOT / folder)["flags"]
    program = importlib.import_module(Path(job.script).stem)
    now = vars(getattr(program, "parse_args", program.build_parser().parse_args)(list(job.flags)))
    nothing = then.get("alpha_rule") == "fixed" and then["alpha"] == 0
    return [as_flag(key, then[key]) for key in sorted(then) if key in now and then[key] != now[key]
            and key not in NO_MATTER and not (nothing and key in NOT_IMAGINED)]


def claim(log):
    """Whether an open log or folder of a run is now this process's; a child that has it open holds it to its end."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def forget(jobs, b):
    """Takes away what runs have left, in runs/ and in results/; ValueError, and nothing lost, where one is running."""
    with contextlib.ExitStack() as stack:
        for job in jobs:
            folder = ROOT / run_dir(b, job)
            for path in (folder, Path(f"{folder}.log")):  # a run locks its folder, `start` the log
                if path.exists():
                    file = os.open(path, os.O_RDONLY)
                    stack.callback(os.close, file)
                    if not claim(file):
                        raise ValueError(f"--again: another process is at {title(job)}: stop it first")
        for job in jobs:
            folder = ROOT / run_dir(b, job)
            shutil.rmtree(folder, ignore_errors=True)
            for name in {*job.kept, Path(job.result).name}:
                (ROOT / job.result).with_name(name).unlink(missing_ok=True)
            if (log := Path(f"{folder}.log")).exists():
                os.truncate(log, 0)  # the file stays, for its lock is what keeps a second process away


def start(job, b):
    """Its process, or None where another process is at this run."""
    folder, flags = ROOT / run_dir(b, job), job.flags
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        if not claim(log):
            return None
        if not (folder / "checkpoint.pt").exists():
            shutil.rmtree(folder, ignore_errors=True)  # nothing in it to go on from
            if job.base:
                shutil.copytree(ROOT / job.base, folder, ignore=shutil.ignore_patterns("done"))
        elif job.base is None:
            flags = ("--resume", run_dir(b, job))
        # a session of its own: Ctrl-C on the terminal is for this program, which passes it on once
        return subprocess.Popen([sys.executable, job.script, *flags], cwd=ROOT, stdout=log, stderr=log,
                                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def keep(job, b):
    """Copies what a finished run is kept by, progress.csv last; not over a result, which other runs compare with."""
    folder = ROOT / run_dir(b, job)
    folder.mkdir(exist_ok=True)
    for name in () if (ROOT / job.result).exists() else job.kept:
        if (folder / name).exists():
            (ROOT / job.result).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, (ROOT / job.result).parent)
    (folder / "done").touch()


def last_lines(job, b, n):
    path = ROOT / f"{run_dir(b, job)}.log"
    return path.read_text(errors="replace")[-5000:].rstrip().splitlines()[-n:] if path.exists() else []


# -------------------------------------------------------------------------------------------------------------- runner


def clock(seconds):
    return "?" if seconds is None else f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


class Board:
    """What is said while jobs run: a line an event and, on a terminal, a table below that rewrites itself."""

    def __init__(self):
        self.drawn, self.terminal = 0, sys.stdout.isatty()

    def say(self, text):
        self.draw([])
        self.write(text + "\n")

    def draw(self, lines):
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self.write((f"\033[{self.drawn}F\033[J" if self.drawn else "")
                       + "".join(line[:width] + "\n" for line in lines))
            self.drawn = len(lines)

    def write(self, text):
        try:
            print(text, end="", flush=True)
        except OSError:  # a reader that has gone, as behind `| head`, ends no run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_all(jobs, slots, b):
    """Runs the jobs, `slots` at a time, in their order; returns the exit code."""
    waiting, running, took, failed, done, board = list(jobs), {}, {}, 0, 0, Board()
    kind = lambda job: (job.script, job.folder.split("__")[-2:][0])

    def expected(job):
        times = took.get(kind(job)) or [seconds for all_of in took.values() for seconds in all_of]
        return sum(times) / len(times) if times else None

    def summary():
        spent = {job: time.time() - began for job, (_, began) in running.items()}
        left = [expected(job) and max(expected(job) - spent.get(job, 0), 0) for job in (*waiting, *running)]
        left = None if None in left else sum(left) / min(slots, max(len(left), 1))
        return f"{len(running)} running, {len(waiting)} waiting, {done} done, {failed} failed, {clock(left)} left"

    def fail(job, why, lines=()):
        nonlocal failed
        failed += 1
        board.say("\n".join([f"failed: {title(job)}: {why}", *(f"    {line}" for line in lines)]))

    try:
        while waiting or running:
            for job in list(waiting):
                if len(running) == slots:
                    break
                if not missing(job):
                    waiting.remove(job)
                    process = start(job, b)
                    if process is None:
                        fail(job, "another process is at it")
                    else:
                        running[job] = process, time.time()
                elif not owners(job, (*waiting, *running), b):
                    waiting.remove(job)
                    fail(job, f"needs {', '.join(missing(job))}, which no run here leaves")
            for job, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                if process.returncode:
                    why = f"exit code {process.returncode}; the end of {run_dir(b, job)}.log:"
                    fail(job, why, last_lines(job, b, 5))
                else:
                    keep(job, b)
                    done += 1
                    took.setdefault(kind(job), []).append(time.time() - began)
                    board.say(f"done: {title(job)} in {clock(time.time() - began)}; {summary()}")
            if board.terminal:
                board.draw([summary(), *(f"  {title(job):44} {clock(time.time() - began)}  "
                                         f"{''.join(last_lines(job, b, 1))}" for job, (_, began) in running.items())])
            time.sleep(0.5)
    except KeyboardInterrupt:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)  # each ends with a checkpoint
        for process, _ in running.values():
            process.wait()
        board.say("interrupted; the same command goes on")
        return 130
    board.say(f"{done} done, {failed} failed")
    return 1 if failed else 0


def sbatch(flags, script):
    """What Slurm answers to a script; ValueError where it refuses."""
    try:
        sent = subprocess.run(["sbatch", *flags], input=script, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("--slurm: there is no sbatch on PATH; run it on a machine of the cluster") from None
    if sent.returncode:
        raise ValueError(f"--slurm: sbatch says: {(sent.stderr.strip().splitlines() or ['nothing'])[-1]}")
    return sent.stdout.strip()


def submit(jobs, b, args):
    """The jobs as one job array of Slurm, or one for each stage, where a stage waits for what it needs."""
    stages = {}
    for job in jobs:  # what another needs comes before it
        stages[job] = 1 + max((stages[other] for other in owners(job, stages, b)), default=-1)
    (ROOT / b.runs / "slurm").mkdir(parents=True, exist_ok=True)
    again = [*args.topics, "--budget", args.budget, "--jobs", "1", "--fill-runs", "--out", str(b.out)]
    if args.seeds:
        again += ["--seeds", *map(str, args.seeds)]
    before = None
    for stage in range(1 + max(stages.values())):
        names = [title(job) for job in jobs if stages[job] == stage]
        script = ("#!/bin/bash\n"
                  f"names=({shlex.join(names)})\n"
                  f"exec {shlex.join([sys.executable, 'experiments/reproduce.py', *again])} "
                  "--only \"${names[$SLURM_ARRAY_TASK_ID]}\"\n")
        flags = ["--parsable", f"--array=0-{len(names) - 1}", "--job-name=wombet", "--cpus-per-task=1",
                 f"--chdir={ROOT}", f"--output={(ROOT / b.runs).resolve()}/slurm/%A_%a.log",
                 *([f"--dependency=afterany:{before}"] if before else []), *shlex.split(args.slurm_args)]
        before = sbatch(flags, script).split(";")[0]
        print(f"job array {before}: {len(names)} runs" + (", after the one before" if stage else "")
              + f"; logs: {b.runs}/slurm/{before}_<task>.log")
    return 0


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args(argv):
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="+", choices=(*TOPICS, "all"), metavar="TOPIC",
                        help=f"{', '.join(TOPICS)}; all: these but baselines")
    parser.add_argument("--budget", default="cpu", choices=BUDGETS, help="quick: minutes; cpu: four environments, 3 or "
                        "5 seeds; paper: six environments, 5 seeds, longer offline phases (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="these instead of the budget's")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="only runs whose topic/folder "
                        "matches, such as 'fig2/Hopper-v4__*', and what they need")
    parser.add_argument("--jobs", type=int, default=cpus, help="runs at a time (default: one a core)")
    parser.add_argument("--list", action="store_true", help="print the commands, one a line, and run nothing")
    parser.add_argument("--again", action="store_true", help="run anew what is there: first deletes what runs/ and "
                        "results/ have of these topics (of an interrupted one: go on without --again)")
    parser.add_argument("--fill-runs", action="store_true", help="run also what results/ has and runs/ has not, as "
                        "after a clone, for its checkpoints; results/ stays as it is")
    parser.add_argument("--slurm", action="store_true", help="submit the runs to Slurm as job arrays")
    parser.add_argument("--slurm-args", default="", metavar="'ARGS'", help="of sbatch: --slurm-args='--time=12:00:00'")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where runs/ and results/ lie (default: the "
                        "repository; quick, paper: runs/quick, runs/paper, for their numbers are not cpu's)")

    def error(message):
        raise ValueError(message)

    parser.error = error
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: at least 1")
    if min(args.seeds or [0]) < 0:
        raise ValueError(f"--seeds {min(args.seeds)}: at least 0")
    if args.slurm_args and not args.slurm:
        raise ValueError("--slurm-args needs --slurm")
    if "baselines" in args.topics and args.budget != "cpu":
        raise ValueError(f"--budget {args.budget}: baselines has one budget, the published one: leave --budget out")
    return args


def main(argv=None):
    # as Ctrl-C: Slurm's time limit and a terminal that closes leave checkpoints. SIGINT: a script's `&` ignores it, and
    # so would the programs that it is passed on to
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        args = parse_args(argv)
        b = SimpleNamespace(**BUDGETS[args.budget])
        b.out = args.out.resolve() if args.out else ROOT if args.budget == "cpu" else ROOT / "runs" / args.budget
        inside = b.out.relative_to(ROOT) if b.out.is_relative_to(ROOT) else b.out
        b.runs, b.results = str(inside / "runs"), str(inside / "results")
        if args.seeds:
            b.many = b.few = args.seeds
        whole = grid(b, args.topics)
        jobs = [job for job in whole if any(fnmatch.fnmatch(title(job), p) for p in args.only)]
        if not jobs:
            raise ValueError(f"--only {' '.join(args.only)} matches no run of {', '.join(args.topics)}")
        if args.list:
            print("\n".join(map(command, jobs)))
            return 0
        again = [job for job in jobs if args.again and job.topic in spelt_out(args.topics)]
        pending = to_do(jobs, whole, again, args.fill_runs, b)
        skipped = [job for job in jobs if job not in pending]
        for job in skipped:
            other = other_flags(job, Path(job.result).parent)
            print(f"skipped, for it is done: {Path(job.result).parent}"
                  + (f", though with {', '.join(other)}" if other else ""))
        if skipped:
            print(f"{len(skipped)} skipped; --again runs them anew")
        for job in pending:
            if job not in again and (ROOT / job.result).exists():
                print(f"made again in {run_dir(b, job)}, which is gone; {Path(job.result).parent} stays as it is")
            other = [] if job in again else other_flags(job, run_dir(b, job))
            if other and (ROOT / run_dir(b, job) / "checkpoint.pt").exists():
                raise ValueError(f"{run_dir(b, job)} was begun with {', '.join(other)}, which is not what its command "
                                 f"gives now: move it away, or give --again --only '{title(job)}'")
        if not pending:
            return 0
        if args.slurm and again:
            sbatch(["--test-only", *shlex.split(args.slurm_args)], "#!/bin/bash\n")  # refused before anything is lost
        forget(again, b)
        return submit(pending, b, args) if args.slurm else run_all(pending, args.jobs, b)
    except (ValueError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a second one
        return 130


if __name__ == "__main__":
    sys.exit(main())

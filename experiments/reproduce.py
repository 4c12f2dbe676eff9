"""The runs behind each figure, a process a core, resumable: what is done is skipped, what was cut short goes on.

    python experiments/reproduce.py transfer --jobs 2
    python experiments/reproduce.py new-agent --jobs 2        the paper's reading: a new agent, and D_S imagined alone
    python experiments/reproduce.py two-critics --jobs 2      earlier defaults: that with N = 2, UTD 4
    python experiments/reproduce.py slow-lr --jobs 2          those and an earlier learning rate and exploration
    python experiments/reproduce.py slow-targets --jobs 2     those and RLPD's rate of the target networks
    python experiments/reproduce.py fast --jobs 2             that from scratch, with the flags for speed
    python experiments/reproduce.py baselines --jobs 2
    python experiments/reproduce.py offline-data offline --jobs 2     learns from what the first and slow-targets leave

Runs go to runs/<topic>/; config.json, progress.csv and model_error.csv of each go to results/<topic>/ as it ends.
"offline" ends with results/offline/table.csv, returns also in units of the data's mean return.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--compile", "--precision", "medium", "--plan-dtype", "bfloat16", "--update-dtype", "bfloat16"]
# earlier defaults, each line older than the one before; of a flag given twice the last counts
NEW_AGENT = ["--no-warm-start", "--no-keep-source-data"]
TWO_CRITICS = [*NEW_AGENT, "--critics", 2, "--utd", 4, "--polyak", 0.02, "--random-steps", 5000, "--snapshot-window", 0]
SLOW_LR = [*TWO_CRITICS, "--lr", 3e-4, "--init-temperature", 0.1, "--random-steps", 1000]
SLOW = [*SLOW_LR, "--polyak", 0.005, "--actor-average", 1, "--alpha-gain", 0.3]


def transfer(seeds, more=FAST):
    """WOMBET against the same agent from scratch, by default flags and those for speed: (script, run folder, flags)."""
    for name, flags in (("scratch", ["--no-prior"]), ("wombet", [])):
        for seed in seeds:
            for env in ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Pusher-v5"):
                yield job("wombet.py", env, name, seed, *flags, *more)


def new_agent(seeds):
    """A new agent in the target task, and D_S imagined alone; from scratch it is what `transfer` runs."""
    for seed in seeds:
        for env in ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"):
            yield job("wombet.py", env, "new-agent", seed, *NEW_AGENT, *FAST)


def two_critics(seeds):
    """The same with two critics, four updates a step, 5,000 random steps and the last source agent as guide."""
    return transfer(seeds, [*TWO_CRITICS, *FAST])


def slow_lr(seeds):
    """Those with an earlier learning rate, first temperature and number of random steps."""
    return transfer(seeds, [*SLOW_LR, *FAST])


def slow_targets(seeds):
    """Those and the defaults before (RLPD's rate of the target networks, no average actor), in plain float32."""
    return transfer(seeds, SLOW)


def fast(seeds):
    """Does learning suffer from what is fast? As in `slow_targets`, where the same seeds ran in plain float32."""
    for seed in seeds:
        for env in ("HalfCheetah-v4", "Pusher-v5"):
            yield job("wombet.py", env, "scratch-fast", seed, "--no-prior", *SLOW, *FAST)


def job(script, env, name, seed, *flags):
    return script, f"{env}__{name}__{seed}", ["--env", env, "--name", name, "--seed", str(seed), *map(str, flags)]


def baselines(seeds):
    """The online baselines against published means: SAC and TD3 at 100,000 steps, PPO (one seed) at 1,000,000. TD3
    begins to learn when the published runs did (the paper's appendix C), not at CleanRL's 25,000 steps."""
    for seed in seeds:
        for env, start in (("HalfCheetah-v4", 10_000), ("Hopper-v4", 1_000)):
            yield job("baselines/sac.py", env, "sac", seed, "--target-steps", 100_000, "--compile")
            yield job("baselines/td3.py", env, "td3", seed, "--target-steps", 100_000, "--random-steps", start)
        if seed == seeds[0]:
            for env in ("Hopper-v4", "Walker2d-v4"):
                yield job("baselines/ppo.py", env, "ppo", seed)


def offline_data(seeds):
    """Mixed-quality data: all that SAC stores on its way to a middling return, one file for every seed of `offline`."""
    yield job("baselines/sac.py", "HalfCheetah-v4", "data", 0, "--target-steps", 30_000, "--save-dataset")


DATASETS = {  # from ROOT, where runs start; D_S is WOMBET's on the same task, relabelled: `slow-targets` leaves it
    "sac": Path("runs", "offline-data", "HalfCheetah-v4__data__0", "dataset.npz"),
    "ds": Path("runs", "slow-targets", "HalfCheetah-v4__wombet__1", "dataset.npz")}


MARKS = 10_000, 20_000  # updates


def offline(seeds):
    """The offline baselines on those files. CQL and COMBO, whose updates take ten times as long, stop at the first mark,
    and take 4 actions a state and distribution, not 10."""
    for data, path in DATASETS.items():
        for name in ("bc", "iql", "awac", "mopo", "cql", "combo"):
            for seed in seeds:
                slow = name in ("cql", "combo")
                yield job(f"baselines/{name}.py", "HalfCheetah-v4", f"{name}-{data}", seed, "--dataset", path,
                          "--offline-updates", MARKS[0] if slow else MARKS[1], "--eval-every", 5_000,
                          *(["--cql-actions", 4] if slow else []))


def offline_table():
    """results/offline/table.csv: returns at the marks, also in units of the data's. The data's is its mean reward times
    an episode's 1,000 steps, for D_S has shorter ones."""
    kept, table = ROOT / "results" / "offline", [("data", "method", "seeds", "updates", "return", "over_data")]
    for data, path in DATASETS.items():
        mean_return = 1000 * float(np.load(ROOT / path)["rewards"].mean())
        table.append((data, "(the data)", "", "", round(mean_return, 1), 1.0))
        groups = {}
        for progress in sorted(kept.glob(f"*-{data}__*/progress.csv")):
            name = progress.parent.name.split("__")[1].removesuffix(f"-{data}")
            with open(progress) as file:
                for row in csv.DictReader(file):
                    if row["phase"] == "offline" and int(row["updates"]) in MARKS:
                        groups.setdefault((name, row["updates"]), []).append(float(row["return_mean"]))
        table += [(data, name, len(returns), updates, round(np.mean(returns), 1),
                   round(np.mean(returns) / mean_return, 3)) for (name, updates), returns in groups.items()]
    with open(kept / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    for row in table:
        print("  ".join(f"{cell!s:<12}" for cell in row))


TOPICS = {"transfer": transfer, "new-agent": new_agent, "two-critics": two_critics, "slow-lr": slow_lr,
          "slow-targets": slow_targets, "fast": fast, "baselines": baselines, "offline-data": offline_data,
          "offline": offline}


def run(topic, script, folder, flags):
    """Starts, continues or skips one run; returns its exit code."""
    out, kept = ROOT / "runs" / topic, ROOT / "results" / topic / folder
    if kept.exists():
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if (out / folder / "checkpoint.pt").exists():
        flags = ["--resume", str(out / folder)]
    else:
        shutil.rmtree(out / folder, ignore_errors=True)  # it has no checkpoint: nothing to continue
        flags = [*flags, "--out", str(out)]
    flags += ["--threads", "1"]  # as many runs as cores: faster together than one after the other on all of them
    with open(out / f"{folder}.log", "a") as log:
        code = subprocess.run([sys.executable, ROOT / script, *flags], cwd=ROOT, stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code == 0:
        kept.mkdir(parents=True)
        for name in ("config.json", "progress.csv", "model_error.csv"):
            if (out / folder / name).exists():  # learning from scratch has no model
                shutil.copy(out / folder / name, kept)
    print(f"{folder}: " + ("done" if code == 0 else f"exit code {code}, see {out / folder}.log"), flush=True)
    return code


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="+", choices=TOPICS, metavar="TOPIC", help=", ".join(TOPICS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args()
    for topic in args.topics:
        with ThreadPoolExecutor(args.jobs) as pool:
            codes = list(pool.map(lambda job: run(topic, *job), TOPICS[topic](args.seeds)))
        if max(codes):
            return max(codes)
        if topic == "offline":
            offline_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())

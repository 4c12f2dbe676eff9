"""The runs behind each figure, a process a core, resumable: what is done is skipped, what was cut short goes on.

    python experiments/reproduce.py transfer --jobs 2

Runs go to runs/<topic>/; config.json, progress.csv and model_error.csv of each go to results/<topic>/ as it ends.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def transfer(seeds):
    """WOMBET against the same agent from scratch, by default flags: (run folder's name, flags)."""
    for seed in seeds:
        for env in ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4", "Pusher-v5"):
            for name, flags in (("wombet", []), ("scratch", ["--no-prior"])):
                yield f"{env}__{name}__{seed}", ["--env", env, "--name", name, "--seed", str(seed), *flags]


TOPICS = {"transfer": transfer}


def run(topic, folder, flags):
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
    with open(out / f"{folder}.log", "a") as log:
        code = subprocess.run([sys.executable, ROOT / "wombet.py", *flags], cwd=ROOT, stdout=log, stderr=log,
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
    parser.add_argument("topic", choices=TOPICS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda job: run(args.topic, *job), TOPICS[args.topic](args.seeds)))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())

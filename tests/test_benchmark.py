"""The speed table: counted operations against a hand count and against what torch performs; the file it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agent import SAC
from experiments import benchmark
from mpc import MPC
from world_model import WorldModel

SCRIPT = Path(benchmark.__file__)


def performed(call):
    """GFLOP of the matrix products that a call performs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def test_rlpd_step_by_hand():
    # multiply-adds of a row; actor 17-3-3-12, critic 23-3-3(-1)
    actor, critic = 17 * 3 + 3 * 3 + 3 * 12, 23 * 3 + 3 * 3
    update = actor + 2 * critic + 2 * (critic + critic + 3 * 3)  # target; online: forward, weights, inner gradient
    actor_update = actor + actor + (3 * 3 + 3 * 12) + 2 * (critic + critic)
    assert benchmark.rlpd_gflop(2, 2, 5, 4, 3) == pytest.approx(2e-9 * 5 * (4 * update + actor_update))
    # the size of facts.md's first row: about 24.5 GFLOP
    assert benchmark.rlpd_gflop(10, 2, 256, 20, 256) == pytest.approx(24.5, rel=0.03)


@pytest.mark.parametrize("critics", [2, 3])
def test_rlpd_step_as_performed(critics):
    agent = SAC(17, 6, n_critics=critics, min_critics=critics, hidden=(8, 8))
    sizes = {"obs": (17,), "action": (6,), "reward": (), "next_obs": (17,), "terminated": (), "uncertainty": ()}
    batch = {key: torch.zeros(4, 5, *size) for key, size in sizes.items()}
    assert performed(lambda: agent.update(batch)) == pytest.approx(benchmark.rlpd_gflop(critics, critics, 5, 4, 8))


def test_model_step_as_performed():
    model = WorldModel(17, 6, 1, members=3, hidden=8, layers=4)
    optimizer = torch.optim.Adam(model.parameters())
    inputs, targets = torch.randn(3, 5, 23), torch.randn(3, 5, 18)
    counted = benchmark.model_gflop(3, 5, 8, 4)
    assert counted == pytest.approx(2e-9 * 3 * 5 * (3 * (23 * 8 + 3 * 64 + 8 * 36) - 23 * 8))
    assert performed(lambda: model.train_step(optimizer, inputs, targets)) == pytest.approx(counted)


@pytest.mark.parametrize("guided", [False, True])
def test_plan_as_performed(guided):
    agent, model = SAC(17, 6, n_critics=2, hidden=(8, 8)), WorldModel(17, 6, 1, members=3, hidden=8, layers=4)
    guide = {"policy": agent.act, "policy_samples": 7, "value": agent.value} if guided else {}
    mpc = MPC(model.step, lambda obs, action, next_obs, features: features[:, 0],
              lambda obs: torch.zeros(len(obs), dtype=torch.bool), 6, horizon=4, population=10, elites=3, iterations=2,
              **guide)
    transitions, gflop = benchmark.plan_work(mpc, 5, 3, sum(benchmark.model_layers(8, 4, 1)), 8, 2)
    assert transitions == 5 * (10 * 2 + (7 if guided else 0)) * 4 * 3
    assert performed(lambda: mpc.plan(torch.randn(5, 17))) == pytest.approx(gflop)


def run(*flags):
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)


def test_table_and_json(tmp_path):
    done = run("--quick", "--repetitions", "1", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {r["row"] for r in report["rows"]} == set("abcde") and not report["skipped"]
    assert report["peak_gflop_per_s"] == max(rate for rate, _ in report["peaks"].values()) > 0
    for r in report["rows"]:
        assert 0 < r["ms_low"] <= r["ms"] <= r["ms_high"] and r["gflop"] > 0
        assert r["share_of_peak"] * report["peak_gflop_per_s"] == pytest.approx(1e3 * r["gflop"] / r["ms"])
        assert r["work"] in done.stdout
        assert (r["steps_per_s"] is not None) == (r["row"] == "e")


def test_scaling(tmp_path):
    done = run("--quick", "--repetitions", "1", "--scaling", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scaling.csv").read_text().count("\n") == 1 + 6 * 2
    assert (tmp_path / "figures" / "scaling.png").stat().st_size > 0


@pytest.mark.parametrize("flags", [["--repetitions", "0"], ["--only", "z"], ["--device", "abacus"], ["--threads", "0"],
                                   ["--clock", "cpu", "--threads", "2"],
                                   ["--json", "no/such/folder.json"], ["--quick", "--flags", "--horizon 0"],
                                   ["--before", "no-such-revision"]])
def test_bad_input_is_one_line(flags, capsys):
    code = benchmark.main(flags)
    error = capsys.readouterr().err.splitlines()
    assert code == 2 and error[-1].startswith("benchmark.py: ")
    assert len([line for line in error if not line.startswith("starting")]) == 1

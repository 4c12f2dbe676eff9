"""The speed table: what it counts, by hand, and the files that it writes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import benchmark

SCRIPT = Path(benchmark.__file__)


def test_a_measurement_of_known_work():
    o = SimpleNamespace(device="cpu", seconds=0.0, repetitions=3)
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    ours, theirs = benchmark.measure([("a", "product", "wombet", lambda: a @ b),
                                      ("a", "product", "peer", lambda: [a @ b for _ in range(300)])], o)
    assert ours["gflop"] == theirs["gflop"] == pytest.approx(2e-9 * 4 * 5 * 6)  # a peer's counts as ours
    assert (ours["by"], theirs["by"], ours["times_ours"]) == ("wombet", "peer", 1.0) and theirs["times_ours"] > 20
    assert len(ours["ms_all"]) == 3 and ours["ms_low"] <= ours["ms"] <= ours["ms_high"]


def run(*flags):
    return subprocess.run([sys.executable, SCRIPT, "--quick", "--repetitions", "1", "--flags=--fast off", *flags],
                          capture_output=True, text=True)


def test_table_and_json(tmp_path):
    done = run("--peers", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {r["row"] for r in report["rows"]} == set("abcde") and report["peak_gflop_per_s"] > 0
    for r in report["rows"]:
        assert 0 < r["ms_low"] <= r["ms"] <= r["ms_high"] and r["gflop"] > 0
        assert r["work"] in done.stdout
    # two critic updates and one of the actor, N = M = 2, a batch of 32, widths of 32, by hand; multiply-adds of a row
    actor, critic = 17 * 32 + 32 * 32 + 32 * 12, 23 * 32 + 32 * 32
    update = actor + 2 * critic + 2 * (critic + critic + 32 * 32)  # target; online: forward, weights, inner gradient
    actor_update = actor + actor + (32 * 32 + 32 * 12) + 2 * (critic + critic)
    assert report["rows"][0]["gflop"] == pytest.approx(2e-9 * 32 * (2 * update + actor_update))
    for peer in ("stable_baselines3", "sbx", "mbrl"):  # measured, or named as missing
        assert peer in done.stdout


@pytest.mark.slow
def test_scaling(tmp_path):
    done = run("--scaling", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scaling.csv").read_text().count("\n") == 1 + 5 * 2
    assert (tmp_path / "figures" / "scaling.png").stat().st_size > 0


@pytest.mark.parametrize("flags", [["--repetitions", "0"], ["--only", "z"], ["--threads", "0"],
                                   ["--json", "no/such/folder.json"], ["--quick", "--flags=--device abacus"],
                                   ["--quick", "--flags=--horizon 0"], ["--flags=--no-prior"],
                                   ["--flags=--env Walker2d-v4"], ["--quick", "--scaling"],
                                   ["--quick", "--scaling", "x", "--only", "a"], ["--quick", "--scaling", "x", "--peers"],
                                   ["--quick", "--scaling", str(SCRIPT.parent / ".." / "results")]])
def test_bad_input_is_one_line(flags, capsys):
    code = benchmark.main(flags)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("benchmark.py: ") and error.count("\n") == 1


def test_what_cannot_be_written_is_said_after_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "benchmark", lambda args: {})
    monkeypatch.setattr(benchmark, "table", lambda report: ["the table"])
    assert benchmark.main(["--json", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "the table\n" and said.err.startswith("benchmark.py: ") and said.err.count("\n") == 1

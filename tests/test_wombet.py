"""The whole loop, end to end, on the real environment at a size that takes seconds: flags, files, resume, bad input."""

import contextlib
import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import harness
import task_env
import tasks
import wombet
from harness import COLUMNS, Log, load_log_and_generators, log_and_generators, must_match, recent_return
from replay import ReplayBuffer

TINY = """--source-steps 150 --target-steps 120 --eval-every 60 --eval-episodes 2 --checkpoint-every 50
          --random-steps 60 --snapshot-window 40 --hidden 32 --model-hidden 32 --model-layers 2 --model-epochs 2
          --refit-epochs 1 --refit-every 40 --imagine-every 20 --rollouts 12 --rollout-length 3
          --offline-capacity 100 --members 3 --return-percentile 30 --u-percentile 50
          --imagined-trajectories 8 --imagined-length 10
          --population 8 --elites 4 --policy-samples 4 --batch-size 16
          --utd 2 --device cpu --threads 1""".split()


def run(out, *flags, name="a", env="Hopper-v4"):
    """Runs wombet.py on Hopper; returns its exit code and its folder."""
    code = wombet.main(["--env", env, "--out", str(out), "--name", name, *TINY, *map(str, flags)])
    return code, out / f"{env}__{name}__0"


def rows(folder, skip=("wall_clock",)):
    with open(folder / "progress.csv") as file:
        return [{key: value for key, value in row.items() if key not in skip} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One run by TINY's flags, which the others compare with or take the source phase from."""
    code, folder = run(tmp_path_factory.mktemp("base"))
    assert code == 0
    return folder


def test_a_run_leaves_what_the_readme_says(base, capsys):
    table = rows(base)
    assert list(table[0]) == [c for c in COLUMNS if c != "wall_clock"]
    assert [(r["phase"], r["source_steps"], r["env_steps"]) for r in table] == [
        ("source", "60", "0"), ("source", "120", "0"), ("source", "150", "0"), ("target", "150", "0"),
        ("target", "150", "60"), ("target", "150", "120")]
    assert [int(r["updates"]) for r in table] == [0, 120, 180, 0, 120, 240]  # 2 per step; none in the 60 random ones
    config = json.loads((base / "config.json").read_text())
    assert config["flags"]["source_steps"] == 150 and set(config["versions"]) == {
        "python", "torch", "gymnasium", "mujoco", "numpy"}

    data = np.load(base / "dataset.npz")
    n = len(data["rewards"])
    assert n == int(table[-1]["offline_size"]) > 0
    assert {key: data[key].shape for key in data} == {
        "observations": (n, 11), "actions": (n, 3), "rewards": (n,), "next_observations": (n, 11), "terminals": (n,),
        "timeouts": (n,), "uncertainty": (n,), "features": (n, 1)}
    # relabelled with the target's reward: Hopper's, written out
    target = data["features"][:, 0] + 1.0 - 1e-3 * np.square(data["actions"]).sum(1)
    np.testing.assert_allclose(data["rewards"], target, rtol=1e-5, atol=1e-5)

    capsys.readouterr()
    assert wombet.main(["--evaluate", str(base)]) == 0
    assert f"return {float(table[-1]['return_mean']):.1f} ±" in capsys.readouterr().out


def test_the_live_line(tmp_path, capsys):
    """It says nothing of speed and time left before the first step of a phase."""
    log = wombet.Log(tmp_path / "progress.csv")
    log.pace = (wombet.time.time() - 2.0, 100)
    log.live("target", 100, 400, "return 1.0", force=True)
    log.live("target", 300, 400, "return 2.0", force=True)
    first, second = capsys.readouterr().out.splitlines()
    assert "left" not in first and "return 1.0" in first
    assert "100 steps/s    0:01 left  return 2.0" in second or "100 steps/s    0:00 left  return 2.0" in second


def test_a_round_of_planning_has_a_live_line_of_its_own(tmp_path, capsys, monkeypatch):
    """With --preset paper a round takes the better part of an hour; the loop's pace stays as it is."""
    monkeypatch.setattr(harness, "on_terminal", lambda: True)
    log, now = Log(tmp_path / "progress.csv"), [1000.0]
    monkeypatch.setattr(harness.time, "time", lambda: now[0])
    log.pace = pace = (900.0, 50)
    act = log.counted(lambda x: 2 * x, "plan", 4)
    for x in range(4):
        assert act(x) == 2 * x
        now[0] += 10.0
    lines = capsys.readouterr().out.replace("\033[K", "").split("\r")[1:]
    assert [line.split()[:2] for line in lines] == [["plan", f"{k}/4"] for k in range(4)]
    assert "left" not in lines[0] and "0.10 steps/s    0:20 left" in lines[2]
    assert log.pace == pace


def test_same_seed_same_numbers_other_seed_others(base, tmp_path):
    _, again = run(tmp_path)
    assert rows(again) == rows(base)
    returns = []
    for seed in ("0", "1"):
        wombet.main(["--env", "Hopper-v4", "--out", str(tmp_path), "--name", "s", "--seed", seed, *TINY, "--no-prior",
                     "--target-steps", "70"])
        returns.append(rows(tmp_path / f"Hopper-v4__s__{seed}")[-1]["return_mean"])
    assert returns[0] != returns[1]


def interrupt_at(monkeypatch, step):
    """Sends SIGINT during that step of the training environments (evaluation and resets for D_S take others)."""
    count, original = [0], task_env.TaskEnv.step

    def counted(env, action):
        trains = not getattr(env, "evaluates", False)
        count[0] += trains
        if trains and count[0] == step:
            signal.raise_signal(signal.SIGINT)
        return original(env, action)

    def marked(act, envs, *rest, evaluate=task_env.evaluate):
        for env in envs:
            env.evaluates = True
        return evaluate(act, envs, *rest)

    monkeypatch.setattr(task_env.TaskEnv, "step", counted)
    monkeypatch.setattr("harness.evaluate", marked)


@pytest.mark.parametrize("flags, step", [
    ([], 77), ([], 150 + 63), (["--imagine-with", "mpc", "--td-error", "signed", "--target-steps", 75], 63)])
def test_stop_and_resume_equals_the_uninterrupted_run(base, tmp_path, monkeypatch, flags, step):
    flags = flags and ["--source-run", base, *flags]
    whole = run(tmp_path / "whole", *flags)[1] if flags else base
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        code, stopped = run(tmp_path, *flags)
    assert code == 130
    assert len(rows(stopped)) < len(rows(whole))
    assert wombet.main(["--resume", str(stopped)]) == 0
    assert rows(stopped) == rows(whole)
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (stopped, whole))
    assert torch.equal(ours["torch_rng"], theirs["torch_rng"])


@pytest.mark.parametrize("there", [True, False])
def test_a_macs_generator_is_in_the_checkpoint(tmp_path, monkeypatch, there):
    """No Mac runs this: PyTorch's functions are stood in for."""
    states = [torch.tensor([3, 5], dtype=torch.uint8)]
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: there)
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: states[-1])
    monkeypatch.setattr("torch.mps.set_rng_state", states.append)
    a_run = SimpleNamespace(log=Log(tmp_path / "progress.csv"), rng=np.random.default_rng(0))
    torch.save(log_and_generators(a_run), tmp_path / "state.pt")
    load_log_and_generators(a_run, torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(states) == 1 + there and torch.equal(states[-1], states[0])


def test_a_mac_takes_a_checkpoint_from_elsewhere(tmp_path, monkeypatch):
    """It has no state for the Mac's generator, which then goes on as it is."""
    a_run, states = SimpleNamespace(log=Log(tmp_path / "progress.csv"), rng=np.random.default_rng(0)), []
    elsewhere = log_and_generators(a_run)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: torch.tensor([3], dtype=torch.uint8))
    monkeypatch.setattr("torch.mps.set_rng_state", states.append)
    must_match(elsewhere, log_and_generators(a_run))
    load_log_and_generators(a_run, elsewhere)
    assert not states


def test_more_source_steps_after_a_stop_in_the_last_one(tmp_path, monkeypatch):
    """The last agent goes on, not the best one, which only the model and the target task start from."""
    _, whole = run(tmp_path / "whole", "--source-steps", 200, "--target-steps", 20)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 150)
        code, stopped = run(tmp_path, "--target-steps", 20)
    assert code == 130 and wombet.main(["--resume", str(stopped), "--source-steps", "200"]) == 0
    wanted = [row for row in rows(whole) if row["source_steps"] in ("180", "200")]
    assert [row for row in rows(stopped) if row["source_steps"] in ("180", "200")] == wanted


@pytest.mark.parametrize("fast, precision", [("off", "highest"), ("auto", "high")])
def test_fast(tmp_path, capsys, fast, precision):
    """What the flag stands for is in force and in config.json; a short run is not compiled."""
    code, folder = run(tmp_path, "--no-prior", "--target-steps", 70, "--fast", fast)
    speed = json.loads((folder / "config.json").read_text())["speed"]
    assert code == 0 and torch.get_float32_matmul_precision() == precision == speed["precision"]
    assert speed["compile"] is False and f"not compiled, products in {speed['dtype']} (--fast {fast})" in (
        capsys.readouterr().out)


def test_fast_keeps_float32_products_on_the_cpu():
    """Of the first layers, say, where 8 bits would not tell one state from the next (a processor with AMX could)."""
    torch.set_float32_matmul_precision(wombet.parse_args(["--fast", "on", "--device", "cpu"]).speed["precision"])
    x, weight = torch.randn(128, 64), torch.randn(64, 256)
    exact = x.double() @ weight.double()
    assert (x @ weight - exact).abs().max() < 1e-4 < (x.bfloat16() @ weight.bfloat16() - exact).abs().max()


def test_what_fast_stands_for(monkeypatch):
    long = ["--source-steps", "40000"]
    settings = lambda *flags: wombet.parse_args([*flags, "--device", "cpu"]).speed
    for bfloat16 in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
        assert settings()["dtype"] == ("bfloat16" if bfloat16 else "float32")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++")
    assert settings(*long)["compile"] and settings("--fast", "on") == {
        "compile": True, "dtype": "bfloat16", "precision": "high"}
    before = ["--source-run", "x", "--target-steps", "1", "--pretrain-updates", "16000"]
    assert settings(*before)["compile"]
    for short in (["--no-prior"], ["--offline-data", "x"], ["--source-run", "x"]):  # no source phase is learned
        assert not settings(*short, "--target-steps", "3000")["compile"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not settings(*long)["compile"]
    with pytest.raises(ValueError, match="compiler"):
        settings("--fast", "on")


MEMORY = """
import resource, sys, wombet
from pathlib import Path
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
args = wombet.parse_args(["--env", "HalfCheetah-v4", "--target-steps", "1000000", "--source-steps", "20000", "--fast", "off", "--eval-episodes", "1",
                          "--model-hidden", "16", "--model-batch-size", "4096"])
run = wombet.build(args, Path(sys.argv[1]))
for _ in range(1000):
    wombet.torch.manual_seed(0)
    run.target.buffer.add(**{k: wombet.torch.rand(1000, *v.shape[1:]) for k, v in run.target.buffer.data.items()})
run.source.buffer.add(**run.target.buffer.sample(20_000))
run.offline_data.add(**run.target.buffer.sample(50_000))
before = peak()
for _ in range(20):
    wombet.update(run, run.target)
print(before, peak() - before)
wombet.fit(run, 1)
wombet.save(run.dir / "checkpoint.pt", wombet.state_dict(run))
print(peak())
"""


@pytest.mark.slow
def test_memory_of_a_long_run(tmp_path):
    """1,020,000 real transitions and 50,000 in D_S: an update takes no copy of them, fit and checkpoint stay small."""
    root = Path(wombet.__file__).parent
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], cwd=root, capture_output=True, text=True)
    filled, update, whole = map(float, done.stdout.split() and [w for w in done.stdout.split() if w[0].isdigit()][:2]
                                + [done.stdout.split()[-1]])
    assert filled < 1.0 and update < 0.05 and whole < 2.0  # GiB


def test_recent_return_by_hand():
    buffer = ReplayBuffer(20, reward=(), terminated=(), timeout=())
    for length, reward, key in ((4, 1.0, "terminated"), (3, 2.0, "timeout"), (5, -1.0, "terminated"), (2, 9.0, "none")):
        for step in range(length):
            last = step == length - 1
            buffer.add(reward=reward, terminated=last and key == "terminated", timeout=last and key == "timeout")
    # the episodes end at the 4th, 7th and 12th of 14 steps; the fourth is still running
    assert recent_return(buffer, 3) == -5.0
    assert recent_return(buffer, 8) == (6 - 5) / 2
    assert recent_return(buffer, 14) == recent_return(buffer, 100) == (4 + 6 - 5) / 3


@pytest.mark.parametrize("window", [0, 40])
def test_the_source_agent_that_goes_on(tmp_path, monkeypatch, window):
    """The last one, or the one whose recent training episodes returned most."""
    seen, original = [], wombet.update

    def watched(run, side):
        info = original(run, side)
        if side is run.source:
            seen.append((side.env.obs is None, recent_return(side.buffer, 40), side.agent.log_temperature.item()))
        return info

    monkeypatch.setattr(wombet, "update", watched)
    code, folder = run(tmp_path, "--snapshot-window", window, "--target-steps", 1)
    assert code == 0 and len(seen) == 90
    kept = torch.load(folder / "source.pt", weights_only=True)["source"]["agent"]["log_temperature"].item()
    ended = [(mean, -k) for k, (over, mean, _) in enumerate(seen) if over and k >= 39]  # of 60 + 40 steps on
    best = -max(ended)[1]
    assert best != len(seen) - 1  # else the two would be one
    assert kept == seen[best if window else -1][2]


def test_more_steps_of_a_finished_run(base, tmp_path, monkeypatch):
    """As if it had had them from the start, with the refit and the round of its 120th step; and what it was is kept."""
    folder = shutil.copytree(base, tmp_path / base.name)
    _, whole = run(tmp_path / "whole", "--target-steps", 160)
    monkeypatch.setattr(sys, "argv", ["wombet.py", "--resume"])
    for steps in ("140", "160"):
        assert wombet.main(["--resume", str(folder), "--target-steps", steps]) == 0
    assert [row for row in rows(folder) if row["env_steps"] != "140"] == rows(whole)
    assert wombet.main(["--resume", str(folder), "--lr", "0.1"]) == 0  # nothing is left to do with it
    first, last = (json.loads((of / "config.json").read_text()) for of in (base, folder))
    assert last["flags"]["lr"] == first["flags"]["lr"]
    assert "before" not in first and last["command"] == "wombet.py --resume"
    kept = ("flags", "speed", "commit", "command", "versions", "machine")
    of_140 = {**last, "flags": {**last["flags"], "target_steps": 140}}
    assert last["before"] == [{key: of[key] for key in kept} for of in (first, of_140)]


TARGET_FLAGS = {
    "nothing": [],
    "fixed share": ["--alpha-rule", "fixed", "--alpha", "0.25"], "no imagination": ["--alpha-rule", "fixed", "--alpha", "0"],
    "signed TD error": ["--td-error", "signed", "--alpha-gain", "3"],
    "filter by return": ["--filter", "return"], "filter by u": ["--filter", "uncertainty"],
    "no filter": ["--filter", "none"],
    "thresholds": ["--return-threshold", "-1000", "--u-threshold", "1000"],
    "no refit": ["--refit-every", "0"], "refit on D_S": ["--refit-on-imagined"],
    "the first round alone": ["--imagine-every", "0"], "MPC's rounds": ["--imagine-with", "mpc"],
    "new agent": ["--no-warm-start"], "without real source data": ["--no-keep-source-data"],
    "D_S from the environment": ["--generate-in", "env"],
    "other rollouts": ["--rollouts", "20", "--rollout-length", "2"],
    "a small D_S": ["--offline-capacity", "81"],
}


@pytest.mark.parametrize("flags", TARGET_FLAGS.values(), ids=TARGET_FLAGS)
def test_target_flags(base, tmp_path, no_float64, flags):
    """Each flag runs on a shared source phase, and changes what the run does in its first 60 steps; none does not, and
    makes no float64 tensor."""
    with contextlib.nullcontext() if flags else no_float64:
        code, folder = run(tmp_path, "--source-run", base, "--target-steps", 60, *flags)
    assert code == 0
    ours, theirs = rows(folder), rows(base)[:5]
    assert len(ours) == 5
    assert ours[:3] == theirs[:3]  # the source phase is the other run's
    assert (ours[4:] != theirs[4:]) == bool(flags)
    if "--no-warm-start" not in flags:
        assert ours[3]["return_mean"] == theirs[3]["return_mean"]  # row 0 is the source's agent
    if "fixed" in flags:
        assert {r["alpha"] for r in ours[3:]} == {str(float(flags[-1]))}
    if flags and flags[-1] == "0" and "--alpha" in flags:
        assert ours[-1]["offline_size"] == "0" and not (folder / "dataset.npz").exists()
    if "none" in flags or "-1000" in flags:  # all pass but those without a single trusted step
        assert float(ours[-1]["acceptance"]) >= 0.75 > float(theirs[-1]["acceptance"])
    if "--imagine-every" in flags:
        assert len({r["offline_size"] for r in ours[3:]}) == 1
    if "env" in flags:
        assert int(ours[-1]["source_steps"]) > 150


@pytest.mark.parametrize("flags", [[], ["--alpha-rule", "fixed", "--alpha", "0"]])
def test_pretraining(base, tmp_path, monkeypatch, flags):
    """Updates before the first target step, evaluated every 60 of them, with a round every 20 of the actor's."""
    rounds, imagine_policy = [], wombet.imagine_policy
    monkeypatch.setattr(wombet, "imagine_policy", lambda run: (rounds.append(run.target.updates), imagine_policy(run)))
    code, folder = run(tmp_path, "--source-run", base, "--pretrain-updates", 130, "--target-steps", 60, *flags)
    assert code == 0
    ours, theirs = rows(folder), rows(base)
    offline, target = ([r for r in ours if r["phase"] == phase] for phase in ("offline", "target"))
    assert [(r["env_steps"], r["updates"]) for r in offline] == [("0", k) for k in ("0", "60", "120", "130")]
    assert [r["updates"] for r in target] == ["130", "250"]
    returns = [r["return_mean"] for r in (*offline, target[0])]
    assert returns[0] == theirs[3]["return_mean"]  # the source's agent
    assert returns[0] != returns[-2] == returns[-1]  # the one that learned
    assert rounds[:3] == ([] if flags else [40, 80, 120])


@pytest.mark.parametrize("kind, coverage", [
    ("std", 0.95), ("std", 0.0), ("max-distance", 0.95), ("variance", 0.5), ("aleatoric", 0.95)])
def test_a_shared_source_phase_is_calibrated_anew(base, tmp_path, kind, coverage):
    """The model of another run has the scale of that run's u; with the same flags it stays as it is."""
    _, folder = run(tmp_path, "--source-run", base, "--uncertainty", kind, "--coverage", coverage, "--target-steps", 1)
    scale = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]["scale"].item()
    shared = torch.load(base / "source.pt", weights_only=True)["model"]["scale"].item()
    assert (scale == 1) == (coverage == 0) and (scale == shared) == (kind == "std" and coverage == 0.95)


def has(thing, **values):
    """Whether these are the thing's attributes."""
    return {name: getattr(thing, name) for name in values} == values


def test_flags_reach_their_component(tmp_path):
    """Each as it is given, none as its default; what it does there is that component's test."""
    flags = """--horizon 4 --population 9 --elites 7 --iterations 3 --momentum 0.35 --init-std 0.45 --noise-beta 1.5
               --keep-elites 0.6 --discount 0.9 --plan-penalty-coef 2.5 --replan-every 2 --policy-samples 6 --members 3
               --critics 6 --min-critics 4 --actor-q min --actor-average 0.2 --lr 0.01 --polyak 0.3
               --init-temperature 0.7 --target-entropy -2 --no-backup-entropy --no-actor-entropy --no-layer-norm
               --target-penalty-coef 1.5 --no-floor-penalty --hidden 24 --model-hidden 12 --model-layers 4
               --uncertainty variance --coverage 0.8 --alpha-gain 0.3 --alpha-min 0.1 --alpha-max 0.6 --alpha-ema 0.02
               --td-error signed --offline-capacity 20000 --source-steps 1100 --target-steps 500 --device cpu
               --fast off""".split()
    build = lambda *given: wombet.build(wombet.parse_args(list(given)), tmp_path)
    found = build(*flags)
    agents, model = (found.source.agent, found.target.agent), found.model
    assert has(wombet.planner(found), horizon=4, population=9, elites=7, iterations=3, momentum=0.35, init_std=0.45,
               noise_beta=1.5, n_keep=4, discount=0.9, penalty_coef=2.5, execute_steps=2, policy_samples=6,
               particles=1, model=model.step, policy=agents[0].propose, value=agents[0].value, action_dim=6)
    for agent in agents:
        assert has(agent, n_critics=6, min_critics=4, actor_q="min", actor_average=0.2, discount=0.9, polyak=0.3,
                   target_entropy=-2.0, backup_entropy=False, actor_entropy=False, penalty_coef=1.5,
                   floor_penalty=False)
        assert agent.log_temperature.exp().item() == pytest.approx(0.7) and not agent.critic.layer_norm
        groups = agent.actor_optimizer.param_groups + agent.critic_optimizer.param_groups
        assert {group["lr"] for group in groups} == {0.01}
        assert agent.critic.weights[1].shape == (6, 24, 24)
    assert has(model, members=3, uncertainty_kind="variance", coverage=0.8) and len(model.weights) == 5
    assert model.weights[1].shape == (3, 12, 12)
    assert has(found.mix, gain=0.3, alpha_min=0.1, alpha_max=0.6, ema=0.02, fixed=None, signed=True)
    assert found.offline_data.capacity == 20000 and found.source.buffer.capacity == 1100
    assert found.target.buffer.capacity == 1100 + 500

    other = build(*flags, "--expectation", "members", "--no-guide", "--min-critics", "0", "--no-keep-source-data")
    assert has(wombet.planner(other), particles=3, model=other.model.member_step, policy=None, value=None,
               policy_samples=0)
    assert other.target.agent.min_critics == 6 and other.target.buffer.capacity == 500
    fixed = build("--alpha-rule", "fixed", "--alpha", "0.3", "--fast", "off")
    assert has(fixed.mix, fixed=0.3, signed=False)


STOP = KeyError("seen enough")


def until(monkeypatch, tmp_path, name, watch, *flags):
    """Runs with wombet.`name` replaced by watch(original, *arguments), which may raise STOP."""
    original = getattr(wombet, name)
    monkeypatch.setattr(wombet, name, lambda *args: watch(original, *args))
    try:
        return run(tmp_path, *flags)
    except KeyError as error:
        assert error is STOP


@pytest.fixture(scope="module")
def backward(tmp_path_factory):
    """A source run whose reward differs from the target's everywhere."""
    code, folder = run(tmp_path_factory.mktemp("backward"), "--source", "backward", "--target-steps", 1)
    assert code == 0
    return folder


def test_each_step_uses_the_right_tasks_reward(backward, tmp_path, monkeypatch):
    """The planner and J see r_S; D_S and the pool hold r_T. Backwards, the two have opposite speeds."""
    r_t = lambda d: d["features"][..., 0] + 1.0 - 1e-3 * d["action"].square().sum(-1)
    r_s = lambda d: -d["features"][..., 0] + 1.0 - 1e-3 * d["action"].square().sum(-1)

    seen, score = [], wombet.score_trajectories

    def watch_imagine(original, run):
        seen.append(original(run))
        planned = wombet.planner(run).reward(*(seen[0][key] for key in ("obs", "action", "next_obs", "features")))
        torch.testing.assert_close(planned, r_s(seen[0]))
        return seen[0]

    def watch_score(reward, uncertainty, valid, terminated, discount):
        assert discount == 0.99 and uncertainty is seen[0]["uncertainty"]
        torch.testing.assert_close(reward, r_s(seen[0]))
        seen.append(reward)
        returns, mean_u = score(reward, uncertainty, valid, terminated, discount)
        whole = valid.all(1)
        by_hand = (r_s(seen[0]) * 0.99 ** torch.arange(10)).sum(1)
        torch.testing.assert_close(returns[whole], by_hand[whole])
        assert whole.any()
        return returns, mean_u

    flags = ["--source-run", backward, "--source", "backward", "--target-steps", 60]
    with monkeypatch.context() as patch:
        patch.setattr(wombet, "score_trajectories", watch_score)
        assert until(patch, tmp_path, "imagine_mpc", watch_imagine, *flags)[0] == 0 and len(seen) == 2
    first = np.load(tmp_path / backward.name / "first_dataset.npz")
    np.testing.assert_allclose(first["rewards"], r_t({"features": torch.from_numpy(first["features"]),
                                                      "action": torch.from_numpy(first["actions"])}), rtol=1e-5)
    state = torch.load(tmp_path / backward.name / "checkpoint.pt", weights_only=True)
    for rows_of in (state["offline_data"]["rows"], state["target"]["buffer"]["rows"]):
        torch.testing.assert_close(rows_of["reward"], r_t(rows_of))
    assert not state["target"]["buffer"]["rows"]["uncertainty"].any()  # real data are not penalised
    assert (state["offline_data"]["rows"]["uncertainty"] > 0).all()


def test_a_refit_is_on_all_real_data_and_measures_D_S_anew(base, tmp_path, monkeypatch):
    """The source's rows and then the target's, every tenth held out; and the limit of trust is of the source's."""
    fit, seen = wombet.WorldModel.fit, []

    def watch(model, **given):
        seen.append(given)
        return fit(model, **given)

    monkeypatch.setattr(wombet.WorldModel, "fit", watch)
    _, folder = run(tmp_path, "--source-run", base, "--imagine-every", "0", "--target-steps", 45)
    found = wombet.build(wombet.parse_args(["--evaluate", str(folder)]), folder)
    wombet.load_state_dict(found, torch.load(folder / "checkpoint.pt", weights_only=True))
    given, = seen
    source, target = found.source.buffer.filled(), found.target.buffer.filled()
    for key in ("obs", "action", "next_obs", "features"):
        assert torch.equal(given[key], torch.cat([source[key], target[key][150:190]]))
    assert given["held_out"].nonzero().flatten().tolist() == list(range(0, 190, 10))
    data = found.offline_data.filled()
    torch.testing.assert_close(data["uncertainty"], found.model.uncertainty(data["obs"], data["action"]))
    u = found.model.uncertainty(source["obs"], source["action"])
    found.args.trust_percentile = 60.0
    assert (u <= wombet.trust_limit(found)).float().mean().item() == pytest.approx(0.6, abs=0.05)


def test_a_refit_on_D_S_and_D_T_alone(base, tmp_path, monkeypatch):
    """--refit-on-imagined is section 4.1's D: without the source's real data, unless they are among D_T's."""
    fit, seen = wombet.WorldModel.fit, []
    monkeypatch.setattr(wombet.WorldModel, "fit", lambda self, **given: (seen.append(given), fit(self, **given))[1])
    for flags, pooled in ((["--no-keep-source-data"], 0), ([], 150)):
        seen.clear()
        code, _ = run(tmp_path, "--source-run", base, "--refit-on-imagined", *flags, "--target-steps", 85,
                      name=f"pool{pooled}")
        assert code == 0
        source = torch.load(base / "source.pt", weights_only=True)["source"]["buffer"]["rows"]
        for given, n_target in zip(seen, (40, 80), strict=True):
            # imagined states stay within the range of real ones alone, the source's too
            assert len(given["bounds"]) == 2 * (150 + n_target)
            assert torch.equal(given["bounds"][:300], torch.cat([source["obs"], source["next_obs"]]))
            assert pooled + n_target < len(given["obs"]) <= pooled + n_target + 100  # D_S holds 100 at most
            assert given["held_out"].nonzero().flatten().tolist() == list(range(0, pooled + n_target, 10))


def test_a_taken_source_phase_is_named(base, tmp_path, capsys):
    """A run that took another's source phase leaves none itself: advice and messages name the other."""
    code, folder = run(tmp_path, "--source-run", base, "--u-threshold", "-1", "--return-threshold", "99", name="b")
    assert code == 2 and f"--source-run {base} and" in capsys.readouterr().err
    assert run(tmp_path, "--source-run", folder, name="c")[0] == 2
    error = capsys.readouterr().err
    assert "source_run" in error and error.count("\n") == 1


def test_thresholds_are_held_over_rounds(base, tmp_path, monkeypatch):
    """They are set once, by the percentiles of the flags."""
    seen, asked, accept, thresholds = [], [], wombet.accept, wombet.thresholds

    def watch_accept(returns, mean_u, *rest):
        seen.append(rest[:2])
        return accept(returns, mean_u, *rest)

    def watch_thresholds(returns, mean_u, *rest):
        asked.append(rest)
        return thresholds(returns, mean_u, *rest)

    monkeypatch.setattr(wombet, "accept", watch_accept)
    monkeypatch.setattr(wombet, "thresholds", watch_thresholds)
    assert run(tmp_path, "--source-run", base, "--imagine-with", "mpc", "--target-steps", 65)[0] == 0
    assert len(seen) > 3 and len(set(seen)) == 1
    assert asked == [(30.0, 50.0, None, None, "dual")]


def test_what_passes_the_filter_makes_the_first_D_S(base):
    table, first = rows(base), np.load(base / "first_dataset.npz")
    ends = (first["terminals"] | first["timeouts"]).sum()
    assert table[3]["td_error"] == "" and float(table[3]["alpha"]) == 0.5
    assert 0 < ends == round(8 * float(table[3]["acceptance"])) < 8


def test_each_batch_has_the_share_alpha_which_follows_the_td_error(base, tmp_path, monkeypatch):
    alphas, seen, sac_update = [], [], wombet.SAC.update

    def watch_sac(agent, batch, n_offline):
        seen.append(n_offline)
        return sac_update(agent, batch, n_offline)

    def watch_update(original, run, side):
        alphas.append(run.mix.alpha)
        return original(run, side)

    monkeypatch.setattr(wombet.SAC, "update", watch_sac)
    flags = ["--alpha-gain", "0.2", "--alpha-min", "0", "--alpha-max", "0.9", "--alpha-ema", "0.3"]
    _, folder = until(monkeypatch, tmp_path, "update", watch_update, "--source-run", base, "--target-steps", 60, *flags)
    assert seen == [round(16 * alpha) for alpha in alphas] and len(set(seen)) > 2
    row = rows(folder)[4]
    assert float(row["alpha"]) == pytest.approx(0.2 * float(row["td_error"]))
    assert 0 < float(row["alpha"]) < 0.9  # not clipped


def test_what_is_stored_is_what_the_environment_did(base):
    """The source's steps again, in an environment of its seed: each column, falls too; random actions, then the
    actor's."""
    stored = torch.load(base / "source.pt", weights_only=True)["source"]["buffer"]["rows"]
    env, rng = task_env.TaskEnv("Hopper-v4", "near", seed=1), np.random.default_rng(0)
    for k, action in enumerate(stored["action"].numpy()):
        if k < 60:
            np.testing.assert_array_equal(action, rng.uniform(-1.0, 1.0, 3).astype(np.float32))
        obs = env.reset() if env.obs is None else env.obs
        next_obs, reward, terminated, truncated, features = env.step(action)
        for key, value in (("obs", obs), ("next_obs", next_obs), ("reward", reward), ("terminated", terminated),
                           ("timeout", truncated and not terminated), ("features", features), ("uncertainty", 0.0)):
            np.testing.assert_array_equal(stored[key][k], np.float32(value), err_msg=f"{key} of step {k}")
        if terminated or truncated:
            env.obs = None
    assert 3 < stored["terminated"].sum() < 75


def test_one_pool_of_real_data(base, tmp_path):
    """The source's transitions come first and whole, with the target's reward; D_S is imagined alone, and bounded."""
    source = torch.load(base / "source.pt", weights_only=True)["source"]["buffer"]["rows"]
    state = torch.load(base / "checkpoint.pt", weights_only=True)
    pool = state["target"]["buffer"]["rows"]
    for key in ("obs", "action", "next_obs", "terminated", "timeout", "features"):
        assert torch.equal(pool[key][:150], source[key])
    assert len(pool["obs"]) == 150 + 120 and len(state["offline_data"]["rows"]["obs"]) == 100
    _, without = run(tmp_path, "--source-run", base, "--no-keep-source-data", "--target-steps", 20)
    alone = torch.load(without / "checkpoint.pt", weights_only=True)["target"]["buffer"]["rows"]
    assert len(alone["obs"]) == 20


def test_the_policys_rounds(base, tmp_path, monkeypatch):
    """From real states, half of them the target's once there are some, a few steps each within the limit of trust, by
    the target's agent, with the model as it is."""
    starts, asked, imagine = [], [], wombet.imagine

    def watch_imagine(step, terminated, act, obs, length, limit):
        asked.append((act, len(obs), length, limit))
        return imagine(step, terminated, act, obs, length, limit)

    def watch(original, run):
        n, size = run.target.step, run.offline_data.size
        original(run)
        assert asked[-1] == (run.target.agent.act, 12, 1, 1e9)
        new = run.offline_data.filled()["obs"]
        pool = run.target.buffer.filled()["obs"]
        is_source = lambda obs: (obs[:, None] == run.source.buffer.filled()["obs"][None]).all(-1).any(1)
        is_target = lambda obs: (obs[:, None] == pool[run.pooled:][None]).all(-1).any(1) if n else torch.zeros(len(obs))
        starts.append((n, size, is_source(new).sum().item(), is_target(new).sum().item()))

    monkeypatch.setattr(wombet, "imagine", watch_imagine)
    monkeypatch.setattr(wombet, "trust_limit", lambda run: 1e9)
    code, _ = until(monkeypatch, tmp_path, "imagine_policy", watch, "--source-run", base, "--rollout-length", "1",
                    "--offline-capacity", "500")
    assert code == 0 and [s[0] for s in starts] == [20, 40, 60, 80, 100]
    assert len(asked) == 1 + 5  # the first D_S is the planner's
    assert starts[-1][2] >= 25 and starts[-1][3] >= 25  # five rounds of six each, beside the first D_S


def test_the_share_of_trajectories_that_start_from_resets(base, tmp_path, monkeypatch):
    """A quarter of eight; the others start from states of the source data. They move as the planner's candidates do."""
    seen, steps = [], []

    def watch(original, step, terminated, act, obs, length, limit):
        seen.append(obs)
        steps.append(step.__name__)
        raise STOP

    until(monkeypatch, tmp_path, "imagine", watch, "--source-run", base, "--reset-share", 0.25)
    source = torch.load(base / "source.pt", weights_only=True)["source"]["buffer"]["rows"]["obs"]
    known = (seen[0][:, None] == source[None]).all(-1).any(1)
    assert known.tolist() == [False] * 2 + [True] * 6
    until(monkeypatch, tmp_path, "imagine", watch, "--source-run", base, "--expectation", "members", "--name", "b")
    assert steps == ["step", "member_step"]


@pytest.mark.parametrize("warm", [True, False])
def test_the_agent_that_starts_in_the_target_task(base, tmp_path, monkeypatch, warm):
    """The source's, its optimisers and temperature too, which then go on apart; or one that has learnt nothing."""
    def state(agent):
        return {k: v.clone() for k, v in agent.critic.state_dict().items()} | {
            "temperature": agent.log_temperature.detach().clone(),
            "moment": agent.critic_optimizer.state_dict()["state"].get(0, {"exp_avg": torch.zeros(1)})["exp_avg"].clone()}

    same = lambda a, b: all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)
    seen, original = {}, wombet.learn

    def learn(run, name):
        if name == "target":
            seen["before"] = state(run.source.agent), state(run.target.agent)
        original(run, name)
        seen["after"] = state(run.source.agent), state(run.target.agent)

    monkeypatch.setattr(wombet, "learn", learn)
    assert run(tmp_path, "--source-run", base, "--target-steps", 20, *[] if warm else ["--no-warm-start"])[0] == 0
    (source, target), (source_later, target_later) = seen["before"], seen["after"]
    assert same(source, target) == warm
    assert same(source, source_later) and not same(target, target_later)


def test_a_source_of_another_version_is_bad_input(base, tmp_path, capsys):
    folder = shutil.copytree(base, tmp_path / base.name)
    state = torch.load(folder / "source.pt", weights_only=True)
    del state["source"]["agent"]["average_actor"]
    wombet.save(folder / "source.pt", state)
    assert run(tmp_path, "--source-run", folder, name="later")[0] == 2
    assert "does not fit this version: 'average_actor'" in capsys.readouterr().err


def test_trajectories_are_cut_by_the_trust_percentile_alone(base, tmp_path):
    """Without it, what has not terminated goes on for all ten steps; with it, there is less."""
    sizes = []
    for percentile in ("0", "30"):
        _, folder = run(tmp_path, "--source-run", base, "--filter", "none", "--trust-percentile", percentile,
                        "--target-steps", "60", name=percentile)
        data = np.load(folder / "first_dataset.npz")
        ends = (data["terminals"] | data["timeouts"]).nonzero()[0]
        if percentile == "0":
            assert (np.diff(ends, prepend=-1)[data["timeouts"][ends]] == 10).all() and len(ends) == 8
        sizes.append(len(data["rewards"]))
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("flags", [["--source", "stand"], ["--source-speed-cap", "0.1"], ["--no-layer-norm"]])
def test_source_flags(base, tmp_path, monkeypatch, flags):
    """Each changes what the source phase learns; which is evaluated in the source's environments, the rest in the
    target's."""
    played, original = [], wombet.evaluation_row

    def watch(agent, envs):
        played.append({env.task.source for env in envs})
        return original(agent, envs)

    monkeypatch.setattr(wombet, "evaluation_row", watch)
    code, folder = run(tmp_path, *flags, "--pretrain-updates", 2, "--target-steps", 1)
    actors = [torch.load(f / "source.pt", weights_only=True)["source"]["agent"]["actor"] for f in (folder, base)]
    assert code == 0 and not torch.equal(*(actor["net.0.weight"] for actor in actors))
    phases = [row["phase"] for row in rows(folder)]
    assert phases == ["source"] * 3 + ["offline"] * 2 + ["target"] * 2
    source = "stand" if "stand" in flags else "near"
    assert played == [{source} if phase == "source" else {None} for phase in phases]


def test_without_prior_there_is_no_source_and_no_data(tmp_path):
    code, folder = run(tmp_path, "--no-prior")
    assert code == 0 and not (folder / "dataset.npz").exists()
    for row in rows(folder):
        assert (row["phase"], row["source_steps"], row["alpha"], row["offline_size"]) == ("target", "0", "", "")


def test_offline_data_instead_of_a_source(base, tmp_path):
    """A run's dataset.npz, and one with D4RL's five keys alone, take the place of phases 1 and 2."""
    data = dict(np.load(base / "dataset.npz"))
    np.savez(tmp_path / "five.npz", **{k: data[k] for k in ("observations", "actions", "rewards", "next_observations",
                                                             "terminals")})
    for name, file in (("own", base / "dataset.npz"), ("five", tmp_path / "five.npz")):
        code, folder = run(tmp_path, "--offline-data", file, "--pretrain-updates", 4, "--target-steps", 65, name=name)
        assert code == 0
        assert [r["updates"] for r in rows(folder) if r["phase"] == "offline"] == ["0", "4"]
        assert {(r["source_steps"], r["offline_size"]) for r in rows(folder)} == {("0", str(len(data["rewards"])))}
        assert {r["phase"] for r in rows(folder)} == {"offline", "target"}
        # the penalty needs u, which the five keys lack
    assert rows(tmp_path / "Hopper-v4__own__0") != rows(tmp_path / "Hopper-v4__five__0")
    (tmp_path / "five.npz").unlink()  # the checkpoint has its rows
    assert wombet.main(["--evaluate", str(folder)]) == 0
    assert wombet.main(["--resume", str(folder), "--target-steps", "70"]) == 0
    assert rows(folder)[-1]["env_steps"] == "70"


def test_a_time_limit_is_a_truncation(tmp_path):
    """Reacher's 50-step episodes end by the time limit alone: none is stored as terminated, so all bootstrap."""
    _, folder = run(tmp_path, "--no-prior", env="Reacher-v5")
    stored = torch.load(folder / "checkpoint.pt", weights_only=True)["target"]["buffer"]["rows"]
    assert stored["terminated"].sum() == 0
    assert stored["timeout"].nonzero().flatten().tolist() == [49, 99]


BAD = {
    "unknown environment": ["--env", "Nope-v4"],
    "old Pusher": ["--env", "Pusher-v4"],
    "unknown source": ["--source", "x"],
    "no such quantity": ["--source-goal-shift", "1"],
    "negative size": ["--batch-size", "-1"],
    "zero": ["--horizon", "0"],
    "alpha": ["--alpha-min", "0.6", "--alpha-max", "0.5"],
    "no real data": ["--alpha-max", "1"],
    "a share of no row": ["--alpha-rule", "fixed", "--alpha", "0.003"],
    "no row at most": ["--alpha-min", "0", "--alpha-max", "0.003"],
    "a share that nothing heeds": ["--alpha", "0"],
    "a gain that nothing heeds": ["--alpha-rule", "fixed", "--alpha-gain", "0.2"],
    "a bound that nothing heeds": ["--alpha-rule", "fixed", "--alpha-max", "0.4"],
    "a return that nothing heeds": ["--filter", "uncertainty", "--return-threshold", "9"],
    "an uncertainty that nothing heeds": ["--filter", "none", "--u-threshold", "9"],
    "critics": ["--critics", "2", "--min-critics", "3"],
    "elites": ["--elites", "9"],
    "no average at all": ["--actor-average", "0"],
    "targets that stand still": ["--polyak", "0"],
    "an error that stands still": ["--alpha-ema", "0"],
    "horizon": ["--horizon", "11"],
    "random actions alone": ["--random-steps", "150"],
    "alone, from scratch": ["--no-prior", "--random-steps", "120"],
    "a round larger than D_S": ["--offline-capacity", "79"],
    "nothing to pretrain on": ["--no-prior", "--pretrain-updates", "5"],
    "nor here": ["--no-keep-source-data", "--alpha-rule", "fixed", "--alpha", "0", "--pretrain-updates", "5"],
    "a cap that nothing heeds": ["--source", "backward", "--source-speed-cap", "1"],
    "a source that is none": ["--no-prior", "--source", "backward"],
    "no disagreement": ["--members", "1"],
    "preset": ["--preset", "x"],
    "device": ["--device", "cuda:7"],
    "nonsense device": ["--device", "abacus"],
    "unknown flag": ["--nope"],
    "half a flag": ["--pre", "paper"],
    "not a number": ["--utd", "many"],
    "choice": ["--filter", "best"],
    "missing checkpoint": ["--resume", "nowhere"],
    "no source run": ["--source-run", "nowhere"],
    "no dataset": ["--offline-data", "nowhere.npz"],
    "both": ["--offline-data", "a", "--source-run", "b"],
    "gif without a run": ["--gif", "a.gif"],
    "nothing to evaluate": ["--evaluate", "nowhere"],
    "percentile": ["--u-percentile", "101"],
    "impossible filter": ["--u-threshold", "-1", "--return-threshold", "99"],
}


@pytest.mark.parametrize("flags", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, flags):
    env = flags[1] if flags[0] == "--env" else "Hopper-v4"
    code, folder = run(tmp_path, *flags, env=env)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("wombet.py: ") and error.count("\n") == 1
    if flags[0] == "--u-threshold":  # found out after the source phase, which is kept
        assert all(text in error for text in ("--u-threshold", "--return-threshold", "seen J", "99", "-1",
                                                 f"--source-run {folder}"))
        assert (folder / "source.pt").exists()
    else:
        assert not folder.exists()


def test_a_batch_of_one_row_where_nothing_is_mixed():
    assert wombet.parse_args(["--no-prior", "--batch-size", "1"]).batch_size == 1
    assert wombet.parse_args(["--alpha-rule", "fixed", "--alpha", "1", "--batch-size", "1"]).alpha == 1


def test_source_flags_with_a_file_are_refused():
    with pytest.raises(ValueError, match="--source-reset-noise-factor 1.0, --source backward: there is no source task"):
        wombet.parse_args(["--offline-data", "a", "--source", "backward", "--source-reset-noise-factor", "1"])


def test_pretraining_on_a_file_that_no_batch_takes_from(base, tmp_path, capsys):
    """With alpha = 0 nothing of D_S is in a batch, and before the first step there is nothing else."""
    code, _ = run(tmp_path, "--offline-data", base / "dataset.npz", "--alpha-rule", "fixed", "--alpha", 0,
                  "--pretrain-updates", 4)
    assert code == 2 and "--pretrain-updates needs data" in capsys.readouterr().err


def test_discrete_actions_are_refused(tmp_path, capsys, monkeypatch):
    class CartPole(tasks.Reacher):
        def __init__(self, name, version, source=None):
            super().__init__(name, version, source)

    monkeypatch.setitem(tasks.TASKS, "CartPole", CartPole)
    code, _ = run(tmp_path, env="CartPole-v1")
    assert code == 2 and "discrete" in capsys.readouterr().err


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "foreign":
        path.write_bytes(b"not a file of ours")
    elif how == "other":
        torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("how", ["truncated", "foreign", "other"])
@pytest.mark.parametrize("file, flag", [("checkpoint.pt", "--resume"), ("checkpoint.pt", "--evaluate"),
                                        ("source.pt", "--source-run"), ("dataset.npz", "--offline-data")])
def test_spoilt_files_are_refused(base, tmp_path, capsys, how, file, flag):
    folder = shutil.copytree(base, tmp_path / "spoilt")
    spoil(folder / file, how)
    before = (folder / file).read_bytes()
    given = folder / file if flag == "--offline-data" else folder
    code, fresh = run(tmp_path, flag, given)
    error = capsys.readouterr().err
    assert code == 2 and str(folder) in error and error.count("\n") == 1
    assert (folder / file).read_bytes() == before and not fresh.exists()


def test_misfits_are_refused(base, tmp_path, capsys):
    """Another environment's dataset, another network's checkpoint, other source flags, a folder that exists."""
    data = dict(np.load(base / "dataset.npz"))
    np.savez(tmp_path / "bad.npz", **{**data, "rewards": np.full_like(data["rewards"], np.nan)})
    cases = [(["--offline-data", base / "dataset.npz"], "Walker2d-v4", "observations has shape"),
             (["--offline-data", tmp_path / "bad.npz"], "Hopper-v4", "not finite"),
             (["--source-run", base, "--source-speed-cap", "2"], "Hopper-v4", "other flags: --source-speed-cap"),
             (["--source-run", base], "Walker2d-v4", "other flags: --env"),
             (["--resume", base, "--hidden", "16"], "Hopper-v4", "--hidden 16 (the run has 32)")]
    for flags, env, text in cases:
        code, folder = run(tmp_path, *flags, env=env)
        error = capsys.readouterr().err
        assert code == 2 and text in error and error.count("\n") == 1 and not folder.exists()
    before = (base / "progress.csv").read_bytes()
    assert run(base.parent)[0] == 2 and "exists" in capsys.readouterr().err
    assert (base / "progress.csv").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    original, count = wombet.SAC.update, [0]

    def poisoned(agent, batch, n_offline=0):
        count[0] += 1
        if count[0] == 80:
            batch["reward"] = batch["reward"] * float("nan")
        return original(agent, batch, n_offline)

    monkeypatch.setattr(wombet.SAC, "update", poisoned)
    code, folder = run(tmp_path, "--no-prior", "--target-steps", "300")
    assert code == 1 and "not finite" in capsys.readouterr().err
    weights = lambda name: torch.load(folder / name, weights_only=True)["target"]["agent"]["critic"]["weights.0"]
    assert weights("checkpoint.pt").isfinite().all() and not weights("nonfinite.pt").isfinite().all()


def test_a_librarys_own_error_is_a_fault_not_bad_input(tmp_path, monkeypatch):
    """A ValueError that json raises is not one line about the flags: its traceback is what tells."""
    monkeypatch.setattr(wombet, "learn", lambda *_: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        run(tmp_path, "--no-prior")


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    wombet.save(path, {"wombet": 1, "x": 1})

    def dies(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError):
        wombet.save(path, {"wombet": 1, "x": 2})
    assert wombet.load(path, "cpu", "wombet")["x"] == 1


def test_gif(tmp_path, capsys):
    _, folder = run(tmp_path, "--no-prior", "--target-steps", 70, "--episode-steps", 20)
    code = wombet.main(["--evaluate", str(folder), "--gif", str(tmp_path / "a.gif")])
    if code == 2 and "cannot draw" in capsys.readouterr().err:
        pytest.skip("this machine has no OpenGL to draw with (EGL, OSMesa or a screen)")
    assert code == 0 and (tmp_path / "a.gif").read_bytes()[:3] == b"GIF"


def test_preset_paper(base, tmp_path):
    """All its flags are in force, but for those given beside it, before or after."""
    args = vars(wombet.parse_args(["--guide", "--preset", "paper", "--alpha-gain", "0.7"]))
    given = {"guide": True, "alpha_gain": 0.7}
    assert all(args[key] == {**wombet.PAPER, **given}.get(key) for key in {**wombet.PAPER, **given})
    plain = vars(wombet.parse_args([]))
    assert all(plain[key] != value for key, value in wombet.PAPER.items())  # each is a departure
    wombet.parse_args(["--preset", "paper", "--offline-capacity", "13000", "--rollouts", "9000"])  # which are not made
    for without in (["--no-prior"], ["--offline-data", "a.npz"], ["--alpha-rule", "fixed", "--alpha", "0"]):
        wombet.parse_args([*without, "--imagined-trajectories", "9000", "--rollouts", "90000"])
        wombet.parse_args([*without, "--imagined-length", "3"])  # nor planned, so that a horizon of 5 is no matter
    tiny = ["--target-steps", 60, "--imagined-length", 16, "--offline-capacity", 300, "--imagined-trajectories", 2]
    assert run(tmp_path, "--preset", "paper", *tiny)[0] == 0


def test_help_names_every_flag_with_a_word_of_help():
    for action in wombet.build_parser()._actions:
        assert action.help, action.option_strings


@pytest.mark.slow
def test_wombet_learns_pusher_faster_than_from_scratch(tmp_path):
    """About 10 minutes: after 6,000 source steps, 2,000 target steps with D_S beat 2,000 without by 5."""
    flags = ["--env", "Pusher-v5", "--out", str(tmp_path), "--target-steps", "2000", "--eval-every", "2000"]
    assert wombet.main([*flags, "--name", "prior", "--source-steps", "6000"]) == 0
    assert wombet.main([*flags, "--name", "scratch", "--no-prior"]) == 0
    last = lambda name: float(rows(tmp_path / f"Pusher-v5__{name}__0")[-1]["return_mean"])
    assert last("prior") > last("scratch") + 5


def test_the_clock_goes_on_where_the_checkpoint_stopped(tmp_path):
    a_run = SimpleNamespace(log=Log(tmp_path / "progress.csv"), rng=np.random.default_rng(0))
    load_log_and_generators(a_run, {**log_and_generators(a_run), "wall_clock": 500.0})
    assert 500 <= a_run.log.wall_clock < 510

"""experiments/bound.py: what it measures, against a model that is exact, and its report on a run."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from experiments import bound
from task_env import TaskEnv
from tests.test_wombet import run


def test_an_exact_model_returns_what_the_environment_does():
    """A "model" that steps the simulator: both returns are equal, also where the sequence ends in a fall."""
    env, inside, probe = (TaskEnv("Hopper-v4", "near", seed=3) for _ in range(3))
    env.reset()
    push = np.array([-1.0, 1.0, 1.0], dtype=np.float32)
    fell = 0
    for _ in range(60):
        actions = torch.rand(1, 8, 3) * 2 - 1
        state = env.state_dict()
        inside.load_state_dict(state)
        over = False

        def step(obs, action):
            nonlocal over
            if not over:
                _, _, over, _, features = inside.step(action[0])
                step.features = torch.as_tensor(features)[None]
            return torch.as_tensor(inside.obs)[None], step.features, torch.ones(1)

        # the two returns of `model_returns` are two rollouts: this model, which moves on, is asked for one
        scored = bound.MPC(step, env.task.reward, env.task.terminated, 3, horizon=8, discount=1.0, penalty_coef=0.0)
        imagined = scored.rollout(torch.as_tensor(env.obs)[None], actions)[1].item()
        assert imagined == pytest.approx(bound.real_steps(probe, state, actions[0])["reward"].sum().item(), rel=1e-5)
        fell += over
        if env.step(push)[2]:
            env.reset()
    assert fell


def test_returns_and_uncertainty_of_a_known_model():
    class Task:
        reward = staticmethod(lambda obs, action, next_obs, features: next_obs[..., 0])
        terminated = staticmethod(lambda next_obs: next_obs[..., 0] > 2.5)

    step = lambda obs, action: (obs + action, obs[:, :0], action.abs().sum(-1) / 10)
    imagined, sum_u = bound.model_returns(step, Task, torch.tensor([[0.0], [1.0]]), torch.ones(2, 3, 1))
    # 1 + 2 + 3, and 2 + 3, which ends it; u is .1 a step
    assert imagined.tolist() == pytest.approx([6.0, 5.0]) and sum_u.tolist() == pytest.approx([0.3, 0.2])
    rows = [("plan", 0, 6.0, 5.0, 0.3), ("plan", 0, 5.0, 5.5, 0.2)]
    assert bound.needed(rows).tolist() == pytest.approx([1 / 0.3, 0.0])
    # a reward at its cap is the same in both, but for float32's rounding: that is no violation
    assert bound.needed([("plan", 0, 14.000005, 14.0, 0.3)]).tolist() == [0.0]


def test_the_share_of_real_steps_that_u_covers():
    """u is half of the largest action, the model's step is obs + action: of four real steps with errors of 0, .2, .4
    and .6 and a u of .5, three are covered, and two by u before it was scaled, .25."""
    class Model:
        scale = torch.tensor(2.0)
        uncertainty = staticmethod(lambda obs, action: action.abs().amax(-1) / 2)
        error = staticmethod(lambda obs, action, next_obs, features: (next_obs - obs - action).norm(dim=-1))

    class Env:
        obs, errors = np.zeros(1, dtype=np.float32), iter([0.0, 0.2, 0.4, 0.6])

        def load_state_dict(self, state):
            self.obs = np.float32([state])

        def step(self, action):
            self.obs = self.obs + action.numpy() + np.float32(next(self.errors))
            return self.obs, 1.0, False, False, np.zeros(0, dtype=np.float32)

    steps = bound.real_steps(Env(), 3.0, torch.ones(4, 1))
    assert steps["reward"].sum() == 4 and steps["obs"][:, 0].tolist() == pytest.approx([3.0, 4.0, 5.2, 6.6])
    assert bound.covered(Model, steps) == pytest.approx([0.75, 0.5])


def test_a_kind_without_sequences_has_no_line(tmp_path, monkeypatch):
    """A run without a guide has no source policy: it is not drawn as one for which the bound never holds."""
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda ax, *args, **look: (drawn.append(args[1]), plot(ax, *args, **look))[1])
    rows = [("a__b__0", kind, 0, 1.0, 2.0, 0.1) for kind in ("plan", "uniform")]
    titles, set_title = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title",
                        lambda ax, text, **rest: (titles.append(text), set_title(ax, text, **rest))[1])
    bound.draw(rows, {"a__b__0": 4.0}, tmp_path / "bound.png")
    assert titles == ["a, seed 0"]
    assert len(drawn) == 2 and all(min(line) == 1 for line in drawn)


def test_its_report_on_a_run_and_bad_input(tmp_path, capsys):
    code, folder = run(tmp_path)
    assert code == 0
    out = tmp_path / "out"
    flags = ["--out", str(out), "--episodes", "2", "--length", "8", "--every", "2"]
    assert bound.main([str(folder), *flags]) == 0
    with open(out / "bound.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == set(bound.KINDS) and {row["step"] for row in rows} == {"0", "2"}
    assert len(rows) == 12 and all(float(row["sum_u"]) > 0 and 0 <= float(row["covered"]) <= 1
                                  and 0 <= float(row["covered_unscaled"]) <= 1 for row in rows)
    printed = capsys.readouterr().out
    assert (out / "bound.png").exists() and all(c in printed for c in ("holds at 4", "u covers", "unscaled u"))

    before = (out / "bound.csv").read_bytes()
    for bad in (["--length", "4"], ["--episodes", "0"], ["--out", str(folder / "config.json")]):
        assert bound.main([str(folder), *flags, *bad]) == 2
        error = capsys.readouterr().err
        assert error.startswith("bound.py: ") and error.count("\n") == 1 and bad[0] in error
    assert (out / "bound.csv").read_bytes() == before

    other = tmp_path / "other" / folder.name
    shutil.copytree(folder, other)
    assert bound.main([str(folder), str(other), *flags]) == 2
    assert f"two runs are named {folder.name}" in capsys.readouterr().err

    assert bound.main([str(folder)]) == 2 and "--out" in capsys.readouterr().err  # results/ is not written by chance
    (folder / "source.pt").unlink()
    assert bound.main([str(folder), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_table_by_hand():
    """Of 20 plans the model's return is above the real one by 0, 1, ... 19, at a sum of u of 1."""
    table = [("r", "plan", 0, 0.75, 0.25, 10.0 + i, 10.0, 1.0) for i in range(20)] + [
        ("r", "uniform", 0, 1.0, 0.5, 1.0, 3.0, 1.0)]
    head, plans, uniform = bound.summary(table, (0, 9, 4.5))
    assert head[3:] == ("holds at 0", "holds at 9", "holds at 4.5", "lambda for 95%", "mean J_model - J_P", "u covers",
                        "unscaled u")
    assert plans == ("r", "plan", "20", "0.05", "0.50", "0.25", f"{0.95 * 19:.1f}", "9.500", "0.75", "0.25")
    assert uniform == ("r", "uniform", "1", "1.00", "1.00", "1.00", "0.0", "-2.000", "1.00", "0.50")


def test_no_sequence_is_tried_after_a_fall(monkeypatch):
    """Of two episodes one falls in its second step, the other never."""
    class Task:
        reward = staticmethod(lambda obs, action, next_obs, features: next_obs[..., 0])
        terminated = staticmethod(lambda next_obs: next_obs[..., 0] > 1.5)

    class Env:
        task, max_steps, action_dim, FALLS = Task, 6, 1, {0: 1.0, 1: 0.1}

        def __init__(self, seed=0):
            self.by, self.obs = self.FALLS[seed], None

        def reset(self):
            self.obs = np.zeros(1, dtype=np.float32)
            return self.obs

        state_dict = lambda self: (self.by, self.obs)

        def load_state_dict(self, state):
            self.by, self.obs = state

        def step(self, action):
            self.obs = self.obs + np.float32(self.by)
            return self.obs, 1.0, bool(self.obs[0] > 1.5), False, np.zeros(0, dtype=np.float32)

    def lockstep(envs, uncertainty):
        return lambda obs, action: [torch.as_tensor(np.stack([env.step(None)[0] for env in envs]))]

    planner = SimpleNamespace(act=lambda obs: torch.zeros(2, 1), plan=lambda obs: [torch.zeros(2, 2, 1)], policy=None)
    model = SimpleNamespace(step=None, scale=torch.tensor(1.0), uncertainty=lambda obs, action: torch.zeros(len(obs)),
                            error=lambda *args: torch.zeros(len(args[0])))
    monkeypatch.setattr(bound, "lockstep", lockstep)
    monkeypatch.setattr(bound.wombet, "planner", lambda run: planner)
    monkeypatch.setattr(bound, "model_returns", lambda step, task, obs, actions: (torch.zeros(2), torch.ones(2)))
    run = SimpleNamespace(args=SimpleNamespace(horizon=2), source=SimpleNamespace(env=Env(), make_env=Env), model=model)
    rows = bound.check(run, episodes=2, length=6, every=2)
    assert [row[1] for row in rows if row[0] == "plan"] == [0, 0, 2, 4]  # both, then the one that stands
    assert [row[1] for row in rows if row[0] == "uniform"] == [0, 0, 2, 4]

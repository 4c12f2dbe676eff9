"""The loop's functions one by one, on a run that is built and not started.

An end-to-end test compares two runs of the same code; here what one function does is written out by hand.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import task_env
import wombet
from agent import SAC
from harness import store_step
from replay import ReplayBuffer
from task_env import TaskEnv
from tests.test_wombet import STOP, TINY
from world_model import WorldModel


def built(tmp_path, *flags):
    """A run of Hopper with 40 random source states."""
    flags = ["--env", "Hopper-v4", *TINY, "--fast", "off", *map(str, flags)]
    run = wombet.build(wombet.parse_args(flags), tmp_path)
    run.interrupted = []
    if run.source:
        run.source.buffer.add(**{k: torch.rand(40, *v.shape[1:]) for k, v in run.source.buffer.data.items()})
    return run


def test_training_never_starts_where_an_evaluation_does(tmp_path):
    run = built(tmp_path)
    for side in (run.source, run.target):
        assert not (task_env.first_observations(side.evaluation) == side.env.reset()).all(1).any()


def test_the_environments_of_several_seeds_are_seeded_apart(tmp_path):
    runs = [built(tmp_path, "--seed", seed) for seed in range(3)]
    sides = [side for run in runs for side in (run.source, run.target)]
    assert len({side.env.env.unwrapped.np_random.bit_generator.state["state"]["state"] for side in sides}) == 6


def test_source_quantities_reach_the_source_alone(tmp_path):
    run = built(tmp_path, "--source-reset-noise-factor", 5, "--source-ctrl-cost-factor", 3, "--source-speed-cap", 0.7)
    for env in (run.source.env, *run.source.evaluation):
        assert env.task.env_kwargs["reset_noise_scale"] == pytest.approx(5 * 5e-3)
        assert (env.task.ctrl_cost, env.task.speed_cap) == pytest.approx((3e-3, 0.7))
    for env in (run.target.env, *run.target.evaluation):
        assert env.task.env_kwargs["reset_noise_scale"] == 5e-3 and env.task.ctrl_cost == 1e-3


def test_training_explores(tmp_path, monkeypatch):
    run, asked = built(tmp_path, "--target-steps", 3), []
    run.target.agent.act = lambda obs, deterministic=False: asked.append(deterministic) or torch.zeros(3)
    monkeypatch.setattr(wombet, "update", lambda run, side: {})
    monkeypatch.setattr(wombet, "report", lambda *_: "")
    wombet.learn(run, "target")
    assert asked == [False] * 3


def test_a_fall_in_the_last_allowed_step_is_no_timeout():
    env = SimpleNamespace(obs=np.zeros(1), step=lambda action: (np.ones(1), 2.0, True, True, np.zeros(0)))
    buffer = ReplayBuffer(4, obs=(1,), next_obs=(1,), action=(1,), reward=(), terminated=(), timeout=(),
                          features=(0,), uncertainty=())
    store_step(env, buffer, np.zeros(1))
    row = buffer.filled()
    assert (row["terminated"].item(), row["timeout"].item(), env.obs) == (1, 0, None)


def test_the_best_agent_is_that_of_the_windows_episodes():
    buffer, agent = ReplayBuffer(20, reward=(), terminated=(), timeout=()), SAC(1, 1, hidden=(4,))
    run = SimpleNamespace(source=SimpleNamespace(buffer=buffer, agent=agent, step=0), best=None,
                          args=SimpleNamespace(snapshot_window=4))
    for mean in (3.0, 9.0, 5.0):
        buffer.add(reward=torch.full((4,), mean / 4), terminated=torch.tensor([0, 0, 0, 1]), timeout=torch.zeros(4))
        run.source.step += 4
        wombet.keep_best(run)
    assert (run.best["return"], run.best["step"]) == (9.0, 8)


def test_a_fit_is_by_the_models_own_flags(tmp_path, monkeypatch):
    seen = {}

    def fit(model, **given):
        seen.update(given)
        raise STOP

    monkeypatch.setattr(WorldModel, "fit", fit)
    with pytest.raises(KeyError):
        wombet.fit(built(tmp_path, "--model-lr", 0.02, "--model-batch-size", 33), 7)
    assert (seen["lr"], seen["batch_size"], seen["max_epochs"]) == (0.02, 33, 7)


@pytest.mark.parametrize("flags", [[], ["--alpha-rule", "fixed", "--alpha", 0]])
def test_a_refit_comes_before_its_steps_round_and_neither_without_imagination(tmp_path, monkeypatch, flags):
    run, seen = built(tmp_path, "--target-steps", 45, "--refit-epochs", 3, *flags), []
    monkeypatch.setattr(wombet, "fit", lambda run, epochs: seen.append((run.target.step, "fit", epochs)))
    for name in ("refresh_uncertainty", "imagine_policy"):
        monkeypatch.setattr(wombet, name, lambda run, name=name: seen.append((run.target.step, name)))
    monkeypatch.setattr(wombet, "update", lambda run, side: {})
    monkeypatch.setattr(wombet, "report", lambda *_: "")
    wombet.learn(run, "target")
    assert seen == ([] if flags else [(20, "imagine_policy"), (40, "fit", 3), (40, "refresh_uncertainty"),
                                      (40, "imagine_policy")])


def test_rounds_in_real_environments_start_apart_and_count_the_steps_taken(tmp_path, monkeypatch):
    run = built(tmp_path, "--generate-in", "env", "--imagined-length", 60, "--offline-capacity", 500)
    monkeypatch.setattr(wombet, "planner", lambda run: SimpleNamespace(act=lambda obs: torch.ones(len(obs), 3)))
    found = wombet.imagine_mpc(run)
    assert run.source.step == found["valid"].sum() < 8 * 60  # some have fallen
    assert len(found["obs"][:, 0].unique(dim=0)) == 8


def test_resets_are_the_sources_and_anew_every_round(tmp_path, monkeypatch):
    run, seen = built(tmp_path, "--reset-share", 0.5, "--episode-steps", 6), []
    monkeypatch.setattr(wombet, "planner", lambda run: SimpleNamespace(act=None))
    monkeypatch.setattr(wombet, "imagine", lambda step, terminated, act, obs, length, limit: seen.append((obs, length)))
    rng = np.random.default_rng(0)  # the run's own
    for _ in range(2):
        wombet.imagine_mpc(run)
        env = TaskEnv("Hopper-v4", "near", seed=int(rng.integers(2**31)))
        obs, length = seen[-1]
        np.testing.assert_array_equal(obs[:4], [env.reset() for _ in range(4)])
        assert length == 6  # no longer than an episode


def test_the_policys_rounds_move_by_the_ensembles_mean(tmp_path, monkeypatch):
    run, seen = built(tmp_path, "--expectation", "members"), []

    def imagine(step, *_):
        seen.append(step)
        raise STOP

    monkeypatch.setattr(wombet, "imagine", imagine)
    with pytest.raises(KeyError):
        wombet.imagine_policy(run)
    assert seen == [run.model.step]


def test_the_acceptance_is_a_share_of_all_trajectories(tmp_path, monkeypatch):
    run = built(tmp_path, "--filter", "none")
    valid = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    data = {"obs": torch.rand(4, 2, 11), "action": torch.rand(4, 2, 3), "next_obs": torch.rand(4, 2, 11),
            "features": torch.rand(4, 2, 1), "uncertainty": torch.rand(4, 2), "valid": valid,
            "terminated": torch.zeros(4, 2, dtype=torch.bool)}
    monkeypatch.setattr(wombet, "imagine_mpc", lambda run: data)
    wombet.generate(run)
    assert run.acceptance == 0.75 and run.offline_data.size == 5


def test_the_limit_of_trust_by_hand(tmp_path, monkeypatch):
    run = built(tmp_path, "--trust-percentile", 70)
    data = run.source.buffer.filled()
    monkeypatch.setattr(run.source.buffer, "sample", lambda *_: data)
    expected = run.model.uncertainty(data["obs"], data["action"]).quantile(0.7).item()
    assert wombet.trust_limit(run) == pytest.approx(expected)


def test_an_actors_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = built(tmp_path, "--no-prior")
    run.target.buffer.add(**{key: torch.rand(9, *values.shape[1:]) for key, values in run.target.buffer.data.items()})
    losses = {"critic_loss": torch.tensor(1.0), "actor_loss": torch.tensor(math.nan)}
    run.target.agent.update = lambda batch, n_offline: losses
    with pytest.raises(FloatingPointError, match="not finite"):
        wombet.update(run, run.target)


@pytest.mark.parametrize("phase", ["source", "generate", "switch", "target", "done"])
def test_which_agent_is_played(monkeypatch, phase):
    """The source's until the target's has been made from it."""
    shown = []
    monkeypatch.setattr(wombet, "load", lambda *_: {})
    monkeypatch.setattr(wombet, "build", lambda *_: SimpleNamespace(phase=phase, source="a", target="b"))
    monkeypatch.setattr(wombet, "load_state_dict", lambda *_: None)
    monkeypatch.setattr(wombet, "show", lambda side, name, gif: shown.append((side, name)))
    wombet.play(SimpleNamespace(evaluate="x", device="cpu", gif=None))
    assert shown == [("a", "source") if phase in ("source", "generate") else ("b", "target")]

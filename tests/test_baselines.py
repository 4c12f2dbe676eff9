"""Each baseline: what defines it, by hand or on a known distribution; then runs, end to end, at a size of seconds."""

import csv
import dataclasses
import importlib
import json
import math
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import common  # baselines/ is on the path (pytest.ini)
import harness
import plot
from awac import AWAC, weights
from bc import BC
from combo import COMBO
from cql import CQL
from iql import IQL, expectile_loss, reward_scale
from mopo import MOPO, Imagination
from ppo import PPO, RunningMoments, advantages, clipped_objective, clipped_value_loss
from replay import ReplayBuffer
from sac import DelayedSAC
from task_env import TaskEnv
from td3 import TD3
from harness import COLUMNS
from tests.test_agent import constant
from world_model import WorldModel

ONLINE, OFFLINE = ("sac", "td3", "ppo"), ("bc", "iql", "awac", "cql", "mopo", "combo")
SMALL = {"actor_lr": 3e-3, "critic_lr": 3e-3, "batch_size": 64, "hidden": (32,)}


def snapshot(network):
    return [p.detach().clone() for p in network.parameters()]


def same(network, before):
    return all(torch.equal(p, q) for p, q in zip(network.parameters(), before))


def filled(n=256, obs_dim=2, action_dim=1, **columns):
    """A full buffer of one-step episodes: random observations and actions, no reward, where `columns` gives none."""
    shapes = {"obs": (obs_dim,), "action": (action_dim,), "reward": (), "next_obs": (obs_dim,), "terminated": (),
              "timeout": (), "uncertainty": ()}
    data = {"obs": torch.randn(n, obs_dim), "action": torch.rand(n, action_dim) * 2 - 1, "reward": torch.zeros(n),
            "next_obs": torch.randn(n, obs_dim), "terminated": torch.ones(n), "timeout": torch.zeros(n),
            "uncertainty": torch.zeros(n), **columns}
    buffer = ReplayBuffer(n, **shapes)
    buffer.add(**data)
    return buffer


# ------------------------------------------------------------------------------------------------------- SAC, TD3, PPO


@pytest.mark.parametrize("target_entropy, direction", [(5.0, 1), (-50.0, -1)])
def test_sac_temperature_moves_towards_the_target_entropy(target_entropy, direction):
    agent = DelayedSAC(2, 1, target_entropy=target_entropy, init_temperature=0.5, **SMALL)
    buffer = filled()
    for _ in range(10):
        agent.learn(buffer)
    assert direction * (agent.log_temperature.exp().item() - 0.5) > 0.005


def test_sac_delays_the_actor_and_makes_up_for_it():
    agent, buffer = DelayedSAC(2, 1, policy_delay=3, **SMALL), filled()
    for i in range(1, 7):
        before = snapshot(agent.actor)
        agent.learn(buffer)
        assert same(agent.actor, before) == (i % 3 != 0)
    steps = lambda optimizer: int(next(iter(optimizer.state.values()))["step"])
    assert steps(agent.actor_optimizer) == steps(agent.critic_optimizer) == agent.updates == 6
    assert [g["lr"] for g in agent.actor_optimizer.param_groups] == [3e-3, 3e-3]
    assert agent.target_entropy == -1 and agent.min_critics == agent.n_critics == 2 and agent.actor_q == "min"


def test_td3_smooths_the_target_action():
    agent = TD3(2, 2, hidden=(8,), discount=0.9)
    agent.target_actor = lambda obs: torch.tensor([0.0, 0.9]).expand(len(obs), 2)
    seen = []
    agent.target_critic = lambda obs, action: seen.append(action) or torch.stack([action[:, 0], 10 + action[:, 0]])
    reward, terminated = torch.full((20_000,), 2.0), (torch.arange(20_000) % 2).float()
    y = agent.target(reward, terminated, torch.zeros(20_000, 2))
    a = seen[0]
    assert a[:, 0].abs().max() == 0.5 and a[:, 1].max() == 1.0 and a[:, 1].min() >= 0.4 - 1e-6
    assert abs(a[:, 0].std() - 0.2) < 0.01 and abs(a[:, 0].mean()) < 0.01
    torch.testing.assert_close(y, 2.0 + 0.9 * (1 - terminated) * a[:, 0])  # the smaller of the two critics


def test_td3_delays_actor_and_targets():
    agent, buffer = TD3(2, 1, hidden=(8,), batch_size=16), filled()
    slow = ("actor", "target_actor", "target_critic")
    for i in range(1, 5):
        before = {name: snapshot(getattr(agent, name)) for name in (*slow, "critic")}
        agent.learn(buffer)
        assert not same(agent.critic, before["critic"])
        assert [same(getattr(agent, name), before[name]) for name in slow] == [i % 2 != 0] * 3
    obs = np.zeros((4000, 2), dtype=np.float32)
    noise = agent.act(obs) - agent.act(obs, deterministic=True)
    assert abs(noise.std() - 0.1) < 0.01


def test_ppo_gae_by_hand():
    """Steps 0 and 1 are an episode that terminates; 2 and 3 are cut by the time limit; 4 goes on."""
    reward = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    value, next_value = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5]), torch.tensor([1.0, 9.0, 2.0, 7.0, 3.0])
    terminated, ended = torch.tensor([0.0, 1, 0, 0, 0]), torch.tensor([0.0, 1, 0, 1, 0])
    g, lam = 0.9, 0.8
    a4 = 5 + g * 3 - 2.5
    a3 = 4 + g * 7 - 2.0  # bootstraps, and takes nothing from the episode after it
    a2 = 3 + g * 2 - 1.5 + g * lam * a3
    a1 = 2 - 1.0
    a0 = 1 + g * 1 - 0.5 + g * lam * a1
    found = advantages(reward, value, next_value, terminated, ended, g, lam)
    torch.testing.assert_close(found, torch.tensor([a0, a1, a2, a3, a4]))


def test_ppo_objective_by_hand():
    log_ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]).log().requires_grad_()
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0, 1.0])
    loss = clipped_objective(log_ratio, advantage, 0.2)
    assert loss.item() == pytest.approx(-(1.2 * 2 + 0.5 * 2 - 1.5 * 2 - 0.8 * 2 + 1.1) / 5)
    loss.backward()
    assert (log_ratio.grad == 0).tolist() == [True, False, False, True, False]  # no gain from going further out
    value = torch.tensor([1.0, 3.0])
    # 3 is 2 away from the old value: cut to 1.2, which is farther from the return 3.5
    assert clipped_value_loss(value, torch.ones(2), torch.tensor([1.5, 3.5]), 0.2).item() == pytest.approx(
        0.5 * (0.5**2 + 2.3**2) / 2)


def test_running_moments_are_those_of_all_rows():
    rows, moments = torch.randn(100, 3) * 5 + 2, RunningMoments((3,))
    for part in rows.split(33):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, rows.double().mean(0))
    np.testing.assert_allclose(moments.var, rows.double().var(0, correction=0))


def test_ppo_scales_rewards_by_the_discounted_return():
    agent = PPO(2, 1, steps=100, discount=0.5)
    reward, ended = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 0.0])
    returns = np.array([1.0, 0.5 + 2, 4.0])
    torch.testing.assert_close(agent.scaled_rewards(reward, ended), reward / returns.std(), rtol=1e-5, atol=0)
    assert agent.running_return == 4.0


def test_ppo_updates_once_a_part():
    """A batch of 10 in 7 parts, of 2, 2, 2 and of 1 row: as many updates as --minibatches says."""
    agent = PPO(2, 1, steps=10, rollout_steps=10, minibatches=7, epochs=3)
    agent.learn(filled(10))
    assert agent.updates == 21


def test_ppo_learns_once_a_batch_and_anneals():
    agent = PPO(2, 1, steps=64, rollout_steps=16, minibatches=2, epochs=3, lr=1e-3)
    buffer = filled(16)
    buffer.position = 5
    assert agent.learn(buffer) == {} and agent.updates == 0
    buffer.position = 0
    obs = buffer.data["obs"][:4]
    for i in range(4):
        before = agent.normalise(obs)
        agent.learn(buffer)
        assert agent.updates == 6 * (i + 1) and (i > 0 or not torch.equal(before, agent.normalise(obs)))
        assert agent.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - i / 4))


# ---------------------------------------------------------------------------------------------------- BC, IQL and AWAC


def test_bc_reaches_the_likelihood_of_a_known_policy():
    obs = torch.randn(4000, 2)
    mean, std = torch.tanh(obs @ torch.tensor([[0.5, -0.3], [0.2, 0.4]])), torch.tensor([0.1, 0.3])
    buffer = filled(4000, action_dim=2, obs=obs, action=mean + std * torch.randn(4000, 2))
    agent = BC(2, 2, hidden=(32,), lr=1e-2)
    losses = [agent.learn(buffer)["actor_loss"].item() for _ in range(600)]
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum().item()  # what the policy itself scores
    assert np.mean(losses[-100:]) == pytest.approx(entropy, abs=0.05)
    torch.testing.assert_close(agent.policy.log_std.exp().detach(), std, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("method", [BC, IQL, AWAC])
def test_a_standard_deviation_at_its_bound_comes_back(method):
    """Constant actions drive it to the bound; on uniform ones, whose log std is -.54, it rises again."""
    def log_std(agent):
        return (agent.policy if method is BC else agent.actor).log_std.item()

    agent = method(2, 1, lr=3e-2, hidden=(8,), batch_size=64)
    constant, uniform = filled(action=torch.full((256, 1), 0.3)), filled()
    for _ in range(400):
        agent.learn(constant)
    low = log_std(agent)
    assert -5.0 <= low < -4.0
    for _ in range(800):
        agent.learn(uniform)
    assert log_std(agent) > -2.0


def test_the_standard_deviations_bounds_are_smooth():
    policy = common.GaussianPolicy(2, 5, (8,))
    with torch.no_grad():
        policy.free_log_std.copy_(torch.tensor([-20.0, -6.0, -1.0, 2.0, 20.0]))
    policy.log_std.sum().backward()
    assert (policy.free_log_std.grad > 0).all() and (policy.log_std >= -5).all() and (policy.log_std < 2.01).all()
    assert policy.log_std[2].item() == pytest.approx(-1.0, abs=0.1)  # nearly the parameter itself between the bounds


def test_bc_online_is_td3_whose_actor_rests_first():
    agent, buffer = BC(2, 1, hidden=(8,), batch_size=16, critic_steps=4), filled()
    agent.learn(buffer)
    agent.start_online()
    assert same(agent.target_actor, snapshot(agent.actor))
    before = snapshot(agent.actor)
    for i in range(1, 7):
        agent.learn(buffer)
        assert same(agent.actor, before) == (i < 5)  # i = 1, 3, 5 are the actor's turns


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_expectile_of_the_uniform_distribution(expectile):
    """Of U(0, 1) it is sqrt(tau) / (sqrt(tau) + sqrt(1 - tau))."""
    q, v = torch.linspace(0, 1, 1001), torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = expectile_loss(q - v, expectile)
        loss.backward()
        return loss

    optimizer.step(closure)
    known = math.sqrt(expectile) / (math.sqrt(expectile) + math.sqrt(1 - expectile))
    assert v.item() == pytest.approx(known, abs=2e-3)


def test_iql_reward_scale_by_hand():
    """Three trajectories, ended by terminal, by timeout and by a cut that only the observations show."""
    obs = torch.arange(6.0)[:, None]
    next_obs = obs + 1
    next_obs[4] = 50.0
    data = {"obs": obs, "next_obs": next_obs, "reward": torch.tensor([1.0, 2, 10, 4, 5, 6]),
            "terminated": torch.tensor([0.0, 1, 0, 0, 0, 0]), "timeout": torch.tensor([0.0, 0, 1, 0, 0, 0])}
    assert reward_scale(data) == pytest.approx(1000 / (10 - 3))  # returns 3, 10, 9, 6
    assert reward_scale({key: values[:2] for key, values in data.items()}) == 1.0


def test_awac_weights():
    advantage = torch.tensor([-2.0, 0.0, 1.0, 100.0])
    torch.testing.assert_close(weights(advantage, 2.0), torch.tensor([math.exp(-1), 1.0, math.exp(0.5), 100.0]))


@pytest.mark.parametrize("method", [BC, IQL, AWAC])
def test_on_mixed_data_the_weights_prefer_what_pays(method):
    """Half of the actions are near -.5, half near .5, which alone pays; BC imitates the mean of both."""
    side = torch.arange(400) % 2
    action = (side - 0.5)[:, None] + 0.05 * torch.randn(400, 1)
    buffer = filled(400, action=action, reward=side.float(), obs=torch.zeros(400, 2))
    flags = {IQL: {"beta": 20.0, "scale_rewards": False}, AWAC: {"awac_lambda": 0.2}, BC: {}}[method]
    agent = method(2, 1, lr=3e-3, hidden=(32,), batch_size=128, **flags)
    for _ in range(300):
        agent.learn(buffer)
    chosen = agent.act(torch.zeros(1, 2), deterministic=True).item()
    assert abs(chosen) < 0.15 if method is BC else chosen > 0.35


# ---------------------------------------------------------------------------------------------------- CQL, MOPO, COMBO


def test_cql_pushes_unseen_actions_down():
    """All reward is 1, all actions lie in [0, 1]: without the penalty Q is as high elsewhere."""
    buffer = filled(512, action=torch.rand(512, 1), reward=torch.ones(512))
    gap = {}
    for alpha in (0.0, 5.0):
        agent = CQL(2, 1, cql_alpha=alpha, n_actions=4, **SMALL)
        for _ in range(150):
            agent.learn(buffer)
        obs = torch.randn(200, 2)
        with torch.no_grad():
            seen, unseen = (agent.critic(obs, torch.full((200, 1), a)).mean().item() for a in (0.5, -0.7))
        gap[alpha] = seen - unseen
    assert abs(gap[0.0]) < 0.5 and gap[5.0] > 1.5


def loss_of_cql(agent, batch, n_data):
    """Its value per critic, and no step."""
    agent.n_data = n_data
    return agent.critic_loss(agent.with_next_action(batch))[0].item() / 2


def test_cql_loss_of_a_known_q():
    """Q(s, a) = c . a: the integral of exp Q over [-1, 1]^A is the product of 2 sinh(c_j) / c_j."""
    agent = CQL(2, 2, n_actions=3000, cql_alpha=5.0, **SMALL)
    c, batch = torch.tensor([1.0, -2.0]), filled(8, action_dim=2).filled()
    agent.critic = lambda obs, action: (action @ c).expand(2, -1)
    q, integral = batch["action"] @ c, (2 * c.sinh() / c).log().sum()
    known = q.square().mean() + 5 * (integral - q[:3].mean())  # y is 0; the first three rows are data
    assert loss_of_cql(agent, batch, 3) == pytest.approx(known.item(), abs=0.3)


def test_cql_in_one_pass_equals_pass_by_pass():
    """Each distribution's actions one after the other, from networks that are asked anew each time."""
    agent, batch, n, rows = CQL(3, 2, n_actions=4, backup_entropy=False, **SMALL), filled(64, 3, 2).filled(), 4, 64
    batch["terminated"].zero_()
    obs, next_obs, action = batch["obs"], batch["next_obs"], batch["action"]
    torch.manual_seed(1)
    found = loss_of_cql(agent, batch, 64)
    torch.manual_seed(1)
    y = 0.99 * agent.target_critic(next_obs, agent.actor.sample(next_obs)[0]).amin(0)
    parts = [agent.actor.sample(x.expand(n, -1, -1)) for x in (obs, next_obs)]
    parts.append((torch.rand(n, rows, 2) * 2 - 1, torch.full((n, rows), -2 * math.log(2))))
    ratios = [agent.critic(obs, a) - log_prob for part in parts for a, log_prob in zip(*part)]
    q, log_integral = agent.critic(obs, action), torch.stack(ratios).logsumexp(0) - math.log(3 * n)
    assert found == pytest.approx(((q - y).square() + 10 * (log_integral - q)).mean().item(), rel=1e-5)


def constant_model(biases):
    """A world model of one observation and the reward; member i predicts (delta, reward) = biases[i], nearly surely."""
    model = WorldModel(1, 1, 1, members=len(biases), hidden=4, layers=1)
    with torch.no_grad():
        for p in (*model.weights, *model.biases):
            p.zero_()
        model.biases[-1][:, 0, :2] = torch.tensor(biases)
        model.biases[-1][:, 0, 2:] = -100.0
        model.min_logvar.fill_(-30.0)
    return model


SHORT = {"rollout_batch": 64, "rollout_length": 3, "rollout_every": 10, "retain": 2, "real_ratio": 0.5}


def test_mopo_reward_on_a_model_with_known_deviations(monkeypatch):
    model = constant_model([[0.1, 1.0], [0.3, 3.0]])  # (delta, reward) of the two members
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda obs, action: (predict(obs, action)[0], stds.expand(2, len(obs), 2)))
    imagination = Imagination(model, lambda obs: obs[:, 0] > 0.35, penalty_coef=2.0, **SHORT)
    stds = torch.tensor([[[3.0, 4.0]], [[1.0, 1.0]]])  # lengths 5 and 1.4: the penalty is 2 x 5, whoever is drawn
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    imagination.roll_out(lambda obs: torch.zeros(len(obs), 1), torch.zeros(64, 1))
    data = imagination.buffer.filled()
    for reward in data["reward"].tolist():
        assert min(abs(reward - (1 - 10)), abs(reward - (3 - 10))) < 1e-3
    first = data["next_obs"][:64, 0]
    assert {round(x, 3) for x in first.tolist()} == {0.1, 0.3}  # a member each, not their mean
    torch.testing.assert_close(data["terminated"], (data["next_obs"][:, 0] > 0.35).float())
    assert (data["obs"][:, 0] <= 0.35).all()  # nothing goes on after its end
    assert len(data["obs"]) < 3 * 64 and (data["uncertainty"] == 0).all()
    model.obs_high.fill_(0.2)  # what the data's range hides has ended all the same
    tight = Imagination(model, lambda obs: obs[:, 0] > 0.25, **SHORT)
    tight.roll_out(lambda obs: torch.zeros(len(obs), 1), torch.zeros(64, 1))
    first = {key: values[:64] for key, values in tight.buffer.filled().items()}
    assert first["next_obs"].max() == 0.2
    assert torch.equal(first["terminated"] > 0, first["next_obs"][:, 0] > 0.15) and first["terminated"].any()


def test_mopo_and_combo_mix_data_and_imagined_steps():
    buffer = filled(obs_dim=1, action=torch.full((256, 1), 0.25))
    for real_ratio, n in ((0.05, 3), (0.5, 32)):
        imagination = Imagination(constant_model([[0.1, 1.0]] * 2), lambda obs: obs[:, 0] > 99,
                                  **{**SHORT, "real_ratio": real_ratio})
        batch, n_real = imagination.batch(buffer, lambda obs: torch.full((len(obs), 1), 0.75), 0, 64)
        assert n_real == n and imagination.buffer.size == 64 * 3
        assert batch["action"].flatten().tolist() == [0.25] * n + [0.75] * (64 - n)
        assert imagination.batch(buffer, None, 5, 64)[0]["obs"].shape == (64, 1)  # not yet time for new rollouts
    agent = MOPO(1, 1, imagination=imagination, **SMALL)
    agent.learn(buffer)
    assert agent.updates == 1


def test_what_an_older_model_imagined_goes(monkeypatch):
    """After a fit batches hold nothing of before, and it is time for rollouts."""
    buffer, model = filled(obs_dim=1, action=torch.full((256, 1), 0.25)), constant_model([[0.1, 1.0]] * 2)
    monkeypatch.setattr(model, "fit", lambda *_: dict(epochs=1, holdout_mse=0.0))
    imagination = Imagination(model, lambda obs: obs[:, 0] > 99, **SHORT)
    imagination.batch(buffer, lambda obs: torch.full((len(obs), 1), 0.5), 0, 64)
    imagination.fit(buffer)
    batch, n_real = imagination.batch(buffer, lambda obs: torch.full((len(obs), 1), 0.75), 5, 64)
    assert batch["action"].flatten().tolist() == [0.25] * 32 + [0.75] * 32 and n_real == 32
    assert imagination.buffer.size == 64 * 3


def test_the_td_error_of_mopo_and_combo_is_of_all_rows():
    batch = {key: values[:4] for key, values in filled(obs_dim=1).filled().items()}
    batch["reward"] = torch.tensor([1000.0, 1000.0, 0.0, 0.0])  # the first two are data
    for method in (MOPO, COMBO):
        agent = method(1, 1, imagination=Imagination(constant_model([[0.1, 1.0]] * 2), None, **SHORT), **SMALL)
        assert 400 < float(agent.learn_from(batch, 2)["td_error"]) < 600


def test_a_fall_whose_end_the_file_does_not_tell_is_not_fit(monkeypatch):
    buffer, model = filled(obs_dim=1), constant_model([[0.1, 1.0]] * 2)
    buffer.data["next_obs"][3] = buffer.data["obs"][3]
    monkeypatch.setattr(model, "fit", lambda obs, *_: dict(epochs=1, holdout_mse=float(len(obs))))
    left = Imagination(model, lambda obs: obs[:, 0] > 99, **SHORT).fit(buffer, lambda text: None)
    assert left["model_holdout_mse"] == buffer.size - 1


@pytest.mark.parametrize("method", ["mopo", "combo"])
@pytest.mark.parametrize("every, sizes", [(20, [300, 320, 340]), (0, [300])])
def test_online_the_model_is_refit_on_the_new_steps_too(dataset, tmp_path, monkeypatch, method, every, sizes):
    seen, original = [], WorldModel.fit

    def watched(model, obs, *rest, max_epochs, **others):
        seen.append((len(obs), max_epochs))
        return original(model, obs, *rest, max_epochs=max_epochs, **others)

    monkeypatch.setattr(WorldModel, "fit", watched)
    code, folder = run(method, tmp_path, dataset, "--refit-every", every, "--refit-epochs", 1)
    assert code == 0 and seen == [(size, 2 if i == 0 else 1) for i, size in enumerate(sizes)]
    *before, at_40, at_50 = [row["model_holdout_mse"] for row in rows(folder)]
    assert len({*before}) == 1 and at_40 == at_50 and (at_40 == before[0]) == (not every)  # the model's of that time


def test_combo_pushes_data_up_and_the_mix_down(monkeypatch):
    """The gap is the mix's log integral less Q on the data rows alone."""
    imagination = Imagination(constant_model([[0.1, 1.0]] * 2), lambda obs: obs[:, 0] > 99, **SHORT)
    agent = COMBO(1, 1, imagination=imagination, cql_alpha=3.0, n_actions=2, **SMALL)
    batch, n_real = imagination.batch(filled(obs_dim=1), agent.act, 0, 64)
    monkeypatch.setattr(agent, "target", lambda *_: torch.zeros(64))
    torch.manual_seed(1)
    whole = loss_of_cql(agent, batch, 64)
    torch.manual_seed(1)
    q = agent.critic(batch["obs"], batch["action"]).detach()
    assert n_real == 32 and loss_of_cql(agent, batch, n_real) == pytest.approx(
        (whole + 3.0 * (q.mean() - q[:, :32].mean())).item(), rel=1e-5)
    agent.learn_from(batch, n_real)
    assert agent.n_data == 32


# ---------------------------------------------------------------------------------------------------------- whole runs

TINY = "--eval-every 40 --eval-episodes 1 --checkpoint-every 30 --hidden 16 --device cpu --fast off".split()
TINY_ONLINE = [*TINY, "--target-steps", "100"]
TINY_OFFLINE = [*TINY, "--offline-updates", "60", "--online-steps", "50", "--batch-size", "16"]
TINY_MODEL = """--members 2 --model-hidden 16 --model-layers 1 --model-epochs 2 --rollout-batch 20 --rollout-length 2
                --rollout-every 10 --refit-every 20""".split()
EXTRA = {"sac": ["--random-steps", "30", "--batch-size", "16"], "td3": ["--random-steps", "30", "--batch-size", "16"],
         "ppo": ["--rollout-steps", "32", "--minibatches", "2", "--epochs", "2"], "bc": ["--critic-steps", "10"],
         "cql": ["--cql-actions", "2"], "mopo": TINY_MODEL, "combo": [*TINY_MODEL, "--cql-actions", "2"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """300 random steps of Hopper under D4RL's names, written by hand."""
    env, rng = TaskEnv("Hopper-v4", seed=5), np.random.default_rng(5)
    steps, obs = [], env.reset()
    for _ in range(300):
        action = rng.uniform(-1, 1, 3).astype(np.float32)
        next_obs, reward, terminated, truncated, features = env.step(action)
        steps.append((obs, action, reward, next_obs, terminated, truncated, features))
        obs = env.reset() if terminated or truncated else next_obs
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "features")
    path = tmp_path_factory.mktemp("data") / "hopper.npz"
    np.savez(path, **{name: np.array(column) for name, column in zip(names, zip(*steps))})
    return path


def run(method, out, dataset, *flags, name="a"):
    """Runs a baseline on Hopper; returns its exit code and its folder."""
    given = TINY_ONLINE if method in ONLINE else [*TINY_OFFLINE, "--dataset", str(dataset)]
    code = importlib.import_module(method).main(["--env", "Hopper-v4", "--out", str(out), "--name", name, *given,
                                                 *EXTRA.get(method, []), *map(str, flags)])
    return code, out / f"Hopper-v4__{name}__0"


def rows(folder):
    with open(folder / "progress.csv") as file:
        return [{key: value for key, value in row.items() if key != "wall_clock"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    """Uninterrupted runs, by method and flags, each made when it is first asked for; no test may write to them."""
    made = {}

    def get(method, *flags):
        if (method, flags) not in made:
            code, made[method, flags] = run(method, tmp_path_factory.mktemp(method), dataset, *flags)
            assert code == 0
        return made[method, flags]

    return get


OFF = ("--online-steps", "0")


@pytest.mark.parametrize("method", ONLINE + OFFLINE)
def test_a_run_leaves_what_wombet_leaves_and_plays(whole, method, capsys):
    folder = whole(method)
    table = rows(folder)
    assert [*table[0]] == [c for c in COLUMNS if c != "wall_clock"]
    marks = [(r["phase"], r["env_steps"]) for r in table]
    if method in ONLINE:
        assert marks == [("target", "40"), ("target", "80"), ("target", "100")]
        # one a step after 30 random ones
        assert method == "ppo" or [r["updates"] for r in table] == ["10", "50", "70"]
    else:
        assert marks == [("offline", "0"), ("offline", "0"), ("target", "0"), ("target", "40"), ("target", "50")]
        assert [r["updates"] for r in table] == ["40", "60", "60", "100", "110"]
        assert table[2]["return_mean"] == table[1]["return_mean"] and table[0]["offline_size"] == "300"
    assert json.loads((folder / "config.json").read_text())["flags"]["env"] == "Hopper-v4"
    capsys.readouterr()
    assert importlib.import_module(method).main(["--evaluate", str(folder)]) == 0
    assert f"return {float(table[-1]['return_mean']):.1f} ±" in capsys.readouterr().out


@pytest.mark.parametrize("method, calls", [("sac", 41), ("ppo", 75), ("bc", 70), ("iql", 47), ("mopo", 57),
                                           ("combo", 83)])
def test_stop_and_resume_equals_the_uninterrupted_run(whole, dataset, tmp_path, monkeypatch, method, calls):
    """SIGINT during that training step: offline for up to 60, online beyond."""
    count, original = [0], common.learn

    def counted(run):
        count[0] += 1
        if count[0] == calls:
            signal.raise_signal(signal.SIGINT)
        original(run)

    with monkeypatch.context() as patch:
        patch.setattr(common, "learn", counted)
        code, stopped = run(method, tmp_path, dataset)
    assert code == 130 and len(rows(stopped)) < len(rows(whole(method)))
    assert importlib.import_module(method).main(["--resume", str(stopped)]) == 0
    assert rows(stopped) == rows(whole(method))
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (stopped, whole(method)))
    assert torch.equal(ours["torch_rng"], theirs["torch_rng"])


@pytest.mark.parametrize("method", ONLINE + OFFLINE)
def test_no_float64_tensor_in_a_run(dataset, tmp_path, no_float64, method):
    """Apart from what a file holds, which the host reads."""
    budget = ["--target-steps", "40"] if method in ONLINE else ["--offline-updates", "5", "--online-steps", "15"]
    data = dict(np.load(dataset))
    np.savez(tmp_path / "single.npz", **{**data, "rewards": data["rewards"].astype(np.float32)})
    with no_float64:
        code, folder = run(method, tmp_path, tmp_path / "single.npz", *budget)
        assert code == 0
        assert importlib.import_module(method).main(["--resume", str(folder), *budget[-2:-1], "45"]) == 0


@pytest.mark.parametrize("method", OFFLINE)
def test_an_offline_run_goes_on_online_later(whole, dataset, tmp_path, method):
    """An offline run that is resumed with --online-steps is the run that had them from the start; online it learns."""
    folder = Path(shutil.copytree(whole(method, *OFF), tmp_path / "run"))
    assert rows(folder) == rows(whole(method))[:3]
    actor = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]["actor"]
    config = (folder / "config.json").read_text()  # of nothing to do nothing is written
    assert importlib.import_module(method).main(["--resume", str(folder), "--eval-every", "7"]) == 0
    assert (folder / "config.json").read_text() == config
    assert importlib.import_module(method).main(["--resume", str(folder), "--online-steps", "50"]) == 0
    assert rows(folder) == rows(whole(method))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(state["buffer"]["rows"]["obs"]) == 350  # the new steps joined the dataset
    assert all(not torch.equal(now, before) for now, before in zip(state["agent"]["actor"].values(), actor.values()))


def test_ppo_statistics_travel_with_the_checkpoint(whole):
    state = torch.load(whole("ppo") / "checkpoint.pt", weights_only=True)
    agent = PPO(11, 3, steps=100, hidden=(16, 16))
    agent.load_state_dict(state["agent"])
    assert agent.obs_moments.count == agent.return_moments.count == 96  # three batches of 32
    obs = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32)
    assert agent.normalise(torch.as_tensor(obs)).sub(torch.as_tensor(obs)).abs().max() > 0.1
    fresh = PPO(11, 3, steps=100, hidden=(16, 16))
    fresh.actor.load_state_dict(agent.actor.state_dict())
    assert not torch.equal(agent.act(obs, True), fresh.act(obs, True))


def test_a_d4rl_file_with_five_keys_trains_bc(dataset, tmp_path, capsys):
    data = np.load(dataset)
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    np.savez(tmp_path / "five.npz", **{name: data[name] for name in names})
    code, folder = run("bc", tmp_path, tmp_path / "five.npz", "--online-steps", "0")
    assert code == 0 and rows(folder)[-1]["offline_size"] == "300"
    # the source's reward needs the velocity, which is not among the five
    assert run("bc", tmp_path, tmp_path / "five.npz", "--source-rewards", name="b")[0] == 2
    assert "lacks x_velocity" in capsys.readouterr().err


def test_source_rewards_are_the_source_tasks(dataset):
    import iql

    args = iql.build_parser().parse_args(["--dataset", str(dataset), "--env", "Hopper-v4", "--source-speed-cap", "0.1",
                                          "--device", "cpu"])
    data, env = np.load(dataset), TaskEnv("Hopper-v4")
    np.testing.assert_allclose(common.read_dataset(args, env).filled()["reward"], data["rewards"], rtol=1e-5)
    args.source_rewards = True
    known = np.minimum(data["features"][:, 0], 0.1) + 1 - 1e-3 * np.square(data["actions"]).sum(1)
    np.testing.assert_allclose(common.read_dataset(args, env).filled()["reward"], known, rtol=1e-5)


def test_source_rewards_where_an_environment_has_no_time_limit(dataset, tmp_path, monkeypatch):
    spec = dataclasses.replace(gym.registry["Hopper-v4"], max_episode_steps=None)
    monkeypatch.setitem(gym.registry, "Hopper-v4", spec)
    assert run("bc", tmp_path, dataset, "--source-rewards", "--episode-steps", "20", "--online-steps", "0")[0] == 0


def test_a_saved_replay_buffer_is_a_dataset(tmp_path):
    code, folder = run("sac", tmp_path, None, "--save-dataset", "--target-steps", "60")
    assert code == 0
    assert run("bc", tmp_path, folder / "dataset.npz", "--online-steps", "0", name="b")[0] == 0


@pytest.mark.parametrize("method", ["sac", "cql", "mopo", "combo"])
def test_fast_reaches_networks_and_model(method):
    program = importlib.import_module(method)
    args = program.build_parser().parse_args(["--device", "cpu"])
    args.speed = {"compile": False, "dtype": "bfloat16"}
    agent = program.make_agent(args, TaskEnv("Hopper-v4"))
    assert agent.dtype == agent.critic.dtype == torch.bfloat16
    assert method in ("sac", "cql") or agent.imagination.model.inference_dtype == torch.bfloat16


def test_what_a_resumed_run_may_be_given_anew(dataset, tmp_path):
    """BC's finished run goes on for fewer steps than its critics would take; a model's learning rate is one, too."""
    code, folder = run("bc", tmp_path, dataset, "--online-steps", "0", "--critic-steps", "50")
    assert code == 0
    more = ["--resume", str(folder), "--online-steps", "20"]
    assert importlib.import_module("bc").main(more) == 2
    assert importlib.import_module("bc").main([*more, "--critic-steps", "5"]) == 0
    assert rows(folder)[-1]["env_steps"] == "20"
    code, folder = run("mopo", tmp_path, dataset, "--online-steps", "0", name="b")
    assert code == 0 and importlib.import_module("mopo").main(
        ["--resume", str(folder), "--online-steps", "20", "--model-lr", "2e-4"]) == 0
    assert json.loads((folder / "config.json").read_text())["flags"]["model_lr"] == 2e-4


def test_what_fast_stands_for(tmp_path, dataset, monkeypatch):
    """Updates count as steps do; what a method does not heed is not in its config.json."""
    monkeypatch.setattr(common, "train", lambda args, *_: seen.append(args.speed))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++")
    for method in ONLINE + OFFLINE:
        seen = []
        for fast in ("auto", "on"):
            flag = "--target-steps" if method in ONLINE else "--offline-updates"
            assert run(method, tmp_path, dataset, flag, 20000, "--fast", fast)[0] == 0
        heeds = method in ("sac", "cql", "mopo", "combo")
        assert [speed["compile"] for speed in seen] == [heeds] * 2
        assert seen[1]["dtype"] == ("bfloat16" if heeds else "float32") and seen[1]["precision"] == "high"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("method", [DelayedSAC, CQL])
def test_compiled_gradients_are_the_same(method):
    critics = []
    for compiled in (False, True):
        torch.manual_seed(0)
        agent, buffer = method(2, 1, compile=compiled, **SMALL), filled()
        for _ in range(5):
            agent.learn(buffer)
        critics.append(agent.critic.state_dict())
    torch.testing.assert_close(*critics, rtol=1e-3, atol=1e-4)


SWITCHES = [("sac", "--no-backup-entropy"), ("sac", "--layer-norm"), ("sac", "--policy-delay=1"),
            ("ppo", "--no-normalise-obs"), ("ppo", "--no-normalise-rewards"), ("ppo", "--no-anneal-lr"),
            ("ppo", "--entropy-coef=0.1"), ("td3", "--target-noise=0"), ("td3", "--exploration=0"),
            ("iql", "--no-cosine-lr"), ("iql", "--no-scale-rewards"), ("iql", "--expectile=0.9"), ("iql", "--beta=0"),
            ("iql", "--source-rewards"), ("awac", "--awac-lambda=0.1"), ("cql", "--cql-alpha=0"),
            ("cql", "--backup-entropy"), ("mopo", "--penalty-coef=0"), ("mopo", "--real-ratio=0.5"),
            ("mopo", "--members=1"), ("combo", "--members=1"), ("combo", "--real-ratio=0.9")]


@pytest.mark.parametrize("method, flag", SWITCHES)
def test_each_flag_changes_what_the_run_learns(whole, dataset, tmp_path, method, flag):
    budget = () if method in ONLINE else OFF
    more = ("--source-speed-cap", "0.01") if flag == "--source-rewards" else ()
    code, folder = run(method, tmp_path, dataset, flag, *budget, *more)
    assert code == 0
    folders = folder, whole(method, *budget)
    ours, theirs = map(rows, folders)
    weights = [torch.load(f / "checkpoint.pt", weights_only=True)["agent"]["actor"].values() for f in folders]
    assert len(ours) == len(theirs)  # as many steps
    assert ours != theirs or any(not torch.equal(a, b) for a, b in zip(*weights))


BAD = {"no dataset": ["bc", "--dataset", ""], "missing file": ["iql", "--dataset", "nowhere.npz"],
       "unknown environment": ["sac", "--env", "Nope-v4"], "unknown flag": ["td3", "--nope"],
       "negative": ["ppo", "--epochs", "-1"], "minibatches": ["ppo", "--minibatches", "33"],
       "share": ["iql", "--expectile", "2"], "targets that stand still": ["td3", "--polyak", "0"],
       "no checkpoint": ["sac", "--resume", "nowhere"],
       "gif": ["sac", "--gif", "a.gif"], "nothing to do": ["bc", "--offline-updates", "0", "--online-steps", "0"],
       "no data in a batch": ["combo", "--real-ratio", "0"], "device": ["cql", "--device", "abacus"],
       "unknown source": ["awac", "--source-rewards", "--source", "x"],
       "another environment's data": ["mopo", "--env", "Walker2d-v4"]}

# the line must name these
NAMED = {"sac never learns": (["sac", "--random-steps", "100"], "--random-steps 100", "--target-steps 100"),
         "td3 never learns": (["td3", "--random-steps", "5000"], "--random-steps 5000", "--target-steps 100"),
         "ppo never fills a batch": (["ppo", "--rollout-steps", "101"], "--rollout-steps 101", "--target-steps 100"),
         "unknown source, not used": (["iql", "--source", "foo"], "'foo'", "near, backward, stand"),
         "source, not used": (["iql", "--source", "backward"], "--source backward", "--source-rewards"),
         "quantity, not used": (["cql", "--source-speed-cap", "2"], "--source-speed-cap 2", "--source-rewards"),
         "bc never tunes": (["bc", "--critic-steps", "50"], "--critic-steps 50", "--online-steps 50")}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, dataset, capsys, case):
    code, folder = run(case[0], tmp_path, dataset, *case[1:])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(f"{case[0]}.py: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("*__a__0"))


@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED)
def test_what_would_change_nothing_is_refused_by_name(tmp_path, dataset, capsys, case):
    (method, *flags), *named = case
    code, _ = run(method, tmp_path, dataset, *flags)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and all(words in error for words in named), error
    assert not list(tmp_path.glob("*__a__0"))


def test_another_programs_checkpoint_and_a_folder_that_exists_are_refused(whole, dataset, capsys):
    import td3

    folder = whole("sac")
    before = (folder / "progress.csv").read_bytes()
    assert td3.main(["--resume", str(folder)]) == 2
    assert "of another program" in capsys.readouterr().err
    assert run("sac", folder.parent, None)[0] == 2 and "exists" in capsys.readouterr().err
    assert (folder / "progress.csv").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(dataset, tmp_path, monkeypatch, capsys):
    original, count = IQL.learn, [0]

    def poisoned(agent, buffer):
        count[0] += 1
        if count[0] == 45:
            buffer.data["reward"].fill_(float("nan"))
        return original(agent, buffer)

    monkeypatch.setattr(IQL, "learn", poisoned)
    code, folder = run("iql", tmp_path, dataset)
    assert code == 1 and "not finite" in capsys.readouterr().err
    assert (folder / "nonfinite.pt").exists()
    assert all(p.isfinite().all() for p in torch.load(folder / "checkpoint.pt", weights_only=True)["agent"][
        "critic"].values())


def test_plot_takes_baselines_together(whole, tmp_path, capsys):
    folders = [str(whole(method)) for method in ("sac", "iql")]
    for folder, name in zip(folders, ("sac", "iql")):
        target = tmp_path / f"Hopper-v4__{name}__0"
        target.mkdir()
        (target / "progress.csv").write_bytes((whole(name) / "progress.csv").read_bytes())
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    assert plot.main([str(tmp_path), "--kind", "bars", "--phase", "offline", "--out", str(tmp_path / "b.png")]) == 0
    assert "iql" in capsys.readouterr().out


@pytest.mark.parametrize("method", ONLINE + OFFLINE)
def test_help_names_every_flag_with_a_word_of_help(method):
    parser = importlib.import_module(method).build_parser()
    assert len(parser.format_help()) > 1000
    for action in parser._actions:
        assert action.help, action.option_strings


README = (Path(common.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("program, flags", re.findall(r"^python (?:baselines/)?(\w+)\.py (--.*)$", README, re.M))
def test_each_command_of_the_readme_is_understood(program, flags):
    importlib.import_module(program).build_parser().parse_args(shlex.split(flags))


def test_the_readme_names_each_method():
    files = {path.name for path in Path(common.__file__).parent.glob("*.py")} - {"common.py"}
    assert files == set(re.findall(r"^\| `(\w+\.py)` \|", README.split("## Run")[0], re.M))


def test_each_group_of_an_optimiser_keeps_its_own_rate():
    old, new = (DelayedSAC(2, 1, actor_lr=rate, critic_lr=9 * rate, hidden=(8,)) for rate in (1e-3, 1e-4))
    harness.load_agent(new, old.state_dict())
    assert [group["lr"] for group in new.actor_optimizer.param_groups] == pytest.approx([1e-4, 9e-4])


@pytest.mark.parametrize("name", ["source_steps", "target_steps", "pretrain_updates", "offline_updates",
                                  "online_steps"])
def test_steps_and_updates_of_every_phase_count_for_compiling(monkeypatch, name):
    monkeypatch.setattr("shutil.which", lambda program: "/usr/bin/c++")
    for steps, pays in ((9_999, False), (10_000, True)):
        args = SimpleNamespace(fast="auto", device="cpu", **{name: steps})
        assert harness.speed_settings(args, True)["compile"] == pays


def test_targets_follow_at_their_rate():
    target, network = nn.Linear(1, 1), nn.Linear(1, 1)
    for layer, value in ((target, 1.0), (network, 2.0)):
        nn.init.constant_(layer.weight, value)
    common.follow(target, network, 0.1)
    assert target.weight.item() == pytest.approx(1.1) and network.weight.item() == 2.0


def test_what_is_logged_of_the_critics():
    critic = nn.Linear(1, 2)
    agent = SimpleNamespace(critic=lambda obs, action: critic(obs).T,
                            critic_optimizer=common.adam(critic.parameters(), 1))
    nn.init.zeros_(critic.weight), nn.init.zeros_(critic.bias)
    y = torch.tensor([3.0, -1.0])
    info = common.update_critics(agent, {"obs": torch.ones(2, 1), "action": None}, y)
    assert {key: value.item() for key, value in info.items()} == {"critic_loss": 5.0, "q_mean": 0.0, "td_error": 2.0}


def test_noisy_actions_stay_in_the_box():
    policy, td3, obs = common.GaussianPolicy(2, 1, (8,)), TD3(2, 1, hidden=(8,), exploration=5.0), torch.zeros(200, 2)
    assert policy.act(obs).abs().max() == td3.act(obs).abs().max() == 1


def test_each_seed_begins_in_a_state_of_its_own(tmp_path):
    import sac
    first = []
    for seed in ("0", "1", "1"):
        args = sac.build_parser().parse_args(["--env", "Hopper-v4", "--seed", seed, "--device", "cpu", "--hidden", "8",
                                              "--target-steps", "9", "--eval-episodes", "1"])
        args.speed = {"compile": False, "dtype": "float32"}
        first.append(common.build(args, tmp_path, sac.make_agent, "sac").env.reset().tolist())
    assert first[0] != first[1] == first[2]


GIVEN = {"sac": "discount .9,polyak .1,init_temperature .5,target_entropy -7,batch_size 9,policy_delay 3",
         "td3": "discount .9,polyak .1,lr .01,batch_size 9,exploration .3,target_noise .4,noise_clip .7,policy_delay 3",
         "ppo": "discount .9,gae_lambda .8,clip .3,entropy_coef .01,value_coef .7,max_grad_norm .2,epochs 3,"
                "minibatches 5",
         "iql": "discount .9,polyak .1,lr .01,batch_size 9,expectile .6,beta 2",
         "awac": "discount .9,polyak .1,lr .01,batch_size 9,awac_lambda .3",
         "bc": "discount .9,polyak .1,lr .01,batch_size 9,exploration .3,noise_clip .7,critic_steps 4",
         "cql": "discount .9,polyak .1,init_temperature .5,target_entropy -7,batch_size 9,cql_alpha 3",
         "mopo": "discount .9,polyak .1,init_temperature .5,target_entropy -7,batch_size 9",
         "combo": "discount .9,polyak .1,init_temperature .5,target_entropy -7,batch_size 9,cql_alpha 3"}


@pytest.mark.parametrize("method", GIVEN)
def test_each_flag_reaches_its_agent(method):
    program, flags = importlib.import_module(method), [item.split() for item in GIVEN[method].split(",")]
    args = program.build_parser().parse_args(
        ["--device", "cpu", "--hidden", "8", "--layers", "3",
         *[f"--{name.replace('_', '-')}={value}" for name, value in flags],
         *(["--model-lr=0.02", "--model-batch-size=7"] if method in ("mopo", "combo") else [])])
    args.speed = {"compile": False, "dtype": "float32"}
    agent = program.make_agent(args, TaskEnv("Hopper-v4"))
    held = {**vars(agent), "init_temperature": agent.log_temperature.exp().item()} if hasattr(
        agent, "log_temperature") else {**vars(agent), "lr": vars(agent).get("lr", args.lr)}
    assert {name: held[name] for name, _ in flags} == pytest.approx({name: float(value) for name, value in flags})
    widths = [p.shape[0] for name, p in agent.actor.named_parameters() if name.endswith("weight")]
    assert widths.count(8) == 3  # hidden layers
    if method in ("cql", "mopo", "combo"):  # the temperature learns at the actor's rate, the critics at theirs
        assert [group["lr"] for group in agent.actor_optimizer.param_groups] == [args.actor_lr, args.actor_lr]
    if method in ("mopo", "combo"):
        assert agent.imagination.fit_kwargs == {"lr": 0.02, "batch_size": 7, "max_epochs": 300}


def test_sacs_temperature_learns_at_the_critics_rate_where_none_is_given():
    for given, rate in ((None, 1e-3), (1e-5, 1e-5)):
        agent = DelayedSAC(2, 1, actor_lr=1e-4, critic_lr=1e-3, temperature_lr=given, hidden=(8,))
        assert [group["lr"] for group in agent.actor_optimizer.param_groups] == [1e-4, rate]


@pytest.mark.parametrize("method", [IQL, AWAC])
@pytest.mark.parametrize("terminated", [0.0, 1.0])
def test_nothing_is_worth_anything_after_a_fall(method, terminated):
    """The next state's value is 100: of 99 in the target where the episode goes on, and of nothing where it ended."""
    agent, buffer = method(2, 1, hidden=(8,), batch_size=16, lr=1e-9), filled(terminated=torch.full((256,), terminated))
    constant(agent.critic, [0.0, 0.0])
    constant(agent.target_critic, [100.0, 150.0])  # the smaller one counts
    if method is IQL:
        nn.init.zeros_(agent.value[-2].weight), nn.init.constant_(agent.value[-2].bias, 100.0)
    assert agent.learn(buffer)["td_error"].item() == pytest.approx(0.0 if terminated else 99.0, abs=1e-3)


def test_iql_by_hand():
    """The smaller of the target critics' values, against V: expectile regression, and weights that are cut at 100."""
    agent, buffer = IQL(2, 1, hidden=(8,), batch_size=256, expectile=0.7, beta=3.0, lr=1e-9), filled()
    for key in ("obs", "action"):
        buffer.data[key].copy_(buffer.data[key][:1].clone())
    constant(agent.critic, [0.0, 0.0])
    constant(agent.target_critic, [4.0, 9.0])
    nn.init.zeros_(agent.value[-2].weight), nn.init.zeros_(agent.value[-2].bias)
    log_prob = agent.actor.log_prob(buffer.data["obs"][:1], buffer.data["action"][:1]).item()
    info = agent.learn(buffer)
    assert info["value_loss"].item() == pytest.approx(0.7 * 16, rel=1e-4)
    assert info["actor_loss"].item() == pytest.approx(-100 * log_prob, rel=1e-4)  # exp(3 x 4) is more


def test_iqls_actor_rate_is_a_cosine_offline_and_constant_online():
    agent, buffer = IQL(2, 1, hidden=(8,), batch_size=16, lr=1e-3, steps=4), filled()
    for known in (1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0):
        agent.learn(buffer)
        assert agent.actor_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * known, abs=1e-12)
    agent.start_online()
    agent.learn(buffer)
    assert agent.actor_optimizer.param_groups[0]["lr"] == 1e-3


def test_awac_draws_its_actions_and_asks_the_target_critics():
    agent, buffer, seen = AWAC(2, 1, hidden=(8,), batch_size=16, lr=1e-9), filled(terminated=torch.zeros(256)), []
    act = agent.act
    agent.act = lambda obs, deterministic=False: seen.append(deterministic) or act(obs, deterministic)
    constant(agent.critic, [7.0, 7.0])
    constant(agent.target_critic, [0.0, 0.0])
    assert agent.learn(buffer)["td_error"].item() == pytest.approx(7.0, abs=1e-3) and seen == [False, False]


def test_td3_climbs_the_first_critic():
    class Critics(nn.Module):
        def forward(self, obs, action):
            return torch.stack([action[:, 0], -action[:, 0]])

    agent = TD3(2, 1, hidden=(8,), lr=1e-2)
    agent.critic = Critics()
    for _ in range(100):
        agent.update_actor(torch.randn(32, 2))
    assert agent.act(torch.randn(50, 2), deterministic=True).min() > 0.8


def minibatch(agent, n=16):
    obs, action = torch.randn(n, 2), torch.randn(n, 1)
    with torch.no_grad():
        old = common.log_normal(action, agent.actor(obs), agent.actor.log_std)
        value = agent.value(obs).squeeze(-1)
    return obs, action, old, value


def test_ppo_centres_and_scales_the_advantages_of_a_minibatch():
    """At the old policy the ratio is 1 and the actor's loss minus their mean: 0, whatever they are."""
    agent = PPO(2, 1, steps=10)
    obs, action, old, value = minibatch(agent)
    info = agent.update(obs, action, old, 5 + 3 * torch.randn(16), value, value)
    assert info["actor_loss"].item() == pytest.approx(0.0, abs=1e-5)


def test_ppos_entropy_bonus_widens_the_policy():
    agent = PPO(2, 1, steps=10, entropy_coef=1.0)
    obs, action, old, value = minibatch(agent)
    for _ in range(5):
        agent.update(obs, action, old, torch.ones(16), value, value)  # no action is better than another
    assert agent.actor.log_std.item() > 1e-3


def test_ppo_clips_about_the_old_value():
    agent = PPO(2, 1, steps=10, clip=0.2)
    obs, action, old, value = minibatch(agent)
    old_value, returns = value - torch.tensor([0.0, 1.0]).repeat(8), value + 3
    known = clipped_value_loss(value, old_value, returns, 0.2).item()
    info = agent.update(obs, action, old, torch.randn(16), returns, old_value)
    assert info["critic_loss"].item() == pytest.approx(known)


def test_ppo_cuts_a_long_gradient():
    agent = PPO(2, 1, steps=10, max_grad_norm=0.3)
    obs, action, old, value = minibatch(agent)
    agent.update(obs, action, old, torch.randn(16), value + 100, value)
    assert torch.stack([p.grad.norm() for p in agent.parameters]).norm().item() == pytest.approx(0.3, rel=1e-3)


def test_ppo_values_the_next_observation_normalised():
    """Nothing moves and nothing is paid: with gamma = 1 each advantage is 0."""
    agent, buffer = PPO(2, 1, steps=16, rollout_steps=16, minibatches=1, epochs=1, discount=1.0), filled(16)
    agent.obs_moments.update(5 * torch.randn(100, 2) + 3)
    agent.set_scale()
    buffer.data["next_obs"].copy_(buffer.data["obs"])
    buffer.data["terminated"].zero_()
    assert agent.learn(buffer)["td_error"].item() == pytest.approx(0.0, abs=1e-6)


def test_ppos_advantages_end_with_a_time_limit_too():
    """Each step is an episode's last: what it is worth is r + gamma V(s'), and nothing of the next episode's."""
    agent, buffer = PPO(2, 1, steps=16, rollout_steps=16, minibatches=1, epochs=1, discount=0.9,
                        normalise_rewards=False), filled(16, reward=torch.randn(16), terminated=torch.zeros(16),
                                                         timeout=torch.ones(16))
    with torch.no_grad():
        value, next_value = (agent.value(agent.normalise(buffer.data[key])).squeeze(-1) for key in ("obs", "next_obs"))
    known = (buffer.data["reward"] + 0.9 * next_value - value).abs().mean().item()
    assert agent.learn(buffer)["td_error"].item() == pytest.approx(known, rel=1e-4)


def test_an_imagined_step_is_drawn_from_its_member(monkeypatch):
    """Its mean and its standard deviation, of the next observation and of the reward."""
    model = constant_model([[0.1, 1.0]] * 2)
    mean, std = torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.5])
    monkeypatch.setattr(model, "predict", lambda obs, action: tuple(x.expand(2, len(obs), 2) for x in (mean, std)))
    model.obs_low.fill_(-9.0), model.obs_high.fill_(9.0)
    imagination, zeros = Imagination(model, lambda obs: obs[:, 0] > 99, **SHORT), torch.zeros(9000, 1)
    next_obs, reward, _ = imagination.step(zeros, zeros)
    assert [next_obs.mean(), reward.mean()] == pytest.approx([1.0, 3.0], abs=0.03)
    assert [next_obs.std(), reward.std()] == pytest.approx([0.2, 0.5], rel=0.05)


def test_rollouts_come_every_so_many_updates_and_stay_for_as_many_times():
    """64 rollouts of 3 steps, every 10 updates; the last two times' are kept."""
    imagination = Imagination(constant_model([[0.1, 1.0]] * 2), lambda obs: obs[:, 0] > 99, **SHORT)
    made = []
    for updates in range(31):
        imagination.batch(filled(obs_dim=1), lambda obs: made.append(updates) or torch.zeros(len(obs), 1), updates, 8)
    assert made == [n for n in (0, 10, 20, 30) for _ in range(3)]
    assert imagination.buffer.size == imagination.buffer.capacity == 64 * 3 * 2


def test_mopo_rolls_out_the_policy_that_draws():
    imagination = Imagination(constant_model([[0.1, 1.0]] * 2), lambda obs: obs[:, 0] > 99, **SHORT)
    agent, seen = MOPO(1, 1, imagination=imagination, **SMALL), []
    act = agent.act
    agent.act = lambda obs, deterministic=False: seen.append(deterministic) or act(obs, deterministic)
    agent.learn(filled(obs_dim=1))
    assert seen == [False] * 3

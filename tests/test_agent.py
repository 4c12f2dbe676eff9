"""Agent: the targets of eqs. 7 and 9, the update, learning on closed forms."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from torch import distributions as dist
from torch import nn

from agent import SAC, Actor
from replay import ReplayBuffer, mixed_batch


def constant(critic, values):
    """Q_i = values[i] everywhere."""
    with torch.no_grad():
        critic.weights[-1].zero_()
        critic.biases[-1].copy_(torch.tensor(values).view(-1, 1, 1))


def make_batch(slices=1, rows=1, obs_dim=3, action_dim=2, **columns):
    """A random batch as mixed_batch gives it; columns are broadcast over it."""
    batch = {"obs": torch.randn(slices, rows, obs_dim), "action": torch.rand(slices, rows, action_dim) * 2 - 1,
             "next_obs": torch.randn(slices, rows, obs_dim)}
    for key in ("reward", "terminated", "uncertainty"):
        value = torch.as_tensor(columns.get(key, 0.0), dtype=torch.float32)
        batch[key] = value.expand(slices, rows).clone()
    return batch


def measured_target(sac, **columns):
    """y of a batch, its mean if it has more rows: what the TD error against Q = -1000 says, with a rate of zero."""
    constant(sac.critic, [-1000.0] * sac.n_critics)
    return sac.update(make_batch(**columns))["td_error"].item() - 1000


def test_act_and_value():
    """Arrays or tensors; the mode is tanh of the mean; V is the target critics' mean there."""
    sac, obs = SAC(3, 2, n_critics=3, min_critics=2, hidden=(16,)), torch.randn(7, 3)
    nn.init.normal_(sac.target_critic.biases[-1])
    mode = sac.act(obs, deterministic=True)
    torch.testing.assert_close(mode, sac.actor(obs)[0].tanh())
    torch.testing.assert_close(sac.act(obs.numpy(), deterministic=True), mode)
    assert sac.act(np.zeros(3, dtype=np.float32)).shape == (2,) and not torch.equal(sac.act(obs), sac.act(obs))
    torch.testing.assert_close(sac.value(obs), sac.target_critic(obs, mode).mean(0))


def test_training_acts_by_a_sample_of_the_actor_itself():
    """Not of its average; Q of that action is the critics' mean, not the target critics'."""
    sac, obs = SAC(3, 2, n_critics=3, min_critics=2, hidden=(16,), actor_average=0.1, lr=0.1), torch.randn(7, 3)
    sac.update(make_batch(1, 16))
    torch.manual_seed(1)
    expected = sac.actor.sample(obs)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(sac.act(obs), expected)
    torch.testing.assert_close(sac.q_value(obs, expected), sac.critic(obs, expected).mean(0))


def test_average_actor():
    """It is the exponential average of the actor's weights, acts deterministically and proposes, and a rate of 1 is the
    actor itself."""
    obs = torch.randn(4, 3)
    for rate in (0.25, 1.0):
        torch.manual_seed(0)
        sac = SAC(3, 2, hidden=(8,), lr=0.1, actor_average=rate)
        average = [p.clone() for p in sac.actor.parameters()]
        for _ in range(3):
            sac.update(make_batch(1, 16))
            average = [(1 - rate) * old + rate * new for old, new in zip(average, sac.actor.parameters())]
        for held, expected in zip(sac.average_actor.parameters(), average):
            torch.testing.assert_close(held, expected)
        moved = (sac.actor(obs)[0] - sac.average_actor(obs)[0]).abs().max()
        assert moved > 0.1 if rate < 1 else moved == 0
        torch.testing.assert_close(sac.act(obs, deterministic=True), sac.average_actor(obs)[0].tanh())
        torch.manual_seed(1)
        expected = sac.average_actor.sample(obs)[0]
        torch.manual_seed(1)
        torch.testing.assert_close(sac.propose(obs), expected)


@pytest.mark.parametrize("columns, expected", [
    ({"reward": 2.0, "terminated": 1.0}, 2.0), ({"reward": 2.0, "terminated": 0.0}, 2.0 + 0.9 * 3),
    ({"reward": 2.0, "terminated": 1.0, "uncertainty": 0.5}, 2.0 - 4 * 0.5),
    ({"reward": -1.0, "terminated": 0.0, "uncertainty": 0.25}, -1.0 - 4 * 0.25 + 0.9 * 3)])
def test_target_by_hand(columns, expected):
    """y = r - lambda u + gamma (1 - terminated) min over all N of the target networks; a truncation bootstraps."""
    sac = SAC(3, 2, n_critics=3, min_critics=3, hidden=(8,), lr=0.0, discount=0.9, penalty_coef=4.0, polyak=0.0,
              backup_entropy=False)
    constant(sac.target_critic, [7.0, 3.0, 5.0])
    assert measured_target(sac, rows=5, **columns) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("reward, u, floored, expected", [
    (2.0, 0.5, True, 0.0), (2.0, 0.5, False, 0.0), (2.0, 0.9, True, 0.0), (2.0, 0.9, False, -1.6),
    (2.0, 0.25, True, 1.0), (-1.0, 0.25, True, -1.0), (-1.0, 0.25, False, -2.0), (-1.0, 0.0, True, -1.0)])
def test_the_penalty_takes_no_reward_below_zero(reward, u, floored, expected):
    """max(r - lambda u, min(r, 0)): no uncertain step is worth less than a fall, after which nothing comes."""
    sac = SAC(3, 2, hidden=(8,), lr=0.0, penalty_coef=4.0, floor_penalty=floored)
    assert measured_target(sac, reward=reward, uncertainty=u, terminated=1.0) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("backup", [True, False])
@pytest.mark.parametrize("terminated", [0.0, 1.0])
def test_entropy_in_the_target(backup, terminated):
    """The mean of y against the entropy of a tanh-Gaussian by quadrature, where it is in the backup."""
    sac = SAC(3, 2, hidden=(8,), lr=0.0, discount=0.9, init_temperature=0.5, polyak=0.0, backup_entropy=backup)
    constant(sac.target_critic, [3.0, 4.0])
    with torch.no_grad():
        sac.actor.net[-1].weight.zero_()
        sac.actor.net[-1].bias.copy_(torch.tensor([0.8, -0.3, -0.5, 0.2]))  # two means, two log stds
    entropy = 0.0
    for mean, log_std in ((0.8, -0.5), (-0.3, 0.2)):
        normal, u = dist.Normal(mean, math.exp(log_std)), torch.linspace(-9, 9, 20001)
        squash = (1 - torch.tanh(u).square()).clamp(min=1e-12).log()
        entropy += normal.entropy().item() + torch.trapezoid(normal.log_prob(u).exp() * squash, u).item()
    expected = 1 + (1 - terminated) * 0.9 * (3 + 0.5 * entropy * backup)
    assert measured_target(sac, rows=40000, reward=1.0, terminated=terminated) == pytest.approx(expected, abs=0.02)


def test_minimum_over_a_random_subset():
    """Of 5 critics with values 0 to 4 two are drawn, anew for every critic step: 0, 1, 2, 3 by 4, 3, 2, 1 in 10."""
    sac = SAC(3, 2, n_critics=5, min_critics=2, hidden=(8,), lr=0.0, discount=1.0, polyak=0.0, backup_entropy=False)
    constant(sac.target_critic, [0.0, 1.0, 2.0, 3.0, 4.0])
    seen = [round(measured_target(sac)) for _ in range(400)]
    assert [seen.count(k) / 400 for k in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0], abs=0.08)
    assert measured_target(sac, slices=400) == pytest.approx(1.0, abs=0.2)


def test_td_error_is_of_target_rows_before_the_updates():
    """|mean_i Q_i - y| over the rows after the first n_offline of every slice; NaN where there are none."""
    sac = SAC(3, 2, hidden=(8,), lr=0.0)
    constant(sac.critic, [-1.0, 5.0])
    reward = torch.tensor([[900.0, 900.0, 1.0, 5.0], [900.0, 900.0, 0.0, 0.0]])
    td_error = lambda n_offline: sac.update(make_batch(2, 4, reward=reward, terminated=1.0), n_offline)["td_error"].item()
    assert td_error(2) == pytest.approx(((1 + 3) / 2 + 2) / 2)
    assert td_error(0) > 400 and math.isnan(td_error(4))


def test_the_signed_td_error_is_q_less_y():
    """The mean of (1 - 3) / 2 in the first slice and (2 + 2) / 2 in the second: errors of either sign offset."""
    sac = SAC(3, 2, hidden=(8,), lr=0.0)
    constant(sac.critic, [-1.0, 5.0])
    reward = torch.tensor([[900.0, 900.0, 1.0, 5.0], [900.0, 900.0, 0.0, 0.0]])
    info = sac.update(make_batch(2, 4, reward=reward, terminated=1.0), 2)
    assert info["signed_td_error"].item() == pytest.approx(((1 - 3) / 2 + 2) / 2)


@pytest.mark.parametrize("actor_q, expected", [("mean", -2.0), ("min", -1.0)])
def test_actor_objective(actor_q, expected):
    sac = SAC(3, 2, hidden=(8,), lr=0.0, init_temperature=1e-9, actor_q=actor_q)
    constant(sac.critic, [1.0, 3.0])
    assert sac.update(make_batch())["actor_loss"].item() == pytest.approx(expected, abs=1e-4)


def test_update_steps():
    """A critic step on every slice in turn, one actor and one temperature step, the target's rate of pursuit."""
    sac = SAC(3, 2, hidden=(8,), discount=0.0, polyak=0.25)
    twin, batch = copy.deepcopy(sac), make_batch(4, 6, reward=torch.randn(4, 6))
    before = copy.deepcopy(sac.state_dict())
    sac.update(batch)
    state = sac.state_dict()
    for part in [key for key in state if key.endswith("_optimizer")]:
        steps = {int(entry["step"]) for entry in state[part]["state"].values()}
        assert steps == ({4} if part == "critic_optimizer" else {1})
    assert state["log_temperature"] != before["log_temperature"]
    for part in ("actor", "critic", "target_critic"):
        assert all(not torch.equal(state[part][key], before[part][key]) for key in state[part])
    for k in range(4):  # with a discount of 0 the targets do not depend on the actor
        old = copy.deepcopy(twin.target_critic)
        twin.update({key: value[k : k + 1] for key, value in batch.items()})
        for t, o, c in zip(twin.target_critic.parameters(), old.parameters(), twin.critic.parameters()):
            torch.testing.assert_close(t, 0.75 * o + 0.25 * c)
    for ours, theirs in zip(sac.critic.parameters(), twin.critic.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_gradients_in_bfloat16():
    """They differ from float32's by a tenth at most of what another batch changes; acting is float32 still; states that
    8 bits do not tell apart stay apart."""
    batches, gradients, agents = [make_batch(1, 256, reward=torch.randn(1, 256)) for _ in range(2)], [], []
    for dtype, batch in (("float32", batches[0]), ("bfloat16", batches[0]), ("float32", batches[1])):
        torch.manual_seed(1)
        agents.append(sac := SAC(3, 2, n_critics=3, min_critics=3, dtype=dtype))
        part = {key: value[0] for key, value in sac.with_next_action(batch).items()}
        both = sac.critic_gradients(part, None)[0], sac.actor_gradients(part["obs"], torch.randn(256, 2))[0]
        gradients.append([torch.cat([g.flatten() for g in some]) for some in both])
    for exact, rough, other in zip(*gradients):
        assert 0 < (rough - exact).norm() < 0.1 * (other - exact).norm()
    obs = torch.full((2, 3), 1.25)
    obs[1, 0] += 1e-3  # bfloat16's next number is 8e-3 away
    torch.testing.assert_close(*(sac.act(obs, deterministic=True) for sac in agents[:2]), rtol=0, atol=0)
    q = agents[1].critic(obs, torch.zeros(2, 2))
    assert (q[:, 1] != q[:, 0]).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_updates_equal_plain_ones():
    """Three updates of two slices, with compiled gradients and with plain ones, from one seed."""
    batches = [make_batch(2, 8, reward=torch.randn(2, 8)) for _ in range(3)]
    states, infos = [], []
    for compiled in (False, True):
        torch.manual_seed(1)
        sac = SAC(3, 2, n_critics=3, min_critics=3, hidden=(16, 16), compile=compiled)
        infos.append([sac.update(batch, 2) for batch in batches])
        states.append(sac.state_dict())
    for plain, fused in zip(*infos):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    for part in ("actor", "critic", "target_critic"):
        torch.testing.assert_close(states[1][part], states[0][part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("min_critics", [2, 5])
def test_an_update_reads_no_value_on_the_host(no_host_reads, min_critics):
    """Prior and online batches drawn, mixed, and learned from: what would make a GPU wait, shown without one."""
    shapes = {key: value.shape[2:] for key, value in make_batch(1, 1).items()}
    prior, online = (ReplayBuffer(64, **shapes) for _ in range(2))
    for buffer in (prior, online):
        buffer.add(**{key: value[0] for key, value in make_batch(1, 64).items()})
    sac = SAC(3, 2, n_critics=5, min_critics=min_critics)
    with no_host_reads:
        sac.update(*mixed_batch(prior, online, 0.5, 16, 4))


def test_a_value_read_on_the_host_is_seen(no_host_reads):
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises(AssertionError), no_host_reads:
            read()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_an_update_never_waits_for_the_gpu():
    sac = SAC(3, 2, n_critics=5, min_critics=2, device="cuda")
    batch = {key: value.cuda() for key, value in make_batch(4, 16).items()}
    sac.update(batch, 4)  # the first call may set things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        sac.update(batch, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n_critics, min_critics, dtype", [(2, 2, "float32"), (4, 2, "float32"), (2, 2, "bfloat16")])
def test_critic_converges_to_the_exact_values(n_critics, min_critics, dtype):
    """0 -> 1 pays 1, 1 -> 0 nothing, 2 -> end pays 2 at u = 1: Q = 1/(1 - .81), .9/(1 - .81), 2 - lambda."""
    sac = SAC(3, 1, n_critics=n_critics, min_critics=min_critics, hidden=(32, 32), lr=3e-3, discount=0.9, polyak=0.2,
              penalty_coef=0.5, backup_entropy=False, dtype=dtype)
    state = torch.arange(96) % 3
    column = lambda values: torch.tensor(values)[state].expand(8, 96)
    one_hot = torch.eye(3)
    for _ in range(60):
        batch = {"obs": one_hot[state].expand(8, 96, 3), "next_obs": one_hot[column([1, 0, 0])],
                 "action": torch.rand(8, 96, 1) * 2 - 1, "reward": column([1.0, 0.0, 2.0]),
                 "terminated": column([0.0, 0.0, 1.0]), "uncertainty": column([0.0, 0.0, 1.0])}
        info = sac.update(batch)
    q = sac.critic(one_hot[state], torch.rand(96, 1) * 2 - 1)
    exact = torch.tensor([1 / 0.19, 0.9 / 0.19, 1.5])
    torch.testing.assert_close(q, exact[state].expand_as(q), rtol=0.03, atol=0)
    assert info["q_mean"].item() == pytest.approx(exact.mean().item(), rel=0.03) and info["td_error"] < 0.1


@pytest.mark.parametrize("actor_q", ["mean", "min"])
def test_actor_finds_the_best_action(actor_q):
    """A bandit whose reward is -|a - s / 2|^2, s = -1 or 1."""
    sac = SAC(1, 1, hidden=(32, 32), lr=3e-3, init_temperature=1e-3, target_entropy=-9.0, actor_q=actor_q)
    for _ in range(300):
        batch = make_batch(1, 128, 1, 1, terminated=1.0)
        batch["obs"] = batch["obs"].sign()
        batch["reward"] = -(batch["action"] - 0.5 * batch["obs"])[..., 0].square()
        sac.update(batch)
    best = sac.act(torch.tensor([[-1.0], [1.0]]), deterministic=True)[:, 0]
    torch.testing.assert_close(best, torch.tensor([-0.5, 0.5]), rtol=0, atol=0.1)


@pytest.mark.parametrize("target_entropy, falls", [(-9.0, True), (9.0, False)])
def test_temperature_moves_towards_the_target_entropy(target_entropy, falls):
    sac = SAC(3, 2, hidden=(8,), lr=1e-2, init_temperature=0.2, target_entropy=target_entropy)
    seen = [sac.update(make_batch(1, 16))["temperature"].item() for _ in range(20)]
    assert seen[0] == pytest.approx(0.2) and (np.diff(seen) < 0).all() == falls and (np.diff(seen) > 0).all() != falls
    assert SAC(3, 2).target_entropy == -1.0


def test_the_temperatures_gradient_by_hand():
    """temperature (H - target entropy) alone: the actor's loss does not move it."""
    sac = SAC(3, 2, hidden=(8,), init_temperature=0.5, target_entropy=-1.0)
    obs, noise = torch.randn(64, 3), torch.randn(64, 2)
    entropy = -sac.actor.sample(obs, noise)[1].mean().item()
    assert sac.actor_gradients(obs, noise)[0][-1].item() == pytest.approx(0.5 * (entropy + 1.0), rel=1e-4)


def test_state_dict_continues_identically():
    make = lambda: SAC(3, 2, n_critics=4, min_critics=2, hidden=(16,), lr=1e-2)
    sac, other = make(), make()
    batches = [make_batch(2, 8, reward=1.0) for _ in range(6)]
    for batch in batches[:3]:
        sac.update(batch, 4)
    other.load_state_dict(copy.deepcopy(sac.state_dict()))
    results = []
    for agent in (sac, other):
        torch.manual_seed(5)
        infos = [agent.update(batch, 4) for batch in batches[3:]]
        leaves, stack = [], [agent.state_dict(), infos]
        while stack:
            item = stack.pop()
            stack += list(item.values()) if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else []
            leaves += [torch.as_tensor(item)] if isinstance(item, (torch.Tensor, float, int)) else []
        results.append(leaves)
    assert len(results[0]) > 50 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_entropy_in_the_actors_loss_the_temperature_stays():
    """Nothing would raise the entropy then, so it would grow for ever, and with it the critics' target."""
    sac = SAC(3, 2, hidden=(8,), init_temperature=0.5, actor_entropy=False, lr=0.1)
    for _ in range(5):
        info = sac.update_actor(torch.randn(16, 3))
    assert info["temperature"] == pytest.approx(0.5) and sac.log_temperature.exp().item() == pytest.approx(0.5)


@pytest.mark.parametrize("actor_entropy", [True, False])
def test_entropy_in_the_actors_loss(actor_entropy):
    sac = SAC(3, 2, hidden=(8,), init_temperature=0.5, actor_entropy=actor_entropy)
    obs, noise = torch.randn(64, 3), torch.randn(64, 2)
    action, log_prob = sac.actor.sample(obs, noise)
    loss, mean_log_prob = sac.actor_loss(obs, noise)
    expected = -sac.critic(obs, action).mean() + actor_entropy * 0.5 * log_prob.mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(mean_log_prob, log_prob.mean())


@pytest.mark.parametrize("log_std", [-40.0, 0.0, 30.0])
def test_the_actors_log_std_is_bounded_and_never_stuck(log_std):
    actor = Actor(3, 2, hidden=(8,))
    with torch.no_grad():
        actor.net[-1].bias[2:] = log_std
    found = actor(torch.zeros(5, 3))[1]
    gradient = torch.autograd.grad(found.sum(), actor.net[-1].bias)[0][2:]
    assert (found >= Actor.LOG_STD_MIN).all() and (found <= Actor.LOG_STD_MAX).all() and (gradient > 0).all()


def test_a_loaded_agent_shares_nothing_with_the_first():
    """Learning in the one leaves the other as it was, the optimisers' moments too."""
    batch = {key: torch.rand(2, 8, *shape) for key, shape in {"obs": (3,), "action": (1,), "next_obs": (3,),
                                                              "reward": (), "uncertainty": ()}.items()}
    batch["terminated"] = torch.zeros(2, 8)
    first, second = (SAC(3, 1, hidden=(16, 16)) for _ in range(2))
    first.update(batch)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict())
    second.update(batch)
    torch.testing.assert_close(first.state_dict(), before, rtol=0, atol=0)


def test_what_an_agent_is_given():
    """Lists and float64 arrays are observations too; a reward of another shape, which would broadcast, and an unknown
    `actor_q` are refused."""
    agent = SAC(3, 1, n_critics=1, min_critics=1, hidden=(16, 16))
    for obs in ([0.0, 1.0, 2.0], np.array([0.0, 1.0, 2.0])):
        torch.testing.assert_close(agent.act(obs, True), agent.act(torch.tensor([0.0, 1.0, 2.0]), True))
    columns = dict.fromkeys(("reward", "terminated", "uncertainty"), torch.zeros(2, 8, 1))
    batch = {"obs": torch.rand(2, 8, 3), "action": torch.rand(2, 8, 1), "next_obs": torch.rand(2, 8, 3), **columns}
    with pytest.raises(ValueError, match=r"reward .*\(2, 8, 1\).*\(2, 8\)"):
        agent.update(batch)
    with pytest.raises(ValueError, match="actor_q 'Min'.*min, mean"):
        SAC(3, 1, actor_q="Min")


def test_the_target_networks_start_as_the_critics():
    sac = SAC(3, 2, n_critics=3, hidden=(8,))
    assert all(map(torch.equal, sac.target_critic.parameters(), sac.critic.parameters()))


def test_the_actor_learns_from_the_last_slices_states(monkeypatch):
    sac, batch, seen = SAC(3, 2, hidden=(8,)), make_batch(3, 5), []
    monkeypatch.setattr(sac, "update_actor", lambda obs: seen.append(obs) or {})
    sac.update(batch)
    obs, = seen
    assert torch.equal(obs, batch["obs"][-1])


def test_the_planners_value_is_of_the_averaged_policy():
    sac, obs = SAC(3, 2, hidden=(16,), actor_average=0.1, lr=0.1), torch.randn(7, 3)
    sac.update(make_batch(1, 16))
    average, present = (actor(obs)[0].tanh() for actor in (sac.average_actor, sac.actor))
    torch.testing.assert_close(sac.value(obs), sac.target_critic(obs, average).mean(0))
    assert (present - average).abs().max() > 0.01

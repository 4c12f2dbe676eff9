"""Planner: the LQR optimum, the penalty, guidance, terminations, non-finite values, noise, warm start, imagination."""

import itertools
import math

import pytest
import torch

import mpc
from agent import SAC
from mpc import MPC, coloured_noise, imagine
from task_env import TaskEnv
from world_model import WorldModel

A, B = torch.tensor([[1.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.005], [0.1]])  # a double integrator
Q, R = torch.diag(torch.tensor([1.0, 0.1])), 1.0
NEVER = lambda next_obs: torch.zeros(len(next_obs), dtype=torch.bool)
ZERO = lambda next_obs: torch.zeros(len(next_obs))


def integrator(obs, action):
    return obs @ A.T + action @ B.T, obs[:, :0], ZERO(obs)


def cost(obs, action, next_obs=None, features=None):
    return -((obs @ Q) * obs).sum(-1) - R * action.square().sum(-1)


def riccati(steps):
    """The cost-to-go matrix and the gain of the first of `steps` steps of the linear-quadratic regulator."""
    P, gain = torch.zeros(2, 2), None
    for _ in range(steps):
        gain = (B.T @ P @ A) / (R + B.T @ P @ B)
        P = Q + A.T @ P @ (A - B @ gain)
    return P, gain


def states(n=8):
    """From -(0.4, 0.2) to (0.4, 0.2)."""
    return (2 * torch.rand(n, 2) - 1) * torch.tensor([0.4, 0.2])


@pytest.mark.parametrize("horizon, guided", [(25, False), (4, True)])
def test_reaches_the_lqr_optimum(horizon, guided):
    """Closed-loop cost over 40 steps within 5 % of the optimum: by a long horizon, or the exact value beyond it."""
    P_inf = riccati(500)[0]
    planner = MPC(integrator, cost, NEVER, 1, horizon=horizon, population=150, elites=15, iterations=8, discount=1.0,
                  value=(lambda obs: -((obs @ P_inf) * obs).sum(-1)) if guided else None)
    angle, total = torch.arange(8.0) * math.pi / 4, torch.zeros(8)
    obs = 0.6 * torch.stack([angle.cos(), angle.sin()], -1)  # near enough for the optimal actions to be within [-1, 1]
    optimum = ((obs @ riccati(40)[0]) * obs).sum(-1)
    for _ in range(40):
        action = planner.act(obs)
        total -= cost(obs, action)
        obs = integrator(obs, action)[0]
    assert (total > 0.999 * optimum).all() and (total < 1.05 * optimum).all()


@pytest.mark.parametrize("coef, avoids", [(0.0, False), (20.0, True)])
def test_penalty_avoids_an_uncertain_region(coef, avoids):
    """From (0, 0) to (2, 0) the straight way leads through a disc where u = 1."""
    model = lambda obs, action: (obs + 0.3 * action, obs[:, :0],
                                 ((obs - torch.tensor([1.0, 0.1])).norm(dim=-1) < 0.5).float())
    goal = torch.tensor([2.0, 0.0])
    planner = MPC(model, lambda o, a, n, f: -(n - goal).norm(dim=-1), NEVER, 2, horizon=15, population=300, elites=30,
                  iterations=8, penalty_coef=coef)
    plan = planner.plan(torch.zeros(1, 2))[0]
    obs, u, inside = torch.zeros(1, 2), 0.0, 0
    for k in range(15):
        obs, _, u = model(obs, plan[:, k])
        inside += int(u.item())
    assert (obs - goal).norm() < 0.6 and (inside == 0) == avoids


def test_one_iteration_by_hand(monkeypatch):
    """Elites, their mean, the best candidate and the clamp, from noise that the test knows."""
    noise = 3 * torch.randn(5, 20, 4, 1)
    monkeypatch.setattr(mpc, "coloured_noise", lambda shape, beta, device="cpu": noise.clone())
    planner = MPC(lambda o, a: (o + a, o, ZERO(o)), lambda o, a, n, f: -(n[:, 0] - 1).square(), NEVER, 1, horizon=4,
                  population=20, elites=6, iterations=1, discount=0.9, init_std=0.7)
    start, mean = torch.randn(5, 1), torch.rand(5, 4, 1) - 0.5
    plan, score = planner.plan(start, mean.clone())
    candidates = (mean[:, None] + 0.7 * noise).clamp(-1, 1)
    candidates[:, 0] = mean
    paths = start[:, None] + candidates[..., 0].cumsum(-1)
    scores = (-(paths - 1).square() * 0.9 ** torch.arange(4.0)).sum(-1)
    for b in range(5):
        elite = scores[b].argsort(descending=True)[:6]
        expected = candidates[b, elite].mean(0)
        torch.testing.assert_close(plan[b], expected)
        assert score[b].item() == pytest.approx(scores[b].max().item(), rel=1e-5)


def test_two_guided_iterations_by_hand(monkeypatch):
    """The search is centred by the policy's proposals; elites are kept for the next iteration, and momentum holds."""
    noise, betas, asked = 2 * torch.randn(2, 3, 10, 4, 1), [], []

    def draw(shape, beta, device="cpu"):
        betas.append(beta)
        return noise[len(betas) - 1].clone()

    def model(obs, action):
        asked.append(action)
        return obs + action, obs, ZERO(obs)

    monkeypatch.setattr(mpc, "coloured_noise", draw)
    planner = MPC(model, lambda o, a, n, f: -(n[:, 0] - 1).square(), NEVER, 1, horizon=4, population=10, elites=4,
                  iterations=2, discount=1.0, init_std=0.7, momentum=0.25, keep_elites=0.5, noise_beta=2.0,
                  policy=lambda obs: 0.3 * obs.tanh(), policy_samples=3)
    start, first = torch.randn(3, 1), torch.rand(3, 4, 1) - 0.5
    plan, score = planner.plan(start, first.clone())
    assert betas == [2.0, 2.0]
    actions = [torch.stack(asked[4 * k : 4 * k + 4], 1) for k in range(3)]  # the policy's, then each iteration's
    value = lambda s, a: -(s + a[..., 0].cumsum(-1) - 1).square().sum(-1)
    for b in range(3):
        pool = actions[0].view(3, 3, 4, 1)[b]
        mean, std = 0.25 * first[b] + 0.75 * pool.mean(0), 0.25 * 0.7 + 0.75 * pool.std(0, correction=0)
        for i in range(2):
            drawn = mean + std * noise[i, b]
            if i == 0:  # every other one is about the start's mean
                drawn[::2] = first[b] + 0.7 * noise[i, b, ::2]
            drawn = drawn.clamp(-1, 1)
            drawn[0] = first[b] if i == 0 else mean
            torch.testing.assert_close(actions[i + 1].view(3, 10, 4, 1)[b], drawn)
            pool = torch.cat([pool[value(start[b], pool).argsort(descending=True)][:2], drawn])
            elites = pool[value(start[b], pool).argsort(descending=True)[:4]]
            mean = 0.25 * mean + 0.75 * elites.mean(0)
            std, pool = 0.25 * std + 0.75 * elites.std(0, correction=0), elites
        torch.testing.assert_close(plan[b], elites.mean(0))
        assert score[b].item() == pytest.approx(value(start[b], elites).max().item(), rel=1e-4)


def test_later_iterations_improve_up_to_the_optimum():
    kwargs = {"horizon": 15, "population": 30, "discount": 1.0}
    obs, values = states(100), []
    for iterations in (1, 2, 4):
        planner = MPC(integrator, cost, NEVER, 1, iterations=iterations, **kwargs)
        values.append(planner.rollout(obs, planner.plan(obs)[0])[1].mean())
    assert values[0] < values[1] < values[2] <= -((obs @ riccati(15)[0]) * obs).sum(-1).mean()


@pytest.mark.parametrize("keep_elites", [0.0, 0.3])
@pytest.mark.parametrize("iterations", [1, 3])
def test_guidance_never_lowers_the_planned_value(iterations, keep_elites):
    """The plan is worth at least its best policy proposal, and, with a good policy, more than plain CEM's."""
    gain, seen, obs = riccati(500)[1], [], states(150)
    policy = lambda x: seen.append((-x @ gain.T + 0.1 * torch.randn(len(x), 1)).clamp(-1, 1)) or seen[-1]
    kwargs = {"horizon": 12, "population": 24, "iterations": iterations, "keep_elites": keep_elites, "discount": 0.97}
    guided = MPC(integrator, cost, NEVER, 1, policy=policy, policy_samples=6, **kwargs)
    score = guided.plan(obs)[1]
    proposals = torch.stack(seen[:12], 1)
    assert proposals.shape == (900, 12, 1)
    own = guided.rollout(obs.repeat_interleave(6, 0), proposals)[1].view(150, 6).amax(1)
    assert (score >= own - 1e-6).all() and (score > own + 1e-6).any()
    assert score.mean() > MPC(integrator, cost, NEVER, 1, **kwargs).plan(obs)[1].mean()


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_guidance_by_a_wrong_policy_does_not_undo_planning(spread):
    """A walk to 2 whose policy goes the other way: what is planned is still worth about what plain CEM plans."""
    kwargs = {"model": lambda o, a: (o + 0.3 * a, o, ZERO(o)), "reward": lambda o, a, n, f: -(n[:, 0] - 2).square()}
    policy = lambda obs: (spread * torch.randn_like(obs) - 1).clamp(-1, 1)
    plain, guided = (MPC(terminated=NEVER, action_dim=1, policy=p, **kwargs) for p in (None, policy))
    obs = torch.randn(200, 1)
    for value in (lambda p: p.plan(obs)[1].mean(), lambda p: p.rollout(obs, p.plan(obs)[0])[1].mean()):
        assert value(guided) > 1.2 * value(plain)  # both are negative


@pytest.mark.parametrize("with_value", [False, True])
def test_nothing_is_earned_after_a_termination(with_value):
    """s' = s + a, 1 per step, the end at 3, beyond which everything is NaN: 1 + g + g^2 from 0 by steps of 1."""
    reward = lambda obs, action, next_obs, features: torch.where(obs[:, 0] >= 3, math.nan, 1.0)
    model = lambda obs, action: (torch.where(obs >= 3, math.nan, obs + action), obs[:, :0], 0.5 * (obs[:, 0] >= 3))
    value = (lambda obs: torch.where(obs[:, 0] >= 3, math.nan, 100.0)) if with_value else None
    planner = MPC(model, reward, lambda n: ~(n[:, 0] < 3), 1, horizon=5, discount=0.9, value=value)
    actions = torch.tensor([1.0, 0.25])[:, None, None].expand(2, 5, 1)
    taken, total = planner.rollout(torch.zeros(2, 1), actions)
    assert torch.equal(taken, actions)
    ends, goes_on = 1 + 0.9 + 0.81, (1 - 0.9**5) / 0.1 + (0.9**5 * 100 if with_value else 0)
    torch.testing.assert_close(total, torch.tensor([ends, goes_on]))
    plan, score = planner.plan(torch.tensor([[0.0], [2.5]]))
    torch.testing.assert_close(score, torch.tensor([goes_on, goes_on]))


def test_penalised_discounted_return_by_hand():
    model = lambda obs, action: (obs + action, torch.cat([obs, action], -1), obs[:, 0].abs())
    reward = lambda obs, action, next_obs, features: 10 * features[:, 0] + features[:, 1] * next_obs[:, 0]
    planner = MPC(model, reward, NEVER, 1, horizon=2, discount=0.5, penalty_coef=3.0, value=lambda obs: obs[:, 0])
    total = planner.rollout(torch.tensor([[2.0]]), torch.tensor([[[-0.5], [1.0]]]))[1]
    # 20 - .5 * 1.5 - 3 * 2, then .5 (15 + 1 * 2.5 - 3 * 1.5), then .25 * 2.5
    assert total.item() == pytest.approx(13.25 + 6.5 + 0.625)


@pytest.mark.parametrize("guided", [False, True])
def test_a_policy_that_is_lost_beyond_a_termination_does_no_harm(guided):
    """A model may give anything after an end, here the best to do; what the policy does from there is no plan."""
    model = lambda obs, action: (torch.where(obs + action > 0.5, math.nan, obs + action), obs[:, :0], ZERO(obs))
    planner = MPC(model, lambda o, a, n, f: a[:, 0] - 9, lambda n: ~(n[:, 0] <= 0.5), 1, horizon=4,
                  policy=(lambda obs: 0.9 + 0 * obs) if guided else None)
    plan, score = planner.plan(torch.zeros(3, 1))
    assert plan.isfinite().all() and score.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_candidates_that_are_not_finite_never_win(bad):
    """Actions above 0.1 pay `bad`; among the others the largest is best. Where all are bad the start's mean stays."""
    reward = lambda o, a, n, f: torch.where((a[:, 0] > 0.1) | (o[:, 0] > 9), bad, a[:, 0])
    planner = MPC(lambda o, a: (o, o[:, :0], ZERO(o)), reward, NEVER, 1, horizon=2, population=100, iterations=3,
                  policy=lambda obs: torch.ones(len(obs), 1), policy_samples=4)
    start = torch.full((3, 2, 1), -0.2)
    plan, score = planner.plan(torch.tensor([[0.0], [10.0], [1.0]]), start)
    assert (plan[[0, 2]] <= 0.1).all() and (plan[[0, 2]] > -0.1).all() and score[[0, 2]].isfinite().all()
    assert score[1] == -math.inf and plan[1].flatten().tolist() == pytest.approx([-0.2, -0.2])


@pytest.mark.parametrize("horizon", [1, 2, 3, 8, 15, 30])
@pytest.mark.parametrize("beta", [0, 0.25, 2.0, 3.0])
def test_coloured_noise(beta, horizon):
    """Unit variance at every step, independent over batch and actions, power falling as frequency^-beta."""
    noise = coloured_noise((4000, 5, horizon, 2), beta)
    assert noise.shape == (4000, 5, horizon, 2)
    torch.testing.assert_close(noise.var((0, 1, 3)), torch.ones(horizon), rtol=0.05, atol=0)
    assert noise.mean((0, 1, 3)).abs().max() < 0.03
    assert (noise[..., 0] * noise[..., 1]).mean().abs() < 0.03 and (noise[:, 0] * noise[:, 1]).mean().abs() < 0.03
    power = torch.fft.rfft(noise, dim=2).abs().square().mean((0, 1, 3))[: (horizon + 1) // 2]
    if len(power) > 2:
        k = torch.arange(1, float(len(power)))
        torch.testing.assert_close(power[1:] / power[1], k**-beta, rtol=0.1, atol=0)
        assert 0.4 < power[0] / power[1] < 1.2  # the mean is treated as the lowest frequency (and is real: half)


class Recorder(MPC):
    """Plans 100 n, 100 n + 1, ... the n-th time, and keeps what it was asked to start from."""

    def plan(self, obs, mean=None):
        self.starts = [*getattr(self, "starts", []), mean]
        plan = 100.0 * len(self.starts) + torch.arange(float(self.horizon))
        return plan[None, :, None].expand(len(obs), -1, 1), torch.zeros(len(obs))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_warm_start_and_replanning(every):
    """A plan's first `every` actions are executed; the next search starts from the rest of it, then zeros."""
    planner = Recorder(integrator, cost, NEVER, 1, horizon=4, execute_steps=every)
    actions = [planner.act(torch.zeros(2, 2)) for _ in range(2 * every + 1)]
    expected = [100 + k for k in range(every)] + [200 + k for k in range(every)] + [300]
    assert [a.flatten().tolist() for a in actions] == [[x, x] for x in expected]
    assert planner.starts[0] is None and len(planner.starts) == 3
    rest = [100.0 + k for k in range(every, 4)] + [0.0] * every
    assert planner.starts[1][..., 0].tolist() == [rest, rest]
    planner.reset()
    planner.act(torch.zeros(5, 2))
    assert planner.starts[3] is None


def test_states_planned_together_or_alone(monkeypatch):
    """With the same noise for every state, a batch's plans are those of its states one by one."""
    draws = itertools.cycle(torch.randn(3, 1, 40, 6, 1))
    monkeypatch.setattr(mpc, "coloured_noise", lambda shape, beta, device="cpu": next(draws).expand(shape).clone())
    planner = MPC(integrator, cost, NEVER, 1, horizon=6, population=40, iterations=3,
                  value=lambda obs: -obs.square().sum(-1))
    obs = states()
    plan, score = planner.plan(obs)
    alone = [planner.plan(obs[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(plan, torch.cat([p for p, _ in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score, torch.cat([s for _, s in alone]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("horizon", [4, 5])
def test_a_plan_reads_no_value_on_the_host(no_host_reads, horizon):
    """Guided, in a world model, with a task that terminates: nothing in it would make a GPU wait."""
    model, task, agent = WorldModel(11, 3, 1), TaskEnv("Hopper-v4", "near").task, SAC(11, 3)
    planner = MPC(model.step, task.reward, task.terminated, 3, horizon=horizon, noise_beta=0.25, policy=agent.act,
                  value=agent.value)
    with no_host_reads:
        planner.act(planner.act(torch.zeros(4, 11)).new_ones(4, 11))


def test_imagine():
    """Starts 0, 7.5, 9 and s' = s + 1 to 10, u = s: the whole length, three steps, one; cuts where u is above 8.5."""
    step = lambda obs, action: (obs + action, 2 * obs, obs[:, 0])
    start, act, ends = torch.tensor([[0.0], [7.5], [9.0]]), torch.ones_like, lambda next_obs: next_obs[:, 0] >= 10
    data = imagine(step, ends, act, start, 5)
    valid = data["valid"]
    assert all(data[key].shape == (3, 5, 1) for key in ("obs", "action", "next_obs", "features"))
    assert all(data[key].shape == (3, 5) for key in ("uncertainty", "terminated", "valid")) and len(data) == 7
    assert valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4]
    assert data["terminated"].nonzero().tolist() == [[1, 2], [2, 0]]
    assert data["obs"][0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(data["next_obs"][valid], data["obs"][valid] + 1)
    assert torch.equal(data["features"][valid], 2 * data["obs"][valid])
    cut = imagine(step, ends, act, start, 5, 8.5)
    assert cut["valid"].sum(1).tolist() == [5, 2, 0] and not cut["terminated"].any()  # u of 8.5 itself is trusted
    nan = imagine(lambda o, a: (o, o, torch.full((2,), math.nan)), NEVER, lambda o: o, torch.zeros(2, 1), 3)
    assert not nan["valid"].any()  # an uncertainty that is not a number is trusted by nobody


@pytest.mark.parametrize("policy", [False, True])
def test_particles_average_over_the_members_futures(policy):
    """Two members, s' = s + a and s' = s - 2a (rows in turn), r = s': by hand for H = 2."""
    def model(obs, action):
        sign = torch.where(torch.arange(len(obs)) % 2 == 0, 1.0, -2.0)[:, None]
        return obs + sign * action, obs, obs[:, 0] * 0

    mpc = MPC(model, lambda obs, action, next_obs, features: next_obs[:, 0], NEVER, 1, horizon=2, discount=0.5,
              particles=2, policy=(lambda obs: torch.full((len(obs), 1), 0.25)) if policy else None)
    obs, actions = torch.tensor([[1.0], [3.0]]), None if policy else torch.full((2, 2, 1), 0.25)
    taken, total = mpc.rollout(obs, actions)
    assert taken.shape == (2, 2, 1) and (taken == 0.25).all()
    # first steps: s + .25 and s - .5; second: s + .5 and s - 1
    by_hand = [((s + 0.25 + s - 0.5) + 0.5 * (s + 0.5 + s - 1.0)) / 2 for s in (1.0, 3.0)]
    assert total.tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("sizes", ({"iterations": 0}, {"elites": 65}, {"elites": 0}, {"execute_steps": 6}))
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="elites.*population.*execute_steps.*horizon.*iterations"):
        MPC(None, None, None, 1, **sizes)


def test_with_particles_the_policy_acts_in_the_first_ones_state():
    """Members s + a and s - 2a, a = s / 2: from 1 the first is at 1.5, where the policy acts by .75."""
    def model(obs, action):
        sign = torch.where(torch.arange(len(obs)) % 2 == 0, 1.0, -2.0)[:, None]
        return obs + sign * action, obs, ZERO(obs)

    planner = MPC(model, lambda o, a, n, f: n[:, 0], NEVER, 1, horizon=2, particles=2, policy=lambda obs: obs / 2)
    assert planner.rollout(torch.tensor([[1.0], [2.0]]))[0].flatten(1).tolist() == [[0.5, 0.75], [1.0, 1.5]]

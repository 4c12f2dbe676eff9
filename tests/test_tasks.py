"""Tasks: rewards and terminations against the environments' own, initial states, exact resumption, errors."""

import copy
import textwrap
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import harness
import task_env
import tasks
from task_env import TaskEnv, lockstep

LOCOMOTION = {"HalfCheetah": (1.0, 0.1), "Hopper": (1.0, 5e-3), "Walker2d": (1.0, 5e-3), "Ant": (1.0, 0.1),
              "Swimmer": (1.0, 0.1), "Humanoid": (1.25, 1e-2)}  # stock forward weight, stock reset noise
IDS = [f"{name}-v{version}" for name in [*LOCOMOTION, "Reacher"] for version in (4, 5)] + ["Pusher-v5"]


def record(env):
    """Wraps the Gymnasium environment's step: what goes in and comes out is kept in the list returned."""
    calls, step = [], env.env.step

    def recorded(action):
        calls.append((action, *step(action)))
        return calls[-1][1:]

    env.env.step = recorded
    return calls


def drive(env, steps, seed=0):
    """Random actions with resets: columns obs, action, next_obs, reward, terminated, features as arrays."""
    rng, obs, rows = np.random.default_rng(seed), env.reset(), []
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
        next_obs, reward, terminated, truncated, features = env.step(action)
        rows.append((obs, action, next_obs, reward, terminated, features))
        obs = env.reset() if terminated or truncated else next_obs
    return [np.array(column) for column in zip(*rows)]


def tensors(*arrays):
    return [torch.as_tensor(np.asarray(a), dtype=torch.float32) for a in arrays]


@pytest.mark.parametrize("env_id", IDS)
def test_target_is_the_stock_task(env_id):
    env = TaskEnv(env_id, seed=1)
    calls = record(env)
    obs, action, next_obs, reward, terminated, features = drive(env, 1000)
    np.testing.assert_allclose(reward, [call[2] for call in calls], rtol=1e-5, atol=1e-5)
    assert terminated.tolist() == [call[3] for call in calls]
    batch = tensors(obs, action, next_obs, features)
    assert env.task.terminated(batch[2]).tolist() == terminated.tolist()
    if env_id.startswith(("Hopper", "Walker2d", "Humanoid")):  # others do not end this way, or not in 1,000 steps
        assert 5 < terminated.sum() < 500
    # the same function serves one transition, a batch and a batch of trajectories
    np.testing.assert_allclose(env.task.reward(*batch), reward, rtol=1e-5, atol=1e-5)
    folded = [x.reshape(10, 100, *x.shape[1:]) for x in batch]
    torch.testing.assert_close(env.task.reward(*folded).flatten(), env.task.reward(*batch))
    assert env.task.terminated(folded[2]).shape == (10, 100)


@pytest.mark.parametrize("name, rest, index, low, high", [
    ("Hopper", 0.0, 0, 0.7, None), ("Hopper", 1.0, 1, -0.2, 0.2), ("Walker2d", 0.0, 0, 0.8, 2.0),
    ("Walker2d", 1.0, 1, -1.0, 1.0), ("Ant", 0.5, 0, 0.2, 1.0), ("Humanoid", 0.0, 0, 1.0, 2.0)])
def test_healthy_ranges(name, rest, index, low, high):
    """Height or angle just inside and just outside, in an observation that is otherwise `rest`; then NaN."""
    obs, high = torch.full((5, 27), rest), high or 1e9
    obs[:, index] = torch.tensor([low - 1e-3, low + 1e-3, high - 1e-3, high + 1e-3, float("nan")])
    assert tasks.Locomotion(name, 4).terminated(obs).tolist() == [True, False, False, high < 9, True]
    if name == "Ant":
        assert tasks.Locomotion(name, 4).terminated(torch.tensor([0.5, float("inf")]))


def test_a_hopper_that_is_too_fast_has_fallen():
    obs = torch.zeros(3, 11)
    obs[:, 0], obs[1:, 7] = 1.2, torch.tensor([99.0, 101.0])
    assert tasks.Locomotion("Hopper", 4).terminated(obs).tolist() == [False, False, True]


@pytest.mark.parametrize("name, force, cost", [
    ("Ant", 0.5, 78 * 5e-4 * 0.25), ("Ant", -9.0, 78 * 5e-4), ("Humanoid", 100.0, 78 * 5e-7 * 1e4),
    ("Humanoid", 1e4, 10.0)])
def test_contact_costs_by_hand(name, force, cost):
    """Where random actions do not lead: in v5 each of Ant's forces counts up to 1, Humanoid's cost up to 10."""
    task, free = tasks.Locomotion(name, 5), torch.zeros(1, 100)
    pressed = free.clone()
    pressed[:, -78:] = force
    pay = lambda next_obs: task.reward(free, torch.zeros(1, 8), next_obs, torch.zeros(1, 1)).item()
    assert pay(free) - pay(pressed) == pytest.approx(cost, rel=1e-4)
    assert tasks.Locomotion(name, 4).contact is None


@pytest.mark.parametrize("source", ["near", "backward", "stand"])
@pytest.mark.parametrize("env_id", [i for i in IDS if i.split("-")[0] in LOCOMOTION])
def test_locomotion_sources(env_id, source):
    """A second environment, with Gymnasium's own arguments where they express the source, takes the same actions."""
    name = env_id.split("-")[0]
    weight, noise = LOCOMOTION[name]
    kwargs = {"reset_noise_scale": 2 * noise}
    if source == "backward" and env_id != "Ant-v4":
        kwargs["forward_reward_weight"] = -weight
    if source == "near" and name == "Swimmer":
        kwargs["ctrl_cost_weight"] = 100 * 1e-4
    cap = None if name == "Swimmer" else -0.1  # what random actions pass; the defaults have a test of their own
    env, twin = TaskEnv(env_id, source, seed=7, speed_cap=cap if source == "near" else None), gym.make(env_id, **kwargs)
    obs, twin_obs, capped = env.reset(), twin.reset(seed=7)[0], 0
    for action in np.random.default_rng(3).uniform(-1, 1, (200, env.action_dim)).astype(np.float32):
        np.testing.assert_array_equal(obs, twin_obs.astype(np.float32))
        obs, reward, terminated, truncated, features = env.step(action)
        twin_obs, expected, twin_terminated, _, info = twin.step(action * (0.4 if name == "Humanoid" else 1.0))
        v = info["x_velocity"]
        if source == "near" and cap:
            expected, capped = expected + weight * (min(v, cap) - v), capped + (v > cap)
        elif source == "backward" and "forward_reward_weight" not in kwargs:
            expected -= 2 * weight * v
        elif source == "stand":
            expected += weight * (-abs(v) - v)
        assert reward == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert terminated == twin_terminated and features.tolist() == [np.float32(v)]
        if terminated or truncated:
            obs, twin_obs = env.reset(), twin.reset()[0]
    assert capped > 5 or source != "near" or name == "Swimmer"


@pytest.mark.parametrize("name", LOCOMOTION)
def test_locomotion_default_caps_and_costs(name):
    """The near source's defaults (design, table of tasks) and the factors, on speeds that no random action reaches."""
    cap, weight = {"HalfCheetah": 3.0, "Swimmer": float("inf")}.get(name, 1.0), LOCOMOTION[name][0]
    v, obs, still, action = torch.linspace(-5, 5, 41), torch.ones(41, 150), torch.zeros(41, 3), torch.rand(41, 3)
    pay = lambda task, action=still: task.reward(obs, action, obs, v[:, None])
    cost = lambda task: pay(task) - pay(task, action)
    stock = tasks.Locomotion(name, 4)
    for source, shaped in (("near", v.clamp(max=cap)), ("backward", -v), ("stand", -v.abs())):
        task, heavy = tasks.Locomotion(name, 4, source), tasks.Locomotion(name, 4, source, ctrl_cost_factor=10.0)
        torch.testing.assert_close(pay(task), pay(stock) + weight * (shaped - v))
        torch.testing.assert_close(cost(heavy), 10 * cost(stock), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("env_id, shift", [("Reacher-v4", 0.05), ("Reacher-v5", 0.05), ("Pusher-v5", 0.15)])
def test_sources_with_a_shifted_goal(env_id, shift):
    """The goal is `shift` further along y: hand-written from MuJoCo's own body positions."""
    env = TaskEnv(env_id, "near", seed=2)
    body = lambda name: env.env.unwrapped.get_body_com(name).copy()
    aim = np.array([0, shift, 0])
    env.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (40, env.action_dim)).astype(np.float32):
        before = body("fingertip") - body("target") - aim if "Reacher" in env_id else None
        reward = env.step(action)[1]
        if env_id == "Pusher-v5":
            thing = body("object")
            expected = (-np.linalg.norm(thing - body("goal") - aim) - 0.5 * np.linalg.norm(thing - body("tips_arm"))
                        - 0.1 * np.square(2 * action).sum())
        else:
            offset = before if env_id == "Reacher-v4" else (body("fingertip") - body("target") - aim)[:2]
            expected = -np.linalg.norm(offset) - np.square(action).sum()
        assert reward == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("env_id, source, quantities", [
    ("Walker2d-v4", None, {"speed_cap": 0.5}), ("Walker2d-v4", None, {"ctrl_cost_factor": 10.0}),
    ("Pusher-v5", None, {"goal_shift": 1.0, "ctrl_cost_factor": 9.0})])
def test_quantities_reach_only_the_source_they_are_of(env_id, source, quantities):
    """The target is the stock task whatever the source's quantities are."""
    env, plain = TaskEnv(env_id, source, **quantities), TaskEnv(env_id, source)
    obs = torch.linspace(0.5, 1.5, env.obs_dim)[None]
    args = obs, torch.ones(1, env.action_dim), obs, torch.full((1, env.n_features), 2.0)
    torch.testing.assert_close(env.task.reward(*args), plain.task.reward(*args))


def test_a_speed_cap_that_nothing_heeds():
    with pytest.raises(ValueError, match="near source alone, not of backward"):
        TaskEnv("Walker2d-v4", "backward", speed_cap=0.5)


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v5", "Ant-v4", "Pusher-v5", "Reacher-v5"])
def test_initial_states(env_id):
    """A seed gives its initial states, another seed others; a source's are spread more widely."""
    resets = lambda env, n: np.array([env.reset() for _ in range(n)])
    first = lambda source, seed, n=3: resets(TaskEnv(env_id, source, seed=seed), n)
    np.testing.assert_array_equal(first(None, 5), first(None, 5))
    assert not np.array_equal(first(None, 5), first(None, 6))
    env = TaskEnv(env_id, "near", seed=9)
    drive(env, 7)
    env.seed(5)
    np.testing.assert_array_equal(resets(env, 3), first("near", 5))
    stock, wide = first(None, 0, 60).std(0), first("near", 0, 60).std(0)
    if env_id == "Pusher-v5":
        joints = first("near", 0, 60)[:, :7] - first(None, 0, 1)[0, :7]
        assert (stock[:7] == 0).all() and 0.09 < np.abs(joints).max() <= 0.1
    elif env_id != "Reacher-v5":  # whose own initial states vary enough
        assert wide[stock > 0].mean() / stock[stock > 0].mean() == pytest.approx(2.0, rel=0.1)


def run(env, actions, reset_first):
    """What comes of the actions, with resets."""
    out = [(env.reset(),)] if reset_first else []
    for action in actions:
        out.append(env.step(action))
        if out[-1][2] or out[-1][3]:
            out.append((env.reset(),))
    return out


@pytest.mark.parametrize("env_id, source, at, truncates", [
    ("Hopper-v4", "near", 13, False), ("Humanoid-v5", None, 11, False), ("Ant-v5", "near", 40, False),
    ("HalfCheetah-v5", None, 990, True), ("Reacher-v4", "near", 40, True), ("Pusher-v5", "near", 90, True),
    ("Pusher-v5", "near", 0, False), ("Walker2d-v4", None, None, False)])
def test_resumes_bitwise(env_id, source, at, truncates):
    """From state_dict on, another TaskEnv has the same future: steps, the time limit, the episodes after."""
    env, other = TaskEnv(env_id, source, seed=3), TaskEnv(env_id, source, seed=4)
    actions = np.random.default_rng(0).uniform(-1, 1, (1050, env.action_dim)).astype(np.float32)
    run(env, actions[:8], True)  # an episode before, so that the generator has moved on
    run(other, actions[:5], True)
    env.seed(8) if at is None else run(env, actions[:at], True)  # None: no episode has begun
    state = copy.deepcopy(env.state_dict())
    other.load_state_dict(state)
    np.testing.assert_equal(*(np.asarray(s["actions"]) for s in (other.state_dict(), state)))
    np.testing.assert_equal(other.obs, env.obs)
    ours, theirs = (run(e, actions[-20:], at is None) for e in (env, other))
    np.testing.assert_equal(theirs, ours)
    assert any(len(row) > 1 and row[3] for row in ours) == truncates


@pytest.mark.parametrize("env_id, scale", [("Humanoid-v4", 0.4), ("Pusher-v5", 2.0), ("Hopper-v5", 1.0)])
def test_actions_are_rescaled_at_the_edge(env_id, scale):
    env = TaskEnv(env_id)
    calls = record(env)
    env.reset()
    for action in (np.linspace(-1, 1, env.action_dim), np.full(env.action_dim, 9.0)):
        env.step(action)
        np.testing.assert_allclose(calls[-1][0], scale * np.clip(action, -1, 1), rtol=1e-6)


class Tiny:
    """The whole class of a user's environment: stay upright; its source starts wider and pays for the centre."""

    SOURCES, FEATURES = ("centre",), ()

    def __init__(self, name, version, source=None, reset_noise_factor=3.0):
        self.source = source
        self.env_kwargs = {"reset_noise_scale": 0.01 * (reset_noise_factor if source else 1.0)} if version > 4 else {}

    def reward(self, obs, action, next_obs, features):
        upright = (~self.terminated(next_obs)).float()
        return upright - (next_obs[..., 0].abs() if self.source else 0.0)

    def terminated(self, next_obs):
        return (next_obs[..., 1].abs() > 0.2) | ~next_obs.isfinite().all(-1)


def test_own_environment(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "InvertedPendulum", Tiny)
    env = TaskEnv("InvertedPendulum-v5", seed=1)
    calls = record(env)
    _, _, next_obs, reward, terminated, features = drive(env, 300)
    assert reward.tolist() == [call[2] for call in calls] and features.shape == (300, 0)
    assert env.task.terminated(*tensors(next_obs)).tolist() == terminated.tolist() == [call[3] for call in calls]
    source = TaskEnv("InvertedPendulum-v5", "centre", reset_noise_factor=30.0)
    assert 0.05 < np.abs([source.reset() for _ in range(20)]).max() <= 0.3
    assert source.step(np.zeros(1))[1] == pytest.approx(1.0 - abs(source.obs[0]) - (abs(source.obs[1]) > 0.2))


class Lopsided(gym.Env):
    """Nothing ever happens in it; the middle of its actions is (1, -1)."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(np.float32([0, -3]), np.float32([2, 1]))

    def reset(self, seed=None, options=None):
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(2, dtype=np.float32), 0.0, False, False, {}


def test_actions_are_stretched_to_bounds_of_any_middle(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "Lopsided", Tiny)
    monkeypatch.setitem(gym.registry, "Lopsided-v0", gym.envs.registration.EnvSpec(
        "Lopsided-v0", entry_point=lambda **kwargs: Lopsided(), max_episode_steps=9))
    env = TaskEnv("Lopsided-v0")
    calls = record(env)
    env.reset()
    for action, raw in (([-1, -1], [0, -3]), ([1, 1], [2, 1]), ([0, 0.5], [1, 0])):
        env.step(np.float32(action))
        assert calls[-1][0].tolist() == raw


def own(monkeypatch, make, task=Tiny):
    """A TaskEnv of an environment of one's own, registered as "Own-v0"."""
    monkeypatch.setitem(tasks.TASKS, "Own", task)
    monkeypatch.setitem(gym.registry, "Own-v0", gym.envs.registration.EnvSpec(
        "Own-v0", entry_point=make, max_episode_steps=9))
    return TaskEnv("Own-v0")


def test_observations_are_copies(monkeypatch):
    """Of an environment that writes each state into the same array."""
    class Drifting(Lopsided):
        state = np.zeros(2, dtype=np.float32)

        def reset(self, seed=None, options=None):
            self.state[:] = 0
            return self.state, {}

        def step(self, action):
            self.state += 0.5
            return self.state, 0.0, False, False, {}

    env = own(monkeypatch, lambda **kwargs: Drifting())
    obs, next_obs = env.reset(), env.step(np.zeros(2))[0]
    assert obs.tolist() == [0, 0] and next_obs.tolist() == [0.5, 0.5] and env.step(np.zeros(2))[0].tolist() == [1, 1]
    assert next_obs.tolist() == [0.5, 0.5]


def test_an_environment_without_arguments(monkeypatch):
    """One that takes no render_mode is made; one whose task gives it others is refused in one line."""
    assert own(monkeypatch, Lopsided).obs_dim == 2

    class Strange(Tiny):
        def __init__(self, *args):
            self.source, self.env_kwargs = None, {"colour": "red"}

    with pytest.raises(ValueError, match="^Own-v0 cannot be made here: .*colour[^\n]*$"):
        own(monkeypatch, Lopsided, Strange)


def test_a_feature_that_info_lacks(monkeypatch):
    class Wrong(Tiny):
        FEATURES = ("x_velocity",)

    env = own(monkeypatch, Lopsided, Wrong)
    env.reset()
    with pytest.raises(ValueError, match="^Wrong.FEATURES names 'x_velocity', which [^\n]*info[^\n]*$"):
        env.step(np.zeros(2))


def test_an_evaluation_by_hand():
    """Episode by episode, each from its own seed, the same every time; q_error is Q(s_0, a_0) less the discounted
    return."""
    act = lambda obs: (30 * torch.as_tensor(obs[..., 5:8])).sin()
    envs, known = [TaskEnv("Hopper-v4", seed=9) for _ in range(3)], []
    for i in range(3):
        env, rewards, over = TaskEnv("Hopper-v4", seed=task_env.EVALUATION_SEED + i), [], False
        env.reset()
        while not over:
            _, reward, terminated, truncated, _ = env.step(act(env.obs).numpy())
            rewards.append(reward)
            over = terminated or truncated
        known.append((sum(rewards), len(rewards), sum(0.9**t * r for t, r in enumerate(rewards))))
    for _ in range(2):
        np.testing.assert_allclose(np.array(task_env.evaluate(act, envs, discount=0.9)).T, known, rtol=1e-6)
    assert len({length for _, length, _ in known}) == 3  # which end one by one
    agent = SimpleNamespace(act=lambda obs, deterministic: act(obs), device="cpu", discount=0.9,
                            q_value=lambda obs, action: obs[:, 0] + action[:, 0])
    row, _ = harness.evaluation_row(agent, envs)
    starts = torch.as_tensor(task_env.first_observations(envs))
    returns, lengths, discounted = np.array(known).T
    assert [row[key] for key in ("return_mean", "return_std", "length_mean", "discounted_mean")] == pytest.approx(
        [returns.mean(), returns.std(), lengths.mean(), discounted.mean()])
    q = (starts[:, 0] + act(starts)[:, 0]).mean().item()
    assert row["q_error"] == pytest.approx(q - discounted.mean(), rel=1e-5)


def test_lockstep_is_each_environments_own():
    """Two episodes, one of which ends first and then stands still; what a step gave is not written over later."""
    envs, alone = ([TaskEnv("Hopper-v4", "near", seed=i) for i in (1, 2)] for _ in range(2))
    for env in (*envs, *alone):
        env.reset()
    obs = torch.as_tensor(np.stack([env.obs for env in envs]))
    step, over, seen, known = lockstep(envs, lambda o, a: o[:, 0]), [False, False], [], []
    for action in torch.rand(60, 2, 3) * 2 - 1:
        seen.append(step(obs, action))
        obs = seen[-1][0]
        for i, env in enumerate(alone):
            if over[i]:
                features = known[-2][1]
            else:
                _, _, terminated, truncated, features = env.step(action[i])
                over[i] = terminated or truncated
            known.append((env.obs.copy(), features))
    assert all(over)
    for k, (next_obs, features) in enumerate(known):
        np.testing.assert_array_equal(seen[k // 2][0][k % 2], next_obs)
        np.testing.assert_array_equal(seen[k // 2][1][k % 2], features)


@pytest.mark.parametrize("args, quantities, words", [
    (("Walker3d-v4",), {}, ["Walker3d-v4", *tasks.TASKS]), (("Walker2d",), {}, [*tasks.TASKS]),
    (("Walker2d-v9",), {}, ["Walker2d-v9"]), (("Hopper-v4", "far"), {}, ["far", "near", "backward", "stand"]),
    (("Hopper-v4", "near"), {"goal_shift": 1.0}, ["goal_shift", "Hopper-v4"]), (("Pusher-v4",), {}, ["Pusher-v4"]),
    (("CartPole-v1",), {}, ["CartPole-v1", "discrete"])])
def test_errors_are_one_line(monkeypatch, args, quantities, words):
    monkeypatch.setitem(tasks.TASKS, "CartPole", Tiny)
    with pytest.raises(ValueError) as caught:
        TaskEnv(*args, **quantities)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("method, value", (("reward", lambda self, obs, *_: obs[..., :1]),
                                           ("terminated", lambda self, next_obs: next_obs[..., 0]),
                                           ("reward", lambda *_: 1.0)))
def test_a_task_of_the_wrong_shape_is_refused_at_once(monkeypatch, method, value):
    """Not by the planner, after the whole source phase."""
    monkeypatch.setattr(tasks.Pusher, method, value)
    with pytest.raises(ValueError, match=f"^Pusher.{method} .*batch of 2[^\n]*$"):  # one line
        TaskEnv("Pusher-v5")


def test_the_docstrings_own_environment(monkeypatch):
    """The class that tasks.py shows is the stock InvertedPendulum, step by step."""
    code = tasks.__doc__.split("works:\n\n")[1].split("\nCheck it")[0]
    names = {}
    exec(textwrap.dedent(code), names)
    monkeypatch.setitem(tasks.TASKS, "InvertedPendulum", names["InvertedPendulum"])
    env, rng, ended = TaskEnv("InvertedPendulum-v5"), np.random.default_rng(0), False
    stock = gym.make("InvertedPendulum-v5")
    stock.reset(seed=3)
    env.reset()
    env.env.unwrapped.set_state(stock.unwrapped.data.qpos, stock.unwrapped.data.qvel)
    for _ in range(100):
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        _, reward, terminated, _, _ = stock.step(3 * action)
        _, ours, ends, _, _ = env.step(action)
        assert (ours, ends) == (reward, terminated)
        if terminated:
            ended = True
            break
    assert ended and TaskEnv("InvertedPendulum-v5", "near").task.place_cost == 0.1


@pytest.mark.parametrize("env_id, source", [("Hopper-v4", "stand"), ("Pusher-v5", "near"), ("Reacher-v5", "near")])
def test_a_source_heeds_its_control_cost(env_id, source):
    def cost(factor):
        task, obs, action = TaskEnv(env_id, source, ctrl_cost_factor=factor).task, torch.zeros(1, 30), torch.ones(1, 3)
        pay = lambda action: task.reward(obs, action, obs, torch.zeros(1, 1)).item()
        return pay(0 * action) - pay(action)

    assert cost(3.0) == pytest.approx(3 * cost(1.0), rel=1e-4) and cost(1.0) > 0


def test_a_source_heeds_its_goal_shift():
    """Tip, object and goal seen at the same place: what is left is the shift."""
    for env_id in ("Pusher-v5", "Reacher-v5"):
        task, obs = TaskEnv(env_id, "near", goal_shift=0.4).task, torch.zeros(1, 10 if "Reacher" in env_id else 23)
        assert task.reward(obs, torch.zeros(1, 2), obs, obs[:, :0]).item() == pytest.approx(-0.4)


def test_a_source_heeds_its_reset_noise():
    env = TaskEnv("Hopper-v4", "near", reset_noise_factor=20.0)
    assert 0.06 < np.abs([env.reset()[1:5] for _ in range(40)]).max() <= 0.1  # 20 x .005
    env = TaskEnv("Pusher-v5", "near", reset_noise_factor=6.0)
    rest = TaskEnv("Pusher-v5").reset()[:7]
    assert 0.2 < np.abs([env.reset()[:7] - rest for _ in range(20)]).max() <= 0.3 + 1e-6

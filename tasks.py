"""Source and target tasks: rewards, terminations and initial states over shared dynamics.

A task is a reward r(s, a, s'), a termination rule and an initial-state distribution over one Gymnasium environment
(section 3 of the paper: the source task M_S and the target task M_T differ in nothing else). Rewards and terminations
are batched torch functions, so the world model, the planner, the relabelling and the environment share one definition.
What a reward needs and the observation lacks (the x-velocity, as the environment computes it: delta x / dt) is a
*feature*; the world model predicts features beside the next observation, so one model serves every reward.

To add an environment, write a class and name it in `TASKS`; then `python wombet.py --env InvertedPendulum-v5` works:

    class InvertedPendulum:
        # balance: 1 per step while the pole's angle is within 0.2 rad; the near source charges for the cart's place
        SOURCES = ("near",)  # the source tasks it has
        FEATURES = ()  # keys of the environment's info that the reward needs and the observation lacks
        env_kwargs = {}  # for gymnasium.make; may depend on the source (a wider reset noise, say)

        def __init__(self, name, version, source=None):
            self.place_cost = 0.1 if source == "near" else 0.0

        def reward(self, obs, action, next_obs, features):  # actions in [-1, 1]; any leading dimensions
            return (~self.terminated(next_obs)).to(obs.dtype) - self.place_cost * next_obs[..., 0].square()

        def terminated(self, next_obs):
            return next_obs[..., 1].abs() > 0.2

Check it as `tests/test_tasks.py` does: reward and termination against the environment's own, step by step. An
environment of your own is registered (`gymnasium.register`, id "Mine-v0") by its module `my_env`, is "my_env:Mine" in
`TASKS` and `--env my_env:Mine-v0`; it draws from its `np_random` alone, else what is seeded does not repeat. v4 and v5
differ in observations and rewards: never mix their numbers.
"""

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import torch


def _all_healthy(next_obs):
    return torch.ones_like(next_obs[..., 0], dtype=torch.bool)


def _hopper_healthy(next_obs):
    z, angle = next_obs[..., 0], next_obs[..., 1]
    # the environment's limit of 100 on velocities is out of sight: they are observed clipped to 10
    return (z > 0.7) & (angle.abs() < 0.2) & (next_obs[..., 1:].abs() < 100).all(-1)


def _walker_healthy(next_obs):
    z, angle = next_obs[..., 0], next_obs[..., 1]
    return (z > 0.8) & (z < 2.0) & (angle.abs() < 1.0)


def _ant_healthy(next_obs):
    z = next_obs[..., 0]
    return (z >= 0.2) & (z <= 1.0) & next_obs.isfinite().all(-1)


def _humanoid_healthy(next_obs):
    z = next_obs[..., 0]
    return (z > 1.0) & (z < 2.0)


class Stock(NamedTuple):
    """A stock locomotion task, and what its near source changes."""

    ctrl_cost: float  # per squared raw action
    reset_noise: float  # half width of the noise on initial positions
    bonus: float = 0.0  # per step while healthy
    healthy: Callable = _all_healthy  # next_obs (..., d) -> (...) bool
    forward_weight: float = 1.0
    action_scale: float = 1.0  # half width of the raw action range
    speed_cap: float = 1.0  # m/s, of the near source
    ctrl_cost_factor: float = 1.0  # of the near source


class Locomotion:
    """Move along x and stay healthy: w f(v_x) + healthy bonus - c |a|^2 - contact cost.

    The target is the stock task, f(v) = v. Sources: `near` caps the speed that pays, f(v) = min(v, speed_cap), and on
    Swimmer, which is slow, charges 100 times the control cost instead; `backward` pays for the other direction,
    f(v) = -v; `stand` for staying in place, f(v) = -|v|. Every source starts from `reset_noise_factor` times the stock
    reset noise.

    Args:
        version: of the Gymnasium environment; from v5 on the step that ends an episode earns no healthy bonus, and
            contact forces, which are the tail of the observation, cost.
        source: None for the target, else one of `SOURCES`.
        speed_cap: m/s, of the near source; ValueError where it is given with another.
        ctrl_cost_factor: times the stock control cost, for every source.
    """

    SOURCES = ("near", "backward", "stand")
    FEATURES = ("x_velocity",)  # keys of the environment's info
    STOCK = {
        "HalfCheetah": Stock(ctrl_cost=0.1, reset_noise=0.1, speed_cap=3.0),
        "Hopper": Stock(ctrl_cost=1e-3, reset_noise=5e-3, bonus=1.0, healthy=_hopper_healthy),
        "Walker2d": Stock(ctrl_cost=1e-3, reset_noise=5e-3, bonus=1.0, healthy=_walker_healthy),
        "Ant": Stock(ctrl_cost=0.5, reset_noise=0.1, bonus=1.0, healthy=_ant_healthy),
        "Swimmer": Stock(ctrl_cost=1e-4, reset_noise=0.1, speed_cap=float("inf"), ctrl_cost_factor=100.0),
        "Humanoid": Stock(ctrl_cost=0.1, reset_noise=1e-2, bonus=5.0, healthy=_humanoid_healthy, forward_weight=1.25,
                          action_scale=0.4),
    }
    # v5 only: number of contact forces in the observation, weight, clip of one force, cap of the whole cost
    CONTACT = {"Ant": (78, 5e-4, 1.0, float("inf")), "Humanoid": (78, 5e-7, float("inf"), 10.0)}

    def __init__(self, name, version, source=None, speed_cap=None, ctrl_cost_factor=None, reset_noise_factor=2.0):
        stock, self.version, self.source = self.STOCK[name], version, source
        if speed_cap is not None and source not in (None, "near"):
            raise ValueError(f"a speed cap is of the near source alone, not of {source}")
        self.forward_weight, self.action_scale = stock.forward_weight, stock.action_scale
        self.bonus, self.healthy = stock.bonus, stock.healthy
        self.contact = self.CONTACT.get(name) if version >= 5 else None
        cap, factor = (stock.speed_cap, stock.ctrl_cost_factor) if source == "near" else (float("inf"), 1.0)
        self.speed_cap = speed_cap if source == "near" and speed_cap is not None else cap
        if source and ctrl_cost_factor is not None:
            factor = ctrl_cost_factor
        self.ctrl_cost = stock.ctrl_cost * factor * self.action_scale**2  # on actions in [-1, 1]
        noise = stock.reset_noise * (reset_noise_factor if source else 1.0)
        self.env_kwargs = {"reset_noise_scale": noise, "camera_name": "track"}  # the camera is for --gif alone

    def reward(self, obs, action, next_obs, features):
        speed = features[..., 0].clamp(max=self.speed_cap)
        if self.source == "backward":
            speed = -speed
        elif self.source == "stand":
            speed = -speed.abs()
        reward = self.forward_weight * speed - self.ctrl_cost * action.square().sum(-1)
        if self.bonus:
            reward = reward + (self.bonus if self.version < 5 else self.bonus * self.healthy(next_obs))
        if self.contact:
            width, weight, clip, cap = self.contact
            force = next_obs[..., -width:].clamp(-clip, clip)
            reward = reward - (weight * force.square().sum(-1)).clamp(max=cap)
        return reward

    def terminated(self, next_obs):
        return ~self.healthy(next_obs)


class Pusher:
    """Push the object to the goal: -|object - goal| - 0.5 |object - tip| - 0.1 |a|^2 (v5: positions after the step).

    The near source's goal lies `goal_shift` metres along y from the goal that is seen, and the joint angles its arm
    starts from are perturbed by up to `reset_noise_factor` times 0.05 rad (the stock arm always starts alike).
    """

    SOURCES = ("near",)
    FEATURES = ()
    action_scale, env_kwargs = 2.0, {}

    def __init__(self, name, version, source=None, goal_shift=0.15, ctrl_cost_factor=1.0, reset_noise_factor=2.0):
        self.ctrl_cost = 0.1 * (ctrl_cost_factor if source else 1.0) * self.action_scale**2  # on actions in [-1, 1]
        self.goal_shift, self.arm_noise = goal_shift if source else 0.0, 0.05 * reset_noise_factor

    def perturb(self, qpos, rng):
        """Widens the source's initial states, in place; the environment has no argument for it."""
        qpos[:7] += self.arm_noise * rng.uniform(-1, 1, 7)

    def reward(self, obs, action, next_obs, features):
        tip, thing, goal = next_obs[..., 14:17], next_obs[..., 17:20], next_obs[..., 20:23]
        shift = torch.tensor([0.0, self.goal_shift, 0.0], device=goal.device)
        ctrl = self.ctrl_cost * action.square().sum(-1)
        return -(thing - goal - shift).norm(dim=-1) - 0.5 * (thing - tip).norm(dim=-1) - ctrl

    def terminated(self, next_obs):
        return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)


class Reacher:
    """Bring the fingertip to the target: -|fingertip - target| - |a|^2 (v4: position before the step, v5: after).

    The near source aims `goal_shift` metres beside the target along y; its initial states are the stock ones, which
    draw the arm and the target anew at every reset.
    """

    SOURCES = ("near",)
    FEATURES = ()
    env_kwargs = {}

    def __init__(self, name, version, source=None, goal_shift=0.05, ctrl_cost_factor=1.0):
        self.version, self.ctrl_cost = version, ctrl_cost_factor if source else 1.0
        self.goal_shift = goal_shift if source else 0.0

    def reward(self, obs, action, next_obs, features):
        # fingertip - target; v4 observes the height too, where the two differ by a constant
        offset = obs[..., 8:] if self.version < 5 else next_obs[..., 8:]
        shift = torch.zeros(offset.shape[-1], device=offset.device)
        shift[1] = self.goal_shift
        return -(offset - shift).norm(dim=-1) - self.ctrl_cost * action.square().sum(-1)

    def terminated(self, next_obs):
        return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)


TASKS = {**dict.fromkeys(Locomotion.STOCK, Locomotion), "Pusher": Pusher, "Reacher": Reacher}


def make_task(env_id, source=None, **quantities):
    """One task of an environment, as TaskEnv's arguments say; ValueError, in one line, for what there is not."""
    name, _, version = env_id.rpartition("-v")
    if name not in TASKS or not version.isdecimal() or version != str(int(version)):
        raise ValueError(f"unknown environment {env_id!r}: known are {', '.join(TASKS)}, each -v4 or -v5; to add "
                         "one, write its class in tasks.py and name it in TASKS (its docstring shows one)")
    task_class = TASKS[name]
    if source is not None and source not in task_class.SOURCES:
        raise ValueError(f"unknown source task {source!r}: {env_id} has {', '.join(task_class.SOURCES)}")
    given = {key: value for key, value in quantities.items() if value is not None}
    unknown = set(given) - set(inspect.signature(task_class).parameters)
    if unknown:
        raise ValueError(f"{env_id} has no source quantity {', '.join(sorted(unknown))}")
    return task_class(name, int(version), source, **given)


class TaskEnv:
    """A Gymnasium environment under one task: actions in [-1, 1], float32 arrays, the task's own reward.

    Args:
        env_id: such as "Walker2d-v4".
        source: None for the stock (target) task, else a source variant of the environment's class in `TASKS`.
        seed: of the initial states. Every TaskEnv has a generator of its own.
        max_steps: time limit of an episode, steps; None stands for the environment's own.
        quantities: of the source task, as the task's class names them; None stands for the class's default.

    Raises ValueError, in one line, for an unknown environment, source or quantity, observations that are not one
    vector, actions that are not one bounded vector, an environment without a time limit where none is given, or a
    task whose reward or termination of a batch (B, ...) is not (B,).
    """

    def __init__(self, env_id, source=None, seed=0, render_mode=None, max_steps=None, **quantities):
        self.task = make_task(env_id, source, **quantities)
        limit = {"max_episode_steps": max_steps} if max_steps else {}
        try:
            self.env = self._make(env_id, render_mode=render_mode, **limit, **self.task.env_kwargs)
        except (gym.error.Error, ImportError) as error:
            raise ValueError(f"{env_id} cannot be made here: {str(error).splitlines()[0]}") from error
        seen, space = self.env.observation_space, self.env.action_space
        if not isinstance(seen, gym.spaces.Box) or len(seen.shape) != 1:
            raise ValueError(f"{env_id} has observations of {type(seen).__name__} {seen.shape or ''}; one vector is "
                             "needed: register the environment with gymnasium's FlattenObservation around it")
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"{env_id} has actions of {type(space).__name__} {space.shape or ''}, discrete or of many "
                             "dimensions; one vector of continuous ones (gymnasium.spaces.Box) is needed")
        if not (np.isfinite(space.low) & np.isfinite(space.high) & (space.low < space.high)).all():
            raise ValueError(f"{env_id} has actions from {space.low.min():g} to {space.high.max():g}; its action_space "
                             "needs finite bounds, for actions in [-1, 1] are stretched to them")
        self.action_mid, self.action_scale = (space.high + space.low) / 2, (space.high - space.low) / 2
        self.source = source
        self.obs_dim, self.action_dim = seen.shape[0], space.shape[0]
        self.n_features, self.max_steps = len(self.task.FEATURES), self.env.spec.max_episode_steps
        if self.max_steps is None:
            raise ValueError(f"{env_id} has no time limit, so an evaluation might never end: give --episode-steps")
        self._check_task()
        self.seed(seed)
        if render_mode:
            self._check_drawing()

    def _check_task(self):
        obs, action, features = (torch.zeros(2, n) for n in (self.obs_dim, self.action_dim, self.n_features))
        for name, given in (("reward", self.task.reward(obs, action, obs, features)),
                            ("terminated", self.task.terminated(obs))):
            if getattr(given, "shape", None) != (2,) or (given.dtype == torch.bool) != (name == "terminated"):
                seen = f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, torch.Tensor) else repr(given)
                raise ValueError(f"{type(self.task).__name__}.{name} must give a tensor (2,) for a batch of 2, of "
                                 f"{'bool' if name == 'terminated' else 'numbers'}; it gives {seen}")

    def _check_drawing(self):
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # no screen: draw off screen
        try:
            self.reset()
            self.env.render()
        except Exception as error:  # whatever the OpenGL at hand raises
            raise ValueError(f"cannot draw on this machine with MUJOCO_GL={os.environ.get('MUJOCO_GL')} (try egl or "
                             f"osmesa): {str(error).splitlines()[0]}") from None

    @staticmethod
    def _make(env_id, **kwargs):
        """gym.make without the warnings that v4 is old (it is what published numbers are for) and that Gymnasium's
        model files use an attribute MuJoCo will drop."""
        before = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return gym.make(env_id, **kwargs)
        finally:
            mujoco.set_mju_user_warning(before)

    def seed(self, seed):
        """Starts the generator of initial states anew: the next resets are those that `seed` always gives."""
        self.env.unwrapped.np_random, _ = gym.utils.seeding.np_random(seed)
        self.obs, self._episode = None, None

    def reset(self):
        """Starts an episode; returns obs (obs_dim,)."""
        env = self.env.unwrapped
        self._episode = (env.np_random.bit_generator.state, [])  # all that a replay of this episode needs
        self.obs, _ = self.env.reset()
        if self.source and hasattr(self.task, "perturb"):
            qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
            self.task.perturb(qpos, env.np_random)
            env.set_state(qpos, qvel)
            self.obs = env._get_obs()
        self.obs = np.asarray(self.obs, dtype=np.float32)
        return self.obs

    def step(self, action):
        """One step with action (action_dim,) in [-1, 1]; returns next_obs, reward, terminated, truncated, features."""
        action = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        self._episode[1].append(action)
        next_obs, _, terminated, truncated, info = self.env.step(self.action_mid + self.action_scale * action)
        next_obs = np.asarray(next_obs, dtype=np.float32)
        features = np.array([info[key] for key in self.task.FEATURES], dtype=np.float32)
        reward = self.task.reward(*map(torch.from_numpy, (self.obs, action, next_obs, features))).item()
        self.obs = next_obs
        return next_obs, reward, terminated, truncated, features

    def state_dict(self):
        """The running episode, as the state of its generator at reset and its actions so far: replaying them brings
        any deterministic environment back to this step, with the solver's warm start and the time limit's count."""
        if self._episode is None or self.obs is None:  # between episodes: `obs` is None once one is over
            return {"rng": self.env.unwrapped.np_random.bit_generator.state, "actions": None}
        return {"rng": self._episode[0], "actions": torch.as_tensor(np.array(self._episode[1], dtype=np.float32))}

    def load_state_dict(self, state):
        self.env.unwrapped.np_random.bit_generator.state = state["rng"]
        self.obs, self._episode = None, None
        if state["actions"] is not None:
            self.reset()
            for action in state["actions"]:
                self.step(action.cpu())

    @property
    def shapes(self):
        """What a buffer keeps of a transition, and its shapes."""
        return {"obs": (self.obs_dim,), "action": (self.action_dim,), "reward": (), "next_obs": (self.obs_dim,),
                "terminated": (), "timeout": (), "features": (self.n_features,), "uncertainty": ()}


EVALUATION_SEED = 1_000_000  # evaluation episode i starts from seed EVALUATION_SEED + i, in every run


def first_observations(envs):
    """Starts the evaluation's episode in each environment: (n, obs_dim)."""
    for i, env in enumerate(envs):
        env.seed(EVALUATION_SEED + i)
        env.reset()
    return np.stack([env.obs for env in envs])


def evaluate(act, envs, frames=None, discount=1.0):
    """One episode in each environment, in lockstep: undiscounted returns, lengths and discounted returns, (n,) each.

    act: obs (m, d) array -> action (m, A) tensor. frames: a list that takes the first episode's pictures.
    """
    first_observations(envs)
    returns, discounted, lengths = np.zeros(len(envs)), np.zeros(len(envs)), np.zeros(len(envs), dtype=int)
    running = list(range(len(envs)))
    while running:
        actions = act(np.stack([envs[i].obs for i in running])).cpu().numpy()
        for i, action in zip(list(running), actions):
            _, reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            discounted[i] += discount ** int(lengths[i]) * reward
            lengths[i] += 1
            if frames is not None and i == 0:
                frames.append(envs[0].env.render())
            if terminated or truncated:
                running.remove(i)
    return returns, lengths, discounted


def lockstep(envs, uncertainty):
    """A step function like a world model's, (obs (n, d), action (n, A)) -> next_obs, features, u, over n real
    environments that have been reset; one whose episode is over stands still. uncertainty: (obs, action) -> u (n,)."""
    over, features = [False] * len(envs), np.zeros((len(envs), envs[0].n_features), dtype=np.float32)

    def step(obs, action):
        for i, env in enumerate(envs):
            if not over[i]:
                _, _, terminated, truncated, features[i] = env.step(action[i].cpu())
                over[i] = terminated or truncated
        next_obs = torch.as_tensor(np.stack([env.obs for env in envs]), device=obs.device)
        return next_obs, torch.as_tensor(features.copy(), device=obs.device), uncertainty(obs, action)

    return step

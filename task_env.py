"""Gymnasium environments under a task of tasks.py: single steps, evaluation episodes, many in lockstep."""

import os
import sys
import warnings

import gymnasium as gym
import mujoco
import numpy as np
import torch

from tasks import make_task


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
        self.env_id, self.task = env_id, make_task(env_id, source, **quantities)
        limit = {"max_episode_steps": max_steps} if max_steps else {}
        drawing = {"render_mode": render_mode} if render_mode else {}
        try:
            self.env = self._make(env_id, **drawing, **limit, **self.task.env_kwargs)
        except (gym.error.Error, ImportError, TypeError) as error:  # TypeError: an argument that it does not take
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
        self.obs = np.array(self.obs, dtype=np.float32)  # a copy: an environment may write its state in place
        return self.obs

    def step(self, action):
        """One step with action (action_dim,) in [-1, 1]; returns next_obs, reward, terminated, truncated, features."""
        action = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        self._episode[1].append(action)
        next_obs, _, terminated, truncated, info = self.env.step(self.action_mid + self.action_scale * action)
        next_obs = np.array(next_obs, dtype=np.float32)
        try:
            features = np.array([info[key] for key in self.task.FEATURES], dtype=np.float32)
        except KeyError as missing:
            raise ValueError(f"{type(self.task).__name__}.FEATURES names {missing}, which a step's info of "
                             f"{self.env_id} lacks; it has {', '.join(map(str, info)) or 'nothing'}") from None
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

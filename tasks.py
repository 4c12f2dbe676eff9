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
from collections.abc import Callable
from typing import NamedTuple

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

"""IQL: implicit Q-learning (Kostrikov et al., 2021, arXiv:2110.06169), which never asks Q for an unseen action.

    python baselines/iql.py --env Walker2d-v4 --dataset runs/.../dataset.npz

    value   |tau - 1(x < 0)| x^2,  x = min_i Q'_i(s, a) - V(s)           expectile regression (eq. 5)
    critic  (r + gamma (1 - terminated) V(s') - Q_i(s, a))^2            (eq. 6)
    actor   -min(exp(beta (min_i Q'_i(s, a) - V(s))), 100) log pi(a|s)   advantage-weighted regression (eq. 7)

Rewards are scaled by 1000 / (highest - lowest return of the dataset's trajectories), as the authors' code does for
locomotion. Online new steps join the dataset, sampling stays uniform, one update a step.

Deviation: offline the actor's learning rate falls by a cosine, online it is constant; the authors' is constant in both
where they go on online. The standard deviation's bounds are soft, and observations are not normalised.
"""

import math
import sys

import numpy as np
import torch

import common  # before agent: it puts the repository's root on the path
from agent import CriticEnsemble
from common import adam, follow, frozen_copy, mlp, step, update_critics


def expectile_loss(x, expectile):
    """E |tau - 1(x < 0)| x^2: x (B,) -> scalar; its minimum over V, with x = q - V, is q's tau-expectile."""
    return ((expectile - (x < 0).to(x.dtype)).abs() * x.square()).mean()


def reward_scale(data):
    """1000 / (highest - lowest undiscounted return) over the trajectories of {key: (n, ...)}, rows in time's order."""
    ended = (data["terminated"] + data["timeout"]) > 0
    ended[:-1] |= (data["next_obs"][:-1] != data["obs"][1:]).any(1)  # a file need not say where it was cut
    trajectory = ended.cumsum(0) - ended.long()
    returns = np.bincount(trajectory.cpu(), weights=data["reward"].cpu())  # sums in double precision
    spread = float(returns.max() - returns.min())
    return 1000.0 / spread if spread > 0 else 1.0


class IQL:
    """Args: expectile: tau. beta: of the weights. scale_rewards: see above. steps: of the actor's cosine schedule (its
    learning rate falls to 0 over the offline updates, and is constant online; None: constant throughout)."""

    PARTS = ("value", "critic", "target_critic", "actor", "value_optimizer", "critic_optimizer", "actor_optimizer")
    VALUES = ("updates", "scale", "online")
    MAX_WEIGHT = 100.0
    state_dict, load_state_dict = common.state_of, common.load_state_of

    def __init__(self, obs_dim, action_dim, *, expectile=0.7, beta=3.0, lr=3e-4, hidden=(256, 256), batch_size=256,
                 discount=0.99, polyak=0.005, scale_rewards=True, steps=None, device="cpu"):
        self.value = mlp(obs_dim, hidden, 1).to(device)
        self.critic = CriticEnsemble(2, obs_dim, action_dim, hidden, layer_norm=False).to(device)
        self.target_critic = frozen_copy(self.critic)
        self.actor = common.GaussianPolicy(obs_dim, action_dim, hidden).to(device)
        self.value_optimizer = adam(self.value.parameters(), lr)
        self.critic_optimizer = adam(self.critic.parameters(), lr)
        self.actor_optimizer = adam(self.actor.parameters(), lr)
        self.expectile, self.beta, self.lr, self.batch_size = expectile, beta, lr, batch_size
        self.discount, self.polyak, self.scale_rewards, self.steps = discount, polyak, scale_rewards, steps
        self.updates, self.scale, self.online = 0, 1.0, False
        self.act = self.actor.act

    def prepare(self, buffer, note):
        if self.scale_rewards:
            self.scale = reward_scale(buffer.filled())
            note(f"rewards scaled by {self.scale:.4g}")

    def start_online(self):
        self.online = True

    def learn(self, buffer):
        batch = buffer.sample(self.batch_size)
        obs, action = batch["obs"], batch["action"]
        if self.steps:
            rest = 1.0 if self.online else 0.5 * (1 + math.cos(math.pi * min(self.updates / self.steps, 1.0)))
            self.actor_optimizer.param_groups[0]["lr"] = self.lr * rest
        q = self.target_critic(obs, action).amin(0)
        value_loss = expectile_loss(q - self.value(obs).squeeze(-1), self.expectile)
        step(self.value_optimizer, value_loss)
        with torch.no_grad():
            weight = (self.beta * (q - self.value(obs).squeeze(-1))).exp().clamp(max=self.MAX_WEIGHT)
            next_value = self.value(batch["next_obs"]).squeeze(-1)
            y = self.scale * batch["reward"] + self.discount * (1 - batch["terminated"]) * next_value
        actor_loss = -(weight * self.actor.log_prob(obs, action)).mean()
        step(self.actor_optimizer, actor_loss)
        info = update_critics(self, batch, y)
        follow(self.target_critic, self.critic, self.polyak)
        self.updates += 1
        return {**info, "value_loss": value_loss.detach(), "actor_loss": actor_loss.detach()}


def build_parser():
    parser = common.offline_parser(__doc__, "iql")
    g = common.agent_flags(parser, "IQL", lr=3e-4, batch_size=256, hidden=256, layers=2, discount=0.99, polyak=0.005)
    g.add_argument("--expectile", type=common.fraction, default=0.7, help="tau, of the value; .5 is the mean")
    g.add_argument("--beta", type=common.nonnegative, default=3.0, help="inverse temperature of the actor's weights")
    g.add_argument("--cosine-lr", **common.SWITCH, default=True, help="actor's lr falls to 0 over the offline updates")
    g.add_argument("--scale-rewards", **common.SWITCH, default=True, help="by 1000 / (highest - lowest return)")
    return parser


def make_agent(args, env):
    return IQL(**common.agent_arguments(args, env, "expectile", "beta", "lr", "batch_size", "discount", "polyak",
                                        "scale_rewards"), steps=args.offline_updates if args.cosine_lr else None)


def main(argv=None):
    return common.main("iql", build_parser(), make_agent, argv)


if __name__ == "__main__":
    sys.exit(main())

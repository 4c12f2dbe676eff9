"""AWAC: advantage-weighted actor-critic (Nair et al., 2020, arXiv:2006.09359), the early offline-to-online method.

    python baselines/awac.py --env Walker2d-v4 --dataset runs/.../dataset.npz --online-steps 25000

    y = r + gamma (1 - terminated) min_i Q'_i(s', a'),  a' ~ pi(.|s')
    critic  (Q_i(s, a) - y)^2
    actor   -min(exp(A(s, a) / lambda), 100) log pi(a|s),  A = min_i Q_i(s, a) - min_i Q_i(s, a_pi),  a_pi ~ pi(.|s)

Online it goes on alike: new steps join the dataset, one update a step.

Deviation: weights are cut at 100 (as in CORL's awac.py), where the authors' code divides them by their sum. Two hidden
layers, not three; the mean is squashed, the standard deviation's bounds are soft, observations are not normalised.
"""

import sys

import torch

import common  # before agent: it puts the repository's root on the path
from agent import CriticEnsemble
from common import adam, follow, frozen_copy, step, update_critics


def weights(advantage, awac_lambda, most=100.0):
    """min(exp(A / lambda), most): A (B,) -> (B,)."""
    return (advantage / awac_lambda).exp().clamp(max=most)


class AWAC:
    """Args: awac_lambda: lambda above, in reward; small ones copy only what is better than the policy."""

    PARTS = ("critic", "target_critic", "actor", "critic_optimizer", "actor_optimizer")
    VALUES = ("updates",)
    state_dict, load_state_dict = common.state_of, common.load_state_of

    def __init__(self, obs_dim, action_dim, *, awac_lambda=1.0, lr=3e-4, hidden=(256, 256), batch_size=256,
                 discount=0.99, polyak=0.005, device="cpu"):
        self.critic = CriticEnsemble(2, obs_dim, action_dim, hidden, layer_norm=False).to(device)
        self.target_critic = frozen_copy(self.critic)
        self.actor = common.GaussianPolicy(obs_dim, action_dim, hidden).to(device)
        self.critic_optimizer = adam(self.critic.parameters(), lr)
        self.actor_optimizer = adam(self.actor.parameters(), lr)
        self.awac_lambda, self.batch_size = awac_lambda, batch_size
        self.discount, self.polyak, self.updates = discount, polyak, 0
        self.act = self.actor.act

    def learn(self, buffer):
        batch = buffer.sample(self.batch_size)
        obs, action = batch["obs"], batch["action"]
        with torch.no_grad():
            value = self.target_critic(batch["next_obs"], self.act(batch["next_obs"])).amin(0)
            y = batch["reward"] + self.discount * (1 - batch["terminated"]) * value
        info = update_critics(self, batch, y)
        with torch.no_grad():
            advantage = self.critic(obs, action).amin(0) - self.critic(obs, self.act(obs)).amin(0)
        actor_loss = -(weights(advantage, self.awac_lambda) * self.actor.log_prob(obs, action)).mean()
        step(self.actor_optimizer, actor_loss)
        follow(self.target_critic, self.critic, self.polyak)
        self.updates += 1
        return {**info, "actor_loss": actor_loss.detach()}


def build_parser():
    parser = common.offline_parser(__doc__, "awac")
    g = common.agent_flags(parser, "AWAC", lr=3e-4, batch_size=256, hidden=256, layers=2, discount=0.99, polyak=0.005)
    g.add_argument("--awac-lambda", type=common.positive, default=1.0, help="temperature of the actor's weights")
    return parser


def make_agent(args, env):
    return AWAC(**common.agent_arguments(args, env, "awac_lambda", "lr", "batch_size", "discount", "polyak"))


def main(argv=None):
    return common.main("awac", build_parser(), make_agent, argv)


if __name__ == "__main__":
    sys.exit(main())

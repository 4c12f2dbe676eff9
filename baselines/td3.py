"""TD3: twin delayed deterministic policy gradients (Fujimoto et al., 2018, arXiv:1802.09477).

    python baselines/td3.py --env Walker2d-v4

    a' = clip(pi'(s') + clip(noise, -c, c), -1, 1)              target policy smoothing
    y = r + gamma (1 - terminated) min_i Q'_i(s', a')           clipped double Q
    critics  (Q_i(s, a) - y)^2                                  actor  -Q_1(s, pi(s)), every `policy_delay` critic steps

Details as in CleanRL's td3_continuous_action.py: both targets, pi' and Q', follow with the actor's delayed step.
"""

import sys

import torch
from torch import nn

import common  # before agent: it puts the repository's root on the path
from agent import CriticEnsemble
from common import adam, follow, frozen_copy, mlp, step, update_critics


class TD3:
    """Args: exploration, target_noise, noise_clip: standard deviations and c above, actions in [-1, 1]."""

    PARTS = ("actor", "target_actor", "critic", "target_critic", "actor_optimizer", "critic_optimizer")
    VALUES = ("updates",)
    state_dict, load_state_dict = common.state_of, common.load_state_of

    def __init__(self, obs_dim, action_dim, *, lr=3e-4, hidden=(256, 256), batch_size=256, discount=0.99, polyak=0.005,
                 exploration=0.1, target_noise=0.2, noise_clip=0.5, policy_delay=2, device="cpu"):
        self.actor = mlp(obs_dim, hidden, action_dim, last=nn.Tanh).to(device)
        self.critic = CriticEnsemble(2, obs_dim, action_dim, hidden, layer_norm=False).to(device)
        self.target_actor, self.target_critic = frozen_copy(self.actor), frozen_copy(self.critic)
        self.actor_optimizer = adam(self.actor.parameters(), lr)
        self.critic_optimizer = adam(self.critic.parameters(), lr)
        self.batch_size, self.discount, self.polyak, self.device = batch_size, discount, polyak, device
        self.exploration, self.target_noise, self.noise_clip = exploration, target_noise, noise_clip
        self.policy_delay, self.updates = policy_delay, 0

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        action = self.actor(torch.as_tensor(obs, device=self.device))
        return action if deterministic else (action + self.exploration * torch.randn_like(action)).clamp(-1.0, 1.0)

    @torch.no_grad()
    def target(self, reward, terminated, next_obs):
        """y: all (B,) but next_obs (B, d)."""
        next_action = self.target_actor(next_obs)
        noise = (self.target_noise * torch.randn_like(next_action)).clamp(-self.noise_clip, self.noise_clip)
        value = self.target_critic(next_obs, (next_action + noise).clamp(-1.0, 1.0)).amin(0)
        return reward + self.discount * (1 - terminated) * value

    def learn(self, buffer):
        batch = buffer.sample(self.batch_size)
        y = self.target(batch["reward"], batch["terminated"], batch["next_obs"])
        info = update_critics(self, batch, y)
        self.updates += 1
        if self.updates % self.policy_delay == 0:
            info["actor_loss"] = self.update_actor(batch["obs"])
            follow(self.target_actor, self.actor, self.polyak)
            follow(self.target_critic, self.critic, self.polyak)
        return info

    def update_actor(self, obs):
        """One step up Q_1(s, pi(s)): obs (B, d)."""
        self.critic.requires_grad_(False)  # gradients with respect to actions only
        actor_loss = -self.critic(obs, self.actor(obs))[0].mean()
        step(self.actor_optimizer, actor_loss)
        self.critic.requires_grad_(True)
        return actor_loss.detach()


def noise_flags(g):
    g.add_argument("--exploration", type=common.nonnegative, default=0.1, help="std of the noise on actions in [-1, 1]")
    g.add_argument("--target-noise", type=common.nonnegative, default=0.2, help="std of the target action's noise")
    g.add_argument("--noise-clip", type=common.nonnegative, default=0.5, help="most of that noise")
    g.add_argument("--policy-delay", type=common.count, default=2, help="critic steps between the actor's")


def td3_arguments(args, env):
    return common.agent_arguments(args, env, "lr", "batch_size", "discount", "polyak", "exploration", "target_noise",
                                  "noise_clip", "policy_delay")


def build_parser():
    parser = common.online_parser(__doc__, "td3", steps=100_000)
    noise_flags(common.agent_flags(parser, "TD3", lr=3e-4, batch_size=256, hidden=256, layers=2, discount=0.99,
                                   polyak=0.005, random_steps=25_000))
    return parser


def make_agent(args, env):
    return TD3(**td3_arguments(args, env))


def main(argv=None):
    return common.main("td3", build_parser(), make_agent, argv)


if __name__ == "__main__":
    sys.exit(main())

"""BC: behaviour cloning by maximum likelihood (Pomerleau, 1988), and TD3 to fine-tune the clone online.

    python baselines/bc.py --env Walker2d-v4 --dataset runs/.../dataset.npz

    offline  -log N(a; pi(s), diag(std)^2) over the dataset, pi a tanh network, std learned and the same for all s
    online   TD3 (td3.py) from the cloned pi; the critics are new, so pi rests for `critic_steps` updates while they
             learn from the dataset and the new steps

Cloning knows no reward, so what fine-tunes it is a method of its own; the offline result is cloning alone.
"""

import sys

import torch

import common  # it puts the repository's root on the path
from td3 import TD3, noise_flags, td3_arguments


class BC(TD3):
    """Args: critic_steps: first updates online that leave the actor alone. others: TD3's."""

    PARTS = (*TD3.PARTS, "policy", "clone_optimizer")
    VALUES = (*TD3.VALUES, "online_since")

    def __init__(self, obs_dim, action_dim, *, hidden=(256, 256), lr=3e-4, critic_steps=5000, device="cpu", **others):
        super().__init__(obs_dim, action_dim, hidden=hidden, lr=lr, device=device, **others)
        self.policy = common.GaussianPolicy(obs_dim, action_dim, hidden).to(device)
        self.policy.mean = self.actor  # TD3's: one network, cloned first and fine-tuned then
        self.clone_optimizer = common.adam(self.policy.parameters(), lr)
        self.critic_steps, self.online_since = critic_steps, None

    def learn(self, buffer):
        if self.online_since is not None:
            return super().learn(buffer)
        batch = buffer.sample(self.batch_size)
        loss = -self.policy.log_prob(batch["obs"], batch["action"]).mean()
        common.step(self.clone_optimizer, loss)
        self.updates += 1
        return {"actor_loss": loss.detach()}

    def start_online(self):
        self.online_since = self.updates
        self.target_actor.load_state_dict(self.actor.state_dict())

    def update_actor(self, obs):
        if self.updates - self.online_since <= self.critic_steps:
            return torch.zeros(())
        return super().update_actor(obs)


def build_parser():
    parser = common.offline_parser(__doc__, "bc")
    common.agent_flags(parser, "BC", lr=3e-4, batch_size=256, hidden=256, layers=2)
    g = common.agent_flags(parser, "fine-tuning by TD3", discount=0.99, polyak=0.005)
    noise_flags(g)
    g.add_argument("--critic-steps", type=common.amount, default=5000, help="first online updates, of critics alone")
    return parser


def make_agent(args, env):
    return BC(**td3_arguments(args, env), critic_steps=args.critic_steps)


def check(args):
    common.require(not args.online_steps or args.critic_steps < args.online_steps, f"--critic-steps "
                   f"{args.critic_steps} leaves none of --online-steps {args.online_steps} to the actor")


def main(argv=None):
    return common.main("bc", build_parser(), make_agent, argv, check)


if __name__ == "__main__":
    sys.exit(main())

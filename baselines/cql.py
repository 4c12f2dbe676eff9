"""CQL: conservative Q-learning (Kumar et al., 2020, arXiv:2006.04779), CQL(H) with a fixed weight.

    python baselines/cql.py --env Walker2d-v4 --dataset runs/.../dataset.npz

    critic  (Q_i(s, a) - y)^2 + alpha (log int exp Q_i(s, a') da' - Q_i(s, a))                         (eq. 4)

over the dataset's (s, a), with SAC's y, without the entropy in it, and SAC's actor. The integral is estimated with
`n_actions` actions each from the uniform distribution, from pi(.|s) and from pi(.|s'), every Q less the log-density
that its action was drawn with (appendix F). Online it goes on alike, with the same alpha: new steps join the dataset.

Deviation: the loss is the squared error, not half of it (as in the public code, where alpha = 5 or 10 comes from).
"""

import math
import sys

import torch

import common  # before sac: it puts the repository's root on the path
from sac import DelayedSAC, sac_arguments, sac_switches


class CQL(DelayedSAC):
    """Args: cql_alpha: alpha. n_actions: per state and distribution. others: DelayedSAC's."""

    def __init__(self, obs_dim, action_dim, *, cql_alpha=10.0, n_actions=10, **others):
        super().__init__(obs_dim, action_dim, **others)
        self.cql_alpha, self.n_actions = cql_alpha, n_actions

    def learn(self, buffer):
        return self.learn_from(buffer.sample(self.batch_size), self.batch_size)

    def learn_from(self, batch, n_data):
        """As DelayedSAC's; the batch's first n_data rows are data, whose Q is pushed up."""
        self.n_data = n_data
        return super().learn_from(batch)

    @torch.no_grad()
    def with_next_action(self, batch):
        """As SAC's, and `sampled` actions (K, B, A) with `density`, the log of theirs (K, B), K = 3 n_actions; one pass
        of the actor over obs and one over next_obs."""
        n, like = self.n_actions, batch["action"]
        noise = torch.randn_like(like)
        here, there = (torch.randn(n, *like.shape, device=like.device) for _ in range(2))
        uniform = torch.rand(n, *like.shape, device=like.device) * 2 - 1
        action, log_prob = self.actor.sample(batch["obs"], here, self.dtype)
        next_action, next_log_prob = self.actor.sample(batch["next_obs"], torch.cat([noise[None], there]), self.dtype)
        even = torch.full_like(log_prob, -self.action_dim * math.log(2.0))
        return {**batch, "next_action": next_action[0], "next_log_prob": next_log_prob[0],
                "sampled": torch.cat([uniform, action, next_action[1:]]),
                "density": torch.cat([even, log_prob, next_log_prob[1:]])}

    def critic_loss(self, batch, subset=None):
        """Eq. 4, summed over critics; also Q (N, B) and y (B,)."""
        y = self.target(batch, subset)
        actions = torch.cat([batch["action"][None], batch["sampled"]])
        obs = batch["obs"].expand(len(actions), -1, -1)
        q = self.critic(obs.flatten(0, 1), actions.flatten(0, 1)).unflatten(1, obs.shape[:2])  # of all actions at once
        q, sampled_q = q[:, 0], q[:, 1:]
        log_integral = (sampled_q - batch["density"]).logsumexp(1) - math.log(sampled_q.shape[1])
        gap = log_integral.mean(1) - q[:, : self.n_data].mean(1)
        return ((q - y).square().mean(1) + self.cql_alpha * gap).sum(), q.detach(), y


def cql_flags(parser, title, alpha):
    g = common.agent_flags(parser, title, actor_lr=1e-4, critic_lr=3e-4, batch_size=256, hidden=256, layers=3,
                           discount=0.99, polyak=0.005, init_temperature=1.0, target_entropy=None)
    g.add_argument("--cql-alpha", type=common.nonnegative, default=alpha, help="weight of the conservative penalty")
    g.add_argument("--cql-actions", type=common.count, default=10, help="actions per state from each distribution")
    sac_switches(g, backup_entropy=False)


def build_parser():
    parser = common.offline_parser(__doc__, "cql")
    cql_flags(parser, "CQL", alpha=10.0)
    return parser


def cql_arguments(args, env):
    return {**sac_arguments(args, env), "temperature_lr": args.actor_lr, "cql_alpha": args.cql_alpha,
            "n_actions": args.cql_actions}


def make_agent(args, env):
    return CQL(**cql_arguments(args, env))


def main(argv=None):
    return common.main("cql", build_parser(), make_agent, argv, compiles=True)


if __name__ == "__main__":
    sys.exit(main())

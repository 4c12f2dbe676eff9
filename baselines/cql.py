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

    def values(self, obs, action, next_obs):
        """Q_i(s, a) and log int exp Q_i(s, a') da', estimated: obs, next_obs (B, d), action (B, A) -> both (N, B).

        One pass of the actor, for all that it draws, and one of the critics, for all actions.
        """
        n, rows, dim = self.n_actions, len(obs), self.action_dim
        with torch.no_grad():
            noise = torch.stack([torch.randn(n, rows, dim, device=obs.device) for _ in range(2)])
            drawn, log_prob = self.actor.sample(torch.stack([obs, next_obs])[:, None], noise)
            uniform = torch.rand(n, rows, dim, device=obs.device) * 2 - 1
            density = uniform.new_full((n, rows), -dim * math.log(2.0))
            log_prob = torch.cat([density, log_prob.flatten(0, 1)])
            actions = torch.cat([action[None], uniform, drawn.flatten(0, 1)])
        states = obs.expand(len(actions), -1, -1)
        q = self.critic(states.flatten(0, 1), actions.flatten(0, 1)).unflatten(1, states.shape[:2])
        return q[:, 0], (q[:, 1:] - log_prob).logsumexp(1) - math.log(3 * n)

    def update_critic(self, part, n_offline):
        """One step of the critics on {key: (B, ...)}, of which the first n_offline rows are data."""
        y = self.target(part)
        q, log_integral = self.values(part["obs"], part["action"], part["next_obs"])
        gap = log_integral.mean(1) - q[:, :n_offline].mean(1)
        critic_loss = ((q - y).square().mean(1) + self.cql_alpha * gap).sum()
        self.step_critic(torch.autograd.grad(critic_loss, self.critic_parameters))
        return {"critic_loss": critic_loss.detach() / self.n_critics, "q_mean": q.detach().mean(),
                "td_error": (q.detach().mean(0) - y).abs().mean()}


def cql_flags(parser, title, alpha):
    g = common.agent_flags(parser, title, actor_lr=1e-4, critic_lr=3e-4, batch_size=256, hidden=256, layers=3,
                           discount=0.99, polyak=0.005, init_temperature=1.0, target_entropy=None)
    g.add_argument("--cql-alpha", type=common.nonnegative, default=alpha, help="weight of the conservative penalty")
    g.add_argument("--cql-actions", type=common.count, default=10, help="actions per state from each distribution")
    sac_switches(g, backup_entropy=False)
    return g


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
    return common.main("cql", build_parser(), make_agent, argv)


if __name__ == "__main__":
    sys.exit(main())

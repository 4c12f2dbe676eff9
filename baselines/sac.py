"""SAC: soft actor-critic (Haarnoja et al., 2018, arXiv:1812.05905), as in CleanRL's sac_continuous_action.py.

    python baselines/sac.py --env Walker2d-v4

    y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - temperature log pi(a'|s')),  a' ~ pi(.|s')
    critics      (Q_i(s, a) - y)^2, two of them, without LayerNorm
    actor        temperature log pi(a|s) - min_i Q_i(s, a),  a ~ pi(.|s)
    temperature  temperature (entropy - target entropy): it falls while the policy is more random than asked for

Deviation: the log standard deviation is softly bounded to [-20, 2], as agent.py's; CleanRL's is a tanh onto [-5, 2].

Actor and temperature take their steps every `policy_delay` critic steps, as many at once as were left out.
"""

import sys

import torch

import common  # before agent: it puts the repository's root on the path
from agent import SAC


class DelayedSAC(SAC):
    """agent.py's SAC as published: min of two critics in both losses, learning rates of their own, a delayed actor.

    Args: temperature_lr: None stands for the critics'. others: as agent.SAC's.
    """

    def __init__(self, obs_dim, action_dim, *, actor_lr, critic_lr, temperature_lr=None, batch_size=256,
                 policy_delay=1, target_entropy=None, layer_norm=False, **others):
        super().__init__(obs_dim, action_dim, lr=critic_lr, actor_q="min", layer_norm=layer_norm, penalty_coef=0.0,
                         target_entropy=-action_dim if target_entropy is None else target_entropy, **others)
        self.actor_optimizer = torch.optim.Adam([{"params": self.actor.parameters(), "lr": actor_lr},
                                                 {"params": [self.log_temperature], "lr": temperature_lr or critic_lr}],
                                                fused=True)
        self.batch_size, self.policy_delay, self.updates = batch_size, policy_delay, 0

    def learn(self, buffer):
        return self.learn_from(buffer.sample(self.batch_size))

    def learn_from(self, batch, n_data=0):
        """One critic step, and in every `policy_delay`-th call as many actor and temperature steps; of the batch's rows
        the first n_data are from a dataset, which makes a difference to a subclass alone (CQL)."""
        info = self.update_critic(self.with_next_action(batch))
        self.updates += 1
        if self.updates % self.policy_delay == 0:
            for _ in range(self.policy_delay):
                info.update(self.update_actor(batch["obs"]))
        return info

    def state_dict(self):
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.updates = state["updates"]


def sac_arguments(args, env):
    """What the flags give and DelayedSAC takes."""
    given = common.agent_arguments(args, env, "actor_lr", "critic_lr", "batch_size", "discount", "polyak",
                                   "init_temperature", "target_entropy", "layer_norm", "backup_entropy", "policy_delay")
    return {**given, "compile": args.speed["compile"], "dtype": args.speed["dtype"]}


def sac_switches(g, backup_entropy):
    g.add_argument("--backup-entropy", **common.SWITCH, default=backup_entropy, help="entropy in the critics' target")
    g.add_argument("--layer-norm", **common.SWITCH, default=False, help="LayerNorm in the critics")


def build_parser():
    parser = common.online_parser(__doc__, "sac", steps=100_000)
    g = common.agent_flags(parser, "SAC", actor_lr=3e-4, critic_lr=1e-3, batch_size=256, hidden=256, layers=2,
                           discount=0.99, polyak=0.005, init_temperature=1.0, target_entropy=None, random_steps=5000)
    g.add_argument("--policy-delay", type=common.count, default=2, help="critic steps, then as many of the actor")
    g.add_argument("--save-dataset", action="store_true", help="write the replay buffer to dataset.npz at the end")
    sac_switches(g, backup_entropy=True)
    return parser


def make_agent(args, env):
    return DelayedSAC(**sac_arguments(args, env))


def main(argv=None):
    return common.main("sac", build_parser(), make_agent, argv, compiles=True)


if __name__ == "__main__":
    sys.exit(main())

"""PPO: proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347), one environment.

As in CleanRL's ppo_continuous_action.py: observations and rewards normalised.

    python baselines/ppo.py --env Walker2d-v4

    delta_t = r_t + gamma (1 - terminated_t) V(s_t+1) - V(s_t)
    A_t = delta_t + gamma lambda (1 - ended_t) A_t+1            generalised advantage estimation (GAE)
    ratio = pi(a|s) / pi_old(a|s)
    actor   -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), A normalised in the minibatch
    value   1/2 max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2),  R = A + V_old

Deviation (from CleanRL): a truncated episode bootstraps from V(s_t+1); and the statistics that normalise are brought
up to date once a batch, with all its steps, rather than at every step, so a batch sees one policy.
"""

import math
import sys

import numpy as np
import torch
from torch import nn

import common  # it puts the repository's root on the path
from common import log_normal


class RunningMoments:
    """Mean and variance, elementwise, of all rows seen (Chan et al.'s parallel update), in double precision: NumPy's,
    since Apple's GPUs have none."""

    def __init__(self, shape):
        self.count, self.mean, self.var = 0, np.zeros(shape), np.ones(shape)

    def update(self, rows):
        """rows (n, *shape), an array or a tensor on the CPU."""
        rows = np.asarray(rows, dtype=np.float64)
        n, mean, var = len(rows), rows.mean(0), rows.var(0)
        total, delta = self.count + n, mean - self.mean
        self.var = (self.count * self.var + n * var + delta**2 * self.count * n / total) / total
        self.mean, self.count = self.mean + delta * n / total, total

    def state_dict(self):
        return {"count": self.count, "mean": self.mean.tolist(), "var": self.var.tolist()}

    def load_state_dict(self, state):
        self.count, self.mean, self.var = state["count"], np.array(state["mean"]), np.array(state["var"])


def advantages(reward, value, next_value, terminated, ended, discount, gae_lambda):
    """GAE: all (T,), in time's order; ended: the episode's last step, terminated or not. Returns A (T,)."""
    delta = (reward + discount * (1 - terminated) * next_value - value).tolist()
    decay, result, last = (discount * gae_lambda * (1 - ended)).tolist(), [0.0] * len(reward), 0.0
    for t in reversed(range(len(delta))):
        last = result[t] = delta[t] + decay[t] * last
    return torch.tensor(result, device=reward.device)


def clipped_objective(log_ratio, advantage, clip):
    """The actor's loss: log(pi / pi_old) (B,), A (B,) -> scalar."""
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def clipped_value_loss(value, old_value, returns, clip):
    """The value's loss, all (B,) -> scalar."""
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.max((value - returns).square(), (near - returns).square()).mean()


def orthogonal(layer, gain):
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)


class PPO:
    """Args: steps: the whole run's, over which the learning rate falls to 0 (anneal_lr). others: as their flags say."""

    PARTS = ("actor", "value", "optimizer", "obs_moments", "return_moments")
    VALUES = ("updates", "batches", "running_return")
    CUT = 10.0  # normalised observations and rewards are cut to [-10, 10]

    def __init__(self, obs_dim, action_dim, *, steps, rollout_steps=2048, minibatches=32, epochs=10, lr=3e-4,
                 anneal_lr=True, discount=0.99, gae_lambda=0.95, clip=0.2, entropy_coef=0.0, value_coef=0.5,
                 max_grad_norm=0.5, normalise_obs=True, normalise_rewards=True, hidden=(64, 64), device="cpu"):
        self.actor = common.mlp(obs_dim, hidden, action_dim, activation=nn.Tanh).to(device)
        self.value = common.mlp(obs_dim, hidden, 1, activation=nn.Tanh).to(device)
        for net, last in ((self.actor, 0.01), (self.value, 1.0)):
            layers = [layer for layer in net if isinstance(layer, nn.Linear)]
            for layer in layers:
                orthogonal(layer, last if layer is layers[-1] else math.sqrt(2))
        self.actor.log_std = nn.Parameter(torch.zeros(action_dim, device=device))
        self.parameters = [*self.actor.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=1e-5, fused=True)
        self.obs_moments, self.return_moments = RunningMoments((obs_dim,)), RunningMoments(())
        self.rollout_steps, self.minibatches, self.epochs, self.device = rollout_steps, minibatches, epochs, device
        self.lr, self.anneal_lr, self.total_batches = lr, anneal_lr, max(1, steps // rollout_steps)
        self.discount, self.gae_lambda, self.clip = discount, gae_lambda, clip
        self.entropy_coef, self.value_coef, self.max_grad_norm = entropy_coef, value_coef, max_grad_norm
        self.normalise_obs, self.normalise_rewards = normalise_obs, normalise_rewards
        self.updates = self.batches = 0
        self.running_return = 0.0  # discounted, of the episode under way
        self.set_scale()

    state_dict = common.state_of

    def load_state_dict(self, state):
        common.load_state_of(self, state)
        self.set_scale()

    def set_scale(self):
        """What `normalise` needs, in single precision."""
        moments = self.obs_moments
        self.shift, self.scale = (torch.as_tensor(x.astype(np.float32), device=self.device)
                                  for x in (moments.mean, (moments.var + 1e-8) ** -0.5))

    def normalise(self, obs):
        return ((obs - self.shift) * self.scale).clamp(-self.CUT, self.CUT) if self.normalise_obs else obs

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """The environment cuts an action to [-1, 1]; its log-density is of the action before that."""
        mean = self.actor(self.normalise(torch.as_tensor(obs, device=self.device)))
        return mean if deterministic else mean + self.actor.log_std.exp() * torch.randn_like(mean)

    def scaled_rewards(self, reward, ended):
        """Rewards (T,) over the standard deviation of the discounted return so far, which includes this batch's."""
        if not self.normalise_rewards:
            return reward
        returns = []
        for r, end in zip(reward.tolist(), ended.tolist()):
            self.running_return = self.running_return * self.discount + r
            returns.append(self.running_return)
            if end:
                self.running_return = 0.0
        self.return_moments.update(returns)
        return (reward * float(self.return_moments.var + 1e-8) ** -0.5).clamp(-self.CUT, self.CUT)

    def learn(self, buffer):
        """Waits until the buffer holds a new batch in full, then takes `epochs` passes over it."""
        if buffer.position != 0:
            return {}
        batch = buffer.filled()
        obs, action, n = self.normalise(batch["obs"]), batch["action"], len(batch["obs"])
        ended = batch["terminated"] + batch["timeout"]
        reward = self.scaled_rewards(batch["reward"], ended)
        with torch.no_grad():  # the policy that acted is still the present one
            old_log_prob = log_normal(action, self.actor(obs), self.actor.log_std)
            value, next_value = (self.value(x).squeeze(-1) for x in (obs, self.normalise(batch["next_obs"])))
            advantage = advantages(reward, value, next_value, batch["terminated"], ended, self.discount,
                                   self.gae_lambda)
        returns = advantage + value
        if self.anneal_lr:
            self.optimizer.param_groups[0]["lr"] = self.lr * max(0.0, 1 - self.batches / self.total_batches)
        for _ in range(self.epochs):
            for rows in torch.randperm(n, device=obs.device).tensor_split(self.minibatches):
                parts = (x[rows] for x in (obs, action, old_log_prob, advantage, returns, value))
                info = self.update(*parts)
        self.obs_moments.update(batch["obs"].cpu())  # after the updates: they see what the policy saw when it acted
        self.set_scale()
        self.batches += 1
        return {**info, "q_mean": value.mean(), "td_error": (returns - value).abs().mean()}

    def update(self, obs, action, old_log_prob, advantage, returns, old_value):
        """One step on a minibatch, all (B, ...)."""
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        log_std = self.actor.log_std
        log_ratio = log_normal(action, self.actor(obs), log_std) - old_log_prob
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        actor_loss = clipped_objective(log_ratio, advantage, self.clip) - self.entropy_coef * entropy
        value_loss = clipped_value_loss(self.value(obs).squeeze(-1), old_value, returns, self.clip)
        self.optimizer.zero_grad()
        (actor_loss + self.value_coef * value_loss).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        return {"actor_loss": actor_loss.detach(), "critic_loss": value_loss.detach()}


def build_parser():
    parser = common.online_parser(__doc__, "ppo", steps=1_000_000, eval_every=20_000)
    parser.set_defaults(checkpoint_every=50_000)
    g = common.agent_flags(parser, "PPO", lr=3e-4, hidden=64, layers=2, discount=0.99)
    g.add_argument("--anneal-lr", **common.SWITCH, default=True, help="learning rate falls to 0 over the run")
    g.add_argument("--rollout-steps", type=common.count, default=2048, help="environment steps in a batch")
    g.add_argument("--minibatches", type=common.count, default=32, help="parts of a batch, an update each")
    g.add_argument("--epochs", type=common.count, default=10, help="passes over a batch")
    g.add_argument("--gae-lambda", type=common.fraction, default=0.95, help="lambda of GAE")
    g.add_argument("--clip", type=common.positive, default=0.2, help="eps, of the ratio and of the value")
    g.add_argument("--entropy-coef", type=common.nonnegative, default=0.0, help="weight of the entropy bonus")
    g.add_argument("--value-coef", type=common.nonnegative, default=0.5, help="weight of the value's loss")
    g.add_argument("--max-grad-norm", type=common.positive, default=0.5, help="longest gradient; a longer one is cut")
    g.add_argument("--normalise-obs", **common.SWITCH, default=True, help="observations by their running moments")
    g.add_argument("--normalise-rewards", **common.SWITCH, default=True, help="rewards by the return's running std")
    return parser


def check(args):
    common.require(args.minibatches <= args.rollout_steps,
                f"--minibatches {args.minibatches} is above --rollout-steps {args.rollout_steps}")


def make_agent(args, env):
    names = ("rollout_steps", "minibatches", "epochs", "lr", "anneal_lr", "discount", "gae_lambda", "clip",
             "entropy_coef", "value_coef", "max_grad_norm", "normalise_obs", "normalise_rewards")
    return PPO(**common.agent_arguments(args, env, *names), steps=args.target_steps)


def main(argv=None):
    return common.main("ppo", build_parser(), make_agent, argv, check)


if __name__ == "__main__":
    sys.exit(main())

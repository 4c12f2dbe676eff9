"""Soft actor-critic that learns from a mix of offline and online data (sections 4.4 and 4.5 of the paper).

Squashed-Gaussian actor, ensemble of LayerNorm critics (one batched network), and the update of the RLPD family (Ball et
al., 2023) with the penalised target of eq. 7. Its batches come from replay.py.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F


def affine(x, weight, bias, dtype=torch.float32):
    """x weight + bias for N networks at once: x (N, B, i), weight (N, i, o), bias (N, 1, o) -> (N, B, o).

    dtype: of the product's factors and result; bfloat16 keeps 8 bits of each and sums in float32.
    """
    if dtype == torch.float32:
        return torch.baddbmm(bias, x, weight)
    return torch.bmm(x.to(dtype), weight.to(dtype)).float() + bias


def soft_bounds(x, low, high):
    """x softly within [low, high]: beyond a clamp there is no gradient that leads back."""
    return low + F.softplus(high - F.softplus(high - x) - low)


class Actor(nn.Module):
    """Squashed-Gaussian policy a = tanh(u), u ~ N(mean(s), std(s)) (SAC, Haarnoja et al., 2018)."""

    LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0

    def __init__(self, obs_dim, action_dim, hidden=(256, 256)):
        super().__init__()
        sizes = [obs_dim, *hidden]
        layers = [part for i, o in zip(sizes, sizes[1:]) for part in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * action_dim))

    def forward(self, obs, dtype=torch.float32):
        """obs (..., obs_dim) -> mean and log std of u, each (..., action_dim); dtype: of all products but one."""
        x = self.net[0](obs)  # float32: 8 bits do not tell one state from the next
        for layer in self.net[1:]:
            if dtype != torch.float32 and isinstance(layer, nn.Linear):
                x = F.linear(x.to(dtype), layer.weight.to(dtype)).float() + layer.bias
            else:
                x = layer(x)
        mean, log_std = x.chunk(2, -1)
        return mean, soft_bounds(log_std, self.LOG_STD_MIN, self.LOG_STD_MAX)

    def sample(self, obs, noise=None, dtype=torch.float32):
        """obs (..., obs_dim) -> action (..., action_dim), reparameterised, and its log-density (...).

        noise: standard normal (..., action_dim); drawn here where None.
        """
        mean, log_std = self(obs, dtype)
        noise = torch.randn_like(mean) if noise is None else noise
        u = mean + log_std.exp() * noise
        # log N(u) - log |d tanh / du|, the latter in its numerically stable form
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
        return torch.tanh(u), log_prob.sum(-1)


class CriticEnsemble(nn.Module):
    """N critics Q_i(s, a) = w_i . psi_i(s, a) + b_i, psi = ReLU(LayerNorm(.)), as one batched network (section 4.5).

    LayerNorm's gain and bias are each critic's own. By eq. 8, |Q_i - b_i| <= |w_i| |psi_i|, and LayerNorm bounds
    |psi_i| for any input.

    Args:
        layer_norm: False takes it out (the bound then fails).
        dtype: of the products between hidden layers, see `affine`; the inputs' and the values' stay float32.
    """

    def __init__(self, n_critics, obs_dim, action_dim, hidden=(256, 256), layer_norm=True, dtype=torch.float32):
        super().__init__()
        self.layer_norm, self.dtype = layer_norm, dtype
        sizes = [obs_dim + action_dim, *hidden, 1]
        bounds = [1 / math.sqrt(i) for i in sizes[:-1]]  # nn.Linear's initialisation
        uniform = lambda bound, *shape: nn.Parameter(torch.empty(n_critics, *shape).uniform_(-bound, bound))
        self.weights = nn.ParameterList([uniform(b, i, o) for b, i, o in zip(bounds, sizes, sizes[1:])])
        self.biases = nn.ParameterList([uniform(b, 1, o) for b, o in zip(bounds, sizes[1:])])
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(n_critics, 1, o)) for o in hidden if layer_norm])
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(n_critics, 1, o)) for o in hidden if layer_norm])
        # the same parameters by layer: looking one up in a ParameterList takes as long as a small operation
        norms = [*zip(self.gains, self.shifts), *[()] * (len(sizes) - 1 - len(self.gains))]
        self.layers = [(w, b, *norm) for w, b, norm in zip(self.weights, self.biases, norms)]

    def last_hidden(self, obs, action, layers=None):
        """psi: obs (B, obs_dim), action (B, action_dim) -> (N, B, hidden[-1])."""
        layers = layers or self.layers
        x = torch.cat([obs, action], -1).expand(layers[0][0].shape[0], -1, -1)
        for k, (weight, bias, *norm) in enumerate(layers[:-1]):
            x = affine(x, weight, bias, self.dtype if k else torch.float32)
            if self.layer_norm:
                gain, shift = norm
                x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), gain)
            x = x.relu_()
        return x

    def forward(self, obs, action, subset=None):
        """obs (B, obs_dim), action (B, action_dim) -> values (N, B), or (M, B) of the critics `subset` (M,) alone."""
        layers = self.layers if subset is None else [[p[subset] for p in layer] for layer in self.layers]
        weight, bias = layers[-1]
        # a product and a sum: faster on the CPU than a matrix product with one column
        return (self.last_hidden(obs, action, layers) * weight.mT).sum(-1) + bias.squeeze(-1)


def step_along(optimizer, parameters, gradients):
    """One optimiser step along given gradients."""
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    optimizer.step()


class SAC:
    """Soft actor-critic with N LayerNorm critics and many critic updates a step (RLPD), on penalised targets (eq. 7).

    `target`, `critic_loss`, `actor_loss` and `temperature_loss` are the maths; the rest carries it out.

    Deviation 15: SAC's entropy term in y (`backup_entropy`) and in the actor's loss (`actor_entropy`), which the paper
    leaves out.

    The measured sizes and rates are the defaults of wombet.py's flags, not these.

    Args:
        n_critics, min_critics: N and the size M of the random subset under the target's minimum (RLPD).
            Deviation 13: all N in the paper (eqs. 7 and 9).
        actor_q: "min" (section 4.4) or "mean" (RLPD) of the critics, which the actor maximises.
            Deviation 14: the mean is the default of wombet.py.
        penalty_coef: lambda of eq. 7, in reward per unit of uncertainty.
        floor_penalty: it takes no reward below 0, see `target`.
        dtype: "float32", or "bfloat16" in learning, `value` and `q_value`, for the products between hidden layers and
            the actor's last one (acting stays float32).
        compile: torch.compile the gradients: one fused program for a critic step and one for the actor's.
        discount: gamma; polyak: rate of the target networks; lr: of actor, critics and temperature.
        actor_average: rate of the actor's exponential average over its updates (Polyak and Juditsky, 1992), which is
            what acts deterministically and proposes; 1: the actor of the moment.
            Deviation 16: the paper has no average.
        target_entropy: nats; None stands for -action_dim / 2 (RLPD).
    """

    def __init__(self, obs_dim, action_dim, *, n_critics=2, min_critics=2, hidden=(256, 256), layer_norm=True, lr=3e-4,
                 discount=0.99, polyak=0.005, init_temperature=0.1, target_entropy=None, backup_entropy=True,
                 actor_entropy=True, actor_q="mean", actor_average=1.0, penalty_coef=1.0,
                 floor_penalty=False, dtype="float32", compile=False, device="cpu"):
        if actor_q not in ("min", "mean"):
            raise ValueError(f"unknown actor_q {actor_q!r}: known are min, mean")
        self.n_critics, self.min_critics, self.actor_q = n_critics, min_critics, actor_q
        self.discount, self.polyak = discount, polyak
        self.penalty_coef, self.floor_penalty = penalty_coef, floor_penalty
        self.actor_average, self.actor_entropy = actor_average, actor_entropy
        self.backup_entropy, self.device, self.dtype = backup_entropy, torch.device(device), getattr(torch, dtype)
        self.target_entropy = -action_dim / 2 if target_entropy is None else target_entropy
        self.action_dim = action_dim
        self.actor = Actor(obs_dim, action_dim, hidden).to(device)
        self.average_actor = copy.deepcopy(self.actor).requires_grad_(False)
        make_critics = lambda: CriticEnsemble(n_critics, obs_dim, action_dim, hidden, layer_norm, self.dtype).to(device)
        self.critic, self.target_critic = make_critics(), make_critics()
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.log_temperature = torch.tensor(math.log(init_temperature), device=device, requires_grad=True)
        # lists, for walking through a module's parameters takes as long as moving them
        self.actor_parameters = [*self.actor.parameters(), self.log_temperature]
        self.critic_parameters = list(self.critic.parameters())
        self.target_parameters = list(self.target_critic.parameters())
        self.average_parameters = list(self.average_actor.parameters())
        adam = lambda params: torch.optim.Adam(params, lr=lr, fused=True)
        self.actor_optimizer, self.critic_optimizer = adam(self.actor_parameters), adam(self.critic_parameters)
        if compile:
            fuse = torch._dynamo.config.patch(trace_autograd_ops=True)  # backward passes are part of what is fused
            self.critic_gradients = fuse(torch.compile(self.critic_gradients))
            self.actor_gradients = fuse(torch.compile(self.actor_gradients))

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """obs (..., obs_dim), tensor or array -> action (..., action_dim) in [-1, 1], a tensor."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return torch.tanh(self.average_actor(obs)[0]) if deterministic else self.actor.sample(obs)[0]

    @torch.no_grad()
    def propose(self, obs):
        """A draw from the average actor: obs (B, obs_dim) -> action (B, action_dim); the planner's candidates."""
        return self.average_actor.sample(obs)[0]

    @torch.no_grad()
    def q_value(self, obs, action):
        """mean_i Q_i(s, a): obs (B, obs_dim), action (B, action_dim) -> (B,)."""
        return self.critic(obs, action).mean(0)

    @torch.no_grad()
    def value(self, obs):
        """V(s) = mean_i Q_i(s, a) of the target networks, a the averaged policy's mode: obs (B, obs_dim) -> (B,); the
        planner's terminal value."""
        return self.target_critic(obs, self.act(obs, deterministic=True)).mean(0)

    def update(self, batch, n_offline=0):
        """One critic update on each slice, then one of the actor and the temperature on the last slice.

        Args: batch: {key: (slices, B, ...)}, float32, with obs, action, reward, next_obs, terminated (0 or 1),
            uncertainty (0 for real steps); of every slice's rows the first n_offline are from D_S.

        Returns a dict of scalar tensors; td_error and signed_td_error are the means of |mean_i Q_i - y| and of
        mean_i Q_i - y over the online rows, of each slice before its update (NaN where there are none). Raises
        ValueError for a reward of another shape than (slices, B), which would broadcast.
        """
        if batch["reward"].shape != batch["obs"].shape[:-1]:
            raise ValueError(f"a reward of shape {tuple(batch['reward'].shape)}: {tuple(batch['obs'].shape[:-1])} is "
                             "needed, and so for terminated and uncertainty")
        slices, batch = len(batch["obs"]), self.with_next_action(batch)
        infos = [self.update_critic({key: values[k] for key, values in batch.items()}, n_offline)
                 for k in range(slices)]
        td_errors = {key: sum(info[key] for info in infos) / slices for key in ("td_error", "signed_td_error")}
        return {**infos[-1], **td_errors, **self.update_actor(batch["obs"][-1])}

    @torch.no_grad()
    def with_next_action(self, batch):
        """The batch {key: (..., B, ...)} with next_action a' ~ pi(.|s') (..., B, A) and next_log_prob (..., B); for all
        slices in one pass, since the actor changes after the last one only."""
        next_action, next_log_prob = self.actor.sample(batch["next_obs"], dtype=self.dtype)
        return {**batch, "next_action": next_action, "next_log_prob": next_log_prob}

    # What is learned: the target y, then the losses of critics, actor and temperature.

    @torch.no_grad()
    def target(self, batch, subset=None):
        """Robust Bellman target y (B,) of eqs. 7 and 9, for a batch with next actions.

        y = r - lambda u + gamma (1 - terminated) (min_i Q_i(s', a') - temperature log pi(a'|s')), Q_i the target
        networks; subset (M,): the critics under the minimum, None: all N. u is 0 outside D_S.

        Deviation 18: max(r - lambda u, min(r, 0)) in place of r - lambda u (`floor_penalty`). What follows a fall is
        worth 0, so where uncertain steps are worth less, the agent learns to fall. A negative r loses nothing, so
        where all are (Pusher, Reacher), no penalty is left.
        """
        value = self.target_critic(batch["next_obs"], batch["next_action"], subset).amin(0)
        if self.backup_entropy:
            value = value - self.log_temperature.exp() * batch["next_log_prob"]
        reward = batch["reward"] - self.penalty_coef * batch["uncertainty"]
        if self.floor_penalty:
            reward = reward.maximum(batch["reward"].clamp(max=0.0))
        return reward + self.discount * (1 - batch["terminated"]) * value

    def critic_loss(self, batch, subset=None):
        """Eq. 7: the mean of (Q_i - y)^2 over the batch, summed over critics, so that a critic's step does not depend
        on their number; also Q (N, B) and y (B,)."""
        y, q = self.target(batch, subset), self.critic(batch["obs"], batch["action"])
        return (q - y).square().mean(1).sum(), q.detach(), y

    def actor_loss(self, obs, noise):
        """Section 4.4: E[temperature log pi(a|s) - min_i Q_i(s, a)], or the critics' mean (`actor_q`), a = the action
        that `noise` (B, A) leads to; also E[log pi]."""
        action, log_prob = self.actor.sample(obs, noise, self.dtype)
        q = self.critic(obs, action)
        loss = -(q.amin(0) if self.actor_q == "min" else q.mean(0)).mean()
        if self.actor_entropy:
            loss = loss + (self.log_temperature.exp().detach() * log_prob).mean()
        return loss, log_prob.detach().mean()

    def temperature_loss(self, log_prob):
        """SAC's: the temperature falls while the entropy -log_prob is above `target_entropy`, and rises below it. It
        stays where the actor's loss has no entropy term, for nothing would raise the entropy."""
        return self.actor_entropy * self.log_temperature.exp() * (-log_prob - self.target_entropy)

    # How it is learned: gradients (what --fast compiles) and optimiser steps.

    def update_critic(self, batch, n_offline=0):
        """One step of the critics on one batch with next actions, and one of the target networks; scalar tensors."""
        subset = None  # of the critics, drawn anew for every update (RLPD)
        if self.min_critics < self.n_critics:
            subset = torch.randperm(self.n_critics, device=self.device)[: self.min_critics]
        gradients, loss, q, y = self.critic_gradients(batch, subset)
        self.step_critic(gradients)
        error = (q.mean(0) - y)[n_offline:]
        return {"critic_loss": loss / self.n_critics, "q_mean": q.mean(), "td_error": error.abs().mean(),
                "signed_td_error": error.mean()}

    def critic_gradients(self, batch, subset):
        loss, q, y = self.critic_loss(batch, subset)
        return torch.autograd.grad(loss, self.critic_parameters), loss.detach(), q, y

    def step_critic(self, gradients):
        step_along(self.critic_optimizer, self.critic_parameters, gradients)
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.polyak)

    def update_actor(self, obs):
        """One step of the actor, its average and the temperature: obs (B, obs_dim); scalar tensors."""
        noise = torch.randn(*obs.shape[:-1], self.action_dim, device=self.device)
        gradients, info = self.actor_gradients(obs, noise)
        step_along(self.actor_optimizer, self.actor_parameters, gradients)
        with torch.no_grad():
            torch._foreach_lerp_(self.average_parameters, self.actor_parameters[:-1], self.actor_average)
        return info

    def actor_gradients(self, obs, noise):
        loss, log_prob = self.actor_loss(obs, noise)
        total = loss + self.temperature_loss(log_prob)  # they share no parameter
        return torch.autograd.grad(total, self.actor_parameters), {
            "actor_loss": loss.detach(), "temperature": self.log_temperature.exp().detach()}

    PARTS = ("actor", "average_actor", "critic", "target_critic", "actor_optimizer", "critic_optimizer")

    def state_dict(self):
        """What is learned, as the tensors themselves, which go on changing: deepcopy it to keep it."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {**parts, "log_temperature": self.log_temperature.detach()}

    def load_state_dict(self, state):
        for name in self.PARTS:
            # a copy, for an optimiser keeps the very tensors it is given
            getattr(self, name).load_state_dict(copy.deepcopy(state[name]))
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])

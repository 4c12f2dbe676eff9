"""Uncertainty-penalised model-predictive control (eqs. 1 to 5) and trajectories imagined with it.

The cross-entropy method (CEM) searches action sequences for a whole batch of states at once.

Deviation 1: given a policy and a value function, part of the candidates follow the policy in the model and the value
stands in for what comes after the horizon (guided MPC; POPLIN, LOOP and TD-MPC do likewise); without them, plain CEM.

The model, the rewards and the policy are plain callables, so that any of them can be a known one:
    model(obs (B, d), action (B, A)) -> next_obs (B, d), features (B, f), u (B,)
    reward(obs, action, next_obs, features) -> (B,)        terminated(next_obs) -> (B,) bool
    policy(obs (B, d)) -> action (B, A)                    value(obs (B, d)) -> (B,)
"""

import torch


def coloured_noise(shape, beta, device="cpu"):
    """Gaussian noise (..., horizon, A) of unit variance whose power spectrum along the horizon falls as
    frequency^-beta (0 is white; iCEM, Pinneri et al., 2020)."""
    *batch, horizon, dim = shape
    if beta == 0 or horizon == 1:
        return torch.randn(shape, device=device)
    scale = torch.fft.rfftfreq(horizon, device=device)
    scale[0] = scale[1]  # the lowest frequency is the horizon's own
    scale = scale ** (-beta / 2)
    parts = torch.randn(*batch, dim, len(scale), 2, device=device)
    # the mean is real, and so is the highest frequency of an even length: all of their variance is in the real part
    real = slice(None, None, len(scale) - 1) if horizon % 2 == 0 else slice(1)  # a list would be copied to the GPU
    parts[..., real, 0] *= 2**0.5
    parts[..., real, 1] = 0.0
    power = 4 * scale.square().sum() - 2 * scale[real].square().sum()  # a complex part stands for two frequencies
    noise = torch.fft.irfft(torch.view_as_complex(parts) * scale, n=horizon) * horizon / power.sqrt()
    return noise.transpose(-1, -2)


class MPC:
    """CEM over action sequences in [-1, 1], maximising the return of eq. 1 with the penalty of eqs. 3 and 4,

        sum_k gamma^k (r(s_k, a_k) - lambda u(s_k, a_k))  [+ gamma^H V(s_H)],

    in which nothing is earned after a predicted termination; eqs. 3 to 5 have no gamma.

    Args:
        horizon: H steps. population: candidates drawn in an iteration. elites: how many refit the distribution.
        iterations: of CEM. momentum: share of the old mean and std that stays. init_std: of the first iteration.
        noise_beta: colour of the candidates' noise (see `coloured_noise`).
        keep_elites: share of the elites that stay candidates in the next iteration; the best one always does.
        discount: gamma. penalty_coef: lambda, in reward per unit of u.
        execute_steps: actions of a plan, the elites' mean, executed before replanning.
        particles: copies of a candidate, consecutive rows for the model (`WorldModel.member_step`), over which its
            return is averaged: eq. 1's expectation over the ensemble.
            Deviation 2: the default is 1, the ensemble's mean.
        policy, policy_samples: proposes that many candidates, from its own rollouts in the model (with particles: in
            the first one's states); value: V at the horizon. None of them: plain CEM.

    The measured sizes are the defaults of wombet.py's flags, not these. Raises ValueError for sizes that cannot be.
    """

    def __init__(self, model, reward, terminated, action_dim, *, horizon=5, population=64, elites=8, iterations=2,
                 momentum=0.1, init_std=0.5, noise_beta=0.0, keep_elites=0.3, discount=0.99, penalty_coef=1.0,
                 execute_steps=1, particles=1, policy=None, policy_samples=16, value=None):
        if not (1 <= elites <= population and 1 <= execute_steps <= horizon and iterations >= 1):
            raise ValueError(f"elites {elites} of population {population}, execute_steps {execute_steps} of horizon "
                             f"{horizon}, iterations {iterations}: each is 1 or more, the first of a pair not above "
                             "the second")
        self.model, self.reward, self.terminated, self.action_dim = model, reward, terminated, action_dim
        self.horizon, self.population, self.elites, self.iterations = horizon, population, elites, iterations
        self.momentum, self.init_std, self.noise_beta = momentum, init_std, noise_beta
        self.n_keep = max(int(keep_elites * elites), 1)
        self.discount, self.penalty_coef = discount, penalty_coef
        self.execute_steps, self.particles = execute_steps, particles
        self.policy, self.policy_samples, self.value = policy, policy_samples if policy else 0, value
        self.reset()

    def reset(self):
        """Forgets the last plan: to be called when episodes start."""
        self._plan, self._age = None, 0

    @torch.no_grad()
    def rollout(self, obs, actions=None):
        """Returns of action sequences, or of the policy where actions is None.

        obs (B, d), actions (B, H, A) -> actions (B, H, A), penalised return (B,); -inf where it is not finite.
        """
        n = self.particles
        obs = obs.repeat_interleave(n, 0)
        total = torch.zeros(len(obs), device=obs.device)
        alive, taken = torch.ones_like(total), []
        for k in range(self.horizon):
            action = self.policy(obs[::n]) if actions is None else actions[:, k]
            taken.append(action)
            action = action.repeat_interleave(n, 0)
            next_obs, features, u = self.model(obs, action)
            reward = self.reward(obs, action, next_obs, features) - self.penalty_coef * u
            # where, not a product: what lies beyond a termination may be anything, even NaN
            total = total + self.discount**k * torch.where(alive > 0, reward, 0.0)
            alive = alive * (~self.terminated(next_obs))
            obs = torch.where(alive.unsqueeze(-1) > 0, next_obs, obs)
        if self.value is not None:
            total = total + self.discount**self.horizon * torch.where(alive > 0, self.value(obs), 0.0)
        total = total.view(-1, n).mean(1)
        return torch.stack(taken, 1), torch.where(total.isfinite(), total, -torch.inf)

    def _refit(self, mean, std, pool, scores):
        """Moves the distribution to the elites of a pool (B, P, H, A); returns mean, std, elites, their scores and
        their mean. A state all of whose candidates failed keeps the distribution it had."""
        scores, order = scores.sort(1, descending=True)
        scores, order = scores[:, : self.elites], order[:, : self.elites, None, None]
        pool = pool.gather(1, order.expand(-1, -1, *pool.shape[2:]))
        finite = scores.isfinite()[..., None, None]
        count = finite.sum(1)
        elite_mean = torch.where(finite, pool, 0.0).sum(1) / count.clamp(min=1)
        elite_mean = torch.where(count > 0, elite_mean, mean)
        elite_var = torch.where(finite, (pool - elite_mean.unsqueeze(1)).square(), 0.0).sum(1) / count.clamp(min=1)
        elite_std = torch.where(count > 0, elite_var.sqrt(), std)
        keep = self.momentum
        return keep * mean + (1 - keep) * elite_mean, keep * std + (1 - keep) * elite_std, pool, scores, elite_mean

    @torch.no_grad()
    def plan(self, obs, start=None):
        """Plans for B states at once, from the action sequences `start` (B, H, A) (zeros where None).

        obs (B, d) -> the plan (B, H, A) and its candidates' best penalised return (B,).
        """
        batch, shape = len(obs), (self.horizon, self.action_dim)
        mean = start = torch.zeros(batch, *shape, device=obs.device) if start is None else start
        std = torch.full_like(mean, self.init_std)
        pool, scores = mean[:, None][:, :0], mean[:, :0, 0]
        if self.policy_samples:
            # the policy's proposals are the first population: the search goes on around the best of them
            pool, scores = self.rollout(obs.repeat_interleave(self.policy_samples, 0))
            pool, scores = pool.view(batch, -1, *shape), scores.view(batch, -1)
            mean, std, pool, scores, _ = self._refit(mean, std, pool, scores)
        for i in range(self.iterations):
            noise = coloured_noise((batch, self.population, *shape), self.noise_beta, obs.device)
            centre, spread = mean.unsqueeze(1), std.unsqueeze(1)
            if i == 0:  # half of them search around the start, whatever the policy proposes
                half = torch.arange(self.population, device=obs.device)[:, None, None] % 2 == 0
                centre, spread = torch.where(half, start.unsqueeze(1), centre), torch.where(half, self.init_std, spread)
            drawn = (centre + spread * noise).clamp(-1, 1)
            drawn[:, 0] = start if i == 0 else mean  # the last plan, then the mean, is a candidate too
            candidate_scores = self.rollout(obs.repeat_interleave(self.population, 0), drawn.flatten(0, 1))[1]
            # the model is deterministic, so what was scored before keeps its score
            pool = torch.cat([pool[:, : self.n_keep], drawn], 1)
            scores = torch.cat([scores[:, : self.n_keep], candidate_scores.view(batch, -1)], 1)
            mean, std, pool, scores, elite_mean = self._refit(mean, std, pool, scores)
        return elite_mean, scores[:, 0]

    def act(self, obs):
        """obs (B, d) -> action (B, A): plans, warm-started by the last plan shifted by what was executed, every
        `execute_steps` calls."""
        if self._plan is None or self._age >= self.execute_steps:
            start = None
            if self._plan is not None:
                start = torch.zeros_like(self._plan)
                start[:, : self.horizon - self._age] = self._plan[:, self._age :]
            self._plan, self._age = self.plan(obs, start)[0], 0
        action = self._plan[:, self._age]
        self._age += 1
        return action


@torch.no_grad()
def imagine(step, terminated, act, start_obs, length, max_uncertainty=float("inf")):
    """Closed-loop trajectories, N at once (section 4.3): in the model, or wherever `step` leads.

    Args:
        step: (obs (N, d), action (N, A)) -> next_obs, features, u, such as `WorldModel.step`.
        act: obs (N, d) -> action (N, A), such as `MPC.act` (of a new MPC, or after its `reset`) or a policy.
        start_obs: (N, d). length: steps. max_uncertainty: a trajectory is cut before the step where u exceeds it.

    Deviation 7: the paper's filter takes or leaves whole trajectories; cutting keeps the trusted part.

    Returns {key: (N, length, ...)} with obs, action, next_obs, features, uncertainty, terminated and valid: the last
    is False after a predicted termination and from a cut on. A trajectory that is cut or reaches the last step has not
    terminated.
    """
    rows, obs = [], start_obs
    alive = torch.ones(len(obs), dtype=torch.bool, device=obs.device)
    for _ in range(length):
        action = act(obs)
        next_obs, features, u = step(obs, action)
        alive = alive & (u <= max_uncertainty)
        ends = alive & terminated(next_obs)
        rows.append((obs, action, next_obs, features, u, ends, alive))
        alive = alive & ~ends
        obs = next_obs
        if not alive.any():
            break
    keys = ("obs", "action", "next_obs", "features", "uncertainty", "terminated", "valid")
    unseen = lambda x: torch.cat([x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])], 1)
    return {key: unseen(torch.stack(values, 1)) for key, values in zip(keys, zip(*rows))}

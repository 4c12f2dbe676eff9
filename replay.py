"""Where an agent's batches come from: replay buffers, the mix of offline and online data (section 4.4), and the share
of each (section 4.6).

With the other components, on real transitions `obs`, `action`, `next_obs` of your own and batched functions
`source_reward(obs, action, next_obs, features)`, `target_reward` and `terminated(next_obs)`:

    import torch
    from agent import SAC
    from filter import accept, relabel, score_trajectories, thresholds, to_transitions
    from mpc import MPC, imagine
    from replay import ReplayBuffer, mixed_batch
    from world_model import WorldModel

    d, dim = obs.shape[1], action.shape[1]
    none = obs[:, :0]  # features: what a reward needs and obs lacks
    model, agent = WorldModel(d, dim), SAC(d, dim)
    model.fit(obs, action, next_obs, none, max_epochs=10)
    planner = MPC(model.step, source_reward, terminated, dim, policy=agent.propose, value=agent.value)
    imagined = imagine(model.step, terminated, planner.act, obs[:16], length=20)
    returns, mean_u = score_trajectories(relabel(imagined, source_reward)["reward"], imagined["uncertainty"],
                                         imagined["valid"], imagined["terminated"], discount=0.99)
    passed = accept(returns, mean_u, *thresholds(returns, mean_u, return_percentile=50, u_percentile=75))

    shapes = dict(obs=(d,), action=(dim,), reward=(), next_obs=(d,), terminated=(), uncertainty=())
    offline, online = ReplayBuffer(10_000, **shapes), ReplayBuffer(10_000, **shapes)
    offline.add(**to_transitions(imagined, passed, target_reward))
    online.add(obs=obs, action=action, reward=target_reward(obs, action, next_obs, none), next_obs=next_obs,
               terminated=terminated(next_obs), uncertainty=torch.zeros(len(obs)))  # 0: real steps have no penalty
    batch, n_offline = mixed_batch(offline, online, alpha=0.5, batch_size=128, slices=8)
    info = agent.update(batch, n_offline)
"""

import math

import torch


class ReplayBuffer:
    """Ring buffer of transitions, as preallocated tensors on one device.

    Args:
        capacity: number of transitions; beyond it the oldest are overwritten. device: where they are.
        shapes: shape of one entry under each key, for example obs=(17,), reward=().
    """

    def __init__(self, capacity, device="cpu", **shapes):
        self.capacity, self.size, self.position = capacity, 0, 0
        self.data = {key: torch.zeros((capacity, *shape), device=device) for key, shape in shapes.items()}

    def add(self, **entries):
        """Appends one transition (entries of the keys' shapes) or n (with a leading dimension n); ValueError where n is
        above the capacity."""
        first = next(iter(self.data))
        single = torch.as_tensor(entries[first]).dim() == self.data[first].dim() - 1
        n = 1 if single else len(entries[first])
        if n > self.capacity:
            raise ValueError(f"{n} transitions do not fit a buffer of {self.capacity}")
        if self.position + n <= self.capacity:
            where = slice(self.position, self.position + n)
        else:
            where = torch.arange(self.position, self.position + n) % self.capacity
        for key, values in self.data.items():
            values[where] = torch.as_tensor(entries[key], dtype=values.dtype, device=values.device)
        self.position = (self.position + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, *shape, first=0):
        """Independent uniform draws from the filled rows, from row `first` on: each key as (*shape, ...); ValueError
        where there is none."""
        if first >= self.size:
            raise ValueError("the buffer is empty" if self.size == 0 else f"no row from {first} on: {self.size} filled")
        some = next(iter(self.data.values()))
        rows = torch.randint(first, self.size, shape, device=some.device)
        return {key: values[rows] for key, values in self.data.items()}

    def filled(self):
        """The filled rows, as views: each key (size, ...)."""
        return {key: values[: self.size] for key, values in self.data.items()}

    def state_dict(self):
        rows = {key: values.clone() for key, values in self.filled().items()}  # not the empty rest of the storage
        return {"position": self.position, "rows": rows}

    def load_state_dict(self, state):
        """The rows of a buffer of this capacity, of any that has not wrapped, or of a smaller one, whose oldest rows
        then come first; ValueError where they do not fit."""
        size, position = len(next(iter(state["rows"].values()))), state["position"]
        if size > self.capacity:
            raise ValueError(f"{size} transitions do not fit a buffer of {self.capacity}")
        oldest = position % max(size, 1) if size < self.capacity else 0
        self.size, self.position = size, size if size < self.capacity else position % self.capacity
        for key, values in state["rows"].items():
            self.data[key][:size] = values.roll(-oldest, 0)


def mixed_batch(offline, online, alpha, batch_size, slices):
    """Batches from D_mix = alpha D_S + (1 - alpha) D_T (section 4.4), the share held in every slice.

    Args:
        offline, online: ReplayBuffer D_S (None or empty: no offline data) and D_T (it may still be empty).
        alpha: share of D_S; batch_size: of one critic update; slices: number of critic updates (UTD).

    Returns ({key: (slices, batch_size, ...)}, n_offline): the first n_offline rows of every slice are from D_S.
    """
    n_offline = batch_size if online.size == 0 else round(alpha * batch_size)
    if offline is None or offline.size == 0:
        n_offline = 0
    if n_offline == 0:
        return online.sample(slices, batch_size), 0
    batch = offline.sample(slices, n_offline)
    if n_offline < batch_size:
        recent = online.sample(slices, batch_size - n_offline)
        batch = {key: torch.cat([batch[key], recent[key]], 1) for key in recent}
    return batch, n_offline


class AdaptiveMix:
    """Share of D_S in a batch, from the TD error on online data (section 4.6).

    delta_bar <- (1 - ema) delta_bar + ema delta,  alpha = clip(gain * delta_bar, alpha_min, alpha_max),
    where delta is the mean absolute TD error on rows of the online buffer (B_T in the paper).
    Deviation 17: wombet.py has put the source's real data into that buffer too (--keep-source-data).

    Args:
        fixed: a constant share instead (the paper's ablation), or None.
        signed: the paper's formula to the letter, (1 - ema) delta_k-1 + ema delta_k of the mean signed error.
            Deviation 17: not the default, for the signed error can pin alpha at its minimum; the paper's prose says
            absolute.
    """

    def __init__(self, gain, alpha_min, alpha_max, ema, fixed=None, signed=False):
        self.gain, self.alpha_min, self.alpha_max, self.ema = gain, alpha_min, alpha_max, ema
        self.fixed, self.signed = fixed, signed
        self.td_error = self.last = None  # delta_bar and delta; before the first measurement D_S is trusted most

    def update(self, info):
        """info: what `SAC.update` returns. A batch without online data has no TD error, and changes nothing."""
        delta = float(info["signed_td_error" if self.signed else "td_error"])
        if math.isfinite(delta):
            before = delta if self.last is None else self.last if self.signed else self.td_error
            self.td_error, self.last = (1 - self.ema) * before + self.ema * delta, delta

    @property
    def alpha(self):
        if self.fixed is not None:
            return self.fixed
        if self.td_error is None:
            return self.alpha_max
        return min(max(self.gain * self.td_error, self.alpha_min), self.alpha_max)

    def state_dict(self):
        return {"td_error": self.td_error, "last": self.last}

    def load_state_dict(self, state):
        self.td_error, self.last = (None if state[key] is None else float(state[key]) for key in ("td_error", "last"))

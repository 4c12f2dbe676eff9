"""Probabilistic ensemble world model (section 4.1; PETS, Chua et al., 2018) and its epistemic uncertainty.

Each member i is a network that gives a diagonal Gaussian over (s' - s, features); the E members are one batched
network. Inputs and targets are normalised with statistics of the training split, and uncertainty is measured in those
units, so that no large dimension drowns the others.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class WorldModel(nn.Module):
    """Ensemble of Gaussian models of the next observation and the task's features.

    Args:
        obs_dim, action_dim, n_features: sizes d, A and f of observations, actions and features.
        members: E. hidden: width of each of the `layers` hidden layers (SiLU).
        uncertainty_kind: one of `UNCERTAINTIES`; what `step` and `uncertainty` return as u.
        coverage: each fit scales u such that it is at or above the true error for this share of held-out transitions
            (split-conformal calibration), so that eq. 2's assumption W_1 <= u holds for them; 0: u as it is.
            Deviation 4: the paper assumes it of the ensemble as it is.
        margin: imagined observations are kept within the range of the last fit's data (its `bounds`), widened on each
            side by this share of it.
        inference_dtype: "float32", or "bfloat16" for the products of `step` and `uncertainty`: 1.7 times as fast where
            the processor has them; the means move by .002 normalised units, a fortieth of a good model's error.
        fit_dtype: the same, of the products in fitting. compile: torch.compile the gradients of a fit.

    Raises ValueError for an unknown `uncertainty_kind`, and for one member where u is their disagreement.
    """

    UNCERTAINTIES = ("std", "variance", "max-distance", "aleatoric")

    def __init__(self, obs_dim, action_dim, n_features=0, *, members=5, hidden=200, layers=3, uncertainty_kind="std",
                 coverage=0.95, margin=0.1, inference_dtype="float32", fit_dtype="float32", compile=False):
        super().__init__()
        if uncertainty_kind not in self.UNCERTAINTIES:
            raise ValueError(f"unknown uncertainty {uncertainty_kind!r}: known are {', '.join(self.UNCERTAINTIES)}")
        if members < 2 and uncertainty_kind != "aleatoric":
            raise ValueError(f"an ensemble of {members} member has no disagreement to measure: take 2 or more")
        self.obs_dim, self.members, self.uncertainty_kind, self.margin = obs_dim, members, uncertainty_kind, margin
        self.coverage = coverage
        self.inference_dtype, self.fit_dtype = getattr(torch, inference_dtype), getattr(torch, fit_dtype)
        out = obs_dim + n_features
        sizes = [obs_dim + action_dim, *[hidden] * layers, 2 * out]
        bounds = [1 / math.sqrt(i) for i in sizes[:-1]]
        uniform = lambda bound, *shape: nn.Parameter(torch.empty(members, *shape).uniform_(-bound, bound))
        self.weights = nn.ParameterList([uniform(b, i, o) for b, i, o in zip(bounds, sizes, sizes[1:])])
        self.biases = nn.ParameterList([uniform(b, 1, o) for b, o in zip(bounds, sizes[1:])])
        self.max_logvar = nn.Parameter(torch.full((out,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((out,), -10.0))
        for name, size in (("input", obs_dim + action_dim), ("target", out)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("scale", torch.ones(()))  # of u, from calibration
        self.register_buffer("varies", torch.ones(out))  # 0 where a target was constant: its mean is then exact
        self.register_buffer("obs_low", torch.full((obs_dim,), -math.inf))
        self.register_buffer("obs_high", torch.full((obs_dim,), math.inf))
        if compile:
            fuse = torch._dynamo.config.patch(trace_autograd_ops=True)  # the backward pass is part of what is fused
            self.gradients = fuse(torch.compile(self.gradients, dynamic=False))

    def _trunk(self, inputs, dtype=torch.float32):
        x = ((inputs - self.input_mean) / self.input_std).to(dtype).expand(self.members, *inputs.shape[-2:])
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = F.silu(torch.baddbmm(bias.to(dtype), x, weight.to(dtype)))
        return x

    def forward(self, inputs, dtype=torch.float32):
        """inputs (B, d+A), or (E, B, d+A) for a batch of its own per member -> mean and log variance (E, B, d+f),
        in normalised units; the log variance is softly bounded from above, then from below. dtype: of the products."""
        weight, bias = self.weights[-1].to(dtype), self.biases[-1].to(dtype)
        mean, logvar = torch.baddbmm(bias, self._trunk(inputs, dtype), weight).float().chunk(2, -1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)

    def _means(self, inputs, dtype=torch.float32):
        """The members' means alone, (E, B, d+f) in normalised units: half of the last layer, no log variance."""
        out = self.max_logvar.shape[0]
        weight, bias = self.weights[-1][..., :out].to(dtype), self.biases[-1][..., :out].to(dtype)
        # in parts on a CPU: blocks of memory over 32 MiB are new ones each time, and the 40,960 rows of --preset paper
        # took 1.7 times as long at once
        rows = 1024 if inputs.device.type == "cpu" else max(len(inputs), 1)
        parts = [torch.baddbmm(bias, self._trunk(part, dtype), weight) for part in inputs.split(rows)]
        return torch.cat(parts, 1).float() * self.varies

    def _root_d(self):
        """sqrt of the number of target dimensions that vary: what makes u and the error distances per dimension."""
        return self.varies.sum().clamp(min=1.0).sqrt()  # a tensor: a number would make the GPU wait

    def _disagreement(self, mean, inputs):
        """u (B,) from the members' means (E, B, d+f)."""
        root_d = self._root_d()
        if self.uncertainty_kind in ("std", "variance"):
            # torch.var along a short first dimension takes thirty times as long, a sixth of a whole step
            variance = (mean - mean.mean(0)).square().mean(0).sum(-1) / root_d**2
            u = variance.sqrt() if self.uncertainty_kind == "std" else variance
        elif self.uncertainty_kind == "max-distance":
            u = (mean - mean.mean(0)).norm(dim=-1).amax(0) / root_d
        else:
            logvar = self(inputs)[1]
            u = ((0.5 * logvar).exp() * self.varies).norm(dim=-1).amax(0) / root_d
        return self.scale * u

    @torch.no_grad()
    def predict(self, obs, action):
        """obs (B, d), action (B, A) -> mean and standard deviation of each member's (next_obs, features), (E, B, d+f),
        in the environment's units."""
        inputs = torch.cat([obs, action], -1)
        mean, logvar = self(inputs)
        mean = self.target_mean + self.target_std * mean * self.varies
        mean = torch.cat([obs + mean[..., : self.obs_dim], mean[..., self.obs_dim :]], -1)
        return mean, self.target_std * (0.5 * logvar).exp() * self.varies

    @torch.no_grad()
    def uncertainty(self, obs, action):
        """Epistemic uncertainty u(s, a): obs (B, d), action (B, A) -> (B,), in delta-normalised units, times `scale`.

        std: |std_i mean_i| / sqrt(d), over the d target dimensions that vary. Deviation 3: a distance, as eq. 2 needs.
        variance: mean over dimensions of var_i mean_i (section 4.3's "predictive variance").
        max-distance: max_i |mean_i - mean| / sqrt(d).
        aleatoric: max_i |std_i(s, a)| / sqrt(d), MOPO's penalty but for its units; not epistemic.
        """
        inputs = torch.cat([obs, action], -1)
        return self._disagreement(self._means(inputs, self.inference_dtype), inputs)

    @torch.no_grad()
    def step(self, obs, action):
        """One step of the ensemble's mean: obs (B, d), action (B, A) -> next_obs (B, d), features (B, f), u (B,)."""
        inputs = torch.cat([obs, action], -1)
        mean = self._means(inputs, self.inference_dtype)
        return *self._move(obs, mean.mean(0)), self._disagreement(mean, inputs)

    @torch.no_grad()
    def member_step(self, obs, action):
        """As `step`, but row i moves by the mean of member i mod E: E rows in a row are the members' futures of one
        state, whose average stands for eq. 1's expectation; no Gaussian noise is drawn. Shapes as in `step`."""
        inputs, rows = torch.cat([obs, action], -1), torch.arange(len(obs), device=obs.device)
        mean = self._means(inputs, self.inference_dtype)
        return *self._move(obs, mean[rows % self.members, rows]), self._disagreement(mean, inputs)

    def _move(self, obs, mean):
        """The next observation (B, d) and features (B, f) from obs (B, d) and a normalised change (B, d+f)."""
        delta = self.target_mean + self.target_std * mean
        next_obs = (obs + delta[:, : self.obs_dim]).nan_to_num(nan=0.0).clamp(self.obs_low, self.obs_high)
        return next_obs, delta[:, self.obs_dim :]

    @torch.no_grad()
    def error(self, obs, action, next_obs, features):
        """The true error that u stands for: |mean of the members' means - truth| / sqrt(d), (B,), in u's units."""
        mean = self._means(torch.cat([obs, action], -1)).mean(0)
        target = (torch.cat([next_obs - obs, features], -1) - self.target_mean) / self.target_std * self.varies
        return (mean - target).norm(dim=-1) / self._root_d()

    def fit(self, obs, action, next_obs, features, *, held_out=None, bounds=None, lr=1e-3, batch_size=256,
            max_epochs=40, patience=5):
        """Gaussian maximum likelihood on bootstraps, from the present weights (so a refit is a warm start).

        No member trains on the held-out rows. Half of them stop the fit once `patience` epochs have gained no member
        1 %; each member keeps the weights that were its own best. The other half scale u (`coverage`). Each member's
        bootstrap is drawn once.

        Args: obs, next_obs (n, d), action (n, A), features (n, f). held_out: (n,) bool, by default every tenth row:
            where rows are only ever appended, what is held out stays held out over refits. bounds: (m, d)
            observations whose range, widened by `margin`, imagined ones keep to; by default obs and next_obs.

        Returns {"epochs", "holdout_mse" (over the dimensions that vary; 1 is what the data's mean achieves),
        "holdout_nll", "holdout_u", "holdout_error" (u and the true error it stands for, per row of the half that
        scaled u)}.
        Raises ValueError for fewer than 10 transitions, or none or all held out; FloatingPointError when the loss is
        not finite.
        """
        obs, action, next_obs, features = (column.float() for column in (obs, action, next_obs, features))
        inputs, targets = torch.cat([obs, action], -1), torch.cat([next_obs - obs, features], -1)
        n = len(inputs)
        if n < 10:
            raise ValueError(f"{n} transitions are too few to fit a world model: collect at least 10")
        train, held, stopping, _ = self._split(inputs, held_out)
        self._normalise(inputs[train], targets[train])
        seen = torch.cat([obs, next_obs]) if bounds is None else bounds  # episodes end in a next_obs
        low, high = seen.amin(0), seen.amax(0)
        self.obs_low, self.obs_high = low - self.margin * (high - low), high + self.margin * (high - low)
        targets = (targets - self.target_mean) / self.target_std
        boot = train[torch.randint(len(train), (self.members, len(train)), device=train.device)]
        size = min(batch_size, len(train))
        optimizer = torch.optim.Adam(self.parameters(), lr=lr, fused=True)
        best = torch.full((self.members,), math.inf, device=inputs.device)
        mark = best  # the error at the last gain of 1 %, so that slow gains add up (as in MBPO)
        stacked = [*self.weights, *self.biases]  # what belongs to one member; the log-variance bounds are shared
        kept = [p.detach().clone() for p in stacked]
        stale = epoch = 0
        for epoch in range(1, max_epochs + 1):
            columns = torch.rand(boot.shape, device=boot.device).argsort(1)
            columns = columns[:, : columns.shape[1] // size * size]  # whole batches; the order changes every epoch
            for rows in boot.gather(1, columns).split(size, 1):
                loss = self.train_step(optimizer, inputs[rows], targets[rows])
            error = self._holdout_mse(inputs[stopping], targets[stopping])
            if not (error.isfinite().all() and loss.isfinite()):
                raise FloatingPointError("the world model's loss is not finite: lower --model-lr or look at the data")
            gained, better = error < 0.99 * mark, error < best
            mark, best = torch.where(gained, error, mark), torch.where(better, error, best)
            for keep, p in zip(kept, stacked):
                keep[better] = p.detach()[better]
            stale = 0 if gained.any() else stale + 1
            if stale >= patience:
                break
        with torch.no_grad():
            for keep, p in zip(kept, stacked):
                p.copy_(keep)
            mean, logvar = self(inputs[held])
            nll = 0.5 * ((mean - targets[held]).square() * (-logvar).exp() + logvar).mean()
            mse = ((mean.mean(0) - targets[held]) * self.varies).square().sum(-1).mean() / self._root_d() ** 2
        u, error = self.calibrate(obs, action, next_obs, features, held_out)
        return {"epochs": epoch, "holdout_mse": mse.item(), "holdout_nll": nll.item(), "holdout_u": u,
                "holdout_error": error}

    def _split(self, rows, held_out):
        """Indices of the rows (n, ...) that train, that are held out, and of the latter's halves, which stop a fit and
        scale u."""
        if held_out is None:
            held_out = torch.arange(len(rows), device=rows.device) % 10 == 0
        held, train = held_out.nonzero()[:, 0], (held_out == 0).nonzero()[:, 0]
        if min(len(held), len(train)) == 0:
            raise ValueError(f"held_out holds out {len(held)} of {len(rows)} rows: none or all cannot be")
        halves = held[::2], held[1::2] if len(held) > 1 else held
        stopping, calibrating = (half[:: 1 + len(half) // 5_000] for half in halves)  # enough to look at
        return train, torch.cat([stopping, calibrating]).unique(), stopping, calibrating

    def calibrate(self, obs, action, next_obs, features, held_out=None):
        """Scales u to cover the error for the share `coverage` of the held-out half that `fit` leaves for it; the
        arguments are those of the fit. Returns u, scaled, and the error of that half, (n,) each."""
        calibrating = self._split(obs, held_out)[-1]
        obs, action, next_obs, features = (column[calibrating] for column in (obs, action, next_obs, features))
        self.scale.fill_(1.0)
        u, error = self.uncertainty(obs, action), self.error(obs, action, next_obs, features)
        if self.coverage:
            self.scale.copy_(self._conformal_scale(u, error))
        return self.scale * u, error

    def _conformal_scale(self, u, error):
        """The quantile of error / u (n,) that covers a new transition with probability `coverage`: the
        ceil((n + 1) coverage)-th smallest of n, or the largest (Vovk et al., 2005; Angelopoulos and Bates, 2021)."""
        ratio = error / u.clamp(min=1e-8)
        rank = min(math.ceil((len(ratio) + 1) * self.coverage), len(ratio))
        return ratio.kthvalue(rank).values

    def train_step(self, optimizer, inputs, targets):
        """One gradient step of maximum likelihood, a batch of its own per member: inputs (E, B, d+A), targets
        (E, B, d+f) in normalised units -> the loss, a scalar tensor."""
        loss, gradients = self.gradients(inputs, targets)
        for parameter, gradient in zip(self.parameters(), gradients):
            parameter.grad = gradient
        optimizer.step()
        return loss

    def gradients(self, inputs, targets):
        """The loss of `train_step` and its gradients, in the order of `parameters()`."""
        mean, logvar = self(inputs, self.fit_dtype)
        nll = ((mean - targets).square() * (-logvar).exp() + logvar).mean((1, 2)).sum()
        loss = nll + 0.01 * (self.max_logvar.sum() - self.min_logvar.sum())
        return loss.detach(), torch.autograd.grad(loss, list(self.parameters()))

    def _normalise(self, inputs, targets):
        self.input_mean, self.target_mean = inputs.mean(0), targets.mean(0)
        input_std, target_std = inputs.std(0), targets.std(0)
        # a dimension that never varies (Pusher's goal) is divided by one, and predicted by its mean; one that varies
        # little is divided by a thousandth of its largest value, or of the others' median std where that is larger: a
        # tiny std would turn a small change into a huge input
        others = torch.where(input_std > 1e-6, input_std, math.nan).nanmedian()
        scale = torch.maximum(inputs.abs().amax(0), others)
        self.input_std = torch.where(input_std > 1e-6, input_std.maximum(1e-3 * scale), torch.ones_like(input_std))
        self.varies = (target_std > 1e-6).to(targets.dtype)
        self.target_std = torch.where(target_std > 1e-6, target_std, torch.ones_like(target_std))

    @torch.no_grad()
    def _holdout_mse(self, inputs, targets):
        return (self._means(inputs) - targets * self.varies).square().mean((1, 2))

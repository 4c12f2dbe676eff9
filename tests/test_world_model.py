"""World model: recovery of a known system, calibration, the uncertainties, safety of a step, the fit."""

import copy
import math
import shutil

import pytest
import torch

from mpc import MPC
from world_model import WorldModel

KINDS = WorldModel.UNCERTAINTIES
MATRIX = torch.tensor([[-0.1, 0.3, 1.0], [-0.4, -0.2, 0.5], [0.2, 0.6, -2.0]])  # (obs, action) -> (delta, feature)
NOISE = torch.tensor([0.05, 0.2, 0.5])


def linear_data(n):
    """s' = s + A (s, a) + noise and one feature, likewise linear, from standard normal states."""
    obs, action = torch.randn(n, 2), torch.rand(n, 1) * 2 - 1
    mean = torch.cat([obs, action], -1) @ MATRIX
    noisy = mean + NOISE * torch.randn(n, 3)
    return (obs, action, obs + noisy[:, :2], noisy[:, 2:]), torch.cat([obs + mean[:, :2], mean[:, 2:]], -1)


def small(**kwargs):
    return WorldModel(2, 1, 1, **{"members": 5, "hidden": 32, "layers": 2, **kwargs})


def fill(model, state):
    model.load_state_dict(copy.deepcopy(state))
    return model


@pytest.fixture(scope="module")
def fitted():
    """One fit that most tests share: its data, its result and its state."""
    torch.manual_seed(1)
    model, (data, _) = small(), linear_data(12000)
    result = model.fit(*data, max_epochs=60)
    return data, result, model.state_dict()


def test_recovers_a_linear_gaussian_system(fitted):
    """Means, noise levels, the errors that fit reports, and 90 % intervals that hold about 90 % of held data."""
    _, result, state = fitted
    model, (data, truth) = fill(small(), state), linear_data(4000)
    mean, std = model.predict(data[0], data[1])
    assert mean.shape == std.shape == (5, 4000, 3)
    assert ((mean.mean(0) - truth).square().mean(0).sqrt() < 0.25 * NOISE).all()
    torch.testing.assert_close(std.mean((0, 1)), NOISE, rtol=0.1, atol=0)
    seen = torch.cat([data[2], data[3]], -1)
    inside = ((seen - mean).abs() < 1.645 * std).float().mean((0, 1))
    assert ((inside > 0.85) & (inside < 0.95)).all()
    target_std = torch.cat([data[2] - data[0], data[3]], -1).std(0)
    assert result["holdout_mse"] == pytest.approx((NOISE / target_std).square().mean().item(), rel=0.2)
    nll = 0.5 * (1 + 2 * (NOISE / target_std).log()).mean().item()
    assert result["holdout_nll"] == pytest.approx(nll, abs=0.1)
    next_obs, features, u = model.step(data[0][:50], data[1][:50])
    torch.testing.assert_close(torch.cat([next_obs, features], -1), mean.mean(0)[:50])
    torch.testing.assert_close(u, model.uncertainty(data[0][:50], data[1][:50]))


def test_holdout_error_is_of_the_dimensions_that_vary():
    """A target that never changes is predicted without error, which says nothing about the others."""
    torch.manual_seed(0)
    (obs, action, next_obs, features), _ = linear_data(400)
    mse = []
    for still in (torch.empty(400, 0), torch.ones(400, 3)):
        torch.manual_seed(0)
        model = WorldModel(2 + still.shape[1], 1, 1, members=2, hidden=8, layers=1)
        for p in [*model.weights, *model.biases]:
            p.data.zero_()  # the mean of the data
        mse.append(model.fit(torch.cat([obs, still], 1), action, torch.cat([next_obs, still], 1), features, lr=1e-9,
                             max_epochs=1)["holdout_mse"])
    assert mse[0] == pytest.approx(1, abs=0.3) and mse[1] == pytest.approx(mse[0], rel=1e-3)


def test_fitting_in_bfloat16(fitted):
    """A fit with such products predicts as well as float32's, on the same data and in float32."""
    data, result, _ = fitted
    torch.manual_seed(1)
    rough = small(fit_dtype="bfloat16").fit(*data, max_epochs=60)
    assert rough["holdout_mse"] != result["holdout_mse"]
    assert rough["holdout_mse"] == pytest.approx(result["holdout_mse"], rel=0.02)
    assert rough["holdout_nll"] == pytest.approx(result["holdout_nll"], abs=0.03)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_fit_equals_the_plain_one(fitted):
    """Two epochs, whose rows do not fill whole batches, from one seed."""
    data, states = [column[:1000] for column in fitted[0]], []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = small(compile=compiled)
        model.fit(*data, max_epochs=2)
        states.append(model.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)


def test_planning_in_bfloat16(fitted):
    """Steps and u are those of float32 within a part of the noise; plans made in either are as good, judged in float32."""
    data, _, state = fitted
    models = [fill(small(inference_dtype=dtype), state) for dtype in ("float32", "bfloat16")]
    obs, action = 2 * torch.randn(500, 2), torch.rand(500, 1) * 2 - 1
    (exact, _, u), (rough, _, rough_u) = (model.step(obs, action) for model in models)
    assert 0 < (rough - exact).abs().max() < 0.2 * NOISE[1]
    assert torch.corrcoef(torch.stack([u, rough_u]))[0, 1] > 0.99
    reward = lambda obs, action, next_obs, features: -next_obs.square().sum(-1)
    never = lambda next_obs: torch.zeros(len(next_obs), dtype=torch.bool)
    judge, values = MPC(models[0].step, reward, never, 1, horizon=4), []
    for model in models:
        torch.manual_seed(0)
        plan, _ = MPC(model.step, reward, never, 1, horizon=4, population=64, iterations=3).plan(obs[:100])
        values.append(judge.rollout(obs[:100], plan)[1].mean().item())
    nothing = judge.rollout(obs[:100], torch.zeros(100, 4, 1))[1].mean().item()
    assert abs(values[1] - values[0]) < 0.01 * (values[0] - nothing)


@pytest.mark.parametrize("kind", KINDS)
def test_uncertainty_formula(fitted, kind):
    """From the members' own predictions, by hand, in units of the training targets' standard deviation."""
    data, _, state = fitted
    model = fill(small(uncertainty_kind=kind), state)
    obs, action = 3 * data[0][:64], data[1][:64]
    mean, std = model.predict(obs, action)
    target_std = torch.cat([data[2] - data[0], data[3]], -1).std(0)  # nearly the training split's
    gap = (mean - mean.mean(0)) / target_std
    expected = {"std": gap.square().mean(0).sum(-1).sqrt() / math.sqrt(3),
                "variance": gap.square().mean(0).mean(-1),
                "max-distance": gap.square().sum(-1).sqrt().max(0).values / math.sqrt(3),
                "aleatoric": (std / target_std).square().sum(-1).sqrt().max(0).values / math.sqrt(3)}[kind]
    torch.testing.assert_close(model.uncertainty(obs, action), model.scale * expected, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "aleatoric"])
def test_epistemic_uncertainty_grows_away_from_the_data(fitted, kind):
    data, _, state = fitted
    model = fill(small(uncertainty_kind=kind), state)
    u = [model.uncertainty(scale * data[0][:500], data[1][:500]).mean().item() for scale in (1, 3, 6, 12)]
    assert all(far > 2 * near for near, far in zip(u, u[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_members_does_not_matter(fitted, kind):
    data, _, state = fitted
    order = torch.tensor([3, 0, 4, 1, 2])
    mixed = {key: value[order] if key.startswith(("weights", "biases")) else value for key, value in state.items()}
    a, b = (fill(small(uncertainty_kind=kind), s).step(data[0][:64], data[1][:64]) for s in (state, mixed))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_dimensions_are_exact_and_harmless(kind):
    """A constant observation (a goal) and feature: predicted exactly, and no part of u."""
    (obs, action, next_obs, features), _ = linear_data(600)
    goal = torch.full((600, 1), 1234.567)
    model = WorldModel(3, 1, 2, hidden=32, layers=2, uncertainty_kind=kind)
    result = model.fit(torch.cat([obs, goal], -1), action, torch.cat([next_obs, goal], -1),
                       torch.cat([features, torch.full((600, 1), -0.7)], -1), max_epochs=25)
    assert result["holdout_mse"] < 0.5
    query = torch.cat([3 * obs[:50], goal[:50]], -1), action[:50]
    mean, std = model.predict(*query)
    torch.testing.assert_close(mean[..., 2], torch.full((5, 50), 1234.567), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean[..., 4], torch.full((5, 50), -0.7), rtol=1e-5, atol=0)
    assert (std[..., [2, 4]] == 0).all()
    step_obs, step_features, u = model.step(*query)
    torch.testing.assert_close(step_obs[:, 2], goal[:50, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(step_features[:, 1], torch.full((50,), -0.7), rtol=1e-5, atol=0)
    moving = [0, 1, 3]
    gap = (mean - mean.mean(0))[..., moving] / model.target_std[moving]
    expected = {"std": gap.square().mean(0).mean(-1).sqrt(), "variance": gap.square().mean(0).mean(-1),
                "max-distance": gap.square().mean(-1).sqrt().max(0).values,
                "aleatoric": (std[..., moving] / model.target_std[moving]).square().mean(-1).sqrt().max(0).values}[kind]
    torch.testing.assert_close(u, model.scale * expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("wild", [1e6, -1e6, math.inf, -math.inf, math.nan])
def test_step_stays_in_range(fitted, wild, margin):
    """Wherever it starts from, and for any action, a step ends within the margin of the data's range."""
    data, _, state = fitted
    model = small(margin=margin)
    model.fit(*(x[:200] for x in data), max_epochs=1)
    seen = torch.cat([data[0][:200], data[2][:200]])
    low, high = seen.amin(0), seen.amax(0)
    slack = margin * (high - low) + 1e-5
    for obs, action in ((torch.tensor([[wild, 0.0], [wild, wild]]), torch.zeros(2, 1)),
                        (torch.zeros(2, 2), torch.tensor([[wild], [-wild]]))):
        next_obs, features, u = model.step(obs, action)
        assert ((next_obs >= low - slack) & (next_obs <= high + slack)).all()
        if math.isfinite(wild):
            assert features.isfinite().all() and u.isfinite().all()
        else:  # what comes of an input that is not finite must never pass for trusted
            assert not (u <= 1e6).any()


def test_range_covers_where_episodes_end():
    """The last state of an episode is a next_obs only; a step must be able to reach it, or nothing ever terminates."""
    obs, action = torch.rand(500, 1), torch.zeros(500, 1)
    model = WorldModel(1, 1, members=2, hidden=16, layers=1)
    model.fit(obs, action, obs - 2.0, torch.zeros(500, 0), max_epochs=2)
    torch.testing.assert_close(model.step(obs[:9], action[:9])[0], obs[:9] - 2.0, rtol=0, atol=0.05)
    model.fit(obs, action, obs - 2.0, torch.zeros(500, 0), max_epochs=1, bounds=torch.tensor([[0.0], [1.0]]))
    assert (model.obs_low.item(), model.obs_high.item()) == pytest.approx((-0.1, 1.1))  # of these rows, not of the fit's


def test_bootstraps_and_holdout():
    """Each member trains on a bootstrap of its own, the same every epoch; on the holdout no member does."""
    (_, action, next_obs, features), _ = linear_data(400)
    obs = torch.stack([torch.arange(400.0), torch.randn(400)], -1)
    model, batches = small(members=3), {2: [], 3: []}  # by dimensions: one batch for all members, one for each
    model.register_forward_pre_hook(lambda _, args: batches[args[0].dim()].append(args[0][..., 0]))
    model.fit(obs, action, next_obs, features, max_epochs=2, batch_size=100, held_out=obs[:, 0] % 4 == 0)
    first, second = (torch.cat(half, 1).sort(1).values for half in (batches[3][:3], batches[3][3:]))
    assert first.shape == (3, 300) and torch.equal(first, second)
    uniques, held = [set(rows.tolist()) for rows in first], set(batches[2][-1].tolist())
    assert all(0.55 < len(rows) / 300 < 0.71 for rows in uniques)  # 1 - 1/e of the split
    assert uniques[0] != uniques[1] != uniques[2] and 265 < len(set.union(*uniques))  # 1 - 1/e^3
    assert len(held) == 100 and not held & set.union(*uniques)


def test_the_true_error_by_hand_is_of_the_calibrating_half_of_the_holdout():
    """Every tenth row is held out: half of them to stop by, and the others, whose errors fit gives, to calibrate on."""
    data, _ = linear_data(400)
    model = small(coverage=0.0)
    result = model.fit(*data, max_epochs=2)
    mean = model.predict(*data[:2])[0].mean(0)
    gap = (mean - torch.cat(data[2:], -1)) / model.target_std
    torch.testing.assert_close(model.error(*data), gap.square().sum(-1).sqrt() / math.sqrt(3), rtol=1e-3, atol=1e-5)
    train, held, stopping, calibrating = (set(rows.tolist()) for rows in model._split(data[0], None))
    assert held == set(range(0, 400, 10)) == stopping | calibrating
    assert not stopping & calibrating and not train & held
    torch.testing.assert_close(result["holdout_error"], model.error(*data)[sorted(calibrating)])
    # of many rows some are looked at; what stopped a fit never calibrates a later one on more rows
    few, many = (model._split(torch.zeros(n, 1), None) for n in (90_000, 150_000))
    assert not torch.isin(few[2], many[3]).any() and not torch.isin(few[3], many[2]).any()
    assert len(many[2]) == len(many[3]) <= 5000 and torch.equal(many[1], torch.cat(many[2:]).sort().values)


def test_calibrated_uncertainty_covers_the_error():
    """u is at or above the error for 95 % of the rows that scaled it, and for about as many new ones; a scale of 1 is
    the switch's off. The rows held out are the same in a refit on more rows."""
    data, _ = linear_data(3000)
    new, _ = linear_data(1000)
    model, plain = small(), small(coverage=0.0)
    result = model.fit(*data, max_epochs=8)
    covered = (result["holdout_u"] >= result["holdout_error"]).float().mean()
    assert 0.95 <= covered < 0.96 + 1 / 150
    assert (model.uncertainty(*new[:2]) >= model.error(*new)).float().mean() > 0.91
    plain.fit(*data, max_epochs=1)
    assert plain.scale == 1 and model.scale != 1
    assert model._conformal_scale(torch.ones(39), torch.arange(39.0)) == 37  # ceil(40 * .95) = 38th smallest
    assert model._conformal_scale(torch.ones(3), torch.arange(3.0)) == 2


def test_member_step_moves_each_row_by_its_member(fitted):
    """As many rows as a CPU takes in three parts: their order stays, and their numbers are those of one part."""
    data, _, state = fitted
    model = fill(small(), state)
    obs, action = data[0][:2100], data[1][:2100]
    mean, _ = model.predict(obs, action)
    next_obs, features, u = model.member_step(obs, action)
    expected = torch.stack([mean[i % 5, i] for i in range(2100)])
    torch.testing.assert_close(torch.cat([next_obs, features], -1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(u, model.step(obs, action)[2])


def test_each_member_keeps_its_own_best():
    """The errors that the fit saw after each epoch, against the error of the weights it kept."""
    (data, _), model, errors = linear_data(200), small(), []
    measure = model._holdout_mse
    model._holdout_mse = lambda *args: (errors.append(measure(*args)), setattr(model, "held", args))[0] or errors[-1]
    model.fit(*data, lr=0.05, max_epochs=12, patience=12)  # a rate at which the error goes up and down
    errors = torch.stack(errors)
    assert len(errors.argmin(0).unique()) > 1  # the members are best at different epochs
    torch.testing.assert_close(measure(*model.held), errors.amin(0), rtol=1e-4, atol=1e-6)


def test_slow_gains_add_up():
    """An error that falls by 0.8 % an epoch has gained 1 % every second epoch: the fit goes on. One that stays stops
    it after `patience` epochs."""
    for factor, epochs in ((0.992, 20), (1.0, 4)):
        model, seen = small(), []
        model._holdout_mse = lambda *_: (seen.append(0), torch.full((5,), factor ** len(seen)))[1]
        assert model.fit(*linear_data(50)[0], max_epochs=20, patience=3)["epochs"] == epochs


def test_fit_stops_early_and_refits_from_where_it_was(fitted):
    data, result, state = fitted
    assert result["epochs"] < 60
    other = [x[9000:] for x in data]  # normalisation moves a little too
    cold = small().fit(*other, max_epochs=1)["holdout_mse"]
    assert fill(small(), state).fit(*other, max_epochs=1)["holdout_mse"] < 0.7 * cold


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", range(4))
def test_data_that_is_not_finite(column, bad):
    data, _ = linear_data(100)
    data[column][17, 0] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        small().fit(*data, max_epochs=3)


def test_too_few_rows_and_unknown_kind():
    with pytest.raises(ValueError, match="9 transitions are too few"):
        small().fit(*linear_data(9)[0])
    assert small().fit(*linear_data(10)[0], max_epochs=1)["epochs"] == 1
    with pytest.raises(ValueError, match="max-distance"):
        small(uncertainty_kind="entropy")
    for mask in (torch.zeros(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool)):
        with pytest.raises(ValueError, match="held_out .* none or all"):
            small().fit(*linear_data(50)[0], held_out=mask)


def test_other_types_of_data():
    """float64 data and a mask of integers give what float32 and bool do."""
    data, fits = linear_data(200)[0], []
    held_out = torch.arange(200) % 4 == 0
    for columns, mask in ((data, held_out), ([column.double() for column in data], held_out.long())):
        torch.manual_seed(0)
        model = small()
        model.fit(*columns, held_out=mask, max_epochs=2)
        fits.append(model.state_dict())
    torch.testing.assert_close(*fits, rtol=0, atol=0)


def test_state_dict_is_the_whole_model(fitted):
    """Identical predictions, steps and uncertainty: the normaliser and the range are in it."""
    data, _, state = fitted
    model, twin = fill(small(), state), fill(small(), state)
    for method in ("predict", "step"):
        for x, y in zip(getattr(model, method)(9 * data[0], data[1]), getattr(twin, method)(9 * data[0], data[1])):
            assert torch.equal(x, y)
    keys = {"input_mean", "input_std", "target_mean", "target_std", "obs_low", "obs_high"}
    assert keys <= set(state) and all(state[key].isfinite().all() and state[key].ne(0).all() for key in keys)


def test_normalised_by_the_training_rows_of_the_last_fit():
    model = small(members=2)
    for shift in (0.0, 3.0):  # a refit on other data measures anew
        obs, action, next_obs, features = linear_data(100)[0]
        held_out = torch.arange(100) % 4 == 0
        obs, next_obs = obs + shift, next_obs + 2 * shift
        obs[held_out] += 50.0
        model.fit(obs, action, next_obs, features, held_out=held_out, max_epochs=1)
        inputs, targets = torch.cat([obs, action], -1)[~held_out], torch.cat([next_obs - obs, features], -1)[~held_out]
        for name, rows in (("input", inputs), ("target", targets)):
            torch.testing.assert_close(getattr(model, f"{name}_mean"), rows.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(getattr(model, f"{name}_std"), rows.std(0), rtol=1e-4, atol=1e-5)


def test_the_loss_by_hand():
    """The members' likelihoods, summed, and what pulls the bounds of the log variance (.5 and -10) together."""
    model, inputs, targets = small(), torch.randn(5, 7, 3), torch.randn(5, 7, 3)
    mean, logvar = model(inputs)
    nll = ((mean - targets).square() / logvar.exp() + logvar).mean((1, 2)).sum()
    torch.testing.assert_close(model.gradients(inputs, targets)[0], nll.detach() + 0.01 * 3 * (0.5 + 10.0))


def test_the_order_of_the_rows_changes_every_epoch():
    data, model, batches = linear_data(200)[0], small(members=2), []
    model.register_forward_pre_hook(lambda _, args: batches.append(args[0]) if args[0].dim() == 3 else None)
    model.fit(*data, max_epochs=2, batch_size=60)
    assert len(batches) == 6 and not torch.equal(torch.cat(batches[:3], 1), torch.cat(batches[3:], 1))


def test_the_holdout_mse_is_of_the_members_mean():
    data, model = linear_data(400)[0], small()
    result = model.fit(*data, max_epochs=1)
    held = [column[::10] for column in data]
    gap = (model.predict(*held[:2])[0].mean(0) - torch.cat(held[2:], -1)) / model.target_std
    assert result["holdout_mse"] == pytest.approx(gap.square().mean().item(), rel=1e-4)


def test_a_refit_measures_the_scale_of_u_anew():
    data, model = linear_data(300)[0], small()
    model.fit(*data, max_epochs=2)
    result = model.fit(*data, max_epochs=1)
    scale = model.scale.clone()
    model.calibrate(*data)
    torch.testing.assert_close(model.scale, scale)
    rows = model._split(data[0], None)[-1]
    torch.testing.assert_close(result["holdout_u"], model.uncertainty(data[0][rows], data[1][rows]))

"""Filter: eq. 6 by hand, the extension of cut trajectories, thresholds, modes, errors, relabelled transitions."""

import math

import pytest
import torch

from filter import MODES, accept, score_trajectories, thresholds, to_transitions
from mpc import imagine

T, F = True, False


def test_eq_6_by_hand():
    """A whole trajectory, one that terminates, one that is cut, one without a valid step; junk where not valid."""
    bad = math.nan
    reward = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, bad, 9.0], [-1.0, -3.0, bad, bad], [bad, 1.0, 1.0, 1.0]])
    u = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 9.0, bad], [0.1, 0.2, 5.0, bad], [7.0, 1.0, 1.0, 1.0]])
    valid = torch.tensor([[T, T, T, T], [T, T, F, F], [T, T, F, F], [F, F, F, F]])
    ends = torch.tensor([[F, F, F, F], [F, T, F, F], [F, F, T, F], [T, F, F, F]])  # what is not valid has not ended
    returns, mean_u = score_trajectories(reward, u, valid, ends, 0.5)
    whole = 1 + 0.5 * 2 + 0.25 * 3 + 0.125 * 4
    terminated = 1 + 0.5 * 2
    cut = (-1 - 0.5 * 3) / (1 + 0.5) * (1 + 0.5 + 0.25 + 0.125)  # its mean discounted reward for all four steps
    torch.testing.assert_close(returns, torch.tensor([whole, terminated, cut, -math.inf]))
    torch.testing.assert_close(mean_u, torch.tensor([0.25, 0.3, 0.15, math.inf]))


@pytest.mark.parametrize("discount", [1.0, 0.99])
@pytest.mark.parametrize("terminated", [False, True])
def test_a_cut_neither_helps_nor_hurts(discount, terminated):
    """Constant reward: J is the same wherever the cut falls, for losses too; a termination does shorten it."""
    reward = torch.full((20, 20), -2.0)
    valid = torch.ones(20, 20).tril().bool()  # the i-th has i + 1 steps
    ends = torch.eye(20).bool() & terminated
    returns, _ = score_trajectories(reward, torch.zeros(20, 20), valid, ends, discount)
    weights = discount ** torch.arange(20.0)
    expected = -2 * (weights.cumsum(0) if terminated else weights.sum().expand(20))
    torch.testing.assert_close(returns, expected)


def test_a_cut_trajectory_does_not_depend_on_its_company():
    """J of s = 6, 7, cut before u = 8 > 7, of at most eight steps: alone as beside one that lives on."""
    step = lambda obs, action: (obs + 1, obs, obs[:, 0])
    go = lambda starts: imagine(step, lambda n: n[:, 0] > 99, lambda o: o, torch.tensor(starts)[:, None], 8, 7.0)
    for starts in ([6.0, 0.0], [6.0]):
        data = go(starts)
        returns, _ = score_trajectories(torch.ones_like(data["uncertainty"]), data["uncertainty"], data["valid"],
                                        data["terminated"], 0.9)
        assert data["valid"][0].sum() == 2
        assert returns[0].item() == pytest.approx((1 - 0.9**8) / 0.1) and data["obs"].shape[:2] == (len(starts), 8)


@pytest.mark.parametrize("percentile", [0, 25, 60, 100])
def test_thresholds_are_percentiles(percentile):
    """Of 101 values 0, 1, ..., 100 in any order; trajectories without a valid step do not count."""
    returns, mean_u = torch.randperm(101).float(), torch.randperm(101).float() / 100
    empty = torch.full((30,), math.inf)
    found = thresholds(torch.cat([returns, -empty]), torch.cat([mean_u, empty]), percentile, 100 - percentile,
                       mode="return")
    assert found == pytest.approx((percentile, (100 - percentile) / 100), abs=1e-4)
    passed = accept(returns, mean_u, *found, mode="return")
    assert abs(passed.sum() - (101 - percentile)) <= 1  # float32 interpolation may leave out the value itself


def test_thresholds_of_nothing():
    empty = torch.full((3,), math.inf)
    with pytest.raises(ValueError, match="no imagined trajectory has a single valid step"):
        thresholds(-empty, empty, 50, 50)


RETURNS = torch.tensor([1.0, 2.0, 2.0, 3.0, -math.inf, math.nan])
MEAN_U = torch.tensor([0.1, 0.2, 0.5, 0.3, math.inf, 0.1])


@pytest.mark.parametrize("mode, expected", [("dual", [F, T, F, F, F, F]), ("return", [F, T, T, T, F, F]),
                                            ("uncertainty", [T, T, F, F, F, F]), ("none", [T, T, T, T, F, F])])
def test_modes(mode, expected):
    """Both criteria with equality (eq. 6), each alone, none; what has no valid step or is NaN never passes."""
    assert accept(RETURNS, MEAN_U, 2.0, MEAN_U[1].item(), mode).tolist() == expected
    assert mode in MODES and len(MODES) == 4 and MODES[0] == "dual"


def test_default_mode_is_dual():
    assert accept(RETURNS, MEAN_U, 2.0, 0.25).tolist() == [F, T, F, F, F, F]


@pytest.mark.parametrize("mode, thresholds", [("dual", (3.0, 0.2)), ("return", (99.5, 9.0)),
                                              ("uncertainty", (-9.0, 0.015))])
def test_error_names_thresholds_and_ranges(mode, thresholds):
    """What was asked, by which flags, and what was there, so that the user can choose."""
    with pytest.raises(ValueError) as caught:
        accept(RETURNS, MEAN_U, *thresholds, mode)
    message = str(caught.value)
    words = [f"{x:.4g}" for x in thresholds] + ["1 to 3", "0.1 to 0.5", mode]
    assert all(word in message for word in words) and "\n" not in message
    with pytest.raises(ValueError, match="no trajectory has a valid step"):
        accept(RETURNS[4:5], MEAN_U[4:5], *thresholds, mode)


def test_transitions_are_relabelled():
    """Three accepted trajectories of four: whole, cut, terminated; r_T of their own columns; timeouts marked."""
    n, length = 4, 3
    index = torch.arange(12.0).view(n, length)
    lengths, ends_at = [3, 2, 2, 3], {2: 1}
    valid = torch.arange(length) < torch.tensor(lengths)[:, None]
    terminated = torch.zeros(n, length, dtype=torch.bool)
    for row, column in ends_at.items():
        terminated[row, column] = True
    data = {"obs": index[..., None].expand(-1, -1, 2), "action": index[..., None] / 10, "valid": valid,
            "next_obs": index[..., None].expand(-1, -1, 2) + 1, "features": 100 + index[..., None],
            "uncertainty": 0.01 * index, "terminated": terminated}
    reward = lambda obs, action, next_obs, features: features[:, 0] + next_obs[:, 1] - obs[:, 0] + action[:, 0]
    out = to_transitions(data, torch.tensor([T, T, T, F]), reward)
    rows = torch.tensor([0.0, 1, 2, 3, 4, 6, 7])  # by trajectory, in time's order
    assert set(out) == {"obs", "action", "next_obs", "features", "uncertainty", "terminated", "timeout", "reward"}
    torch.testing.assert_close(out["obs"], rows[:, None].expand(-1, 2))
    torch.testing.assert_close(out["next_obs"], rows[:, None].expand(-1, 2) + 1)
    torch.testing.assert_close(out["uncertainty"], 0.01 * rows)
    torch.testing.assert_close(out["reward"], 100 + rows + 1 + rows / 10)
    assert out["terminated"].tolist() == [F, F, F, F, F, F, T]
    assert out["timeout"].tolist() == [F, F, T, F, T, F, F]


@pytest.mark.parametrize("call", (thresholds, accept))
def test_unknown_mode(call):
    """A misspelt mode would pass every trajectory."""
    with pytest.raises(ValueError, match="mode 'Dual'.*dual, return, uncertainty, none"):
        call(torch.ones(3), torch.ones(3), 0.0, 50.0, mode="Dual")


def test_a_threshold_of_zero_is_a_threshold():
    returns, mean_u = torch.arange(1.0, 21.0), torch.arange(1.0, 21.0) / 10
    assert thresholds(returns, mean_u, 50, 50, return_threshold=0.0)[0] == 0.0
    assert thresholds(returns, mean_u, 50, 50, u_threshold=0.0)[1] == 0.0

"""Replay: the buffer, batches of the mix, the adaptive share."""

import math
import re
import textwrap

import numpy as np
import pytest
import torch

import replay
from replay import AdaptiveMix, ReplayBuffer, mixed_batch


def marked(capacity, *values):
    buffer = ReplayBuffer(capacity, obs=(2,), reward=())
    for value in values:
        buffer.add(obs=[value, -value], reward=value)
    return buffer


@pytest.mark.parametrize("alpha, n_offline", [(0.0, 0), (0.01, 0), (0.3, 3), (0.34, 3), (0.36, 4), (0.5, 5),
                                              (0.999, 10), (1.0, 10)])
def test_mixed_batch_holds_the_share_in_every_slice(alpha, n_offline):
    prior, online = marked(20, *range(1, 16)), marked(20, *range(101, 116))
    batch, found = mixed_batch(prior, online, alpha, 10, 50)
    assert found == n_offline and batch["obs"].shape == (50, 10, 2) and batch["reward"].shape == (50, 10)
    assert (batch["reward"][:, :n_offline] < 100).all() and (batch["reward"][:, n_offline:] > 100).all()
    assert torch.equal(batch["obs"], torch.stack([batch["reward"], -batch["reward"]], -1))  # rows stay whole
    assert len({tuple(row) for row in batch["reward"].tolist()}) == 50  # each slice is drawn anew


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_mixed_batch_without_one_side(alpha):
    some, empty = marked(9, 1, 2, 3), marked(9)
    batch, n_offline = mixed_batch(some, empty, alpha, 8, 2)
    assert n_offline == 8 and batch["reward"].min() >= 1
    batch, n_offline = mixed_batch(None, some, alpha, 8, 2)
    assert n_offline == 0 and batch["reward"].shape == (2, 8) and batch["reward"].min() >= 1


def test_buffer_wraps_around_and_samples_what_is_filled():
    buffer = marked(7, 1, 2, 3)
    drawn = buffer.sample(3000)["reward"]
    assert sorted(buffer.filled()["reward"].tolist()) == [1, 2, 3]  # the empty rows are 0
    assert [(drawn == k).float().mean().item() for k in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.05)
    buffer.add(obs=np.full((3, 2), 4.0), reward=np.array([4, 5, 6]))
    buffer.add(obs=torch.zeros(3, 2), reward=torch.tensor([7, 8, 9]))
    assert buffer.size == 7 and sorted(buffer.filled()["reward"].tolist()) == [3, 4, 5, 6, 7, 8, 9]
    assert buffer.sample(4, 5)["obs"].shape == (4, 5, 2) and buffer.sample(500)["reward"].min() == 3
    assert sorted(marked(7, *range(50)).filled()["reward"].tolist()) == list(range(43, 50))
    with pytest.raises(ValueError, match="8 transitions do not fit a buffer of 7"):
        buffer.add(obs=torch.zeros(8, 2), reward=torch.zeros(8))


@pytest.mark.parametrize("n", [0, 3, 7, 10])
def test_buffer_state(n):
    """What was filled, and where the next row goes: both buffers go on alike; later rows do not reach the state."""
    buffer, other = marked(7, *range(1, n + 1)), marked(7, *range(50, 55))
    state = buffer.state_dict()
    buffer.add(obs=[0, 0], reward=20)
    other.load_state_dict(state)
    other.add(obs=[0, 0], reward=20)
    assert other.size == buffer.size and torch.equal(other.filled()["obs"], buffer.filled()["obs"])
    assert torch.equal(other.filled()["reward"], buffer.filled()["reward"])
    assert len(state["rows"]["reward"]) == min(n, 7) and 20 not in state["rows"]["reward"]


def test_samples_from_a_row_on():
    assert marked(9, *range(9)).sample(200, first=6)["reward"].unique().tolist() == [6, 7, 8]


def info(td_error, signed=0.0):
    return {"td_error": td_error, "signed_td_error": signed}


def test_adaptive_mix():
    """The moving average and its clip on a given sequence; before any measurement, and without online data."""
    mix, alphas = AdaptiveMix(gain=0.5, alpha_min=0.1, alpha_max=0.9, ema=0.25), []
    mix.update(info(math.nan))
    assert mix.alpha == 0.9
    for td_error in (1.0, 0.6, math.nan, 0.0, math.inf, 9.0):
        mix.update(info(td_error, signed=-5.0))
        alphas.append(mix.alpha)
    assert alphas == pytest.approx([0.5, 0.45, 0.45, 0.3375, 0.3375, 0.9])  # .5 (.75 * .675 + .25 * 9) is above .9
    assert mix.td_error == pytest.approx(0.75 * 0.675 + 0.25 * 9)
    for _ in range(20):
        mix.update(info(0.0))
    assert mix.alpha == 0.1
    fixed = AdaptiveMix(gain=0.5, alpha_min=0.1, alpha_max=0.9, ema=0.25, fixed=0.0)
    fixed.update(info(5.0))
    assert fixed.alpha == 0.0


def test_adaptive_mix_by_the_papers_formula():
    """(1 - ema) delta_k-1 + ema delta_k of the signed error: no memory beyond one step."""
    mix, seen = AdaptiveMix(gain=1.0, alpha_min=0.0, alpha_max=9.0, ema=0.25, signed=True), []
    for signed in (1.0, 2.0, -8.0, 4.0):
        mix.update(info(99.0, signed))
        seen.append((mix.td_error, mix.alpha))
    assert seen == [(1.0, 1.0), (1.25, 1.25), (-0.5, 0.0), (-5.0, 0.0)]


def test_a_full_buffer_goes_on_in_a_larger_one():
    """Also one that has wrapped: the oldest rows come first, and the next row follows the newest."""
    small, large = ReplayBuffer(4, x=()), ReplayBuffer(8, x=())
    small.add(x=torch.tensor([1.0, 2, 3, 4]))
    small.add(x=torch.tensor([5.0]))
    large.load_state_dict(small.state_dict())
    large.add(x=6.0)
    assert large.filled()["x"].tolist() == [2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="5 transitions do not fit a buffer of 4"):
        small.load_state_dict(large.state_dict())
    assert small.size == 4


def test_empty_buffers():
    """An empty D_S is as none; from two empty ones nothing can be drawn."""
    empty, online = ReplayBuffer(4, x=()), ReplayBuffer(4, x=())
    online.add(x=torch.ones(3))
    batch, n_offline = mixed_batch(empty, online, 0.5, 8, 2)
    assert n_offline == 0 and (batch["x"] == 1).all()
    with pytest.raises(ValueError, match="buffer is empty"):
        mixed_batch(empty, empty, 0.5, 8, 2)


def test_the_docstrings_own_example():
    """The lines that show the components together run as they stand, on a damped pendulum."""
    torch.manual_seed(0)
    obs, action = torch.rand(2000, 2) * 4 - 2, torch.rand(2000, 1) * 2 - 1
    speed = 0.95 * obs[:, 1:] - 0.1 * obs[:, :1].sin() + 0.1 * action
    next_obs = torch.cat([obs[:, :1] + 0.1 * speed, speed], 1)
    names = {"obs": obs, "action": action, "next_obs": next_obs, "terminated": lambda s: s[..., 0].abs() > 3,
             "source_reward": lambda s, a, s2, f: -s2[..., 0].square(), "target_reward": lambda s, a, s2, f: s2[..., 1]}
    example = re.search(r"\n\n((?:    .*\n|\n)+)", replay.__doc__)[1]
    exec(textwrap.dedent(example), names)
    assert names["offline"].size > 0 and 0 < names["n_offline"] < 128
    assert all(value.isfinite() for value in names["info"].values())


@pytest.mark.parametrize("signed", [False, True])
def test_the_share_goes_on_from_its_state(signed):
    mixes = [AdaptiveMix(gain=1.0, alpha_min=0.0, alpha_max=9.0, ema=0.25, signed=signed) for _ in range(2)]
    for value in (1.0, 5.0):
        mixes[0].update({"td_error": value, "signed_td_error": value})
    mixes[1].load_state_dict(mixes[0].state_dict())
    for mix in mixes:
        mix.update({"td_error": 2.0, "signed_td_error": 2.0})
    assert mixes[0].td_error == mixes[1].td_error == pytest.approx(0.75 * (5 if signed else 2) + 0.25 * 2)

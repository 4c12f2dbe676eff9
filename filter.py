"""The dual-criterion filter of imagined trajectories (section 4.3, eq. 6) and the transitions that pass it."""

import torch

MODES = ("dual", "return", "uncertainty", "none")


def _check_mode(mode):
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: known are {', '.join(MODES)}")


def score_trajectories(reward, uncertainty, valid, terminated, discount):
    """J(tau) = sum_t gamma^t r_S and the mean uncertainty u_bar(tau) of eq. 6, over each trajectory's valid steps.

    Args: reward, uncertainty: (N, T). valid, terminated: (N, T) bool. discount: gamma.

    Returns J (N,), u_bar (N,); a trajectory without a valid step has J = -inf and u_bar = inf.

    Deviation 7: a trajectory that was cut short without having terminated is scored as if its mean discounted reward
    had gone on for all T steps: where rewards are negative, a short one would else pass because it is short.
    """
    valid = valid.to(reward.dtype)
    steps = valid.sum(1)
    weight = discount ** torch.arange(reward.shape[1], device=reward.device, dtype=reward.dtype)
    total = torch.where(valid > 0, reward * weight, 0.0).sum(1)
    share = (valid * weight).sum(1) / weight.sum()
    goes_on = ~(terminated & (valid > 0)).any(1)
    returns = torch.where(goes_on, total / share.clamp(min=1e-8), total)
    mean_u = torch.where(valid > 0, uncertainty, 0.0).sum(1) / steps.clamp(min=1)
    empty = steps == 0
    return returns.masked_fill(empty, -torch.inf), mean_u.masked_fill(empty, torch.inf)


def thresholds(returns, mean_u, return_percentile, u_percentile, return_threshold=None, u_threshold=None, mode="dual"):
    """J_th and u_th of eq. 6: each as given or, where None, such that `return_percentile` % of the trajectories have a
    lower return, `u_percentile` % a lower mean uncertainty (0 to 100); those without a valid step do not count.

    Where no trajectory meets both, which mode "dual" asks for, a J_th that is not given is that percentile of those
    that meet u_th.

    Args: returns, mean_u: (N,), from `score_trajectories`. Returns the pair (J_th, u_th), floats. Raises ValueError
    where no trajectory has a valid step, and for an unknown mode.
    """
    _check_mode(mode)
    some = returns.isfinite() & mean_u.isfinite()
    if not some.any():
        raise ValueError("no imagined trajectory has a single valid step")
    quantile = lambda x, percentile: torch.quantile(x, percentile / 100).item()
    u_th = quantile(mean_u[some], u_percentile) if u_threshold is None else u_threshold
    if return_threshold is not None:
        return return_threshold, u_th
    j_th, certain = quantile(returns[some], return_percentile), returns[some & (mean_u <= u_th)]
    if mode == "dual" and len(certain) and certain.max() < j_th:
        j_th = quantile(certain, return_percentile)
    return j_th, u_th


def accept(returns, mean_u, return_threshold, u_threshold, mode="dual"):
    """Eq. 6: which trajectories have u_bar <= u_th and J >= J_th, (N,) bool; a mode other than "dual" drops one
    criterion or both (the paper's ablation).

    Raises ValueError, which names the thresholds and what was seen, when nothing passes; and for an unknown mode.
    """
    _check_mode(mode)
    some = returns.isfinite() & mean_u.isfinite()
    passed = some.clone()
    if mode in ("dual", "return"):
        passed &= returns >= return_threshold
    if mode in ("dual", "uncertainty"):
        passed &= mean_u <= u_threshold
    if not passed.any():
        seen = "no trajectory has a valid step" if not some.any() else (
            f"seen J {returns[some].min():.4g} to {returns[some].max():.4g}, "
            f"u {mean_u[some].min():.4g} to {mean_u[some].max():.4g}")
        raise ValueError(f"no imagined trajectory passes the filter '{mode}' with J >= {return_threshold:.4g} and "
                         f"u <= {u_threshold:.4g}: {seen}")
    return passed


def to_transitions(trajectories, passed, reward):
    """The valid steps of the accepted trajectories, relabelled: {key: (n, ...)}.

    Args: trajectories: as `mpc.imagine` returns. passed: (N,) bool. reward: r_T, called as reward(obs, action,
        next_obs, features). `timeout` marks the last step of a trajectory that did not terminate.
    """
    valid = trajectories["valid"] & passed[:, None]
    later = torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)
    flat = {key: values[valid] for key, values in trajectories.items() if key != "valid"}
    flat["timeout"] = (valid & ~later & ~trajectories["terminated"])[valid]
    return relabel(flat, reward)


def relabel(transitions, reward):
    """Transitions {key: (n, ...)}, or trajectories {key: (N, T, ...)}, under another reward (r_T in section 4.3),
    called as reward(obs, action, next_obs, features)."""
    keys = ("obs", "action", "next_obs", "features")
    return {**transitions, "reward": reward(*(transitions[key] for key in keys))}

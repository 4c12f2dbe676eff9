"""Networks of the agent: eq. 8, the stacked critics and the actor's density against plain modules."""

import copy
import math

import pytest
import torch
from torch import distributions as dist
from torch import nn

from agent import Actor, CriticEnsemble


def randomised(critic):
    """LayerNorm starts as the identity; gains and shifts of their own make a test of them."""
    for p in [*critic.gains, *critic.shifts]:
        nn.init.normal_(p, 0.5)
    return critic


@pytest.mark.parametrize("layer_norm", [True, False])
def test_bound_of_eq_8(layer_norm):
    """|Q - b| <= |w| |psi| anywhere; LayerNorm alone keeps it bounded however far away the input is."""
    critic = randomised(CriticEnsemble(4, 5, 2, (32, 32), layer_norm))
    w, b = critic.weights[-1].norm(dim=1), critic.biases[-1][..., 0]
    limit = None
    if layer_norm:  # |LayerNorm(x)| <= sqrt(h)
        limit = w * (math.sqrt(32) * critic.gains[-1].abs().amax(-1) + critic.shifts[-1].norm(dim=-1)) + b.abs()
    largest = []
    for scale in (1.0, 1e2, 1e4, 1e6):
        obs, action = scale * torch.randn(500, 5), torch.rand(500, 2) * 2 - 1
        q, psi = critic(obs, action), critic.last_hidden(obs, action)
        assert q.shape == (4, 500) and psi.shape == (4, 500, 32) and (psi >= 0).all()
        assert ((q - b).abs() <= w * psi.norm(dim=-1) * (1 + 1e-4) + 1e-4).all()
        assert limit is None or (q.abs() <= limit).all()
        largest.append(q.abs().amax().item())
    assert (largest[-1] < 3 * largest[0]) if layer_norm else (largest[-1] > 1e5 * largest[0])


@pytest.mark.parametrize("layer_norm", [True, False])
def test_some_of_the_critics(layer_norm):
    critic, obs, action = randomised(CriticEnsemble(5, 5, 2, (16, 24), layer_norm)), torch.randn(9, 5), torch.rand(9, 2)
    drawn = torch.tensor([3, 1])
    torch.testing.assert_close(critic(obs, action, drawn), critic(obs, action)[drawn])


@pytest.mark.parametrize("layer_norm", [True, False])
def test_stacked_critics_are_separate_networks(layer_norm):
    """Values and gradients, to parameters and actions, equal those of N nn.Sequential; with frozen critics too."""
    n, sizes = 3, [7, 16, 24, 1]
    critic = randomised(CriticEnsemble(n, 5, 2, (16, 24), layer_norm)).double()
    obs, action = torch.randn(10, 5).double(), torch.rand(10, 2).double().requires_grad_()
    weights = torch.randn(n, 10).double()
    q = critic(obs, action)
    (q.square() * weights).sum().backward()
    action_grad, own_grad = action.grad.clone(), torch.zeros_like(action)
    for i in range(n):
        layers = []
        for k, (a, b) in enumerate(zip(sizes, sizes[1:])):
            linear = nn.Linear(a, b).double()
            linear.weight.data, linear.bias.data = critic.weights[k][i].T.clone(), critic.biases[k][i, 0].clone()
            layers.append(linear)
            if k < 2 and layer_norm:
                norm = nn.LayerNorm(b).double()
                norm.weight.data, norm.bias.data = critic.gains[k][i, 0].clone(), critic.shifts[k][i, 0].clone()
                layers.append(norm)
            layers += [nn.ReLU()] * (k < 2)
        net, own = nn.Sequential(*layers), action.detach().clone().requires_grad_()
        value = net(torch.cat([obs, own], -1))[:, 0]
        torch.testing.assert_close(q[i], value)
        (value.square() * weights[i]).sum().backward()
        own_grad += own.grad
        for k, linear in enumerate(m for m in layers if isinstance(m, nn.Linear)):
            torch.testing.assert_close(critic.weights[k].grad[i], linear.weight.grad.T)
            torch.testing.assert_close(critic.biases[k].grad[i, 0], linear.bias.grad)
        for k, norm in enumerate(m for m in layers if isinstance(m, nn.LayerNorm)):
            torch.testing.assert_close(critic.gains[k].grad[i, 0], norm.weight.grad)
            torch.testing.assert_close(critic.shifts[k].grad[i, 0], norm.bias.grad)
    torch.testing.assert_close(action_grad, own_grad)
    critic.requires_grad_(False)  # as in the actor's step
    frozen = action.detach().clone().requires_grad_()
    (critic(obs, frozen).square() * weights).sum().backward()
    torch.testing.assert_close(frozen.grad, own_grad)


def test_every_parameter_is_one_critics_own():
    """LayerNorm's too: a change in critic 1 alone changes Q_1 alone."""
    critic, inputs = CriticEnsemble(3, 4, 1, (8, 8)), (torch.randn(20, 4), torch.randn(20, 1))
    assert sum(p.numel() for p in critic.parameters()) == 3 * (5 * 8 + 8 + 8 * 8 + 8 + 8 + 1 + 4 * 8)
    before = critic(*inputs)
    for p in critic.parameters():
        changed = copy.deepcopy(critic)
        next(q for q, o in zip(changed.parameters(), critic.parameters()) if o is p).data[1] += 0.5
        different = (changed(*inputs) != before).any(1)
        assert different.tolist() == [False, True, False]


def test_actor_log_density():
    """Against torch's tanh-transformed Gaussian; finite where tanh saturates."""
    actor = Actor(4, 3, (16,)).double()
    obs = 3 * torch.randn(500, 4).double()
    action, log_prob = actor.sample(obs)
    mean, log_std = actor(obs)
    squashed = dist.TransformedDistribution(dist.Normal(mean, log_std.exp()), dist.TanhTransform())
    inside = (action.abs() < 1 - 1e-6).all(-1)  # beyond, torch's way over atanh is the inexact one
    torch.testing.assert_close(log_prob[inside], squashed.log_prob(action).sum(-1)[inside], rtol=1e-6, atol=1e-6)
    assert action.abs().max() <= 1 and inside.sum() > 400
    far = Actor(4, 3, (16,))
    far.net[-1].bias.data = torch.tensor([50.0, -50.0, 0.0, 9.0, -90.0, 9.0])  # means, then log stds beyond the clamp
    action, log_prob = far.sample(torch.randn(500, 4))
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and all(p.grad.isfinite().all() for p in far.parameters())


def test_critics_start_as_linear_layers_do():
    critic = CriticEnsemble(4, 60, 4, (16, 400))
    for weight, bias in zip(critic.weights, critic.biases):
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound

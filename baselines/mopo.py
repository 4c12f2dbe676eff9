"""MOPO: model-based offline policy optimisation (Yu et al., 2020, arXiv:2005.13239).

    python baselines/mopo.py --env Walker2d-v4 --dataset runs/.../dataset.npz

A world model (world_model.py) learns s' and r from the dataset. Every `rollout_every` updates the policy is rolled out
in it for a few steps from states of the data, each step by a member drawn at random, and SAC learns from

    r~(s, a) = r(s, a) - lambda u(s, a)                                     (algorithm 2)

on those steps and, to a share of `real_ratio`, on the data. u is the largest of the members' predicted standard
deviations of (s', r), each the length of a vector in the environment's units.

Deviation: all members roll out, not the best five, and stay within the data's range, widened by a tenth; 10,000
rollouts at a time, not 50,000; no weight decay; the actor's learning rate is constant.
Online (not in the paper): new steps join the data, and every `refit_every` of them the model is fit again on all of it,
and imagines anew.
"""

import sys

import torch

import common  # before replay: it puts the repository's root on the path
from replay import ReplayBuffer, mixed_batch
from sac import DelayedSAC, sac_arguments, sac_switches
from world_model import WorldModel


class Imagination:
    """A model of (s', r), rollouts of a policy in it, and batches of data and imagined steps.

    Args:
        model: WorldModel with one feature, the reward. terminated: next_obs (B, d) -> (B,) bool, the task's.
        penalty_coef: lambda. fit_kwargs: of WorldModel.fit. retain: how many times' rollouts are kept.
    """

    def __init__(self, model, terminated, *, rollout_batch, rollout_length, rollout_every, retain, real_ratio,
                 penalty_coef=0.0, fit_kwargs=None):
        self.model, self.terminated, self.penalty_coef = model, terminated, penalty_coef
        self.rollout_batch, self.rollout_length, self.rollout_every = rollout_batch, rollout_length, rollout_every
        self.real_ratio, self.fit_kwargs = real_ratio, fit_kwargs or {}
        d = model.obs_dim
        action_dim = model.input_mean.shape[0] - d
        self.buffer = ReplayBuffer(rollout_batch * rollout_length * retain, model.input_mean.device, obs=(d,),
                                   action=(action_dim,), reward=(), next_obs=(d,), terminated=(), uncertainty=())

    def fit(self, buffer, note=None, **others):
        """Fits the model to the buffer, and forgets what it had imagined; others win over `fit_kwargs`."""
        data = buffer.filled()
        # a file may not tell where a fall ended: `load_dataset` puts the observation itself there
        known = (data["next_obs"] != data["obs"]).any(1)
        obs, action, next_obs, reward = (data[key][known] for key in ("obs", "action", "next_obs", "reward"))
        result = self.model.fit(obs, action, next_obs, reward[:, None], **{**self.fit_kwargs, **others})
        self.buffer.size = self.buffer.position = 0
        if note:
            note(f"model fit on {known.sum():,} transitions: {result['epochs']} epochs, holdout MSE "
                 f"{result['holdout_mse']:.4f} of the variance")
        return {"model_holdout_mse": result["holdout_mse"]}

    @torch.no_grad()
    def step(self, obs, action):
        """obs (B, d), action (B, A) -> next_obs (B, d), penalised reward r~ (B,) and where it terminates (B,) bool,
        from a random member each. A fall ends it also where the data's range has none."""
        mean, std = self.model.predict(obs, action)
        rows = torch.arange(len(obs), device=obs.device)
        member = torch.randint(len(mean), rows.shape, device=obs.device)
        drawn = mean[member, rows] + std[member, rows] * torch.randn_like(mean[0])
        free = drawn[:, : self.model.obs_dim]
        reward = drawn[:, self.model.obs_dim]
        if self.penalty_coef:
            reward = reward - self.penalty_coef * std.norm(dim=-1).amax(0)
        return free.clamp(self.model.obs_low, self.model.obs_high), reward, self.terminated(free)

    def roll_out(self, policy, obs):
        """Adds rollouts of policy: obs (B, d) -> action (B, A), from obs on, each until it terminates."""
        for _ in range(self.rollout_length):
            action = policy(obs)
            next_obs, reward, over = self.step(obs, action)
            self.buffer.add(obs=obs, action=action, reward=reward, next_obs=next_obs, terminated=over,
                            uncertainty=torch.zeros_like(reward))  # r~ has it already
            obs = next_obs[~over]
            if len(obs) == 0:
                break

    def batch(self, buffer, policy, updates, batch_size):
        """{key: (B, ...)} and how many of its first rows are data; rolls out first where it is time, or
        nothing is imagined."""
        if updates % self.rollout_every == 0 or not self.buffer.size:
            self.roll_out(policy, buffer.sample(self.rollout_batch)["obs"])
        batch, n_real = mixed_batch(buffer, self.buffer, self.real_ratio, batch_size, 1)
        return {key: values[0] for key, values in batch.items()}, n_real

    def state_dict(self):
        return {"model": self.model.state_dict(), "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.buffer.load_state_dict(state["buffer"])


class MOPO(DelayedSAC):
    """Args: imagination: Imagination with lambda. offline_updates: those after them are online, one a step.
    refit_every: online steps between fits of the model, 0: none. refit_epochs: most epochs of such a fit. others:
    DelayedSAC's.
    """

    PARTS = (*DelayedSAC.PARTS, "imagination")

    def __init__(self, obs_dim, action_dim, *, imagination, offline_updates=0, refit_every=0, refit_epochs=30,
                 **others):
        super().__init__(obs_dim, action_dim, **others)
        self.imagination, self.prepare = imagination, imagination.fit
        self.offline_updates, self.refit_every, self.refit_epochs = offline_updates, refit_every, refit_epochs

    def learn(self, buffer):
        online_step = self.updates + 1 - self.offline_updates
        refits = self.refit_every and online_step > 0 and online_step % self.refit_every == 0
        of_the_fit = self.imagination.fit(buffer, max_epochs=self.refit_epochs) if refits else {}
        return {**self.learn_from(*self.imagination.batch(buffer, self.act, self.updates, self.batch_size)),
                **of_the_fit}


def model_flags(parser, real_ratio):
    g = parser.add_argument_group("world model and rollouts")
    g.add_argument("--members", type=common.count, default=7, help="ensemble members E")
    g.add_argument("--model-hidden", type=common.count, default=200, help="width of a hidden layer")
    g.add_argument("--model-layers", type=common.count, default=4, help="hidden layers")
    g.add_argument("--model-lr", type=common.positive, default=1e-3, help="learning rate")
    g.add_argument("--model-batch-size", type=common.count, default=256, help="transitions per member and step")
    g.add_argument("--model-epochs", type=common.count, default=300, help="most epochs of the first fit")
    g.add_argument("--refit-every", type=common.amount, default=1000, help="online steps between fits; 0: none")
    g.add_argument("--refit-epochs", type=common.count, default=30, help="most epochs of such a fit, a warm start")
    g.add_argument("--rollout-length", type=common.count, default=5, help="steps of a rollout (published: 1 to 5)")
    g.add_argument("--rollout-batch", type=common.count, default=10_000, help="rollouts at a time")
    g.add_argument("--rollout-every", type=common.count, default=1000, help="updates between rollouts")
    g.add_argument("--rollout-retain", type=common.count, default=5, help="times that rollouts are kept for")
    g.add_argument("--real-ratio", type=common.fraction, default=real_ratio, help="share of data in a batch")


def imagination_arguments(args, env, penalty_coef=0.0):
    """What MOPO takes beside DelayedSAC's."""
    # the termination rule is the task's, as published; the model's own u is not used, so it is of the kind that one
    # member has, too, and not scaled
    model = WorldModel(env.obs_dim, env.action_dim, 1, members=args.members, hidden=args.model_hidden,
                       layers=args.model_layers, uncertainty_kind="aleatoric", coverage=0.0,
                       compile=args.speed["compile"], inference_dtype=args.speed["dtype"],
                       fit_dtype=args.speed["dtype"]).to(args.device)
    imagination = Imagination(model, env.task.terminated, rollout_batch=args.rollout_batch, penalty_coef=penalty_coef,
                              rollout_length=args.rollout_length, rollout_every=args.rollout_every,
                              retain=args.rollout_retain, real_ratio=args.real_ratio,
                              fit_kwargs={"lr": args.model_lr, "batch_size": args.model_batch_size,
                                          "max_epochs": args.model_epochs})
    return {"imagination": imagination, "offline_updates": args.offline_updates, "refit_every": args.refit_every,
            "refit_epochs": args.refit_epochs}


def build_parser():
    parser = common.offline_parser(__doc__, "mopo")
    g = common.agent_flags(parser, "MOPO", actor_lr=1e-4, critic_lr=3e-4, batch_size=256, hidden=256, layers=2,
                           discount=0.99, polyak=0.005, init_temperature=1.0, target_entropy=None)
    g.add_argument("--penalty-coef", type=common.nonnegative, default=2.5, help="lambda, reward per unit of u")
    sac_switches(g, backup_entropy=True)
    model_flags(parser, real_ratio=0.05)
    return parser


def make_agent(args, env):
    return MOPO(**sac_arguments(args, env), temperature_lr=args.actor_lr,
                **imagination_arguments(args, env, args.penalty_coef))


def main(argv=None):
    return common.main("mopo", build_parser(), make_agent, argv, compiles=True)


if __name__ == "__main__":
    sys.exit(main())

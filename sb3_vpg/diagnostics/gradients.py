"""Policy gradients of formulations side by side, at a frozen policy and on the same episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_vpg.buffers import VPGBufferMixin, buffer_class_for
from sb3_vpg.common.checks import check_choice, check_number
from sb3_vpg.common.policy_runner import PolicyRunner, temporary_distribution
from sb3_vpg.diagnostics.statistics import GradientStatistics, statistics_of
from sb3_vpg.estimators import Array, Formulation, Rollout, segment_index
from sb3_vpg.keywords import LOSS_REDUCTIONS, PARTIAL_EPISODES, Plan
from sb3_vpg.rollout import RolloutCollector


def actor_parameters(policy: ActorCriticPolicy, buffer: VPGBufferMixin) -> list[th.nn.Parameter]:
    """:return: the policy's parameters on which the log probability of an action depends"""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    log_prob = log_probabilities(PolicyRunner(policy), buffer, np.arange(1))
    gradients = th.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients) if gradient is not None]


def log_probabilities(runner: PolicyRunner, buffer: VPGBufferMixin, indices: Array) -> th.Tensor:
    samples = buffer._get_samples(indices)
    return runner.evaluate(samples.observations, samples.actions, with_values=False)[1]


def weighted_score(
    runner: PolicyRunner,
    parameters: list[th.nn.Parameter],
    buffer: VPGBufferMixin,
    indices: Array,
    weights: Array,
) -> th.Tensor:
    """
    ``sum_t w_t grad log pi(a_t | s_t)`` for several weightings w of the same steps: one pass forward, one vectorised back.

    :param runner: runs the policy; with several weightings by the policy's own methods, since the fused layer of the fast
        runner has no vectorized backward pass
    :param parameters: with respect to which
    :param buffer: a rollout
    :param indices: which steps of it, counted in order of time, then of environment, shape (n,)
    :param weights: shape (number of weightings, n)
    :return: shape (number of weightings, number of scalars in ``parameters``)
    """
    # The pass back takes memory for all weightings at once
    chunk_size = max(1, buffer.chunk_size // len(weights))
    several = len(weights) > 1
    total = th.zeros(len(weights), sum(p.numel() for p in parameters), device=parameters[0].device)
    for start in range(0, len(indices), chunk_size):
        chunk = slice(start, start + chunk_size)
        log_prob = log_probabilities(runner, buffer, indices[chunk])
        directions = th.as_tensor(weights[:, chunk], dtype=log_prob.dtype, device=log_prob.device)
        gradients = th.autograd.grad(log_prob, parameters, directions if several else directions[0], is_grads_batched=several)
        total += th.cat([gradient.reshape(len(weights), -1) for gradient in gradients], dim=1)
    return total


@dataclass(frozen=True)
class UpdateSpec:
    """
    What an update is made of, in a measurement.

    :param formulation: the formulation, with its gamma and lambda
    :param episodes_per_batch: whole episodes in the batch of one update, >= 1
    :param loss_reduction: "mean" or "trajectory", as VPG's keyword
    :raises ValueError: if the last two have another value
    """

    formulation: Formulation
    episodes_per_batch: int = 16
    loss_reduction: str = "mean"

    def __post_init__(self) -> None:
        check_number("episodes_per_batch", self.episodes_per_batch, low=1, integer=True)
        check_choice("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)


class Episodes(NamedTuple):
    """
    Whole episodes, one in each column.

    :param rollout: arrays of shape (longest episode, number of episodes)
    :param indices: where each step lies in the buffer, counted in order of time, then of environment; same shape
    :param buffer: the buffer
    """

    rollout: Rollout
    indices: Array
    buffer: VPGBufferMixin


class _EpisodeCollector(RolloutCollector):
    """Collects whole episodes with the policy of a model, and leaves the model alone."""

    def __init__(self, model: OnPolicyAlgorithm, env: VecEnv, n_episodes: int):
        super().__init__(
            type(model.policy),
            env,
            learning_rate=0.0,
            n_steps=512,
            gamma=model.gamma,
            gae_lambda=model.gae_lambda,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=0.0,
            use_sde=model.use_sde,
            sde_sample_freq=model.sde_sample_freq,
            device=model.device,
            _init_setup_model=False,
        )
        self.policy = model.policy
        self.plan = Plan(Formulation("gae"), PARTIAL_EPISODES["finish"], n_episodes)
        self._episode_steps = np.zeros(self.n_envs, dtype=np.int64)
        self.rollout_buffer = buffer_class_for(self.observation_space)(
            self.n_steps, self.observation_space, self.action_space, self.device, n_envs=self.n_envs
        )
        self.set_logger(Logger(folder=None, output_formats=[]))

    def collect(self) -> VPGBufferMixin:
        _, callback = self._setup_learn(total_timesteps=0)
        env, buffer = self.get_env(), self.rollout_buffer
        self.collect_rollouts(env, callback, buffer, self.n_steps)  # type: ignore[arg-type]
        return buffer  # type: ignore[return-value]


def episodes_in(buffer: VPGBufferMixin, n_episodes: int) -> Episodes:
    """
    :param buffer: a rollout of whole episodes
    :param n_episodes: how many to take
    :return: the first episodes, in order of environment
    """
    recorded = np.flatnonzero(buffer.mask)
    segments = np.unique(segment_index(buffer.rollout.last).ravel()[recorded], return_inverse=True)[1]
    recorded, segments = recorded[segments < n_episodes], segments[segments < n_episodes]
    steps = buffer.steps.ravel()[recorded]

    def by_episode(array: Array) -> Array:
        columns = np.zeros((steps.max() + 1, n_episodes), dtype=array.dtype)
        columns[steps, segments] = array.ravel()[recorded]
        return columns

    return Episodes(Rollout(*map(by_episode, buffer.rollout)), by_episode(np.arange(buffer.mask.size)), buffer)


def collect_episodes(model: OnPolicyAlgorithm, env: VecEnv, n_episodes: int) -> Episodes:
    """
    Collect whole episodes with the model's policy as it is: the same number, rounded up, in each environment. (The first that
    end anywhere would be short ones.)

    :param model: VPG, A2C, PPO or any other on-policy algorithm of SB3
    :param env: environments like those the model was trained in, with the same wrappers (``VecNormalize``, with its statistics
        and ``training=False``); they are reset
    :param n_episodes: how many
    :return: the episodes
    """
    buffer = _EpisodeCollector(model, env, -(-n_episodes // env.num_envs)).collect()
    training_env = model.get_env()
    if training_env is not None and env.unwrapped is training_env.unwrapped:
        # They are not where the model left them
        model._last_obs = training_env.reset()  # type: ignore[assignment]
        model._last_episode_starts = np.ones(training_env.num_envs, dtype=bool)
    return episodes_in(buffer, n_episodes)


def gradient_statistics(
    model: OnPolicyAlgorithm,
    env: VecEnv,
    measured: Mapping[str, UpdateSpec],
    *,
    n_episodes: int = 512,
    reference: str | None = None,
    seed: int | None = None,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    max_bytes: int = 2**29,
) -> dict[str, GradientStatistics]:
    """
    Collect whole episodes once, with the model's policy as it is, and compute the statistics of the policy gradient under
    several formulations on these same episodes.

    The episodes are dealt out into batches. Each batch gives the gradient that an update would take (entropy bonus, value loss
    and clipping aside), its baseline and normalisation computed within the batch. Values are those of the model's critic: what
    a formulation with a value function shows depends on how good the critic is.

    :param model: VPG, A2C, PPO or any other on-policy algorithm of SB3
    :param env: environments like those the model was trained in, with the same wrappers (``VecNormalize``, with its statistics
        and ``training=False``); they are reset
    :param measured: what to measure, by name
    :param n_episodes: number of episodes, at least two batches of each that is measured
    :param reference: name of the one whose gradient over all other data directions are compared with; None: each with its own
    :param seed: of environments, sampled actions and bootstrap
    :param confidence: of the bootstrap intervals, in (0, 1)
    :param n_bootstrap: resamples behind the intervals
    :param max_bytes: memory for gradients, about; formulations are taken in groups that fit
    :return: the statistics, by name
    :raises ValueError: if ``reference`` is not among ``measured``, or there are fewer than two batches of one
    """
    if reference is not None:
        check_choice("reference", reference, measured)
    for name, one in measured.items():
        if n_episodes < 2 * one.episodes_per_batch:
            raise ValueError(
                f"n_episodes={n_episodes} is not enough for two batches of {one.episodes_per_batch} episodes of {name!r}"
            )
    if seed is not None:
        th.manual_seed(seed)
        env.seed(seed)
    episodes = collect_episodes(model, env, n_episodes)
    n_parameters = sum(p.numel() for p in model.policy.parameters())
    options: dict[str, Any] = {"confidence": confidence, "n_bootstrap": n_bootstrap, "seed": seed or 0}

    statistics = {}
    for size in dict.fromkeys(one.episodes_per_batch for one in measured.values()):
        names = [name for name, one in measured.items() if one.episodes_per_batch == size]
        of_reference = None
        if reference is not None:
            like_reference = UpdateSpec(measured[reference].formulation, size, measured[reference].loss_reduction)
            of_reference = batch_gradients(model.policy, episodes, [like_reference])[0]
        n_at_once = max(1, max_bytes // (4 * n_parameters * (n_episodes // size)))
        for start in range(0, len(names), n_at_once):
            group = names[start : start + n_at_once]
            gradients = batch_gradients(model.policy, episodes, [measured[name] for name in group])
            for name, of_one in zip(group, gradients):
                statistics[name] = statistics_of(of_one, of_reference, n_episodes=size, **options)
    return {name: statistics[name] for name in measured}


def batch_gradients(policy: ActorCriticPolicy, episodes: Episodes, measured: Sequence[UpdateSpec]) -> th.Tensor:
    """
    :param policy: the policy that collected the episodes
    :param episodes: whole episodes
    :param measured: what to compute, all with the same number of episodes per batch; episodes that do not fill a batch are
        left out
    :return: the policy gradient of each batch (ascent direction), shape (len(measured), batches, parameters of the actor)
    """
    policy.set_training_mode(False)
    runner, buffer = PolicyRunner(policy), episodes.buffer
    size = measured[0].episodes_per_batch
    n_batches = episodes.indices.shape[1] // size
    gradients = []
    with temporary_distribution(policy):
        parameters = actor_parameters(policy, buffer)
        for batch in range(n_batches):
            columns = slice(batch * size, (batch + 1) * size)
            rollout = Rollout(*(array[:, columns] for array in episodes.rollout))
            recorded = rollout.mask
            weights = np.stack([psi(update, rollout)[recorded] for update in measured])
            gradients.append(weighted_score(runner, parameters, buffer, episodes.indices[:, columns][recorded], weights))
    return th.stack(gradients, dim=1)


def psi(update: UpdateSpec, rollout: Rollout) -> Array:
    """:return: what multiplies grad log pi at each step, the loss reduction included, shape (T, N)"""
    formulation = update.formulation
    if not formulation.uses_value_function:
        nothing = np.zeros_like(rollout.values)
        rollout = rollout._replace(values=nothing, next_values=nothing)
    n_steps, n_segments = rollout.mask.sum(), (rollout.last & rollout.mask).sum()
    return formulation(rollout)[0] / LOSS_REDUCTIONS[update.loss_reduction](n_steps, n_segments)

"""
How noisy is a policy gradient? Statistics of independent estimates of it at a frozen policy.

``g_1 .. g_m`` are the gradients that m independent batches give, each as one update would see it; ``G`` is their expectation
and ``Sigma`` their covariance. All statistics are functions of the inner products ``g_i . g_j`` alone::

    |G|^2       mean of g_i . g_j over i != j               unbiased, unlike the squared norm of the mean
    tr(Sigma)   mean of g_i . g_i  -  |G|^2                 the sample variance, summed over the parameters
    SNR         |G|^2 / tr(Sigma)                           Roberts & Tedrake (2009)
    cosines     mean of cos(g_i, g_j) over i != j           Ilyas et al. (2020), https://arxiv.org/abs/1811.02553
    noise scale episodes per batch x tr(Sigma) / |G|^2      McCandlish et al. (2018), https://arxiv.org/abs/1812.06162
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_vpg.buffers import VPGBufferMixin, buffer_class_for
from sb3_vpg.estimators import Array, Formulation, Rollout, check_choice, piece_index
from sb3_vpg.passes import Passes, forgetting_distributions, passes_of
from sb3_vpg.rollout import RolloutCollector
from sb3_vpg.vpg import LOSS_REDUCTIONS, VPG, check_number

# Inner products are summed over so many parameters at a time, in double precision
GRAM_COLUMNS = 2**16
# The callback computes the gradients of so many parts of a rollout, at most
MAX_GROUPS = 32


class Estimate(NamedTuple):
    """A statistic and its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GradientStatistics:
    """
    Statistics of the gradient that one update would use; see the head of the module.

    :param mean_norm: norm of the mean of all gradients, in which noise is left: its square exceeds \\|G\\|^2 by tr(Sigma) / m
    :param variance: tr(Sigma), the variance of the gradient summed over the parameters
    :param snr: signal-to-noise ratio, \\|G\\|^2 / tr(Sigma); 0 where the noise hides the signal (the estimate of \\|G\\|^2 is
        not positive)
    :param pairwise_cosine: mean cosine of two gradients
    :param cosine_with_reference: mean cosine of a gradient and the mean of the reference's gradients from all *other* data
    :param noise_scale: number of episodes in a batch at which tr(Sigma) would be \\|G\\|^2; infinite where ``snr`` is 0
    """

    mean_norm: Estimate
    variance: Estimate
    snr: Estimate
    pairwise_cosine: Estimate
    cosine_with_reference: Estimate
    noise_scale: Estimate


def statistics_of(
    gradients: th.Tensor,
    reference: th.Tensor | None = None,
    *,
    n_per_update: int = 1,
    n_episodes: float = 1,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> GradientStatistics:
    """
    :param gradients: independent estimates of a gradient, shape (m, number of parameters), m >= 2
    :param reference: what to compare the directions with, estimates from the same data, of the same shape; None for
        ``gradients`` themselves
    :param n_per_update: how many of the estimates one update averages
    :param n_episodes: episodes behind each of the estimates
    :param confidence: of the intervals, in (0, 1)
    :param n_bootstrap: resamples of the m estimates behind the intervals (percentile bootstrap; pairs are pairs of different
        estimates in a resample, too)
    :param seed: of the bootstrap
    :return: the statistics of an update's gradient
    :raises ValueError: if there are fewer than two estimates, or the shapes differ
    """
    reference = gradients if reference is None else reference
    if gradients.ndim != 2 or len(gradients) < 2 or reference.shape != gradients.shape:
        raise ValueError(
            "gradients and reference must have one shape (m, number of parameters) with m >= 2, "
            f"got {tuple(gradients.shape)} and {tuple(reference.shape)}"
        )
    m = len(gradients)
    resamples = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=n_bootstrap)
    # How often each estimate is drawn: first the data themselves, then the resamples
    counts = np.concatenate([np.ones((1, m)), resamples])
    products = _gram(gradients, gradients)

    every_pair = ((counts @ products) * counts).sum(axis=1)
    squares = np.diag(products)
    n_pairs = m**2 - (counts**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal = (every_pair - counts**2 @ squares) / n_pairs
        variance = (counts @ squares / m - signal) / n_per_update
        noise_to_signal = np.where(signal > 0, variance / signal, np.inf)
        cosines = _cosines(products, squares[:, None], squares)
        pairwise_cosine = (((counts @ cosines) * counts).sum(axis=1) - counts**2 @ np.diag(cosines)) / n_pairs
        samples = {
            "mean_norm": np.sqrt(every_pair.clip(min=0)) / m,
            "variance": variance.clip(min=0),
            "snr": 1 / noise_to_signal,
            "pairwise_cosine": pairwise_cosine,
            "cosine_with_reference": _cosines_with_others(products, gradients, reference, counts),
            "noise_scale": noise_to_signal * n_per_update * n_episodes,
        }
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    estimates = {}
    for name, values in samples.items():
        # A resample of one estimate alone has no pairs
        resampled = values[1:][n_pairs[1:] > 0]
        low, high = np.quantile(resampled, tails, method="nearest") if len(resampled) else (np.nan, np.nan)
        estimates[name] = Estimate(float(values[0]), float(low), float(high))
    return GradientStatistics(**estimates)


def _gram(left: th.Tensor, right: th.Tensor) -> Array:
    """:return: inner products of the rows, shape (number of rows, number of rows)"""
    products = sum(
        a.double() @ b.double().T for a, b in zip(left.split(GRAM_COLUMNS, dim=1), right.split(GRAM_COLUMNS, dim=1))
    )
    return products.cpu().numpy()


def _cosines(products: Array, squares: Array, other_squares: Array) -> Array:
    """Cosines from inner products; 0 where one of the vectors is zero and has no direction."""
    norms = np.sqrt(squares.clip(min=0) * other_squares.clip(min=0))
    return np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)


def _cosines_with_others(products: Array, gradients: th.Tensor, reference: th.Tensor, counts: Array) -> Array:
    """:return: mean over i of cos(g_i, sum of the reference's gradients other than the i-th), for each row of ``counts``"""
    if reference is gradients:
        between = among = products
    else:
        between, among = _gram(gradients, reference), _gram(reference, reference)
    # The sum over j with count c_j, less the terms of i itself
    inner = counts @ between.T - counts * np.diag(between)
    toward = counts @ among
    whole = (toward * counts).sum(axis=1, keepdims=True)
    squares = whole - 2 * counts * toward + counts**2 * np.diag(among)
    return (_cosines(inner, np.diag(products), squares) * counts).sum(axis=1) / counts.sum(axis=1)


# ---------------------------------------------------------------------------------------------------------------
# Gradients of many weightings of the same steps
# ---------------------------------------------------------------------------------------------------------------


def actor_parameters(policy: ActorCriticPolicy, buffer: VPGBufferMixin) -> list[th.nn.Parameter]:
    """:return: the policy's parameters on which the log probability of an action depends"""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    log_prob = log_probabilities(Passes(policy), buffer, np.arange(1))
    gradients = th.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients) if gradient is not None]


def log_probabilities(passes: Passes, buffer: VPGBufferMixin, indices: Array) -> th.Tensor:
    samples = buffer._get_samples(indices)
    return passes.evaluate(samples.observations, samples.actions, with_values=False)[1]


def weighted_score(
    passes: Passes,
    parameters: list[th.nn.Parameter],
    buffer: VPGBufferMixin,
    indices: Array,
    weights: Array,
) -> th.Tensor:
    """
    ``sum_t w_t grad log pi(a_t | s_t)`` for several weightings w of the same steps: one pass forward, one vectorised back.

    :param passes: through the policy; with several weightings by its own methods, since the fused layer of the fast passes has
        no vectorised pass back
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
        log_prob = log_probabilities(passes, buffer, indices[chunk])
        directions = th.as_tensor(weights[:, chunk], dtype=log_prob.dtype, device=log_prob.device)
        gradients = th.autograd.grad(log_prob, parameters, directions if several else directions[0], is_grads_batched=several)
        total += th.cat([gradient.reshape(len(weights), -1) for gradient in gradients], dim=1)
    return total


# ---------------------------------------------------------------------------------------------------------------
# Formulations side by side
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
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

    partial_episodes_mode = "finish"
    uses_value_function = True

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
        self.n_episodes = n_episodes
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
    pieces = np.unique(piece_index(buffer.rollout.last).ravel()[recorded], return_inverse=True)[1]
    recorded, pieces = recorded[pieces < n_episodes], pieces[pieces < n_episodes]
    steps = buffer.steps.ravel()[recorded]

    def by_episode(array: Array) -> Array:
        columns = np.zeros((steps.max() + 1, n_episodes), dtype=array.dtype)
        columns[steps, pieces] = array.ravel()[recorded]
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
    measured: Mapping[str, Measured],
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
            like_reference = Measured(measured[reference].formulation, size, measured[reference].loss_reduction)
            of_reference = batch_gradients(model.policy, episodes, [like_reference])[0]
        n_at_once = max(1, max_bytes // (4 * n_parameters * (n_episodes // size)))
        for start in range(0, len(names), n_at_once):
            group = names[start : start + n_at_once]
            gradients = batch_gradients(model.policy, episodes, [measured[name] for name in group])
            for name, of_one in zip(group, gradients):
                statistics[name] = statistics_of(of_one, of_reference, n_episodes=size, **options)
    return {name: statistics[name] for name in measured}


def batch_gradients(policy: ActorCriticPolicy, episodes: Episodes, measured: Sequence[Measured]) -> th.Tensor:
    """
    :param policy: the policy that collected the episodes
    :param episodes: whole episodes
    :param measured: what to compute, all with the same number of episodes per batch; episodes that do not fill a batch are
        left out
    :return: the policy gradient of each batch (ascent direction), shape (len(measured), batches, parameters of the actor)
    """
    policy.set_training_mode(False)
    passes, buffer = Passes(policy), episodes.buffer
    size = measured[0].episodes_per_batch
    n_batches = episodes.indices.shape[1] // size
    gradients = []
    with forgetting_distributions(policy):
        parameters = actor_parameters(policy, buffer)
        for batch in range(n_batches):
            columns = slice(batch * size, (batch + 1) * size)
            rollout = Rollout(*(array[:, columns] for array in episodes.rollout))
            recorded = rollout.mask
            weights = np.stack([psi(one, rollout)[recorded] for one in measured])
            gradients.append(weighted_score(passes, parameters, buffer, episodes.indices[:, columns][recorded], weights))
    return th.stack(gradients, dim=1)


def psi(measured: Measured, rollout: Rollout) -> Array:
    """:return: what multiplies grad log pi at each step, the loss reduction included, shape (T, N)"""
    formulation = measured.formulation
    if not formulation.uses_value_function:
        nothing = np.zeros_like(rollout.values)
        rollout = rollout._replace(values=nothing, next_values=nothing)
    n = (rollout.last & rollout.mask).sum() if measured.loss_reduction == "trajectory" else rollout.mask.sum()
    return formulation(rollout)[0] / n


# ---------------------------------------------------------------------------------------------------------------
# During training
# ---------------------------------------------------------------------------------------------------------------


class GradientStatisticsCallback(BaseCallback):
    """
    Logs statistics of VPG's policy gradient, for the formulation in training, under ``gradient/``: from the rollout that the
    update uses, without further steps in the environment. The independent estimates are those of the episodes of the rollout,
    or of the pieces of episodes that lie in it, taken together where there are more than 32; ``gradient/noise_scale`` counts
    episodes or pieces. A rollout with fewer than two of them logs nothing. Baselines and normalisation that look at other
    episodes of the batch make the estimates not quite independent; :func:`gradient_statistics` is exact there.

    It costs one more pass of the rollout through the policy, forward and back in up to 32 parts, every ``every_n_rollouts``
    rollouts.

    :param every_n_rollouts: how often, >= 1
    :raises ValueError: if that is another number, or the model is not a VPG with a buffer of its own
    """

    def __init__(self, every_n_rollouts: int = 10, verbose: int = 0):
        super().__init__(verbose)
        check_number("every_n_rollouts", every_n_rollouts, low=1, integer=True)
        self.every_n_rollouts = every_n_rollouts

    def _init_callback(self) -> None:
        if not isinstance(self.model, VPG) or not isinstance(self.model.rollout_buffer, VPGBufferMixin):
            raise ValueError("GradientStatisticsCallback is for VPG with one of its own rollout buffers")
        self.n_rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.n_rollouts += 1
        if (self.n_rollouts - 1) % self.every_n_rollouts == 0:
            statistics = rollout_statistics(self.model)  # type: ignore[arg-type]
            if statistics is not None:
                for field in fields(statistics):
                    self.logger.record(f"gradient/{field.name}", getattr(statistics, field.name).value)


def rollout_statistics(model: VPG, n_bootstrap: int = 0) -> GradientStatistics | None:
    """
    Statistics of the gradient of the rollout in the model's buffer, from the episodes (whole or in part) in it.

    :param model: VPG with a rollout, before its update
    :param n_bootstrap: resamples behind the intervals; 0 for no intervals
    :return: None if there are fewer than two episodes in the rollout
    """
    buffer = model.rollout_buffer
    if not isinstance(buffer, VPGBufferMixin) or buffer.n_pieces < 2:
        return None
    model.policy.set_training_mode(False)
    groups = np.array_split(np.arange(buffer.n_pieces), min(buffer.n_pieces, MAX_GROUPS))
    # The mean over groups is then the gradient of the update
    scale = len(groups) / (buffer.n_pieces if model.loss_reduction == "trajectory" else buffer.n_recorded)
    weights = scale * buffer.normalized_advantages(model.processes).reshape(1, -1)
    passes, pieces = passes_of(model.policy), steps_of_pieces(buffer)
    gradients = []
    with forgetting_distributions(model.policy):
        parameters = actor_parameters(model.policy, buffer)
        for group in groups:
            indices = np.concatenate([pieces[piece] for piece in group])
            gradients.append(weighted_score(passes, parameters, buffer, indices, weights[:, indices])[0])
    return statistics_of(
        th.stack(gradients),
        n_per_update=len(groups),
        n_episodes=buffer.n_pieces / len(groups),
        n_bootstrap=n_bootstrap,
    )


def steps_of_pieces(buffer: VPGBufferMixin) -> list[Array]:
    """:return: the recorded steps of each piece, counted in order of time, then of environment"""
    recorded = np.flatnonzero(buffer.mask)
    pieces = piece_index(buffer.rollout.last).ravel()[recorded]
    order = np.argsort(pieces, kind="stable")
    return np.split(recorded[order], np.flatnonzero(np.diff(pieces[order])) + 1)

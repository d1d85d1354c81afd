"""Compare the policy gradients of several formulations at the same policy, on the same episodes."""

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
from sb3_vpg.common.policy_inputs import METHOD, inputs_of, is_maskable
from sb3_vpg.common.policy_runner import PolicyRunner, gradients_in_evaluation_mode
from sb3_vpg.common.recurrent_runner import RecurrentRunner, is_recurrent, zero_states
from sb3_vpg.diagnostics.statistics import GradientStatistics, statistics_of
from sb3_vpg.estimators import Array, Formulation, Rollout, segment_index
from sb3_vpg.keywords import LOSS_REDUCTIONS, PARTIAL_EPISODES, Plan
from sb3_vpg.rollout import RecurrentRolloutCollector, RolloutCollector


def actor_parameters(runner: PolicyRunner, buffer: VPGBufferMixin) -> list[th.nn.Parameter]:
    """:return: the policy's parameters on which the log probability of an action depends"""
    parameters = [p for p in runner.policy.parameters() if p.requires_grad]
    log_prob = log_probabilities(runner, buffer, np.arange(1))
    if not log_prob.requires_grad:
        return []
    gradients = th.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients) if gradient is not None]


def log_probabilities(runner: PolicyRunner, buffer: VPGBufferMixin, indices: Array) -> th.Tensor:
    """:return: log probabilities of the actions at these steps, shape (n,)"""
    samples = buffer._get_samples(indices)
    return runner.evaluate(samples.observations, samples.actions, with_values=False, **inputs_of(samples))[1]


def weighted_score(
    runner: PolicyRunner,
    parameters: list[th.nn.Parameter],
    buffer: VPGBufferMixin,
    indices: Array,
    weights: Array,
) -> th.Tensor:
    """
    Compute ``sum_t w_t grad log pi(a_t | s_t)`` for several weightings w of the same steps, with one forward pass and one
    vectorized backward pass.

    :param runner: runs the policy. With several weightings it must be a plain :class:`PolicyRunner`: the fused layers of
        :class:`FastPolicyRunner` have no vectorized backward pass.
    :param parameters: the parameters with respect to which the gradient is computed
    :param buffer: a rollout
    :param indices: indices of steps in the rollout, see :meth:`VPGBufferMixin.batch_indices`, shape (n,). For a recurrent
        policy: whole segments, each in order of time
    :param weights: w_t for each weighting, shape (number of weightings, n)
    :return: shape (number of weightings, number of scalars in ``parameters``)
    """
    # The backward pass needs memory for all weightings at once. Sequences are not split
    chunk_size = len(indices) if runner.sequences else max(1, buffer.chunk_size // len(weights))
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
    Specification of an update whose gradient is measured.

    :param formulation: the formulation, with its gamma and lambda
    :param episodes_per_batch: number of whole episodes in the batch of one update, >= 1. Typical: 1 to 64.
    :param loss_reduction: "mean" or "trajectory", see VPG's keyword
    :raises ValueError: if ``episodes_per_batch`` or ``loss_reduction`` has another value
    """

    formulation: Formulation
    episodes_per_batch: int = 16
    loss_reduction: str = "mean"

    def __post_init__(self) -> None:
        check_number("episodes_per_batch", self.episodes_per_batch, low=1, integer=True)
        check_choice("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)


class Episodes(NamedTuple):
    """
    Whole episodes, one per column.

    :param rollout: arrays of shape (longest episode, number of episodes)
    :param indices: index of each step in the buffer, see :meth:`VPGBufferMixin.batch_indices`; same shape
    :param buffer: the buffer
    """

    rollout: Rollout
    indices: Array
    buffer: VPGBufferMixin


class _EpisodeCollector(RolloutCollector):
    """Collects whole episodes with the policy of a model. The model itself is not changed."""

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
        # sb3-contrib's MaskablePPO has no such attribute
        self.use_masking = getattr(model, "use_masking", is_maskable(model.policy) and env.has_attr(METHOD))
        self.plan = Plan(Formulation("gae"), PARTIAL_EPISODES["finish"], n_episodes)
        self.max_episode_steps = getattr(model, "max_episode_steps", self.max_episode_steps)
        self._episode_steps = np.zeros(self.n_envs, dtype=np.int64)
        self._stepped_since_reset = True
        self.rollout_buffer = buffer_class_for(self.observation_space)(
            self.n_steps, self.observation_space, self.action_space, self.device, n_envs=self.n_envs
        )
        self.set_logger(Logger(folder=None, output_formats=[]))

    def collect(self) -> VPGBufferMixin:
        _, callback = self._setup_learn(total_timesteps=0)
        env, buffer = self.get_env(), self.rollout_buffer
        self.collect_rollouts(env, callback, buffer, self.n_steps)  # type: ignore[arg-type]
        return buffer  # type: ignore[return-value]


class _RecurrentEpisodeCollector(RecurrentRolloutCollector, _EpisodeCollector):
    """Collects whole episodes with a recurrent policy."""


def episodes_in(buffer: VPGBufferMixin, n_episodes: int) -> Episodes:
    """
    :param buffer: a rollout of whole episodes
    :param n_episodes: number of episodes to extract
    :return: the first ``n_episodes`` episodes, ordered by environment
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
    Collect whole episodes with the model's current policy. Each environment gives the same number of episodes (rounded up):
    taking the first episodes that end in any environment would favor short ones.

    :param model: VPG, A2C, PPO or any other on-policy algorithm of SB3
    :param env: environments like those in which the model was trained, with the same wrappers (``VecNormalize`` with its
        statistics and ``training=False``); they are reset
    :param n_episodes: number of episodes, >= 1
    :return: the episodes
    :raises ValueError: if ``env`` is not vectorized, or ``n_episodes`` is not allowed
    """
    check_number("n_episodes", n_episodes, low=1, integer=True)
    _check_vec_env(env)
    collector = _RecurrentEpisodeCollector if is_recurrent(model.policy) else _EpisodeCollector
    own_env = model.get_env()
    # The model's training environments, if their episodes are interrupted
    interrupted = own_env if own_env is not None and env.unwrapped is own_env.unwrapped else None
    if interrupted is not None:
        # After an error, too, they have to be reset
        model._last_obs = None
    buffer = collector(model, env, -(-n_episodes // env.num_envs)).collect()
    if interrupted is not None:
        model._last_obs = interrupted.reset()  # type: ignore[assignment]
        model._last_episode_starts = np.ones(interrupted.num_envs, dtype=bool)
    return episodes_in(buffer, n_episodes)


def _check_vec_env(env: Any) -> None:
    if not isinstance(env, VecEnv):
        raise ValueError(f"env must be a VecEnv, not {env}: make it with stable_baselines3.common.env_util.make_vec_env")


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
    Collect whole episodes once, with the model's current policy, and compute the statistics of the policy gradient for
    several formulations on these episodes.

    The episodes are split into batches. Each batch gives the policy gradient of one update, without entropy bonus, value loss
    and clipping. Baseline and normalization are computed within the batch. Values are those of the model's critic, so the
    statistics of a formulation with a value function depend on the quality of the critic.

    :param model: VPG, A2C, PPO or any other on-policy algorithm of SB3 or sb3-contrib. The gradient of a recurrent policy goes
        back through time to the beginning of each episode.
    :param env: environments like those in which the model was trained, with the same wrappers (``VecNormalize`` with its
        statistics and ``training=False``); they are reset
    :param measured: the updates whose gradients are measured, by name
    :param n_episodes: number of episodes, at least two batches of each update. Typical: 128 to 4096. Larger: narrower
        intervals, more time.
    :param reference: name of the update with whose gradient over all other batches directions are compared; None to compare
        each gradient with its own formulation
    :param seed: seed of environments, sampled actions and bootstrap
    :param confidence: confidence level of the bootstrap intervals, in (0, 1]
    :param n_bootstrap: number of bootstrap resamples. Typical: 1000 to 10000. Larger: more accurate interval ends.
        0: no intervals
    :param max_bytes: approximate limit on the memory for gradients; formulations are processed in groups that fit
    :return: the statistics, by name
    :raises ValueError: if ``env`` is not vectorized, a number is outside its range, ``reference`` is not in ``measured``,
        ``n_episodes`` gives fewer than two batches of an update, or all parameters of the actor are frozen
    """
    _check_vec_env(env)
    check_updates(measured, n_episodes, reference)
    check_number("confidence", confidence, low=0, high=1, low_included=False)
    check_number("n_bootstrap", n_bootstrap, low=0, integer=True)
    devices = [model.device] if model.device.type == "cuda" else []
    # With a seed, the random numbers of training go on where they were
    with th.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            th.manual_seed(seed)
            env.seed(seed)
        episodes = collect_episodes(model, env, n_episodes)
    n_parameters = sum(p.numel() for p in model.policy.parameters())
    options: dict[str, Any] = {"confidence": confidence, "n_bootstrap": n_bootstrap, "seed": seed or 0}

    statistics = {}
    for size in dict.fromkeys(update.episodes_per_batch for update in measured.values()):
        names = [name for name, update in measured.items() if update.episodes_per_batch == size]
        reference_gradients = None
        if reference is not None:
            reference_update = UpdateSpec(measured[reference].formulation, size, measured[reference].loss_reduction)
            reference_gradients = batch_gradients(model.policy, episodes, [reference_update])[0]
        n_at_once = max(1, max_bytes // (4 * n_parameters * (n_episodes // size)))
        for start in range(0, len(names), n_at_once):
            group = names[start : start + n_at_once]
            gradients = batch_gradients(model.policy, episodes, [measured[name] for name in group])
            for name, update_gradients in zip(group, gradients):
                statistics[name] = statistics_of(update_gradients, reference_gradients, n_episodes=size, **options)
    return {name: statistics[name] for name in measured}


def check_updates(measured: Mapping[str, UpdateSpec], n_episodes: int, reference: str | None) -> None:
    """
    Check arguments of :func:`gradient_statistics`.

    :raises ValueError: see there
    """
    check_number("n_episodes", n_episodes, low=1, integer=True)
    if reference is not None:
        check_choice("reference", reference, measured)
    for name, update in measured.items():
        if not isinstance(update, UpdateSpec):
            raise ValueError(f"measured={name!r} must be an UpdateSpec, not {update!r}")
        if n_episodes < 2 * update.episodes_per_batch:
            raise ValueError(
                f"n_episodes={n_episodes} is not enough for two batches of {update.episodes_per_batch} episodes of {name!r}; "
                f"allowed: at least {2 * update.episodes_per_batch}"
            )


def batch_gradients(policy: ActorCriticPolicy, episodes: Episodes, measured: Sequence[UpdateSpec]) -> th.Tensor:
    """
    :param policy: the policy that collected the episodes
    :param episodes: whole episodes. The last ones, if they do not fill a batch, are not used.
    :param measured: the updates whose gradients are computed, all with the same ``episodes_per_batch``
    :return: the policy gradient of each batch (ascent direction), shape (len(measured), batches, parameters of the actor)
    """
    buffer = episodes.buffer
    # An episode begins with states of zero
    runner = RecurrentRunner(policy, zero_states(policy, buffer.n_envs)) if is_recurrent(policy) else PolicyRunner(policy)
    size = measured[0].episodes_per_batch
    n_batches = episodes.indices.shape[1] // size
    gradients = []
    with gradients_in_evaluation_mode(policy):
        parameters = actor_parameters(runner, buffer)
        if not parameters:
            raise ValueError(
                "All parameters of the actor are frozen (requires_grad=False), so there is no gradient to measure"
            )
        for batch in range(n_batches):
            columns = slice(batch * size, (batch + 1) * size)
            rollout = Rollout(*(array[:, columns] for array in episodes.rollout))
            # One episode after the other, each in order of time
            recorded = rollout.mask.T
            weights = np.stack([psi(update, rollout).T[recorded] for update in measured])
            gradients.append(weighted_score(runner, parameters, buffer, episodes.indices[:, columns].T[recorded], weights))
    return th.stack(gradients, dim=1)


def psi(update: UpdateSpec, rollout: Rollout) -> Array:
    """:return: the weight of grad log pi at each step, including the loss reduction, shape (T, N)"""
    formulation = update.formulation
    if not formulation.uses_value_function:
        zeros = np.zeros_like(rollout.values)
        rollout = rollout._replace(values=zeros, next_values=zeros)
    n_steps, n_segments = rollout.mask.sum(), (rollout.last & rollout.mask).sum()
    return formulation(rollout)[0] / LOSS_REDUCTIONS[update.loss_reduction](n_steps, n_segments)

"""Vanilla policy gradient for Stable-Baselines3."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance

from sb3_vpg.buffers import buffer_class_for
from sb3_vpg.common.checks import check_policy_class, non_finite_update_error
from sb3_vpg.common.collectives import current_processes
from sb3_vpg.common.layers import buffers_kept_on_error, needs_whole_batch
from sb3_vpg.common.optimization import ParameterGroups, check_trainable, fuse_adam, n_parts, set_learning_rates
from sb3_vpg.common.policy_inputs import Samples, ValueSamples, inputs_of, map_obs
from sb3_vpg.common.policy_runner import PolicyRunner
from sb3_vpg.common.progress_bar import with_progress_of_all_ranks
from sb3_vpg.common.random_states import set_random_states
from sb3_vpg.common.threads import accumulate_gradients
from sb3_vpg.common.value_scale import ValueScale, check_linear_value_net, scaled_values
from sb3_vpg.keywords import as_schedule, check_batch, make_plan, scheduled_values
from sb3_vpg.policies import CnnPolicy, LogisticPolicy, MlpPolicy, MultiInputPolicy, TanhMeanPolicy
from sb3_vpg.rollout import RolloutCollector

SelfVPG = TypeVar("SelfVPG", bound="VPG")

# Maximum number of steps on which the KL divergence of an update is computed
KL_STEPS = 1024


class VPG(RolloutCollector):
    """
    Vanilla Policy Gradient: REINFORCE and related algorithms. Keywords select the reward formulation.

    Each rollout gives one gradient step on ``-mean(A_t log pi(a_t | s_t))``, plus entropy bonus and value loss. The advantage
    A_t is psi_t, which ``estimator`` selects, minus the ``baseline``; :mod:`sb3_vpg.estimators` has the equations.

    Papers: REINFORCE, Williams (1992), https://doi.org/10.1007/BF00992696; policy gradient theorem, Sutton et al. (1999);
    GAE and the list of formulations, Schulman et al. (2016), https://arxiv.org/abs/1506.02438

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, LogisticPolicy, TanhMeanPolicy or a class)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0).
        Typical: 3e-4 to 3e-2. Larger values learn faster and less reliably.
    :param n_steps: Number of steps of each environment per update (batch size is n_steps * n_envs). A minimum if episodes are
        finished; not used with ``n_episodes``. Typical: 16 to 2048. Larger: less variance, fewer updates.
    :param gamma: Discount factor, in [0, 1]. Typical: 0.9 to 0.999. Larger: longer horizon, more variance.
    :param gae_lambda: Trade-off of bias and variance in GAE, in [0, 1]; used by estimator="gae" only. Typical: 0.9 to 1.
        Larger: less bias, more variance.
    :param ent_coef: Entropy coefficient for the loss calculation, a float or a function of the current progress remaining
        (from 1 to 0). Typical: 0 to 0.01. Larger: more exploration.
    :param vf_coef: Value function coefficient for the loss calculation, >= 0. Typical: 0.25 to 1.
    :param max_grad_norm: Maximum norm of the gradient, clipped separately for actor and critic. Typical: 0.5 to 2; None for
        no clipping. Smaller: less influence of outliers.
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout)
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected. A class that is
        not derived from VPG's computes its own advantages, as with A2C, and requires estimator="gae".
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation.
    :param normalize_advantage: Whether to standardize the advantages: False, True or "batch" (over the whole batch), "episode"
        (within each episode)
    :param stats_window_size: Number of episodes over which success rate, episode length and reward are averaged in the log
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run. With "auto", the GPU is used if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param estimator: psi_t, the weight of grad log pi: "total_return", "reward_to_go", "td_residual" or "gae"
    :param baseline: Subtracted from psi_t: None, "mean", "time", "leave_one_out" or "value". "td_residual" and "gae" use the
        value function by definition.
    :param n_episodes: Number of whole episodes of each environment per update, >= 1; None to use ``n_steps``.
        Typical: 1 to 16. Larger: less variance, fewer updates.
    :param partial_episodes: Treatment of episodes that are still running after ``n_steps``: "bootstrap" (cut them and add the
        value of the last observation), "finish" (continue until they end), "truncate" (cut them; biased). Default:
        "bootstrap" if the formulation uses a value function and does not need whole episodes, else "finish".
    :param discount_state_distribution: Whether to weight step t of an episode by gamma^t, which gives the unbiased gradient of
        the discounted return. No effect with estimator="total_return", which already discounts from the start.
    :param loss_reduction: "mean" over the steps of the batch, or "trajectory" (sum over the steps, divided by the number of
        episodes, whole or in part). The value loss is always a mean over steps.
    :param n_critic_updates: Passes of the value regression per rollout, >= 1. The first is part of the joint loss; the others
        change only parameters that the actor does not use. Typical: 1 to 20. Larger: a more accurate critic, slower updates.
    :param critic_batch_size: Minibatch size of the further passes. Smaller: more critic steps. None for one step in each pass,
        on the full batch or, beyond 4096 steps (if no LSTM, and no buffer of your own), on an evenly spaced part of it.
    :param critic_learning_rate: Learning rate of the parameters that only the critic uses, a float or a function of the
        progress remaining; None for ``learning_rate``. Typical: 1e-3 to 1e-2.
    :param scale_value_targets: Whether to divide the targets of the value regression by their running standard deviation.
        Useful if returns are large and rewards are not normalized. Requires a linear ``policy.value_net``. See
        :class:`sb3_vpg.common.value_scale.ValueScale`.
    :raises ValueError: if a keyword has a value that is not allowed, alone or together with others
    """

    identifying_keyword = "estimator"
    supported_action_spaces: tuple = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
        "LogisticPolicy": LogisticPolicy,
        "TanhMeanPolicy": TanhMeanPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 2e-3,
        n_steps: int = 64,
        gamma: float = 0.98,
        gae_lambda: float = 0.95,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | None = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool | str = True,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        estimator: str = "gae",
        baseline: str | None = None,
        n_episodes: int | None = None,
        partial_episodes: str | None = None,
        discount_state_distribution: bool = False,
        loss_reduction: str = "mean",
        n_critic_updates: int = 10,
        critic_batch_size: int | None = None,
        critic_learning_rate: float | Schedule | None = None,
        scale_value_targets: bool = False,
    ):
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=self.supported_action_spaces,
        )

        self.normalize_advantage = normalize_advantage
        self.estimator = estimator
        self.baseline = baseline
        self.n_episodes = n_episodes
        self.partial_episodes = partial_episodes
        self.discount_state_distribution = discount_state_distribution
        self.loss_reduction = loss_reduction
        self.n_critic_updates = n_critic_updates
        self.critic_batch_size = critic_batch_size
        self.critic_learning_rate = critic_learning_rate
        self.scale_value_targets = scale_value_targets
        self.value_scale = ValueScale()

        if _init_setup_model:
            self._setup_model()
            check_batch(self)

    def _setup_model(self) -> None:
        check_policy_class(self)
        self.processes = current_processes()
        self.plan = make_plan(self)
        if self.rollout_buffer_class is None:
            self.rollout_buffer_class = buffer_class_for(self.observation_space)
        super()._setup_model()
        if self.scale_value_targets:
            check_linear_value_net(self.policy)
        self._parameter_groups = ParameterGroups()
        self._parameter_groups.refresh(self.policy)
        fuse_adam(self.policy.optimizer)
        set_learning_rates(self.policy.optimizer, scheduled_values(self, 1.0))
        needs_whole_batch(self.policy, self.processes.size)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        # A callback may have changed keywords
        self.plan = make_plan(self)
        check_batch(self)
        return super().collect_rollouts(*args, **kwargs)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = as_schedule(self.learning_rate)
        separate = self.critic_learning_rate is not None
        self.critic_lr_schedule = as_schedule(self.critic_learning_rate) if separate else self.lr_schedule
        scheduled_values(self, 1.0)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_parameter_groups"]

    def train(self) -> None:
        """
        Update policy using the currently gathered rollout buffer: one gradient step over the whole data, then
        ``n_critic_updates - 1`` further passes of the value regression.

        :raises ValueError: if a learning rate, loss or gradient is not finite, or all parameters are frozen
        """
        groups = self._parameter_groups
        groups.refresh(self.policy)
        roles = ["actor", "critic"] if self.plan.uses_value_function else ["actor"]
        check_trainable(p for role in roles for p in getattr(groups, role))
        self._update_schedules()
        runner = self._make_runner()
        # Switch to train mode (this affects batch norm / dropout)
        runner.set_training_mode(True)
        n_chunks = -(-self.recorder.n_recorded // self.recorder.chunk_size)
        n_threads = min(th.get_num_threads(), n_chunks) if runner.single_threaded else 1
        n_steps, n_segments, n_episodes = self._batch_counts()
        with runner.threads(), scaled_values(self):
            # 1. Gradient of policy loss, entropy bonus and value loss over the whole batch
            groups.zero_grad("actor", "critic")
            with buffers_kept_on_error(self.policy):
                losses, (obs, actions, inputs) = self._accumulate_gradients(runner, n_steps, n_segments, n_threads)
                policy_grad_norm = self._clip_gradient("actor")
                value_grad_norm = self._clip_gradient("critic")

            # 2. One step of the policy. Its KL divergence is computed in evaluation mode, in which the policy acts
            runner.set_training_mode(False)
            policy_before = runner.snapshot(obs, actions, **inputs)
            groups.step(*roles)
            self._n_updates += 1
            kl = runner.kl_divergence(policy_before, runner.snapshot(obs, actions, **inputs))

            # 3. Further passes of the value regression
            if self.n_critic_updates > 1 and self.plan.uses_value_function and any(p.requires_grad for p in groups.critic):
                runner.set_training_mode(True, groups.critic)
                self._fit_critic(runner, n_steps)
                runner.set_training_mode(False)

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, loss in losses.items():
            self.logger.record(f"train/{name}", loss)
        self.logger.record("train/kl_divergence", kl)
        self.logger.record("train/policy_grad_norm", policy_grad_norm)
        if self.plan.uses_value_function:
            explained_var = explained_variance(self.recorder.recorded_values, self.recorder.recorded_returns)
            self.logger.record("train/explained_variance", explained_var)
            self.logger.record("train/value_grad_norm", value_grad_norm)
        self.logger.record("train/episodes_per_update", n_episodes)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may exceed the budget. SB3 passes negative progress to schedules then
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _update_schedules(self) -> None:
        values = scheduled_values(self, self._current_progress_remaining)
        set_learning_rates(self.policy.optimizer, values)
        self.logger.record("train/learning_rate", values["learning_rate"])
        if self.critic_learning_rate is not None:
            self.logger.record("train/critic_learning_rate", values["critic_learning_rate"])
        if callable(self.ent_coef):
            self.logger.record("train/ent_coef", values["ent_coef"])

    def _accumulate_gradients(
        self, runner: PolicyRunner, n_steps: int, n_segments: int, n_threads: int = 1
    ) -> tuple[dict[str, float], tuple[Any, th.Tensor, dict[str, th.Tensor]]]:
        """
        Add the gradient of policy loss, entropy bonus and value loss over the whole batch to the parameters' gradients.

        :param n_steps: number of steps in the batch of all processes
        :param n_segments: number of episodes (whole or in part) in it
        :return: the losses, under the names that A2C logs; a part of the policy's inputs, for the KL divergence
        :raises ValueError: if a loss is not finite
        """
        weight = 1 / self.plan.batch_divisor(n_steps, n_segments)
        ent_coef = as_schedule(self.ent_coef)(self._current_progress_remaining)
        sigma = self.value_scale.sigma

        def compute_gradient(batch: Samples) -> tuple[Any, tuple[Samples, dict[str, th.Tensor]]]:
            evaluation = runner.evaluation(
                batch.observations, batch.actions, self.plan.uses_value_function, **inputs_of(batch)
            )
            values, log_prob, entropy = evaluation.values, evaluation.log_prob, evaluation.entropy
            # The loss is -mean(A_t log pi(a_t | s_t)) - ent_coef mean(entropy_t) + vf_coef mean((y_t - V(s_t))^2).
            # Its gradient follows from its derivatives by log pi, entropy and V
            policy_loss = -(batch.advantages * log_prob).sum() * weight
            by_log_prob, by_entropy, by_values = -weight * batch.advantages, -weight * ent_coef, None
            if entropy is None:
                # Approximate entropy when no analytical form
                entropy, by_log_prob = -log_prob, by_log_prob - by_entropy
            parts = {"entropy_loss": -entropy.sum() / n_steps, "policy_loss": policy_loss}
            if values is not None:
                errors = values - batch.returns / sigma
                parts["value_loss"] = sigma**2 * (errors**2).sum() / n_steps
                by_values = 2 * self.vf_coef / n_steps * errors
            return evaluation.gradient(by_values, by_log_prob, by_entropy), (batch, parts)

        losses: dict[str, float] = defaultdict(float)
        parameters = [*self._parameter_groups.actor, *self._parameter_groups.critic]
        batch: Samples
        batches = self.recorder.get_normalized(self._chunk_size(runner), self.processes)
        for batch, parts in accumulate_gradients(compute_gradient, batches, parameters, n_threads):  # noqa: B007
            for name, loss in parts.items():
                losses[name] += float(loss)
        losses = self.processes.sum_gradients(parameters, losses)
        for name, total in losses.items():
            self._check_finite_update(name, total)
        # The first sequences, or evenly spaced steps
        sample = slice(KL_STEPS) if runner.sequences else slice(None, None, -(-len(batch.actions) // KL_STEPS))
        inputs = {key: array[sample] for key, array in inputs_of(batch).items()}
        return losses, (map_obs(lambda obs: obs[sample], batch.observations), batch.actions[sample], inputs)

    def _fit_critic(self, runner: PolicyRunner, n_steps: int) -> None:
        """Further passes of the value regression. They change only parameters that the actor does not use."""
        groups = self._parameter_groups
        for chunks, n in self._critic_batches(self._chunk_size(runner), n_steps):

            def compute_gradient(chunk: ValueSamples, weight: float = 2 * self.vf_coef / n) -> tuple[Any, None]:
                # The loss is vf_coef mean((y_t - V(s_t))^2)
                evaluation = runner.value_evaluation(chunk.observations, **inputs_of(chunk))
                return evaluation.gradient(weight * (evaluation.values - chunk.returns / self.value_scale.sigma)), None

            groups.zero_grad("critic")
            list(accumulate_gradients(compute_gradient, chunks, groups.critic))
            self.processes.sum_gradients(groups.critic, {})
            self._clip_gradient("critic", policy_step_taken=True)
            groups.step("critic")

    def _critic_batches(self, chunk_size: int | None, n_steps: int) -> Iterator[tuple[list[ValueSamples], int]]:
        """
        Yield the batches of the further passes. They are split across the processes in proportion to their steps.

        :return: chunks of the part of this process (none if it has no steps left), and the number of steps of all parts
        """
        count = n_parts(n_steps, self.n_envs)

        @functools.lru_cache(maxsize=1)
        def part(k: int) -> list[ValueSamples]:
            return list(self.recorder.get_value_samples(chunk_size, shuffle=False, part=(k, count)))

        own: Iterable[list[ValueSamples]]
        for n_pass in range(self.n_critic_updates - 1):
            if self.critic_batch_size is None:
                own, n_batches = [part(n_pass % count)], 1
            else:
                size = -(-self.critic_batch_size * self.recorder.n_recorded // n_steps)
                own = ([batch] for batch in self.recorder.get_value_samples(size))
                n_batches = -(-n_steps // self.critic_batch_size)
            for _, chunks in itertools.zip_longest(range(n_batches), own):
                n = n_steps
                if n_batches > 1 or count > 1:
                    n = int(self.processes.sum(np.array(sum(len(chunk.returns) for chunk in chunks or ()))))
                if n > 0:
                    yield chunks or [], n

    def _chunk_size(self, runner: PolicyRunner) -> int | None:
        """:return: number of steps that the networks process at a time; None for all"""
        whole = needs_whole_batch(self.policy, self.processes.size)
        return None if whole else self.recorder.chunk_size * runner.threads_per_operation

    def _batch_counts(self) -> tuple[int, int, int]:
        """:return: number of steps, of segments and of episodes that ended, in the batch of all processes"""
        own = (self.recorder.n_recorded, self.recorder.n_segments, self.recorder.n_episodes)
        return tuple(self.processes.sum(np.array(own)).astype(int).tolist())

    def _clip_gradient(self, role: str, policy_step_taken: bool = False) -> float:
        """
        :return: norm of the gradient before clipping
        :raises ValueError: if the norm is not finite
        """
        norm = self._parameter_groups.gradient(role).clip(self.max_grad_norm)
        self._check_finite_update({"actor": "policy gradient", "critic": "value gradient"}[role], norm, policy_step_taken)
        return norm

    def _check_finite_update(self, name: str, value: float, policy_step_taken: bool = False) -> None:
        if not math.isfinite(value):
            self.policy.optimizer.zero_grad()
            update = self._n_updates if policy_step_taken else self._n_updates + 1
            raise non_finite_update_error(name, value, update, self.num_timesteps, policy_step_taken)

    def learn(
        self: SelfVPG,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 10,
        tb_log_name: str = "VPG",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfVPG:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "VPG",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("The model has no environment: call set_env(env), or load it with load(path, env=env)")
        if self._resumes and not reset_num_timesteps:
            set_random_states(self._random_states, self.env)
            if self.processes.rank > 0:
                # All ranks have restored the same states, so the others draw a new seed
                self.set_random_seed(int(th.randint(2**31, ())))
        self._resumes = False
        self.processes.start_training(self, total_timesteps)
        if self.processes.rank > 0:
            # Only rank 0 logs
            self.verbose, self.tensorboard_log, progress_bar = 0, None, False
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if progress_bar and self.processes.size > 1:
            # SB3's progress bar counts the steps of one process only
            callback, progress_bar = with_progress_of_all_ranks(callback), False
        return super()._init_callback(callback, progress_bar)

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(self.processes.seed(seed, self.n_envs))
        # A seed takes precedence over the random states of a saved model
        self._resumes = False

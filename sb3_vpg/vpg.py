"""Vanilla policy gradient for Stable-Baselines3."""

import io
import itertools
import math
import operator
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import (
    DictRolloutBufferSamples,
    GymEnv,
    MaybeCallback,
    RolloutBufferSamples,
    Schedule,
)
from stable_baselines3.common.utils import FloatSchedule, explained_variance, obs_as_tensor

from sb3_vpg import distributed
from sb3_vpg.buffers import VPGBufferMixin, VPGRolloutBuffer, buffer_class_for, map_obs
from sb3_vpg.callbacks import ProgressBarOfAllRanks
from sb3_vpg.estimators import NORMALIZATIONS, Formulation, check_choice
from sb3_vpg.passes import Passes, forgetting_distributions, passes_of
from sb3_vpg.policies import CnnPolicy, LogisticPolicy, MlpPolicy, MultiInputPolicy
from sb3_vpg.random_states import get_random_states, set_random_states
from sb3_vpg.rollout import RolloutCollector
from sb3_vpg.saving import check_model_file, fit_optimizer_state, model_path, named_optimizer_state, replacing
from sb3_vpg.threads import accumulate_gradients

SelfVPG = TypeVar("SelfVPG", bound="VPG")
Samples = RolloutBufferSamples | DictRolloutBufferSamples

PARTIAL_EPISODES = (None, "bootstrap", "finish", "truncate")
LOSS_REDUCTIONS = ("mean", "trajectory")
# Since PyTorch 2.4
FUSED_ADAM_ON_CPU = tuple(map(int, th.__version__.split(".")[:2])) >= (2, 4)
# The KL divergence of an update is measured on this many steps of the rollout, at most
KL_STEPS = 1024


class VPG(RolloutCollector):
    """
    Vanilla Policy Gradient: REINFORCE and its relatives, with the reward formulation as a switch.

    Each rollout is used for one gradient step on ``-mean(psi_t log pi(a_t | s_t))``, plus entropy bonus and value loss.
    ``estimator`` and ``baseline`` choose psi_t, see :mod:`sb3_vpg.estimators` for their equations.

    Papers: REINFORCE, Williams (1992), https://doi.org/10.1007/BF00992696; policy gradient theorem, Sutton et al. (1999);
    GAE and the list of formulations, Schulman et al. (2016), https://arxiv.org/abs/1506.02438

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, LogisticPolicy or a class)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param n_steps: The number of steps to run for each environment per update
        (i.e. batch size is n_steps * n_env where n_env is number of environment copies running in parallel);
        a lower bound where episodes are finished; not used with ``n_episodes``
    :param gamma: Discount factor, in [0, 1]
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, in [0, 1];
        used by estimator="gae" only
    :param ent_coef: Entropy coefficient for the loss calculation
    :param vf_coef: Value function coefficient for the loss calculation, >= 0
    :param max_grad_norm: The maximum norm of the gradient, applied to the actor and to the critic separately;
        None for no clipping
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout)
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected. A class that is
        not derived from VPG's own computes its advantages itself, as with A2C, and goes with estimator="gae" only.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation.
    :param normalize_advantage: Whether to standardise the advantages: False, True or "batch" (over the whole batch), "episode"
        (within each episode)
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param estimator: What multiplies grad log pi: "total_return", "reward_to_go", "td_residual" or "gae"
    :param baseline: What is subtracted from it: None, "mean", "time", "leave_one_out" or "value";
        "td_residual" and "gae" use the value function by definition
    :param n_episodes: If given, each update uses exactly this many whole episodes of each environment instead of ``n_steps``
    :param partial_episodes: What becomes of episodes that are still running when ``n_steps`` are up: "bootstrap" (cut, the
        value of the last observation added), "finish" (run on until they end), "truncate" (cut, nothing added: biased).
        Default: "bootstrap" where a value function is used and whole episodes are not needed, else "finish".
    :param discount_state_distribution: Weight step t of an episode by gamma^t: the unbiased gradient of the discounted return.
        estimator="total_return" counts from the start of the episode already and is not weighted again.
    :param loss_reduction: "mean" over the steps of the batch, or "trajectory": sum over the steps, divided by the number of
        episodes (whole or in part). The value loss is always a mean over steps.
    :param n_critic_updates: Passes of the value regression per rollout, >= 1. The first is part of the joint loss; the others
        move only parameters that the actor does not use.
    :param critic_batch_size: Minibatch size of the further passes of the value regression; None for the full batch
    :param critic_learning_rate: Learning rate of the parameters that only the critic uses, a float or a function of the
        progress remaining; None for ``learning_rate``
    :raises ValueError: if a keyword has a value that is not allowed, alone or together with others
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
        "LogisticPolicy": LogisticPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 2e-3,
        n_steps: int = 64,
        gamma: float = 0.98,
        gae_lambda: float = 0.95,
        ent_coef: float = 0.0,
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
    ):
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
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
            supported_action_spaces=(
                spaces.Box,
                spaces.Discrete,
                spaces.MultiDiscrete,
                spaces.MultiBinary,
            ),
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

        # Whether the next training is to go on with the random numbers of a saved one
        self._resumes = False
        self._random_states: dict[str, Any] = {}

        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------------------------------------------------
    # Setup
    # ------------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self.processes = distributed.current()
        self._resolve_keywords()
        if self.rollout_buffer_class is None:
            self.rollout_buffer_class = buffer_class_for(self.observation_space)
        super()._setup_model()
        if isinstance(self.rollout_buffer, VPGBufferMixin):
            self.rollout_buffer.formulation = self._formulation
        self._group_parameters()
        self._fuse_optimizer()
        self._set_learning_rates(self._learning_rates(1.0))
        # Batch normalisation mixes the steps of a batch: such a network must see all of them at once
        self._in_chunks = not any(isinstance(module, th.nn.modules.batchnorm._BatchNorm) for module in self.policy.modules())
        if not self._in_chunks and self.processes.size > 1:
            raise ValueError(
                "Batch normalisation in the policy's networks mixes the steps of a batch, of which each of "
                f"{self.processes.size} ranks has a part; allowed: torch.nn.LayerNorm or GroupNorm, or one process"
            )

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        own = self.critic_learning_rate is not None
        self.critic_lr_schedule = FloatSchedule(self.critic_learning_rate) if own else self.lr_schedule  # type: ignore[arg-type]
        self._learning_rates(1.0)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "_formulation",
            "_actor_parameters",
            "_critic_parameters",
            "_grouped",
            "_statistics",
            "processes",
        ]

    def _resolve_keywords(self) -> None:
        """
        Check the keywords, alone and together, and resolve names and defaults.

        :raises ValueError: naming the keyword, what was given and what is allowed
        """
        check_number("n_steps", self.n_steps, low=1, integer=True)
        check_number("gamma", self.gamma, low=0, high=1)
        check_number("gae_lambda", self.gae_lambda, low=0, high=1)
        check_number("ent_coef", self.ent_coef)
        check_number("vf_coef", self.vf_coef, low=0)
        check_number("max_grad_norm", self.max_grad_norm, low=0, low_included=False, infinite=True, none=True)
        check_number("n_episodes", self.n_episodes, low=1, integer=True, none=True)
        check_number("n_critic_updates", self.n_critic_updates, low=1, integer=True)
        check_number("critic_batch_size", self.critic_batch_size, low=1, integer=True, none=True)
        if not callable(self.learning_rate):
            check_number("learning_rate", self.learning_rate, low=0)
        if not callable(self.critic_learning_rate):
            check_number("critic_learning_rate", self.critic_learning_rate, low=0, none=True)
        check_choice("partial_episodes", self.partial_episodes, PARTIAL_EPISODES)
        check_choice("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
        check_choice("discount_state_distribution", self.discount_state_distribution, (False, True))

        formulation = Formulation(
            self.estimator,
            self.baseline,
            self.normalize_advantage,
            self.discount_state_distribution,
            float(self.gamma),
            float(self.gae_lambda),
        )
        self._formulation = formulation
        self.uses_value_function = formulation.uses_value_function

        if self.n_episodes is not None and self.partial_episodes is not None:
            raise ValueError(
                f"partial_episodes={self.partial_episodes!r} has no meaning with n_episodes={self.n_episodes}, which has no "
                "partial episodes; allowed: None"
            )
        default = "bootstrap" if self.uses_value_function and not formulation.needs_whole_episodes else "finish"
        self.partial_episodes_mode = "finish" if self.n_episodes is not None else self.partial_episodes or default
        given = f"estimator={self.estimator!r} with baseline={self.baseline!r}"
        if self.partial_episodes_mode != "finish" and formulation.needs_whole_episodes:
            raise ValueError(
                f"partial_episodes={self.partial_episodes!r} cuts episodes, but {given} speaks of whole episodes; "
                "allowed: None, 'finish'"
            )
        if self.partial_episodes_mode == "bootstrap" and not self.uses_value_function:
            raise ValueError(
                f"partial_episodes='bootstrap' needs a value function, but {given} has none; "
                "allowed: None, 'finish', 'truncate'"
            )
        self._check_single_episode(given)
        self._check_rollout_buffer_class()

    def _check_single_episode(self, given: str) -> None:
        """With one episode per update, some formulations are zero at every step, or have nobody else to look at."""
        if self.n_episodes is None or self.n_episodes * self.n_envs * self.processes.size > 1:
            return
        one = "n_episodes=1 with one environment gives one episode per update"
        if self.baseline in ("time", "leave_one_out"):
            raise ValueError(
                f"baseline={self.baseline!r} compares episodes, but {one}; allowed: a larger n_episodes, more environments, "
                "or baseline=None, 'mean', 'value'"
            )
        centred = self.baseline == "mean" or self.normalize_advantage is not False
        if self.estimator == "total_return" and self.baseline in (None, "mean") and centred:
            raise ValueError(
                f"{given} and normalize_advantage={self.normalize_advantage!r} is zero at every step, since {one} and the "
                "total return is one number per episode; allowed: a larger n_episodes, more environments, or baseline=None "
                "with normalize_advantage=False"
            )

    def _check_rollout_buffer_class(self) -> None:
        """A buffer class that is not ours knows fixed lengths and computes SB3's GAE advantages, or its own."""
        buffer_class = self.rollout_buffer_class
        if buffer_class is None:
            return
        if not (isinstance(buffer_class, type) and issubclass(buffer_class, RolloutBuffer)):
            raise ValueError(f"rollout_buffer_class={buffer_class!r} is not allowed; it must be None or a RolloutBuffer class")
        if issubclass(buffer_class, VPGBufferMixin):
            return
        required: dict[str, tuple] = {
            "estimator": ("gae",),
            "normalize_advantage": (False, True, "batch"),
            "n_episodes": (None,),
            "partial_episodes": (None, "bootstrap"),
            "discount_state_distribution": (False,),
            "loss_reduction": ("mean",),
        }
        for keyword, allowed in required.items():
            if getattr(self, keyword) not in allowed:
                raise ValueError(
                    f"{keyword}={getattr(self, keyword)!r} cannot be had with rollout_buffer_class={buffer_class.__name__}, "
                    "which computes its own advantages; choose one of "
                    f"{', '.join(map(repr, allowed))}, or derive the class from {VPGRolloutBuffer.__name__}"
                )

    def _group_parameters(self) -> None:
        """
        Split each parameter group of the optimizer into one of the actor and one of the critic. Does nothing unless the
        optimizer or a parameter of the policy is another one than at the last call.
        """
        optimizer = self.policy.optimizer
        parameters = list(self.policy.parameters())
        grouped = [optimizer, *parameters]
        known = getattr(self, "_grouped", [])
        unchanged = len(known) == len(grouped) and all(map(operator.is_, known, grouped))
        if unchanged and all("role" in group for group in optimizer.param_groups):
            return
        self._grouped = grouped
        critic = critic_only_parameters(self.policy)
        self._actor_parameters = [p for p in parameters if id(p) not in critic]
        self._critic_parameters = [p for p in parameters if id(p) in critic]
        groups = []
        for group in optimizer.param_groups:
            for role in ("actor", "critic"):
                params = [p for p in group["params"] if (id(p) in critic) == (role == "critic")]
                if params:
                    groups.append({**group, "params": params, "role": role})
        optimizer.param_groups = groups

    def _fuse_optimizer(self) -> None:
        """Let Adam take its steps in one kernel: the same numbers in a quarter of the time, where networks are small."""
        optimizer = self.policy.optimizer
        if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or self.device.type != "cpu" or not FUSED_ADAM_ON_CPU:
            return
        for group in optimizer.param_groups:
            # Unless the user has chosen otherwise
            if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                group["fused"] = True

    # ------------------------------------------------------------------------------------------------------------
    # Update
    # ------------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """
        Update policy using the currently gathered rollout buffer: one gradient step over the whole data, then
        ``n_critic_updates - 1`` further passes of the value regression.

        :raises ValueError: if a learning rate, loss or gradient is not finite, or all parameters are frozen; the message says
            what has changed by then
        """
        self._group_parameters()
        self._check_trainable()
        self._update_learning_rates()
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)

        passes = passes_of(self.policy)
        n_threads = self._n_threads(passes)
        with passes.threads():
            self.policy.optimizer.zero_grad()
            n_steps, n_pieces, n_episodes = self._count()
            losses, some_steps = self._accumulate_gradients(passes, n_steps, n_pieces, n_threads)
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    self._raise_non_finite_update(name, loss)
            policy_grad_norm = self._clip_gradients("policy gradient", self._actor_parameters)
            value_grad_norm = self._clip_gradients("value gradient", self._critic_parameters)
            # The two policies are compared in the mode in which they act
            self.policy.set_training_mode(False)
            policy_before = passes.snapshot(*some_steps)
            self.policy.optimizer.step()
            self._n_updates += 1
            kl = passes.kl_divergence(policy_before, passes.snapshot(*some_steps))

            if self.uses_value_function and any(p.requires_grad for p in self._critic_parameters):
                self.policy.set_training_mode(True)
                for _ in range(self.n_critic_updates - 1):
                    self._fit_critic(passes, n_steps, n_threads)
                self.policy.set_training_mode(False)

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, loss in losses.items():
            self.logger.record(f"train/{name}", loss)
        self.logger.record("train/kl_divergence", kl)
        self.logger.record("train/policy_grad_norm", policy_grad_norm)
        buffer = self.rollout_buffer
        if self.uses_value_function:
            recorded = buffer.mask if isinstance(buffer, VPGBufferMixin) else ...
            explained_var = explained_variance(buffer.values[recorded].flatten(), buffer.returns[recorded].flatten())
            self.logger.record("train/explained_variance", explained_var)
            self.logger.record("train/value_grad_norm", value_grad_norm)
        if isinstance(buffer, VPGBufferMixin):
            self.logger.record("train/episodes_per_update", n_episodes)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())

    def _check_trainable(self) -> None:
        """:raises ValueError: if there is nothing to train"""
        trained = self._actor_parameters + (self._critic_parameters if self.uses_value_function else [])
        if not any(p.requires_grad for p in trained):
            raise ValueError(
                "All parameters that the update trains are frozen (requires_grad=False): thaw at least one layer of the policy"
            )

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may exceed the budget; a schedule ends at 0 (SB3 goes on below it)
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _learning_rates(self, progress_remaining: float) -> dict[str, float]:
        """
        :return: learning rates of actor and critic
        :raises ValueError: if a schedule returns a negative number or one that is not finite
        """
        own = self.critic_learning_rate is not None
        learning_rates = {}
        for role, keyword, schedule in (
            ("actor", "learning_rate", self.lr_schedule),
            ("critic", "critic_learning_rate" if own else "learning_rate", self.critic_lr_schedule),
        ):
            learning_rates[role] = schedule(progress_remaining)
            check_number(f"{keyword}({progress_remaining:g})", learning_rates[role], low=0)
        return learning_rates

    def _set_learning_rates(self, learning_rates: dict[str, float]) -> None:
        for group in self.policy.optimizer.param_groups:
            group["lr"] = learning_rates[group["role"]]

    def _update_learning_rates(self) -> None:
        learning_rates = self._learning_rates(self._current_progress_remaining)
        self._set_learning_rates(learning_rates)
        self.logger.record("train/learning_rate", learning_rates["actor"])
        if self.critic_learning_rate is not None:
            self.logger.record("train/critic_learning_rate", learning_rates["critic"])

    def _chunks(self) -> Iterator[Samples]:
        """The whole batch, in pieces that fit the cache."""
        buffer = self.rollout_buffer
        if isinstance(buffer, VPGBufferMixin):
            return buffer.get(buffer.chunk_size if self._in_chunks else None, shuffle=False)
        return buffer.get(batch_size=None)

    def _normalized_chunks(self) -> Iterator[Samples]:
        """The same with normalized advantages, weighted by gamma^t if the formulation says so."""
        buffer = self.rollout_buffer
        if isinstance(buffer, VPGBufferMixin):
            normalized = buffer.normalized_advantages(self.processes)
            for indices in buffer.batch_indices(buffer.chunk_size if self._in_chunks else None):
                yield buffer._get_samples(indices)._replace(advantages=buffer.flat(normalized, indices))
        else:
            yield from map(self._normalize_advantages, self._chunks())

    def _normalize_advantages(self, batch: Samples) -> Samples:
        """For a buffer that computes its advantages itself."""
        advantages = batch.advantages.numpy(force=True).reshape(-1, 1)
        everywhere = np.ones(advantages.shape, dtype=bool)
        normalized = NORMALIZATIONS[self.normalize_advantage](advantages, everywhere, everywhere, self.processes)
        return batch._replace(advantages=th.as_tensor(normalized.flatten()).to(batch.advantages))

    def _accumulate_gradients(
        self, passes: Passes, n_steps: int, n_pieces: int, n_threads: int = 1
    ) -> tuple[dict[str, float], tuple[Any, th.Tensor]]:
        """
        Add the gradient of policy loss, entropy bonus and value loss over the whole batch to the parameters' gradients.

        :param n_steps: number of steps in the batch
        :param n_pieces: number of episodes (whole or in part) in it
        :return: the losses, by the names under which A2C logs them; observations and actions of some steps, evenly spaced
        """
        weight = 1 / n_pieces if self.loss_reduction == "trajectory" else 1 / n_steps

        def loss_of(batch: Samples) -> tuple[th.Tensor, tuple[Samples, dict[str, th.Tensor]]]:
            values, log_prob, entropy = passes.evaluate(batch.observations, batch.actions, self.uses_value_function)
            # -mean(psi_t log pi(a_t | s_t))
            loss = policy_loss = -(batch.advantages * log_prob).sum() * weight
            # Approximate entropy when no analytical form
            entropy_sum = (-log_prob if entropy is None else entropy).sum()
            if self.ent_coef != 0:
                loss = loss - self.ent_coef * weight * entropy_sum
            parts = {"entropy_loss": -entropy_sum.detach() / n_steps, "policy_loss": policy_loss.detach()}
            if values is not None:
                value_loss = ((batch.returns - values) ** 2).sum() / n_steps
                loss = loss + self.vf_coef * value_loss
                parts["value_loss"] = value_loss.detach()
            return loss, (batch, parts)

        losses: dict[str, float] = defaultdict(float)
        last_batch: Samples
        for last_batch, parts in accumulate_gradients(  # noqa: B007
            loss_of, self._normalized_chunks(), self.policy.parameters(), n_threads
        ):
            for name, loss in parts.items():
                losses[name] += float(loss)
        losses = self.processes.sum_gradients(self.policy.parameters(), losses)
        every = slice(None, None, -(-len(last_batch.actions) // KL_STEPS))
        return losses, (map_obs(lambda obs: obs[every], last_batch.observations), last_batch.actions[every])

    def _fit_critic(self, passes: Passes, n_steps: int, n_threads: int) -> None:
        """One pass of the value regression, moving only parameters that the actor does not use."""
        batches: Iterable[tuple[Iterable[Samples], int]]
        if self.critic_batch_size is None:
            batches = [(self._chunks(), n_steps)]
        else:
            # One chunk each, which leaves nothing to other threads
            n_threads = 1
            batches = self._critic_batches(n_steps, self.critic_batch_size)
        for chunks, n_steps in batches:

            def loss_of(chunk: Samples, n_steps: int = n_steps) -> tuple[th.Tensor, None]:
                return self.vf_coef * ((chunk.returns - passes.values(chunk.observations)) ** 2).sum() / n_steps, None

            self.policy.optimizer.zero_grad()
            list(accumulate_gradients(loss_of, chunks, self._critic_parameters, n_threads))
            self.processes.sum_gradients(self._critic_parameters, {})
            self._clip_gradients("value gradient", self._critic_parameters, policy_step_taken=True)
            self.policy.optimizer.step()

    def _critic_batches(self, n_steps: int, batch_size: int) -> Iterator[tuple[list[Samples], int]]:
        """
        :return: minibatches of ``batch_size`` steps, of which each process has a part, none where it has run out of
            steps; with the number of steps in them
        """
        n_batches = -(-n_steps // batch_size)
        own = self.rollout_buffer.get(-(-batch_size * self._count_own()[0] // n_steps))
        for _, batch in itertools.zip_longest(range(n_batches), own):
            parts: list[Samples] = [] if batch is None else [batch]
            yield parts, int(self.processes.sum(np.array(sum(len(part.returns) for part in parts))))

    def _n_threads(self, passes: Passes) -> int:
        """:return: how many chunks may go through the networks at a time"""
        buffer, n_threads = self.rollout_buffer, th.get_num_threads()
        if n_threads == 1 or not isinstance(buffer, VPGBufferMixin) or not passes.small:
            return 1
        return min(n_threads, -(-buffer.n_recorded // buffer.chunk_size))

    def _count(self) -> tuple[int, int, int]:
        """:return: numbers of steps, of episodes (whole or in part) and of episodes that ended, in the batch"""
        return tuple(self.processes.sum(np.array(self._count_own())).astype(int).tolist())

    def _count_own(self) -> tuple[int, int, int]:
        """:return: the same in the part of the batch that this process has"""
        buffer = self.rollout_buffer
        if isinstance(buffer, VPGBufferMixin):
            return buffer.n_recorded, buffer.n_pieces, buffer.n_episodes
        # Only reduced by "mean"
        return buffer.buffer_size * buffer.n_envs, 1, 0

    def _clip_gradients(self, name: str, parameters: list[th.nn.Parameter], policy_step_taken: bool = False) -> float:
        """
        :param policy_step_taken: whether the policy's step of this update was taken before
        :return: norm of the gradient before clipping
        :raises ValueError: if it is not finite
        """
        max_norm = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = th.nn.utils.clip_grad_norm_(parameters, max_norm).item()
        if not math.isfinite(norm):
            self._raise_non_finite_update(name, norm, policy_step_taken)
        return norm

    def _raise_non_finite_update(self, name: str, value: float, policy_step_taken: bool = False) -> NoReturn:
        self.policy.optimizer.zero_grad()
        update = self._n_updates if policy_step_taken else self._n_updates + 1
        state = (
            "The step was not taken. The policy's step of this update and the earlier steps of its value regression were: the "
            "critic may have diverged, and it is safer to continue from an earlier save."
            if policy_step_taken
            else "The step was not taken: weights and optimizer are as before it and the model can be saved."
        )
        raise ValueError(
            f"Non-finite {name.replace('_', ' ')} ({value}) in update {update} (timestep {self.num_timesteps}). {state} "
            "Very large rewards or observations are the usual cause: scale them, e.g. with VecNormalize, or lower the "
            "learning rate."
        )

    # ------------------------------------------------------------------------------------------------------------
    # Learning
    # ------------------------------------------------------------------------------------------------------------

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
        if self._resumes and not reset_num_timesteps and self.env is not None:
            set_random_states(self._random_states, self.env)
            if self.processes.rank > 0:
                # The states are those of one process: the others go on with numbers that are drawn from them
                self.set_random_seed(int(th.randint(2**31, ())))
        self._resumes = False
        self._join_others(total_timesteps)
        if self.processes.rank > 0:
            # One tells for all
            self.verbose, self.tensorboard_log, progress_bar = 0, None, False
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _join_others(self, total_timesteps: int) -> None:
        """
        :raises ValueError: if the process group is another one than when the model was made, or the ranks do not fit together
        """
        made_for, now = ((one.rank, one.size) for one in (self.processes, distributed.current()))
        if made_for != now:
            raise ValueError(
                f"The model was made in rank {made_for[0]} of {made_for[1]}, but is to learn in rank {now[0]} of {now[1]}: "
                "make or load it after torch.distributed.init_process_group(), or destroy_process_group()"
            )
        self.processes.begin(self, total_timesteps)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if progress_bar and self.processes.size > 1:
            # SB3's knows the steps of one process
            callback, progress_bar = [super()._init_callback(callback), ProgressBarOfAllRanks()], False
        return super()._init_callback(callback, progress_bar)

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(self.processes.seed(seed, self.n_envs))
        # These are the random numbers that are wanted
        self._resumes = False

    # ------------------------------------------------------------------------------------------------------------
    # Saving
    # ------------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file, with the states of the random number
        generators. A file of that name stays as it is until the new one is whole, whatever happens in between. A generator of
        an environment whose state cannot be stored is left out, with a warning that names it.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        self._random_states = get_random_states(self.env)
        if isinstance(path, (str, Path)):
            with replacing(model_path(path)) as file:
                super().save(file, exclude, include)
        else:
            super().save(path, exclude, include)

    def get_parameters(self) -> dict[str, dict]:
        """
        :return: as SB3's; each parameter group of the optimizer has the "names" of its parameters, too, so that
            :meth:`set_parameters` can assign them
        """
        return {**super().get_parameters(), "policy.optimizer": named_optimizer_state(self.policy)}

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary, see :meth:`get_parameters`, of this or another algorithm
        with the same policy, such as A2C or PPO. The state of the optimizer is taken over where it fits, that is, where it is
        of the same kind; a warning says so where it is not, and the optimizer is left as it is.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a dictionary that maps
            "policy" and "policy.optimizer" to state dictionaries
        :param exact_match: If True, both and each of their parameters must be given; else those that are given are set
        :param device: Device on which the code should run
        """
        if not isinstance(load_path_or_dict, dict):
            load_path_or_dict = load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]
        parameters = dict(load_path_or_dict)
        state = parameters.get("policy.optimizer", {})
        # Others are refused by PyTorch
        if state.keys() >= {"state", "param_groups"}:
            try:
                parameters["policy.optimizer"] = fit_optimizer_state(state, self.policy)
            except ValueError as reason:
                parameters["policy.optimizer"] = self.policy.optimizer.state_dict()
                if state["state"]:
                    warnings.warn(f"The state of the optimizer is not taken over: {reason}", stacklevel=2)
        super().set_parameters(parameters, exact_match, device)

    @classmethod
    def load(cls: type[SelfVPG], path: str | Path | io.BufferedIOBase, *args: Any, **kwargs: Any) -> SelfVPG:
        """
        Load the model from a zip-file. Parameters and return value are those of SB3's ``load``. The first
        ``learn(reset_num_timesteps=False)`` goes on with the random numbers that would have come next, in the environments,
        too, if their number is the same; not if a ``seed`` is given here, or by ``set_random_seed``.

        Loading unpickles, and a pickle can execute anything: load only files you trust. ``set_parameters`` of a model that you
        have constructed yourself takes weights alone; see the README.

        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is damaged, or not a model of VPG; nothing has been unpickled then
        """
        check_model_file(path, keyword="estimator")
        model = super().load(path, *args, **kwargs)
        # A file of before random states were saved has none
        model._resumes = bool(model._random_states) and kwargs.get("seed") is None
        return model


def critic_only_parameters(policy: ActorCriticPolicy) -> set[int]:
    """
    :param policy: any actor-critic policy
    :return: ids of the parameters that only the critic uses: those on which the value depends and neither the log probability
        nor the entropy, whether they are frozen or not
    """
    policy.set_training_mode(False)
    parameters = list(policy.parameters())
    zeros = create_empty_array(policy.observation_space, n=1, fn=np.zeros)
    obs = obs_as_tensor(zeros, policy.device)  # type: ignore[arg-type]

    def depends(output: th.Tensor) -> list[bool]:
        if not output.requires_grad:
            return [False] * len(parameters)
        gradients = th.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        return [gradient is not None for gradient in gradients]

    with forgetting_distributions(policy), thawed(parameters), th.enable_grad():
        action = policy._predict(obs, deterministic=True).detach()
        values, log_prob, entropy = policy.evaluate_actions(obs, action)
        in_value = depends(values.sum())
        in_actor = depends(log_prob.sum() + (0.0 if entropy is None else entropy.sum()))
    return {id(p) for p, value, actor in zip(parameters, in_value, in_actor) if value and not actor}


@contextmanager
def thawed(parameters: Iterable[th.nn.Parameter]) -> Iterator[None]:
    """In this context all parameters require gradients, the frozen ones too."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def check_number(
    keyword: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    integer: bool = False,
    low_included: bool = True,
    infinite: bool = False,
    none: bool = False,
) -> None:
    """
    :raises ValueError: if ``value`` is not a number of the kind and range asked for, naming the keyword and both
    """
    if none and value is None:
        return
    ok = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    ok = ok and (math.isfinite(value) or (infinite and value == math.inf))  # type: ignore[arg-type]
    if not (ok and (low <= value if low_included else low < value) and value <= high):  # type: ignore[operator]
        kind = "an integer" if integer else "a number"
        bounds = [] if low == -math.inf else [f"{'>=' if low_included else '>'} {low}"]
        bounds += [] if high == math.inf else [f"<= {high}"]
        allowed = " ".join([kind, " and ".join(bounds)]).strip() + (" or None" if none else "")
        raise ValueError(f"{keyword}={value!r} is not allowed; it must be {allowed}")

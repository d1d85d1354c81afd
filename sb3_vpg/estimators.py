"""
Reward formulations of the policy gradient, as pure functions of NumPy arrays.

The policy gradient is ``g = E[sum_t psi_t grad log pi(a_t | s_t)]`` (eq. 1 of the GAE paper,
https://arxiv.org/abs/1506.02438). This module computes ``psi_t``, subtracts the baseline, normalizes the difference, and
computes the targets of the value function.

All arrays are time-major with shape (T, N): row t holds step t of N environments. One column may hold several
*segments*. A segment is an episode, or the part of an episode that lies in the rollout. ``last`` is True at the last step of
each segment::

    d_t = 0 if last_t else gamma                  (the discount to step t + 1 of the same segment)
    v'_t = next_values_t                          (the value of the true successor state of step t)

Names used below: ``G_t`` reward-to-go, ``R(tau)`` total return, ``delta_t`` TD residual, ``A_t`` advantage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sb3_vpg.common.checks import check_choice
from sb3_vpg.common.collectives import SINGLE_PROCESS, Array, SingleProcess


class Rollout(NamedTuple):
    """
    The data that an estimator reads: arrays of shape (T, N).

    :param rewards: r_t, as the environment returned them
    :param values: V(s_t); zeros if the formulation has no value function
    :param next_values: v'_t, the value of the successor state: 0 after termination, V(terminal observation) after a
        time limit, V(s_T) at the end of a bootstrapped rollout; zeros if the formulation has no value function
    :param last: True at the last recorded step of each segment
    :param mask: True where the step was recorded
    :param steps: index of the step within its episode, from 0
    """

    rewards: Array
    values: Array
    next_values: Array
    last: Array
    mask: Array
    steps: Array


def _check_shapes(**arrays: Array) -> None:
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"Expected arrays of the same shape (T, N), got {shapes}")


# ---------------------------------------------------------------------------------------------------------------
# Sums over time
# ---------------------------------------------------------------------------------------------------------------


def discounted_sum(x: Array, discounts: Array) -> Array:
    """
    Solve ``y_t = x_t + d_t y_{t+1}`` with ``y_T = 0`` for all t at once.

    Doubling scan (Hillis & Steele, 1986): after the pass with stride k, ``y_t`` holds the first 2k terms of its sum and
    ``d_t`` the product of 2k discounts. The sum ends where ``d_t = 0``. The scan takes about log2(longest segment) passes
    over whole arrays, in double precision.

    :param x: summands, shape (T, N)
    :param discounts: d_t, 0 at the last step of each segment, shape (T, N)
    :return: y, float64, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(x=x, discounts=discounts)
    y = np.array(x, dtype=np.float64)
    d = np.array(discounts, dtype=np.float64)
    # Initialized with zeros: the last rows are multiplied, though not used, and uninitialized values may cause warnings
    product = np.zeros_like(d)
    stride, n_steps = 1, len(y)
    while stride < n_steps and d[:-stride].any():
        head = product[:-stride]
        np.multiply(d[:-stride], y[stride:], out=head)
        y[:-stride] += head
        np.multiply(d[:-stride], d[stride:], out=head)
        d, product = product, d
        stride *= 2
    return y


def first_step_of_segment(last: Array) -> Array:
    """
    :param last: True at the last step of each segment, shape (T, N)
    :return: row of the first step of the segment to which each step belongs, int, shape (T, N)
    """
    begins = np.zeros(np.shape(last), dtype=np.intp)
    begins[1:] = np.where(last[:-1], np.arange(1, len(last))[:, None], 0)
    return np.maximum.accumulate(begins, axis=0)


def segment_index(last: Array) -> Array:
    """
    :param last: True at the last step of each segment, shape (T, N)
    :return: index of the segment to which each step belongs, unique over all columns, int, shape (T, N)
    """
    n_before = np.cumsum(last, axis=0) - last
    n_in_column = n_before[-1] + 1
    return n_before + (np.cumsum(n_in_column) - n_in_column)


# ---------------------------------------------------------------------------------------------------------------
# Estimators: psi_t
# ---------------------------------------------------------------------------------------------------------------


def reward_to_go(rewards: Array, next_values: Array, last: Array, gamma: float) -> Array:
    """
    ``G_t = r_t + d_t G_{t+1} + [last step of its segment] gamma v'_t`` (Sutton et al., 1999; GAE paper, psi no. 2).

    :param rewards: r_t, shape (T, N)
    :param next_values: v'_t, shape (T, N)
    :param last: True at the last step of each segment, shape (T, N)
    :param gamma: discount factor, in [0, 1]
    :return: G, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(rewards=rewards, next_values=next_values, last=last)
    return discounted_sum(rewards + last * (gamma * next_values), np.where(last, 0.0, gamma))


def total_return(rewards: Array, last: Array, gamma: float) -> Array:
    """
    ``R(tau) = sum_k gamma^k r_k`` over the whole episode, the same number at each of its steps
    (Williams, 1992; GAE paper, psi no. 1). The segments must be whole episodes.

    :param rewards: r_t, shape (T, N)
    :param last: True at the last step of each segment, shape (T, N)
    :param gamma: discount factor, in [0, 1]
    :return: R(tau) of the episode to which each step belongs, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(rewards=rewards, last=last)
    from_here = discounted_sum(rewards, np.where(last, 0.0, gamma))
    return np.take_along_axis(from_here, first_step_of_segment(last), axis=0)


def td_residual(rewards: Array, values: Array, next_values: Array, gamma: float) -> Array:
    """
    ``delta_t = r_t + gamma v'_t - V(s_t)`` (GAE paper, psi no. 6).

    :param rewards: r_t, shape (T, N)
    :param values: V(s_t), shape (T, N)
    :param next_values: v'_t, shape (T, N)
    :param gamma: discount factor, in [0, 1]
    :return: delta, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(rewards=rewards, values=values, next_values=next_values)
    return rewards + gamma * np.asarray(next_values, dtype=np.float64) - values


def gae(rewards: Array, values: Array, next_values: Array, last: Array, gamma: float, gae_lambda: float) -> Array:
    """
    ``A_t = delta_t + lambda d_t A_{t+1}``, generalized advantage estimation (GAE paper, eq. 16).
    ``lambda = 1`` is reward-to-go minus V(s_t), ``lambda = 0`` the TD residual.

    :param rewards: r_t, shape (T, N)
    :param values: V(s_t), shape (T, N)
    :param next_values: v'_t, shape (T, N)
    :param last: True at the last step of each segment, shape (T, N)
    :param gamma: discount factor, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]
    :return: A, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(rewards=rewards, values=values, next_values=next_values, last=last)
    return discounted_sum(td_residual(rewards, values, next_values, gamma), np.where(last, 0.0, gamma * gae_lambda))


# ---------------------------------------------------------------------------------------------------------------
# Baselines: subtracted from psi_t
# ---------------------------------------------------------------------------------------------------------------


def mean_baseline(psi: Array, mask: Array, processes: SingleProcess = SINGLE_PROCESS) -> Array:
    """
    Average of psi over all recorded steps of the batch. Each step is part of its own baseline.

    :param psi: psi_t of the estimator, shape (T, N)
    :param mask: True where the step was recorded, shape (T, N)
    :param processes: the processes that share the batch
    :return: the baseline, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(psi=psi, mask=mask)
    total, n = processes.sum(np.array([np.sum(psi, where=mask), mask.sum()]))
    return np.full(np.shape(psi), total / n)


def _sum_and_count_over_episodes(psi: Array, mask: Array, steps: Array, processes: SingleProcess) -> tuple[Array, Array]:
    """:return: sum of psi over the episodes that reach the same step index, and their number; both of shape (T, N)"""
    index = steps[mask]
    longest = int(processes.gather(index.max(initial=0)).max()) + 1
    sums, counts = processes.sum(np.stack([np.bincount(index, weights, longest) for weights in (psi[mask], None)]))
    steps = np.where(mask, steps, 0)
    return sums[steps], counts[steps]


def time_baseline(psi: Array, mask: Array, steps: Array, processes: SingleProcess = SINGLE_PROCESS) -> Array:
    """
    Average of psi at the same step index over all episodes of the batch that reach it. Each episode is part of its own
    baseline: with K episodes, this scales the expected gradient by about 1 - 1/K.

    :param psi: psi_t of the estimator, shape (T, N)
    :param mask: True where the step was recorded, shape (T, N)
    :param steps: index of the step within its episode, shape (T, N)
    :param processes: the processes that share the batch
    :return: the baseline, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(psi=psi, mask=mask, steps=steps)
    sums, counts = _sum_and_count_over_episodes(psi, mask, steps, processes)
    return sums / counts.clip(min=1)


def leave_one_out_baseline(psi: Array, mask: Array, steps: Array, processes: SingleProcess = SINGLE_PROCESS) -> Array:
    """
    Average of psi at the same step index over the *other* episodes of the batch that reach it; 0 if no other does
    (Kool et al., 2019, https://openreview.net/forum?id=r1lgTGL5DE). The gradient stays unbiased.

    :param psi: psi_t of the estimator, shape (T, N)
    :param mask: True where the step was recorded, shape (T, N)
    :param steps: index of the step within its episode, shape (T, N)
    :param processes: the processes that share the batch
    :return: the baseline, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(psi=psi, mask=mask, steps=steps)
    sums, counts = _sum_and_count_over_episodes(psi, mask, steps, processes)
    return np.where(counts > 1, (sums - psi) / (counts - 1).clip(min=1), 0.0)


# ---------------------------------------------------------------------------------------------------------------
# Normalization
# ---------------------------------------------------------------------------------------------------------------

# As in SB3: keeps the quotient finite if the standard deviation is tiny
EPSILON = 1e-8
# Rewards are stored in single precision: a relative spread below this is rounding error
MIN_RELATIVE_SPREAD = float(np.finfo(np.float32).eps)


def normalize_within(advantages: Array, mask: Array, groups: Array) -> Array:
    """
    Standardize within each group: ``(A - mean) / (std + 1e-8)`` with the sample standard deviation (n - 1), as in SB3.
    A group of one step, or of equal values, is centered and not scaled.

    :param advantages: A, shape (T, N)
    :param mask: True where the step was recorded, shape (T, N)
    :param groups: index of the group of each step, int >= 0, shape (T, N)
    :return: normalized advantages, 0 at steps that were not recorded, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(advantages=advantages, mask=mask, groups=groups)
    x, group = advantages[mask].astype(np.float64), groups[mask]
    n = np.bincount(group).clip(min=1)
    magnitude = np.zeros(len(n))
    np.maximum.at(magnitude, group, np.abs(x))
    x -= (np.bincount(group, weights=x) / n)[group]
    std = np.sqrt(np.bincount(group, weights=x**2) / (n - 1).clip(min=1))
    scale = np.where(std > MIN_RELATIVE_SPREAD * magnitude, std + EPSILON, 1.0)
    normalized = np.zeros(np.shape(advantages))
    normalized[mask] = x / scale[group]
    return normalized


def normalize_batch(advantages: Array, mask: Array, last: Array, processes: SingleProcess = SINGLE_PROCESS) -> Array:
    """Standardize over all recorded steps of the batch, as :func:`normalize_within` with a single group."""
    _check_shapes(advantages=advantages, mask=mask, last=last)
    x = advantages[mask].astype(np.float64)
    own_mean = x.sum() / max(len(x), 1)
    part = (len(x), own_mean, np.square(x - own_mean).sum(), np.abs(x).max(initial=0.0))
    # Combine the means and sums of squares of the parts (Chan et al., 1979)
    counts, means, squares, magnitudes = processes.gather(np.array(part)).T
    n = counts.sum()
    mean = counts @ means / max(n, 1)
    std = np.sqrt((squares.sum() + counts @ (means - mean) ** 2) / max(n - 1, 1))
    x -= mean
    if std > MIN_RELATIVE_SPREAD * magnitudes.max():
        x /= std + EPSILON
    normalized = np.zeros(np.shape(advantages))
    normalized[mask] = x
    return normalized


def normalize_episode(advantages: Array, mask: Array, last: Array, processes: SingleProcess = SINGLE_PROCESS) -> Array:
    """Standardize within each segment (an episode, or its part in the rollout), see :func:`normalize_within`."""
    return normalize_within(advantages, mask, segment_index(last))


# ---------------------------------------------------------------------------------------------------------------
# Formulations: one estimator, one baseline, one normalization
# ---------------------------------------------------------------------------------------------------------------


class EstimatorSpec(NamedTuple):
    """
    An entry of :data:`ESTIMATORS`: the functions and the properties of an estimator.

    :param psi: function of a :class:`Rollout`, gamma and lambda; returns psi_t, shape (T, N)
    :param value_target: function of a :class:`Rollout`, gamma, lambda and psi; returns the target of the value function,
        shape (T, N)
    :param subtracts_value: whether psi already contains -V(s_t); then no baseline is subtracted
    :param needs_whole_episodes: whether psi is defined for whole episodes only
    :param constant_within_episode: whether psi is the same number at each step of an episode
    :param discounted_from_start: whether psi discounts from the start of the episode; ``discount_state_distribution`` has no
        effect then
    """

    psi: Callable[[Rollout, float, float], Array]
    value_target: Callable[[Rollout, float, float, Array], Array]
    subtracts_value: bool = False
    needs_whole_episodes: bool = False
    constant_within_episode: bool = False
    discounted_from_start: bool = False


ESTIMATORS: dict[str, EstimatorSpec] = {
    "total_return": EstimatorSpec(
        psi=lambda x, gamma, gae_lambda: total_return(x.rewards, x.last, gamma),
        value_target=lambda x, gamma, gae_lambda, psi: reward_to_go(x.rewards, x.next_values, x.last, gamma),
        needs_whole_episodes=True,
        constant_within_episode=True,
        discounted_from_start=True,
    ),
    "reward_to_go": EstimatorSpec(
        psi=lambda x, gamma, gae_lambda: reward_to_go(x.rewards, x.next_values, x.last, gamma),
        value_target=lambda x, gamma, gae_lambda, psi: psi,
    ),
    "td_residual": EstimatorSpec(
        psi=lambda x, gamma, gae_lambda: td_residual(x.rewards, x.values, x.next_values, gamma),
        value_target=lambda x, gamma, gae_lambda, psi: psi + x.values,
        subtracts_value=True,
    ),
    "gae": EstimatorSpec(
        psi=lambda x, gamma, gae_lambda: gae(x.rewards, x.values, x.next_values, x.last, gamma, gae_lambda),
        value_target=lambda x, gamma, gae_lambda, psi: psi + x.values,
        subtracts_value=True,
    ),
}


class BaselineSpec(NamedTuple):
    """
    An entry of :data:`BASELINES`: the function and the properties of a baseline.

    :param baseline: function of psi, a :class:`Rollout` and the processes that share the batch; returns the baseline, shape
        (T, N) or a number
    :param is_value_function: whether the baseline is V
    :param compares_episodes: whether the baseline compares whole episodes; it needs at least two
    :param constant_within_episode: whether the baseline is the same number at each step of an episode
    """

    baseline: Callable[[Array, Rollout, SingleProcess], Array | float]
    is_value_function: bool = False
    compares_episodes: bool = False
    constant_within_episode: bool = False


BASELINES: dict[str | None, BaselineSpec] = {
    None: BaselineSpec(lambda psi, x, processes: 0.0, constant_within_episode=True),
    "mean": BaselineSpec(lambda psi, x, processes: mean_baseline(psi, x.mask, processes), constant_within_episode=True),
    "time": BaselineSpec(lambda psi, x, processes: time_baseline(psi, x.mask, x.steps, processes), compares_episodes=True),
    "leave_one_out": BaselineSpec(
        lambda psi, x, processes: leave_one_out_baseline(psi, x.mask, x.steps, processes), compares_episodes=True
    ),
    "value": BaselineSpec(lambda psi, x, processes: x.values, is_value_function=True),
}

NORMALIZATIONS: dict[bool | str, Callable[[Array, Array, Array, SingleProcess], Array]] = {
    False: lambda advantages, mask, last, processes: advantages,
    True: normalize_batch,
    "batch": normalize_batch,
    "episode": normalize_episode,
}


@dataclass(frozen=True)
class Formulation:
    """
    One choice of estimator, baseline, normalization and weighting.

    :param estimator: "total_return", "reward_to_go", "td_residual" or "gae"
    :param baseline: None, "mean", "time", "leave_one_out" or "value". "td_residual" and "gae" contain the value function by
        definition: with them only None and "value" are allowed, and both mean the same.
    :param normalize_advantage: False, True or "batch" (over the whole batch), "episode" (within each episode)
    :param discount_state_distribution: weight step t of an episode by gamma^t, after the normalization
        (Nota & Thomas, 2020, https://arxiv.org/abs/1906.07073). "total_return" already discounts from the start of the
        episode and is not weighted again.
    :param gamma: discount factor, in [0, 1]
    :param gae_lambda: lambda of the GAE paper, in [0, 1]; used by "gae" only
    :raises ValueError: for an unknown name or an invalid combination
    """

    estimator: str = "gae"
    baseline: str | None = None
    normalize_advantage: bool | str = False
    discount_state_distribution: bool = False
    gamma: float = 0.99
    gae_lambda: float = 1.0

    def __post_init__(self) -> None:
        for keyword, table in (
            ("estimator", ESTIMATORS),
            ("baseline", BASELINES),
            ("normalize_advantage", NORMALIZATIONS),
        ):
            check_choice(keyword, getattr(self, keyword), table)
        estimator, baseline = ESTIMATORS[self.estimator], BASELINES[self.baseline]
        if estimator.subtracts_value and not (self.baseline is None or baseline.is_value_function):
            raise ValueError(
                f"baseline={self.baseline!r} cannot be combined with estimator={self.estimator!r}, which subtracts the "
                "value function by definition; allowed: None, 'value'"
            )
        if self.constant_within_episode and self.normalize_advantage == "episode":
            varying = ", ".join(repr(name) for name, spec in BASELINES.items() if not spec.constant_within_episode)
            raise ValueError(
                f"normalize_advantage='episode' with estimator={self.estimator!r} and baseline={self.baseline!r} is zero at "
                "every step, since the advantage is one number per episode; allowed: normalize_advantage=False or "
                f"'batch', or baseline={varying}"
            )

    @property
    def uses_value_function(self) -> bool:
        """Whether the formulation uses a trained value function."""
        return ESTIMATORS[self.estimator].subtracts_value or BASELINES[self.baseline].is_value_function

    @property
    def needs_whole_episodes(self) -> bool:
        """Whether the formulation is defined for whole episodes only."""
        return ESTIMATORS[self.estimator].needs_whole_episodes or BASELINES[self.baseline].compares_episodes

    @property
    def constant_within_episode(self) -> bool:
        """Whether the advantage, before normalization, is the same number at each step of an episode."""
        return ESTIMATORS[self.estimator].constant_within_episode and BASELINES[self.baseline].constant_within_episode

    def __call__(self, rollout: Rollout, processes: SingleProcess = SINGLE_PROCESS) -> tuple[Array, Array]:
        """
        :param rollout: arrays of shape (T, N)
        :param processes: the processes that share the batch; ``rollout`` is the part of this process
        :return: the weight of grad log pi at each step (:meth:`normalize` of :meth:`advantages`), 0 at steps that were not
            recorded, and the target of the value function; both float64, shape (T, N)
        """
        advantages, value_target = self.advantages(rollout, processes)
        return self.normalize(advantages, rollout, processes), value_target

    def advantages(self, rollout: Rollout, processes: SingleProcess = SINGLE_PROCESS) -> tuple[Array, Array]:
        """
        :param rollout: arrays of shape (T, N)
        :param processes: the processes that share the batch; ``rollout`` is the part of this process
        :return: psi_t minus the baseline, 0 at steps that were not recorded, and the target of the value function:
            A_t + V(s_t) for "gae", r_t + gamma v'_t for "td_residual", G_t for the others; both float64, shape (T, N)
        """
        _check_shapes(**rollout._asdict())
        mask = rollout.mask
        rollout = rollout._replace(rewards=np.where(mask, rollout.rewards, 0.0))
        estimator = ESTIMATORS[self.estimator]
        psi = estimator.psi(rollout, self.gamma, self.gae_lambda)
        value_target = estimator.value_target(rollout, self.gamma, self.gae_lambda, psi)
        _check_shapes(**{"mask": mask, f"psi of {self.estimator!r}": psi, f"value_target of {self.estimator!r}": value_target})
        # td_residual and gae contain V(s_t)
        baseline = 0.0 if estimator.subtracts_value else BASELINES[self.baseline].baseline(psi, rollout, processes)
        return np.where(mask, psi - baseline, 0.0), value_target

    def normalize(self, advantages: Array, rollout: Rollout, processes: SingleProcess = SINGLE_PROCESS) -> Array:
        """
        Standardize the advantages according to ``normalize_advantage``, then weight them by gamma^t if
        ``discount_state_distribution`` is True.

        :param advantages: as returned by :meth:`advantages`, shape (T, N)
        :param rollout: the rollout from which they were computed
        :param processes: the processes that share the batch; ``rollout`` is the part of this process
        :return: the weight of grad log pi at each step, 0 at steps that were not recorded, float64, shape (T, N)
        """
        normalized = NORMALIZATIONS[self.normalize_advantage](advantages, rollout.mask, rollout.last, processes)
        if self.discount_state_distribution and not ESTIMATORS[self.estimator].discounted_from_start:
            normalized = normalized * self.gamma**rollout.steps
        return np.where(rollout.mask, normalized, 0.0)

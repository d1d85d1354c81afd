"""
Reward formulations of the policy gradient, as pure functions of NumPy arrays.

The policy gradient is ``g = E[sum_t psi_t grad log pi(a_t | s_t)]`` (eq. 1 of the GAE paper,
https://arxiv.org/abs/1506.02438). This module computes ``psi_t``, what is subtracted from it (the baseline),
how the difference is normalised, and the targets of the value function.

All arrays are time-major with shape (T, N): row t holds step t of N environments. One column may hold several
*pieces*: an episode, or the part of one that lies in the rollout. ``last`` is True at the last step of each piece, so::

    d_t = 0 if last_t else gamma                  (the discount to step t + 1 of the same piece)
    v'_t = next_values_t                          (the value of the true successor state of step t)

Names used below: ``G_t`` reward-to-go, ``R(tau)`` total return, ``delta_t`` TD residual, ``A_t`` advantage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Rollout(NamedTuple):
    """
    What an estimator may look at: arrays of shape (T, N).

    :param rewards: r_t, as the environment gave them
    :param values: V(s_t); zeros if the formulation has no value function
    :param next_values: v'_t, the value of the successor state: 0 after termination, V(terminal observation) after a
        time limit, V(s_T) at the end of a bootstrapped rollout; zeros if the formulation has no value function
    :param last: True at the last recorded step of each piece
    :param mask: True where the step was recorded
    :param steps: index of the step within its episode, from 0
    """

    rewards: Array
    values: Array
    next_values: Array
    last: Array
    mask: Array
    steps: Array


class Collectives:
    """
    What several processes must tell each other, each of which has a part of the batch. Here there is one, which has all of it;
    :mod:`sb3_vpg.distributed` has the others.
    """

    def sum(self, x: Array) -> Array:
        """:return: the sum over the processes, elementwise"""
        return x

    def gather(self, x: Array) -> Array:
        """:return: x of each process, along a new first axis"""
        return x[None]


ONE_PROCESS = Collectives()


def _check_shapes(**arrays: Array) -> None:
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"Expected arrays of one and the same shape (T, N), got {shapes}")


# ---------------------------------------------------------------------------------------------------------------
# Sums over time
# ---------------------------------------------------------------------------------------------------------------


def discounted_sum(x: Array, discounts: Array) -> Array:
    """
    Solve ``y_t = x_t + d_t y_{t+1}`` with ``y_T = 0`` for all t at once.

    Doubling scan (Hillis & Steele, 1986): after the pass with stride k, ``y_t`` holds the first 2k terms of its sum and
    ``d_t`` the product of 2k discounts. A border, ``d_t = 0``, ends the sum there. About log2 of the longest piece
    passes over whole arrays, in double precision.

    :param x: summands, shape (T, N)
    :param discounts: d_t, 0 at the last step of each piece, shape (T, N)
    :return: y, float64, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(x=x, discounts=discounts)
    y = np.array(x, dtype=np.float64)
    d = np.array(discounts, dtype=np.float64)
    # Zeros, not whatever lies in memory: rows near the end are never read, but multiplied, which may warn
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


def first_step_of_piece(last: Array) -> Array:
    """
    :param last: True at the last step of each piece, shape (T, N)
    :return: row in which the piece of each step begins, int, shape (T, N)
    """
    begins = np.zeros(np.shape(last), dtype=np.intp)
    begins[1:] = np.where(last[:-1], np.arange(1, len(last))[:, None], 0)
    return np.maximum.accumulate(begins, axis=0)


def piece_index(last: Array) -> Array:
    """
    :param last: True at the last step of each piece, shape (T, N)
    :return: number of the piece to which each step belongs, counted through all columns, int, shape (T, N)
    """
    n_before = np.cumsum(last, axis=0) - last
    n_in_column = n_before[-1] + 1
    return n_before + (np.cumsum(n_in_column) - n_in_column)


# ---------------------------------------------------------------------------------------------------------------
# Estimators: psi_t
# ---------------------------------------------------------------------------------------------------------------


def reward_to_go(rewards: Array, next_values: Array, last: Array, gamma: float) -> Array:
    """
    ``G_t = r_t + d_t G_{t+1} + [last step of its piece] gamma v'_t`` (Sutton et al., 1999; GAE paper, psi no. 2).

    :param rewards: r_t, shape (T, N)
    :param next_values: v'_t, shape (T, N)
    :param last: True at the last step of each piece, shape (T, N)
    :param gamma: discount factor, in [0, 1]
    :return: G, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(rewards=rewards, next_values=next_values, last=last)
    return discounted_sum(rewards + last * (gamma * next_values), np.where(last, 0.0, gamma))


def total_return(rewards: Array, last: Array, gamma: float) -> Array:
    """
    ``R(tau) = sum_k gamma^k r_k`` over the whole episode, the same number at each of its steps
    (Williams, 1992; GAE paper, psi no. 1). The pieces must be whole episodes.

    :param rewards: r_t, shape (T, N)
    :param last: True at the last step of each piece, shape (T, N)
    :param gamma: discount factor, in [0, 1]
    :return: R(tau) of the episode to which each step belongs, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(rewards=rewards, last=last)
    from_here = discounted_sum(rewards, np.where(last, 0.0, gamma))
    return np.take_along_axis(from_here, first_step_of_piece(last), axis=0)


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
    :param last: True at the last step of each piece, shape (T, N)
    :param gamma: discount factor, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]
    :return: A, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(rewards=rewards, values=values, next_values=next_values, last=last)
    return discounted_sum(td_residual(rewards, values, next_values, gamma), np.where(last, 0.0, gamma * gae_lambda))


# ---------------------------------------------------------------------------------------------------------------
# Baselines: what is subtracted from psi_t
# ---------------------------------------------------------------------------------------------------------------


def mean_baseline(psi: Array, mask: Array, over: Collectives = ONE_PROCESS) -> Array:
    """
    Average of psi over all recorded steps of the batch. Each step is part of its own baseline.

    :param psi: what the estimator gives, shape (T, N)
    :param mask: True where the step was recorded, shape (T, N)
    :param over: the processes that share the batch
    :return: the baseline, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(psi=psi, mask=mask)
    total, n = over.sum(np.array([np.sum(psi, where=mask), mask.sum()]))
    return np.full(np.shape(psi), total / n)


def _sum_and_count_over_episodes(psi: Array, mask: Array, steps: Array, over: Collectives) -> tuple[Array, Array]:
    """Sum of psi over the episodes that reach the same step index, and their number; both of shape (T, N)."""
    index = steps[mask]
    longest = int(over.gather(index.max(initial=0)).max()) + 1
    sums, counts = over.sum(np.stack([np.bincount(index, weights, longest) for weights in (psi[mask], None)]))
    steps = np.where(mask, steps, 0)
    return sums[steps], counts[steps]


def time_baseline(psi: Array, mask: Array, steps: Array, over: Collectives = ONE_PROCESS) -> Array:
    """
    Average of psi at the same step index over all episodes of the batch that reach it. With K episodes the expected
    gradient is scaled by about 1 - 1/K, since each episode is part of its own baseline.

    :param psi: what the estimator gives, shape (T, N)
    :param mask: True where the step was recorded, shape (T, N)
    :param steps: index of the step within its episode, shape (T, N)
    :param over: the processes that share the batch
    :return: the baseline, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(psi=psi, mask=mask, steps=steps)
    sums, counts = _sum_and_count_over_episodes(psi, mask, steps, over)
    return sums / counts.clip(min=1)


def leave_one_out_baseline(psi: Array, mask: Array, steps: Array, over: Collectives = ONE_PROCESS) -> Array:
    """
    Average of psi at the same step index over the *other* episodes of the batch that reach it, 0 where there is none
    (Kool et al., 2019, https://openreview.net/forum?id=r1lgTGL5DE). Unbiased.

    :param psi: what the estimator gives, shape (T, N)
    :param mask: True where the step was recorded, shape (T, N)
    :param steps: index of the step within its episode, shape (T, N)
    :param over: the processes that share the batch
    :return: the baseline, shape (T, N)
    :raises ValueError: if the shapes differ or are not (T, N)
    """
    _check_shapes(psi=psi, mask=mask, steps=steps)
    sums, counts = _sum_and_count_over_episodes(psi, mask, steps, over)
    return np.where(counts > 1, (sums - psi) / (counts - 1).clip(min=1), 0.0)


# ---------------------------------------------------------------------------------------------------------------
# Normalisation
# ---------------------------------------------------------------------------------------------------------------

# As in SB3: keeps the quotient finite where the spread is tiny.
EPSILON = 1e-8
# Rewards are stored in single precision: a relative spread below this is rounding, not signal.
MIN_RELATIVE_SPREAD = float(np.finfo(np.float32).eps)


def normalize_within(advantages: Array, mask: Array, groups: Array) -> Array:
    """
    Standardise within each group: ``(A - mean) / (std + 1e-8)`` with the sample standard deviation (n - 1), as
    SB3 does. A group of one step, or one without spread, is centred and not scaled.

    :param advantages: A, shape (T, N)
    :param mask: True where the step was recorded, shape (T, N)
    :param groups: number of the group of each step, non-negative int, shape (T, N)
    :return: normalised advantages, zero where nothing was recorded, shape (T, N)
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


def normalize_batch(advantages: Array, mask: Array, last: Array, over: Collectives = ONE_PROCESS) -> Array:
    """Standardise over all recorded steps of the batch: :func:`normalize_within` where all are one group."""
    _check_shapes(advantages=advantages, mask=mask, last=last)
    x = advantages[mask].astype(np.float64)
    own_mean = x.sum() / max(len(x), 1)
    part = (len(x), own_mean, np.square(x - own_mean).sum(), np.abs(x).max(initial=0.0))
    # Sums of squares about the mean of a batch from those of its parts (Chan et al., 1979)
    counts, means, squares, magnitudes = over.gather(np.array(part)).T
    n = counts.sum()
    mean = counts @ means / max(n, 1)
    std = np.sqrt((squares.sum() + counts @ (means - mean) ** 2) / max(n - 1, 1))
    x -= mean
    if std > MIN_RELATIVE_SPREAD * magnitudes.max():
        x /= std + EPSILON
    normalized = np.zeros(np.shape(advantages))
    normalized[mask] = x
    return normalized


def normalize_episode(advantages: Array, mask: Array, last: Array, over: Collectives = ONE_PROCESS) -> Array:
    """Standardise within each episode, or the piece of it in the rollout, see :func:`normalize_within`."""
    return normalize_within(advantages, mask, piece_index(last))


# ---------------------------------------------------------------------------------------------------------------
# The switch
# ---------------------------------------------------------------------------------------------------------------


class _Estimator(NamedTuple):
    psi: Callable[[Rollout, float, float], Array]
    value_target: Callable[[Rollout, float, float, Array], Array]
    value_function: bool  # the value function is part of the estimator itself
    whole_episodes: bool


def _target_reward_to_go(x: Rollout, gamma: float, gae_lambda: float, psi: Array) -> Array:
    return reward_to_go(x.rewards, x.next_values, x.last, gamma)


def _target_psi(x: Rollout, gamma: float, gae_lambda: float, psi: Array) -> Array:
    return psi


def _target_psi_plus_value(x: Rollout, gamma: float, gae_lambda: float, psi: Array) -> Array:
    return psi + x.values


ESTIMATORS: dict[str, _Estimator] = {
    "total_return": _Estimator(
        psi=lambda x, gamma, gae_lambda: total_return(x.rewards, x.last, gamma),
        value_target=_target_reward_to_go,
        value_function=False,
        whole_episodes=True,
    ),
    "reward_to_go": _Estimator(
        psi=lambda x, gamma, gae_lambda: reward_to_go(x.rewards, x.next_values, x.last, gamma),
        value_target=_target_psi,
        value_function=False,
        whole_episodes=False,
    ),
    "td_residual": _Estimator(
        psi=lambda x, gamma, gae_lambda: td_residual(x.rewards, x.values, x.next_values, gamma),
        value_target=_target_psi_plus_value,
        value_function=True,
        whole_episodes=False,
    ),
    "gae": _Estimator(
        psi=lambda x, gamma, gae_lambda: gae(x.rewards, x.values, x.next_values, x.last, gamma, gae_lambda),
        value_target=_target_psi_plus_value,
        value_function=True,
        whole_episodes=False,
    ),
}


class _Baseline(NamedTuple):
    baseline: Callable[[Array, Rollout, Collectives], Array | float]
    value_function: bool
    whole_episodes: bool


BASELINES: dict[str | None, _Baseline] = {
    None: _Baseline(lambda psi, x, over: 0.0, value_function=False, whole_episodes=False),
    "mean": _Baseline(lambda psi, x, over: mean_baseline(psi, x.mask, over), value_function=False, whole_episodes=False),
    "time": _Baseline(
        lambda psi, x, over: time_baseline(psi, x.mask, x.steps, over), value_function=False, whole_episodes=True
    ),
    "leave_one_out": _Baseline(
        lambda psi, x, over: leave_one_out_baseline(psi, x.mask, x.steps, over), value_function=False, whole_episodes=True
    ),
    "value": _Baseline(lambda psi, x, over: x.values, value_function=True, whole_episodes=False),
}

NORMALIZATIONS: dict[bool | str, Callable[[Array, Array, Array, Collectives], Array]] = {
    False: lambda advantages, mask, last, over: advantages,
    True: normalize_batch,
    "batch": normalize_batch,
    "episode": normalize_episode,
}


@dataclass(frozen=True)
class Formulation:
    """
    One choice of estimator, baseline, normalisation and weighting.

    :param estimator: "total_return", "reward_to_go", "td_residual" or "gae"
    :param baseline: None, "mean", "time", "leave_one_out" or "value"; "td_residual" and "gae" contain the value
        function by definition and take None or "value", which mean the same there
    :param normalize_advantage: False, True or "batch" (over the whole batch), "episode" (within each episode)
    :param discount_state_distribution: weight step t of an episode by gamma^t, after the normalisation
        (Nota & Thomas, 2020, https://arxiv.org/abs/1906.07073); "total_return" already counts from the start of the
        episode and is not weighted again
    :param gamma: discount factor, in [0, 1]
    :param gae_lambda: lambda of the GAE paper, in [0, 1]; only "gae" reads it
    :raises ValueError: for an unknown name or a combination that cannot work
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
        if ESTIMATORS[self.estimator].value_function and self.baseline not in (None, "value"):
            raise ValueError(
                f"baseline={self.baseline!r} cannot be combined with estimator={self.estimator!r}, which subtracts the "
                "value function by definition; allowed: None, 'value'"
            )
        if (
            self.estimator == "total_return"
            and self.normalize_advantage == "episode"
            and self.baseline not in ("time", "leave_one_out", "value")
        ):
            raise ValueError(
                f"normalize_advantage='episode' with estimator='total_return' and baseline={self.baseline!r} is zero at "
                "every step, since the total return is one number per episode; allowed: normalize_advantage=False or "
                "'batch', or baseline='time', 'leave_one_out', 'value'"
            )

    @property
    def uses_value_function(self) -> bool:
        """Whether a trained value function is part of the formulation."""
        return ESTIMATORS[self.estimator].value_function or BASELINES[self.baseline].value_function

    @property
    def needs_whole_episodes(self) -> bool:
        """Whether the formulation has a meaning for whole episodes only."""
        return ESTIMATORS[self.estimator].whole_episodes or BASELINES[self.baseline].whole_episodes

    def __call__(self, rollout: Rollout, over: Collectives = ONE_PROCESS) -> tuple[Array, Array]:
        """
        :param rollout: arrays of shape (T, N)
        :param over: the processes that share the batch, of which this is the part of one
        :return: what multiplies grad log pi at each step (:meth:`normalize` of :meth:`advantages`), zero where nothing was
            recorded, and the target of the value function; both float64 of shape (T, N)
        """
        advantages, value_target = self.advantages(rollout, over)
        return self.normalize(advantages, rollout, over), value_target

    def advantages(self, rollout: Rollout, over: Collectives = ONE_PROCESS) -> tuple[Array, Array]:
        """
        :param rollout: arrays of shape (T, N)
        :param over: the processes that share the batch, of which this is the part of one
        :return: psi_t minus the baseline, zero where nothing was recorded, and the target of the value function:
            A_t + V(s_t) for "gae", r_t + gamma v'_t for "td_residual", G_t for the others; both float64 of shape (T, N)
        """
        _check_shapes(**rollout._asdict())
        mask = rollout.mask
        rollout = rollout._replace(rewards=np.where(mask, rollout.rewards, 0.0))
        estimator = ESTIMATORS[self.estimator]
        psi = estimator.psi(rollout, self.gamma, self.gae_lambda)
        value_target = estimator.value_target(rollout, self.gamma, self.gae_lambda, psi)
        # td_residual and gae have subtracted V(s_t) already
        baseline = 0.0 if estimator.value_function else BASELINES[self.baseline].baseline(psi, rollout, over)
        return np.where(mask, psi - baseline, 0.0), value_target

    def normalize(self, advantages: Array, rollout: Rollout, over: Collectives = ONE_PROCESS) -> Array:
        """
        Standardize the advantages as ``normalize_advantage`` says, then weight them by gamma^t if
        ``discount_state_distribution`` says so.

        :param advantages: as :meth:`advantages` returns them, shape (T, N)
        :param rollout: what they were computed from
        :param over: the processes that share the batch, of which this is the part of one
        :return: what multiplies grad log pi at each step, zero where nothing was recorded, float64, shape (T, N)
        """
        normalized = NORMALIZATIONS[self.normalize_advantage](advantages, rollout.mask, rollout.last, over)
        if self.discount_state_distribution and self.estimator != "total_return":
            normalized = normalized * self.gamma**rollout.steps
        return np.where(rollout.mask, normalized, 0.0)


def check_choice(keyword: str, value: object, allowed: object) -> None:
    """
    :raises ValueError: if ``value`` is not one of ``allowed``, naming the keyword, the value and the choices
    """
    choices = list(allowed)  # type: ignore[call-overload]
    # 1 == True and 0 == False: compare the types too
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{keyword}={value!r} is not allowed; choose one of {', '.join(map(repr, choices))}")

"""
Speed of the doubling scan of sb3_vpg.estimators, for the reward-to-go of a batch of episodes. It is compared with

- a Python loop over time steps, vectorized over environments (as in SB3's buffer),
- a product with the Toeplitz matrix of discounts, for each episode,
- scipy.signal.lfilter, for each episode.

    python benchmarks/returns_scan_speed.py

Output: median time of each method, and its ratio to the scan. Before the measurement, the results of all methods are compared.
"""

import time
from collections.abc import Callable

import numpy as np
from scipy.linalg import toeplitz
from scipy.signal import lfilter

from sb3_vpg.estimators import reward_to_go

GAMMA = 0.99
SHAPES = ((100, 1), (2048, 8), (128, 256))
# Mean length of the episodes, drawn from a geometric distribution
EPISODE_LENGTHS = (20, 200)
N_REPEATS = 15


def scan(rewards: np.ndarray, last: np.ndarray) -> np.ndarray:
    return reward_to_go(rewards, np.zeros_like(rewards), last, GAMMA)


def loop(rewards: np.ndarray, last: np.ndarray) -> np.ndarray:
    result, following = np.empty_like(rewards), np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        following = rewards[t] + GAMMA * ~last[t] * following
        result[t] = following
    return result


def per_episode(rewards: np.ndarray, last: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    result = np.empty_like(rewards)
    for n in range(rewards.shape[1]):
        begin = 0
        for end in np.flatnonzero(last[:, n]) + 1:
            result[begin:end, n] = function(rewards[begin:end, n])
            begin = end
    return result


def toeplitz_product(rewards: np.ndarray, last: np.ndarray) -> np.ndarray:
    powers = GAMMA ** np.arange(len(rewards))
    matrix = toeplitz(np.zeros(len(rewards)), powers)
    np.fill_diagonal(matrix, 1.0)
    return per_episode(rewards, last, lambda r: matrix[: len(r), : len(r)] @ r)


def lfilter_per_episode(rewards: np.ndarray, last: np.ndarray) -> np.ndarray:
    return per_episode(rewards, last, lambda r: lfilter([1], [1, -GAMMA], r[::-1])[::-1])


METHODS = {"scan": scan, "loop": loop, "Toeplitz": toeplitz_product, "lfilter": lfilter_per_episode}


def median_times(rewards: np.ndarray, last: np.ndarray) -> dict[str, float]:
    """:return: median seconds of each method; the methods are measured in turns"""
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(N_REPEATS):
        for name, method in METHODS.items():
            n_calls = 1 if name == "Toeplitz" else 5
            start = time.perf_counter()
            for _ in range(n_calls):
                method(rewards, last)
            times[name].append((time.perf_counter() - start) / n_calls)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'(T, N)':>12} {'episodes of':>12}  " + "  ".join(f"{name:>22}" for name in METHODS))
    for shape in SHAPES:
        for length in EPISODE_LENGTHS:
            rewards, last = rng.normal(size=shape), rng.random(shape) < 1 / length
            last[-1] = True
            expected = scan(rewards, last)
            for method in METHODS.values():
                np.testing.assert_allclose(method(rewards, last), expected, atol=1e-9)
            medians = median_times(rewards, last)
            cells = (f"{1e6 * s:9.0f} us ({s / medians['scan']:6.1f} x)" for s in medians.values())
            print(f"{shape!s:>12} {'~' + str(length):>12}  " + "  ".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()

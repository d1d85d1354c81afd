"""
Data-parallel training: speed of two processes compared with one process, and cost of their communication.

    python benchmarks/parallel.py --output benchmarks/results/parallel.json

Scenarios: 256 CartPole-v1 environments in one array, with and without a critic, 32 or 128 steps of each environment per
update; and 8 environments whose step takes 1 ms of processor time. One process and several processes are measured in turns,
each time in new processes. Output for each scenario: frames per second of both, ratio of each pair (median and range), bytes
and waiting time of a rank per update, and an estimate of the speed-up on k machines with the same total number of
environments:

    T(k) = T_1 / k + T_s(k),   T_s(k) = n_s (2 (k - 1) (latency + bytes / (k n_s bandwidth)) + t_s)

T_1 is the measured time of an update in one process, and n_s its number of sums. Each sum takes 2 (k - 1) messages (a ring)
and the time t_s, measured on this machine without a network. The estimate assumes that all environments take the same time.
"""

import argparse
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
import torch.distributed as dist
from gymnasium import spaces
from harness import median_and_range, save
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_vpg import VPG
from sb3_vpg.envs.native_vec_env import NativeVecEnv

#: Assumptions of the estimate: latency of a message in seconds, bandwidth in bytes per second (10 Gbit/s)
LATENCY, BANDWIDTH = 50e-6, 1.25e9


class MillisecondEnv(gym.Env):
    """An environment whose step takes 1 ms of processor time. Episodes have 100 steps."""

    observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        end = time.thread_time() + 0.001
        while time.thread_time() < end:
            pass
        self.t += 1
        return self._observation(), float(action), self.t == 100, False, {}

    def _observation(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 4).astype(np.float32)


class Scenario(NamedTuple):
    env: str | Callable[[], gym.Env]
    vec_env_class: type[VecEnv]
    n_envs: int
    #: whether n_envs is the number in each process; otherwise, n_envs environments are split across the processes
    in_each: bool
    kwargs: dict[str, Any]


# With learning rate 0, all policies stay untrained. Otherwise policies that learn would have longer episodes and fewer resets
COMMON = {"n_steps": 32, "learning_rate": 0.0}
CRITIC = {**COMMON, "n_critic_updates": 1}
NO_CRITIC = {**COMMON, "estimator": "reward_to_go", "partial_episodes": "truncate"}
SCENARIOS = {
    "CartPole-v1 x 256 in each, one critic pass": Scenario("CartPole-v1", NativeVecEnv, 256, True, CRITIC),
    "CartPole-v1 x 256 in each, ten critic passes": Scenario("CartPole-v1", NativeVecEnv, 256, True, COMMON),
    "CartPole-v1 x 256 in each, one critic pass, 128 steps": Scenario(
        "CartPole-v1", NativeVecEnv, 256, True, {**CRITIC, "n_steps": 128}
    ),
    "CartPole-v1 x 256 in each, no critic": Scenario("CartPole-v1", NativeVecEnv, 256, True, NO_CRITIC),
    "CartPole-v1 x 256 in all, one critic pass": Scenario("CartPole-v1", NativeVecEnv, 256, False, CRITIC),
    "1 ms per step x 8 in all, one critic pass": Scenario(MillisecondEnv, DummyVecEnv, 8, False, CRITIC),
}


class Measurement(NamedTuple):
    frames_per_second: float
    #: of one update and its rollout
    seconds_per_update: float
    #: number of sums of a rank per update, their bytes, and the time that the rank spends in them
    sums: float
    bytes: float
    seconds_in_sums: float


class Counted(NamedTuple):
    bytes: list[int]
    seconds: list[float]


@contextmanager
def counting() -> Iterator[Counted]:
    """Context that records the size in bytes and the duration of each collective operation."""
    counted = Counted([], [])

    def count(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def wrapper(*args: Any) -> Any:
            start = time.perf_counter()
            original(*args)
            counted.seconds.append(time.perf_counter() - start)
            counted.bytes.append(args[-1].nbytes)

        setattr(dist, name, wrapper)
        return original

    originals = {name: count(name) for name in ("all_reduce", "all_gather")}
    try:
        yield counted
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def run(scenario: str, seconds: float, rank: int, size: int, folder: str) -> Measurement:
    th.set_num_threads(1)
    if size > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    env_id, vec_env_class, n_envs, in_each, kwargs = SCENARIOS[scenario]
    n_own = n_envs if in_each else n_envs // size
    env = make_vec_env(env_id, n_envs=n_own, vec_env_cls=vec_env_class)
    model = VPG("MlpPolicy", env, seed=0, device="cpu", **kwargs)
    frames_per_update = model.n_steps * n_own * size

    def learn(n_updates: int) -> float:
        start = time.perf_counter()
        model.learn(n_updates * frames_per_update)
        return time.perf_counter() - start

    learn(3)
    n_updates = [max(1, round(10 * seconds / learn(10)))]
    if size > 1:
        dist.broadcast_object_list(n_updates)
    with counting() as counted:
        elapsed = learn(n_updates[0])
    if size > 1:
        dist.destroy_process_group()
    totals = (len(counted.bytes), sum(counted.bytes), sum(counted.seconds))
    seconds_per_update = elapsed / n_updates[0]
    return Measurement(frames_per_update / seconds_per_update, seconds_per_update, *(total / n_updates[0] for total in totals))


def measure(scenario: str, seconds: float, size: int) -> Measurement:
    """:return: the measurement of rank 0, in ``size`` new processes"""
    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Pool(size, maxtasksperchild=1) as pool:
        return pool.starmap(run, [(scenario, seconds, rank, size, folder) for rank in range(size)], chunksize=1)[0]


def estimated_speed_up(k: int, seconds_per_update: float, n_sums: float, n_bytes: float, seconds_per_sum: float) -> float:
    """:return: estimated speed-up of k machines over one, with the same total number of environments"""
    sums = n_sums * (2 * (k - 1) * (LATENCY + n_bytes / (k * n_sums * BANDWIDTH)) + seconds_per_sum)
    return seconds_per_update / (seconds_per_update / k + sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="approximate duration of each measurement")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    results = []
    for scenario in args.scenario:
        pairs = [[measure(scenario, args.seconds, size) for size in (1, args.processes)] for _ in range(args.repeat)]
        one, several = zip(*pairs)
        ratios = [many.frames_per_second / single.frames_per_second for single, many in pairs]
        print(scenario)
        for size, measured in ((1, one), (args.processes, several)):
            speed = median_and_range([m.frames_per_second / 1000 for m in measured])
            print(f"  {size} processes: {speed} thousand frames/s")
        print(f"  ratio: {median_and_range(ratios)}")
        n_sums, n_bytes, waiting = (float(np.median([m[i] for m in several])) for i in (2, 3, 4))
        seconds = float(np.median([m.seconds_per_update for m in one]))
        print(f"  update: {1000 * seconds:.1f} ms alone; {n_sums:.1f} sums of {n_bytes:.0f} bytes in {1000 * waiting:.2f} ms")
        # The minimum is the time without waiting for the other rank
        per_sum = min(m.seconds_in_sums / m.sums for m in several)
        machines = [2, 4, 8, 16, 32, 64]
        speed_ups = {k: estimated_speed_up(k, seconds, n_sums, n_bytes, per_sum) for k in machines}
        print(
            "  estimate for machines: " + ", ".join(f"{k}: {speed_up:.1f} x" for k, speed_up in speed_ups.items()), flush=True
        )
        results.append({"scenario": scenario, "one": one, "several": several, "ratios": ratios, "estimate": speed_ups})
        save(args, results)


if __name__ == "__main__":
    main()

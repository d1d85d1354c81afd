"""
Stability over thousands of updates: do memory, open files and processes stay constant?

    python benchmarks/soak.py --updates 20000

Trains with whole episodes of random length, so that rollouts differ in size. The model is saved about every 20 updates. Every
200 updates, it is loaded from a file and training continues in new environments. Output: docs/soak.png, and the growth of
memory (slope of a line fitted to the second half).
"""

import argparse
import os
import tempfile
from pathlib import Path

import gymnasium as gym
import harness  # noqa: F401  one thread, before torch is imported
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG
from sb3_vpg.diagnostics import GradientStatisticsCallback

N_ENVS = 4


class RandomLengths(gym.Env):
    """Random observations. Each episode ends after 1 to 60 steps, by termination or by a time limit."""

    observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.integers(1, 61)
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 4).astype(np.float32)

    def step(self, action):
        self.left -= 1
        over, by_limit = self.left == 0, bool(self.np_random.integers(2))
        return self.observe(), float(-np.square(action).sum()), over and not by_limit, over and by_limit, {}


class Gauge(BaseCallback):
    """
    Records memory [MiB], open files and processes.

    :param until: number of updates after which training stops
    :param every: number of updates between two readings
    :param readings: list to which readings are appended
    """

    def __init__(self, until: int, every: int, readings: list[tuple[int, float, int, int]]):
        super().__init__()
        self.until, self.every, self.readings = until, every, readings

    def _on_rollout_start(self) -> None:
        n_updates = self.model._n_updates
        if n_updates % self.every == 0 and (not self.readings or self.readings[-1][0] != n_updates):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            self.readings.append((n_updates, memory, len(os.listdir("/proc/self/fd")), len(children)))

    def _on_step(self) -> bool:
        return self.model._n_updates < self.until


def plot(readings: np.ndarray, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for panel, column, label in zip(panels, readings.T[1:], ("memory [MiB]", "open files", "processes")):
        panel.plot(readings[:, 0], column)
        panel.set_ylabel(label)
        panel.set_ylim(0, 1.2 * max(1, column.max()))
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("updates")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=20, help="number of updates between two readings")
    parser.add_argument("--reload-every", type=int, default=200, help="number of updates between two reloads")
    parser.add_argument("--plot", type=Path, help="image file")
    args = parser.parse_args()
    if args.updates < args.reload_every:
        parser.error("--updates must be at least --reload-every")

    readings: list[tuple[int, float, int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SB3_LOGDIR"] = folder
        env = make_vec_env(RandomLengths, N_ENVS, seed=0)
        model = VPG("MlpPolicy", env, n_episodes=1, policy_kwargs={"net_arch": [32]}, seed=0, device="cpu")
        for until in range(args.reload_every, args.updates + 1, args.reload_every):
            # Timesteps count up to the end of the longest of the four episodes of an update: 47 per environment on average
            checkpoints = CheckpointCallback(20 * 47, folder)
            callbacks = CallbackList([Gauge(until, args.every, readings), checkpoints, GradientStatisticsCallback(10)])
            model.learn(10**9, callback=callbacks, reset_num_timesteps=False, log_interval=10**9)
            model.save(f"{folder}/model")
            model.env.close()
            for path in Path(folder).glob("rl_model_*"):
                path.unlink()
            model = VPG.load(f"{folder}/model", env=make_vec_env(RandomLengths, N_ENVS), device="cpu")
    table = np.array(readings)
    if args.plot:
        plot(table, args.plot)
    later = table[len(table) // 2 :]
    slope = np.polyfit(later[:, 0], later[:, 1], 1)[0]
    print(f"{model._n_updates} updates, {model.num_timesteps} steps, {args.updates // args.reload_every} reloads")
    print(f"memory: {table[0, 1]:.0f} MiB at first, {table[-1, 1]:.0f} at last, {1e3 * slope:.2f} MiB per 1000 updates")
    print(f"open files: {table[:, 2].min():.0f} to {table[:, 2].max():.0f}, at last {table[-1, 2]:.0f}")
    print(f"processes: {table[:, 3].min():.0f} to {table[:, 3].max():.0f}")


if __name__ == "__main__":
    main()

"""
Frames per second of training on a GPU: VPG compared with A2C and PPO, each on the GPU and on the CPU.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --task images --images 64 --seconds 5

- vectors: MlpPolicy, two hidden layers, on CartPole-v1 in a NativeVecEnv; each width with each number of environments
- images: CnnPolicy on Pong in EnvPool, 84 x 84 x 4, if EnvPool is installed

Rollouts have 32 steps of each environment. VPG and A2C make one pass over a rollout, PPO makes 10 in four minibatches (64
frames at least). On the CPU, one thread computes layers of 64, ``--threads`` threads all else; what would take minutes there
is left out.

Output: frames per second, as a ratio to A2C on the same device, and the share of the update in VPG's time.
"""

import argparse
import importlib.util
import itertools
import time
from pathlib import Path
from typing import Any

import torch as th
from contestants import Setting, make_env, make_model, training
from harness import frames_per_second, save
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_vpg.envs import EnvPoolVecEnv

ALGORITHMS = ("A2C", "VPG, gae", "PPO")
#: Largest number of environments times width that the CPU gets
LARGEST_ON_CPU = 2**18
#: Width of the layers that take about as long as the convolutions
WIDTH_OF_IMAGES = 2**12


def clock() -> float:
    """:return: the time in seconds, when the GPU has done what it was given"""
    if th.cuda.is_available():
        th.cuda.synchronize()
    return time.perf_counter()


def pong(n_envs: int, threads: int) -> VecEnv:
    # With the options of SB3's AtariWrapper
    return EnvPoolVecEnv("Pong-v5", n_envs, seed=0, num_threads=threads, episodic_life=True, reward_clip=True)


def measure(model: OnPolicyAlgorithm, n_frames: int, seconds: float) -> tuple[float, float]:
    """:return: frames per second, and the share of the update in the time"""
    in_updates, train = 0.0, model.train

    def timed_train() -> None:
        nonlocal in_updates
        start = clock()
        train()
        in_updates += clock() - start

    run = training(model)
    speed = frames_per_second(run, n_frames, seconds, clock)
    # Apart from the measurement of the speed, for which the GPU is not waited for
    model.train = timed_train  # type: ignore[method-assign]
    start = clock()
    run(n_frames)
    return speed, in_updates / (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["vectors", "images"], choices=["vectors", "images"])
    parser.add_argument("--width", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--envs", nargs="+", type=int, default=[8, 64, 512, 4096], help="vectors: numbers of environments")
    parser.add_argument("--images", nargs="+", type=int, default=[8, 64, 256], help="images: numbers of environments")
    parser.add_argument("--device", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate duration of a measurement")
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    args = parser.parse_args()
    if "cuda" in args.device and not th.cuda.is_available():
        parser.error("there is no GPU: --device cpu")

    settings: list[Setting] = []
    if "vectors" in args.task:
        settings += [Setting(n, native=True, width=width) for width in args.width for n in args.envs]
    if "images" in args.task and importlib.util.find_spec("envpool") is not None:
        settings += [Setting(n, images=True) for n in args.images]
    results: list[dict[str, Any]] = []
    # What the GPU does is measured first
    for device, setting in itertools.product(args.device, settings):
        task, width = ("images", 0) if setting.images else ("vectors", setting.width)
        if device == "cpu" and setting.n_envs * (width or WIDTH_OF_IMAGES) > LARGEST_ON_CPU:
            continue
        th.set_num_threads(1 if width == 64 else args.threads)
        env = pong(setting.n_envs, args.threads) if setting.images else make_env(setting)
        of_a2c = 0.0
        for name in ALGORITHMS:
            model = make_model(setting, name, env, device=device, learning_rate=0.0)
            speed, share = measure(model, setting.n_frames, args.seconds)
            of_a2c = of_a2c or speed
            results.append(
                {"task": task, "width": width, "n_envs": setting.n_envs, "device": device, "algorithm": name}
                | {"frames_per_second": speed, "share_of_update": share}
            )
            print(
                f"{device:4}  {task:7}  width {width:4} x {setting.n_envs:4}  {name:8} {speed:11,.0f} frames/s "
                f"{speed / of_a2c:6.2f} x A2C  update {share:4.0%}",
                flush=True,
            )
            save(args, results)


if __name__ == "__main__":
    main()

"""
Frames per second of environments alone and of training: SB3's DummyVecEnv and SubprocVecEnv, and EnvPool.

    python benchmarks/engines.py
    python benchmarks/engines.py --env Acrobot-v1 --n-envs 64 --measure "VPG, gae" --output acrobot.jsonl

Engines: DummyVecEnv, SubprocVecEnv, EnvPoolVecEnv with one and two threads, and NativeVecEnv if the environment has a
vectorized form. Monitors as `make_vec_env` adds them. Atari: `make_atari_env` and VecFrameStack of 4; a frame is a step of the
environment, which is four frames of the game.

What is measured: the environments alone, with random actions, and training on one thread of PyTorch with default
hyperparameters, except the length of the rollouts.

- VPG: 64 steps of each environment, its default, with one critic pass, like A2C, and with the default critic, ten passes.
- A2C: 5 steps of each environment, its default.
- PPO: 512 steps of all environments together. The minibatches of 64 and the 10 epochs are its default, so an update costs as
  much per frame as with its default of 2048 steps of each environment.
- Atari: VPG 256 and PPO 128 steps of all environments together, since images take long; without the default critic.

As in `throughput.py`, the learning rate is 0: updates are computed in full, but all policies stay untrained, so all engines
have equally long episodes.

Each environment and number of environments has a new process. A round measures all engines, in an order that changes from
round to round. The tables show the median of DummyVecEnv over the rounds, and for the others the ratio to DummyVecEnv within a
round as median [minimum, maximum]. Each result is appended to the output file at once. Results that are in the file already
are not measured again; the tables show all results of the file.
"""

import argparse
import importlib
import itertools
import json
import multiprocessing as mp
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from contestants import CONTESTANTS, training
from harness import frames_per_second, machine, markdown_table, median_and_range, read_lines
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack
from throughput import Run, stepping

from sb3_vpg.envs import EnvPoolVecEnv
from sb3_vpg.envs.native_vec_env import NativeVecEnv

ENVIRONMENTS = (
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "LunarLander-v3",
    "Hopper-v5",
    "HalfCheetah-v5",
    "Ant-v5",
    "PongNoFrameskip-v4",
)
BASELINE = "DummyVecEnv"
# The classes of VecEnv and their keyword arguments
ENGINES: dict[str, tuple[type[VecEnv], dict[str, Any]]] = {
    BASELINE: (DummyVecEnv, {}),
    # By default, each of 64 processes imports PyTorch, which takes minutes. Processes that exist step equally fast
    "SubprocVecEnv": (SubprocVecEnv, {"start_method": "fork"}),
    "NativeVecEnv": (NativeVecEnv, {}),
    "EnvPool, 1 thread": (EnvPoolVecEnv, {"num_threads": 1}),
    "EnvPool, 2 threads": (EnvPoolVecEnv, {"num_threads": 2}),
}
ALONE = "environments alone"
DEFAULT_CRITIC = "VPG, gae, default critic"
# What is measured, and the settings as the tables show them
SETTINGS = {
    ALONE: "random actions",
    "VPG, gae": "`n_steps=64` (Pong: 256 / environments), `n_critic_updates=1`",
    DEFAULT_CRITIC: "`n_steps=64`, `n_critic_updates=10`",
    "A2C": "`n_steps=5`",
    "PPO": "`n_steps` 512 (Pong: 128) / environments, `batch_size=64`, `n_epochs=10`",
}


class Job(NamedTuple):
    env: str
    n_envs: int
    measures: tuple[str, ...]
    rounds: int
    seconds: float
    output: Path


def is_atari(env_id: str) -> bool:
    return "NoFrameskip" in env_id


def has_vectorized_form(env_id: str) -> bool:
    return gym.spec(env_id).vector_entry_point is not None


def make_envs(env_id: str, n_envs: int, engine: str) -> VecEnv:
    vec_env_cls, vec_env_kwargs = ENGINES[engine]
    make = make_atari_env if is_atari(env_id) else make_vec_env
    env = make(env_id, n_envs, seed=0, vec_env_cls=vec_env_cls, vec_env_kwargs=vec_env_kwargs)
    return VecFrameStack(env, 4) if is_atari(env_id) else env


def steps_in_rollout(measure: str, env_id: str, n_envs: int) -> int:
    """:return: steps of each environment between two updates"""
    algorithm = CONTESTANTS[measure][0]
    if algorithm is A2C:
        return 5
    if algorithm is PPO:
        return (128 if is_atari(env_id) else 512) // n_envs
    return 256 // n_envs if is_atari(env_id) else 64


def environments_alone(env: VecEnv) -> Callable[[], Run]:
    actions = [np.stack([env.action_space.sample() for _ in range(env.num_envs)]) for _ in range(100)]

    def start() -> Run:
        cycle = itertools.cycle(actions)
        return stepping(env, lambda obs: next(cycle))

    return start


def trainer(env: VecEnv, measure: str, env_id: str) -> Callable[[], Run]:
    algorithm, kwargs = CONTESTANTS[measure]
    policy = "CnnPolicy" if is_atari(env_id) else "MlpPolicy"
    n_steps = steps_in_rollout(measure, env_id, env.num_envs)
    run = training(algorithm(policy, env, n_steps=n_steps, learning_rate=0.0, seed=0, device="cpu", **kwargs))
    return lambda: run


def measure_engines(job: Job) -> None:
    """Measure the frames per second of each round and engine, and append them to the output file, a line for each measure."""
    th.set_num_threads(1)
    if is_atari(job.env):
        # Registers the environments
        importlib.import_module("ale_py")
    names = [name for name in ENGINES if name != "NativeVecEnv" or has_vectorized_form(job.env)]
    # DummyVecEnv is the first: it imports what the forked processes of SubprocVecEnv need. EnvPool is the last: forked
    # processes have none of its threads
    envs = {name: make_envs(job.env, job.n_envs, name) for name in names}
    for measure in job.measures:
        n_frames = 20 * job.n_envs
        starts = {name: environments_alone(env) for name, env in envs.items() if measure == ALONE}
        if measure != ALONE:
            n_frames = job.n_envs * steps_in_rollout(measure, job.env, job.n_envs)
            starts = {name: trainer(env, measure, job.env) for name, env in envs.items()}
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for round_number in range(job.rounds):
            for name in random.Random(round_number).sample(names, len(names)):
                speeds[name].append(round(frames_per_second(starts[name](), n_frames, job.seconds), 1))
        line = {"env": job.env, "n_envs": job.n_envs, "measure": measure, "frames_per_second": speeds, "machine": machine()}
        with job.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(summary(line), flush=True)
    for env in envs.values():
        env.close()


def ratios(line: dict[str, Any], engine: str) -> np.ndarray:
    """:return: the engine's frames per second relative to DummyVecEnv's, of each round"""
    speeds = line["frames_per_second"]
    return np.divide(speeds[engine], speeds[BASELINE])


def summary(line: dict[str, Any]) -> str:
    speeds = line["frames_per_second"]
    others = "".join(f"  {name} x {median_and_range(ratios(line, name))}" for name in speeds if name != BASELINE)
    return f"{line['env']} x {line['n_envs']}, {line['measure']}: {np.median(speeds[BASELINE]):,.0f} frames/s{others}"


def engines_table(results: list[dict[str, Any]], measure: str) -> str:
    """:return: Markdown table of a measure and a line of settings, in the order of ``ENVIRONMENTS``"""
    lines = [line for line in results if line["measure"] == measure]
    order = {env_id: i for i, env_id in enumerate(ENVIRONMENTS)}
    lines.sort(key=lambda line: (order.get(line["env"], len(order)), line["n_envs"]))
    others = [name for name in ENGINES if name != BASELINE and any(name in line["frames_per_second"] for line in lines)]
    rows = []
    for line in lines:
        speeds = line["frames_per_second"]
        cells = [median_and_range(ratios(line, name)) if name in speeds else "" for name in others]
        rows.append([f"{line['env']} x {line['n_envs']}", f"{np.median(speeds[BASELINE]):,.0f}", *cells])
    settings = SETTINGS[measure] + ("" if measure == ALONE else ", `learning_rate=0`, otherwise default hyperparameters")
    table = markdown_table([measure, f"{BASELINE}, frames/s", *(f"x with {name}" for name in others)], rows)
    return f"{table}\n\nSettings: {settings}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--n-envs", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--measure", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="approximate duration of a measurement; at least one rollout"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "engines.jsonl")
    args = parser.parse_args()

    # SubprocVecEnv needs a process that is allowed to have children, which the workers of `in_processes` are not
    with ProcessPoolExecutor(1, mp.get_context("spawn"), max_tasks_per_child=1) as pool:
        known = {(line["env"], line["n_envs"], line["measure"]) for line in read_lines(args.output)}
        for env_id, n_envs in itertools.product(args.env, args.n_envs):
            measures = tuple(
                measure
                for measure in args.measure
                if (env_id, n_envs, measure) not in known and not (is_atari(env_id) and measure == DEFAULT_CRITIC)
            )
            if measures:
                pool.submit(measure_engines, Job(env_id, n_envs, measures, args.rounds, args.seconds, args.output)).result()
    for measure in SETTINGS:
        print(f"\n{engines_table(read_lines(args.output), measure)}")


if __name__ == "__main__":
    main()

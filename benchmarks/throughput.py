"""
Frames per second of training: VPG compared with A2C, PPO, Tianshou's Reinforce, and two upper bounds.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --scenario b c --threads 1 2 --output throughput.json

Scenarios, all with 32 steps of each environment per rollout: MlpPolicy, two hidden layers of 64, on CartPole-v1 with (a) 8
environments in a DummyVecEnv, (b) 256 in a DummyVecEnv and in a NativeVecEnv, (c) 2048 in a NativeVecEnv; and (d) CnnPolicy on
84 x 84 x 4 images whose generation costs almost nothing, 8 in a DummyVecEnv.

- A2C, PPO: those of Stable-Baselines3 with default hyperparameters, except n_steps. A2C makes one pass over each rollout. PPO
  makes 10, in minibatches of 64 (a, d), 2048 (b) or 16384 (c).
- VPG, gae: one critic pass, like A2C. With the default critic: further passes of the value regression. reward_to_go: no
  critic.
- Tianshou Reinforce, if Tianshou 2 is installed (a, b): one gradient step per rollout, no critic, the same layers, Tianshou's
  own DummyVectorEnv.
- bare loop: only the forward pass of the actor, sampling, and the step of the environments.
- environments alone: random actions.

Each scenario and number of threads has a new process, in which the contestants are measured in turns. Output: median over the
rounds, and ratio to A2C within a round as median [minimum, maximum]. Without --learn, the learning rate is 0: updates are
computed in full, but all policies stay untrained. Otherwise policies that learn faster would have longer episodes, and thus
fewer resets, which cost time.
"""

import argparse
import importlib.util
import itertools
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from contestants import CONTESTANTS, SCENARIOS, Setting, make_env, make_model, training
from gymnasium import spaces
from harness import frames_per_second, in_processes, median_and_range, save
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.vec_env import VecEnv

# Runs for at least the given number of frames, and returns the actual number
Run = Callable[[int], int]


class Job(NamedTuple):
    scenario: str
    threads: int
    rounds: int
    seconds: float
    learn: bool


class Entry(NamedTuple):
    """One line of a table."""

    contestant: str
    environments: str
    start: Callable[[], Run]


def stepping(env: VecEnv, actions_for: Callable[[Any], np.ndarray]) -> Run:
    obs = env.reset()

    def run(n_frames: int) -> int:
        nonlocal obs
        n_steps = math.ceil(n_frames / env.num_envs)
        for _ in range(n_steps):
            obs, _, _, _ = env.step(actions_for(obs))
        return n_steps * env.num_envs

    return run


def algorithm(setting: Setting, contestant: str, **kwargs: Any) -> Run:
    return training(make_model(setting, contestant, **kwargs))


def environments_alone(setting: Setting) -> Run:
    env = make_env(setting)
    assert isinstance(env.action_space, spaces.Discrete)
    actions = itertools.cycle(np.random.default_rng(0).integers(env.action_space.n, size=(1000, setting.n_envs)))
    return stepping(env, lambda obs: next(actions))


def bare_loop(setting: Setting) -> Run:
    model = make_model(setting, "A2C")
    env, policy = model.get_env(), model.policy
    assert env is not None
    assert isinstance(policy, ActorCriticPolicy)
    actor = th.nn.Sequential(policy.pi_features_extractor, policy.mlp_extractor.policy_net, policy.action_net)

    @th.inference_mode()
    def sample_actions(obs: np.ndarray) -> np.ndarray:
        logits = actor(preprocess_obs(th.as_tensor(obs), policy.observation_space))
        # The index of the maximum of logits + Gumbel noise is a sample from the softmax
        return (logits - th.empty_like(logits).exponential_().log_()).argmax(dim=1).numpy()

    return stepping(env, sample_actions)


def tianshou_reinforce(setting: Setting, learning_rate: float = 1e-3) -> Run:
    from tianshou.algorithm import Reinforce
    from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.trainer import OnPolicyTrainerParams
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.discrete import DiscreteActor

    env = DummyVectorEnv([lambda: gym.make("CartPole-v1") for _ in range(setting.n_envs)])
    action_space = env.action_space[0]
    layers = Net(state_shape=(4,), hidden_sizes=(setting.width, setting.width), activation=th.nn.Tanh)
    actor = DiscreteActor(preprocess_net=layers, action_shape=action_space.n, softmax_output=False)
    policy = DiscreteActorPolicy(actor=actor, action_space=action_space)
    reinforce = Reinforce(policy=policy, optim=AdamOptimizerFactory(lr=learning_rate))
    collector: Collector = Collector(reinforce, env, VectorReplayBuffer(setting.n_frames, setting.n_envs))

    def run(n_frames: int) -> int:
        params = OnPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=n_frames,
            collection_step_num_env_steps=setting.n_frames,
            # The whole rollout
            batch_size=None,
            verbose=False,
            show_progress=False,
        )
        return reinforce.run_training(params).train_step

    return run


def has_tianshou() -> bool:
    return importlib.util.find_spec("tianshou") is not None


def entries(scenario: str, learn: bool) -> list[Entry]:
    """:return: the lines of the scenario's table"""
    kwargs = {} if learn else {"learning_rate": 0.0}
    result = []
    for setting in SCENARIOS[scenario]:
        starts: dict[str, Callable[[], Run]] = {name: partial(algorithm, setting, name, **kwargs) for name in CONTESTANTS}
        if has_tianshou() and not setting.native and not setting.images:
            starts["Tianshou Reinforce"] = partial(tianshou_reinforce, setting, **kwargs)
        starts |= {"bare loop": partial(bare_loop, setting), "environments alone": partial(environments_alone, setting)}
        result += [Entry(name, setting.environments, start) for name, start in starts.items()]
    return result


def measure(job: Job) -> list[dict[str, Any]]:
    """:return: the lines of the scenario's table, with the frames per second of each round"""
    th.set_num_threads(job.threads)
    n_frames = SCENARIOS[job.scenario][0].n_frames
    lines = entries(job.scenario, job.learn)
    rounds = [[frames_per_second(line.start(), n_frames, job.seconds) for line in lines] for _ in range(job.rounds)]
    return [
        {
            "scenario": job.scenario,
            "n_envs": SCENARIOS[job.scenario][0].n_envs,
            "threads": job.threads,
            "contestant": line.contestant,
            "environments": line.environments,
            "frames_per_second": list(speeds),
        }
        for line, speeds in zip(lines, zip(*rounds))
    ]


def print_table(job: Job, results: list[dict[str, Any]]) -> None:
    setting = SCENARIOS[job.scenario][0]
    task = "CnnPolicy, images" if setting.images else "MlpPolicy, CartPole-v1"
    print(f"({job.scenario}) {task} x {setting.n_envs}, threads: {job.threads}, median of {job.rounds} rounds")
    speeds = {(line["contestant"], line["environments"]): np.array(line["frames_per_second"]) for line in results}
    for (contestant, environments), own in speeds.items():
        line = f"{contestant:>26}  {environments:<12} {np.median(own):11,.0f} frames/s"
        line += f"  {median_and_range(own / speeds['A2C', environments]):>22} x A2C"
        if environments != setting.environments:
            line += f"  {median_and_range(own / speeds['A2C', setting.environments]):>22} x A2C in {setting.environments}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="approximate duration of a measurement; at least one rollout"
    )
    parser.add_argument("--learn", action="store_true", help="train with the default learning rates")
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    args = parser.parse_args()

    if not has_tianshou():
        print("Tianshou is not installed and not measured")
    results = []
    for threads in args.threads:
        # Inherited by the new processes, which import NumPy and torch afterwards
        os.environ["OMP_NUM_THREADS"] = str(threads)
        jobs = [Job(scenario, threads, args.rounds, args.seconds, args.learn) for scenario in args.scenario]
        for job, lines in zip(jobs, in_processes(measure, jobs, 1)):
            print_table(job, lines)
            results += lines
            save(args, results)


if __name__ == "__main__":
    main()

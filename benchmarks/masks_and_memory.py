"""
Frames per second and memory of training with action masks and with LSTMs: MaskableVPG and RecurrentVPG compared with
sb3-contrib's MaskablePPO and RecurrentPPO.

    python benchmarks/masks_and_memory.py --output masks_and_memory.json

All train on CartPole-v1 in a DummyVecEnv of 8 and of 64, with 32 steps of each environment per rollout and one pass over the
rollout (``n_epochs=1`` with the whole rollout as batch, ``n_critic_updates=1``). The learning rate is 0, so that all policies
stay untrained. Masks: MlpPolicy with two hidden layers of 64; the mask is constant and allows all actions. Memory:
MlpLstmPolicy with the networks of the zoo's entry for CartPoleNoVel-v1, an LSTM of 64 for the actor and one for the critic.

The contestants take turns in one process, on one thread. Seconds are those of the processor, equal to wall-clock time if
nothing else runs. Output: median over the rounds, and ratio to PPO within a round as median [minimum, maximum]. Peak memory:
growth of a new process from the first rollout to the end of the fourth update, in MiB.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

from harness import frames_per_second, in_processes, median_and_range, save

N_STEPS = 32
CONTESTANTS = {"masks": ("MaskablePPO", "MaskableVPG"), "memory": ("RecurrentPPO", "RecurrentVPG")}


class Job(NamedTuple):
    task: str
    n_envs: int
    rounds: int
    seconds: float


class MemoryJob(NamedTuple):
    task: str
    n_envs: int
    contestant: str


def make_model(task: str, n_envs: int, contestant: str) -> Any:
    import gymnasium as gym
    import numpy as np
    import sb3_contrib
    from sb3_contrib.common.wrappers import ActionMasker
    from stable_baselines3.common.env_util import make_vec_env

    import sb3_vpg

    mask = np.ones(2, dtype=bool)

    def with_masks(env: gym.Env) -> gym.Env:
        return ActionMasker(env, lambda env: mask)

    env = make_vec_env("CartPole-v1", n_envs, seed=0, wrapper_class=with_masks if task == "masks" else None)
    kwargs: dict[str, Any] = {"n_steps": N_STEPS, "learning_rate": 0.0, "seed": 0, "device": "cpu"}
    if task == "memory":
        kwargs["policy_kwargs"] = {"lstm_hidden_size": 64, "net_arch": {"pi": [64], "vf": [64]}}
    policy = "MlpLstmPolicy" if task == "memory" else "MlpPolicy"
    if contestant.endswith("PPO"):
        return getattr(sb3_contrib, contestant)(policy, env, n_epochs=1, batch_size=N_STEPS * n_envs, **kwargs)
    return getattr(sb3_vpg, contestant)(policy, env, n_critic_updates=1, **kwargs)


def speeds(job: Job) -> list[dict[str, Any]]:
    """:return: for each contestant, the frames per second of each round"""
    from contestants import training

    runs = [training(make_model(job.task, job.n_envs, contestant)) for contestant in CONTESTANTS[job.task]]
    n_frames = N_STEPS * job.n_envs
    rounds = [[frames_per_second(run, n_frames, job.seconds, time.process_time) for run in runs] for _ in range(job.rounds)]
    return [
        {"task": job.task, "n_envs": job.n_envs, "contestant": contestant, "frames_per_second": list(own)}
        for contestant, own in zip(CONTESTANTS[job.task], zip(*rounds))
    ]


def peak_memory(job: MemoryJob) -> float:
    """:return: MiB by which four rollouts and their updates increase the peak memory of the process"""
    model = make_model(*job)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.learn(4 * N_STEPS * job.n_envs)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--n-envs", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="approximate duration of a measurement; at least one rollout"
    )
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    args = parser.parse_args()

    jobs = [Job(task, n_envs, args.rounds, args.seconds) for task in args.task for n_envs in args.n_envs]
    results: list[dict[str, Any]] = []
    for job, lines in zip(jobs, in_processes(speeds, jobs, 1)):
        peaks = in_processes(peak_memory, [MemoryJob(job.task, job.n_envs, line["contestant"]) for line in lines], 1)
        of_ppo = lines[0]["frames_per_second"]
        for line, mib in zip(lines, peaks):
            line["mib"] = mib
            own = line["frames_per_second"]
            ratio = median_and_range([a / b for a, b in zip(own, of_ppo)])
            name = f"{line['contestant']:>14} x {job.n_envs:<3}"
            print(f"{name} {sorted(own)[len(own) // 2]:9,.0f} frames/s  {ratio} x PPO  {mib:5.1f} MiB", flush=True)
        results += lines
        save(args, results)


if __name__ == "__main__":
    main()

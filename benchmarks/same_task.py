"""
Is an environment in EnvPool the same task as in gymnasium?

    python benchmarks/same_task.py --output benchmarks/results/same_task.jsonl

Distributions, for each id: spaces, time limit, range of single rewards, and the returns and lengths of episodes of a
random policy and of a trained policy, in EnvPoolVecEnv and in DummyVecEnv. Each of the `N_ENVS` environments contributes the
same number of episodes, its first ones, so that short episodes are not preferred. The policy is trained in EnvPoolVecEnv only.
Output: two-sample Kolmogorov-Smirnov tests, with Holm's correction for the number of all tests.

Step by step, where the observation has the whole state: gymnasium's environment gets the state that EnvPool's observation
shows, both get the same action, and next observation, reward and termination are compared. In Atari, both play the same
games. Output: the largest differences. Those of MuJoCo depend on the installed version, which need not be the one inside
EnvPool: another version adds its own results.

`--output` saves each result when it is measured. A second call with the same file measures only what is missing.
`python benchmarks/write_tables.py` writes the tables of docs/envpool.md from it.
"""

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from harness import read_lines
from scipy.stats import ks_2samp
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import AtariWrapper, ClipRewardEnv, MaxAndSkipEnv, WarpFrame
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_vpg import VPG
from sb3_vpg.envs import EnvPoolVecEnv
from sb3_vpg.envs.envpool_equivalent import find_equivalent
from sb3_vpg.envs.envpool_vector import envpool_options, import_envpool, spaces_of

PARTS = ("step by step", "distributions")
ENGINES: dict[str, type[VecEnv]] = {"EnvPool": EnvPoolVecEnv, "gymnasium": DummyVecEnv}
#: Environments that are stepped at once in an evaluation
N_ENVS = 20
#: Family level of the tests
LEVEL = 0.05
#: Seed of the environments and actions of each engine: the samples of a test are independent
SEEDS = {"EnvPool": 1_000, "gymnasium": 1_000_000}


class Task(NamedTuple):
    """
    :param env_id: id of the environment in gymnasium
    :param train: algorithm, number of environments, number of steps, and the algorithm's keyword arguments
    :param n_episodes: number of episodes of each policy and engine
    :param deterministic: whether the trained policy is deterministic when it is evaluated
    :param normalize: whether the trained policy has normalized observations, and rewards in training
    """

    env_id: str
    train: tuple[type[VPG] | type[PPO], int, int, dict[str, Any]]
    n_episodes: int = 200
    deterministic: bool = True
    normalize: bool = True


def ppo(total: int, n_envs: int = 32, **kwargs: Any) -> tuple[type[PPO], int, int, dict[str, Any]]:
    defaults = {"n_steps": 64, "batch_size": 512, "n_epochs": 5, "learning_rate": 1e-3, "gamma": 0.99}
    return PPO, n_envs, total, {**defaults, **kwargs}


def vpg(total: int, n_envs: int, **kwargs: Any) -> tuple[type[VPG], int, int, dict[str, Any]]:
    return VPG, n_envs, total, kwargs


SDE = {"use_sde": True, "sde_sample_freq": 16, "policy_kwargs": {"log_std_init": 0.0, "ortho_init": False}}
LANDER = {"n_steps": 64, "gamma": 0.999, "gae_lambda": 0.98, "ent_coef": 0.01, "learning_rate": 0.003, "n_critic_updates": 10}
CNN = {"n_steps": 128, "batch_size": 256, "n_epochs": 3, "learning_rate": 5e-4, "ent_coef": 0.01}
TASKS = (
    Task("CartPole-v1", vpg(50_000, 8)),
    Task("Acrobot-v1", ppo(150_000)),
    Task("Pendulum-v1", ppo(250_000, gamma=0.95, gae_lambda=0.9)),
    Task("MountainCar-v0", vpg(300_000, 16, n_steps=128, gae_lambda=0.98, learning_rate=0.005, n_critic_updates=20)),
    Task("MountainCarContinuous-v0", vpg(100_000, 4, n_steps=100, learning_rate=0.001, n_critic_updates=5, **SDE)),
    Task("LunarLander-v3", vpg(400_000, 16, **LANDER), normalize=False),
    Task("LunarLanderContinuous-v3", ppo(200_000), n_episodes=60),
    Task("InvertedPendulum-v5", ppo(60_000), n_episodes=100),
    Task("InvertedDoublePendulum-v5", ppo(120_000), n_episodes=100),
    Task("Reacher-v5", ppo(200_000)),
    Task("Hopper-v5", ppo(200_000)),
    Task("Walker2d-v5", ppo(200_000)),
    Task("FrozenLake-v1", ppo(100_000), deterministic=False, normalize=False),
    Task("MiniGrid-Empty-Random-5x5-v0", ppo(30_000), deterministic=False, normalize=False),
    Task("MiniGrid-DoorKey-5x5-v0", ppo(60_000, ent_coef=0.01), deterministic=False, normalize=False),
    Task("MiniGrid-LavaGapS5-v0", ppo(60_000, ent_coef=0.01), deterministic=False, normalize=False),
    Task("Humanoid-v5", ppo(100_000)),
    Task("Pusher-v5", ppo(200_000)),
    # Fewer episodes where they are long, or where gymnasium is slow
    Task("HalfCheetah-v5", ppo(200_000)),
    Task("Swimmer-v5", ppo(200_000, gamma=0.9999)),
    Task("Ant-v5", ppo(150_000), n_episodes=60),
    Task("BreakoutNoFrameskip-v4", ppo(20_000, n_envs=8, **CNN), n_episodes=100, deterministic=False, normalize=False),
    Task("PongNoFrameskip-v4", ppo(10_000, n_envs=8, **CNN), n_episodes=20, deterministic=False, normalize=False),
    Task("BipedalWalker-v3", ppo(200_000), n_episodes=40),
    Task("HumanoidStandup-v5", ppo(50_000), n_episodes=20),
    Task("BipedalWalkerHardcore-v3", ppo(100_000), n_episodes=20),
)


def make(engine: str, env_id: str, n_envs: int, seed: int, **env_kwargs: Any) -> VecEnv:
    """:return: environments of an engine, with SB3's Atari preprocessing or MiniGrid's observations as one vector"""
    threads = {"num_threads": 1} if engine == "EnvPool" else {}
    kwargs: dict[str, Any] = {"n_envs": n_envs, "seed": seed, "vec_env_cls": ENGINES[engine], "vec_env_kwargs": threads}
    wrapper = register(env_id)
    if wrapper is AtariWrapper:
        return VecFrameStack(make_atari_env(env_id, env_kwargs=env_kwargs, **kwargs), 4)
    return make_vec_env(env_id, wrapper_class=wrapper, env_kwargs=env_kwargs, **kwargs)


def register(env_id: str) -> type[gym.Wrapper] | None:
    """:return: the wrapper of the environment, after the package that has the environment was imported"""
    if "NoFrameskip" in env_id:
        import ale_py

        gym.register_envs(ale_py)
        return AtariWrapper
    if env_id.startswith("MiniGrid"):
        from minigrid.wrappers import FlatObsWrapper

        return FlatObsWrapper
    return None


def random_policy(space: spaces.Space, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)

    def act(observations: np.ndarray) -> np.ndarray:
        if isinstance(space, spaces.Discrete):
            return rng.integers(space.n, size=len(observations))
        assert isinstance(space, spaces.Box)
        return rng.uniform(space.low, space.high, (len(observations), *space.shape)).astype(np.float32)

    return act


def evaluate(env: VecEnv, act: Callable[[np.ndarray], np.ndarray], n_episodes: int) -> dict[str, Any]:
    """
    :param env: environments; each contributes its first ``n_episodes / env.num_envs`` episodes
    :param act: actions for observations
    :param n_episodes: number of episodes
    :return: returns by ``Monitor`` (in Atari: raw rewards of whole games), lengths in steps of the agent, range of rewards
    """
    each = n_episodes // env.num_envs
    episodes: list[list[tuple[float, int]]] = [[] for _ in range(env.num_envs)]
    lengths = np.zeros(env.num_envs, dtype=np.int64)
    lowest, highest = np.inf, -np.inf
    observations = env.reset()
    while min(map(len, episodes)) < each:
        observations, rewards, dones, infos = env.step(act(observations))
        lengths += 1
        lowest, highest = min(lowest, rewards.min()), max(highest, rewards.max())
        for i in dones.nonzero()[0]:
            if "episode" in infos[i]:
                # Rounded: single precision would make equal returns differ
                episodes[i].append((round(float(infos[i]["episode"]["r"]), 3), int(lengths[i])))
                lengths[i] = 0
    returns, n_steps = zip(*(episode for of_env in episodes for episode in of_env[:each]))
    return {
        "returns": returns,
        "lengths": n_steps,
        "rewards": [round(float(lowest), 4), round(float(highest), 4)],
    }


def train(task: Task) -> tuple[VPG | PPO, VecNormalize | None]:
    algorithm, n_envs, n_steps, kwargs = task.train
    env = make("EnvPool", task.env_id, n_envs, seed=0)
    normalization = None
    if task.normalize:
        env = normalization = VecNormalize(env, gamma=kwargs.get("gamma", 0.99))
    policy = "CnnPolicy" if "NoFrameskip" in task.env_id else "MlpPolicy"
    model = algorithm(policy, env, seed=0, device="cpu", **kwargs).learn(n_steps)
    env.close()
    return model, normalization


def distributions(task: Task) -> dict[str, Any]:
    """:return: what both engines have in a task: spaces, time limits, and episodes of both policies"""
    start = time.process_time()
    model, normalization = train(task)
    result: dict[str, Any] = {
        "env": task.env_id,
        "part": "distributions",
        "versions": versions(),
        **declared(task.env_id),
        "algorithm": f"{type(model).__name__}, {model.num_timesteps:,} steps",
        "deterministic": task.deterministic,
        "training_seconds": round(time.process_time() - start, 1),
    }

    def act(observations: np.ndarray) -> np.ndarray:
        if normalization is not None:
            observations = normalization.normalize_obs(observations)  # type: ignore[assignment]
        return model.predict(observations, deterministic=task.deterministic)[0]

    for policy in ("random", "trained"):
        for engine in ENGINES:
            start = time.process_time()
            env = make(engine, task.env_id, N_ENVS, seed=SEEDS[engine] + (policy == "trained") * 10_000)
            model.set_random_seed(SEEDS[engine])
            episodes = evaluate(
                env,
                random_policy(env.action_space, SEEDS[engine]) if policy == "random" else act,
                task.n_episodes,
            )
            env.close()
            result[f"{policy}, {engine}"] = {**episodes, "seconds": round(time.process_time() - start, 1)}
    if register(task.env_id) is AtariWrapper:
        result["control"] = atari_control(task.env_id, task.n_episodes)
    return result


class BeginAsEnvPool(gym.Wrapper):
    """SB3's frame skip and episodic life, but games and lives begin as in EnvPool: 0 to 29 frames, then "fire"."""

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(MaxAndSkipEnv(env))
        self.raw_env, self.rng = env, np.random.default_rng(seed)
        self.game_over, self.lives = True, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        if self.game_over:
            self.raw_env.reset(**kwargs)
        for action in [0] * self.rng.integers(30) + [1]:
            observation, _, _, _, info = self.raw_env.step(action)
        self.lives = self.unwrapped.ale.lives()  # type: ignore[attr-defined]
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        lives, self.game_over = self.unwrapped.ale.lives(), terminated or truncated  # type: ignore[attr-defined]
        lost, self.lives = 0 < lives < self.lives, lives
        return observation, reward, terminated or lost, truncated, info


def atari_control(env_id: str, n_episodes: int) -> dict[str, Any]:
    """:return: episodes of a random policy in gymnasium, if they begin as in EnvPool"""
    register(env_id)

    def make_env(seed: int) -> gym.Env:
        return WarpFrame(BeginAsEnvPool(Monitor(gym.make(env_id)), seed))

    env = DummyVecEnv([partial(make_env, seed) for seed in range(N_ENVS)])
    env.seed(2_000_000)
    episodes = evaluate(env, random_policy(env.action_space, 2_000_000), n_episodes)
    env.close()
    return episodes


def declared(env_id: str) -> dict[str, Any]:
    """:return: spaces and time limit that EnvPool and gymnasium declare; the spaces of EnvPoolVecEnv are gymnasium's"""
    wrapper = register(env_id)
    env = gym.make(env_id)
    if wrapper is not None:
        # In Atari one frame each: VecFrameStack stacks them on both sides
        env = wrapper(env)
    equivalent = find_equivalent([env])
    assert env.spec is not None
    own_spaces = spaces_of(import_envpool().make_spec(equivalent.task_id, **equivalent.options))
    limit = env.spec.max_episode_steps or getattr(env.unwrapped, "max_steps", None)
    if wrapper is AtariWrapper:
        limit = env.spec.kwargs["max_num_frames_per_episode"] // 4
    pairs = zip(("observations", "actions"), own_spaces, (equivalent.observation_space, env.action_space))
    result = {
        "spaces": [f"{name}: {part}" for name, *pair in pairs for part in differences(*pair)],
        "limits": [envpool_options(equivalent.task_id)["max_episode_steps"], limit],
    }
    env.close()
    return result


def differences(own: spaces.Space, given: spaces.Space) -> Iterator[str]:
    """:return: how EnvPool's space differs from gymnasium's"""
    if isinstance(own, spaces.Dict) and isinstance(given, spaces.Dict):
        for key, space in given.spaces.items():
            yield from (f"{key}: {part}" for part in differences(own[key], space))
    elif isinstance(own, spaces.Box) and isinstance(given, spaces.Box):
        if own.shape != given.shape:
            yield f"shape {own.shape} for {given.shape}"
        if own.dtype != given.dtype:
            yield f"{own.dtype} for {given.dtype}"
        if own.shape == given.shape and not (np.allclose(own.low, given.low) and np.allclose(own.high, given.high)):
            yield "other bounds"
    elif own != given:
        yield f"{type(own).__name__} for {type(given).__name__}"


def holm(p_values: dict[Any, float]) -> dict[Any, float]:
    """:return: p-values adjusted for the number of tests (Holm, 1979): a test is significant if its value is <= the level"""
    adjusted, largest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = largest
    return adjusted


def tests(results: list[dict[str, Any]]) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """
    :param results: results of :func:`distributions`
    :return: for each environment, policy and kind ("returns" or "lengths"): Kolmogorov-Smirnov's statistic, p-value, and
        p-value adjusted for the number of tests
    """
    found = {}
    for result in results:
        for policy in ("random", "trained"):
            for kind in ("returns", "lengths"):
                samples = [result[f"{policy}, {engine}"][kind] for engine in ENGINES]
                found[result["env"], policy, kind] = ks_2samp(*samples)
    adjusted = holm({key: float(test.pvalue) for key, test in found.items()})
    return {key: (float(test.statistic), float(test.pvalue), adjusted[key]) for key, test in found.items()}


class Steps(NamedTuple):
    """
    :param env_id: id of the environment
    :param set_state: gives a gymnasium environment the state that an observation shows. None: both engines play the same games
    :param known: whether an observation shows the whole state
    :param env_kwargs: keyword arguments of both environments
    """

    env_id: str
    set_state: Callable[[Any, np.ndarray], None] | None = None
    known: Callable[[np.ndarray], bool] = lambda observation: True
    env_kwargs: dict[str, Any] = {}


def set_attribute(env: Any, state: np.ndarray) -> None:
    env.state = np.asarray(state, dtype=np.float64)


def set_acrobot(env: Any, observation: np.ndarray) -> None:
    cos_1, sin_1, cos_2, sin_2, *velocities = map(float, observation)
    set_attribute(env, np.array([np.arctan2(sin_1, cos_1), np.arctan2(sin_2, cos_2), *velocities]))


def set_pendulum(env: Any, observation: np.ndarray) -> None:
    cos, sin, velocity = map(float, observation)
    set_attribute(env, np.array([np.arctan2(sin, cos), velocity]))


def set_mujoco(env: Any, observation: np.ndarray) -> None:
    nq, nv = env.model.nq, env.model.nv
    env.set_state(observation[:nq], observation[nq : nq + nv])


def set_reacher(env: Any, observation: np.ndarray) -> None:
    (cos_1, cos_2, sin_1, sin_2), target, velocities = observation[:4], observation[4:6], observation[6:8]
    angles = np.arctan2([sin_1, sin_2], [cos_1, cos_2])
    env.set_state(np.concatenate([angles, target]), np.concatenate([velocities, np.zeros(2)]))


def within_joint_range(observation: np.ndarray) -> bool:
    # Beyond pi, an angle is not known from its cosine and sine
    return bool(abs(np.arctan2(observation[3], observation[1])) < 3)


def not_clipped(observation: np.ndarray) -> bool:
    return bool(np.abs(observation).max() < 10)


POSITIONS = {"exclude_current_positions_from_observation": False}
STEPS = (
    Steps("CartPole-v1", set_attribute),
    Steps("Pendulum-v1", set_pendulum),
    Steps("Acrobot-v1", set_acrobot),
    Steps("MountainCar-v0", set_attribute),
    Steps("MountainCarContinuous-v0", set_attribute),
    Steps("InvertedPendulum-v5", set_mujoco),
    Steps("Reacher-v5", set_reacher, within_joint_range),
    Steps("HalfCheetah-v5", set_mujoco, env_kwargs=POSITIONS),
    Steps("Swimmer-v5", set_mujoco, env_kwargs=POSITIONS),
    # Velocities beyond 10 are clipped in observations
    Steps("Hopper-v5", set_mujoco, not_clipped, POSITIONS),
    Steps("Walker2d-v5", set_mujoco, not_clipped, POSITIONS),
    Steps("Ant-v5", set_mujoco, env_kwargs=POSITIONS),
    Steps("Humanoid-v5", set_mujoco, env_kwargs=POSITIONS),
    Steps("BreakoutNoFrameskip-v4"),
    Steps("PongNoFrameskip-v4"),
)


def step_by_step(steps: Steps) -> dict[str, Any]:
    """:return: :func:`compare_steps` for each engine; in Atari, :func:`atari_frames`"""
    result = {"env": steps.env_id, "part": "step by step", "mujoco": importlib.metadata.version("mujoco")}
    if steps.set_state is None:
        return {**result, "EnvPool": atari_frames(steps.env_id)}
    return {**result, **{engine: compare_steps(steps, engine) for engine in ENGINES}}


def compare_steps(steps: Steps, engine: str, n_steps: int = 1000) -> dict[str, Any]:
    """
    :param steps: the environment
    :param engine: engine whose observations give the states. With gymnasium itself, the result is the error of the method:
        an observation does not show everything, such as the solution from which MuJoCo starts to solve for contact forces
    :param n_steps: number of steps
    :return: largest differences to gymnasium in one step from the same state with the same action
    """
    assert steps.set_state is not None
    vec_env = make(engine, steps.env_id, 1, seed=0, **steps.env_kwargs)
    env = gym.make(steps.env_id, **steps.env_kwargs)
    env.reset(seed=0)
    act = random_policy(vec_env.action_space, seed=0)
    observations = vec_env.reset()
    differences: dict[str, list[Any]] = {"observation": [], "reward": [], "termination": []}
    scales: list[float] = []
    reward_scales: list[float] = []
    n_terminated = 0
    while len(scales) < n_steps:
        before, action = observations[0].copy(), act(observations)
        observations, rewards, dones, infos = vec_env.step(action)
        if not steps.known(before):
            continue
        # Wrappers of gymnasium do nothing to a step, but require a reset after the last one
        steps.set_state(env.unwrapped, before)
        if hasattr(env.unwrapped, "steps_beyond_terminated"):
            env.unwrapped.steps_beyond_terminated = None
        observation, reward, terminated, _, _ = env.unwrapped.step(action[0])
        after = infos[0]["terminal_observation"] if dones[0] else observations[0]
        differences["observation"].append(np.abs(observation - after).max())
        differences["reward"].append(abs(float(reward) - float(rewards[0])))
        own_terminated = bool(dones[0]) and not infos[0]["TimeLimit.truncated"]
        differences["termination"].append(own_terminated != terminated)
        scales.append(np.abs(after).max())
        reward_scales.append(abs(float(rewards[0])))
        n_terminated += terminated
    vec_env.close()
    env.close()
    return {
        "steps": len(scales),
        "observation": float(np.max(differences["observation"])),
        "observation_median": float(np.median(differences["observation"])),
        "largest_observation": float(np.max(scales)),
        "reward": float(np.max(differences["reward"])),
        "largest_reward": float(np.max(reward_scales)),
        "terminations": int(n_terminated),
        "terminations_that_differ": int(np.sum(differences["termination"])),
    }


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("envpool", "gymnasium", "mujoco", "stable_baselines3")}


def atari_frames(env_id: str, n_steps: int = 1000) -> dict[str, Any]:
    """:return: largest differences to ALE with SB3's wrappers in the same games: one frame of "fire", then random actions"""
    register(env_id)
    vec_env = EnvPoolVecEnv(
        f"{env_id.removesuffix('NoFrameskip-v4')}-v5", 1, 0, num_threads=1, noop_max=1, stack_num=1, reward_clip=True
    )
    raw_env = gym.make(env_id)
    env = ClipRewardEnv(WarpFrame(MaxAndSkipEnv(raw_env)))
    act = random_policy(vec_env.action_space, seed=0)
    vec_env.reset()
    raw_env.reset(seed=0)
    raw_env.step(1)
    found: dict[str, list[float]] = {"observation": [], "reward": [], "terminated": [], "differ": []}
    for _ in range(n_steps):
        action = act(np.zeros(1))
        observations, rewards, dones, infos = vec_env.step(action)
        observation, reward, terminated, _, _ = env.step(action[0])
        after = infos[0]["terminal_observation"] if dones[0] else observations[0]
        # The last picture of a game is another one if the game ends between two steps. SB3: "doesn't matter"
        if not terminated:
            found["observation"].append(np.abs(after.squeeze().astype(int) - observation.squeeze()).max())
        found["reward"].append(abs(float(reward) - float(rewards[0])))
        found["terminated"].append(terminated)
        found["differ"].append(terminated != bool(dones[0]))
        if terminated:
            raw_env.reset()
            raw_env.step(1)
    vec_env.close()
    env.close()
    largest = {name: float(np.max(found[name])) for name in ("observation", "reward")}
    n_terminations = {
        "terminations": int(np.sum(found["terminated"])),
        "terminations_that_differ": int(np.sum(found["differ"])),
    }
    return {"steps": n_steps, **largest, **n_terminations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", help="only these ids")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    parser.add_argument("--output", type=Path, help="save results in this file, and skip what it has")
    args = parser.parse_args()

    results = read_lines(args.output)
    jobs: list[tuple[str, Any, Callable[[Any], dict[str, Any]]]] = [("step by step", s, step_by_step) for s in STEPS]
    jobs += [("distributions", task, distributions) for task in TASKS]
    mujoco = importlib.metadata.version("mujoco")
    known = {(result["part"], result["env"]) for result in results if result.get("mujoco", mujoco) == mujoco}
    for part, job, measure in jobs:
        if part not in args.part or (part, job.env_id) in known or (args.env is not None and job.env_id not in args.env):
            continue
        start = time.perf_counter()
        results.append(measure(job))
        print(f"{job.env_id}, {part}: {time.perf_counter() - start:.0f} s", flush=True)
        if args.output is not None:
            with args.output.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")

    for result in (result for result in results if result["part"] == "step by step"):
        for engine in ENGINES.keys() & result.keys():
            r = result[engine]
            print(
                f"{result['env']:>26}, {engine:>9}, mujoco {result['mujoco']}: {r['steps']} steps; largest difference of "
                f"observations {r['observation']:.1e}, of rewards {r['reward']:.1e}; {r['terminations_that_differ']} of "
                f"{r['terminations']} terminations differ"
            )
    measured = [result for result in results if result["part"] == "distributions"]
    by_env = {result["env"]: result for result in measured}
    for (env_id, policy, kind), (statistic, p, adjusted) in tests(measured).items():
        figures = [f"{np.mean(x):9.2f} +- {np.std(x):8.2f}" for x in (by_env[env_id][f"{policy}, {e}"][kind] for e in ENGINES)]
        mark = " DIFFERENT" if adjusted <= LEVEL else ""
        print(f"{env_id:>30} {policy:>8} {kind}: {' | '.join(figures)}  D {statistic:.3f} p {p:.2g} ({adjusted:.2g}){mark}")


if __name__ == "__main__":
    main()

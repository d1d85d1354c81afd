"""Cart-pole environments, one or many in one array, and actions for them."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

V0, V1 = "CartPoleSwingUp-v0", "CartPoleSwingUp-v1"
HANGING, UPRIGHT = ({"mean": [0, 0, angle, 0], "std": 0} for angle in (np.pi, 0))
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
each_id = pytest.mark.parametrize("env_id", [V0, V1])
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
one_and_many = pytest.mark.parametrize("num_envs", [None, 3], ids=["one", "many"])


def make(env_id, num_envs=None, **kwargs):
    """One environment, or many in one array."""
    if num_envs is None:
        return gym.make(env_id, **kwargs)
    return gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **kwargs)


def separate(env_id, num_envs, mode, **kwargs):
    return SyncVectorEnv([lambda: gym.make(env_id, **kwargs) for _ in range(num_envs)], autoreset_mode=mode)


def full_force(env, share=1.0, dtype=None):
    """An action: to the right in each environment."""
    return np.full(env.action_space.shape, share, dtype=dtype or env.action_space.dtype)


def transcript(env, n_steps):
    """All that an environment, or many, gives while driven off the track again and again."""
    rows = []
    for _ in range(n_steps):
        observation, reward, terminated, truncated, _ = env.step(full_force(env))
        rows += [observation, reward, terminated, truncated]
        if isinstance(env, gym.Env) and (terminated or truncated):
            rows.append(env.reset()[0])
    return np.concatenate([np.ravel(row) for row in rows])


def random_states(n, seed=0):
    return np.random.default_rng(seed).normal(size=(4, n)) * [[1.0], [3.0], [3.0], [6.0]]


def swinging(seed):
    """Actions for swing-ups: the first environments drive off the track, the others push at random, partly too hard."""
    rng = np.random.default_rng(seed)

    def act(observations):
        actions = rng.uniform(-1.2, 1.2, (len(observations), 1)).astype(np.float32)
        actions[:2] = 1.0
        return actions

    return act


def balancing(seed):
    """Actions for CartPole: every second environment balances, the others do anything."""
    rng = np.random.default_rng(seed)

    def act(observations):
        actions = rng.integers(2, size=len(observations))
        actions[::2] = (observations @ np.array([0.02, 0.05, 1.0, 0.3]) > 0)[::2]
        return actions

    return act


def assert_same_steps(many, separately, act, n_steps, **reset):
    """The two give the same, bit by bit, over episodes that end in both ways."""
    observations, expected = (envs.reset(**reset)[0] for envs in (many, separately))
    np.testing.assert_array_equal(observations, expected, strict=True)
    n_terminated = n_truncated = 0
    for _ in range(n_steps):
        actions = act(observations)
        (*step, infos), (*expected, expected_infos) = many.step(actions), separately.step(actions)
        for values, expected_values in zip(step, expected):
            np.testing.assert_array_equal(values, expected_values)
        assert infos.keys() == expected_infos.keys() - {"final_info", "_final_info"}
        if infos:
            np.testing.assert_array_equal(infos["_final_obs"], expected_infos["_final_obs"])
            for final in (infos["final_obs"], expected_infos["final_obs"]):
                assert [one is not None for one in final] == infos["_final_obs"].tolist()
            np.testing.assert_array_equal(*(np.stack(x["final_obs"][x["_final_obs"]]) for x in (infos, expected_infos)))
        observations, _, terminated, truncated = step
        n_terminated += terminated.sum()
        n_truncated += truncated.sum()
    assert n_terminated > 0
    assert n_truncated > 0

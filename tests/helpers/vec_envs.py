"""What vectorized environments give, and whether two of them give the same."""

import copy

import numpy as np
from helpers.envs import CountingEnv


def play(env, act, n_steps, observations=None):
    """
    All that the environments give from a reset on, or from these observations on: what the reset gives, and for each step
    observations, rewards, dones, infos.
    """
    observations = env.reset() if observations is None else observations
    given, kept = [], [(observations, copy.deepcopy(env.reset_infos))]
    for _ in range(n_steps):
        given.append(env.step(act(observations)))
        kept.append(copy.deepcopy(given[-1]))
        observations = given[-1][0]
    # What was given stays as it was
    np.testing.assert_equal(given, kept[1:])
    return kept


def without_times(infos):
    return [
        {**info, "episode": {**info["episode"], "t": None}} if "episode" in info and info["episode"]["t"] >= 0 else info
        for info in infos
    ]


def assert_same(steps, expected):
    """The same numbers, bit by bit and of the same types, and the same infos."""
    assert len(steps) == len(expected)
    for step, expected_step in zip(steps, expected):
        for values, expected_values in zip(step[:-1], expected_step[:-1]):
            np.testing.assert_array_equal(values, expected_values, strict=True)
        np.testing.assert_equal(without_times(step[-1]), without_times(expected_step[-1]))


def infos_in(steps):
    return [info for step in steps for info in step[-1]]


def endings(steps):
    """For each episode that has ended, whether that was by the time limit, and its length."""
    return [(info["TimeLimit.truncated"], info["episode"]["l"]) for info in infos_in(steps) if "episode" in info]


class TellingEnv(CountingEnv):
    """A :class:`CountingEnv` whose episodes are of random lengths, and which tells things of all kinds in its infos."""

    # Or else gymnasium warns of the mode that make_vec_env asks for
    metadata = {"render_modes": ["rgb_array"]}

    def reset(self, *, seed=None, options=None):
        observation, _ = super().reset(seed=seed, options=options)
        self.lengths = [int(self.np_random.integers(1, 7))]
        return observation, {"length": self.lengths[0], "title": f"episode {self.episode}"}

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        info |= {"place": np.array([self.t, -self.t]), "nested": {"even": self.t % 2 == 0}}
        if self.t == 3:
            info["third"] = "time"
        return observation, reward, terminated, truncated, info

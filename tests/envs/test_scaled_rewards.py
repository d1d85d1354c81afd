"""Rewards are multiplied by a number, and episode statistics are not."""

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg.envs import NativeVecEnv, ScaledRewards


@pytest.mark.parametrize("factor", [0.1, np.float64(0.1)])
def test_rewards_are_scaled_and_returns_are_not(factor):
    env = ScaledRewards(make_vec_env("CartPole-v1", 1, seed=0, vec_env_cls=NativeVecEnv), factor)
    env.reset()
    rewards, done = [], False
    while not done:
        _, reward, (done,), infos = env.step(np.array([0]))
        assert reward.dtype == np.float32
        rewards.append(reward[0])
    assert rewards == pytest.approx([0.1] * len(rewards))
    assert infos[0]["episode"]["r"] == len(rewards)


@pytest.mark.parametrize("factor", ["1e-3", float("nan"), None])
def test_a_factor_that_is_no_number_is_refused(factor):
    with pytest.raises(ValueError, match=f"factor={factor!r}"):
        ScaledRewards(make_vec_env("CartPole-v1", 1), factor=factor)

"""MaskableVPG and RecurrentVPG in several processes: the same weights in all."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers.ranks import in_ranks
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import MaskableVPG, RecurrentVPG

pytestmark = pytest.mark.slow


def train_masked(**keywords: Any) -> tuple[int, np.ndarray]:
    env = make_vec_env(InvalidActionEnvDiscrete, 2, env_kwargs={"dim": 6, "n_invalid_actions": 3, "ep_length": 7})
    return result(MaskableVPG("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, device="cpu", seed=0, **keywords).learn(800))


def train_recurrent(**keywords: Any) -> tuple[int, np.ndarray]:
    env = make_vec_env("CartPole-v1", 2)
    policy_kwargs = {"net_arch": [8], "lstm_hidden_size": 8}
    return result(RecurrentVPG("MlpLstmPolicy", env, policy_kwargs=policy_kwargs, device="cpu", seed=0, **keywords).learn(800))


def result(model: Any) -> tuple[int, np.ndarray]:
    return model._n_updates, th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().numpy().copy()


@pytest.mark.parametrize(
    "function",
    [
        partial(train_masked, n_steps=8),
        partial(train_recurrent, n_steps=8),
        # Rollouts of other lengths in each rank, and minibatches of whole environments
        partial(train_recurrent, n_episodes=1, critic_batch_size=30, n_critic_updates=3),
    ],
    ids=["masks", "memory", "memory, whole episodes"],
)
def test_ranks_hold_the_same_weights(tmp_path, function):
    (n_updates, weights), (other_n_updates, other_weights) = in_ranks(function, folder=tmp_path / "ranks")
    assert n_updates == other_n_updates >= 5
    np.testing.assert_array_equal(weights, other_weights)

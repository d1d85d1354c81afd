"""Rollout buffers: a user's own RolloutBuffer gives the same update as VPG's, which can be derived from."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import OBSERVATION_SPACES, CountingEnv, policy_for
from helpers.models import (
    ACTOR,
    CRITIC,
    SGD,
    Spy,
    assert_same_weights,
    changed,
    small_kwargs,
    small_model,
    spaces_envs,
    weights,
)
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_vpg import VPG
from sb3_vpg.buffers import VPGDictRolloutBuffer, VPGRolloutBuffer

INTEGERS = spaces.Box(0, 9, (3,), np.int64)
COARSE = [
    INTEGERS,
    spaces.Box(0, 9, (3,), np.uint8),
    spaces.Box(0, 9, (3,), np.float16),
    spaces.Box(0, 1, (3,), bool),
    spaces.Dict({"a": INTEGERS}),
]


@pytest.mark.parametrize("space", COARSE, ids=str)
def test_normalized_observations_of_a_coarse_space_are_stored_as_they_are(space: spaces.Space):
    env = VecNormalize(spaces_envs(space))
    model = VPG(policy_for(space), env, n_steps=10)
    seen, stored = [], model.rollout_buffer
    model.learn(20, callback=Spy(lambda spy: seen.append(spy.locals["obs_tensor"])))
    for key in space.spaces if isinstance(space, spaces.Dict) else [...]:
        observations = np.stack([one[key] for one in seen]).astype(np.float32)
        np.testing.assert_array_equal(stored.observations[key], observations)
        assert not np.array_equal(np.round(observations), observations)


def test_samples_for_an_action_space_of_integers_are_stored_as_they_are():
    space = spaces.Box(-5, 5, (1,), np.int64)

    def make():
        return gym.wrappers.TransformAction(CountingEnv(action_space=space), lambda action: action.round().astype(int), space)

    model, seen = small_model(make_vec_env(make, 2)), []
    model.learn(20, callback=Spy(lambda spy: seen.append(spy.locals["actions"].copy())))
    np.testing.assert_array_equal(model.rollout_buffer.actions, np.stack(seen))
    assert not np.array_equal(np.round(seen), seen)


class TaggedBuffer(RolloutBuffer):
    def __init__(self, *args, tag, **kwargs):
        super().__init__(*args, **kwargs)
        self.tag = tag


@pytest.mark.parametrize("normalize_advantage", [False, True, "batch"])
@pytest.mark.parametrize(
    ("observation", "buffer_class", "buffer_kwargs"),
    [("Box", RolloutBuffer, {}), ("Dict", DictRolloutBuffer, {}), ("Box", TaggedBuffer, {"tag": "mine"})],
)
def test_a_foreign_rollout_buffer_gives_the_same_update_as_ours(observation, buffer_class, buffer_kwargs, normalize_advantage):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)
    kwargs = dict(n_steps=12, seed=0, normalize_advantage=normalize_advantage, max_grad_norm=None)
    kwargs["policy_kwargs"] = small_kwargs(policy, optimizer_class=th.optim.SGD)
    own = VPG(policy, spaces_envs(space), **kwargs).learn(48)
    foreign = VPG(
        policy, spaces_envs(space), rollout_buffer_class=buffer_class, rollout_buffer_kwargs=buffer_kwargs, **kwargs
    ).learn(48)
    assert type(foreign.rollout_buffer) is buffer_class
    assert getattr(foreign.rollout_buffer, "tag", None) == buffer_kwargs.get("tag")
    for (name, ours), theirs in zip(own.policy.named_parameters(), foreign.policy.parameters()):
        th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_foreign_rollout_buffer_takes_part_in_further_critic_passes():
    kwargs = dict(rollout_buffer_class=RolloutBuffer, policy_kwargs=SGD)
    once = small_model(n_critic_updates=1, **kwargs).learn(20)
    for batch_size in (None, 8):
        often = small_model(n_critic_updates=4, critic_batch_size=batch_size, **kwargs).learn(20)
        assert_same_weights(once, often, ACTOR)
        assert changed(weights(once, CRITIC), weights(often, CRITIC)) == set(weights(once, CRITIC))


def test_the_buffer_class_goes_with_the_observations_and_can_be_derived_from():
    class Mine(VPGRolloutBuffer):
        pass

    assert type(small_model().rollout_buffer) is VPGRolloutBuffer
    dict_model = VPG(
        "MultiInputPolicy", spaces_envs(OBSERVATION_SPACES["Dict"]), policy_kwargs=small_kwargs("MultiInputPolicy")
    )
    assert type(dict_model.rollout_buffer) is VPGDictRolloutBuffer
    mine, ours = (small_model(rollout_buffer_class=c, estimator="reward_to_go").learn(20) for c in (Mine, None))
    assert type(mine.rollout_buffer) is Mine
    assert_same_weights(mine, ours)


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("n_recorded", [40, 31])
def test_parts_of_a_rollout_have_each_recorded_step_once(n_recorded, batch_size):
    buffer = small_model(n_steps=20).learn(40).recorder
    recorded = np.sort(np.random.default_rng(0).permutation(40)[:n_recorded])
    buffer.mask = np.isin(np.arange(40), recorded).reshape(buffer.mask.shape)
    indices = np.arange(40)
    parts = [[indices[batch] for batch in buffer.batch_indices(batch_size, part=(k, 3))] for k in range(3)]
    assert max(len(batch) for part in parts for batch in part) <= (batch_size or 14)
    for k, part in enumerate(parts):
        assert np.array_equal(np.sort(np.concatenate(part)), recorded[k::3])

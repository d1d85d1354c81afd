"""An episode that does not end is an error, and only where whole episodes are recorded."""

import io
from math import inf

import numpy as np
import pytest
from helpers.envs import CountingEnv
from helpers.models import counting_model
from helpers.states import assert_equal, state_of
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_vpg import VPG

WHOLE_EPISODES = {
    "finish": {"estimator": "gae", "partial_episodes": "finish"},
    "finish by default": {"estimator": "reward_to_go"},
    "n_episodes": {"estimator": "gae", "n_episodes": 2},
}
of_whole_episodes = pytest.mark.parametrize("keywords", WHOLE_EPISODES.values(), ids=WHOLE_EPISODES.keys())


@of_whole_episodes
@pytest.mark.parametrize("lengths", [(1,), (3,), (1000,)], ids=["beside short ones", "beside others", "all"])
def test_an_episode_that_does_not_end_is_an_error_that_names_the_environment(lengths, keywords, monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 50)
    env = DummyVecEnv([lambda: CountingEnv(lengths), lambda: CountingEnv(lengths), lambda: CountingEnv((inf,))])
    model = counting_model(env, **keywords)
    before = state_of(model)
    culprit = "0" if lengths == (1000,) else "2"
    with pytest.raises(
        RuntimeError, match=f"environment {culprit} has not ended after 50 steps.*time limit.*max_episode_steps"
    ):
        model.learn(100)
    assert model.num_timesteps == 3 * 51
    assert_equal(state_of(model), before)
    model.save(io.BytesIO())


@of_whole_episodes
def test_episodes_up_to_the_bound_are_let_end(keywords, monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 50)
    assert counting_model(CountingEnv((50,)), **keywords).learn(50)._n_updates == 1


def test_an_environment_that_only_waits_may_take_its_time(monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 50)
    # The second one has its two episodes after 2 steps; the next one that it begins is nobody's business
    env = DummyVecEnv([lambda: CountingEnv((40,)), lambda: CountingEnv((1, 1, inf))])
    model = counting_model(env, estimator="reward_to_go", n_episodes=2).learn(1)
    assert model._n_updates == 1
    assert model.num_timesteps == 2 * 80


def test_an_environment_that_only_waits_does_not_hide_one_whose_episode_does_not_end(monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 50)
    # The second one waits in an episode that began before the endless one of the first
    env = DummyVecEnv([lambda: CountingEnv((3, inf)), lambda: CountingEnv((1, 1, inf))])
    model = counting_model(env, estimator="reward_to_go", n_episodes=2)
    with pytest.raises(RuntimeError, match="environment 0 has not ended after 50 steps"):
        model.learn(1, callback=lambda *_: model.num_timesteps < 200)


def test_training_goes_on_after_an_endless_episode(monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 50)
    model = counting_model(CountingEnv((inf, 3)), estimator="reward_to_go")
    with pytest.raises(RuntimeError, match="environment 0"):
        model.learn(100)
    env = model.get_env().envs[0].unwrapped
    env.lengths = (3,)
    model.learn(9, reset_num_timesteps=False)
    assert model._n_updates == 1
    np.testing.assert_array_equal(model.rollout_buffer.observations[:, 0, 1], np.tile([0, 1, 2], 3))


@pytest.mark.parametrize("partial_episodes", ["bootstrap", "truncate"])
def test_where_episodes_may_be_cut_they_may_go_on_for_ever(partial_episodes, monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 20)
    model = counting_model(CountingEnv((inf,)), partial_episodes=partial_episodes).learn(80)
    assert model._n_updates == 10

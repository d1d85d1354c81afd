"""predict() and evaluate_policy() do what they do with A2C."""

import numpy as np
import pytest
from helpers.envs import ACTION_SPACES, BOX, CountingEnv
from helpers.models import counting_envs, small_model, spaces_envs
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_predict_has_the_shape_of_its_input(action):
    space = ACTION_SPACES[action]
    model = small_model(spaces_envs(action_space=space))
    one, _ = model.predict(BOX.sample())
    assert space.contains(np.int64(one) if action == "Discrete" else one)
    many, _ = model.predict(np.stack([BOX.sample() for _ in range(5)]))
    assert many.shape == (5, *space.shape)


def test_predict_is_deterministic_or_stochastic_as_asked():
    model = small_model(spaces_envs(action_space=ACTION_SPACES["Box"]))
    observations = np.tile(BOX.sample(), (20, 1))
    deterministic, _ = model.predict(observations, deterministic=True)
    stochastic, _ = model.predict(observations)
    np.testing.assert_allclose(deterministic, deterministic[:1].repeat(20, axis=0), atol=1e-6)
    assert len(np.unique(stochastic[:, 0])) > 10


def test_evaluate_policy_sees_whole_episodes():
    model = small_model(counting_envs(n_envs=1, lengths=(4,)))
    # 1 + 2 + 3 + 4
    assert evaluate_policy(model, Monitor(CountingEnv(lengths=(4,))), n_eval_episodes=3) == (10.0, 0.0)

"""State-dependent exploration works as with A2C."""

import numpy as np
import pytest
from helpers.envs import ACTION_SPACES
from helpers.models import SMALL, Spy, changed, small_model, spaces_envs, weights, with_and_without_critic


@with_and_without_critic
@pytest.mark.parametrize("squash_output", [False, True])
def test_gsde_trains_and_keeps_to_the_bounds(squash_output, formulation):
    env = spaces_envs(action_space=ACTION_SPACES["Box"])
    model = small_model(env, use_sde=True, policy_kwargs={**SMALL, "squash_output": squash_output}, **formulation)
    before, raw, sent = weights(model), [], []

    def look(spy):
        raw.append(spy.locals["actions"].copy())
        sent.append(spy.locals["clipped_actions"].copy())

    model.learn(40, callback=Spy(look))
    raw, sent = np.concatenate(raw), np.concatenate(sent)
    low, high = env.action_space.low, env.action_space.high
    if squash_output:
        assert np.abs(raw).max() <= 1.0
        np.testing.assert_allclose(sent, low + (raw + 1) / 2 * (high - low), rtol=1e-5)
    else:
        np.testing.assert_array_equal(sent, np.clip(raw, low, high))
        assert (sent != raw).any()
    assert changed(before, weights(model)) >= set(weights(model, ("log_std", "action_net.weight")))


@pytest.mark.parametrize(("sde_sample_freq", "n_samples"), [(-1, 1), (4, 1 + 3)])
def test_gsde_samples_its_noise_as_often_as_asked(sde_sample_freq, n_samples, monkeypatch):
    env = spaces_envs(action_space=ACTION_SPACES["Box"])
    model = small_model(env, use_sde=True, sde_sample_freq=sde_sample_freq)
    sizes, reset_noise = [], model.policy.reset_noise
    monkeypatch.setattr(model.policy, "reset_noise", lambda n_envs: (sizes.append(n_envs), reset_noise(n_envs)))
    model.learn(20)
    assert sizes == [2] * n_samples

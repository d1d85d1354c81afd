"""scale_value_targets: the targets of the value regression have a bounded scale, and V keeps its meaning."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch as th
from helpers.envs import CountingEnv
from helpers.models import (
    CRITIC,
    SGD,
    assert_same_weights,
    changed,
    counting_model,
    flat_weights,
    small_model,
    spaces_envs,
    weights,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_vpg import VPG
from sb3_vpg.common.collectives import SingleProcess
from sb3_vpg.common.value_scale import ValueScale


def test_sigma_is_the_standard_deviation_of_all_targets_so_far():
    scale = ValueScale()
    assert scale.sigma == 1
    rng = np.random.default_rng(0)
    batches = [rng.normal(7, 5, n).astype(np.float32) for n in (300, 100, 900)]
    for batch in batches:
        scale.update(batch, SingleProcess())
    # SB3's running statistics begin with a weight of 1e-4 samples
    assert scale.sigma == pytest.approx(np.std(np.concatenate(batches)), rel=1e-4)
    assert scale.targets.count == pytest.approx(1300, rel=1e-4)


def test_the_network_predicts_v_over_sigma_within_the_update_and_v_outside():
    model = small_model()
    obs = th.rand(5, 3)
    scale = ValueScale()
    with th.no_grad():
        bias = model.policy.value_net.bias.fill_(3.0)
        before = model.policy.predict_values(obs)
        with scale.applied(model.policy, np.array([0.0, 8.0, 0.0, 8.0]), SingleProcess()):
            assert scale.sigma == pytest.approx(4, rel=1e-4)
            th.testing.assert_close(model.policy.predict_values(obs), before / 4, rtol=1e-4, atol=1e-6)
        th.testing.assert_close(model.policy.predict_values(obs), before)
        # An error, after the layer has changed
        with suppress(RuntimeError), scale.applied(model.policy, np.zeros(4), SingleProcess()):
            bias += 1 / scale.sigma
            raise RuntimeError("in between")
        assert scale.sigma == pytest.approx(12**0.5, rel=1e-4)
        th.testing.assert_close(model.policy.predict_values(obs), before + 1)


def test_a_frozen_output_layer_stays_as_it_is():
    model = small_model(scale_value_targets=True, n_critic_updates=3)
    model.policy.value_net.requires_grad_(False)
    before = copy.deepcopy(weights(model, ("value_net",)))
    model.learn(200)
    for name, value in weights(model, ("value_net",)).items():
        assert th.equal(value, before[name])


def test_an_error_before_the_first_step_leaves_sigma_and_the_network_as_they_were():
    model = small_model(scale_value_targets=True).learn(20)
    before, sigma, targets = copy.deepcopy(weights(model)), model.value_scale.sigma, vars(model.value_scale.targets.copy())
    _, callback = model._setup_learn(100, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 10)
    returns = model.rollout_buffer.returns.copy()
    # Their squares are finite in double precision, and their loss is not in single precision
    model.rollout_buffer.returns[:] = 1e25 * returns
    with pytest.raises(ValueError, match="value loss"):
        model.train()
    assert model.value_scale.sigma == sigma
    assert vars(model.value_scale.targets) == targets
    for name, value in weights(model).items():
        assert th.equal(value, before[name])
    model.rollout_buffer.returns[:] = returns
    model.train()


def test_a_model_that_is_loaded_without_the_keyword_does_not_scale(tmp_path):
    model = small_model(scale_value_targets=True).learn(40)
    model.save(tmp_path / "model")
    loaded = VPG.load(tmp_path / "model", env=spaces_envs(), scale_value_targets=False)
    assert loaded.learn(20).value_scale.sigma == 1


@pytest.mark.parametrize("critic_batch_size", [None, 5])
def test_rewards_of_any_size_give_the_same_run(critic_batch_size):
    """With V = 0 at first, rewards times c give targets times c, sigma times c and V times c, and the same policy."""

    class Rescaled(CountingEnv):
        factor = 1.0

        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, reward * self.factor, *rest

    class Large(Rescaled):
        factor = 1024.0

    def trained(env_class, scale):
        keywords = {"n_critic_updates": 3, "critic_batch_size": critic_batch_size, "learning_rate": 0.01}
        model = counting_model(make_vec_env(env_class, 2), scale_value_targets=scale, **keywords)
        with th.no_grad():
            for p in model.policy.value_net.parameters():
                p.zero_()
        return model.learn(64)

    one, large = trained(Rescaled, True), trained(Large, True)
    assert large.value_scale.sigma == pytest.approx(1024 * one.value_scale.sigma, rel=1e-4)
    assert one.value_scale.sigma > 0.5
    for name, value in weights(one).items():
        factor = 1024 if name.startswith("value_net") else 1
        th.testing.assert_close(weights(large)[name], factor * value, rtol=1e-3, atol=1e-4 * factor)
    # The steps of the output layer do not grow with the rewards by themselves
    unscaled, large = trained(Rescaled, False), trained(Large, False)
    step = weights(large, ("value_net.weight",))["value_net.weight"].abs().max()
    assert step < 10 * weights(unscaled, ("value_net.weight",))["value_net.weight"].abs().max()


def test_the_loss_is_divided_by_the_square_of_sigma_and_logged_in_units_of_returns():
    """One step of SGD: the output layer of V / sigma moves by the gradient of the loss in these units."""

    def trained(scale):
        return small_model(policy_kwargs=SGD, learning_rate=0.01, max_grad_norm=None, scale_value_targets=scale).learn(20)

    start, plain, scaled = small_model(policy_kwargs=SGD), trained(False), trained(True)
    sigma = scaled.value_scale.sigma
    assert abs(sigma - 1) > 0.1
    # V = sigma (w / sigma) x: w / sigma moves by 1 / sigma of the unscaled gradient, and w by sigma times as much
    for name, before in weights(start, ("value_net",)).items():
        th.testing.assert_close(weights(scaled)[name] - before, weights(plain)[name] - before, rtol=1e-3, atol=1e-6)
    for name, before in weights(start, ("mlp_extractor.value_net",)).items():
        step = (weights(plain)[name] - before) / sigma**2
        th.testing.assert_close(weights(scaled)[name] - before, step, rtol=1e-3, atol=1e-6)
    losses = [model.logger.name_to_value["train/value_loss"] for model in (plain, scaled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # The policy's step is the same
    assert changed(weights(plain), weights(scaled)) <= {name for name in weights(plain) if name.startswith(CRITIC)}


def test_a_resumed_run_goes_on_with_the_same_sigma(tmp_path):
    model = small_model(scale_value_targets=True).learn(40)
    model.save(tmp_path / "model")
    loaded = VPG.load(tmp_path / "model", env=spaces_envs())
    assert loaded.scale_value_targets
    assert vars(loaded.value_scale.targets) == vars(model.value_scale.targets)
    assert loaded.value_scale.sigma == model.value_scale.sigma != 1
    assert_same_weights(loaded, model)


def test_it_has_no_effect_without_a_value_function():
    plain, scaled = (small_model(estimator="reward_to_go", scale_value_targets=scale).learn(40) for scale in (False, True))
    assert_same_weights(plain, scaled)
    assert scaled.value_scale.sigma == 1


def test_a_critic_that_does_not_end_with_a_linear_layer_is_refused():
    class Deep(ActorCriticPolicy):
        def _build(self, lr_schedule):
            super()._build(lr_schedule)
            self.value_net = nn.Sequential(nn.Linear(self.mlp_extractor.latent_dim_vf, 4), nn.Tanh(), nn.Linear(4, 1))

    class Normalized(ActorCriticPolicy):
        def _build(self, lr_schedule):
            super()._build(lr_schedule)
            nn.utils.parametrizations.spectral_norm(self.value_net)

    for policy in (Deep, Normalized):
        with pytest.raises(ValueError, match=r"scale_value_targets=True rescales policy.value_net"):
            VPG(policy, spaces_envs(), scale_value_targets=True)
        VPG(policy, spaces_envs())


@pytest.mark.parametrize("target", [np.inf, np.nan])
def test_targets_that_are_not_finite_are_an_error_and_change_nothing(target):
    model = small_model(scale_value_targets=True).learn(20)
    before, sigma = copy.deepcopy(weights(model)), model.value_scale.sigma
    _, callback = model._setup_learn(100, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 10)
    model.rollout_buffer.returns[0, 0] = target
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="value loss"):
        model.train()
    assert model.value_scale.sigma == sigma
    for name, value in weights(model).items():
        th.testing.assert_close(value, before[name])


def test_a_critic_whose_last_layer_was_replaced_is_refused_before_the_update():
    model = small_model(scale_value_targets=True)
    model.policy.value_net = nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1))
    model.policy.optimizer = th.optim.Adam(model.policy.parameters())
    before = flat_weights(model)
    with pytest.raises(ValueError, match=r"scale_value_targets=True rescales policy.value_net"):
        model.learn(20)
    assert th.equal(flat_weights(model), before)

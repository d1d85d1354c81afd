"""Gradient statistics of each rollout, logged while a model trains."""

import pytest
import torch as th
from helpers.envs import CountingEnv
from helpers.gradients import NAMES
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_vpg import VPG
from sb3_vpg.diagnostics import (
    GradientStatisticsCallback,
    rollout_statistics,
)
from sb3_vpg.diagnostics.callback import MAX_GROUPS


class Recorder(BaseCallback):
    """What the logger holds at the beginning of each rollout, that is after the update before it."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def _on_rollout_start(self):
        self.logged.append(dict(self.logger.name_to_value))

    def _on_step(self):
        return True


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_steps": 16},
        {"n_episodes": 2, "estimator": "reward_to_go", "baseline": "leave_one_out"},
        {"n_episodes": 2, "loss_reduction": "trajectory", "estimator": "total_return"},
        {"n_steps": 200},
    ],
    ids=str,
)
def test_the_mean_is_the_gradient_of_the_update(kwargs):
    env = DummyVecEnv([lambda: CountingEnv([3, 5]), lambda: CountingEnv([4])])
    model = VPG("MlpPolicy", env, seed=0, gamma=0.9, **kwargs)
    recorder = Recorder()
    model.learn(1000, callback=[recorder, GradientStatisticsCallback(1)], log_interval=10_000)
    assert len(recorder.logged) > 2
    for logged in recorder.logged[1:]:
        assert logged["gradient/mean_norm"] == pytest.approx(logged["train/policy_grad_norm"], rel=1e-3)
        assert {name.removeprefix("gradient/") for name in logged if name.startswith("gradient/")} == set(NAMES)


def test_every_third_rollout():
    model = VPG("MlpPolicy", DummyVecEnv([lambda: CountingEnv([3])] * 2), n_steps=8, seed=0)
    norms = []

    class Norms(Recorder):
        def _on_rollout_start(self):
            norms.append(self.logger.name_to_value.pop("gradient/mean_norm", None))

    model.learn(16 * 7, callback=[GradientStatisticsCallback(3), Norms()], log_interval=10_000)
    assert [norm is not None for norm in norms] == [False, True, False, False, True, False, False]


def test_training_is_the_same_with_the_callback():
    def weights(callback):
        env = make_vec_env("CartPole-v1", 4, seed=0)
        model = VPG("MlpPolicy", env, n_steps=32, seed=0).learn(1000, callback=callback)
        return th.nn.utils.parameters_to_vector(model.policy.parameters())

    assert th.equal(weights(None), weights(GradientStatisticsCallback(1)))


def test_many_pieces_are_taken_together():
    model = VPG("MlpPolicy", DummyVecEnv([lambda: CountingEnv([1, 2])] * 2), n_steps=3 * MAX_GROUPS, seed=0)
    model.learn(6 * MAX_GROUPS)
    assert model.rollout_buffer.n_segments == 4 * MAX_GROUPS
    statistics = rollout_statistics(model)
    assert statistics.noise_scale.value == pytest.approx(4 * MAX_GROUPS / statistics.snr.value)


def test_a_frozen_actor_has_no_gradient_and_logs_nothing():
    model = VPG("MlpPolicy", DummyVecEnv([lambda: CountingEnv([3])] * 2), n_steps=8, seed=0)
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_("value" in name)
    recorder = Recorder()
    model.learn(64, callback=[recorder, GradientStatisticsCallback(1)])
    assert not any(name.startswith("gradient/") for logged in recorder.logged for name in logged)


def test_one_piece_logs_nothing():
    model = VPG("MlpPolicy", DummyVecEnv([lambda: CountingEnv([100])]), n_steps=16, seed=0)
    recorder = Recorder()
    model.learn(64, callback=[recorder, GradientStatisticsCallback(1)])
    assert not any(name.startswith("gradient/") for logged in recorder.logged for name in logged)

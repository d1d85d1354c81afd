"""What is logged: everything that A2C logs, and VPG's own, by definition."""

import copy

import numpy as np
import pytest
import torch as th
from helpers.envs import ACTION_SPACES, CountingEnv
from helpers.models import (
    ACTOR,
    CRITIC,
    SGD,
    SMALL,
    OwnForward,
    counting_envs,
    small_model,
    spaces_envs,
    weights,
    with_and_without_critic,
)
from stable_baselines3 import A2C
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_vpg.buffers
from sb3_vpg import VPG

A2C_KEYS = {
    "rollout/ep_len_mean",
    "rollout/ep_rew_mean",
    "rollout/success_rate",
    "time/fps",
    "time/iterations",
    "time/time_elapsed",
    "time/total_timesteps",
    "train/entropy_loss",
    "train/explained_variance",
    "train/learning_rate",
    "train/n_updates",
    "train/policy_loss",
    "train/std",
    "train/value_loss",
}
OWN_KEYS = {"train/episodes_per_update", "train/kl_divergence", "train/policy_grad_norm", "train/value_grad_norm"}


def logged_lines(algorithm, path, **kwargs):
    env = counting_envs(action_space=ACTION_SPACES["Box"])
    model = algorithm("MlpPolicy", env, n_steps=10, seed=0, policy_kwargs=dict(SMALL), **kwargs)
    model.set_logger(configure(str(path), ["csv"]))
    model.learn(80, log_interval=1)
    model.logger.close()
    header, *lines = (path / "progress.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","))) for line in lines]


def test_everything_that_a2c_logs_is_logged_and_our_own(tmp_path):
    assert set(logged_lines(A2C, tmp_path / "a2c")[-1]) == A2C_KEYS
    lines = logged_lines(VPG, tmp_path / "vpg")
    assert set(lines[-1]) == A2C_KEYS | OWN_KEYS
    assert all(np.isfinite(float(value)) for value in lines[-1].values())
    assert lines[-1]["time/total_timesteps"] == "80"
    own = logged_lines(VPG, tmp_path / "own", critic_learning_rate=0.25)
    assert set(own[-1]) == A2C_KEYS | OWN_KEYS | {"train/critic_learning_rate"}
    assert float(own[-1]["train/critic_learning_rate"]) == 0.25


def test_nothing_of_the_critic_is_logged_where_there_is_none(tmp_path):
    lines = logged_lines(VPG, tmp_path, estimator="reward_to_go")
    critic = {"train/value_loss", "train/explained_variance", "train/value_grad_norm"}
    assert set(lines[-1]) == (A2C_KEYS | OWN_KEYS) - critic


def test_statistics_of_episodes_are_those_of_the_window():
    model = small_model(counting_envs(n_envs=1, lengths=(1, 2, 3, 4)), n_steps=10, stats_window_size=2)
    model.learn(10, log_interval=None)
    assert [info["l"] for info in model.ep_info_buffer] == [3, 4]
    assert [info["r"] for info in model.ep_info_buffer] == [6.0, 10.0]
    # Every second episode is a success
    assert list(model.ep_success_buffer) == [True, False]


def episodes_seen_in_environments_of_lengths(*lengths, **keywords):
    """:return: lengths and successes of the episodes that the statistics have seen after one rollout"""
    env = DummyVecEnv([lambda length=length: Monitor(CountingEnv(lengths=(length,))) for length in lengths])
    model = small_model(env, **keywords).learn(1, log_interval=None)
    return [info["l"] for info in model.ep_info_buffer], list(model.ep_success_buffer)


def test_the_success_rate_counts_the_episodes_that_have_ended_in_whichever_environment():
    # The second environment alone ends episodes, at steps 2, 4 and 6; every second one is a success
    assert episodes_seen_in_environments_of_lengths(7, 2, n_steps=6) == ([2, 2, 2], [True, False, True])


def test_episodes_of_an_environment_that_waits_are_not_in_the_statistics_either_when_another_one_ends():
    # When the second environment ends its only episode, the first one ends its third
    keywords = {"estimator": "reward_to_go", "n_episodes": 1}
    assert episodes_seen_in_environments_of_lengths(1, 3, **keywords) == ([1, 3], [True, True])


def test_explained_variance_is_that_of_the_returns_by_the_values_at_the_recorded_steps():
    env = DummyVecEnv([lambda length=length: CountingEnv(lengths=(length,)) for length in (3, 11)])
    model = small_model(env, n_steps=5, partial_episodes="finish").learn(1, log_interval=None)
    buffer = model.rollout_buffer
    # The first environment waits from step 6 on
    assert buffer.mask.sum() == 6 + 11
    values, returns = buffer.values[buffer.mask], buffer.returns[buffer.mask]
    expected = 1 - np.var(returns - values) / np.var(returns)
    assert model.logger.name_to_value["train/explained_variance"] == pytest.approx(expected, rel=1e-4)


def test_a_trajectory_loss_is_divided_by_segments_and_what_is_logged_of_entropy_and_values_by_steps():
    def logged(loss_reduction):
        # The 8 steps of each environment are two episodes and a segment: 3 + 3 + 2
        model = small_model(counting_envs(lengths=(3,)), n_steps=8, ent_coef=1.0, loss_reduction=loss_reduction)
        with th.no_grad():
            # Away from the uniform policy, where the entropy has no gradient
            model.policy.action_net.bias.copy_(th.tensor([1.0, -1.0]))
        return model.learn(16, log_interval=None).logger.name_to_value

    mean, trajectory = logged("mean"), logged("trajectory")
    n_steps, n_segments = 2 * 8, 2 * 3
    for name in ("train/policy_loss", "train/policy_grad_norm"):
        assert trajectory[name] == pytest.approx(mean[name] * n_steps / n_segments, rel=1e-4)
        assert abs(mean[name]) > 1e-3
    for name in ("train/entropy_loss", "train/value_loss", "train/value_grad_norm"):
        assert trajectory[name] == pytest.approx(mean[name], rel=1e-4)


@pytest.mark.parametrize(
    ("keywords", "n_episodes"),
    [
        ({"n_steps": 8}, 2 * 2),  # 3 + 5
        ({"n_steps": 7}, 2 * 1),  # the second one is cut
        ({"n_steps": 4, "estimator": "reward_to_go"}, 2 * 2),
        ({"n_episodes": 3, "estimator": "reward_to_go"}, 2 * 3),
    ],
)
def test_the_number_of_episodes_per_update_is_logged(keywords, n_episodes):
    model = small_model(counting_envs(lengths=(3, 5)), **keywords).learn(1, log_interval=None)
    assert model.logger.name_to_value["train/episodes_per_update"] == n_episodes


def categorical_kl(before, after):
    p, q = (th.log_softmax(logits, dim=1) for logits in (before, after))
    return (p.exp() * (p - q)).sum(dim=1).mean().item()


@with_and_without_critic
def test_the_logged_kl_divergence_is_that_from_the_old_policy_to_the_new(formulation):
    model = small_model(learning_rate=0.05, **formulation)
    old = copy.deepcopy(model.policy)
    model.learn(1, log_interval=None)
    buffer = model.rollout_buffer
    observations = th.as_tensor(buffer.observations[buffer.mask])

    def logits(policy):
        with th.no_grad():
            return policy.action_net(policy.mlp_extractor.forward_actor(observations))

    expected = categorical_kl(logits(old), logits(model.policy))
    assert model.logger.name_to_value["train/kl_divergence"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-4


def test_the_logged_kl_divergence_of_a_gaussian_sums_over_the_actions():
    model = small_model(spaces_envs(action_space=ACTION_SPACES["Box"]), learning_rate=0.05)
    old = copy.deepcopy(model.policy)
    model.learn(20, log_interval=None)
    observations = model.rollout_buffer.observations.reshape(-1, 3)
    (m0, s0), (m1, s1) = (
        (d.mean.numpy(force=True).astype(float), d.stddev.numpy(force=True).astype(float))
        for d in (policy.get_distribution(th.as_tensor(observations)).distribution for policy in (old, model.policy))
    )
    kl = np.log(s1 / s0) + (s0**2 + (m0 - m1) ** 2) / (2 * s1**2) - 0.5
    logged = model.logger.name_to_value["train/kl_divergence"]
    assert logged == pytest.approx(kl.sum(axis=1).mean(), rel=1e-3)
    assert logged > 1e-4


def test_the_kl_divergence_of_a_long_rollout_comes_from_steps_all_over_it(monkeypatch):
    # The policy changes little at t = 0 and more the larger t is: the first or the last steps alone would tell another number
    def learned():
        env = counting_envs(n_envs=1, lengths=(400,))
        model = small_model(env, n_steps=400, learning_rate=0.01).learn(1, log_interval=None)
        return model.logger.name_to_value["train/kl_divergence"]

    whole = learned()
    monkeypatch.setattr(sb3_vpg.buffers, "CPU_CHUNK", (2**21, 100, 100))
    assert learned() == pytest.approx(whole, rel=0.02)


def test_the_kl_divergence_of_a_policy_of_ones_own_is_estimated_and_positive():
    model = VPG(OwnForward, spaces_envs(), n_steps=10, seed=0, learning_rate=0.05).learn(20, log_interval=None)
    assert 0 < model.logger.name_to_value["train/kl_divergence"] < 1


@with_and_without_critic
def test_the_logged_gradient_norms_are_those_before_clipping(formulation):
    # Plain gradient descent: the step is the gradient, times the learning rate
    model = small_model(policy_kwargs=SGD, learning_rate=0.5, max_grad_norm=None, **formulation)
    before = weights(model)
    model.learn(1, log_interval=None)
    after = weights(model)

    def norm_of_step(only):
        return np.sqrt(sum(((after[n] - before[n]) ** 2).sum().item() for n in weights(model, only))) / 0.5

    logged = model.logger.name_to_value
    assert logged["train/policy_grad_norm"] == pytest.approx(norm_of_step(ACTOR), rel=1e-3)
    assert logged["train/policy_grad_norm"] > 0
    if model.plan.uses_value_function:
        assert logged["train/value_grad_norm"] == pytest.approx(norm_of_step(CRITIC), rel=1e-3)
    clipped = small_model(policy_kwargs=SGD, learning_rate=0.5, max_grad_norm=1e-3, **formulation).learn(1, log_interval=None)
    assert clipped.logger.name_to_value["train/policy_grad_norm"] == pytest.approx(logged["train/policy_grad_norm"])


def test_tensorboard_logs_go_to_vpg(tmp_path):
    model = small_model(tensorboard_log=str(tmp_path))
    model.learn(20, log_interval=1)
    model.learn(20, log_interval=1, tb_log_name="other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VPG_1", "other_1"]
    assert any((tmp_path / "VPG_1").iterdir())


def test_verbose_prints_a_table(capsys):
    small_model(spaces_envs(), verbose=1).learn(40, log_interval=1)
    printed = capsys.readouterr().out
    assert "kl_divergence" in printed
    assert "policy_grad_norm" in printed

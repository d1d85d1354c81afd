"""What Stable-Baselines3 promises of an on-policy algorithm must hold for VPG."""

import copy
import io
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers.envs import ACTION_SPACES, BOX, OBSERVATION_SPACES, CountingEnv, SpacesEnv, policy_for
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from torch import nn

import sb3_vpg.buffers
from sb3_vpg import VPG, LogisticPolicy
from sb3_vpg.buffers import VPGDictRolloutBuffer, VPGRolloutBuffer

SMALL = {"net_arch": [16]}
SGD = {**SMALL, "optimizer_class": th.optim.SGD}
#: One formulation with the value function, one without
FORMULATIONS = {
    "critic": {"estimator": "gae"},
    "critic_free": {"estimator": "reward_to_go"},
}
with_and_without_critic = pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=FORMULATIONS.keys())

# What belongs to the actor alone, and to the critic alone
ACTOR = ("action_net", "mlp_extractor.policy_net", "log_std", "pi_features_extractor.")
CRITIC = ("value_net", "mlp_extractor.value_net", "vf_features_extractor.")


def small_kwargs(policy: str, **kwargs):
    """Keyword arguments that keep the networks of the policy small."""
    if policy == "CnnPolicy":
        return {"features_extractor_kwargs": {"features_dim": 16}, **kwargs}
    if policy == "MultiInputPolicy":
        return {"net_arch": [16], "features_extractor_kwargs": {"cnn_output_dim": 16}, **kwargs}
    return {"net_arch": [16], **kwargs}


def counting_envs(n_envs=2, lengths=(3, 5), **kwargs):
    return make_vec_env(CountingEnv, n_envs=n_envs, env_kwargs={"lengths": lengths, **kwargs})


def spaces_envs(observation_space=BOX, action_space=ACTION_SPACES["Discrete"], n_envs=2, seed=0):
    return make_vec_env(lambda: SpacesEnv(observation_space, action_space), n_envs=n_envs, seed=seed)


def small_model(env=None, **kwargs):
    """A VPG with small networks, short rollouts and one gradient step per rollout, seeded."""
    env = spaces_envs() if env is None else env
    return VPG("MlpPolicy", env, **{"n_steps": 10, "n_critic_updates": 1, "seed": 0, "policy_kwargs": SMALL, **kwargs})


def weights(model, only=("",)):
    return {name: p.detach().clone() for name, p in model.policy.named_parameters() if name.startswith(only)}


def changed(before, after):
    """Names of the parameters that differ."""
    return {name for name in before if not th.equal(before[name], after[name])}


def assert_same_weights(first, second, only=("",)):
    assert changed(weights(first, only), weights(second, only)) == set()


def learning_rates(model):
    """Learning rates of the actor's and of the critic's parameters, as the optimizer has them."""
    rate_of = {id(p): group["lr"] for group in model.policy.optimizer.param_groups for p in group["params"]}
    return rate_of[id(model.policy.action_net.weight)], rate_of[id(model.policy.value_net.weight)]


class Spy(BaseCallback):
    """Calls a function of itself at each step, or at another event."""

    def __init__(self, function, event="step"):
        super().__init__()
        self.function, self.event = function, event

    def _on_step(self):
        result = self.function(self) if self.event == "step" else None
        return result is not False

    def _on_rollout_start(self):
        if self.event == "rollout_start":
            self.function(self)

    def _on_rollout_end(self):
        if self.event == "rollout_end":
            self.function(self)


# ---------------------------------------------------------------------------------------------------------------
# Spaces and networks
# ---------------------------------------------------------------------------------------------------------------


@with_and_without_critic
@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_every_pair_of_spaces_trains_the_actor(observation, action, formulation):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)
    model = VPG(
        policy,
        spaces_envs(space, ACTION_SPACES[action]),
        n_steps=8,
        seed=0,
        policy_kwargs=small_kwargs(policy),
        **formulation,
    )
    before = weights(model)
    model.learn(32)
    moved = changed(before, weights(model))
    assert model._n_updates >= 1
    assert moved >= set(weights(model, ACTOR))
    # The value function learns where it is part of the formulation, and only there
    assert moved & set(weights(model, CRITIC)) == (set(weights(model, CRITIC)) if model.plan.uses_value_function else set())
    observations = model.env.reset()
    actions, _ = model.predict(observations)
    assert all(model.action_space.contains(action) for action in actions)


@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_defaults_run_on_every_kind_of_observation(observation):
    space = OBSERVATION_SPACES[observation]
    model = VPG(policy_for(space), SpacesEnv(space, ACTION_SPACES["Discrete"])).learn(100)
    assert model._n_updates == 2


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_defaults_run_on_registered_environments_without_a_warning(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = VPG("MlpPolicy", env_id).learn(256)
    assert model.num_timesteps == 256


@with_and_without_critic
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("observation", ["image", "Dict"])
def test_features_extractors_learn_where_they_are_used(observation, share, formulation):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)
    kwargs = small_kwargs(policy, share_features_extractor=share)
    model = VPG(policy, spaces_envs(space), n_steps=8, seed=0, policy_kwargs=kwargs, **formulation)
    actor, critic = model.policy.pi_features_extractor, model.policy.vf_features_extractor
    assert (actor is critic) == share
    before = copy.deepcopy((actor.state_dict(), critic.state_dict()))
    model.learn(16)
    assert changed(before[0], actor.state_dict())
    assert bool(changed(before[1], critic.state_dict())) == (share or model.plan.uses_value_function)


class TwoHeads(nn.Module):
    """The custom network of SB3's documentation."""

    def __init__(self, features_dim):
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = 8, 12
        self.actor = nn.Sequential(nn.Linear(features_dim, 8), nn.ReLU())
        self.critic = nn.Sequential(nn.Linear(features_dim, 12), nn.ReLU())

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return self.actor(features)

    def forward_critic(self, features):
        return self.critic(features)


class TwoHeadsPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = TwoHeads(self.features_dim)


@with_and_without_critic
def test_a_custom_mlp_extractor_learns(formulation):
    model = VPG(TwoHeadsPolicy, spaces_envs(), n_steps=10, seed=0, **formulation)
    before = weights(model)
    model.learn(40)
    moved = changed(before, weights(model))
    assert {"mlp_extractor.actor.0.weight", "action_net.weight"} <= moved
    assert ("mlp_extractor.critic.0.weight" in moved) == ("value_net.weight" in moved) == model.plan.uses_value_function


class OwnForward(ActorCriticPolicy):
    """A policy whose forward() has values of its own: 100, 101, 102 ..."""

    def forward(self, obs, deterministic=False):
        self.n_calls = getattr(self, "n_calls", 0) + 1
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, th.full_like(values, 99.0 + self.n_calls), log_prob


def test_an_overridden_forward_is_called_at_every_step_and_its_values_are_used():
    model = VPG(OwnForward, spaces_envs(), n_steps=10, seed=0).learn(20)
    assert model.policy.n_calls == 10
    np.testing.assert_array_equal(model.rollout_buffer.values, np.repeat(np.arange(100.0, 110.0)[:, None], 2, axis=1))
    assert np.isfinite(model.rollout_buffer.log_probs).all()


def test_an_overridden_forward_is_called_without_a_critic_too():
    model = VPG(OwnForward, spaces_envs(), n_steps=10, seed=0, estimator="reward_to_go", partial_episodes="truncate").learn(20)
    assert model.policy.n_calls == 10
    assert model._n_updates == 1


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [
        (th.optim.SGD, {"momentum": 0.75, "weight_decay": 0.125}),
        (th.optim.RMSprop, {"alpha": 0.5, "eps": 0.25}),
        (RMSpropTFLike, {"alpha": 0.5, "eps": 0.25}),
    ],
)
def test_a_custom_optimizer_keeps_its_arguments_in_both_parameter_groups(optimizer, kwargs):
    model = small_model(policy_kwargs={**SMALL, "optimizer_class": optimizer, "optimizer_kwargs": kwargs})
    assert type(model.policy.optimizer) is optimizer
    groups = model.policy.optimizer.param_groups
    assert len(groups) == 2
    for group in groups:
        assert {name: group[name] for name in kwargs} == kwargs
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.policy.parameters())
    before = weights(model)
    model.learn(20)
    assert changed(before, weights(model)) == set(before)


# ---------------------------------------------------------------------------------------------------------------
# gSDE
# ---------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------
# Rollout buffers of one's own
# ---------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------


def test_subprocess_environments_train_as_those_in_the_same_process():
    def trained(vec_env_cls):
        env = make_vec_env(lambda: SpacesEnv(BOX, ACTION_SPACES["Box"]), n_envs=2, seed=0, vec_env_cls=vec_env_cls)
        model = small_model(env).learn(60)
        env.close()
        return model

    first, second = trained(DummyVecEnv), trained(SubprocVecEnv)
    assert first.num_timesteps == second.num_timesteps == 60
    assert_same_weights(first, second)


def test_vec_normalize_rewards_and_observations_at_time_limits_are_the_normalised_ones():
    env = VecNormalize(counting_envs(n_envs=2, lengths=(4,), time_limit=True), gamma=0.5)
    env.reset()
    for _ in range(20):
        env.step(np.zeros(2, int))
    # Fixed statistics from here on, so that it can be said what is to be expected
    env.training = False
    found = []

    def look(spy):
        buffer, policy = spy.model.rollout_buffer, spy.model.policy
        ends = buffer.observations[:, :, 1] == env.normalize_obs(np.array([0.0, 3.0]))[1]
        rewards = env.normalize_reward(np.tile(np.arange(1.0, 5.0), 2)[:, None])
        np.testing.assert_allclose(buffer.rewards, np.broadcast_to(rewards, buffer.rewards.shape), rtol=1e-5)
        at_limit = buffer.observations[ends]
        at_limit[:, 1] = env.normalize_obs(np.array([0.0, 4.0]))[1]
        with th.no_grad():
            terminal_values = policy.predict_values(th.as_tensor(at_limit)).flatten().numpy()
        found.append((buffer.returns[ends], buffer.rewards[ends] + 0.5 * terminal_values))

    small_model(env, n_steps=8, gamma=0.5, estimator="td_residual").learn(32, callback=Spy(look, "rollout_end"))
    assert [len(target) for target, _ in found] == [4, 4]
    for target, expected in found:
        np.testing.assert_allclose(target, expected, rtol=1e-4)


def test_vec_normalize_and_whole_episodes_go_together():
    env = VecNormalize(counting_envs(n_envs=2, lengths=(3, 5)), gamma=0.5)
    model = small_model(env, estimator="total_return", baseline="leave_one_out", n_episodes=2).learn(32)
    buffer = model.rollout_buffer
    assert model._n_updates == 2
    assert buffer.n_episodes == 4
    # Rewards grow within an episode, in whatever unit
    np.testing.assert_array_equal(np.diff(buffer.rewards, axis=0) < 0, buffer.episode_starts[1:] == 1)
    assert env.obs_rms.count > 32


def test_one_environment_and_one_step_per_update_is_allowed():
    model = small_model(spaces_envs(n_envs=1), n_steps=1)
    before = weights(model)
    model.learn(4)
    assert model._n_updates == 4
    assert all(p.isfinite().all() for p in model.policy.parameters())
    assert "value_net.bias" in changed(before, weights(model))


# ---------------------------------------------------------------------------------------------------------------
# Saving, loading, continuing
# ---------------------------------------------------------------------------------------------------------------


def saved(model, **kwargs):
    file = io.BytesIO()
    model.save(file, **kwargs)
    file.seek(0)
    return file


@pytest.mark.parametrize("critic_learning_rate", [None, 0.02])
@with_and_without_critic
def test_a_loaded_model_predicts_and_goes_on_training_the_same(formulation, critic_learning_rate):
    model = small_model(critic_learning_rate=critic_learning_rate, n_critic_updates=2, **formulation).learn(40)
    file = saved(model)
    model.set_env(spaces_envs())
    loaded = VPG.load(file, env=spaces_envs())

    observations = np.stack([BOX.sample() for _ in range(20)])
    for deterministic in (True, False):
        th.manual_seed(1)
        expected = model.predict(observations, deterministic=deterministic)[0]
        th.manual_seed(1)
        np.testing.assert_array_equal(loaded.predict(observations, deterministic=deterministic)[0], expected)

    for m in (model, loaded):
        m.set_random_seed(5)
        m.learn(40, reset_num_timesteps=False)
    assert model.num_timesteps == loaded.num_timesteps
    assert model._n_updates == loaded._n_updates > 1
    assert_same_weights(model, loaded)


def test_the_optimizer_is_saved_with_its_two_groups_and_their_learning_rates():
    model = small_model(learning_rate=0.001, critic_learning_rate=0.02).learn(40)
    loaded = VPG.load(saved(model))
    assert learning_rates(model) == learning_rates(loaded) == (0.001, 0.02)
    first, second = model.policy.optimizer.state_dict(), loaded.policy.optimizer.state_dict()
    assert len(first["param_groups"]) == 2
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    assert len(first["state"]) == len(list(model.policy.parameters()))
    for key, state in first["state"].items():
        for name, value in state.items():
            assert th.equal(value, second["state"][key][name])


def test_learning_rates_are_set_from_the_start():
    assert learning_rates(small_model(learning_rate=0.001, critic_learning_rate=0.02)) == (0.001, 0.02)
    assert learning_rates(small_model(learning_rate=0.001)) == (0.001, 0.001)


@with_and_without_critic
def test_a_model_can_be_loaded_with_another_number_of_environments(formulation):
    file = saved(small_model(**formulation).learn(40))
    for n_envs in (1, 3):
        file.seek(0)
        loaded = VPG.load(file, env=spaces_envs(n_envs=n_envs))
        before = weights(loaded)
        loaded.learn(20 * n_envs, reset_num_timesteps=False)
        assert loaded.n_envs == loaded.rollout_buffer.rewards.shape[1] == n_envs
        assert changed(before, weights(loaded)) >= set(weights(loaded, ACTOR))


def test_a_model_loaded_without_environment_predicts_and_learns_once_it_has_one(tmp_path):
    model = small_model(spaces_envs(), estimator="total_return", baseline="leave_one_out", n_episodes=1).learn(40)
    model.save(tmp_path / "model")
    loaded = VPG.load(tmp_path / "model")
    assert loaded.get_env() is None
    observation = BOX.sample()
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    loaded.set_env(spaces_envs())
    loaded.learn(20)
    assert loaded._n_updates > model._n_updates


def test_keywords_are_saved_and_can_be_changed_on_loading():
    keywords = dict(
        estimator="reward_to_go",
        baseline="time",
        normalize_advantage="episode",
        discount_state_distribution=True,
        loss_reduction="trajectory",
        n_critic_updates=3,
        critic_batch_size=16,
        critic_learning_rate=0.02,
        n_episodes=2,
    )
    model = small_model(**keywords)
    loaded = VPG.load(saved(model))
    assert {name: getattr(loaded, name) for name in keywords} == keywords
    assert loaded.rollout_buffer.formulation == model.rollout_buffer.formulation
    other = VPG.load(saved(model), estimator="gae", baseline=None, n_episodes=None)
    assert other.plan.uses_value_function
    assert other.plan.partial_episodes.bootstrap
    assert other.rollout_buffer.formulation.estimator == "gae"


def test_save_excludes_and_includes_what_it_is_told_to():
    model = small_model(tensorboard_log="somewhere")
    data = load_from_zip_file(saved(model))[0]
    assert "tensorboard_log" in data
    assert data.keys().isdisjoint({"policy", "env", "rollout_buffer", "_actor_parameters", "_critic_parameters"})
    data = load_from_zip_file(saved(model, exclude=["tensorboard_log"]))[0]
    assert "tensorboard_log" not in data
    with_env = VPG.load(saved(model, include=["env"], exclude=["tensorboard_log"]))
    with_env.learn(20)
    assert with_env.num_timesteps == 20


def test_parameters_can_be_taken_from_one_model_to_another():
    first, second = small_model(seed=1).learn(40), small_model(seed=2)
    parameters = copy.deepcopy(first.get_parameters())
    assert parameters.keys() == {"policy", "policy.optimizer"}
    second.set_parameters(parameters)
    assert_same_weights(first, second)
    for model in (first, second):
        model.set_env(spaces_envs())
        set_random_seed(3)
        model.learn(20)
    assert_same_weights(first, second)


def test_the_policy_of_an_a2c_model_can_be_taken_over():
    a2c = A2C("MlpPolicy", spaces_envs(), seed=1, policy_kwargs=dict(SMALL)).learn(20)
    model = small_model()
    model.set_parameters({"policy": a2c.policy.state_dict()}, exact_match=False)
    assert_same_weights(model, a2c)
    assert changed(weights(a2c), weights(model.learn(20))) == set(weights(a2c))


@with_and_without_critic
def test_training_goes_on_in_a_new_environment(formulation):
    model = small_model(counting_envs(), **formulation).learn(40)
    n_updates, num_timesteps = model._n_updates, model.num_timesteps
    model.set_env(counting_envs(lengths=(7,)))
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps >= num_timesteps + 20
    assert model._n_updates > n_updates
    # All that was recorded comes from the new environment: each first step of an episode shows t = 0, and none ends before 7
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.observations[buffer.episode_starts.astype(bool)][:, 1], 0)
    np.testing.assert_array_equal(buffer.rewards[buffer.mask], buffer.observations[buffer.mask][:, 1] + 1)


def test_a_policy_can_be_copied_before_and_after_training():
    model = small_model()
    for _ in range(2):
        twin = copy.deepcopy(model.policy)
        assert all(th.equal(p, q) for p, q in zip(model.policy.parameters(), twin.parameters()))
        model.learn(20)


def test_equal_seeds_give_equal_weights():
    def run(seed, **kwargs):
        return small_model(spaces_envs(seed=seed), seed=seed, n_critic_updates=2, critic_batch_size=8, **kwargs).learn(60)

    assert_same_weights(run(1), run(1))
    first, second = run(1), run(2)
    assert changed(weights(first), weights(second)) >= {"action_net.weight", "value_net.weight"}


# ---------------------------------------------------------------------------------------------------------------
# Predicting and evaluating
# ---------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------
# Callbacks
# ---------------------------------------------------------------------------------------------------------------


def test_eval_and_checkpoint_callbacks_write_their_files(tmp_path):
    evaluation = EvalCallback(
        Monitor(CountingEnv(lengths=(4,))),
        n_eval_episodes=2,
        eval_freq=10,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path / "evaluations"),
        verbose=0,
    )
    checkpoints = CheckpointCallback(save_freq=10, save_path=str(tmp_path / "checkpoints"))
    small_model(counting_envs()).learn(40, callback=[evaluation, checkpoints])
    assert evaluation.best_mean_reward == 10.0
    assert len(np.load(tmp_path / "evaluations" / "evaluations.npz")["timesteps"]) == 2
    assert VPG.load(tmp_path / "best" / "best_model").num_timesteps == 20
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "rl_model_20_steps.zip",
        "rl_model_40_steps.zip",
    ]


def test_stopping_at_a_reward_threshold_ends_training():
    stop = StopTrainingOnRewardThreshold(reward_threshold=5.0)
    evaluation = EvalCallback(
        DummyVecEnv([lambda: Monitor(CountingEnv(lengths=(4,)))]), callback_on_new_best=stop, eval_freq=7, verbose=0
    )
    model = small_model(counting_envs(n_envs=1)).learn(1000, callback=evaluation)
    assert model.num_timesteps == 7


def test_stopping_at_a_number_of_episodes_ends_training():
    model = small_model(counting_envs(n_envs=1, lengths=(4,))).learn(1000, callback=StopTrainingOnMaxEpisodes(6))
    assert model.num_timesteps == 24


@pytest.mark.parametrize(
    "formulation",
    [*FORMULATIONS.values(), {"estimator": "reward_to_go", "n_episodes": 2}],
    ids=[*FORMULATIONS.keys(), "n_episodes"],
)
@pytest.mark.parametrize("stop_at", [1, 4, 15, 21])
def test_after_a_callback_stopped_a_rollout_training_goes_on_in_step_with_the_environment(stop_at, formulation):
    model = small_model(counting_envs(lengths=(100,), time_limit=True), **formulation)
    model.learn(10_000, callback=Spy(lambda spy: spy.n_calls < stop_at))
    assert model.num_timesteps == 2 * stop_at
    n_updates = model._n_updates
    found = []
    model.learn(
        20,
        reset_num_timesteps=False,
        callback=Spy(lambda spy: found.append(copy.deepcopy(spy.model.rollout_buffer)), "rollout_end"),
    )
    assert model._n_updates == n_updates + len(found) > n_updates
    for buffer in found:
        # The environment's reward is the number of the step that it shows, plus one
        np.testing.assert_array_equal(buffer.rewards, buffer.observations[:, :, 1] + 1)
        np.testing.assert_array_equal(buffer.steps, buffer.observations[:, :, 1])
        np.testing.assert_array_equal(buffer.episode_starts, buffer.observations[:, :, 1] == 0)


@with_and_without_critic
def test_callbacks_see_what_they_see_with_a2c(formulation):
    def names(algorithm, **kwargs):
        model = algorithm("MlpPolicy", counting_envs(), n_steps=5, seed=0, policy_kwargs=dict(SMALL), **kwargs)
        step, end = [], []
        model.learn(
            10,
            callback=[
                Spy(lambda spy: step.append(set(spy.locals))),
                Spy(lambda spy: end.append(set(spy.locals)), "rollout_end"),
            ],
        )
        return step[0], end[0]

    for ours, theirs in zip(names(VPG, **formulation), names(A2C)):
        assert ours >= theirs - {"idx", "done", "terminal_obs", "terminal_value"}


def test_what_callbacks_see_is_what_happened():
    env = counting_envs(action_space=ACTION_SPACES["Box"])
    model = small_model(env, n_steps=5)
    seen = []

    def look(spy):
        x = spy.locals
        assert x["self"] is model
        assert x["env"] is env
        assert x["rollout_buffer"] is model.rollout_buffer
        assert x["n_rollout_steps"] == 5
        assert x["n_steps"] == (spy.n_calls - 1) % 5
        assert x["obs_tensor"].shape == (2, 2)
        np.testing.assert_array_equal(x["obs_tensor"].numpy()[:, 1] + 1, x["rewards"])
        np.testing.assert_array_equal(x["new_obs"][:, 1], np.where(x["dones"], 0, x["rewards"]))
        np.testing.assert_array_equal(x["clipped_actions"], np.clip(x["actions"], env.action_space.low, env.action_space.high))
        assert [("terminal_observation" in info) for info in x["infos"]] == x["dones"].tolist()
        seen.append((x["rewards"].copy(), x["actions"].copy(), x["dones"].copy()))

    model.learn(20, callback=Spy(look))
    rewards, actions, dones = (np.stack(column) for column in zip(*seen))
    np.testing.assert_array_equal(rewards, np.tile(np.array([1, 2, 3, 1, 2, 3, 4, 5, 1, 2])[:, None], 2))
    np.testing.assert_array_equal(model.rollout_buffer.actions, actions[5:])
    np.testing.assert_array_equal(model.rollout_buffer.episode_starts[1:], dones[5:-1])


def test_a_function_can_be_a_callback_and_stop_training():
    model = small_model().learn(1000, callback=lambda locals_, globals_: locals_["n_steps"] < 3)
    assert model.num_timesteps == 2 * 4


def test_callbacks_are_called_once_per_event():
    events = []

    class Recorder(BaseCallback):
        def _on_training_start(self):
            events.append("training_start")

        def _on_rollout_start(self):
            events.append("rollout_start")

        def _on_step(self):
            events.append("step")
            return True

        def _on_rollout_end(self):
            events.append("rollout_end")

        def _on_training_end(self):
            events.append("training_end")

    small_model(n_steps=2).learn(8, callback=CallbackList([Recorder()]))
    rollout = ["rollout_start", "step", "step", "rollout_end"]
    assert events == ["training_start", *rollout, *rollout, "training_end"]


# SB3 silences tqdm's remark that its rich bar is experimental when it is imported; pytest resets that for each test
@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
def test_the_progress_bar_runs():
    assert small_model().learn(20, progress_bar=True).num_timesteps == 20


# ---------------------------------------------------------------------------------------------------------------
# Logs
# ---------------------------------------------------------------------------------------------------------------

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
    monkeypatch.setattr(sb3_vpg.buffers, "MIN_CHUNK", 100)
    monkeypatch.setattr(sb3_vpg.buffers, "MAX_CHUNK", 100)
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


# ---------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------


def recorded_learning_rates(total_timesteps=80, **keywords):
    """Learning rates of actor and critic at each update; 4 of them by default."""
    seen = []

    class Recorder(th.optim.SGD):
        def step(self, closure=None):
            seen.append(learning_rates(model))
            return super().step(closure)

    model = small_model(policy_kwargs={**SMALL, "optimizer_class": Recorder}, **keywords)
    model.learn(total_timesteps)
    return np.transpose(seen)


def test_a_learning_rate_schedule_reaches_both_parameter_groups():
    actor, critic = recorded_learning_rates(learning_rate=lambda remaining: 0.25 * remaining)
    np.testing.assert_allclose(actor, [0.1875, 0.125, 0.0625, 0.0])
    np.testing.assert_allclose(critic, actor)


def test_a_critic_learning_rate_schedule_reaches_the_critic_alone():
    actor, critic = recorded_learning_rates(learning_rate=0.5, critic_learning_rate=lambda remaining: 0.25 * remaining)
    np.testing.assert_allclose(actor, [0.5] * 4)
    np.testing.assert_allclose(critic, [0.1875, 0.125, 0.0625, 0.0])
    actor, critic = recorded_learning_rates(learning_rate=lambda remaining: 0.25 * remaining, critic_learning_rate=0.5)
    np.testing.assert_allclose(actor, [0.1875, 0.125, 0.0625, 0.0])
    np.testing.assert_allclose(critic, [0.5] * 4)


@with_and_without_critic
def test_no_schedule_is_asked_for_what_comes_after_its_end(formulation):
    # The third rollout of 2 environments x 10 steps, or of somewhat more with whole episodes, ends after 50 steps
    both = recorded_learning_rates(
        50, learning_rate=lambda remaining: 0.25 * remaining, critic_learning_rate=lambda remaining: remaining, **formulation
    )
    np.testing.assert_array_equal(both[:, -1], 0.0)
    assert both[:, :-1].min() > 0
    progress = []
    callback = Spy(lambda spy: progress.append(spy.model._current_progress_remaining), "rollout_start")
    model = small_model(**formulation).learn(50, callback=callback)
    assert [*progress, model._current_progress_remaining][-1] == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.125])
@pytest.mark.parametrize("keyword", ["learning_rate", "critic_learning_rate"])
def test_a_schedule_that_gives_a_bad_learning_rate_is_refused_before_the_step(keyword, bad):
    model = small_model(**{keyword: lambda remaining: 0.125 if remaining > 0.5 else bad})
    before, optimizer = weights(model), copy.deepcopy(model.policy.optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"{keyword}\(0\.5\)={bad} is not allowed; it must be a number >= 0"):
        model.learn(40)
    assert model._n_updates == 0
    assert changed(before, weights(model)) == set()
    assert model.policy.optimizer.state_dict() == optimizer
    with pytest.raises(ValueError, match=rf"{keyword}\(1\)={bad} is not allowed"):
        small_model(**{keyword: lambda _: bad})


def test_each_learning_rate_scales_the_steps_of_its_own_parameters():
    both = small_model(policy_kwargs=SGD, learning_rate=0.5, critic_learning_rate=0.25).learn(20)
    no_critic = small_model(policy_kwargs=SGD, learning_rate=0.5, critic_learning_rate=0.0).learn(20)
    no_actor = small_model(policy_kwargs=SGD, learning_rate=0.0, critic_learning_rate=0.25).learn(20)
    start = small_model(policy_kwargs=SGD)
    assert_same_weights(both, no_critic, ACTOR)
    assert_same_weights(both, no_actor, CRITIC)
    assert_same_weights(start, no_critic, CRITIC)
    assert_same_weights(start, no_actor, ACTOR)
    assert changed(weights(start), weights(both)) == set(weights(start))


def test_the_entropy_bonus_raises_the_entropy_and_a_negative_one_lowers_it():
    observations = th.as_tensor(np.stack([BOX.sample() for _ in range(50)]))
    entropies = []
    for ent_coef in (-1.0, 0.0, 1.0):
        model = small_model(policy_kwargs=SGD, learning_rate=0.1, max_grad_norm=None, ent_coef=ent_coef)
        with th.no_grad():
            # Away from the uniform policy, which has all the entropy there is
            model.policy.action_net.bias.copy_(th.tensor([1.0, 0.0, -1.0]))
        model.learn(100)
        with th.no_grad():
            entropies.append(model.policy.get_distribution(observations).entropy().mean().item())
    assert entropies[0] + 0.05 < entropies[1] < entropies[2] - 0.05


def test_vf_coef_scales_the_steps_of_the_critic():
    def steps(vf_coef):
        model = small_model(policy_kwargs=SGD, learning_rate=0.01, max_grad_norm=None, vf_coef=vf_coef)
        before = weights(model)
        after = weights(model.learn(20))
        return {name: after[name] - before[name] for name in before}

    half, two = steps(0.5), steps(2.0)
    for name, step in half.items():
        expected = 4 * step if name.startswith(CRITIC) else step
        th.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-6)
        assert step.abs().max() > 0


def test_a_huge_value_loss_does_not_scale_the_policy_gradient_down():
    without, huge = (small_model(policy_kwargs=SGD, vf_coef=c, max_grad_norm=0.5).learn(20) for c in (0.0, 1e6))
    assert_same_weights(without, huge, ACTOR)
    start = small_model(policy_kwargs=SGD)
    # ... and is itself clipped: the length of the critic's step is learning rate times norm
    step = [huge.policy.get_parameter(name) - w for name, w in weights(start, CRITIC).items()]
    assert th.sqrt(sum((s**2).sum() for s in step)).item() == pytest.approx(huge.learning_rate * 0.5, rel=1e-3)
    assert changed(weights(start, CRITIC), weights(without, CRITIC)) == set()


def test_the_policy_gradient_is_clipped_to_the_maximum_norm():
    start = small_model(policy_kwargs=SGD, learning_rate=0.5)
    clipped = small_model(policy_kwargs=SGD, learning_rate=0.5, max_grad_norm=0.0625).learn(20, log_interval=None)
    assert clipped.logger.name_to_value["train/policy_grad_norm"] > 0.0625
    step = [clipped.policy.get_parameter(name) - w for name, w in weights(start, ACTOR).items()]
    assert th.sqrt(sum((s**2).sum() for s in step)).item() == pytest.approx(0.5 * 0.0625, rel=1e-3)


@pytest.mark.parametrize("critic_batch_size", [None, 6])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("observation", ["Box", "image", "Dict"])
def test_further_critic_passes_move_only_what_the_actor_does_not_use(observation, share, critic_batch_size):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)

    def trained(n_critic_updates):
        # Momentum and weight decay would move a parameter that takes part without a gradient
        kwargs = small_kwargs(policy, optimizer_class=th.optim.SGD, share_features_extractor=share)
        kwargs["optimizer_kwargs"] = {"momentum": 0.5, "weight_decay": 0.5}
        model = VPG(
            policy,
            spaces_envs(space),
            n_steps=8,
            seed=0,
            policy_kwargs=kwargs,
            n_critic_updates=n_critic_updates,
            critic_batch_size=critic_batch_size,
        )
        return model.learn(16)

    once, often = trained(1), trained(4)
    critic = {name for name in weights(once) if name.startswith(CRITIC)}
    if share:
        critic = {name for name in critic if not name.startswith("vf_features_extractor.")}
    assert changed(weights(once), weights(often)) == critic


def test_the_critic_takes_as_many_steps_and_batches_as_asked():
    model = small_model(n_steps=20, n_critic_updates=3, critic_batch_size=16)
    batches = []
    model.policy.value_net.register_forward_hook(
        lambda module, args, output: batches.append(len(output)) if model.policy.training else None
    )
    model.learn(40)
    # The joint step sees all 40 steps, then two passes over them in minibatches
    assert batches == [40, 16, 16, 8, 16, 16, 8]


def test_further_critic_passes_lower_the_value_loss():
    def value_loss(n_critic_updates):
        model = small_model(n_critic_updates=n_critic_updates, learning_rate=0.01).learn(20)
        buffer = model.rollout_buffer
        with th.no_grad():
            values = model.policy.predict_values(th.as_tensor(buffer.observations.reshape(-1, 3))).flatten().numpy()
        return np.mean((buffer.returns.flatten() - values) ** 2)

    assert value_loss(30) < 0.9 * value_loss(1)


def steps_of_critic(model, since):
    """How far the critic's parameters are from those of another model."""
    return th.cat([(model.policy.get_parameter(name) - w).flatten() for name, w in weights(since, CRITIC).items()]).detach()


def test_further_critic_passes_are_clipped_too():
    once, twice = (
        small_model(policy_kwargs=SGD, vf_coef=1e6, max_grad_norm=0.5, n_critic_updates=n).learn(20) for n in (1, 2)
    )
    # The length of a step is learning rate times norm
    assert steps_of_critic(twice, since=once).norm().item() == pytest.approx(once.learning_rate * 0.5, rel=1e-3)


@pytest.mark.parametrize("critic_batch_size", [None, 8])
def test_vf_coef_scales_further_critic_passes_as_a_learning_rate_does(critic_batch_size):
    keywords = {"policy_kwargs": SGD, "max_grad_norm": None, "n_critic_updates": 3, "critic_batch_size": critic_batch_size}
    start = small_model()
    first, second = (
        small_model(vf_coef=vf_coef, critic_learning_rate=rate, **keywords).learn(20)
        for vf_coef, rate in ((0.5, 0.04), (2.0, 0.01))
    )
    th.testing.assert_close(steps_of_critic(first, since=start), steps_of_critic(second, since=start), rtol=1e-3, atol=1e-6)
    assert steps_of_critic(first, since=start).norm() > 0.01


def test_a_critic_pass_in_quarters_takes_four_steps_as_long_as_one_over_the_whole_batch():
    # So small that the gradient does not change from step to step
    keywords = {"policy_kwargs": SGD, "max_grad_norm": None, "critic_learning_rate": 1e-3}
    once = small_model(n_critic_updates=1, **keywords).learn(20)
    whole, quarters = (small_model(n_critic_updates=2, critic_batch_size=n, **keywords).learn(20) for n in (None, 5))
    expected = 4 * steps_of_critic(whole, since=once)
    assert (steps_of_critic(quarters, since=once) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("keywords", [{}, {"partial_episodes": "truncate"}, {"n_episodes": 2}])
@pytest.mark.parametrize("observation", ["Box", "image"])
def test_no_value_is_computed_where_the_formulation_has_none(observation, keywords, share):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)
    kwargs = small_kwargs(policy, share_features_extractor=share)
    model = VPG(
        policy,
        spaces_envs(space),
        n_steps=10,
        seed=0,
        policy_kwargs=kwargs,
        estimator="reward_to_go",
        n_critic_updates=3,
        **keywords,
    )
    forwards = []
    critic = [model.policy.value_net, model.policy.mlp_extractor.value_net]
    if not share:
        critic.append(model.policy.vf_features_extractor)
    for module in critic:
        module.register_forward_hook(lambda *args: forwards.append(args))
    before = weights(model)
    model.learn(40)
    assert forwards == []
    unused = {name for name in before if name.startswith(CRITIC)}
    if share:
        unused = {name for name in unused if not name.startswith("vf_features_extractor.")}
    assert changed(before, weights(model)) == set(before) - unused
    # The hooks do see a value that is computed
    model.policy.predict_values(model.policy.obs_to_tensor(model.env.reset())[0])
    assert len(forwards) == len(critic)


@pytest.mark.parametrize(
    "keywords",
    [
        {"n_critic_updates": 3, "ent_coef": 0.1},
        {"estimator": "reward_to_go", "loss_reduction": "trajectory", "baseline": "time"},
        {"estimator": "total_return", "n_episodes": 3, "baseline": "value"},
    ],
)
def test_gradients_added_up_over_chunks_are_those_of_the_whole_batch(keywords, monkeypatch):
    def trained():
        model = small_model(policy_kwargs=SGD, learning_rate=0.5, max_grad_norm=None, **keywords)
        chunks = []
        model.policy.action_net.register_forward_hook(
            lambda module, args, output: chunks.append(len(output)) if model.policy.training else None
        )
        return model.learn(1, log_interval=None), chunks

    whole, whole_chunks = trained()
    monkeypatch.setattr(sb3_vpg.buffers, "MIN_CHUNK", 7)
    monkeypatch.setattr(sb3_vpg.buffers, "MAX_CHUNK", 7)
    in_chunks, chunks = trained()
    assert len(whole_chunks) == 1
    assert max(chunks) <= 7
    assert sum(chunks) == whole_chunks[0] > 14
    for name, w in weights(whole).items():
        th.testing.assert_close(in_chunks.policy.get_parameter(name), w, rtol=1e-4, atol=1e-6)
    logged, expected = in_chunks.logger.name_to_value, whole.logger.name_to_value
    for name in ("policy_loss", "entropy_loss", "policy_grad_norm"):
        assert logged[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-4, abs=1e-6)


class Normalised(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(self.features_dim)

    def forward(self, observations):
        return self.norm(super().forward(observations))


def test_a_network_with_batch_normalisation_sees_the_whole_batch_at_once(monkeypatch):
    monkeypatch.setattr(sb3_vpg.buffers, "MIN_CHUNK", 7)
    monkeypatch.setattr(sb3_vpg.buffers, "MAX_CHUNK", 7)
    model = small_model(policy_kwargs={**SMALL, "features_extractor_class": Normalised}, n_critic_updates=2)
    sizes = []
    norm = model.policy.features_extractor.norm
    norm.register_forward_hook(lambda module, args, output: sizes.append(len(output)) if module.training else None)
    before = norm.running_mean.clone()
    model.learn(20)
    assert sizes == [20, 20]
    assert not th.equal(before, norm.running_mean)


@with_and_without_critic
@pytest.mark.parametrize("frozen", [ACTOR[1], CRITIC[1]], ids=["actor", "critic"])
def test_layers_can_be_frozen_and_thawed_at_any_time(formulation, frozen):
    model = small_model(n_critic_updates=2, learning_rate=0.05, **formulation)

    def learned():
        before = weights(model)
        model.learn(20)
        return {name for name in changed(before, weights(model)) if name.startswith(frozen)}

    layers = [p for name, p in model.policy.named_parameters() if name.startswith(frozen)]
    in_use = bool(learned())
    assert in_use == (frozen == ACTOR[1] or model.plan.uses_value_function)
    for p in layers:
        p.requires_grad_(False)
    assert not learned()
    for p in layers:
        p.requires_grad_(True)
    assert bool(learned()) == in_use


@pytest.mark.parametrize("n_critic_updates", [1, 3])
@pytest.mark.parametrize("critic_batch_size", [None, 8])
def test_a_frozen_critic_leaves_the_actor_to_learn(n_critic_updates, critic_batch_size):
    model = small_model(n_critic_updates=n_critic_updates, critic_batch_size=critic_batch_size)
    for name, p in model.policy.named_parameters():
        p.requires_grad_(not name.startswith(CRITIC))
    before = weights(model)
    model.learn(40)
    assert changed(before, weights(model)) == set(weights(model, ACTOR))


def test_a_frozen_actor_leaves_the_critic_to_learn():
    model = small_model(n_critic_updates=3)
    for name, p in model.policy.named_parameters():
        p.requires_grad_(name.startswith(CRITIC))
    before = weights(model)
    model.learn(40)
    assert changed(before, weights(model)) == set(weights(model, CRITIC))


@with_and_without_critic
def test_a_policy_with_nothing_to_train_is_refused(formulation):
    model = small_model(**formulation)
    model.policy.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen \(requires_grad=False\)"):
        model.learn(20)
    assert model._n_updates == 0


class FrozenCritic(ActorCriticPolicy):
    """Its critic is frozen at construction."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.value_net.requires_grad_(False)
        self.mlp_extractor.value_net.requires_grad_(False)


def test_a_critic_frozen_at_construction_and_thawed_later_is_the_critics():
    model = VPG(FrozenCritic, spaces_envs(), n_steps=10, n_critic_updates=3, critic_learning_rate=0.5, policy_kwargs=SGD)
    assert learning_rates(model) == (0.002, 0.5)
    model.learn(20)
    model.policy.requires_grad_(True)
    before = weights(model)
    model.learn(20)
    assert changed(before, weights(model)) == set(before)
    assert learning_rates(model) == (0.002, 0.5)
    # Which layers are frozen is not saved, and the groups do not depend on it
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    assert learning_rates(VPG.load(file)) == (0.002, 0.5)


@pytest.mark.parametrize("groups", ["one", "one for each parameter"])
def test_another_optimizer_is_split_between_actor_and_critic(groups):
    def trained(replace):
        model = small_model(learning_rate=0.125, critic_learning_rate=0.5, n_critic_updates=2, policy_kwargs=SGD)
        if replace:
            params = list(model.policy.parameters())
            params = params if groups == "one" else [{"params": [p]} for p in params]
            model.policy.optimizer = th.optim.SGD(params, lr=1.0)
        return model.learn(40)

    model = trained(replace=True)
    assert learning_rates(model) == (0.125, 0.5)
    assert_same_weights(model, trained(replace=False))


def test_a_layer_that_replaces_another_is_trained_as_what_it_is():
    model = small_model(learning_rate=0.125, critic_learning_rate=0.5, policy_kwargs=SGD).learn(20)
    model.policy.value_net = nn.Linear(16, 1)
    model.policy.optimizer.add_param_group({"params": model.policy.value_net.parameters()})
    before = weights(model)
    model.learn(20)
    assert changed(before, weights(model)) == set(before)
    assert learning_rates(model) == (0.125, 0.5)


def adam(**kwargs):
    return {**SMALL, "optimizer_class": th.optim.Adam, "optimizer_kwargs": kwargs}


def test_the_fused_steps_of_adam_are_those_of_the_plain_one():
    def trained(fused):
        model = small_model(policy_kwargs=adam(fused=fused), learning_rate=0.05)
        assert {group["fused"] for group in model.policy.optimizer.param_groups} == {fused is None}
        before = weights(model)
        model.learn(100)
        assert len(changed(before, weights(model))) == len(before)
        return weights(model)

    plain, fused = trained(False), trained(None)
    for name, w in plain.items():
        th.testing.assert_close(fused[name], w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choice", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}])
def test_how_adam_takes_its_steps_can_be_chosen(choice):
    model = small_model(policy_kwargs=adam(**choice))
    groups = model.policy.optimizer.param_groups
    assert all(group[name] == value for group in groups for name, value in choice.items())
    assert not any(group["fused"] for group in groups)


def test_other_optimizers_are_left_as_they_are():
    for optimizer in (th.optim.SGD, th.optim.RMSprop, RMSpropTFLike):
        model = small_model(policy_kwargs={**SMALL, "optimizer_class": optimizer, "optimizer_kwargs": {}})
        assert not any(group.get("fused") for group in model.policy.optimizer.param_groups)


# ---------------------------------------------------------------------------------------------------------------
# LogisticPolicy
# ---------------------------------------------------------------------------------------------------------------


def logit_weights(model):
    return [p.detach().numpy().astype(float).flatten() for p in model.policy.action_net.parameters()]


@pytest.mark.parametrize("bias", [False, True])
def test_a_logistic_policy_on_cartpole_is_the_sigmoid_of_four_weights(bias):
    model = VPG("LogisticPolicy", "CartPole-v1", n_steps=64, seed=0, learning_rate=0.1, policy_kwargs={"bias": bias})
    assert [p.shape for p in model.policy.action_net.parameters()] == [(1, 4), (1,)][: 1 + bias]
    assert sum(p.numel() for p in model._actor_parameters) == 4 + bias
    model.learn(256)
    theta, b = [*logit_weights(model), np.zeros(1)][:2]
    assert (theta != 0).all()
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    observations = th.as_tensor(x)
    probability = 1 / (1 + np.exp(-(x @ theta + b)))
    distribution = model.policy.get_distribution(observations).distribution
    np.testing.assert_allclose(distribution.probs[:, 1].numpy(force=True), probability, rtol=1e-5)
    actions, _ = model.predict(x, deterministic=True)
    np.testing.assert_array_equal(actions, probability > 0.5)


def test_a_logistic_policy_without_a_critic_learns_four_numbers():
    model = VPG("LogisticPolicy", "CartPole-v1", estimator="reward_to_go", n_episodes=4, seed=0)
    before = weights(model)
    model.learn(100)
    assert changed(before, weights(model)) == {"action_net.weight"}


def test_a_logistic_policy_can_be_saved_alone_and_within_a_model(tmp_path):
    model = VPG("LogisticPolicy", "CartPole-v1", n_steps=32, seed=0, policy_kwargs={"bias": True}).learn(64)
    observation = np.ones(4, np.float32)
    expected = model.policy.get_distribution(th.as_tensor(observation)[None]).distribution.probs
    model.policy.save(str(tmp_path / "policy"))
    model.save(tmp_path / "model")
    for policy in (LogisticPolicy.load(str(tmp_path / "policy")), VPG.load(tmp_path / "model").policy):
        assert len(list(policy.action_net.parameters())) == 2
        assert th.equal(policy.get_distribution(th.as_tensor(observation)[None]).distribution.probs, expected)


def test_a_logistic_policy_can_be_used_with_a2c():
    model = A2C(LogisticPolicy, "CartPole-v1", seed=0)
    before = weights(model)
    model.learn(10)
    assert "action_net.weight" in changed(before, weights(model))


@pytest.mark.parametrize(
    "action_space", [spaces.Discrete(3), *(ACTION_SPACES[k] for k in ("Box", "MultiDiscrete", "MultiBinary"))]
)
def test_a_logistic_policy_refuses_other_actions(action_space):
    with pytest.raises(ValueError, match=r"LogisticPolicy .*Discrete\(2\)"):
        VPG("LogisticPolicy", SpacesEnv(BOX, action_space))


def test_a_logistic_policy_takes_hidden_layers_and_other_observations():
    model = VPG(
        "LogisticPolicy",
        SpacesEnv(spaces.Discrete(4), spaces.Discrete(2)),
        n_steps=10,
        seed=0,
        policy_kwargs={"net_arch": {"pi": [8], "vf": []}},
    ).learn(10)
    assert model.policy.action_net.weight.shape == (1, 8)
    assert model.policy.value_net.weight.shape == (1, 4)


# ---------------------------------------------------------------------------------------------------------------
# The package
# ---------------------------------------------------------------------------------------------------------------


def test_vpg_takes_the_arguments_of_a2c_in_the_same_order():
    def names(algorithm):
        return list(algorithm.__init__.__code__.co_varnames[1 : algorithm.__init__.__code__.co_argcount])

    theirs = [name for name in names(A2C) if name not in ("rms_prop_eps", "use_rms_prop")]
    assert names(VPG)[: len(theirs)] == theirs


def test_an_environment_can_be_given_by_name_or_as_an_object():
    for env in ("CartPole-v1", gym.make("CartPole-v1"), DummyVecEnv([lambda: gym.make("CartPole-v1")])):
        assert VPG("MlpPolicy", env, n_steps=4, policy_kwargs=SMALL).learn(4).num_timesteps == 4


def test_a_custom_features_extractor_shared_with_the_critic_belongs_to_the_actor():
    class Features(BaseFeaturesExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space, 8)
            self.linear = nn.Linear(3, 8)

        def forward(self, observations):
            return self.linear(observations)

    model = small_model(policy_kwargs={**SMALL, "features_extractor_class": Features})
    critic = {id(p) for p in model.policy.value_net.parameters()} | {
        id(p) for p in model.policy.mlp_extractor.value_net.parameters()
    }
    assert {id(p) for p in model._critic_parameters} == critic
    assert {id(p) for p in model._actor_parameters} == {id(p) for p in model.policy.parameters()} - critic

"""Bad arguments and broken environments must lead to an error that says what is wrong, before any harm is done."""

import copy
import io
import re

import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, BOX, CountingEnv, FaultyEnv, SpacesEnv
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_vpg import VPG

SMALL = {"net_arch": [16]}
nan, inf = float("nan"), float("inf")


def small_model(env=None, n_envs=1, **kwargs):
    env = make_vec_env(CountingEnv, n_envs=n_envs) if env is None else env
    return VPG("MlpPolicy", env, **{"n_steps": 8, "seed": 0, "policy_kwargs": SMALL, **kwargs})


# ---------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------


def name_of(value):
    return getattr(value, "__name__", repr(value))


# keyword: values that are not allowed, whatever the others are
BAD_VALUES = {
    "estimator": ["foo", "GAE", "", None, True, 1, ["gae"]],
    "baseline": ["foo", "Value", "", False, 0, ["value"]],
    "normalize_advantage": ["foo", "True", None, 1, 0, 1.0],
    "partial_episodes": ["foo", "", True, False, 1],
    "loss_reduction": ["foo", "sum", None, True],
    "discount_state_distribution": [1, 0, None, "True"],
    "n_steps": [0, -1, 1.0, 2.5, "128", None, True, nan, inf],
    "n_episodes": [0, -1, 1.0, "1", True, False, nan, inf],
    "n_critic_updates": [0, -1, 1.0, "1", None, True, nan, inf],
    "critic_batch_size": [0, -1, 64.0, "64", True, nan, inf],
    "gamma": [-0.1, 1.1, nan, inf, -inf, "0.99", None, True],
    "gae_lambda": [-0.1, 1.1, nan, inf, -inf, "0.95", None, True],
    "ent_coef": [nan, inf, -inf, "auto", None, True],
    "vf_coef": [-0.5, nan, inf, "0.5", None, True],
    "max_grad_norm": [0, 0.0, -0.5, nan, -inf, "0.5", True],
    "learning_rate": [-1e-3, nan, inf, "1e-3", None, True],
    "critic_learning_rate": [-1e-3, nan, inf, "1e-3", True],
    "rollout_buffer_class": ["RolloutBuffer", ReplayBuffer, dict, 1, False],
}


@pytest.mark.parametrize(
    ("keyword", "value"), [(keyword, value) for keyword, values in BAD_VALUES.items() for value in values], ids=name_of
)
def test_a_bad_value_is_refused_by_name(keyword, value):
    with pytest.raises(ValueError, match=re.escape(f"{keyword}={value!r}")) as error:
        small_model(**{keyword: value})
    # It also says what is allowed
    assert re.search(r"choose one of .+|must be .+", str(error.value))


GOOD_VALUES = {
    "normalize_advantage": [False, True, "batch", "episode"],
    "n_steps": [1, np.int64(8)],
    "n_episodes": [None, 1],
    "critic_batch_size": [None, 1, np.int32(4)],
    "gamma": [0, 1, 0.0, 1.0, np.float32(0.5)],
    "gae_lambda": [0, 1],
    "ent_coef": [0, -0.125, 1],
    "vf_coef": [0, 2],
    "max_grad_norm": [None, inf, 1],
    "learning_rate": [0, 0.0, 1, lambda _: 0.125],
    "critic_learning_rate": [None, 0, 1, lambda _: 0.125],
}


@pytest.mark.parametrize(
    ("keyword", "value"), [(keyword, value) for keyword, values in GOOD_VALUES.items() for value in values], ids=name_of
)
def test_a_value_at_the_edge_is_taken_and_trains(keyword, value):
    assert small_model(**{keyword: value}).learn(8)._n_updates >= 1


@pytest.mark.parametrize("estimator", ["total_return", "reward_to_go", "td_residual", "gae"])
@pytest.mark.parametrize("baseline", [None, "mean", "time", "leave_one_out", "value"])
@pytest.mark.parametrize("partial_episodes", [None, "bootstrap", "finish", "truncate"])
def test_combinations_are_taken_or_refused_as_documented(estimator, baseline, partial_episodes):
    by_definition = estimator in ("td_residual", "gae")
    value = by_definition or baseline == "value"
    whole = estimator == "total_return" or baseline in ("time", "leave_one_out")
    allowed = not (by_definition and baseline not in (None, "value"))
    allowed &= not (whole and partial_episodes in ("bootstrap", "truncate"))
    allowed &= not (partial_episodes == "bootstrap" and not value)
    keywords = dict(estimator=estimator, baseline=baseline, partial_episodes=partial_episodes)
    if allowed:
        assert small_model(n_envs=2, **keywords).learn(16)._n_updates >= 1
    else:
        with pytest.raises(ValueError, match=r"(baseline|partial_episodes)='\w+'") as error:
            small_model(n_envs=2, **keywords)
        assert repr(estimator) in str(error.value)
        assert "allowed: None" in str(error.value)


class MyBuffer(RolloutBuffer):
    pass


# Keywords that cannot go together, and what the message must name
BAD_COMBINATIONS = [
    ({"estimator": "gae", "baseline": "mean"}, ["baseline='mean'", "estimator='gae'"]),
    ({"estimator": "td_residual", "baseline": "leave_one_out"}, ["baseline='leave_one_out'", "estimator='td_residual'"]),
    (
        {"estimator": "total_return", "normalize_advantage": "episode"},
        ["normalize_advantage='episode'", "estimator='total_return'", "baseline=None"],
    ),
    (
        {"estimator": "total_return", "normalize_advantage": "episode", "baseline": "mean"},
        ["normalize_advantage='episode'", "estimator='total_return'", "baseline='mean'"],
    ),
    ({"n_episodes": 2, "partial_episodes": "finish"}, ["partial_episodes='finish'", "n_episodes=2"]),
    ({"n_episodes": 2, "partial_episodes": "bootstrap"}, ["partial_episodes='bootstrap'", "n_episodes=2"]),
    (
        {"estimator": "total_return", "partial_episodes": "truncate"},
        ["partial_episodes='truncate'", "estimator='total_return'"],
    ),
    (
        {"estimator": "reward_to_go", "partial_episodes": "bootstrap"},
        ["partial_episodes='bootstrap'", "estimator='reward_to_go'", "baseline=None"],
    ),
    (
        {"estimator": "reward_to_go", "baseline": "time", "partial_episodes": "truncate"},
        ["partial_episodes='truncate'", "baseline='time'"],
    ),
    (
        {"estimator": "reward_to_go", "baseline": "leave_one_out", "n_episodes": 1},
        ["baseline='leave_one_out'", "n_episodes=1"],
    ),
    ({"estimator": "reward_to_go", "baseline": "time", "n_episodes": 1}, ["baseline='time'", "n_episodes=1"]),
    (
        {"estimator": "total_return", "n_episodes": 1},
        ["estimator='total_return'", "n_episodes=1", "normalize_advantage=True", "baseline=None"],
    ),
    (
        {"estimator": "total_return", "n_episodes": 1, "baseline": "mean", "normalize_advantage": False},
        ["estimator='total_return'", "n_episodes=1", "baseline='mean'"],
    ),
    *(
        ({"rollout_buffer_class": MyBuffer, **keywords}, ["rollout_buffer_class=MyBuffer", message])
        for keywords, message in [
            ({"estimator": "reward_to_go"}, "estimator='reward_to_go'"),
            ({"estimator": "td_residual"}, "estimator='td_residual'"),
            ({"normalize_advantage": "episode"}, "normalize_advantage='episode'"),
            ({"n_episodes": 2}, "n_episodes=2"),
            ({"partial_episodes": "finish"}, "partial_episodes='finish'"),
            ({"partial_episodes": "truncate"}, "partial_episodes='truncate'"),
            ({"discount_state_distribution": True}, "discount_state_distribution=True"),
            ({"loss_reduction": "trajectory"}, "loss_reduction='trajectory'"),
        ]
    ),
]


@pytest.mark.parametrize(("keywords", "named"), BAD_COMBINATIONS)
def test_a_combination_that_cannot_work_is_refused_by_name(keywords, named):
    with pytest.raises(ValueError, match=r"allowed|choose one of") as error:
        small_model(**keywords)
    for name in named:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("keywords", "n_envs"),
    [
        ({"estimator": "reward_to_go", "baseline": "leave_one_out", "n_episodes": 1}, 2),
        ({"estimator": "reward_to_go", "baseline": "leave_one_out", "n_episodes": 2}, 1),
        ({"estimator": "reward_to_go", "baseline": "mean", "n_episodes": 1}, 1),
        ({"estimator": "total_return", "n_episodes": 1, "normalize_advantage": False}, 1),
        ({"estimator": "total_return", "n_episodes": 1, "baseline": "value"}, 1),
        ({"estimator": "total_return", "n_episodes": 2}, 1),
        ({"rollout_buffer_class": MyBuffer, "baseline": "value", "partial_episodes": "bootstrap"}, 1),
    ],
)
def test_a_combination_next_to_one_that_is_refused_trains(keywords, n_envs):
    # Episodes of the same length, with rewards that depend on chance
    model = small_model(make_vec_env(lambda: SpacesEnv(BOX, ACTION_SPACES["Discrete"]), n_envs=n_envs, seed=0), **keywords)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(24)
    assert not th.equal(before["action_net.weight"], model.policy.state_dict()["action_net.weight"])


def test_one_episode_per_update_is_refused_also_when_environments_become_fewer():
    file = io.BytesIO()
    small_model(n_envs=2, estimator="reward_to_go", baseline="leave_one_out", n_episodes=1).save(file)
    file.seek(0)
    with pytest.raises(ValueError, match="baseline='leave_one_out'"):
        VPG.load(file, env=CountingEnv())


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"estimator": "foo"}, "estimator='foo'"),
        ({"gamma": 2.0}, "gamma=2.0"),
        ({"partial_episodes": "truncate", "baseline": "time"}, "baseline='time'"),
        ({"n_critic_updates": True}, "n_critic_updates=True"),
    ],
)
def test_a_bad_value_is_refused_on_loading_too(keywords, named, tmp_path):
    small_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(named)):
        VPG.load(tmp_path / "model", **keywords)
    with pytest.raises(ValueError, match=re.escape(named)):
        VPG.load(tmp_path / "model", env=CountingEnv(), **keywords)


def test_an_unknown_policy_action_space_or_keyword_is_refused_as_by_sb3():
    with pytest.raises(ValueError, match="Policy FooPolicy unknown"):
        VPG("FooPolicy", CountingEnv())
    with pytest.raises(AssertionError, match="action spaces"):
        small_model(CountingEnv(action_space=spaces.Text(3)))
    with pytest.raises(TypeError, match="foo"):
        small_model(foo=1)
    with pytest.raises(ValueError, match="State-Dependent Exploration"):
        small_model(use_sde=True)


# ---------------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ---------------------------------------------------------------------------------------------------------------


class AtRolloutStart(BaseCallback):
    """Keeps a copy of weights and optimizer as they were at the start of the last rollout."""

    def _on_rollout_start(self):
        self.state = state_of(self.model)
        self.n_updates = self.model._n_updates

    def _on_step(self):
        return True


def state_of(model):
    return copy.deepcopy((model.policy.state_dict(), model.policy.optimizer.state_dict()))


def assert_equal(first, second):
    """Bit for bit, whatever is nested in what."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second):
            assert_equal(a, b)
    elif isinstance(first, th.Tensor):
        assert th.equal(first, second)
    else:
        assert first == second


def assert_stops_unharmed(model, match, total_timesteps=1000):
    """learn() raises, weights and optimizer are as after the update before, the model can be saved and goes on training."""
    before = AtRolloutStart()
    before.state, before.n_updates = state_of(model), 0
    with pytest.raises(ValueError, match=match):
        model.learn(total_timesteps, callback=before)
    assert_equal(state_of(model), before.state)
    assert model._n_updates == before.n_updates
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    assert_equal(state_of(VPG.load(file)), before.state)


def goes_on(model):
    n_updates = model._n_updates
    model.learn(40, reset_num_timesteps=False)
    assert model._n_updates > n_updates
    assert all(p.isfinite().all() for p in model.policy.parameters())
    # What was collected then was collected from a reset on
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.rewards[buffer.mask], buffer.observations[buffer.mask][:, 1] + 1)


def faulty(*args, **kwargs):
    """Two environments, the second of which goes wrong once."""
    kwargs = {"lengths": (3, 5), **kwargs}
    return DummyVecEnv([lambda: Monitor(CountingEnv(**kwargs)), lambda: Monitor(FaultyEnv(*args, **kwargs))])


ALL_MODES = {
    "bootstrap": {"estimator": "gae"},
    "truncate": {"estimator": "reward_to_go", "partial_episodes": "truncate"},
    "finish": {"estimator": "reward_to_go"},
    "n_episodes": {"estimator": "total_return", "n_episodes": 2},
}
in_all_modes = pytest.mark.parametrize("mode", ALL_MODES.values(), ids=ALL_MODES.keys())


@in_all_modes
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_a_non_finite_reward_stops_training_before_the_update(value, mode):
    # Episodes of 3, 5, 3, 5 steps and rollouts of 8: the fourth reward of the fourth episode is in the second rollout, which
    # begins with the third episode, or after another reset, if it is made of whole ones, with the fourth
    model = small_model(faulty("reward", 3, 4, value), **mode)
    step = 3 if model.plan.partial_episodes.whole_episodes else 6
    assert_stops_unharmed(model, rf"[Nn]on-finite reward in environment 1 at step {step} of the rollout .*: {value}\.")
    assert model._n_updates == 1
    goes_on(model)


@in_all_modes
@pytest.mark.parametrize(
    ("episode", "t", "n_updates"),
    [(0, 0, 0), (0, 2, 0), (1, 0, 0), (3, 4, 1), (4, 0, 1)],
    ids=["first reset", "first rollout", "reset in a rollout", "second rollout", "last of a rollout"],
)
def test_a_non_finite_observation_stops_training_before_the_update(episode, t, n_updates, mode):
    model = small_model(faulty("observation", episode, t), **mode)
    assert_stops_unharmed(model, rf"[Nn]on-finite observation in environment 1 at step {t} of its episode .*nan")
    assert model._n_updates == n_updates
    goes_on(model)


@pytest.mark.parametrize("buffer_class", [None, RolloutBuffer])
def test_a_non_finite_observation_at_a_time_limit_stops_training_where_its_value_is_needed(buffer_class):
    env = faulty("observation", 3, 5, inf, time_limit=True)
    model = small_model(env, rollout_buffer_class=buffer_class)
    assert_stops_unharmed(model, r"[Nn]on-finite terminal observation in environment 1 at step 4 of its episode .*inf")
    assert model._n_updates == 1
    model.learn(32, reset_num_timesteps=False)
    assert model._n_updates == 3


def test_a_non_finite_entry_of_a_dict_observation_is_found():
    class DictEnv(FaultyEnv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.observation_space = spaces.Dict({"index": spaces.Discrete(3), "numbers": self.observation_space})

        def observation(self):
            return {"index": 1, "numbers": super().observation()}

    env = DummyVecEnv([lambda: DictEnv("observation", 1, 2)])
    model = VPG("MultiInputPolicy", env, n_steps=8, policy_kwargs=SMALL)
    assert_stops_unharmed(model, r"[Nn]on-finite observation in environment 0 at step 2 of its episode")


class BadValues(ActorCriticPolicy):
    """A forward() of one's own, with a value that is not a number at t = 2."""

    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        values[obs[:, 1] == 2] = nan
        return actions, values, log_prob


@pytest.mark.parametrize("buffer_class", [None, RolloutBuffer])
def test_a_non_finite_value_of_a_policy_of_ones_own_stops_training_before_the_update(buffer_class):
    env = make_vec_env(CountingEnv, n_envs=2)
    model = VPG(BadValues, env, n_steps=8, policy_kwargs=SMALL, rollout_buffer_class=buffer_class)
    assert_stops_unharmed(model, r"[Nn]on-finite value in environment 0 at step 2 of the rollout .*nan")


class Reciprocal(nn.Module):
    """A critic that divides by zero at t = 6."""

    def __init__(self, features_dim):
        super().__init__()
        self.latent_dim_pi = self.latent_dim_vf = features_dim

    def forward_actor(self, features):
        return features

    def forward_critic(self, features):
        return 1 / (features - 6)

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)


class ReciprocalPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = Reciprocal(self.features_dim)


def test_a_non_finite_value_stops_training_before_the_update():
    model = VPG(ReciprocalPolicy, make_vec_env(CountingEnv, env_kwargs={"lengths": (4, 8)}), n_steps=8)
    # The second episode begins at step 4: its observation with t = 6 is that of step 10, number 2 of the second rollout
    assert_stops_unharmed(model, r"[Nn]on-finite value in environment 0 at step 2 of the rollout .*inf")
    assert model._n_updates == 1


def test_a_non_finite_action_stops_training_before_it_is_taken():
    env = CountingEnv(action_space=ACTION_SPACES["Box"])
    model = small_model(env).learn(8)
    with th.no_grad():
        model.policy.log_std[0] = nan
    n_actions = len(env.actions)
    with pytest.raises(ValueError, match=r"[Nn]on-finite action in environment 0 at step \d of its episode"):
        model.learn(8, reset_num_timesteps=False)
    assert len(env.actions) == n_actions


class Constant(CountingEnv):
    """The same reward at each step."""

    def __init__(self, reward, **kwargs):
        super().__init__(**kwargs)
        self.reward = reward

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, self.reward, *rest


@pytest.mark.parametrize(
    ("reward", "keywords", "name"),
    [
        # The square of 1e20 is not a number of single precision
        (1e20, {"estimator": "gae"}, "value loss"),
        (1e20, {"estimator": "gae", "vf_coef": 0.0}, "value loss"),
        # A sum of twelve numbers like this one is not, either
        (2e38, {"estimator": "reward_to_go", "gamma": 0.0, "normalize_advantage": False}, "policy loss"),
        # The loss is, but not the sum of the squares of its gradient
        (1e30, {"estimator": "reward_to_go", "gamma": 0.0, "normalize_advantage": False}, "policy gradient"),
        (1e18, {"estimator": "gae", "vf_coef": 1e15}, "value gradient"),
    ],
)
def test_a_loss_or_gradient_that_overflows_stops_training_and_changes_nothing(reward, keywords, name):
    env = make_vec_env(Constant, n_envs=2, env_kwargs={"reward": 1.0, "lengths": (4,)})
    model = small_model(env, **{"max_grad_norm": 0.5, **keywords}).learn(16)
    assert model._n_updates == 1
    for e in env.envs:
        e.unwrapped.reward = reward
    assert_stops_unharmed(model, rf"[Nn]on-finite {name} \((inf|-inf|nan)\) in update 2 .*not taken")
    for e in env.envs:
        e.unwrapped.reward = 1.0
    model.learn(16, reset_num_timesteps=False)
    assert model._n_updates == 2
    assert all(p.isfinite().all() for p in model.policy.parameters())


@pytest.mark.parametrize("critic_batch_size", [None, 4])
def test_a_critic_that_diverges_in_its_further_passes_is_an_error_that_says_what_has_changed(critic_batch_size):
    model = small_model(
        n_critic_updates=10,
        critic_batch_size=critic_batch_size,
        critic_learning_rate=1e6,
        max_grad_norm=None,
        policy_kwargs={**SMALL, "optimizer_class": th.optim.SGD},
    )
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    message = r"value gradient \((inf|nan)\) in update 1 .*step was not taken, but the policy's step .*earlier checkpoint"
    with pytest.raises(ValueError, match=message):
        model.learn(8)
    assert model._n_updates == 1
    moved = {name for name, p in model.policy.named_parameters() if not th.equal(p, before[name])}
    assert {"action_net.weight", "value_net.weight"} <= moved
    assert all(p.isfinite().all() for p in model.policy.parameters())


# ---------------------------------------------------------------------------------------------------------------
# Episodes that do not end
# ---------------------------------------------------------------------------------------------------------------

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
    model = small_model(env, **keywords)
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
    assert small_model(CountingEnv((50,)), **keywords).learn(50)._n_updates == 1


def test_an_environment_that_only_waits_may_take_its_time(monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 50)
    # The second one has its two episodes after 2 steps; the next one that it begins is nobody's business
    env = DummyVecEnv([lambda: CountingEnv((40,)), lambda: CountingEnv((1, 1, inf))])
    model = small_model(env, estimator="reward_to_go", n_episodes=2).learn(1)
    assert model._n_updates == 1
    assert model.num_timesteps == 2 * 80


def test_an_environment_that_only_waits_does_not_hide_one_whose_episode_does_not_end(monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 50)
    # The second one waits in an episode that began before the endless one of the first
    env = DummyVecEnv([lambda: CountingEnv((3, inf)), lambda: CountingEnv((1, 1, inf))])
    model = small_model(env, estimator="reward_to_go", n_episodes=2)
    with pytest.raises(RuntimeError, match="environment 0 has not ended after 50 steps"):
        model.learn(1, callback=lambda *_: model.num_timesteps < 200)


def test_training_goes_on_after_an_endless_episode(monkeypatch):
    monkeypatch.setattr(VPG, "max_episode_steps", 50)
    model = small_model(CountingEnv((inf, 3)), estimator="reward_to_go")
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
    model = small_model(CountingEnv((inf,)), partial_episodes=partial_episodes).learn(80)
    assert model._n_updates == 10


# ---------------------------------------------------------------------------------------------------------------
# VecNormalize sees what is not finite before VPG can refuse it
# ---------------------------------------------------------------------------------------------------------------


# SB3's running variance of something infinite
@pytest.mark.filterwarnings("ignore:invalid value encountered in (scalar )?subtract:RuntimeWarning")
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("quantity", ["reward", "observation"])
@in_all_modes
def test_the_statistics_of_vec_normalize_stay_finite(mode, quantity, value):
    env = VecNormalize(faulty(quantity, 3, 4, value))
    model = small_model(env, **mode)
    assert_stops_unharmed(model, r"[Nn]on-finite")
    statistics = (env.obs_rms.mean, env.obs_rms.var, env.ret_rms.mean, env.ret_rms.var)
    assert all(np.isfinite(statistic).all() for statistic in statistics)
    model.learn(64, reset_num_timesteps=False)
    assert np.isfinite(model.rollout_buffer.observations).all()

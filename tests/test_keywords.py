"""Bad keywords, alone or together, raise an error that names them, at construction and on loading."""

import copy
import re
from math import inf, nan

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import ACTION_SPACES, BOX, CountingEnv, SpacesEnv
from helpers.models import assert_same_weights, counting_model
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG
from sb3_vpg.keywords import PARTIAL_EPISODES


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
    "scale_value_targets": [1, 0, None, "True", 2.5],
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
        counting_model(**{keyword: value})
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
    assert counting_model(**{keyword: value}).learn(8)._n_updates >= 1


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
        model = counting_model(n_envs=2, **keywords).learn(16)
        assert model._n_updates >= 1
        by_default = "bootstrap" if value and not whole else "finish"
        assert model.plan.partial_episodes == PARTIAL_EPISODES[partial_episodes or by_default]
    else:
        with pytest.raises(ValueError, match=r"(baseline|partial_episodes)='\w+'") as error:
            counting_model(n_envs=2, **keywords)
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
        counting_model(**keywords)
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
    model = counting_model(make_vec_env(lambda: SpacesEnv(BOX, ACTION_SPACES["Discrete"]), n_envs=n_envs, seed=0), **keywords)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(24)
    assert not th.equal(before["action_net.weight"], model.policy.state_dict()["action_net.weight"])


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
    counting_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(named)):
        VPG.load(tmp_path / "model", **keywords)
    with pytest.raises(ValueError, match=re.escape(named)):
        VPG.load(tmp_path / "model", env=CountingEnv(), **keywords)


def test_an_unknown_policy_action_space_or_keyword_is_refused_as_by_sb3():
    with pytest.raises(ValueError, match="Policy FooPolicy unknown"):
        VPG("FooPolicy", CountingEnv())
    with pytest.raises(AssertionError, match="action spaces"):
        counting_model(CountingEnv(action_space=spaces.Text(3)))
    with pytest.raises(TypeError, match="foo"):
        counting_model(foo=1)
    with pytest.raises(ValueError, match="State-Dependent Exploration"):
        counting_model(use_sde=True)


def test_vpg_takes_the_arguments_of_a2c_in_the_same_order():
    def names(algorithm):
        return list(algorithm.__init__.__code__.co_varnames[1 : algorithm.__init__.__code__.co_argcount])

    theirs = [name for name in names(A2C) if name not in ("rms_prop_eps", "use_rms_prop")]
    assert names(VPG)[: len(theirs)] == theirs


def test_numbers_and_texts_of_numpy_are_numbers_and_texts():
    values = {"estimator": np.str_("td_residual"), "discount_state_distribution": np.True_, "n_steps": np.int64(4)}
    VPG("MlpPolicy", "CartPole-v1", **values).learn(8)


@pytest.mark.parametrize("keyword", ["learning_rate", "critic_learning_rate", "ent_coef"])
@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64])
def test_a_schedule_may_be_a_number_of_numpy(keyword, number):
    value = number(1 if number is np.int64 else 0.01)
    by_numpy, by_python = (counting_model(**{keyword: v}).learn(16) for v in (value, value.item()))
    assert_same_weights(by_numpy, by_python)


def test_no_normalization_may_be_a_boolean_of_numpy():
    counting_model(estimator="total_return", n_episodes=1, normalize_advantage=np.False_).learn(1)

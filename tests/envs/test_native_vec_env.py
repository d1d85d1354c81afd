"""NativeVecEnv must do what DummyVecEnv does, or say that it cannot."""

import copy
import csv
import json

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from helpers.cartpole import V0, V1, balancing, swinging
from helpers.envs import CountingEnv
from helpers.vec_envs import TellingEnv, assert_same, endings, infos_in, play
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_vpg import VPG
from sb3_vpg.envs.native_vec_env import NativeVecEnv, change_of

CARTPOLE = "CartPole-v1"
POLICIES = {CARTPOLE: balancing, V0: swinging, V1: swinging}
CLASSES = (NativeVecEnv, DummyVecEnv)
each_id = pytest.mark.parametrize("env_id", POLICIES)
both_classes = pytest.mark.parametrize("vec_env_cls", CLASSES)


def make_both(env_id, n_envs=4, max_episode_steps=None, **kwargs):
    """A NativeVecEnv and a DummyVecEnv, with the same seed."""
    if max_episode_steps is not None:
        kwargs["env_kwargs"] = {"max_episode_steps": max_episode_steps}
    envs = [make_vec_env(env_id, n_envs, **{"seed": 0, **kwargs}, vec_env_cls=cls) for cls in CLASSES]
    assert tuple(map(type, envs)) == CLASSES
    return envs


def make_native(*args, **kwargs):
    return make_both(*args, **kwargs)[0]


def full_force(observations):
    """Drives swing-ups off the track."""
    return np.ones((len(observations), 1), dtype=np.float32)


def assert_same_monitor_files(folders, env_id):
    """The same files in the folders, but for the times."""
    contents = []
    for folder in folders:
        rows = {}
        for file in folder.iterdir():
            header, *lines = file.read_text().splitlines()
            assert json.loads(header.removeprefix("#"))["env_id"] == env_id
            rows[file.name] = [{**row, "t": float(row["t"]) >= 0} for row in csv.DictReader(lines)]
        assert len(load_results(str(folder))) == sum(map(len, rows.values())) > 0
        contents.append(rows)
    assert contents[0] == contents[1]


class ScoringEnv(TellingEnv):
    """One more info, whose name begins like those that tell of ends."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "final_score": self.t / 2}


def same_step_form(env_class):
    def make_many(num_envs, max_episode_steps, autoreset_mode):
        return SyncVectorEnv([lambda: TimeLimit(env_class(), max_episode_steps)] * num_envs, autoreset_mode=autoreset_mode)

    return make_many


def in_place_form(num_envs, max_episode_steps, autoreset_mode):
    """Gives the same arrays at each step, as gymnasium's ``SyncVectorEnv(copy=False)`` does."""

    class FinalObsInPlace(SyncVectorEnv):
        final_obs = np.zeros((num_envs, 2), np.float32)

        def step(self, actions):
            *rest, infos = super().step(actions)
            for i in np.flatnonzero(infos.get("_final_obs", ())):
                self.final_obs[i] = infos["final_obs"][i]
                infos["final_obs"][i] = self.final_obs[i]
            return *rest, infos

    envs = [lambda: TimeLimit(TellingEnv(), max_episode_steps)] * num_envs
    return FinalObsInPlace(envs, copy=False, autoreset_mode=autoreset_mode)


def next_step_form(num_envs, max_episode_steps):
    return same_step_form(TellingEnv)(num_envs, max_episode_steps, AutoresetMode.NEXT_STEP)


@pytest.fixture
def others():
    """Registers environments of another package, with their vectorised forms."""
    forms = {
        "Telling-v0": (TellingEnv, same_step_form(TellingEnv)),
        "Scoring-v0": (ScoringEnv, same_step_form(ScoringEnv)),
        "InPlace-v0": (TellingEnv, in_place_form),
        "NextStepOnly-v0": (TellingEnv, next_step_form),
    }
    for env_id, (entry_point, form) in forms.items():
        gym.register(env_id, entry_point, vector_entry_point=form, max_episode_steps=4)
    yield
    for env_id in forms:
        del gym.registry[env_id]


# ---------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------


@each_id
def test_everything_is_as_with_dummy_vec_env(env_id):
    native, dummy = make_both(env_id)
    steps, expected = (play(env, POLICIES[env_id](1), 600) for env in (native, dummy))
    assert_same(steps, expected)
    # Episodes have ended in both ways
    assert (True, 500) in endings(steps)
    assert False in dict(endings(steps))
    assert native.observation_space == dummy.observation_space
    assert native.action_space == dummy.action_space


def test_a_time_limit_in_the_step_that_terminates_is_no_truncation():
    envs = make_both(V0, 2, max_episode_steps=69)
    for env in envs:
        env.set_options({"std": 0})
    steps, expected = (play(env, full_force, 100) for env in envs)
    assert_same(steps, expected)
    assert endings(steps)[:2] == [(False, 69)] * 2


def test_without_a_monitor_infos_do_not_tell_of_the_episode():
    make_envs = [lambda: gym.make(V0, max_episode_steps=10)] * 3
    plays = []
    for cls in CLASSES:
        env = cls(make_envs)
        env.seed(0)
        plays.append(play(env, full_force, 25))
    assert_same(*plays)
    assert plays[0][10][-1][0].keys() == {"terminal_observation", "TimeLimit.truncated"}


def play_others(env_id, folder, keywords):
    """Steps of an environment of another package, native and not, with monitor files in folders."""
    plays = []
    for cls in CLASSES:
        monitor = {"monitor_dir": str(folder / cls.__name__), "monitor_kwargs": {"info_keywords": keywords}}
        env = make_vec_env(env_id, 3, seed=0, vec_env_cls=cls, **monitor)
        assert type(env) is cls
        steps = play(env, lambda _: np.zeros(3, dtype=int), 60)
        plays.append([*steps, ([], env.reset_infos)])
        env.close()
    return plays


def test_infos_of_other_packages_arrive(others, tmp_path):
    keywords = ("is_success", "place")
    steps, expected = play_others("Telling-v0", tmp_path, keywords)
    assert_same(steps, expected)
    assert_same_monitor_files([tmp_path / cls.__name__ for cls in CLASSES], "Telling-v0")
    # There was something to see
    assert dict(endings(steps)).keys() == {True, False}
    infos = infos_in(steps)
    assert all(info["is_success"] == info["episode"]["is_success"] for info in infos if "episode" in info)
    assert {info.get("third") for info in infos} == {None, "time"}
    assert {"length", "title"} == steps[-1][-1][0].keys()


def test_a_vectorised_environment_may_use_its_arrays_again(others, tmp_path):
    # play() sees to it that what was given stays as it was
    assert_same(*play_others("InPlace-v0", tmp_path, ()))


def test_only_what_gymnasium_itself_calls_final_is_taken_out_of_infos(others, tmp_path):
    assert_same(*play_others("Scoring-v0", tmp_path, ("final_score",)))


@each_id
def test_actions_may_be_a_list(env_id):
    actions = [0, 1] if env_id == CARTPOLE else [[0.5], [-0.5]]
    assert_same(*(play(env, lambda _: actions, 3) for env in make_both(env_id, 2)))


def test_a_bad_action_is_refused_with_the_index_of_its_environment():
    env = make_native(V0)
    env.reset()
    with pytest.raises(ValueError, match="action of environment 2 is not finite"):
        env.step(np.array([[0.0], [0.0], [np.nan], [0.0]]))


# ---------------------------------------------------------------------------------------------------------------
# Seeds, options and resets
# ---------------------------------------------------------------------------------------------------------------


@each_id
def test_the_seed_determines_everything(env_id):
    env = make_native(env_id)
    first, second, other = (env.seed(seed) and play(env, POLICIES[env_id](1), 100) for seed in (5, 5, 6))
    assert_same(first, second)
    assert not np.array_equal(first[0][0], other[0][0])
    # A seed is for one reset
    assert not np.array_equal(env.reset(), other[0][0])


@pytest.mark.parametrize(
    ("env_id", "options"),
    [(CARTPOLE, {"low": -0.2, "high": 0.2}), (V0, {"mean": [1.0, 0, 3, 0], "std": [0, 0.1, 0, 0]})],
)
def test_options_are_for_one_reset(env_id, options):
    plays = []
    for env in make_both(env_id, max_episode_steps=30):
        env.set_options(options)
        # Through episodes that begin of themselves, and another reset
        plays.append(play(env, POLICIES[env_id](1), 50) + play(env, POLICIES[env_id](1), 5))
    assert_same(*plays)


def test_options_must_be_the_same_for_all():
    env = make_native(V0, 2)
    env.set_options([{"std": 0}, {"std": 1}])
    with pytest.raises(ValueError, match="same options for all environments"):
        env.reset()
    env.set_options([{"std": 0}, {"std": 0}])
    assert (env.reset()[:, 0] == 0).all()
    env.set_options()
    assert (env.reset()[:, 0] != 0).all()


@each_id
def test_a_reset_in_the_middle_of_episodes_begins_new_ones(env_id):
    plays = [
        [step for n_steps in (7, 0, 15, 12) for step in play(env, POLICIES[env_id](1), n_steps)]
        for env in make_both(env_id, max_episode_steps=12)
    ]
    assert_same(*plays)
    assert max(length for _, length in endings(plays[0])) == 12


# 5 steps: all environments have just begun another episode
@pytest.mark.parametrize("n_steps", [0, 2, 5])
@both_classes
def test_a_monitor_may_forbid_early_resets(vec_env_cls, n_steps):
    kwargs = {"env_kwargs": {"max_episode_steps": 5}, "monitor_kwargs": {"allow_early_resets": False}}
    env = make_vec_env(V0, 2, vec_env_cls=vec_env_cls, **kwargs)
    play(env, full_force, n_steps)
    with pytest.raises(RuntimeError, match="Tried to reset an environment before done"):
        env.reset()


@both_classes
@each_id
def test_nothing_moves_before_the_first_reset(env_id, vec_env_cls):
    env = make_vec_env(env_id, 2, vec_env_cls=vec_env_cls)
    with pytest.raises(RuntimeError, match="Tried to step environment"):
        env.step(POLICIES[env_id](0)(np.zeros((2, *env.observation_space.shape))))


# ---------------------------------------------------------------------------------------------------------------
# Monitor files, normalisation, copies, pictures
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", [CARTPOLE, V0])
def test_monitor_files_are_the_same(env_id, tmp_path):
    folders = [tmp_path / cls.__name__ for cls in CLASSES]
    for cls, folder in zip(CLASSES, folders):
        env = make_vec_env(env_id, 3, seed=0, vec_env_cls=cls, monitor_dir=str(folder))
        play(env, POLICIES[env_id](1), 150)
        env.close()
    assert_same_monitor_files(folders, env_id)


@each_id
def test_normalisation_sees_the_same(env_id):
    envs = [VecNormalize(env, gamma=0.9) for env in make_both(env_id)]
    assert_same(*(play(env, POLICIES[env_id](1), 150) for env in envs))
    for statistics in ("obs_rms", "ret_rms"):
        first, second = (vars(getattr(env, statistics)) for env in envs)
        np.testing.assert_equal(first, second)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda env: cloudpickle.loads(cloudpickle.dumps(env))], ids=["copy", "pickle"]
)
@each_id
def test_a_copy_goes_on_as_the_original(env_id, copy_of):
    env = make_native(env_id)
    (*_, (observations, *_)) = play(env, POLICIES[env_id](1), 40)
    twin = copy_of(env)
    assert type(twin) is NativeVecEnv
    plays = [play(one, POLICIES[env_id](2), 100, observations) for one in (env, twin)]
    assert_same(*plays)
    assert endings(plays[0])


@pytest.mark.parametrize("env_id", [CARTPOLE, V0])
def test_pictures_are_tiled(env_id):
    pictures = []
    for env in make_both(env_id, 3):
        env.reset()
        pictures.append(env.render())
        assert (env.render_mode, len(env.get_images())) == ("rgb_array", 3)
        env.close()
    assert pictures[0].shape == pictures[1].shape
    if env_id == V0:
        np.testing.assert_array_equal(*pictures)


# ---------------------------------------------------------------------------------------------------------------
# Attributes and methods of single environments
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["render_mode", "reward_in_unit_interval", "action_space", "observation_space"])
@pytest.mark.parametrize("indices", [None, 2, [0, 3]])
def test_an_attribute_that_all_share_is_read_as_from_single_environments(name, indices):
    native, dummy = make_both(V1)
    assert native.has_attr(name)
    assert native.get_attr(name, indices) == dummy.get_attr(name, indices)


def test_the_spec_is_that_of_the_environments():
    native, dummy = make_both(V1)
    assert {spec.id for env in (native, dummy) for spec in env.get_attr("spec")} == {V1}
    assert native.metadata["render_fps"] == dummy.metadata["render_fps"]


def test_an_attribute_of_single_environments_is_refused():
    env = make_native(V0)
    env.reset()
    assert not env.has_attr("state")
    with pytest.raises(AttributeError, match=r"'state' is one array for all environments: read `vector_env\.state`"):
        env.get_attr("state")
    with pytest.raises(AttributeError, match="'np_random_seed' is one seed for all environments"):
        env.get_attr("np_random_seed")
    assert not env.has_attr("colour")
    with pytest.raises(AttributeError, match="colour"):
        env.get_attr("colour")


def test_an_attribute_is_set_for_all_or_not_at_all():
    env = make_native(V0, 2)
    env.set_attr("reward_in_unit_interval", True)
    env.set_attr("reward_in_unit_interval", True, indices=[1, 0])
    assert env.get_attr("reward_in_unit_interval") == [True, True]
    env.reset()
    assert (env.step(np.zeros((2, 1)))[1] >= 0).all()
    with pytest.raises(NotImplementedError, match="'reward_in_unit_interval' for all environments only"):
        env.set_attr("reward_in_unit_interval", False, indices=0)
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        env.set_attr("colour", "red")
    assert not env.has_attr("colour")


def test_a_method_of_the_vectorised_environment_is_called_for_all_or_not_at_all():
    for env in make_both(V0):
        assert env.env_method("set_start_std", 0.0) == [None] * env.num_envs
        observations = env.reset()
        np.testing.assert_array_equal(observations, np.tile(observations[:1], (env.num_envs, 1)))
    with pytest.raises(NotImplementedError, match="call 'set_start_std' for all environments only"):
        make_native(V0).env_method("set_start_std", 0.0, indices=0)


@pytest.mark.parametrize("name", ["get_episode_rewards", "reset", "num_envs"])
def test_methods_of_single_environments_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"no single environments to call '{name}' on"):
        make_native(V0).env_method(name)


@pytest.mark.parametrize("indices", [None, 1, [0, 2]])
def test_wrappers_are_those_of_the_environments(indices):
    native, dummy = make_both(V0)
    for wrapper in (Monitor, TimeLimit, RecordEpisodeStatistics):
        assert native.env_is_wrapped(wrapper, indices) == dummy.env_is_wrapped(wrapper, indices)


# ---------------------------------------------------------------------------------------------------------------
# Where there is no vectorised form
# ---------------------------------------------------------------------------------------------------------------


class OwnMonitor(Monitor):
    """May do anything."""


def differing(**by_env):
    """Functions that make environments with different arguments."""
    ((keyword, values),) = by_env.items()
    return [lambda value=value: gym.make(V0, **{keyword: value}) for value in values]


class OtherCartPole(CartPoleEnv):
    """May do anything."""


def changed_start():
    env = gym.make(V0)
    env.unwrapped.set_start_std(0.0)
    return env


def changed_physics():
    env = gym.make("CartPole-v1")
    env.unwrapped.gravity = 1.0
    return env


def changed_class():
    env = OtherCartPole()
    env.spec = gym.spec("CartPole-v1")
    return TimeLimit(env, 500)


@pytest.mark.parametrize(
    ("make_env", "reason"),
    [
        (lambda cls: make_vec_env("Pendulum-v1", 2, vec_env_cls=cls), r"PendulumEnv.* has no vectorized form"),
        (lambda cls: cls([CountingEnv, CountingEnv]), r"CountingEnv.* has no vectorized form"),
        (
            lambda cls: make_vec_env(V0, 2, vec_env_cls=cls, wrapper_class=RecordEpisodeStatistics),
            "the wrapper RecordEpisodeStatistics has no vectorized form",
        ),
        (
            lambda cls: make_vec_env(V0, 2, vec_env_cls=cls, wrapper_class=OwnMonitor),
            "the wrapper OwnMonitor has no vectorized form",
        ),
        (
            lambda cls: cls([changed_start] * 2),
            r"changed after gym.make\(\): _start_std=array\(\[0., 0., 0., 0.\]\) instead of",
        ),
        (lambda cls: cls([changed_physics] * 2), "gravity=1.0 instead of 9.8"),
        (lambda cls: cls([changed_class] * 2), "OtherCartPole instead of CartPoleEnv"),
        (lambda cls: cls(differing(reward_in_unit_interval=(True, False))), "the environments differ"),
        (lambda cls: cls([lambda: gym.make("Telling-v0"), lambda: gym.make("NextStepOnly-v0")]), "the environments differ"),
        (lambda cls: cls(differing(max_episode_steps=(5, 6))), "must have the same time limit"),
        (lambda cls: cls(differing(max_episode_steps=(5, -1))), "must have the same time limit"),
        (lambda cls: cls(differing(max_episode_steps=(-1, -1))), "must have the same time limit"),
        (
            lambda cls: make_vec_env(V0, 2, vec_env_cls=cls, monitor_kwargs={"reset_keywords": ("options",)}),
            r"Monitor\(reset_keywords=\.\.\.\) has no vectorized form",
        ),
        (
            lambda cls: make_vec_env(V0, 2, vec_env_cls=cls, env_kwargs={"render_mode": "human"}),
            "render_mode='human' needs single environments",
        ),
        (
            lambda cls: make_vec_env("NextStepOnly-v0", 2, vec_env_cls=cls),
            "SyncVectorEnv does not support same-step autoreset",
        ),
        # The vectorised form takes no lengths
        (lambda cls: make_vec_env("Telling-v0", 2, vec_env_cls=cls, env_kwargs={"lengths": (2,)}), "lengths"),
    ],
)
def test_without_a_vectorised_form_it_is_a_dummy_vec_env(others, make_env, reason):
    with pytest.warns(UserWarning, match=f"NativeVecEnv falls back to DummyVecEnv: .*{reason}") as caught:
        env = make_env(NativeVecEnv)
    assert len([warning for warning in caught if warning.category is UserWarning]) == 1
    assert type(env) is DummyVecEnv
    expected = make_env(DummyVecEnv)
    for one in (env, expected):
        assert one.num_envs == 2
        assert [type(single.unwrapped) for single in one.envs] == [type(single.unwrapped) for single in expected.envs]


def test_no_environments_are_refused():
    with pytest.raises(ValueError, match="There are no environments"):
        NativeVecEnv([])


class ColoredEnv(CountingEnv):
    """Draws a color when it is made, and at each reset."""

    def __init__(self):
        super().__init__()
        self.color = next(self.draws)

    def reset(self, **kwargs):
        self.color = next(self.draws)
        return super().reset(**kwargs)


def test_an_attribute_that_a_reset_may_change_is_no_change(monkeypatch):
    # The first is drawn by the given environment, the others by a new one, at first the same color again
    draws = ["red", "blue", "blue", "blue", "red"]
    monkeypatch.setattr(ColoredEnv, "draws", iter(draws), raising=False)
    assert change_of([gym.make(EnvSpec("Colored-v0", entry_point=ColoredEnv))]) is None


def test_a_window_is_refused_before_it_opens(monkeypatch):
    env = gym.make(V0, render_mode="human")
    # That of the comparison with a new environment
    monkeypatch.setattr(gym, "make", None)
    with pytest.warns(UserWarning, match="render_mode='human' needs single environments"):
        NativeVecEnv([lambda: env])


def test_the_dummy_vec_env_works():
    with pytest.warns(UserWarning, match="falls back"):
        env = make_vec_env("Pendulum-v1", 2, seed=0, vec_env_cls=NativeVecEnv)
    expected = make_vec_env("Pendulum-v1", 2, seed=0)
    assert_same(*(play(one, full_force, 210) for one in (env, expected)))


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def trained_on(env):
    return VPG("MlpPolicy", env, n_steps=16, n_critic_updates=1, seed=0, policy_kwargs={"net_arch": [16]}).learn(320)


@pytest.mark.parametrize("env_id", [CARTPOLE, V0])
def test_training_is_the_same(env_id):
    models = [trained_on(env) for env in make_both(env_id, max_episode_steps=30)]
    for first, second in zip(*(model.policy.parameters() for model in models)):
        assert th.equal(first, second)
    rewards = [[(episode["r"], episode["l"]) for episode in model.ep_info_buffer] for model in models]
    assert rewards[0] == rewards[1] != []


def test_a_model_is_evaluated_saved_loaded_and_trained_on(tmp_path):
    env, dummy = make_both(V0, max_episode_steps=30)
    model = trained_on(env)
    # A warning would be an error: the environments have a Monitor
    env.seed(1)
    dummy.seed(1)
    results = [evaluate_policy(model, one, n_eval_episodes=6, return_episode_rewards=True) for one in (env, dummy)]
    assert results[0] == results[1]
    assert results[0][1] == [30] * 6

    model.save(tmp_path / "model")
    loaded = VPG.load(tmp_path / "model", env=make_native(V0))
    assert type(loaded.get_env()) is NativeVecEnv
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 320 + 64
    # From one to the other
    for other in (dummy, env):
        loaded.set_env(other)
        loaded.learn(64)
        assert loaded.num_timesteps == 64

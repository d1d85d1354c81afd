"""A run that goes on from a file gives the weights of one that was never stopped, whatever the generators."""

import json
import random

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from helpers.envs import BOX, CountingEnv, SpacesEnv
from helpers.models import cartpole_model, counting_model, flat_weights
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_vpg import VPG
from sb3_vpg.common.random_states import get_random_states, set_random_states
from sb3_vpg.envs.cartpole import SameStepCartPoleVectorEnv
from sb3_vpg.envs.native_vec_env import NativeVecEnv


def short_pendulum():
    return gym.make("Pendulum-v1", max_episode_steps=30)


def seeded(vector_env, seed):
    env = NativeVecEnv(vector_env)
    env.seed(seed)
    return env


ENVIRONMENTS = {
    "one": lambda seed: make_vec_env("CartPole-v1", 1, seed=seed),
    "dummy": lambda seed: make_vec_env("CartPole-v1", 3, seed=seed),
    "same length": lambda seed: make_vec_env(short_pendulum, 2, seed=seed),
    "native": lambda seed: make_vec_env("CartPole-v1", 3, seed=seed, vec_env_cls=NativeVecEnv),
    "native, wrapped": lambda seed: seeded(RecordEpisodeStatistics(SameStepCartPoleVectorEnv(3)), seed),
    "native, separate": lambda seed: seeded(SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 3), seed),
    "native, in processes": lambda seed: seeded(AsyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2), seed),
    "subprocess": lambda seed: make_vec_env("CartPole-v1", 2, seed=seed, vec_env_cls=SubprocVecEnv),
}


class Until(BaseCallback):
    """
    :param until: number of updates to stop at
    :param save_at: number of updates to save the model and VecNormalize's statistics at
    """

    def __init__(self, until, save_at=None, folder=None):
        super().__init__()
        self.until, self.save_at, self.folder = until, save_at, folder

    def _on_rollout_start(self):
        if self.model._n_updates == self.save_at:
            self.model.save(self.folder / "between")
            if self.model.get_vec_normalize_env() is not None:
                self.model.get_vec_normalize_env().save(self.folder / "between.pkl")

    def _on_step(self):
        return self.model._n_updates < self.until


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("keywords", [{"n_episodes": 2}, {"estimator": "reward_to_go", "n_steps": 30}], ids=str)
def test_a_run_that_goes_on_from_a_file_gives_the_same_weights(name, keywords, tmp_path):
    """Between two updates, in another process as it were: new environments, other seeds, other random numbers in between."""

    make_env = ENVIRONMENTS[name]
    env = make_env(0)
    uninterrupted = cartpole_model(env, learning_rate=lambda left: 0.01 * left, **keywords)
    uninterrupted.learn(10**6, callback=Until(4, save_at=2, folder=tmp_path))
    env.close()

    th.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    env = make_env(99)
    resumed = VPG.load(tmp_path / "between", env=env, device="cpu")
    assert resumed._n_updates == 2
    resumed.learn(10**6 - resumed.num_timesteps, callback=Until(4), reset_num_timesteps=False)
    env.close()
    assert resumed.num_timesteps == uninterrupted.num_timesteps
    assert th.equal(flat_weights(resumed), flat_weights(uninterrupted))


@pytest.mark.parametrize("env_given", [False, True], ids=["without environments", "with environments"])
def test_a_loaded_model_that_is_saved_again_resumes_the_same(env_given, saved, tmp_path):
    def environments():
        return make_vec_env("CartPole-v1", 2, seed=3)

    def resumed(model):
        return flat_weights(model.learn(100, reset_num_timesteps=False))

    expected = resumed(VPG.load(saved, env=environments(), device="cpu"))
    model = VPG.load(saved, env=environments() if env_given else None, device="cpu")
    th.rand(5)
    model.save(tmp_path / "again")
    assert th.equal(resumed(VPG.load(tmp_path / "again", env=environments(), device="cpu")), expected)
    if env_given:
        assert th.equal(resumed(model), expected)


def test_a_seed_given_after_loading_counts(saved):
    def trained(seed):
        model = VPG.load(saved, env=make_vec_env("CartPole-v1", 2), device="cpu")
        if seed is not None:
            model.set_random_seed(seed)
        return flat_weights(model.learn(64, reset_num_timesteps=False))

    assert th.equal(trained(None), trained(None))
    assert th.equal(trained(1), trained(1))
    assert not th.equal(trained(1), trained(2))
    assert not th.equal(trained(1), trained(None))


def test_a_seed_given_on_loading_counts(saved):
    def trained(seed):
        model = VPG.load(saved, env=make_vec_env("CartPole-v1", 2), device="cpu", seed=seed)
        return flat_weights(model.learn(64, reset_num_timesteps=False))

    assert th.equal(trained(1), trained(1))
    assert not th.equal(trained(1), trained(2))


def test_training_anew_from_a_file_does_not_repeat_the_random_numbers(saved):
    def trained():
        model = VPG.load(saved, env=make_vec_env("CartPole-v1", 2), seed=None, device="cpu")
        return flat_weights(model.learn(64))

    assert not th.equal(trained(), trained())


def test_environments_of_another_number_keep_their_own_random_numbers():
    two, three = (make_vec_env("CartPole-v1", n, seed=n) for n in (2, 3))
    for env in (two, three):
        env.reset()
    before = [generator.bit_generator.state for generator in three.get_attr("np_random")]
    set_random_states(get_random_states(two), three)
    assert [generator.bit_generator.state for generator in three.get_attr("np_random")] == before


def test_random_states_are_plain_numbers_and_come_back():
    # Python draws two normal numbers at a time, and keeps the second one for the next call
    random.gauss(0, 1)
    env = DummyVecEnv([lambda: SpacesEnv(CountingEnv().observation_space, CountingEnv().action_space)] * 2)
    env.seed(3)
    env.reset()
    states = json.loads(json.dumps(get_random_states(env)))

    def draws():
        drawn = [generator.random() for generator in env.get_attr("np_random")]
        return [random.gauss(0, 1), random.random(), np.random.rand(), th.rand(1).item(), *drawn]  # noqa: NPY002

    first = draws()
    env.seed(4)
    set_random_states(states, env)
    assert draws() == first
    assert env._seeds == [None, None]


def test_vec_normalize_goes_on_too(tmp_path):
    def environment(seed):
        return VecNormalize(make_vec_env(short_pendulum, 2, seed=seed))

    uninterrupted = cartpole_model(environment(0), n_episodes=1)
    uninterrupted.learn(10**6, callback=Until(4, save_at=2, folder=tmp_path))
    env = VecNormalize.load(tmp_path / "between.pkl", make_vec_env(short_pendulum, 2, seed=7))
    resumed = VPG.load(tmp_path / "between", env=env, device="cpu")
    resumed.learn(10**6 - resumed.num_timesteps, callback=Until(4), reset_num_timesteps=False)
    assert th.equal(flat_weights(resumed), flat_weights(uninterrupted))
    np.testing.assert_array_equal(env.obs_rms.mean, uninterrupted.get_vec_normalize_env().obs_rms.mean)


class OwnGenerator(gym.Env):
    """Episodes of three steps, with everything drawn from a generator of the given class."""

    observation_space, action_space = BOX, spaces.Discrete(2)
    bit_generator = np.random.MT19937

    def make_generator(self, seed):
        self.np_random = np.random.Generator(self.bit_generator(seed))

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.make_generator(seed)
        self.t = 0
        return self.draw(), {}

    def step(self, action):
        self.t += 1
        return self.draw(), float(self.draw()[0]), self.t == 3, False, {}

    def draw(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)


class ReadOnlyGenerator(OwnGenerator):
    np_random = property(lambda self: self.rng)

    def make_generator(self, seed):
        self.rng = np.random.default_rng(seed)


class RaisingGenerator(ReadOnlyGenerator):
    @property
    def np_random(self):
        raise RuntimeError("no generator here")

    def draw(self):
        return self.rng.uniform(-1, 1, 3).astype(np.float32)


class LocalGenerator(np.random.Generator):
    def __reduce__(self):
        raise TypeError("this generator cannot be pickled")


class UnpicklableGenerator(ReadOnlyGenerator):
    def make_generator(self, seed):
        self.rng = LocalGenerator(np.random.PCG64(seed))


class LegacyGenerator(ReadOnlyGenerator):
    def make_generator(self, seed):
        self.rng = np.random.RandomState(seed)


def in_processes(makers):
    return SubprocVecEnv(makers, start_method="fork")


def monitored(*classes):
    return [lambda env_class=env_class: Monitor(env_class()) for env_class in classes]


@pytest.mark.parametrize(
    ("vec_env", "env_class", "reason"),
    [
        (DummyVecEnv, RaisingGenerator, "no generator here"),
        (DummyVecEnv, LegacyGenerator, "RandomState"),
        (in_processes, RaisingGenerator, "raises an exception"),
        (in_processes, UnpicklableGenerator, "raises an exception"),
        (in_processes, LegacyGenerator, "RandomState"),
    ],
)
def test_a_generator_that_cannot_be_stored_costs_a_warning_and_no_training(vec_env, env_class, reason, tmp_path):
    env = vec_env(monitored(OwnGenerator, env_class, OwnGenerator))
    model = cartpole_model(env).learn(32)
    with pytest.warns(UserWarning, match=f"np_random of environment 1 is not saved: .*{reason}"):
        model.save(tmp_path / "model")
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps >= 64
    assert [state is None for state in model._random_states["environments"]] == [False, True, False]

    states = VPG.load(tmp_path / "model")._random_states

    def draws():
        env.seed(5)
        set_random_states(states, env)
        assert env._seeds == [None, 6, None]
        return [generator.random() for generator in env.get_attr("np_random", indices=[0, 2])]

    assert draws() == draws()
    env.close()


def test_a_run_does_not_end_where_a_generator_that_was_stored_cannot_be_set(tmp_path):
    env = in_processes(monitored(ReadOnlyGenerator, OwnGenerator))
    model = cartpole_model(env).learn(32)
    model.save(tmp_path / "model")
    resumed = VPG.load(tmp_path / "model", env=env, device="cpu")
    with pytest.warns(UserWarning, match="np_random of environment 0 is not restored: .*setting it raises"):
        resumed.learn(32, reset_num_timesteps=False)
    env.close()


def test_a_generator_that_cannot_be_replaced_takes_its_state(tmp_path):
    """Whether it is read-only or of a class of its own."""
    env = DummyVecEnv(monitored(ReadOnlyGenerator, UnpicklableGenerator))
    model = cartpole_model(env).learn(32)
    model.save(tmp_path / "model")

    def draws():
        return [generator.random() for generator in env.get_attr("np_random")]

    before = draws()
    set_random_states(VPG.load(tmp_path / "model")._random_states, env)
    assert draws() == before
    assert isinstance(env.get_attr("np_random")[1], LocalGenerator)


def test_processes_of_environments_with_and_without_a_wrapper_do_not_end_with_a_save(tmp_path):
    env = SubprocVecEnv([RaisingGenerator, lambda: Monitor(UnpicklableGenerator())])
    model = cartpole_model(env).learn(32)
    with (
        pytest.warns(UserWarning, match="np_random of environment 0 is not saved: .*wrapper, such as Monitor"),
        pytest.warns(UserWarning, match="np_random of environment 1 is not saved: reading or pickling it"),
    ):
        model.save(tmp_path / "model")
    model.learn(32, reset_num_timesteps=False)
    env.close()


def test_environments_that_have_been_closed_do_not_keep_a_model_from_being_saved(tmp_path):
    env = in_processes(monitored(OwnGenerator, OwnGenerator))
    model = cartpole_model(env).learn(32)
    env.close()
    model.save(tmp_path / "model")
    VPG.load(tmp_path / "model", env=DummyVecEnv(monitored(OwnGenerator, OwnGenerator))).learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize(
    "message", [None, ("reset", (None, {})), ("env_method", ("observation", (), {})), ("get_attr", "lengths")]
)
def test_an_interrupted_call_of_processes_does_not_keep_a_model_from_going_on(message, tmp_path, monkeypatch):
    env = SubprocVecEnv([lambda: Monitor(CountingEnv([4, 4]))] * 2)
    model = counting_model(env).learn(16)

    def interrupt(*_):
        for remote in env.remotes if message else ():
            remote.send(message)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(env, "step_async" if message else "step_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.learn(16, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    model.learn(16, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.observations[..., 1], np.tile([[0], [1], [2], [3]], (2, 2)))
    np.testing.assert_array_equal(buffer.rewards, buffer.observations[..., 1] + 1)
    env.close()


@pytest.mark.parametrize("vec_env", [DummyVecEnv, in_processes])
@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_a_run_goes_on_with_any_generator_of_numpys(name, vec_env, tmp_path, monkeypatch):
    monkeypatch.setattr(OwnGenerator, "bit_generator", getattr(np.random, name))

    def environment(seed):
        env = vec_env(monitored(OwnGenerator, OwnGenerator))
        env.seed(seed)
        return env

    env = environment(0)
    uninterrupted = cartpole_model(env, n_episodes=1, seed=None)
    uninterrupted.learn(10**6, callback=Until(4, save_at=2, folder=tmp_path))
    env.close()
    env = environment(7)
    resumed = VPG.load(tmp_path / "between", env=env, device="cpu")
    states = resumed._random_states["environments"]
    assert [state["bit_generator"] for state in states] == [name, name]
    resumed.learn(10**6 - resumed.num_timesteps, callback=Until(4), reset_num_timesteps=False)
    env.close()
    assert th.equal(flat_weights(resumed), flat_weights(uninterrupted))


@pytest.fixture
def global_generator():
    before = np.random.mtrand._rand._bit_generator
    yield
    np.random.set_bit_generator(before)


@pytest.mark.usefixtures("global_generator")
def test_another_global_generator_of_numpys_is_stored_and_restored():
    env = make_vec_env("CartPole-v1", 2)
    np.random.set_bit_generator(np.random.PCG64(3))
    states = json.loads(json.dumps(get_random_states(None)))
    first = np.random.rand()  # noqa: NPY002
    set_random_states(states, env)
    assert np.random.rand() == first  # noqa: NPY002
    np.random.set_bit_generator(np.random.MT19937(3))
    set_random_states(states, env)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_environments_without_generators_are_saved_without_them(error, tmp_path, monkeypatch):
    model = cartpole_model()

    def get_attr(*args, **kwargs):
        raise error

    monkeypatch.setattr(model.env, "get_attr", get_attr)
    model.save(tmp_path / "model")
    VPG.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2)).learn(16, reset_num_timesteps=False)


@pytest.mark.parametrize("error", [EOFError, BrokenPipeError, RuntimeError])
def test_environments_that_cannot_be_asked_do_not_keep_a_model_from_being_saved(error, tmp_path, monkeypatch):
    model = cartpole_model()

    def get_attr(*args, **kwargs):
        raise error

    monkeypatch.setattr(model.env, "get_attr", get_attr)
    with pytest.warns(UserWarning, match=f"environment 0, 1 is not saved: {error.__name__}"):
        model.save(tmp_path / "model")
    VPG.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2)).learn(16, reset_num_timesteps=False)

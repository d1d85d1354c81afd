"""Nothing is lost: files are whole or not there, loading says what is wrong, and a run goes on where it was."""

import copy
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import BOX, CountingEnv, SpacesEnv
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_vpg import VPG
from sb3_vpg.random_states import get_random_states, set_random_states
from sb3_vpg.saving import replacing
from sb3_vpg.vec_env import NativeVecEnv

DATA = Path(__file__).parent / "data"
SMALL = {"net_arch": [8]}


def small_model(env=None, **kwargs):
    env = make_vec_env("CartPole-v1", 2, seed=0) if env is None else env
    return VPG("MlpPolicy", env, **{"seed": 0, "n_steps": 8, "policy_kwargs": SMALL, "device": "cpu", **kwargs})


def weights(model):
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


# ---------------------------------------------------------------------------------------------------------------
# Saving: all or nothing
# ---------------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    model = small_model()
    model.save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()
    model.something = lambda: (yield)  # can be pickled
    model.generator = (x for x in ())  # cannot
    with pytest.raises(TypeError, match="generator"):
        model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert (tmp_path / "model.zip").read_bytes() == before
    VPG.load(tmp_path / "model")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model = small_model()
    model.save(tmp_path / "model.zip")
    before = (tmp_path / "model.zip").read_bytes()
    real_save, calls = th.save, []

    def save_once(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(*args, **kwargs)

    monkeypatch.setattr(th, "save", save_once)
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path / "model.zip")
    assert len(calls) == 2
    assert (tmp_path / "model.zip").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch as th
from sb3_vpg import VPG
model = VPG("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, seed=1)
model.save(sys.argv[1])
print(open(sys.argv[1], "rb").read().hex()[:0], flush=True)
th.save = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
model.num_timesteps = 77
model.save(sys.argv[1])
"""


def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.zip"
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, path], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert VPG.load(path).num_timesteps == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model", "model.zip"),
        ("model.zip", "model.zip"),
        ("best_0.5", "best_0.5"),
        ("new/folder/model", "new/folder/model.zip"),
        ("folder", "folder.zip"),
        ("archive", "archive.zip_2"),
    ],
)
def test_files_have_the_names_that_sb3_gives_them(name, expected, tmp_path):
    for folder in ("folder", "archive.zip"):
        (tmp_path / folder).mkdir()
    small_model().save(str(tmp_path / name))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path(expected)]
    VPG.load(tmp_path / expected)


def test_a_link_stays_a_link_and_a_stream_a_stream(tmp_path):
    model = small_model()
    (tmp_path / "link.zip").symlink_to(tmp_path / "model.zip")
    model.save(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink()
    VPG.load(tmp_path / "model")
    stream = io.BytesIO()
    model.save(stream)
    stream.seek(0)
    assert th.equal(weights(VPG.load(stream)), weights(model))


def test_a_new_file_can_be_read_by_whom_files_can_be_read(tmp_path):
    (tmp_path / "other").touch()
    small_model().save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_replacing_is_for_any_file(tmp_path):
    path = tmp_path / "text"
    with replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:  # noqa: PT012
        file.write(b"two")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    small_model().learn(64).save(path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused(share, saved, tmp_path):
    content = saved.read_bytes()
    (tmp_path / "model.zip").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model\.zip is not a .* cut short"):
        VPG.load(tmp_path / "model.zip")


def test_a_file_that_is_no_zip_file_is_refused_in_sb3s_words_too(tmp_path):
    (tmp_path / "model.zip").write_text("some text")
    messages = []
    for algorithm in (VPG, PPO):
        with pytest.raises(ValueError, match="zip") as error:
            algorithm.load(tmp_path / "model.zip")
        messages.append(str(error.value))
    ours, theirs = messages
    assert ours.startswith(f"{tmp_path / 'model.zip'} is not a whole zip file")
    assert theirs in ours


def test_a_byte_that_has_changed_is_noticed(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        member = archive.getinfo("policy.pth")
        at = member.header_offset + 30 + len(member.filename) + len(member.extra) + member.file_size // 2
    content[at] ^= 0xFF
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.zip is damaged: 'policy\.pth'"):
        VPG.load(tmp_path / "model.zip")


def test_the_model_of_another_algorithm_is_refused_and_its_weights_can_be_had(tmp_path):
    other = PPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=3, policy_kwargs=SMALL)
    other.save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="saved by another algorithm"):
        VPG.load(tmp_path / "ppo")
    model = small_model("CartPole-v1")
    # As the message says
    model.set_parameters(other.get_parameters())
    assert th.equal(weights(model), weights(other))


def test_another_zip_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("data", "{}")
    with pytest.raises(
        ValueError, match=r"not a saved model, or was cut short: it has no 'policy\.optimizer\.pth', 'policy\.pth'"
    ):
        VPG.load(tmp_path / "archive.zip")


def test_no_file_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        VPG.load(tmp_path / "nothing")


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def test_nothing_is_unpickled_before_a_file_is_refused(tmp_path):
    other = PPO("MlpPolicy", "CartPole-v1", n_steps=64, policy_kwargs=SMALL)
    other.evil = Evil()
    other.save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="another algorithm"):
        VPG.load(tmp_path / "ppo")


def test_weights_can_be_had_without_unpickling(saved, tmp_path):
    evil = VPG.load(saved)
    evil.evil = Evil()
    evil.save(tmp_path / "evil")
    model = small_model("CartPole-v1")
    model.set_parameters(tmp_path / "evil", device="cpu")
    assert th.equal(weights(model), weights(evil))


def test_a_file_without_newer_keywords_loads_with_their_defaults(saved, tmp_path):
    newer = {"critic_batch_size", "_random_states", "_resumes", "_moved"}
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(tmp_path / "older.zip", "w") as older:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "data":
                data = json.loads(content)
                assert newer <= set(data)
                content = json.dumps({key: value for key, value in data.items() if key not in newer})
            older.writestr(name, content)
    model = VPG.load(tmp_path / "older", env=make_vec_env("CartPole-v1", 2))
    assert model.critic_batch_size is None
    model.learn(32, reset_num_timesteps=False)


def test_the_model_of_the_first_version_loads_predicts_and_trains():
    # Written by 0.1.0.dev0: VPG("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, seed=0, n_steps=8).learn(64)
    model = VPG.load(DATA / "model_0.1.0.zip", env=make_vec_env("CartPole-v1", 1))
    assert model.num_timesteps == 64
    expected = json.loads((DATA / "model_0.1.0.json").read_text())
    observations = np.array(expected["observations"], np.float32)
    with th.no_grad():
        distribution = model.policy.get_distribution(th.tensor(observations))
    np.testing.assert_allclose(distribution.distribution.probs.numpy(), expected["probabilities"], rtol=1e-5)
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 128


# ---------------------------------------------------------------------------------------------------------------
# Parameters of other models
# ---------------------------------------------------------------------------------------------------------------

OTHERS = {
    "A2C with Adam": lambda **kwargs: A2C("MlpPolicy", "CartPole-v1", n_steps=8, use_rms_prop=False, **kwargs),
    "PPO": lambda **kwargs: PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, n_epochs=2, **kwargs),
}


def take_over(model, other, form, folder, **kwargs):
    """By a dictionary or by a file."""
    if form == "file":
        other.save(folder / "other")
        model.set_parameters(folder / "other", device="cpu", **kwargs)
    else:
        model.set_parameters(other.get_parameters(), **kwargs)


def known(model):
    """What the optimizer knows of each parameter."""
    state = model.policy.optimizer.state
    return {name: state[p] for name, p in model.policy.named_parameters() if p in state}


def assert_knows_the_same(model, other):
    ours, theirs = known(model), known(other)
    assert ours.keys() == theirs.keys()
    for name, entries in theirs.items():
        assert ours[name].keys() == entries.keys()
        for key, value in entries.items():
            assert th.equal(ours[name][key], value), (name, key)


@pytest.mark.parametrize("form", ["dictionary", "file"])
@pytest.mark.parametrize("exact_match", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_weights_and_optimizer_of_another_algorithm_are_taken_over(name, exact_match, form, tmp_path):
    other = OTHERS[name](seed=1, policy_kwargs=dict(SMALL), device="cpu").learn(32)
    model = small_model("CartPole-v1", learning_rate=0.01, critic_learning_rate=0.02)
    roles = [group["role"] for group in model.policy.optimizer.param_groups]
    take_over(model, other, form, tmp_path, exact_match=exact_match)
    assert th.equal(weights(model), weights(other))
    assert len(known(other)) == len(list(other.policy.parameters()))
    assert_knows_the_same(model, other)
    # Groups, learning rates and the choice of a fused step are VPG's own
    groups = model.policy.optimizer.param_groups
    assert [(group["role"], group["lr"], group["fused"]) for group in groups] == list(zip(roles, [0.01, 0.02], [True, True]))

    for one in (model, other):
        for group in one.policy.optimizer.param_groups:
            group["lr"] = 0.01
        for i, p in enumerate(one.policy.parameters()):
            p.grad = th.full_like(p, 0.1 * i)
        one.policy.optimizer.step()
    th.testing.assert_close(weights(model), weights(other))
    model.learn(32)


def test_an_optimizer_of_another_kind_is_not_taken_over_and_a_warning_says_so(tmp_path):
    other = A2C("MlpPolicy", "CartPole-v1", seed=1, policy_kwargs=dict(SMALL), device="cpu")
    model = small_model("CartPole-v1").learn(16)
    knew = copy.deepcopy(known(model))
    # Nothing is lost of an optimizer that has made no step
    take_over(model, other, "dictionary", tmp_path)
    other.learn(10)
    for form in ("dictionary", "file"):
        with pytest.warns(
            UserWarning, match="state of the optimizer is not taken over: it has no betas, so it is not one of Adam"
        ):
            take_over(model, other, form, tmp_path)
        assert th.equal(weights(model), weights(other))
        for name, entries in known(model).items():
            assert all(th.equal(entries[key], value) for key, value in knew[name].items())
    model.learn(16)


def test_an_optimizer_of_the_same_kind_is_taken_over_whatever_the_kind(tmp_path):
    other = A2C("MlpPolicy", "CartPole-v1", seed=1, policy_kwargs=dict(SMALL), device="cpu").learn(10)
    model = small_model("CartPole-v1", policy_kwargs={**SMALL, "optimizer_class": th.optim.RMSprop})
    take_over(model, other, "dictionary", tmp_path)
    assert_knows_the_same(model, other)
    model.learn(16)


def as_it_is(model):
    model.learn(16)


def with_a_new_optimizer(model):
    """One group of all parameters, until the next update."""
    model.learn(16)
    optimizer = th.optim.Adam(model.policy.parameters())
    optimizer.state.update(model.policy.optimizer.state)
    model.policy.optimizer = optimizer


def with_reversed_groups(model):
    model.learn(16)
    model.policy.optimizer.param_groups.reverse()


def with_a_frozen_critic(model):
    model.policy.value_net.requires_grad_(False)
    model.policy.mlp_extractor.value_net.requires_grad_(False)
    model.learn(16)


TRAINED = [as_it_is, with_a_new_optimizer, with_reversed_groups, with_a_frozen_critic]


@pytest.mark.parametrize("train_other", TRAINED)
@pytest.mark.parametrize("train", TRAINED)
def test_optimizers_that_group_their_parameters_differently_are_taken_over(train, train_other, tmp_path):
    other, model = small_model(seed=1), small_model(seed=2)
    train_other(other)
    train(model)
    take_over(model, other, "file", tmp_path)
    assert th.equal(weights(model), weights(other))
    assert_knows_the_same(model, other)
    model.learn(16)


def test_a_state_without_names_of_parameters_is_taken_over():
    """As it was saved before there were any."""
    other, model = small_model(seed=1, learning_rate=0.1).learn(16), small_model(seed=2)
    parameters = other.get_parameters()
    for group in parameters["policy.optimizer"]["param_groups"]:
        assert all(name in other.policy.state_dict() for name in group.pop("names"))
    model.set_parameters(parameters)
    assert_knows_the_same(model, other)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [0.1, 0.1]
    assert not any("names" in group for group in model.policy.optimizer.param_groups)


def test_groups_of_unknown_parameters_are_not_taken_over():
    other, model = small_model(seed=1).learn(16), small_model(seed=2)
    first, second = other.policy.optimizer.param_groups
    second["params"].append(first["params"].pop())
    parameters = other.get_parameters()
    for group in parameters["policy.optimizer"]["param_groups"]:
        del group["names"]
    with pytest.warns(UserWarning, match="state of the optimizer is not taken over: it has other groups of parameters"):
        model.set_parameters(parameters)
    assert th.equal(weights(model), weights(other))
    assert known(model) == {}


def test_what_is_taken_over_is_a_copy():
    other, model = small_model(seed=1).learn(16), small_model(seed=2)
    model.set_parameters(other.get_parameters())
    before = copy.deepcopy(known(model))
    other.learn(16)
    for name, entries in known(model).items():
        assert all(th.equal(entries[key], value) for key, value in before[name].items())


def test_parameters_that_are_missing_or_unknown_are_refused_as_by_sb3():
    model = small_model()
    parameters = small_model().get_parameters()
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({"policy": parameters["policy"]})
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({"policy.optimizer": parameters["policy.optimizer"]})
    with pytest.raises(ValueError, match="invalid object name"):
        model.set_parameters({**parameters, "actor": {}})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters({"policy": {}, "policy.optimizer": {}})
    model.set_parameters({"policy.optimizer": parameters["policy.optimizer"]}, exact_match=False)
    model.set_parameters({"policy": parameters["policy"]}, exact_match=False)


# ---------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------

ENVIRONMENTS = {
    "one": lambda seed: make_vec_env("CartPole-v1", 1, seed=seed),
    "dummy": lambda seed: make_vec_env("CartPole-v1", 3, seed=seed),
    "same length": lambda seed: make_vec_env("Pendulum-v1", 2, seed=seed),
    "native": lambda seed: make_vec_env("CartPole-v1", 3, seed=seed, vec_env_cls=NativeVecEnv),
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
    uninterrupted = small_model(env, learning_rate=lambda left: 0.01 * left, **keywords)
    uninterrupted.learn(10**6, callback=Until(6, save_at=3, folder=tmp_path))
    env.close()

    th.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    env = make_env(99)
    resumed = VPG.load(tmp_path / "between", env=env, device="cpu")
    assert resumed._n_updates == 3
    resumed.learn(10**6 - resumed.num_timesteps, callback=Until(6), reset_num_timesteps=False)
    env.close()
    assert resumed.num_timesteps == uninterrupted.num_timesteps
    assert th.equal(weights(resumed), weights(uninterrupted))


def test_a_seed_given_after_loading_counts(saved):
    def trained(seed):
        model = VPG.load(saved, env=make_vec_env("CartPole-v1", 2), device="cpu")
        if seed is not None:
            model.set_random_seed(seed)
        return weights(model.learn(64, reset_num_timesteps=False))

    assert th.equal(trained(None), trained(None))
    assert th.equal(trained(1), trained(1))
    assert not th.equal(trained(1), trained(2))
    assert not th.equal(trained(1), trained(None))


def test_a_seed_given_on_loading_counts(saved):
    def trained(seed):
        model = VPG.load(saved, env=make_vec_env("CartPole-v1", 2), device="cpu", seed=seed)
        return weights(model.learn(64, reset_num_timesteps=False))

    assert th.equal(trained(1), trained(1))
    assert not th.equal(trained(1), trained(2))


def test_training_anew_from_a_file_does_not_repeat_the_random_numbers(saved):
    def trained():
        model = VPG.load(saved, env=make_vec_env("CartPole-v1", 2), seed=None, device="cpu")
        return weights(model.learn(64))

    assert not th.equal(trained(), trained())


def test_random_states_are_plain_numbers_and_come_back():
    env = DummyVecEnv([lambda: SpacesEnv(CountingEnv().observation_space, CountingEnv().action_space)] * 2)
    env.seed(3)
    env.reset()
    # Python draws two normal numbers at a time, and keeps the second one for the next call
    random.gauss(0, 1)
    states = json.loads(json.dumps(get_random_states(env)))

    def draws():
        drawn = [generator.random() for generator in env.get_attr("np_random")]
        return [random.gauss(0, 1), random.random(), np.random.rand(), th.rand(1).item(), *drawn]  # noqa: NPY002

    first = draws()
    env.seed(4)
    set_random_states(states, env)
    assert draws() == first
    assert env._seeds == [None, None]


def test_environments_of_another_number_keep_their_own_random_numbers():
    two, three = (make_vec_env("CartPole-v1", n, seed=n) for n in (2, 3))
    for env in (two, three):
        env.reset()
    before = [generator.bit_generator.state for generator in three.get_attr("np_random")]
    set_random_states(get_random_states(two), three)
    assert [generator.bit_generator.state for generator in three.get_attr("np_random")] == before


def test_vec_normalize_goes_on_too(tmp_path):
    def environment(seed):
        return VecNormalize(make_vec_env("Pendulum-v1", 2, seed=seed))

    uninterrupted = small_model(environment(0), n_episodes=1)
    uninterrupted.learn(10**6, callback=Until(4, save_at=2, folder=tmp_path))
    env = VecNormalize.load(tmp_path / "between.pkl", make_vec_env("Pendulum-v1", 2, seed=7))
    resumed = VPG.load(tmp_path / "between", env=env, device="cpu")
    resumed.learn(10**6 - resumed.num_timesteps, callback=Until(4), reset_num_timesteps=False)
    assert th.equal(weights(resumed), weights(uninterrupted))
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
    model = small_model(env).learn(32)
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
    model = small_model(env).learn(32)
    model.save(tmp_path / "model")
    resumed = VPG.load(tmp_path / "model", env=env, device="cpu")
    with pytest.warns(UserWarning, match="np_random of environment 0 is not restored: .*setting it raises"):
        resumed.learn(32, reset_num_timesteps=False)
    env.close()


def test_a_generator_that_cannot_be_replaced_takes_its_state(tmp_path):
    """Whether it is read-only or of a class of its own."""
    env = DummyVecEnv(monitored(ReadOnlyGenerator, UnpicklableGenerator))
    model = small_model(env).learn(32)
    model.save(tmp_path / "model")

    def draws():
        return [generator.random() for generator in env.get_attr("np_random")]

    before = draws()
    set_random_states(VPG.load(tmp_path / "model")._random_states, env)
    assert draws() == before
    assert isinstance(env.get_attr("np_random")[1], LocalGenerator)


def test_processes_of_environments_with_and_without_a_wrapper_do_not_end_with_a_save(tmp_path):
    env = SubprocVecEnv([RaisingGenerator, lambda: Monitor(UnpicklableGenerator())])
    model = small_model(env).learn(32)
    with (
        pytest.warns(UserWarning, match="np_random of environment 0 is not saved: .*wrapper, such as Monitor"),
        pytest.warns(UserWarning, match="np_random of environment 1 is not saved: reading or pickling it"),
    ):
        model.save(tmp_path / "model")
    model.learn(32, reset_num_timesteps=False)
    env.close()


def test_environments_that_have_been_closed_do_not_keep_a_model_from_being_saved(tmp_path):
    env = in_processes(monitored(OwnGenerator, OwnGenerator))
    model = small_model(env).learn(32)
    env.close()
    model.save(tmp_path / "model")
    VPG.load(tmp_path / "model", env=DummyVecEnv(monitored(OwnGenerator, OwnGenerator))).learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize("vec_env", [DummyVecEnv, in_processes])
@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_a_run_goes_on_with_any_generator_of_numpys(name, vec_env, tmp_path, monkeypatch):
    monkeypatch.setattr(OwnGenerator, "bit_generator", getattr(np.random, name))

    def environment(seed):
        env = vec_env(monitored(OwnGenerator, OwnGenerator))
        env.seed(seed)
        return env

    env = environment(0)
    uninterrupted = small_model(env, n_episodes=1, seed=None)
    uninterrupted.learn(10**6, callback=Until(4, save_at=2, folder=tmp_path))
    env.close()
    env = environment(7)
    resumed = VPG.load(tmp_path / "between", env=env, device="cpu")
    states = resumed._random_states["environments"]
    assert [state["bit_generator"] for state in states] == [name, name]
    resumed.learn(10**6 - resumed.num_timesteps, callback=Until(4), reset_num_timesteps=False)
    env.close()
    assert th.equal(weights(resumed), weights(uninterrupted))


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
    model = small_model()

    def get_attr(*args, **kwargs):
        raise error

    monkeypatch.setattr(model.env, "get_attr", get_attr)
    model.save(tmp_path / "model")
    VPG.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2)).learn(16, reset_num_timesteps=False)


@pytest.mark.parametrize("error", [EOFError, BrokenPipeError, RuntimeError])
def test_environments_that_cannot_be_asked_do_not_keep_a_model_from_being_saved(error, tmp_path, monkeypatch):
    model = small_model()

    def get_attr(*args, **kwargs):
        raise error

    monkeypatch.setattr(model.env, "get_attr", get_attr)
    with pytest.warns(UserWarning, match=f"environment 0, 1 is not saved: {error.__name__}"):
        model.save(tmp_path / "model")
    VPG.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2)).learn(16, reset_num_timesteps=False)

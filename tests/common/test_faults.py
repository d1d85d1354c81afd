"""An environment that raises or dies: an error that names it, nothing lost, nothing left running."""

import os
import signal
import time

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers.envs import CountingEnv
from helpers.models import flat_weights
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_vpg import VPG
from sb3_vpg.envs.native_vec_env import NativeVecEnv


class FailingEnv(gym.Wrapper):
    """
    :param how: what happens at the step: "raise", "exit" (of the process), "kill", "reset" (raises at the reset after it)
    :param at: number of the step, from 0, counted through all episodes
    """

    def __init__(self, how, at):
        super().__init__(CountingEnv([4]))
        self.how, self.at, self.n_steps = how, at, 0

    def step(self, action):
        self.n_steps += 1
        if self.n_steps == self.at + 1:
            if self.how == "raise":
                raise KeyError("sensor lost")
            if self.how == "exit":
                os._exit(3)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

    def reset(self, **kwargs):
        if self.how == "reset" and self.n_steps >= self.at:
            raise KeyError("cannot reset")
        return super().reset(**kwargs)


def environments(vec_env_class, how, at=9, **kwargs):
    """Three, the second of which fails."""
    fns = [lambda: Monitor(CountingEnv([4])), lambda: Monitor(FailingEnv(how, at)), lambda: Monitor(CountingEnv([4]))]
    return vec_env_class(fns, **kwargs)


def assert_fails_unharmed(env, match, tmp_path, **kwargs):
    model = VPG("MlpPolicy", env, **{"n_steps": 6, "seed": 0, "policy_kwargs": {"net_arch": [8]}, **kwargs})
    updated, train = [], model.train

    def train_and_remember():
        train()
        updated.append(flat_weights(model))

    model.train = train_and_remember
    with pytest.raises(RuntimeError, match=match) as error:
        model.learn(1000)
    del model.train
    assert error.value.__cause__ is not None
    assert len(updated) == model._n_updates == 1
    assert th.equal(flat_weights(model), updated[-1])
    model.save(tmp_path / "model")
    assert th.equal(flat_weights(VPG.load(tmp_path / "model", device="cpu")), flat_weights(model))
    return model


@pytest.mark.parametrize("wrapper", [lambda env: env, VecNormalize], ids=["plain", "normalised"])
def test_an_exception_in_a_step_names_the_environment_and_the_step(wrapper, tmp_path):
    # The tenth step is the second of the third episode
    message = r"^Environment 1 failed at step 1 of its episode \(timestep 27\): KeyError: 'sensor lost'"
    model = assert_fails_unharmed(wrapper(environments(DummyVecEnv, "raise")), message, tmp_path)
    # It was but once
    model.learn(60, reset_num_timesteps=False)


def test_an_exception_in_a_reset_names_the_environment(tmp_path):
    message = r"^Environment 1 failed at step \d of its episode .*: KeyError: 'cannot reset'"
    assert_fails_unharmed(environments(DummyVecEnv, "reset", at=12), message, tmp_path)
    # One between two rollouts of whole episodes, in the middle of an episode that is not recorded
    env = DummyVecEnv([lambda: CountingEnv([4]), lambda: CountingEnv([6])])
    reset, n_resets = env.envs[0].reset, []

    def failing(**kwargs):
        n_resets.append(1)
        if len(n_resets) == 3:
            raise KeyError("cannot reset")
        return reset(**kwargs)

    env.envs[0].reset = failing
    model = VPG("MlpPolicy", env, n_episodes=1, estimator="reward_to_go")
    with pytest.raises(RuntimeError, match=r"^Environment 0 failed at step 0 of its episode \(timestep 12\): KeyError"):
        model.learn(100)


def test_an_exception_in_an_array_of_environments_is_named(tmp_path, monkeypatch):
    env = make_vec_env("CartPole-v1", 2, vec_env_cls=NativeVecEnv)
    step, n_steps = env.vector_env.step, []

    def failing(actions):
        n_steps.append(1)
        if len(n_steps) == 8:
            raise ZeroDivisionError("physics")
        return step(actions)

    monkeypatch.setattr(env.vector_env, "step", failing)
    assert_fails_unharmed(env, r"^An environment failed \(timestep 14\): ZeroDivisionError: physics", tmp_path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"Environment 1 failed at step 1 .*: its process exited with code 1; its own error is printed"),
        ("exit", r"Environment 1 failed at step 1 .*: its process exited with code 3"),
        ("kill", r"Environment 1 failed at step 1 .*: its process was killed by signal 9"),
    ],
)
def test_a_process_that_ends_is_named_and_no_other_is_left(how, message, tmp_path):
    env = environments(SubprocVecEnv, how)
    processes = list(env.processes)
    assert_fails_unharmed(env, message, tmp_path)
    assert not any(process.is_alive() for process in processes)
    env.close()


@pytest.mark.parametrize(
    ("killed", "message"),
    [
        ([2], r"Environment 2 failed .*: its process was killed by signal 9"),
        ([1, 2], r"Environment 1 failed .*: its process \(and those of 2\) was killed by signal 9"),
    ],
)
def test_processes_that_are_killed_before_training_are_named(killed, message):
    env = environments(SubprocVecEnv, "never")
    for i in killed:
        os.kill(env.processes[i].pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(env.processes[i].is_alive() for i in killed) and time.monotonic() < deadline:
        time.sleep(0.01)
    model = VPG("MlpPolicy", env, n_steps=6, seed=None)
    with pytest.raises(RuntimeError, match=message):
        model.learn(100)
    assert not any(process.is_alive() for process in env.processes)


def test_a_connection_that_a_callback_loses_is_not_that_of_an_environment():
    class Disconnected(BaseCallback):
        def _init_callback(self):
            raise ConnectionRefusedError("the logger's")

        def _on_step(self):
            return True

    env = environments(SubprocVecEnv, "never")
    with pytest.raises(ConnectionRefusedError, match="the logger's"):
        VPG("MlpPolicy", env, n_steps=6).learn(100, Disconnected())
    assert all(process.is_alive() for process in env.processes)
    env.close()


def test_an_interruption_is_not_an_error_of_the_environment():
    env = environments(DummyVecEnv, "raise")
    env.envs[1].env.step = lambda action: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        VPG("MlpPolicy", env, n_steps=6).learn(100)


def test_training_goes_on_with_the_environments_that_are_left_unharmed():
    env = environments(DummyVecEnv, "raise")
    model = VPG("MlpPolicy", env, n_steps=6, seed=0)
    with pytest.raises(RuntimeError):
        model.learn(1000)
    model.learn(100, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.rewards, buffer.observations[..., 1] + 1)

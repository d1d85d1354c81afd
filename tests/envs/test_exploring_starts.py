"""The callbacks, with environments one by one, in other processes and in one array, and with other algorithms than VPG."""

import numpy as np
import pytest
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_vpg import VPG
from sb3_vpg.envs.exploring_starts import ExploringStarts
from sb3_vpg.envs.native_vec_env import NativeVecEnv

# With the module that registers it, for the workers of SubprocVecEnv
ENV = "sb3_vpg:CartPoleSwingUp-v0"
OWN = [0.2, 0.2, 0.2, 0.2]


class Starts(BaseCallback):
    """At each step, the spread of the next start."""

    def __init__(self):
        super().__init__()
        self.stds = []

    def _on_step(self):
        self.stds.append(self.training_env.get_attr("unwrapped")[-1]._start_std)
        return True


def stds_in_training(callback, algorithm=VPG, vec_env_cls=NativeVecEnv):
    env = make_vec_env(ENV, 2, vec_env_cls=vec_env_cls)
    starts = Starts()
    kwargs = {"batch_size": 8} if algorithm is PPO else {}
    model = algorithm("MlpPolicy", VecNormalize(env), n_steps=4, device="cpu", **kwargs)
    model.learn(80, callback=[callback, starts])
    env.close()
    return np.array(starts.stds)[::4]


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv, NativeVecEnv])
def test_starts_are_anywhere_then_more_and_more_the_environments_own(vec_env_cls):
    stds = stds_in_training(ExploringStarts([0.2, 1.2, 3.2, 0.0], hold=0.4, end=0.8), vec_env_cls=vec_env_cls)
    share = np.array([1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0])[:, None]
    np.testing.assert_allclose(stds, OWN + share * np.subtract([0.2, 1.2, 3.2, 0.0], OWN), atol=1e-12)


def test_training_that_is_stopped_leaves_the_environments_own_start():
    env = make_vec_env(ENV, 2, vec_env_cls=NativeVecEnv)
    starts = ExploringStarts()
    starts._on_step = lambda: False
    VPG("MlpPolicy", env, n_steps=4).learn(80, callback=starts)
    assert starts.num_timesteps < 80
    np.testing.assert_array_equal(env.vector_env._start_std, OWN)


@pytest.mark.parametrize("algorithm", [A2C, PPO])
def test_other_algorithms_have_them_too(algorithm):
    stds = stds_in_training(ExploringStarts(), algorithm)
    np.testing.assert_allclose(stds[0], [0.2, 0.2, np.pi, 0.2])
    np.testing.assert_allclose(stds[-1], OWN)
    assert (np.diff(stds[:, 2]) <= 0).all()


def test_hold_and_end_may_be_the_same():
    stds = stds_in_training(ExploringStarts(hold=0.5, end=0.5))
    np.testing.assert_allclose(stds[:, 2], [np.pi] * 5 + [0.2] * 5)


def test_a_second_training_begins_with_the_first_fraction():
    env = make_vec_env(ENV, 2, vec_env_cls=NativeVecEnv)
    model = VPG("MlpPolicy", env, n_steps=4)
    for _ in range(2):
        starts = Starts()
        model.learn(40, callback=[ExploringStarts(), starts])
        np.testing.assert_allclose(starts.stds[0], [0.2, 0.2, np.pi, 0.2])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"hold": -0.1}, "hold=-0.1 .* >= 0 and <= 0.8"),
        ({"hold": 0.9, "end": 0.8}, "hold=0.9 .* >= 0 and <= 0.8"),
        ({"end": 1.1}, "end=1.1"),
        ({"hold": float("nan")}, "hold=nan"),
        ({"hold": "0.4"}, "hold='0.4'"),
        ({"std": (1, 2)}, "std=.1, 2. .* four numbers"),
        ({"std": 0.5}, "std=0.5 .* four numbers"),
        ({"std": (0.2, 0.2, -1, 0.2)}, "std=-1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        ExploringStarts(**shares)


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, NativeVecEnv])
def test_other_environments_are_refused(vec_env_cls):
    starts = ExploringStarts()
    with pytest.raises(ValueError, match="needs environments with set_start_std"):
        VPG("MlpPolicy", make_vec_env("CartPole-v1", vec_env_cls=vec_env_cls)).learn(10, callback=starts)
    # The zoo calls it after any error
    starts.on_training_end()


def test_the_end_after_the_processes_have_exited():
    env = make_vec_env(ENV, 2, vec_env_cls=SubprocVecEnv)
    starts = ExploringStarts()
    VPG("MlpPolicy", env, n_steps=4).learn(8, callback=starts)
    env.close()
    starts.on_training_end()

"""NativeVecEnv of any vectorized environment does what DummyVecEnv does, whenever that environment resets."""

import copy
import itertools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward, RecordEpisodeStatistics
from helpers.envs import OBSERVATION_SPACES, CountingEnv, NextStepVectorEnv, SpacesEnv
from helpers.vec_envs import TellingEnv, assert_same, endings, play
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_vpg import VPG
from sb3_vpg.envs import NativeVecEnv

PARTIAL = [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP]
each_mode = pytest.mark.parametrize("mode", PARTIAL, ids=lambda mode: mode.name)


def no_actions(observations):
    return np.zeros(3, dtype=int)


def limited_telling():
    return TimeLimit(TellingEnv(), 4)


@each_mode
@pytest.mark.parametrize("copied", [True, False])
def test_environments_that_can_be_reset_in_part_are_as_with_dummy_vec_env(mode, copied):
    native = NativeVecEnv(SyncVectorEnv([limited_telling] * 3, autoreset_mode=mode, copy=copied))
    dummy = DummyVecEnv([lambda: Monitor(limited_telling())] * 3)
    plays = []
    for env in (native, dummy):
        env.seed(0)
        # Another reset, in the middle of episodes
        plays.append([*play(env, no_actions, 60), *play(env, no_actions, 9), ([], env.reset_infos)])
    assert_same(*plays)
    assert dict(endings(plays[0])).keys() == {True, False}
    assert native.reset_steps is None
    assert native.env_is_wrapped(Monitor) == [True] * 3
    native.close()


@each_mode
def test_dicts_of_observations_are_as_with_dummy_vec_env(mode):
    space = OBSERVATION_SPACES["Dict"]

    def make_env():
        return SpacesEnv(space, gym.spaces.Discrete(2), length=3)

    plays = []
    for env in (
        NativeVecEnv(SyncVectorEnv([make_env] * 2, autoreset_mode=mode)),
        DummyVecEnv([lambda: Monitor(make_env())] * 2),
    ):
        env.seed(0)
        observations = [env.reset()]
        for _ in range(10):
            new, rewards, dones, infos = env.step(np.array([0, 1]))
            observations += [new, *(copy.deepcopy(info["terminal_observation"]) for info in infos if "episode" in info)]
        plays.append([observations, rewards, dones])
    np.testing.assert_equal(*plays)
    assert len(plays[0][0]) > 11


def test_resets_in_the_next_step_are_told_where_no_part_can_be_reset():
    env = NativeVecEnv(NextStepVectorEnv([lambda: CountingEnv((2,)), lambda: CountingEnv((3,), time_limit=True)]))
    env.reset()
    reset_steps, rows = env.reset_steps, []
    for _ in range(8):
        observations, rewards, dones, infos = env.step(np.zeros(2, dtype=int))
        rows.append((observations[:, 1].tolist(), rewards.tolist(), dones.tolist(), reset_steps.tolist()))
        for i, info in enumerate(infos):
            if dones[i]:
                assert info["episode"]["l"] == 2 + i
                assert info["episode"]["r"] == (3, 6)[i]
                assert info["TimeLimit.truncated"] == bool(i)
                np.testing.assert_array_equal(info["terminal_observation"], observations[i])
    no, yes = False, True
    assert rows == [
        ([1, 1], [1, 1], [no, no], [no, no]),
        ([2, 2], [2, 2], [yes, no], [no, no]),
        ([0, 3], [0, 3], [no, yes], [yes, no]),
        ([1, 0], [1, 0], [no, no], [no, yes]),
        ([2, 1], [2, 1], [yes, no], [no, no]),
        ([0, 2], [0, 2], [no, no], [yes, no]),
        ([1, 3], [1, 3], [no, yes], [no, no]),
        ([2, 0], [2, 0], [yes, no], [no, yes]),
    ]
    # After a reset of all, no reset is due
    env.reset()
    assert env.reset_steps is reset_steps
    observations, *_ = env.step(np.zeros(2, dtype=int))
    assert (observations[:, 1].tolist(), reset_steps.tolist()) == ([1, 1], [no, no])


def test_a_reset_of_ones_own_is_not_called_for_a_part():
    class AlwaysAll(SyncVectorEnv):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)

    env = NativeVecEnv(AlwaysAll([lambda: CountingEnv((2,)), lambda: CountingEnv((3,))]))
    env.reset()
    assert env.reset_steps is not None
    lengths = [info["episode"]["l"] for _ in range(8) for info in env.step(np.zeros(2, dtype=int))[3] if "episode" in info]
    assert lengths == [2, 3, 2, 3, 2]


@pytest.mark.parametrize("reads", [0, 1])
def test_a_reset_step_is_an_error_unless_its_flag_was_read_since_the_last_reset(reads):
    env = NativeVecEnv(NextStepVectorEnv([lambda: CountingEnv((1,))]))
    for _ in range(reads):
        assert env.reset_steps is not None
    env.reset()
    env.step(np.zeros(1, dtype=int))
    with pytest.raises(RuntimeError, match=r"resets in the next step .* Only VPG can be trained on it"):
        env.step(np.zeros(1, dtype=int))


def test_the_reward_of_a_reset_step_does_not_count():
    class Rewarding(NextStepVectorEnv):
        def step(self, actions):
            observations, _, *rest = super().step(actions)
            return observations, np.full(1, 5.0), *rest

    env = NativeVecEnv(Rewarding([lambda: CountingEnv((2,))]))
    env.reset()
    assert env.reset_steps is not None
    steps = [env.step(np.zeros(1, dtype=int)) for _ in range(6)]
    assert [rewards.item() for _, rewards, _, _ in steps] == [5, 5, 0, 5, 5, 0]
    assert [infos[0]["episode"]["r"] for *_, infos in steps if "episode" in infos[0]] == [10, 10]


def test_a_vectorized_environment_that_does_not_say_when_it_resets_is_refused():
    class Silent(NextStepVectorEnv):
        metadata = {}

    with pytest.raises(ValueError, match=r"does not say when it resets: metadata\['autoreset_mode'\]=None"):
        NativeVecEnv(Silent([CountingEnv]))


def test_a_wrapper_around_a_vectorized_environment_is_kept():
    env = NativeVecEnv(RecordEpisodeStatistics(SyncVectorEnv([CountingEnv] * 2, autoreset_mode=AutoresetMode.SAME_STEP)))
    env.reset()
    *_, infos = [env.step(np.zeros(2, dtype=int)) for _ in range(3)][-1]
    assert infos[0]["episode"]["l"] == 3


def wrapped_cartpoles(wrapper, mode):
    return wrapper(SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 4, autoreset_mode=mode))


@pytest.mark.parametrize(
    ("wrapper", "mode"),
    [
        (NormalizeObservation, AutoresetMode.NEXT_STEP),
        (NormalizeReward, AutoresetMode.NEXT_STEP),
        (NormalizeReward, AutoresetMode.SAME_STEP),
    ],
)
def test_a_wrapper_that_keeps_statistics_has_those_of_gymnasium(wrapper, mode):
    alone, inside = (wrapped_cartpoles(wrapper, mode) for _ in range(2))
    env = NativeVecEnv(inside)
    assert (env.reset_steps is None) == (mode == AutoresetMode.SAME_STEP)
    alone.reset(seed=0)
    env.seed(0)
    env.reset()
    assert env.reset_steps is None or env.reset_steps.shape == (4,)
    for actions in np.random.default_rng(0).integers(2, size=(200, 4)):
        expected, rewards, *_ = alone.step(actions)
        observations, own_rewards, *_ = env.step(actions)
        np.testing.assert_allclose(observations, expected)
        np.testing.assert_allclose(own_rewards, rewards, rtol=1e-6)


def test_a_wrapper_that_cannot_be_reset_in_part_is_refused_where_it_has_to_be():
    with pytest.raises(ValueError, match=r"NormalizeReward is not allowed with AutoresetMode\.DISABLED"):
        NativeVecEnv(RecordEpisodeStatistics(wrapped_cartpoles(NormalizeReward, AutoresetMode.DISABLED)))


# ---------------------------------------------------------------------------------------------------------------
# gymnasium's own CartPoleVectorEnv resets in the next step
# ---------------------------------------------------------------------------------------------------------------


class Buffers(BaseCallback):
    """Copies of the arrays of each rollout."""

    def _on_training_start(self):
        self.rollouts = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        names = ("observations", "actions", "rewards", "mask", "steps", "ends")
        self.rollouts.append({name: getattr(self.model.rollout_buffer, name).copy() for name in names})


def cartpoles(max_episode_steps=30):
    return NativeVecEnv(CartPoleVectorEnv(4, max_episode_steps=max_episode_steps))


def next_states(observations, actions):
    """By the equations of gymnasium."""
    physics = CartPoleVectorEnv(len(observations))
    physics.reset()
    physics.state = observations.astype(np.float64).T
    return physics.step(actions.astype(int))[0]


def small_model(env, **kwargs):
    return VPG("MlpPolicy", env, **{"n_steps": 64, "seed": 0, "policy_kwargs": {"net_arch": [16]}, **kwargs})


@pytest.mark.parametrize(
    "kwargs", [{}, {"n_steps": 40, "estimator": "reward_to_go"}, {"n_episodes": 2, "estimator": "total_return"}], ids=str
)
def test_every_step_that_vpg_records_is_a_step_of_the_game(kwargs):
    buffers = Buffers()
    model = small_model(cartpoles(), **kwargs).learn(800, callback=buffers)
    lengths = []
    for rollout in buffers.rollouts:
        for n in range(4):
            observations, actions, rewards, mask, steps, ends = (array[:, n] for array in rollout.values())
            assert (rewards[mask] == 1).all()
            expected = next_states(observations, actions[:, 0])
            within = mask & ~ends
            within[-1] = False
            rows = within.nonzero()[0]
            assert mask[rows + 1].all()
            np.testing.assert_allclose(observations[rows + 1], expected[rows], atol=1e-5)
            # The last step of an episode is recorded: with it, the pole falls, or the time is up
            last = mask & ends
            fallen = (np.abs(expected[:, 2]) > 12 * 2 * np.pi / 360) | (np.abs(expected[:, 0]) > 2.4)
            np.testing.assert_array_equal(fallen[mask] | (steps[mask] == 29), last[mask])
            # A first step starts where resets lead to
            assert (np.abs(observations[mask & (steps == 0)]) <= 0.05).all()
            lengths += (steps[last] + 1).tolist()
            # A step that is not recorded is one of a reset, or comes after the last recorded step
            skipped = np.flatnonzero(~mask[: mask.nonzero()[0][-1]])
            assert ends[skipped].all()
            if "n_episodes" in kwargs:
                assert last.sum() == 2
            if kwargs:
                assert last[mask.nonzero()[0][-1]]
    assert sorted(info["l"] for info in model.ep_info_buffer) == sorted(lengths)[-100:] or len(lengths) > 100
    assert max(lengths) == 30
    assert min(lengths) < 30
    assert len(buffers.rollouts) >= 2


def test_other_algorithms_are_refused():
    env = cartpoles()
    small_model(env).learn(256)
    with pytest.raises(RuntimeError, match=r"resets in the next step .* Only VPG can be trained on it"):
        A2C("MlpPolicy", env, n_steps=64).learn(256)


def test_a_policy_can_be_evaluated():
    model = small_model(cartpoles()).learn(256)
    env = cartpoles()
    env.allow_reset_steps = True
    returns, lengths = evaluate_policy(model, env, 8, return_episode_rewards=True)
    # One for each step, but the one of the reset
    assert returns == lengths
    assert 8 <= min(returns) <= max(returns) <= 30


def test_a_buffer_without_a_mask_is_refused():
    model = small_model(cartpoles(), rollout_buffer_class=RolloutBuffer)
    with pytest.raises(ValueError, match="rollout_buffer_class=RolloutBuffer is not allowed with an environment that resets"):
        model.learn(256)


@pytest.mark.parametrize(
    ("wrap", "n_steps", "message"),
    [(lambda env: env, 1, "n_steps=1 is not allowed"), (lambda env: VecFrameStack(env, 2), 8, "VecFrameStack is not allowed")],
    ids=["one step", "frames"],
)
def test_what_reset_steps_would_spoil_is_refused(wrap, n_steps, message):
    env = wrap(NativeVecEnv(NextStepVectorEnv([lambda: CountingEnv([3])] * 2)))
    with pytest.raises(ValueError, match=f"{message} with an environment that resets in the next step"):
        VPG("MlpPolicy", env, n_steps=n_steps).learn(16)


def test_normalization_can_be_around():
    env = VecNormalize(cartpoles())
    buffers = Buffers()
    small_model(env).learn(512, callback=buffers)
    for rollout in buffers.rollouts:
        mask = rollout["mask"]
        assert 0 < (~mask).sum() < mask.sum()
        # A reset step gives no reward
        assert (rollout["rewards"][mask] > 0).all()
        assert (rollout["rewards"][~mask] == 0).all()


# ---------------------------------------------------------------------------------------------------------------
# ALE
# ---------------------------------------------------------------------------------------------------------------


def test_games_of_ale_are_the_same_whenever_they_reset():
    vector_env = pytest.importorskip("ale_py.vector_env")
    kwargs = {"num_envs": 2, "max_num_frames_per_episode": 160, "img_width": 16, "img_height": 16, "num_threads": 1}
    plays = []
    for mode, other in itertools.permutations((AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)):
        games = vector_env.AtariVectorEnv("breakout", autoreset_mode=mode, **kwargs)
        # Has the same metadata
        vector_env.AtariVectorEnv("breakout", autoreset_mode=other, **kwargs).close()
        env = NativeVecEnv(games)
        assert env.reset_steps is None
        env.seed(3)
        rng = np.random.default_rng(0)
        plays.append(play(env, lambda _, rng=rng: rng.integers(4, size=2), 45))
        env.close()
    for step, expected in zip(*plays):
        np.testing.assert_equal(step[:-1], expected[:-1])
        for info, expected_info in zip(step[-1], expected[-1]):
            np.testing.assert_equal(info.get("terminal_observation"), expected_info.get("terminal_observation"))
    # 160 frames: 40 steps, without those of the reset
    assert endings(plays[0]) == endings(plays[1]) != []

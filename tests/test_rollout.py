"""Which steps end up in a rollout, and what is added to their rewards where an episode is cut or ends."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import NextStepVectorEnv
from helpers.models import Spy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from sb3_vpg import VPG
from sb3_vpg.envs import NativeVecEnv


class Script(gym.Env):
    """
    Episodes of given lengths, again and again. The observation is (environment, episode, step), the reward 1.

    :param lengths: how many steps each episode takes; a negative number ends in a time limit instead of a termination
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, index, lengths):
        self.index, self.lengths, self.episode = index, lengths, -1

    def _obs(self):
        return np.array([self.index, self.episode, self.t], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        length = self.lengths[self.episode % len(self.lengths)]
        over = self.t >= abs(length)
        return self._obs(), 1.0, over and length > 0, over and length < 0, {}


class Snapshots(BaseCallback):
    """Keeps what each rollout recorded, per environment: a list of (episode, step)."""

    def __init__(self):
        super().__init__()
        self.rollouts, self.buffers = [], []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        self.rollouts.append(
            [[tuple(map(int, obs[1:])) for obs in buffer.observations[buffer.mask[:, n], n]] for n in range(buffer.n_envs)]
        )
        names = ("rewards", "steps", "mask", "values", "advantages", "returns", "ends")
        arrays = {name: getattr(buffer, name).copy() for name in names}
        self.buffers.append({**arrays, "normalized_advantages": buffer.normalized_advantages()})


def train(lengths, n_rollouts=2, wrap=lambda env: env, **kwargs):
    """Train for ``n_rollouts`` rollouts on one scripted environment per entry of ``lengths``."""
    env = DummyVecEnv([lambda n=n: Monitor(Script(n, lengths[n])) for n in range(len(lengths))])
    model = VPG("MlpPolicy", wrap(env), **{"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu", **kwargs})
    seen = Snapshots()
    for _ in range(n_rollouts):
        model.learn(1, callback=seen, reset_num_timesteps=False)
    return model, seen


def train_on_next_step_resets(lengths, n_rollouts=2, **kwargs):
    """As :func:`train`, on environments that spend a step on each reset."""
    env_fns = [lambda n=n: Script(n, lengths[n]) for n in range(len(lengths))]
    return train(lengths, n_rollouts, lambda _: NativeVecEnv(NextStepVectorEnv(env_fns)), **kwargs)


def episode(number, length):
    return [(number, step) for step in range(length)]


# ------------------------------------------------------------------------------------------------------------------
# Which steps
# ------------------------------------------------------------------------------------------------------------------


def test_fixed_length_goes_on_where_the_last_rollout_stopped():
    _, seen = train([[3, 4]], n_steps=5, partial_episodes="bootstrap")
    assert seen.rollouts == [[episode(0, 3) + episode(1, 4)[:2]], [episode(1, 4)[2:] + episode(2, 3)]]


def test_steps_that_environments_spend_on_resets_are_not_recorded():
    # Rows of the rollout: 0 1 2 reset 0 1 2 | 3 reset 0 1 2 reset 0
    model, seen = train_on_next_step_resets([[3, 4], [-3, -4]], n_steps=7, partial_episodes="bootstrap")
    expected = [episode(0, 3) + episode(1, 4)[:3], episode(1, 4)[3:] + episode(2, 3) + episode(3, 4)[:1]]
    assert seen.rollouts == [[steps] * 2 for steps in expected]
    for buffer, masked in zip(seen.buffers, ([3], [1, 5])):
        np.testing.assert_array_equal(np.flatnonzero(~buffer["mask"][:, 0]), masked)
        assert (buffer["rewards"][buffer["mask"]] == 1).all()
    assert [info["l"] for info in model.ep_info_buffer] == [3, 3, 4, 4, 3, 3]
    assert model.num_timesteps == 2 * 2 * 7


@pytest.mark.parametrize(
    "kwargs",
    [{"estimator": "reward_to_go"}, {"estimator": "total_return"}, {"estimator": "gae"}, {"estimator": "td_residual"}],
    ids=lambda kwargs: kwargs["estimator"],
)
@pytest.mark.parametrize("length", [{"n_episodes": 3}, {"n_steps": 1, "partial_episodes": "finish"}], ids=str)
def test_whole_episodes_are_the_same_where_resets_take_a_step(kwargs, length):
    lengths = [[3, -4], [-2, 5], [-1, 1]]
    (_, seen), (_, expected) = (make(lengths, 1, gamma=0.5, **kwargs, **length) for make in (train_on_next_step_resets, train))
    assert seen.rollouts == expected.rollouts
    for n in range(3):
        for name in ("rewards", "steps", "values", "advantages", "returns", "ends"):
            ours, theirs = (one.buffers[0][name][one.buffers[0]["mask"][:, n], n] for one in (seen, expected))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)


def test_finish_records_whole_episodes_only():
    _, seen = train([[3, 4], [2, 2], [9, 1]], n_steps=5, estimator="reward_to_go")
    first, second = seen.rollouts
    assert first == [episode(0, 3) + episode(1, 4), episode(0, 2) + episode(1, 2) + episode(2, 2), episode(0, 9)]
    for recorded in second:
        assert recorded[0][1] == 0, "every environment starts fresh"
        assert len(recorded) >= 5
    lengths = ([3, 4], [2, 2], [9, 1])
    for n, recorded in enumerate(second):
        last_episode, last_step = recorded[-1]
        assert last_step == lengths[n][last_episode % 2] - 1, "the last episode has ended"


def test_with_one_environment_no_step_is_wasted():
    model, seen = train([[3, 4, 5]], n_rollouts=3, n_steps=4, estimator="reward_to_go")
    # The environment is reset for each rollout, as it is for a model that was saved and goes on: episodes 2 and 5 are empty
    assert seen.rollouts == [
        [episode(0, 3) + episode(1, 4)],
        [episode(3, 3) + episode(4, 4)],
        [episode(6, 3) + episode(7, 4)],
    ]
    assert model.num_timesteps == sum(len(steps) for (steps,) in seen.rollouts)


@pytest.mark.parametrize("k", [1, 3])
def test_n_episodes_takes_k_of_each_environment_whatever_their_lengths(k):
    model, seen = train([[2], [5], [11]], estimator="reward_to_go", n_episodes=k)
    for rollout in seen.rollouts:
        for recorded, length in zip(rollout, (2, 5, 11)):
            assert [step for _, step in recorded] == list(range(length)) * k
    assert model.rollout_buffer.n_episodes == model.rollout_buffer.n_segments == 3 * k


@pytest.mark.parametrize("kwargs", [{"n_episodes": 2}, {"n_steps": 4}], ids=str)
def test_what_is_recorded_does_not_favour_short_episodes(kwargs):
    # Of each environment's own episodes a share of one half is short, however long the other environments take
    lengths = [[1, 9], [9, 1], [1, 9], [9, 1]]
    _, seen = train(lengths, n_rollouts=6, estimator="reward_to_go", **kwargs)
    for rollout in seen.rollouts:
        for recorded in rollout:
            begun = sum(step == 0 for _, step in recorded)
            ended = sum(step == lengths[n][e % 2] - 1 for n, r in enumerate(rollout) if r is recorded for e, step in r)
            assert begun == ended, "every recorded episode is whole"
            if "n_episodes" in kwargs:
                assert begun == 2


def test_waiting_counts_as_timesteps_but_not_in_the_episode_statistics():
    model, _ = train([[1], [10]], n_rollouts=1, estimator="reward_to_go", n_episodes=1)
    assert model.num_timesteps == 2 * 10
    assert [info["l"] for info in model.ep_info_buffer] == [1, 10]


def test_an_environment_that_waits_is_reset_and_the_others_too():
    _, seen = train([[1], [3]], estimator="reward_to_go", n_episodes=1)
    first, second = seen.rollouts
    assert first == [[(0, 0)], episode(0, 3)]
    # Environment 0 played three episodes; the second of environment 1 had begun by itself when its first ended
    assert [step for _, step in second[0]] == [0]
    assert [step for _, step in second[1]] == [0, 1, 2]


def test_the_step_index_is_kept_across_rollouts():
    _, seen = train([[7], [3]], n_rollouts=3, n_steps=4)
    steps = np.concatenate([buffer["steps"] for buffer in seen.buffers])
    np.testing.assert_array_equal(steps[:, 0], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(steps[:, 1], [0, 1, 2] * 4)


class StopAt(BaseCallback):
    def __init__(self, n_calls):
        super().__init__()
        self.last_call = n_calls

    def _on_step(self):
        return self.n_calls < self.last_call


@pytest.mark.parametrize("n_calls", [3, 4, 6])
def test_training_goes_on_where_a_callback_stopped_it(n_calls, tmp_path):
    env = DummyVecEnv([lambda: Script(0, [100])])
    model = VPG("MlpPolicy", env, n_steps=4, seed=0).learn(100, callback=StopAt(n_calls))
    model.save(tmp_path / "model")
    for continued in (model, VPG.load(tmp_path / "model", env=env, force_reset=False)):
        seen = Snapshots()
        before = env.envs[0].t
        continued.learn(1, callback=seen, reset_num_timesteps=False)
        np.testing.assert_array_equal(seen.buffers[0]["steps"][:, 0], before + np.arange(4))
        assert seen.rollouts == [[[(0, before + i) for i in range(4)]]]
        env.envs[0].t = before


def test_whole_episodes_begin_anew_after_an_interruption_at_the_first_step():
    class Interrupt(BaseCallback):
        def _on_step(self):
            raise KeyboardInterrupt

    model, seen = train([[3]], n_rollouts=0, n_episodes=1)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1, callback=Interrupt())
    model.learn(1, callback=seen, reset_num_timesteps=False)
    assert seen.rollouts == [[[(1, 0), (1, 1), (1, 2)]]]


@pytest.mark.parametrize("where", ["step", "callback"])
def test_environments_begin_anew_after_an_interruption_in_the_middle_of_a_step(where, monkeypatch):
    model, seen = train([[5]], n_rollouts=1, n_steps=8, estimator="gae")
    env = model.env

    def step_and_interrupt():
        if DummyVecEnv.step_wait(env)[2][0]:
            raise KeyboardInterrupt

    def interrupt_at_an_end(spy):
        if spy.locals["dones"][0]:
            raise KeyboardInterrupt

    callback = None
    if where == "step":
        monkeypatch.setattr(env, "step_wait", lambda: step_and_interrupt() or DummyVecEnv.step_wait(env))
    else:
        callback = Spy(interrupt_at_an_end)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1, callback=callback, reset_num_timesteps=False)
    monkeypatch.undo()
    model.learn(1, callback=seen, reset_num_timesteps=False)
    np.testing.assert_array_equal(seen.buffers[-1]["steps"][:5, 0], np.arange(5))
    assert [step for _, step in seen.rollouts[-1][0]][:5] == list(range(5))


def test_keywords_that_a_callback_changes_hold_from_the_next_rollout_on():
    model, seen = train([[100]], n_rollouts=0, n_steps=4, gamma=0.5, estimator="reward_to_go", partial_episodes="truncate")

    class Change(BaseCallback):
        def _on_rollout_end(self):
            self.model.gamma = 1.0

        def _on_step(self):
            return True

    model.learn(8, callback=[seen, Change()])
    np.testing.assert_allclose([buffer["returns"][0, 0] for buffer in seen.buffers], [1.875, 4.0])


def test_gamma_to_the_t_is_right_in_the_middle_of_an_episode():
    _, seen = train(
        [[100]],
        n_steps=4,
        gamma=0.5,
        estimator="reward_to_go",
        partial_episodes="truncate",
        discount_state_distribution=True,
        normalize_advantage=False,
    )
    to_go = np.array([1.875, 1.75, 1.5, 1])
    np.testing.assert_allclose(seen.buffers[0]["normalized_advantages"][:, 0], to_go * 0.5 ** np.arange(4))
    np.testing.assert_allclose(seen.buffers[1]["normalized_advantages"][:, 0], to_go * 0.5 ** np.arange(4, 8))


@pytest.mark.parametrize("normalize_advantage", [False, True, "batch", "episode"])
def test_callbacks_see_advantages_that_are_not_normalized_yet_as_with_a2c(normalize_advantage):
    _, seen = train([[3, 4], [5]], n_steps=10, normalize_advantage=normalize_advantage)
    for buffer in seen.buffers:
        np.testing.assert_allclose(buffer["advantages"], buffer["returns"] - buffer["values"], rtol=1e-5, atol=1e-6)
        is_normalized = np.allclose(buffer["normalized_advantages"], buffer["advantages"])
        assert is_normalized == (normalize_advantage is False)


def test_the_update_uses_the_advantages_that_callbacks_leave_in_the_buffer():
    class Zero(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.model.rollout_buffer.advantages[:] = 0.0

    model, _ = train([[3, 4], [5]], n_rollouts=0, n_steps=10)
    before = model.policy.action_net.weight.detach().clone()
    model.learn(1, callback=Zero())
    assert th.equal(model.policy.action_net.weight, before)


# ------------------------------------------------------------------------------------------------------------------
# Time limits and the end of the rollout
# ------------------------------------------------------------------------------------------------------------------


def constant_critic(model, value):
    """Make V(s) the same number everywhere, and keep it so."""
    with th.no_grad():
        model.policy.value_net.weight.zero_()
        model.policy.value_net.bias.fill_(value)


def returns_with_constant_critic(lengths, n_steps, value=8.0, **kwargs):
    env = DummyVecEnv([lambda: Script(0, lengths)])
    model = VPG("MlpPolicy", env, n_steps=n_steps, gamma=0.5, normalize_advantage=False, seed=0, device="cpu", **kwargs)
    constant_critic(model, value)
    seen = Snapshots()
    model.learn(n_steps, callback=seen)
    return seen.buffers[0]


def test_with_the_value_function_time_limit_and_rollout_end_are_bootstrapped_and_termination_is_not():
    # An episode that terminates, one with a time limit, one cut by the end of the rollout; gamma V = 4
    buffer = returns_with_constant_critic([2, -2, 5], 6, estimator="reward_to_go", baseline="value")
    np.testing.assert_array_equal(buffer["returns"][:, 0], [1.5, 1, 1 + 5 / 2, 1 + 4, 1 + 5 / 2, 1 + 4])
    np.testing.assert_array_equal(buffer["advantages"][:, 0], buffer["returns"][:, 0] - 8)
    np.testing.assert_array_equal(buffer["rewards"][:, 0], 1)  # as the environment gave them


def test_the_value_at_the_time_limit_is_that_of_the_terminal_observation_not_of_the_reset():
    env = DummyVecEnv([lambda: Script(0, [-3])])
    model = VPG("MlpPolicy", env, n_steps=6, gamma=0.5, normalize_advantage=False, estimator="td_residual", seed=0)
    seen = Snapshots()
    model.learn(6, callback=seen)
    # The weights of the rollout are those before the update
    before = VPG("MlpPolicy", env, seed=0).policy
    with th.no_grad():
        v_terminal = before.predict_values(th.tensor([[0.0, 0, 3], [0, 1, 3]])).numpy().ravel()
        v_reset = before.predict_values(th.tensor([[0.0, 1, 0], [0, 2, 0]])).numpy().ravel()
    np.testing.assert_allclose(seen.buffers[0]["returns"][[2, 5], 0], 1 + 0.5 * v_terminal, rtol=1e-6)
    assert np.abs(v_terminal - v_reset).min() > 1e-3


class TerminalObsInPlace(VecEnvWrapper):
    """Each environment uses the same array for each of its terminal observations."""

    def __init__(self, venv):
        super().__init__(venv)
        self.terminal_obs = np.zeros((venv.num_envs, *venv.observation_space.shape), np.float32)

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        *rest, infos = self.venv.step_wait()
        for info, terminal_obs in zip(infos, self.terminal_obs):
            if "terminal_observation" in info:
                terminal_obs[:] = info["terminal_observation"]
                info["terminal_observation"] = terminal_obs
        return *rest, infos


class Dones(VecEnvWrapper):
    """Gives ``dones`` in one array of another dtype, which it uses again."""

    def __init__(self, venv, dtype):
        super().__init__(venv)
        self.dones = np.zeros(venv.num_envs, dtype)

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        self.dones[:] = dones
        return observations, rewards, self.dones, infos


ODD_ENVIRONMENTS = {
    "terminal observations in place": TerminalObsInPlace,
    **{f"{dtype} dones": partial(Dones, dtype=dtype) for dtype in ("bool", "uint8", "int64", "float32")},
}


@pytest.mark.parametrize("keywords", [{}, {"estimator": "reward_to_go"}, {"n_episodes": 2}], ids=str)
@pytest.mark.parametrize("wrap", ODD_ENVIRONMENTS.values(), ids=ODD_ENVIRONMENTS)
def test_the_arrays_that_environments_give_may_be_used_again_and_of_any_dtype(wrap, keywords):
    lengths = [[-3, 2, -4], [-2, -5], [6, -1]]
    _, expected = train(lengths, n_steps=20, **keywords)
    _, seen = train(lengths, n_steps=20, wrap=wrap, **keywords)
    assert seen.rollouts == expected.rollouts
    for buffer, expected_buffer in zip(seen.buffers, expected.buffers):
        for name, array in expected_buffer.items():
            np.testing.assert_array_equal(buffer[name], array, err_msg=name)


@pytest.mark.parametrize("estimator", ["gae", "td_residual"])
def test_truncate_adds_nothing_at_the_cut(estimator):
    buffer = returns_with_constant_critic([10], 3, estimator=estimator, partial_episodes="truncate", gae_lambda=0.0)
    np.testing.assert_array_equal(buffer["advantages"][:, 0], [1 + 4 - 8, 1 + 4 - 8, 1 - 8])


@pytest.mark.parametrize("baseline", [None, "mean", "time", "leave_one_out"])
@pytest.mark.parametrize("estimator", ["reward_to_go", "total_return"])
def test_without_the_value_function_a_time_limit_ends_an_episode_like_termination(estimator, baseline):
    rollouts = []
    for sign in (1, -1):
        env = DummyVecEnv([lambda n=n, sign=sign: Script(n, [sign * 3, sign * 5]) for n in range(2)])
        model = VPG("MlpPolicy", env, n_episodes=2, estimator=estimator, baseline=baseline, normalize_advantage=False, seed=0)
        seen = Snapshots()
        model.learn(1, callback=seen)
        rollouts.append(seen.buffers[0])
    np.testing.assert_array_equal(rollouts[0]["advantages"], rollouts[1]["advantages"])
    assert not rollouts[1]["values"].any()


def test_whole_episodes_with_the_value_function_still_bootstrap_a_time_limit():
    buffer = returns_with_constant_critic([-2], 2, estimator="reward_to_go", baseline="value", partial_episodes="finish")
    np.testing.assert_array_equal(buffer["returns"][:, 0], [1 + 5 / 2, 1 + 4])


def test_no_rewards_are_lost_or_counted_twice():
    class Rewards(Script):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, float(2 ** (self.t - 1)), *rest

    env = DummyVecEnv([lambda: Rewards(0, [4])])
    model = VPG("MlpPolicy", env, n_episodes=2, estimator="total_return", gamma=1.0, normalize_advantage=False)
    seen = Snapshots()
    model.learn(1, callback=seen)
    np.testing.assert_array_equal(seen.buffers[0]["rewards"][:, 0], [1, 2, 4, 8] * 2)
    np.testing.assert_array_equal(seen.buffers[0]["advantages"][:, 0], 15)


def test_the_buffer_grows_and_get_yields_each_recorded_step_once():
    model, _ = train([[700], [3]], n_rollouts=1, n_steps=2, estimator="reward_to_go", n_episodes=1)
    buffer = model.rollout_buffer
    assert buffer.mask.shape == (700, 2)
    assert buffer.n_recorded == 703
    for shuffle, sizes in ((False, [88] * 7 + [87]), (True, [100] * 7 + [3])):
        batches = list(buffer.get(100, shuffle=shuffle))
        assert [len(batch.returns) for batch in batches] == sizes
        steps = np.concatenate([batch.observations.numpy() for batch in batches])
        assert len(np.unique(steps, axis=0)) == 703
        returns = np.concatenate([batch.returns.numpy() for batch in batches])
        lengths = np.where(steps[:, 0] == 0, 700, 3)
        expected = (1 - model.gamma ** (lengths - steps[:, 2])) / (1 - model.gamma)
        np.testing.assert_allclose(returns, expected, rtol=1e-5)


def test_minibatches_are_shuffled_by_numpys_seed():
    model, _ = train([[20]], n_rollouts=1, n_steps=20)

    def order(seed):
        set_random_seed(seed)
        return [int(step) for batch in model.rollout_buffer.get(5) for step in batch.observations[:, 2]]

    assert order(0) == order(0) != order(1)
    assert order(0) != sorted(order(0)) == list(range(20))

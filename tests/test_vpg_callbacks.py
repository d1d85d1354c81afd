"""Callbacks see and stop what they see and stop with A2C."""

import copy

import numpy as np
import pytest
from helpers.envs import ACTION_SPACES, CountingEnv
from helpers.models import FORMULATIONS, SMALL, Spy, counting_envs, small_model, with_and_without_critic
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_vpg import VPG


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

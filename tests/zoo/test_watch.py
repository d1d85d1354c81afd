"""``watch``: the panels show the numbers of the model itself, the keys work, and films have their frames."""

import signal
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import ACTION_SPACES, CountingEnv
from helpers.films import read_film
from PIL import Image, ImageSequence
from sb3_contrib import ARS, QRDQN, TQC, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_vpg import VPG, MaskableVPG, RecurrentVPG
from sb3_vpg.common.recurrent_runner import zero_states

pygame = pytest.importorskip("pygame", reason="watch needs the extra [render]")

from sb3_vpg.zoo.watch.agents import ContinuousChoice, DiscreteChoice, make_agent  # noqa: E402
from sb3_vpg.zoo.watch.drawing import SIZE, Screen, nice_range  # noqa: E402
from sb3_vpg.zoo.watch.films import write_film  # noqa: E402
from sb3_vpg.zoo.watch.session import Session  # noqa: E402
from sb3_vpg.zoo.watch.window import Window, has_display  # noqa: E402

GAMMA = 0.5
SMALL = {"net_arch": [8]}
SMALL_LSTM = {"net_arch": [8], "lstm_hidden_size": 4}
NO_MEMORY = {"buffer_size": 1}


class PictureEnv(CountingEnv):
    """A :class:`CountingEnv` with pictures, whose brightness is the step, and with masks: actions 0 and 2 are allowed."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}
    render_mode = "rgb_array"

    def render(self):
        return np.full((20, 30, 3), self.t, np.uint8)

    def action_masks(self):
        return np.array([True, False, True])


def vec_env(action_space=None, **kwargs):
    return DummyVecEnv([lambda: PictureEnv(action_space=action_space or spaces.Discrete(3), **kwargs)])


def session_of(model_class, policy="MlpPolicy", action_space=None, deterministic=True, env=None, lengths=(3,), **kwargs):
    """A session of an untrained model."""
    env = env or vec_env(action_space, lengths=lengths)
    # SB3 changes the dict
    kwargs = {"gamma": GAMMA, "policy_kwargs": {**SMALL}, "seed": 0, **kwargs}
    model = model_class(policy, env, **{key: value for key, value in kwargs.items() if value is not None})
    return Session(make_agent(model, env, deterministic), env, GAMMA, seed=0)


# ---------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------


def distribution_at(session, observation):
    policy = session.agent.policy
    return policy.get_distribution(policy.obs_to_tensor(np.array([observation], np.float32))[0]).distribution


def value_at(session, observation):
    policy = session.agent.policy
    return policy.predict_values(policy.obs_to_tensor(np.array([observation], np.float32))[0]).item()


@pytest.mark.parametrize("model_class", [VPG, PPO])
def test_probabilities_are_those_of_the_policy(model_class):
    session = session_of(model_class)
    for t in range(3):
        choice = session.advance().choice
        assert isinstance(choice, DiscreteChoice)
        assert choice.probabilities
        (probabilities,), (taken,) = choice.numbers, choice.taken
        np.testing.assert_allclose(probabilities, distribution_at(session, (0, t)).probs[0].detach())
        assert taken == probabilities.argmax()


def test_probabilities_of_several_dimensions():
    for name, n_values in (("MultiDiscrete", [2, 3]), ("MultiBinary", [2, 2, 2])):
        choice = session_of(VPG, action_space=ACTION_SPACES[name]).advance().choice
        assert [len(part) for part in choice.numbers] == n_values
        for part, taken in zip(choice.numbers, choice.taken):
            assert part.sum() == pytest.approx(1)
            assert part[taken] == part.max()


@pytest.mark.parametrize("use_sde", [False, True])
def test_the_gaussian_is_that_of_the_policy(use_sde):
    session = session_of(VPG, action_space=ACTION_SPACES["Box"], deterministic=False, use_sde=use_sde)
    # A mean outside of the action space, whose bounds are -2 and 1
    with th.no_grad():
        session.agent.policy.action_net.bias[0] = 9.0
    choice = session.advance().choice
    assert isinstance(choice, ContinuousChoice)
    distribution = distribution_at(session, (0, 0))
    np.testing.assert_allclose(choice.mean, distribution.mean[0].detach())
    np.testing.assert_allclose(choice.std, distribution.stddev[0].detach())
    np.testing.assert_array_equal((choice.low, choice.high), [[-2, -2], [1, 1]])
    np.testing.assert_array_equal(choice.action, session.env.envs[0].actions[0])
    assert choice.mean[0] > 8
    assert choice.action[0] == 1


@pytest.mark.parametrize("time_limit", [False, True])
def test_the_advantage_is_the_td_residual_with_the_true_successor(time_limit):
    env = vec_env(lengths=(3,), time_limit=time_limit)
    session = session_of(A2C, env=env)
    steps = session.advance(4).steps
    assert [step.t for step in steps] == [0, 1, 2, 0]
    assert [step.reward for step in steps] == [1, 2, 3, 1]
    assert [step.episode_return for step in steps] == [1, 3, 6, 1]
    for (episode, t), step in zip([(0, 0), (0, 1), (0, 2), (1, 0)], steps):
        successor = value_at(session, (episode, t + 1)) if t < 2 or time_limit else 0.0
        assert step.value == pytest.approx(value_at(session, (episode, t)))
        assert step.advantage == pytest.approx(t + 1 + GAMMA * successor - step.value, abs=1e-5)


@pytest.mark.parametrize("model_class", [RecurrentVPG, RecurrentPPO])
@pytest.mark.parametrize("shared", [False, True])
def test_the_values_of_a_recurrent_model_have_the_states_of_its_lstm(model_class, shared):
    policy_kwargs = {**SMALL_LSTM, "shared_lstm": shared, "enable_critic_lstm": not shared}
    session = session_of(model_class, "MlpLstmPolicy", lengths=(4,), policy_kwargs=policy_kwargs)
    steps = session.advance(8).steps
    # Both episodes as one sequence
    obs = th.tensor([[episode, t] for episode in range(2) for t in range(4)], dtype=th.float32)
    starts = th.tensor([1.0, 0, 0, 0] * 2)
    policy = session.agent.policy
    values, *_ = policy.evaluate_actions(obs, th.zeros(8), zero_states(policy, 1), starts)
    assert [step.value for step in steps] == pytest.approx(values.flatten().tolist(), abs=1e-5)
    for i, step in enumerate(steps):
        successor = 0.0 if step.t == 3 else steps[i + 1].value
        assert step.advantage == pytest.approx(step.reward + GAMMA * successor - step.value, abs=1e-5)


@pytest.mark.parametrize("model_class", [MaskableVPG, MaskablePPO])
def test_masked_actions_have_probability_0(model_class):
    session = session_of(model_class, deterministic=False)
    # As after learn()
    session.agent.model.use_masking = True
    for _ in range(6):
        choice = session.advance().choice
        assert choice.numbers[0][1] < 1e-7
        assert choice.numbers[0].sum() == pytest.approx(1)
        np.testing.assert_array_equal(choice.allowed[0], [True, False, True])
        assert choice.taken[0] in (0, 2)


def test_a_formulation_without_value_function_shows_none():
    session = session_of(VPG, estimator="reward_to_go")
    step = session.advance().steps[0]
    assert (step.value, step.advantage, session.agent.value_label) == (None, None, "")
    # The policy has a network for it, which is not trained
    assert session.agent.policy.predict_values(th.zeros(1, 2)).shape == (1, 1)


@pytest.mark.parametrize("model_class", [DQN, QRDQN])
def test_q_values_are_those_of_the_model(model_class):
    session = session_of(model_class, **NO_MEMORY)
    frame = session.advance()
    obs = th.zeros(1, 2)
    policy = session.agent.policy
    expected = (policy.q_net(obs) if model_class is DQN else policy.quantile_net(obs).mean(dim=1))[0].detach().numpy()
    assert not frame.choice.probabilities
    np.testing.assert_allclose(frame.choice.numbers[0], expected)
    assert frame.choice.taken == [expected.argmax()]
    assert frame.steps[0].value == pytest.approx(expected.max())
    assert frame.steps[0].advantage is None


@pytest.mark.parametrize("model_class", [DDPG, TD3, SAC, TQC, CrossQ])
def test_the_q_value_is_that_of_the_action(model_class):
    session = session_of(model_class, action_space=ACTION_SPACES["Box"], **NO_MEMORY)
    frame = session.advance()
    assert frame.choice.mean is None
    # The space is [-2, 1]
    scaled = th.as_tensor((frame.choice.action[None] + 0.5) / 1.5)
    critics = session.agent.policy.critic(th.zeros(1, 2), scaled)
    expected = critics.mean() if model_class is TQC else min(critics)
    assert frame.steps[0].value == pytest.approx(expected.item(), abs=1e-5)
    assert frame.steps[0].advantage is None


@pytest.mark.parametrize("action_space", ["Discrete", "Box"])
def test_of_other_models_the_action_is_shown(action_space):
    session = session_of(ARS, "LinearPolicy", ACTION_SPACES[action_space], gamma=None, policy_kwargs=None)
    frame = session.advance()
    assert frame.steps[0].value is None
    Screen("ARS", session.agent.value_label, 1.0, False, True).draw(frame)


def test_rewards_are_normalized_for_the_advantage_only():
    env = VecFrameStack(VecNormalize(vec_env(), norm_obs=False, training=False, gamma=GAMMA), 2)
    env.venv.ret_rms.var = np.array(4.0)
    step = session_of(A2C, env=env, policy_kwargs=None).advance().steps[0]
    assert step.reward == 1
    session = session_of(A2C, env=env, policy_kwargs=None)
    first, second = session.advance(2).steps
    assert first.advantage == pytest.approx(0.5 + GAMMA * second.value - first.value, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Sessions, keys
# ---------------------------------------------------------------------------------------------------------------


def test_the_picture_is_of_the_state_in_which_the_agent_acts():
    session = session_of(VPG)
    brightness = [int(session.advance().image[0, 0, 0]) for _ in range(4)]
    assert brightness == [0, 1, 2, 0]


def test_starting_over_repeats_the_session():
    env = DummyVecEnv([lambda: gym.make("CartPoleSwingUp-v0", render_mode="rgb_array")])
    session = session_of(VPG, env=env, deterministic=False)
    first = session.advance(3)
    session.next_episode()
    assert session.advance().episode == 2
    session.start_over()
    again = session.advance(3)
    assert again.steps == first.steps
    assert again.episode == 1
    np.testing.assert_array_equal(again.image, first.image)


def test_the_end_of_an_episode_is_reported(capsys):
    session = session_of(VPG, env=vec_env(lengths=(2,), time_limit=True))
    assert session.advance(2).previous_episode == ""
    frame = session.advance()
    assert (frame.episode, frame.previous_episode) == (2, "return 3.0, 2 steps, time limit")
    assert "Episode 1: return 3.0, 2 steps, time limit" in capsys.readouterr().out


@pytest.fixture
def window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    session = session_of(VPG, lengths=(100,))
    yield Window(session, Screen("VPG", "V(s)", GAMMA, False, True), fps=1000)
    pygame.quit()


def press(window, *keys):
    for key in keys:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))
        window.refresh()


def test_keys_pause_and_step(window, monkeypatch):
    assert has_display()
    if sys.platform == "linux":
        for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
            monkeypatch.delenv(name, raising=False)
        assert not has_display()
    shown = window.n_steps
    press(window, pygame.K_SPACE)
    assert window.paused
    press(window, pygame.K_RIGHT, pygame.K_s)
    assert (window.n_steps, window.frame.steps[-1].t) == (shown + 2, 2)
    press(window, pygame.K_SPACE)
    assert not window.paused
    # A step also pauses
    press(window, pygame.K_RIGHT)
    assert window.paused


def test_keys_choose_the_episode(window):
    press(window, pygame.K_RIGHT, pygame.K_n)
    assert (window.frame.episode, window.frame.steps[-1].t) == (2, 0)
    press(window, pygame.K_r)
    assert (window.frame.episode, len(window.frame.steps)) == (1, 1)


@pytest.mark.parametrize("key", [pygame.K_q, pygame.K_ESCAPE, None])
def test_keys_close_the_window(window, key):
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key) if key else pygame.event.Event(pygame.QUIT))
    window.run()
    assert not window.open


def test_the_window_closes_after_n_steps(window):
    window.run(50)
    # 1000 steps per second: 20 for each picture
    assert 50 <= window.n_steps <= 50 + 20


def test_the_window_shows_what_the_film_shows(window):
    press(window, pygame.K_n)
    shown = np.transpose(pygame.surfarray.array3d(pygame.display.get_surface()), (1, 0, 2))
    window.screen.draw(window.frame, window.paused)
    window.refresh()
    assert (shown != window.screen.image()).any()
    shown = np.transpose(pygame.surfarray.array3d(pygame.display.get_surface()), (1, 0, 2))
    np.testing.assert_array_equal(shown, window.screen.image())


# ---------------------------------------------------------------------------------------------------------------
# Drawing, films
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_values", [1, 2, 300])
def test_any_number_of_actions_is_drawn(n_values):
    session = session_of(VPG, action_space=spaces.Discrete(n_values), lengths=(300,))
    screen = Screen("VPG", "V(s)", GAMMA, False, False)
    screen.draw(session.advance(250))
    assert screen.image().shape == (SIZE[1], SIZE[0], 3)


@pytest.mark.parametrize("n_dimensions", [1, 4, 40])
def test_any_number_of_gaussians_is_drawn(n_dimensions):
    session = session_of(VPG, action_space=spaces.Box(-1, 1, (n_dimensions,)))
    Screen("VPG", "V(s)", GAMMA, False, False).draw(session.advance())


def test_axes_end_at_round_numbers():
    assert nice_range([0.13, 0.98]) == pytest.approx((0.1, 1.0))
    assert nice_range([-87.0, 4.0]) == pytest.approx((-90, 10))
    assert nice_range([1.0]) == pytest.approx((0.95, 1.05), abs=0.011)
    low, high = nice_range([0.0])
    assert low < 0 < high


# 100 steps per second: a GIF has 25 frames per second, an MP4 50
@pytest.mark.parametrize(("suffix", "n_frames"), [(".gif", 3), (".mp4", 5)])
def test_a_film_runs_at_the_speed_of_the_environment(tmp_path, suffix, n_frames):
    session = session_of(VPG, lengths=(100,))
    write_film(tmp_path / f"film{suffix}", session, Screen("VPG", "V(s)", GAMMA, False, False), 100, n_steps=10)
    frames = read_film(tmp_path / f"film{suffix}")
    assert len(frames) == n_frames
    assert all(frame.shape == (SIZE[1], SIZE[0], 3) for frame in frames)
    assert (frames[0] != frames[-1]).any()
    assert session.t == 10


@pytest.mark.parametrize("fps", [15, 24, 30])
def test_a_gif_lasts_as_long_as_the_steps(tmp_path, fps):
    session = session_of(VPG, lengths=(100,))
    write_film(tmp_path / "film.gif", session, Screen("VPG", "V(s)", GAMMA, False, False), fps, n_steps=30)
    with Image.open(tmp_path / "film.gif") as film:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]
    assert sum(durations) == pytest.approx(1000 * 30 / fps, abs=5)


class NoPicture(PictureEnv):
    metadata = {"render_modes": ["ansi"]}

    def render(self):
        raise self.error


@pytest.mark.parametrize("error", [AssertionError("unsupported render mode"), NotImplementedError()])
def test_an_environment_without_a_picture_is_an_error(error):
    NoPicture.error = error
    session = session_of(VPG, env=DummyVecEnv([NoPicture]))
    with pytest.raises(ValueError, match="The environment has no picture"):
        session.advance()


def test_ctrl_c_ends_a_film_and_keeps_it(tmp_path, monkeypatch):
    session = session_of(VPG, lengths=(100,))
    steps = [session.advance() for _ in range(3)]

    def advance(n_steps):
        if len(steps) == 1:
            signal.raise_signal(signal.SIGINT)
        return steps.pop(0)

    monkeypatch.setattr(session, "advance", advance)
    write_film(tmp_path / "film.gif", session, Screen("VPG", "V(s)", GAMMA, False, False), 25, n_steps=10)
    assert len(read_film(tmp_path / "film.gif")) == 3
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

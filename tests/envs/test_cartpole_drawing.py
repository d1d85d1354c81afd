"""Pictures of the swing-up show where cart and pole are, and the force."""

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled
from helpers.cartpole import HANGING, V0, full_force, make, one_and_many

from sb3_vpg.envs import cartpole_drawing as drawing


def picture(state, share=0.0):
    """A picture of one environment in about this state, with this force."""
    env = gym.make(V0, render_mode="rgb_array")
    env.reset(options={"mean": state, "std": 0})
    if share:
        env.step(full_force(env, share))
    return env.render()


def place(frame, color):
    """Mean row and column of the pixels of a color, and their number."""
    rows, columns = (frame == color).all(axis=-1).nonzero()
    return rows.mean(), columns.mean(), len(rows)


def test_a_picture_is_an_array_of_its_own():
    env = gym.make(V0, render_mode="rgb_array")
    env.reset(options=HANGING)
    frame = env.render()
    before = frame.copy()
    assert (frame.shape, frame.dtype) == ((400, 600, 3), np.uint8)
    env.step(full_force(env))
    assert (env.render() != before).any()
    np.testing.assert_array_equal(frame, before)
    env.close()


def test_the_cart_is_where_it_is():
    # 600 pixels for 5 m
    for x in (-2.0, -1.0, 0.0, 0.5, 2.0):
        assert place(picture([x, 0, np.pi, 0]), drawing.CART)[1] == pytest.approx(299.5 + 120 * x, abs=1)


@pytest.mark.parametrize(("angle", "right", "up"), [(0, 0, 1), (np.pi / 2, -1, 0), (np.pi, 0, -1), (-np.pi / 4, 0.7, 0.7)])
def test_the_pole_points_where_it_does(angle, right, up):
    # A positive angle is counter-clockwise; the middle of the pole is 0.3 m from the hinge
    row, column, _ = place(picture([0, 0, angle, 0]), drawing.POLE)
    assert (column - 299.5, 0.55 * 400 - row) == (pytest.approx(36 * right, abs=4), pytest.approx(36 * up, abs=4))


def test_an_arrow_shows_the_force():
    assert not (picture([0, 0, 0, 0]) == drawing.ARROW).all(axis=-1).any()
    sizes = {}
    for share in (-1.0, -0.5, 0.5, 1.0, 7.0):
        frame = picture([0, 0, 0, 0], share)
        _, column, sizes[share] = place(frame, drawing.ARROW)
        assert np.sign(column - place(frame, drawing.CART)[1]) == np.sign(share)
    assert sizes[0.5] < sizes[1.0] == sizes[7.0]
    assert sizes[-0.5] < sizes[-1.0]


def test_the_arrow_is_gone_after_a_reset():
    for num_envs in (None, 2):
        env = make(V0, num_envs, render_mode="rgb_array")
        env.reset()
        env.step(full_force(env))
        assert (np.array(env.render()) == drawing.ARROW).all(axis=-1).any()
        env.reset()
        assert not (np.array(env.render()) == drawing.ARROW).all(axis=-1).any()


def test_many_environments_give_a_picture_each():
    envs = make(V0, 3, render_mode="rgb_array")
    envs.reset()
    states = np.array([[-1.0, 0, 0, 0], [0.0, 0, 2, 0], [1.5, 0, 4, 0]])
    envs.state = states.T.copy()
    envs.step(np.array([[0.0], [-1.0], [0.5]], dtype=np.float32))
    frames = envs.render()
    assert isinstance(frames, tuple)
    for frame, state, share in zip(frames, states, (1e-9, -1.0, 0.5)):
        np.testing.assert_array_equal(frame, picture(state, share))
    envs.close()
    envs.close()


def test_a_window_opens_and_closes(monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gym.make(V0, render_mode="human")
    for move, share in ((lambda: env.reset(options=HANGING), 0.0), (lambda: env.step(full_force(env)), 1.0)):
        move()
        # Without a call of render()
        window = pygame.surfarray.array3d(pygame.display.get_surface()).transpose(1, 0, 2)
        np.testing.assert_array_equal(window, picture([0, 0, np.pi, 0], share))
    assert env.render() is None
    env.close()
    env.close()
    assert not pygame.display.get_init()


@one_and_many
def test_without_a_render_mode_there_is_a_warning_and_no_picture(num_envs):
    env = make(V0, num_envs)
    env.reset()
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.unwrapped.render() is None


@one_and_many
def test_a_missing_pygame_is_named_with_the_command_that_installs_it(num_envs, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    env = make(V0, num_envs, render_mode="rgb_array")
    env.reset()
    with pytest.raises(DependencyNotInstalled, match=r"pip install 'sb3_vpg\[render\]'"):
        env.render()

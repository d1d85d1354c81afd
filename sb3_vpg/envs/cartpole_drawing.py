"""Rendering of the cart-pole swing-up. pygame is imported when a renderer is created."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import DependencyNotInstalled

from sb3_vpg.envs.cartpole_physics import POLE_LENGTH, TRACK_LIMIT

WIDTH, HEIGHT = 600, 400  # pixels
WORLD_WIDTH = 5.0  # m
# The image is drawn larger and scaled down, since pygame does not smooth the edges of filled shapes
OVERSAMPLING = 2
SCALE = OVERSAMPLING * WIDTH / WORLD_WIDTH  # pixels per m
TRACK_HEIGHT = 0.55 * HEIGHT * OVERSAMPLING

CART_WIDTH, CART_HEIGHT = 1 / 3, 1 / 6  # m
POLE_WIDTH = 0.05  # m
ARROW_LENGTH = 0.6  # m, at the maximum force

SKY = (250, 250, 247)
TRACK = (150, 154, 160)
STOP = (196, 78, 82)
CART = (55, 71, 92)
WHEEL = (33, 40, 52)
POLE = (221, 132, 82)
HINGE = (245, 222, 179)
ARROW = (85, 168, 104)


class Renderer:
    """
    Draws states of the swing-up, in a window or into an array.

    :param fps: frames per second of the window; None for arrays
    :raises gymnasium.error.DependencyNotInstalled: if pygame is not installed
    """

    def __init__(self, fps: int | None = None):
        try:
            import pygame
        except ImportError as error:
            raise DependencyNotInstalled("Rendering the swing-up needs pygame: pip install 'sb3_vpg[render]'") from error
        self._pygame = pygame
        self._fps = fps
        self._canvas = pygame.Surface((WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING))
        if fps is None:
            self._target = pygame.Surface((WIDTH, HEIGHT))
        else:
            pygame.display.init()
            pygame.display.set_caption("CartPoleSwingUp")
            self._target = pygame.display.set_mode((WIDTH, HEIGHT))
            self._clock = pygame.time.Clock()

    def show(self, state: npt.NDArray[Any], action: float) -> npt.NDArray[np.uint8] | None:
        """
        :param state: position [m], velocity [m/s], angle [rad], angular velocity [rad/s], shape (4,)
        :param action: force divided by the maximum force, clipped to [-1, 1]
        :return: the image, shape (height, width, 3); None if it was drawn in a window
        """
        self._draw(float(state[0]), float(state[2]), min(max(float(action), -1.0), 1.0))
        self._pygame.transform.smoothscale(self._canvas, self._target.get_size(), self._target)
        if self._fps is None:
            return np.transpose(self._pygame.surfarray.array3d(self._target), (1, 0, 2))
        self._pygame.event.pump()
        self._clock.tick(self._fps)
        self._pygame.display.flip()
        return None

    def _draw(self, position: float, angle: float, force: float) -> None:
        draw, canvas = self._pygame.draw, self._canvas
        canvas.fill(SKY)

        def pixel(x: float, y: float) -> tuple[float, float]:
            """Convert meters, with y upward from the hinge, to pixels of the canvas."""
            return canvas.get_width() / 2 + x * SCALE, TRACK_HEIGHT - y * SCALE

        def box(x: float, y: float, width: float, height: float, color: tuple[int, int, int], radius: float = 0.0) -> None:
            corner = pixel(x - width / 2, y + height / 2)
            draw.rect(canvas, color, (*corner, width * SCALE, height * SCALE), border_radius=round(radius * SCALE))

        wheel = CART_HEIGHT / 4
        rail = -CART_HEIGHT / 2 - 2 * wheel
        box(0, rail, 2 * TRACK_LIMIT, 0.015, TRACK)
        for meter in range(-2, 3):
            box(meter, rail - 0.03, 0.012, 0.06 if meter else 0.1, TRACK)
        for side in (-1, 1):
            box(side * TRACK_LIMIT, rail + 0.06, 0.03, 0.15, STOP, radius=0.01)

        if abs(force) > 0.01:
            direction = math.copysign(1.0, force)
            root, y = position + direction * CART_WIDTH / 2, 0.0
            tip = root + ARROW_LENGTH * force
            head = min(0.1, abs(tip - root))
            box((root + tip - direction * head) / 2, y, abs(tip - root) - head, 0.03, ARROW)
            draw.polygon(canvas, ARROW, [pixel(tip, y), *(pixel(tip - direction * head, y + s * 0.06) for s in (-1, 1))])

        for side in (-1, 1):
            center = pixel(position + side * CART_WIDTH / 3.2, -CART_HEIGHT / 2 - wheel)
            draw.circle(canvas, WHEEL, center, wheel * SCALE)
        box(position, 0, CART_WIDTH, CART_HEIGHT, CART, radius=0.03)

        along = (-math.sin(angle), math.cos(angle))
        across = (along[1] * POLE_WIDTH / 2, -along[0] * POLE_WIDTH / 2)
        tip_x, tip_y = position + POLE_LENGTH * along[0], POLE_LENGTH * along[1]
        corners = [(position, 0.0, 1), (tip_x, tip_y, 1), (tip_x, tip_y, -1), (position, 0.0, -1)]
        draw.polygon(canvas, POLE, [pixel(x + s * across[0], y + s * across[1]) for x, y, s in corners])
        for x, y in ((position, 0.0), (tip_x, tip_y)):
            draw.circle(canvas, POLE, pixel(x, y), POLE_WIDTH / 2 * SCALE)
        draw.circle(canvas, HINGE, pixel(position, 0), POLE_WIDTH / 3 * SCALE)

    def close(self) -> None:
        """Close the window, if any."""
        if self._fps is not None:
            self._pygame.display.quit()

"""Show a session in a window, with keys."""

import math
import os
import sys

import pygame

from sb3_vpg.zoo.watch.drawing import SIZE, Screen
from sb3_vpg.zoo.watch.session import Session

#: Most pictures per second
MAX_FPS = 50


def has_display() -> bool:
    """:return: whether a window can be seen, or the environment variable SDL_VIDEODRIVER chooses where windows are drawn"""
    if sys.platform == "linux" and os.environ.keys().isdisjoint(("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")):
        # SDL would print that there is none
        return False
    try:
        pygame.display.init()
    except pygame.error:
        return False
    # Where there is no display, SDL falls back to this driver
    return "SDL_VIDEODRIVER" in os.environ or pygame.display.get_driver() != "offscreen"


class Window:
    """
    A window in which an agent runs at the speed of its environment.

    :param session: the agent and its environment
    :param screen: draws the frames
    :param fps: steps per second
    """

    def __init__(self, session: Session, screen: Screen, fps: float):
        self.session, self.screen = session, screen
        pygame.display.init()
        pygame.display.set_caption(screen.title)
        self._window = pygame.display.set_mode(SIZE)
        self._clock = pygame.time.Clock()
        self._steps_per_picture = math.ceil(fps / MAX_FPS)
        self._fps = fps / self._steps_per_picture
        self.open, self.paused = True, False
        self.n_steps = 0
        self._advance(1)
        self.keys = {
            pygame.K_SPACE: self.pause,
            pygame.K_RIGHT: self.step,
            pygame.K_s: self.step,
            pygame.K_n: self.next_episode,
            pygame.K_r: self.start_over,
            pygame.K_q: self.close,
            pygame.K_ESCAPE: self.close,
        }

    def run(self, n_steps: int | None = None) -> None:
        """
        :param n_steps: number of steps after which the window closes, >= 1; None: when the user closes it
        """
        while self.open:
            self.refresh()
            if not self.paused:
                if n_steps is not None and self.n_steps >= n_steps:
                    self.close()
                else:
                    self._advance(self._steps_per_picture)

    def refresh(self) -> None:
        """Draw the last step, and handle the keys."""
        self._window.blit(self.screen.draw(self.frame, self.paused), (0, 0))
        pygame.display.flip()
        self._clock.tick(self._fps)
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                self.close()
            elif event.type == pygame.KEYDOWN and event.key in self.keys:
                self.keys[event.key]()

    def _advance(self, n_steps: int) -> None:
        self.frame = self.session.advance(n_steps)
        self.n_steps += n_steps

    def pause(self) -> None:
        """Pause, or go on."""
        self.paused = not self.paused

    def step(self) -> None:
        """Pause, and take one step."""
        self.paused = True
        self._advance(1)

    def next_episode(self) -> None:
        """Leave the episode, and show the first step of the next one."""
        self.session.next_episode()
        self._advance(1)

    def start_over(self) -> None:
        """Show the first step of the first episode."""
        self.session.start_over()
        self._advance(1)

    def close(self) -> None:
        """Close the window."""
        self.open = False

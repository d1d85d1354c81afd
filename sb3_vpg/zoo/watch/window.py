"""Show a session in a window, with keys."""

import math
import os

import pygame

from sb3_vpg.zoo.watch.drawing import SIZE, Screen
from sb3_vpg.zoo.watch.session import Frame, Session

#: Most pictures per second
MAX_FPS = 50


def has_display() -> bool:
    """:return: whether a window can be seen, or the environment variable SDL_VIDEODRIVER chooses where windows are drawn"""
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
        self.n_steps = 0
        self.open, self.paused = True, False
        self._frame: Frame | None = None
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
        while self.open and (n_steps is None or self.n_steps < n_steps):
            self.refresh()

    def refresh(self) -> None:
        """Handle the keys, take the steps of one picture unless paused, and draw it."""
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                self.close()
            elif event.type == pygame.KEYDOWN and event.key in self.keys:
                self.keys[event.key]()
        if not self.paused or self._frame is None:
            self._advance(self._steps_per_picture)
        self._window.blit(self.screen.draw(self._frame, self.paused), (0, 0))
        pygame.display.flip()
        self._clock.tick(self._fps)

    def _advance(self, n_steps: int) -> None:
        self._frame = self.session.advance(n_steps)
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

"""Draw a frame: the environment's picture, the choice of the action, and curves. The same picture is for window and film."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pygame

from sb3_vpg.envs.cartpole_drawing import ARROW, CART, HINGE, POLE, SKY, STOP, TRACK, WHEEL
from sb3_vpg.zoo.watch.agents import ContinuousChoice, DiscreteChoice
from sb3_vpg.zoo.watch.session import N_STEPS_SHOWN, Frame

Color = tuple[int, int, int]

SIZE = (1000, 520)  # pixels
MARGIN = 20
PICTURE = pygame.Rect(MARGIN, 76, 600, 400)
# The panels: the choice of the action, and two curves
LEFT, RIGHT = PICTURE.right + 30, SIZE[0] - MARGIN
CHOICE = pygame.Rect(LEFT, 48, RIGHT - LEFT, 146)
GUTTER = 40  # for the numbers of the vertical axes
CURVES = [pygame.Rect(LEFT + GUTTER, top, RIGHT - LEFT - GUTTER, 96) for top in (242, 386)]
#: Heights of the fonts. pygame has the font, so that pictures look the same everywhere
LARGE, MEDIUM, SMALL = 26, 21, 17
WHITE = (255, 255, 255)
GRID = (226, 227, 226)
TEXT = WHEEL
FAINT = (120, 125, 132)
TAKEN = ARROW
#: Space that the picture of a Gaussian has beyond the bounds of the action, as a fraction of their distance
BEYOND = 0.25
#: Least height of a row that shows mean, standard deviation and action as numbers
ROW_WITH_NUMBERS = 60
KEYS_SHOWN = (("space", "pause"), ("right", "one step"), ("n", "next episode"), ("r", "start over"), ("q", "quit"))


class Screen:
    """
    A picture of an agent.

    :param title: algorithm and environment
    :param value_label: "V(s)" or "Q(s, a)"; empty if the model has no values
    :param gamma: discount factor
    :param normalized: whether values are in units of normalized rewards
    :param with_keys: whether to show the keys
    """

    def __init__(self, title: str, value_label: str, gamma: float, normalized: bool, with_keys: bool):
        pygame.font.init()
        self.surface = pygame.Surface(SIZE)
        self.title, self.value_label, self.gamma, self.with_keys = title, value_label, gamma, with_keys
        self.unit = "normalized rewards" if normalized else ""
        self._fonts = {size: pygame.font.Font(None, size) for size in (LARGE, MEDIUM, SMALL)}

    def draw(self, frame: Frame, paused: bool = False) -> pygame.Surface:
        """
        :param frame: what to show
        :param paused: whether to say that the agent is paused
        :return: the picture; the next call draws over it
        """
        self.surface.fill(SKY)
        self._draw_header(frame)
        self._draw_picture(frame.image)
        self._draw_keys(paused)
        if isinstance(frame.choice, DiscreteChoice):
            self._draw_bars(frame.choice)
        else:
            self._draw_gaussians(frame.choice)
        rewards = [step.reward for step in frame.steps]
        # All steps have the same numbers: those that the model has
        values = [step.value for step in frame.steps if step.value is not None]
        advantages = [step.advantage for step in frame.steps if step.advantage is not None]
        starts = [i for i, step in enumerate(frame.steps) if step.t == 0]
        above, below = CURVES
        if not values:
            self._draw_curve(above, "Reward", "", rewards, starts)
            self._draw_curve(below, "Return", "so far", [step.episode_return for step in frame.steps], starts)
            caption = "The model has no value function"
        elif not advantages:
            self._draw_curve(above, self.value_label, self.unit, values, starts)
            self._draw_curve(below, "Reward", "", rewards, starts)
            caption = ""
        else:
            self._draw_curve(above, self.value_label, self.unit, values, starts)
            self._draw_signed(below, "Advantage", self.unit, advantages, starts)
            caption = f"one-step TD residual: r + {self.gamma:g} V(s') - V(s)"
        self._write(caption, (LEFT, below.bottom + 9), SMALL, FAINT)
        return self.surface

    def image(self) -> npt.NDArray[np.uint8]:
        """:return: the picture that was drawn last, shape (height, width, 3)"""
        return np.frombuffer(pygame.image.tobytes(self.surface, "RGB"), np.uint8).reshape(SIZE[1], SIZE[0], 3)

    # -----------------------------------------------------------------------------------------------------------
    # Left: header, picture, keys
    # -----------------------------------------------------------------------------------------------------------

    def _draw_header(self, frame: Frame) -> None:
        step = frame.steps[-1]
        title = self._write(self.title, (MARGIN, 18), LARGE)
        previous = f"previous episode: {frame.previous_episode}" if frame.previous_episode else ""
        if self._fonts[SMALL].size(previous)[0] < PICTURE.right - title.right - 18:
            self._write(previous, (PICTURE.right, 22), SMALL, FAINT, align="right")
        numbers = (("episode", f"{frame.episode}"), ("step", f"{step.t + 1}"), ("reward", f"{step.reward:.2f}"))
        x = MARGIN
        for name, number in (*numbers, ("return", f"{step.episode_return:.1f}")):
            self._write(name, (x, 50), SMALL, FAINT)
            x = self._write(number, (x + self._fonts[SMALL].size(name)[0] + 6, 47), MEDIUM).right + 18

    def _draw_picture(self, image: npt.NDArray[np.uint8]) -> None:
        picture = pygame.surfarray.make_surface(np.transpose(image, (1, 0, 2)))
        place = picture.get_rect().fit(PICTURE)
        self.surface.blit(pygame.transform.smoothscale(picture, place.size), place)
        pygame.draw.rect(self.surface, GRID, place, width=1)

    def _draw_keys(self, paused: bool) -> None:
        x, y = MARGIN, SIZE[1] - 31
        for key, effect in KEYS_SHOWN if self.with_keys else ():
            box = self._write(key, (x + 6, y), SMALL)
            pygame.draw.rect(self.surface, TRACK, box.inflate(10, 8), width=1, border_radius=4)
            x = self._write(effect, (box.right + 10, y), SMALL, FAINT).right + 18
        if paused:
            self._write("paused", (PICTURE.right, y - 2), MEDIUM, STOP, align="right")

    # -----------------------------------------------------------------------------------------------------------
    # Top right: the choice of the action
    # -----------------------------------------------------------------------------------------------------------

    def _draw_bars(self, choice: DiscreteChoice) -> None:
        """One bar for each value of each dimension. The one that was taken is green."""
        self._write("Action probabilities" if choice.probabilities else "Q-values of the actions", (LEFT, 18), MEDIUM)
        self._draw_legend()
        n_places = sum(map(len, choice.numbers)) + len(choice.numbers) - 1
        room = min(CHOICE.width / n_places, 90)
        low, high = (0.0, 1.0) if choice.probabilities else nice_range(np.concatenate(choice.numbers).tolist())
        base = CHOICE.bottom - 18
        x = CHOICE.left + (CHOICE.width - room * n_places) / 2
        pygame.draw.line(self.surface, TRACK, (CHOICE.left, base), (CHOICE.right - 1, base))
        if low:
            # Bars do not begin at zero: say where
            self._write(f"{low:.4g}", (CHOICE.left, base + 5), SMALL, FAINT)
        for part, taken, allowed in zip(choice.numbers, choice.taken, choice.allowed):
            for i, number in enumerate(part):
                height = round((number - low) / (high - low) * (base - CHOICE.top - 18))
                bar = pygame.Rect(round(x + room * 0.12), base - height, max(round(room * 0.76), 1), height)
                pygame.draw.rect(self.surface, TAKEN if i == taken else CART, bar, border_radius=min(3, bar.width // 3))
                color = TAKEN if i == taken else TEXT if allowed[i] else TRACK
                middle = round(x + room / 2)
                self._write_if_room(str(i), (middle, base + 5), room, color)
                self._write_if_room(f"{number:.2f}" if allowed[i] else "masked", (middle, bar.top - 15), room, color)
                x += room
            x += room

    def _draw_gaussians(self, choice: ContinuousChoice) -> None:
        """One row for each dimension: the Gaussian, its mean, and the action that was taken."""
        self._write("Action" if choice.mean is None else "Gaussian of the action", (LEFT, 18), MEDIUM)
        self._draw_legend()
        row_height = CHOICE.height / len(choice.action)
        # pygame does not draw NumPy's numbers
        numbers = np.stack([array for array in choice if array is not None], axis=1, dtype=np.float64).tolist()
        for i, dimension in enumerate(numbers):
            row = pygame.Rect(CHOICE.left, round(CHOICE.top + i * row_height), CHOICE.width, round(row_height))
            self._draw_gaussian(row, *dimension)
            if 24 <= row.height < ROW_WITH_NUMBERS:
                self._write(f"a[{i}]", (row.left, row.top), SMALL, FAINT)

    def _draw_gaussian(
        self, row: pygame.Rect, action: float, low: float, high: float, mean: float | None = None, std: float = 0.0
    ) -> None:
        text_height = 16 if row.height >= 34 else 0
        baseline = row.bottom - text_height - 2
        height = baseline - row.top - (20 if row.height >= ROW_WITH_NUMBERS else 2)
        first, last = low - BEYOND * (high - low), high + BEYOND * (high - low)

        def x_of(number: float) -> float:
            return row.left + (min(max(number, first), last) - first) / (last - first) * (row.width - 1)

        if mean is not None:
            xs = np.linspace(first, last, row.width)
            ys = baseline - height * np.exp(-0.5 * ((xs - mean) / max(std, 1e-6)) ** 2)
            bell = [(row.left + i, y) for i, y in enumerate(ys)]
            pygame.draw.polygon(self.surface, HINGE, [(row.left, baseline), *bell, (row.right - 1, baseline)])
            pygame.draw.aalines(self.surface, POLE, False, bell)
            if first <= mean <= last:
                pygame.draw.line(self.surface, POLE, (x_of(mean), baseline), (x_of(mean), baseline - height), 2)
            else:
                # An arrow points to a mean that is far outside
                tip, y = x_of(mean), baseline - height / 2
                base = tip - math.copysign(10, mean - low)
                pygame.draw.polygon(self.surface, POLE, [(tip, y), (base, y - 6), (base, y + 6)])
        pygame.draw.line(self.surface, TRACK, (row.left, baseline), (row.right - 1, baseline))
        for bound in (low, high):
            pygame.draw.line(self.surface, TRACK, (x_of(bound), baseline - 4), (x_of(bound), baseline + 4))
            if text_height:
                self._write(f"{bound:g}", (round(x_of(bound)), baseline + 5), SMALL, FAINT, align="center")
        pygame.draw.line(self.surface, TAKEN, (x_of(action), baseline), (x_of(action), baseline - height), 3)
        pygame.draw.circle(self.surface, TAKEN, (x_of(action), baseline - height), 4)
        if row.height >= ROW_WITH_NUMBERS:
            text = f"action {action:.2f}" if mean is None else f"mean {mean:.2f}   std {std:.2f}   action {action:.2f}"
            self._write(text, (row.left, row.top), SMALL, TEXT)

    def _draw_legend(self) -> None:
        box = self._write("taken", (RIGHT, 21), SMALL, TAKEN, align="right")
        pygame.draw.circle(self.surface, TAKEN, (box.left - 9, box.centery), 4)

    # -----------------------------------------------------------------------------------------------------------
    # Bottom right: curves
    # -----------------------------------------------------------------------------------------------------------

    def _draw_curve(self, place: pygame.Rect, title: str, unit: str, numbers: Sequence[float], starts: list[int]) -> None:
        points = self._draw_axes(place, title, unit, numbers, starts, nice_range(numbers))
        for begin, end in itertools.pairwise([0, *starts, len(points)]):
            if end - begin > 1:
                pygame.draw.lines(self.surface, POLE, False, points[begin:end], 2)
        pygame.draw.circle(self.surface, POLE, points[-1], 4)

    def _draw_signed(self, place: pygame.Rect, title: str, unit: str, numbers: Sequence[float], starts: list[int]) -> None:
        low, high = nice_range([*numbers, 0.0])
        points = self._draw_axes(place, title, unit, numbers, starts, (low, high))
        zero = place.bottom - (0.0 - low) / (high - low) * place.height
        for (x, y), number in zip(points, numbers):
            pygame.draw.line(self.surface, ARROW if number > 0 else STOP, (x, zero), (x, y), 2)
        pygame.draw.line(self.surface, TRACK, (place.left, zero), (place.right - 1, zero))

    def _draw_axes(
        self,
        place: pygame.Rect,
        title: str,
        unit: str,
        numbers: Sequence[float],
        starts: list[int],
        limits: tuple[float, float],
    ) -> list[tuple[float, float]]:
        """
        :param starts: indices of the numbers at which an episode begins
        :param limits: lowest and highest number on the axis
        :return: the points of the numbers
        """
        low, high = limits
        box = self._write(title, (LEFT, place.top - 24), MEDIUM)
        self._write(unit, (box.right + 8, place.top - 21), SMALL, FAINT)
        last = f"{numbers[-1]:.3f}" if abs(numbers[-1]) < 100 else f"{numbers[-1]:.1f}"
        self._write(last, (place.right, place.top - 24), MEDIUM, align="right")
        pygame.draw.rect(self.surface, WHITE, place)
        pygame.draw.rect(self.surface, GRID, place, width=1)

        def x_of(i: int) -> float:
            return place.left + 2 + i / (N_STEPS_SHOWN - 1) * (place.width - 6)

        for i in starts:
            for y in range(place.top, place.bottom, 6):
                pygame.draw.line(self.surface, TRACK, (x_of(i), y), (x_of(i), y + 2))
        self._write(f"{high:.4g}", (place.left - 6, place.top), SMALL, FAINT, align="right")
        self._write(f"{low:.4g}", (place.left - 6, place.bottom - 12), SMALL, FAINT, align="right")
        return [(x_of(i), place.bottom - (number - low) / (high - low) * place.height) for i, number in enumerate(numbers)]

    # -----------------------------------------------------------------------------------------------------------
    # Text
    # -----------------------------------------------------------------------------------------------------------

    def _write(self, text: str, at: tuple[int, int], size: int, color: Color = TEXT, align: str = "left") -> pygame.Rect:
        """
        :param at: top of the text, and its left end, center or right end
        :return: where the text is
        """
        rendered = self._fonts[size].render(text, True, color)
        box = rendered.get_rect(top=at[1])
        setattr(box, {"left": "left", "center": "centerx", "right": "right"}[align], at[0])
        self.surface.blit(rendered, box)
        return box

    def _write_if_room(self, text: str, at: tuple[int, int], room: float, color: Color) -> None:
        if self._fonts[SMALL].size(text)[0] < room:
            self._write(text, at, SMALL, color, align="center")


def nice_range(numbers: Sequence[float]) -> tuple[float, float]:
    """
    :param numbers: at least one number
    :return: a range of round numbers that has these within
    """
    low, high = min(numbers), max(numbers)
    # A constant is drawn as a line in the middle, not as noise
    spread = max(high - low, 0.1 * max(abs(low), abs(high)), 1e-6)
    middle = (low + high) / 2
    low, high = min(low, middle - spread / 2), max(high, middle + spread / 2)
    unit = 10 ** math.floor(math.log10(spread))
    unit *= next(factor for factor in (0.2, 0.5, 1.0) if spread / (unit * factor) <= 10)
    return math.floor(low / unit) * unit, math.ceil(high / unit) * unit

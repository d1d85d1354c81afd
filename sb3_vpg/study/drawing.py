"""Numbers, tables and panels of a study's report."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from sb3_vpg.study.statistics import Estimate

PANELS_IN_A_ROW = 4
GREY, COLOR = "0.55", "C0"
SMALL, MEDIUM = 7, 9


def number(value: float, digits: int) -> str:
    """With so many digits after the point, and never minus zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def digits_for(scale: float) -> int:
    """
    :param scale: the range of scores, of which about a hundredth is to be seen
    """
    return max(0, 2 - math.floor(math.log10(scale)))


def interval(estimate: Estimate, scale: float) -> str:
    """
    :param scale: as ``digits_for`` takes it
    :return: the mean and, over more than one seed, the interval
    """
    mean, low, high = (number(value, digits_for(scale)) for value in estimate[:3])
    return f"{mean} [{low}, {high}]" if estimate.n_seeds > 1 else mean


def with_seeds(texts: Sequence[str], n_seeds: Sequence[int]) -> list[str]:
    """
    :return: the texts, with the number of seeds where it is less than that of others, and that of the others
    """
    most = max(n_seeds)
    return [f"{text} (n = {n})" if 0 < n < most else text for text, n in zip(texts, n_seeds)] + [str(most)]


def from_to(n_seeds: Sequence[int]) -> str:
    return str(min(n_seeds)) if min(n_seeds) == max(n_seeds) else f"{min(n_seeds)} to {max(n_seeds)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(figure: Figure, title: str, file: Path) -> str:
    """
    Save a figure, with few colours, which makes the file a third as large.

    :return: the markdown that shows it
    """
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=100)
    Image.open(full).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
    return f"![{title}]({file.name})"


def file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text) + ".png"


# Figures


def grid_of_panels(names: Sequence[str], title: str) -> tuple[Figure, dict[str, Axes]]:
    """
    :return: a figure, and a panel for each name, all with the same axes
    """
    n_columns = min(len(names), PANELS_IN_A_ROW)
    n_rows = math.ceil(len(names) / n_columns)
    figure = Figure(figsize=(10, 0.7 + 1.6 * n_rows), layout="constrained")
    panels = list(figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flat)
    for name, panel in zip(names, panels):
        panel.set_title(name, fontsize=SMALL + 1)
        panel.tick_params(labelsize=SMALL)
        panel.grid(alpha=0.3)
    # The last of its column need not be in the last row
    for panel in panels[len(names) - n_columns : len(names)]:
        panel.tick_params(labelbottom=True)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=MEDIUM + 1)
    return figure, dict(zip(names, panels))


def draw_line(panel: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    """
    :param y: of shape (3, len(x)): the line, and the lower and upper ends of the band around it
    """
    panel.fill_between(x, y[1], y[2], color=color, alpha=0.25, linewidth=0)
    panel.plot(x, y[0], color=color, linewidth=1.2)


def small_multiples(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray, int]], first: str, title: str
) -> tuple[Figure, list[Axes]]:
    """
    One panel for each formulation, with the line of the first one in grey in all of them.

    :param lines: for each formulation x, y as ``draw_line`` takes it, and the number of seeds
    """
    named = title + (f" (grey: {first})" if first in lines else "")
    figure, panels = grid_of_panels(list(lines), named)
    for formulation, panel in panels.items():
        if first in lines:
            draw_line(panel, *lines[first][:2], GREY)
        if formulation != first:
            draw_line(panel, *lines[formulation][:2], COLOR)
        panel.set_title(f"{formulation}, n = {lines[formulation][2]}", fontsize=SMALL + 1)
    return figure, list(panels.values())


# Sections: each returns its markdown

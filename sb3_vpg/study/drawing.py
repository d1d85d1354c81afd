"""Format the numbers, tables and figures of a study's report."""

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
GRAY, COLOR = "0.55", "C0"
SMALL, MEDIUM = 7, 9


def format_number(value: float, digits: int) -> str:
    """:return: the number with this many digits after the point; zero without a minus sign"""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def digits_for(scale: float) -> int:
    """
    :param scale: the width of the range of scores
    :return: number of digits after the point that shows about a hundredth of the range
    """
    return max(0, 2 - math.floor(math.log10(scale)))


def format_estimate(estimate: Estimate, scale: float) -> str:
    """
    :param estimate: the estimate
    :param scale: see :func:`digits_for`
    :return: the mean and, if there is more than one seed, the interval
    """
    mean, low, high = (format_number(value, digits_for(scale)) for value in estimate[:3])
    return f"{mean} [{low}, {high}]" if estimate.n_seeds > 1 else mean


def add_seed_counts(texts: Sequence[str], n_seeds: Sequence[int]) -> list[str]:
    """
    :param texts: cells of a row
    :param n_seeds: number of seeds of each cell
    :return: the cells, with "(n = ...)" for fewer seeds than the maximum, and a cell with the maximum
    """
    most = max(n_seeds)
    return [f"{text} (n = {n})" if 0 < n < most else text for text, n in zip(texts, n_seeds)] + [str(most)]


def format_range(n_seeds: Sequence[int]) -> str:
    """:return: the range of the numbers as text, such as "3 to 5"; a single number if all are equal"""
    return str(min(n_seeds)) if min(n_seeds) == max(n_seeds) else f"{min(n_seeds)} to {max(n_seeds)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """:return: a markdown table"""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save_figure(figure: Figure, title: str, file: Path) -> str:
    """
    Save a figure with 64 colors, which reduces the size of the file to a third.

    :return: markdown that shows the figure
    """
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=100)
    Image.open(full).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
    return f"![{title}]({file.name})"


def file_name(text: str) -> str:
    """:return: the name of a PNG file, without special characters"""
    return re.sub(r"[^\w.-]", "_", text) + ".png"


# Figures


def grid_of_panels(names: Sequence[str], title: str) -> tuple[Figure, dict[str, Axes]]:
    """:return: a figure, and a panel for each name; all panels share their axes"""
    n_columns = min(len(names), PANELS_IN_A_ROW)
    n_rows = math.ceil(len(names) / n_columns)
    figure = Figure(figsize=(10, 0.7 + 1.6 * n_rows), layout="constrained")
    panels = list(figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flat)
    for name, panel in zip(names, panels):
        panel.set_title(name, fontsize=SMALL + 1)
        panel.tick_params(labelsize=SMALL)
        panel.grid(alpha=0.3)
    # The lowest panel of a column may be in the last row but one
    for panel in panels[len(names) - n_columns : len(names)]:
        panel.tick_params(labelbottom=True)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=MEDIUM + 1)
    return figure, dict(zip(names, panels))


def draw_line(panel: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    """:param y: the line, and the lower and upper ends of the band around it, shape (3, len(x))"""
    panel.fill_between(x, y[1], y[2], color=color, alpha=0.25, linewidth=0)
    panel.plot(x, y[0], color=color, linewidth=1.2)


def small_multiples(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray, int]], first: str, title: str
) -> tuple[Figure, list[Axes]]:
    """
    Draw one panel for each formulation. Each panel also has the line of the first formulation, in gray.

    :param lines: for each formulation x and y (see :func:`draw_line`), and the number of seeds
    :param first: name of the first formulation
    :param title: title of the figure
    """
    full_title = title + (f" (gray: {first})" if first in lines else "")
    figure, panels = grid_of_panels(list(lines), full_title)
    for formulation, panel in panels.items():
        if first in lines:
            draw_line(panel, *lines[first][:2], GRAY)
        if formulation != first:
            draw_line(panel, *lines[formulation][:2], COLOR)
        panel.set_title(f"{formulation}, n = {lines[formulation][2]}", fontsize=SMALL + 1)
    return figure, list(panels.values())

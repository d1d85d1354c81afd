"""Parts of a report (texts, tables, charts), and their forms: Markdown with pictures, and one HTML file."""

import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image

#: Largest number of lines in one panel of a picture. With more, each line has a panel, with the first line in gray
MAX_LINES = 6
PANELS_IN_A_ROW = 4
SMALL, MEDIUM = 8, 9
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Table:
    """
    :param header: names of the columns
    :param rows: cells; ``**bold**`` is allowed
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def are_numbers(self) -> list[bool]:
        """:return: whether the cells of each column are numbers; those of the first one are not"""
        columns = list(zip(self.header, *self.rows))[1:]
        return [False, *(all(re.match(r"\**[-+]?\d|-( /|$)|$", cell) for cell in cells) for _, *cells in columns)]


@dataclass(frozen=True)
class Chart:
    """
    Lines with bands, or points with intervals.

    :param name: name of the picture
    :param title: title
    :param x_label: label of the horizontal axis
    :param lines: for each label x and y, shape (3 + n, len(x)): the line, the lower and upper ends of its band, n thin lines.
    :param intervals: for each label, and each name of a group, a value and the ends of its interval
    """

    name: str
    title: str
    x_label: str
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, tuple[float, float, float]]] = field(default_factory=dict)

    @property
    def picture(self) -> str:
        """Name of the file with the picture."""
        return re.sub(r"[^\w.-]", "_", self.name) + ".png"


@dataclass(frozen=True)
class Section:
    """
    :param heading: heading of the section
    :param parts: texts (Markdown), tables and charts
    """

    heading: str
    parts: Sequence[str | Table | Chart]


def charts_of(sections: Sequence[Section]) -> list[Chart]:
    """:return: the charts, as they follow each other"""
    return [part for section in sections for part in section.parts if isinstance(part, Chart)]


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """:return: the text of a report, which refers to the pictures of its charts"""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.heading}")
        for part in section.parts:
            if isinstance(part, Table):
                alignments = ["---:" if are_numbers else "---" for are_numbers in part.are_numbers()]
                lines = [[cell.replace("|", "\\|") for cell in line] for line in (part.header, *part.rows)]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in (lines[0], alignments, *lines[1:])))
            elif isinstance(part, Chart):
                parts.append(f"![{part.title}]({part.picture})")
            else:
                parts.append(part)
    return "\n\n".join(parts) + "\n"


def write_markdown(title: str, sections: Sequence[Section], path: Path) -> None:
    """Write a report as Markdown, and its charts as pictures beside it."""
    for chart in charts_of(sections):
        save_picture(draw_lines(chart) if chart.lines else draw_intervals(chart), path.parent / chart.picture)
    path.write_text(as_markdown(title, sections), encoding="utf-8")


def write_html(title: str, sections: Sequence[Section], path: Path) -> None:
    """Write a report as one HTML file that needs no other file and no network."""
    content = MarkdownIt("commonmark", {"html": False}).enable("table").render(as_markdown(title, sections))
    content = re.sub("<p><img .*?></p>", "<figure></figure>", content)
    # "</" would end the script
    data = json.dumps([_chart_data(chart) for chart in charts_of(sections)], separators=(",", ":")).replace("</", "<\\/")
    text = TEMPLATE.read_text(encoding="utf-8")
    for key, value in (("TITLE", html.escape(title)), ("CONTENT", content), ("DATA", data)):
        text = text.replace(f"{{{{{key}}}}}", value)
    path.write_text(text, encoding="utf-8")


def _chart_data(chart: Chart) -> dict[str, Any]:
    def rounded(values: Any) -> Any:
        return [float(f"{value:.5g}") for value in values]

    lines = [{"label": label, "x": rounded(x), "y": [*map(rounded, y)]} for label, (x, y) in chart.lines.items()]
    intervals = [
        {"label": label, "groups": {group: rounded(ends) for group, ends in groups.items()}}
        for label, groups in chart.intervals.items()
    ]
    return {"title": chart.title, "xLabel": chart.x_label, "lines": lines, "intervals": intervals}


def save_picture(figure: Figure, path: Path) -> None:
    """Save a figure with 128 colors, which reduces the size of the file to a third."""
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=100)
    # An octree keeps the colors of thin lines
    octree = Image.Quantize.FASTOCTREE
    Image.open(full).convert("RGB").quantize(128, octree, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_lines(chart: Chart) -> Figure:
    """:return: all lines in one panel, or one panel for each line, see :data:`MAX_LINES`"""
    labels = list(chart.lines)
    if len(labels) <= MAX_LINES:
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, label in enumerate(labels):
            _draw_line(axes, *chart.lines[label], f"C{i}", label)
        axes.legend(fontsize=SMALL)
        panels = [axes]
    else:
        n_rows = math.ceil(len(labels) / PANELS_IN_A_ROW)
        figure = Figure(figsize=(10, 0.7 + 1.6 * n_rows), layout="constrained")
        panels = list(figure.subplots(n_rows, PANELS_IN_A_ROW, sharex=True, sharey=True).flat)
        for label, axes in zip(labels, panels):
            _draw_line(axes, *chart.lines[labels[0]], "0.55")
            if label != labels[0]:
                _draw_line(axes, *chart.lines[label], "C0")
            axes.set_title(label, fontsize=SMALL)
        for axes in panels[len(labels) :]:
            axes.set_visible(False)
    for axes in panels:
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.3)
    if panels[0].dataLim.x1 >= 1000:
        panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel(chart.x_label, fontsize=MEDIUM)
    gray = f" (gray: {labels[0]})" if len(labels) > MAX_LINES else ""
    figure.suptitle(chart.title + gray, fontsize=MEDIUM + 1)
    return figure


def _draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str | None = None) -> None:
    axes.fill_between(x, y[1], y[2], color=color, alpha=0.2, linewidth=0)
    axes.plot(x, y[3:].T, color=color, alpha=0.5, linewidth=0.5)
    axes.plot(x, y[0], color=color, linewidth=1.2, label=label)


def draw_intervals(chart: Chart) -> Figure:
    """:return: a row for each label, with a point and an interval for each group"""
    labels, groups = list(chart.intervals), list(dict.fromkeys(group for of in chart.intervals.values() for group in of))
    figure = Figure(figsize=(8, 1.1 + max(0.3, 0.1 * len(groups)) * len(labels)), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(groups):
        rows = [row for row, label in enumerate(labels) if group in chart.intervals[label]]
        mean, low, high = np.array([chart.intervals[labels[row]][group] for row in rows]).T
        y = np.array(rows) + 0.75 * (i - (len(groups) - 1) / 2) / len(groups)
        axes.hlines(y, low, high, color=f"C{i}", linewidth=1.5)
        axes.plot(mean, y, "o", color=f"C{i}", markersize=4, label=group)
    axes.set_yticks(range(len(labels)), labels, fontsize=SMALL)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.set_xlabel(chart.x_label, fontsize=MEDIUM)
    axes.grid(axis="x", alpha=0.3)
    lowest, highest = axes.get_xlim()
    if lowest < 0 < highest:
        axes.axvline(0, color="0.5", linewidth=0.8, zorder=0)
    if len(groups) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(groups), 5), fontsize=SMALL)
    figure.suptitle(chart.title, fontsize=MEDIUM + 1)
    return figure

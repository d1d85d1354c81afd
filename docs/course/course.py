"""
What the notebooks of the course share: colors, lines of source code, exercises, moving pictures, and a small MDP.
"""

import base64
import inspect
import io
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sb3_vpg.estimators import Rollout

# The networks are small: more threads only wait for each other
th.set_num_threads(1)
# pygame draws into arrays here, and needs no display
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

INK, GRAY, LIGHT = "#22303c", "#8a949e", "#dfe3e8"
BLUE, ORANGE, GREEN, RED, VIOLET, GOLD = (
    "#3b6fb6",
    "#dd8452",
    "#3f9b6c",
    "#c44e52",
    "#8a63b0",
    "#c9a227",
)
#: The same color for the same formulation in all notebooks
COLORS = {
    "total_return": RED,
    "reward_to_go": ORANGE,
    "mean": GOLD,
    "time": GREEN,
    "leave_one_out": BLUE,
    "value": VIOLET,
    "td_residual": GRAY,
    "gae": INK,
}
plt.rcParams.update(
    {
        "axes.axisbelow": True,
        "axes.edgecolor": GRAY,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, VIOLET, GOLD]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "figure.figsize": (7.5, 3.4),
        "font.size": 10,
        "grid.color": LIGHT,
        "grid.linewidth": 0.7,
        "legend.edgecolor": "white",
        "text.color": INK,
        "xtick.color": GRAY,
        "xtick.labelcolor": INK,
        "ytick.color": GRAY,
        "ytick.labelcolor": INK,
    }
)


# ---------------------------------------------------------------------------------------------------------------
# The code that computes an equation
# ---------------------------------------------------------------------------------------------------------------


def source(function: Callable[..., Any], *excerpts: str) -> None:
    """
    Print the source code of a function without its docstring.

    :param function: a function of sb3_vpg, or of this module
    :param excerpts: texts; only lines that contain one of them are printed. Each must be there.
    """
    lines, first = inspect.getsourcelines(function)
    code = "".join(lines)
    for excerpt in excerpts:
        if excerpt not in code:
            raise ValueError(f"{excerpt!r} is not in {function.__qualname__}")
    documented = range(0)
    if function.__doc__:
        begin = code[: code.index('"""')].count("\n")
        documented = range(begin, begin + function.__doc__.count("\n") + 1)
    shown = [
        (first + i, line)
        for i, line in enumerate(lines)
        if i not in documented
        and (not excerpts or any(excerpt in line for excerpt in excerpts))
    ]
    indent = min(len(line) - len(line.lstrip()) for _, line in shown if line.strip())
    print(f"# {function.__module__.replace('.', '/')}.py")
    for n, line in shown:
        print(f"{n:4}  {line[indent:].rstrip()}".rstrip())


# ---------------------------------------------------------------------------------------------------------------
# Exercises
# ---------------------------------------------------------------------------------------------------------------


def attempt(
    check: Callable[[Callable[..., Any]], None], answer: Callable[..., Any]
) -> None:
    """
    Test the reader's answer.

    :param check: test of an answer; raises an AssertionError if the answer is wrong
    :param answer: function that the reader writes; raises a NotImplementedError as long as it is not written
    """
    try:
        check(answer)
    except NotImplementedError:
        print(
            "Not written yet. Write your answer in the cell above, run it, then run this cell again."
        )
    else:
        print("Correct.")


def rejects(
    check: Callable[[Callable[..., Any]], None], answer: Callable[..., Any]
) -> bool:
    """:return: whether the test finds an answer wrong"""
    try:
        check(answer)
    except AssertionError:
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------
# Moving pictures: without an internet connection and without a script from elsewhere
# ---------------------------------------------------------------------------------------------------------------


def film(
    images: Iterable[np.ndarray], fps: float, alt: str, n_colors: int = 64
) -> HTML:
    """
    :param images: RGB images of one size, shape (height, width, 3)
    :param fps: images per second
    :param alt: description of the film
    :param n_colors: number of colors. Fewer: a smaller film.
    :return: an animated GIF
    """
    frames = [_reduced(image, n_colors) for image in images]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=1000 / fps,
        loop=0,
        optimize=True,
    )
    return HTML(
        f'<img alt="{alt}" src="data:image/gif;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


def drawn(
    draw: Callable[[Figure, Any], None],
    frames: Iterable[Any],
    size: tuple[float, float],
    dpi: int = 85,
) -> list[np.ndarray]:
    """
    :param draw: draws one frame into an empty figure
    :param frames: one argument of ``draw`` for each frame
    :param size: width and height of the figure in inches
    :param dpi: dots per inch
    :return: one RGB image for each frame
    """
    figure = plt.figure(figsize=size, dpi=dpi)
    images = []
    for frame in frames:
        figure.clear()
        draw(figure, frame)
        figure.canvas.draw()
        images.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    return images


def dial(
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    alt: str,
    start: int = 0,
    n_colors: int = 64,
) -> HTML:
    """
    :param images: RGB images of one size
    :param labels: what the dial shows beside each image
    :param alt: description of the picture
    :param start: index of the image that is shown first
    :param n_colors: number of colors. Fewer: a smaller page.
    :return: a slider that chooses one of the images, and a button that moves it
    """
    pictures = []
    for index, (image, label) in enumerate(zip(images, labels)):
        buffer = io.BytesIO()
        _reduced(image, n_colors).save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        hidden = "" if index == start else " hidden"
        pictures.append(
            f'<img alt="{alt}: {label}" title="{label}" src="data:image/png;base64,{data}"{hidden}>'
        )
    show = (
        "const f=this.parentNode,n=+this.value;[...f.querySelectorAll('img')].forEach((e,i)=>{e.hidden=i!=n;"
        "if(i==n)f.querySelector('output').value=e.title})"
    )
    play = (
        "const r=this.parentNode.querySelector('input');if(this.timer){clearInterval(this.timer);this.timer=0;return}"
        "this.timer=setInterval(()=>{r.value=(+r.value+1)%(+r.max+1);r.oninput()},250)"
    )
    return HTML(
        f'<div>{"".join(pictures)}<br><button type="button" onclick="{play}">play / stop</button> '
        f'<input type="range" style="width:60%" aria-label="{alt}" min="0" max="{len(pictures) - 1}" value="{start}" '
        f'oninput="{show}"> <output>{labels[start]}</output></div>'
    )


def _reduced(image: np.ndarray, n_colors: int) -> Image.Image:
    # This method keeps the color of a thin line, which covers few pixels
    return Image.fromarray(image).quantize(
        n_colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )


# ---------------------------------------------------------------------------------------------------------------
# An MDP whose every trajectory can be enumerated
# ---------------------------------------------------------------------------------------------------------------

N_STATES, N_ACTIONS, HORIZON = 5, 2, 3
#: Reward of each action in each state
REWARDS = np.array([[1.0, -2.0], [3.0, 0.0], [-1.0, 2.0], [0.0, 4.0], [5.0, -3.0]])
#: The states to which a state leads; none from 3 and 4, which end the episode
SUCCESSORS = {0: (1, 2), 1: (3, 4), 2: (3, 4)}
#: Probability of the second of these states, for each action
P_SECOND = {0: (0.3, 0.8), 1: (0.6, 0.1), 2: (0.5, 0.9)}


class Trajectories(NamedTuple):
    """
    Every trajectory of the MDP, one per column.

    :param states: shape (3, 32)
    :param actions: shape (3, 32)
    :param rewards: shape (3, 32)
    :param luck: product of the probabilities of the state transitions, shape (32,)
    """

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    luck: np.ndarray


def all_trajectories() -> Trajectories:
    """:return: the 32 trajectories: three actions, and two state transitions with two outcomes each"""
    columns = []
    for *actions, second, third in np.ndindex(2, 2, 2, 2, 2):
        states, luck = [0], 1.0
        for action, outcome in zip(actions, (second, third)):
            p = P_SECOND[states[-1]][action]
            luck *= p if outcome else 1 - p
            states.append(SUCCESSORS[states[-1]][outcome])
        columns.append((states, actions, REWARDS[states, actions], luck))
    states, actions, rewards, luck = map(np.array, zip(*columns))
    return Trajectories(states.T, actions.T, rewards.T, luck)


def true_values(pi: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """
    :param pi: probability of each action in each state, shape (5, 2)
    :param gamma: discount factor
    :return: Q(s, a), the expected return of action a in state s, shape (5, 2), and V(s), its mean over the actions, shape (5,)
    """
    q, v = REWARDS.copy(), np.zeros(N_STATES)
    for state in (4, 3, 2, 1, 0):
        for action in range(N_ACTIONS):
            for outcome, successor in enumerate(SUCCESSORS.get(state, ())):
                p = P_SECOND[state][action]
                q[state, action] += gamma * (p if outcome else 1 - p) * v[successor]
        v[state] = pi[state] @ q[state]
    return q, v


TRAJECTORIES = all_trajectories()


def probability_of_action_1(theta: np.ndarray) -> np.ndarray:
    """:return: probability of action 1 in each state, for one weight per state, shape (5,)"""
    return 1 / (1 + np.exp(-theta))


def probabilities(theta: np.ndarray) -> np.ndarray:
    """:return: probability of each trajectory, shape (32,)"""
    p = probability_of_action_1(theta)[TRAJECTORIES.states]
    return TRAJECTORIES.luck * np.where(TRAJECTORIES.actions == 1, p, 1 - p).prod(
        axis=0
    )


def scores(theta: np.ndarray) -> np.ndarray:
    """:return: grad log P(a_t | s_t) at each step of each trajectory, shape (3, 32, 5)"""
    x = np.eye(N_STATES)[TRAJECTORIES.states]
    return (TRAJECTORIES.actions - probability_of_action_1(theta)[TRAJECTORIES.states])[
        ..., None
    ] * x


def gradients(theta: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """:return: sum over t of factors_t grad log P(a_t | s_t), for each trajectory, shape (32, 5)"""
    return np.einsum("tn,tnd->nd", factors, scores(theta))


def rollout(
    values: np.ndarray | None = None, columns: Sequence[int] = range(32)
) -> Rollout:
    """
    :param values: V of each state, shape (5,); None for zeros
    :param columns: indices of trajectories
    :return: these trajectories, as the estimators of sb3_vpg read them
    """
    states, rewards = TRAJECTORIES.states[:, columns], TRAJECTORIES.rewards[:, columns]
    v = (np.zeros(N_STATES) if values is None else values)[states]
    next_v = np.vstack([v[1:], np.zeros(len(columns))])
    steps = np.broadcast_to(np.arange(HORIZON)[:, None], v.shape)
    return Rollout(
        rewards,
        v,
        next_v,
        last=steps == HORIZON - 1,
        mask=np.ones(v.shape, dtype=bool),
        steps=steps,
    )


def draw_mdp(axes: Axes) -> None:
    """Draw states, rewards and transitions."""
    places = {0: (0, 0.5), 1: (1, 0), 2: (1, 1), 3: (2, 0), 4: (2, 1)}
    action_colors = (BLUE, ORANGE)
    for state, (x, y) in places.items():
        for action, color in enumerate(action_colors):
            for outcome, successor in enumerate(SUCCESSORS.get(state, ())):
                p = P_SECOND[state][action]
                axes.annotate(
                    "",
                    (places[successor][0] - 0.08, places[successor][1]),
                    (x + 0.08, y),
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": color,
                        "linewidth": 4 * (p if outcome else 1 - p),
                        "connectionstyle": f"arc3,rad={0.12 if action else -0.12}",
                        "shrinkA": 6,
                        "shrinkB": 8,
                    },
                )
        axes.scatter(x, y, s=700, color="white", edgecolor=INK, zorder=3)
        axes.text(x, y, state, ha="center", va="center", fontsize=13, zorder=4)
        for action, color in enumerate(action_colors):
            axes.text(
                x,
                y + (0.22 if action else -0.26),
                f"{REWARDS[state, action]:+.0f}",
                color=color,
                ha="center",
                va="center",
            )
    for action, color in enumerate(action_colors):
        axes.text(2.55, 0.6 - 0.2 * action, f"action {action}", color=color)
    axes.set(xlim=(-0.25, 3), ylim=(-0.4, 1.4))
    axes.axis("off")

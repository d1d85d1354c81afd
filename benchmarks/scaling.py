"""
Scaling of the cost of training: VPG compared with A2C, MlpPolicy on CartPole-v1, one thread.

    python benchmarks/scaling.py --output scaling.json --plot scaling.png
    python benchmarks/scaling.py --part memory

- envs: frames per second with 1 to 4096 environments in a NativeVecEnv, and up to 256 in a DummyVecEnv; 32 steps of each per
  rollout, two hidden layers of 64.
- memory: increase of the peak memory of a process (resident set size on Linux) by training, with rollouts of 32 x 8, 32 x 256,
  128 x 256, 128 x 2048 and 512 x 2048 steps. Each measurement runs in a new process. A small model is trained there first, so
  that one-time allocations of the libraries are not included.
- width: frames per second with two hidden layers of 64 to 1024; 256 environments in a NativeVecEnv, 32 steps of each.

VPG runs with gae and one critic pass, like A2C, and without a critic (reward_to_go). The algorithms are measured in turns;
output is the median over the rounds. The learning rate is 0; throughput.py explains why.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th
from contestants import Setting, make_env, make_model, training
from harness import frames_per_second, in_processes, save

Measurement = tuple[str, Setting]

A2C, VPG, NO_CRITIC = "A2C", "VPG, gae", "VPG, reward_to_go"
LABELS = {A2C: "A2C", VPG: "VPG", NO_CRITIC: "VPG, no critic"}
COLORS = {A2C: "#c44e20", VPG: "#1f5fa8", NO_CRITIC: "#2a8f5b"}


class Part(NamedTuple):
    title: str
    unit: str
    x_label: str
    x: Callable[[Setting], int]
    x_ticks: list[int]
    #: measurements for each x; those of a group are made in turns
    groups: list[list[Measurement]]


class Result(NamedTuple):
    part: str
    contestant: str
    setting: Setting
    #: value of each round
    values: list[float]


PARTS = {
    "envs": Part(
        "Speed, number of environments",
        "frames/s",
        "environments",
        lambda setting: setting.n_envs,
        [1, 8, 64, 512, 4096],
        [
            [(name, Setting(n, native=True)) for name in (A2C, VPG, NO_CRITIC)]
            + [(name, Setting(n)) for name in (A2C, VPG) if n <= 256]
            for n in (2**k for k in range(13))
        ],
    ),
    "memory": Part(
        "Memory of training",
        "MiB",
        "steps in a rollout",
        lambda setting: setting.n_frames,
        [1_000, 10_000, 100_000, 1_000_000],
        [
            [(name, Setting(n, native=True, n_steps=n_steps)) for name in (A2C, VPG)]
            for n_steps, n in ((32, 8), (32, 256), (128, 256), (128, 2048), (512, 2048))
        ],
    ),
    "width": Part(
        "Speed, width of the network",
        "frames/s",
        "units in each hidden layer",
        lambda setting: setting.width,
        [64, 128, 256, 512, 1024],
        [
            [(name, Setting(256, native=True, width=width)) for name in (A2C, VPG, NO_CRITIC)]
            for width in (64, 128, 256, 512, 1024)
        ],
    ),
}


def speed(measurement: Measurement, seconds: float) -> float:
    """:return: frames per second"""
    contestant, setting = measurement
    return frames_per_second(training(make_model(setting, contestant, learning_rate=0.0)), setting.n_frames, seconds)


def resident(field: str) -> float:
    """:return: present (``VmRSS``) or peak (``VmHWM``) resident set size of this process, in MiB"""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def memory(measurement: Measurement) -> float:
    """:return: increase of the peak memory of this process by training, in MiB"""
    th.set_num_threads(1)
    contestant, setting = measurement
    make_model(Setting(2), contestant, learning_rate=0.0).learn(128)
    env = make_env(setting)
    # Reset the peak
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    make_model(setting, contestant, env, learning_rate=0.0).learn(2 * setting.n_frames)
    return resident("VmHWM") - before


def line_of(contestant: str, setting: Setting) -> str:
    return LABELS[contestant] + ("" if setting.native else ", DummyVecEnv")


def run(name: str, n_rounds: int, seconds: float) -> list[Result]:
    """Measure one part and print the medians."""
    part = PARTS[name]
    print(f"{part.title}: {part.unit}, median of {n_rounds} rounds")
    print(f"{part.x_label:>26}" + "".join(f"{line_of(*measurement):>18}" for measurement in part.groups[0]), flush=True)
    results = []
    for group in part.groups:
        in_turns = group * n_rounds
        values = list(in_processes(memory, in_turns, 1)) if name == "memory" else [speed(m, seconds) for m in in_turns]
        of_group = [Result(name, *measurement, values[i :: len(group)]) for i, measurement in enumerate(group)]
        print(f"{part.x(group[0][1]):26,}" + "".join(f"{np.median(r.values):18,.0f}" for r in of_group), flush=True)
        results += of_group
    return results


def short(number: float, position: int | None = None) -> str:
    """:return: text such as 64, 4096, 20k or 1M; a formatter for matplotlib"""
    for factor, suffix in ((10**6, "M"), (1000, "k")):
        if number > 1 and round(number) % factor == 0:
            return f"{round(number) // factor}{suffix}"
    return f"{number:g}"


def plot(path: Path, results: list[Result]) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    plt.rcParams.update({"font.size": 12.5, "axes.spines.top": False, "axes.spines.right": False})
    names = list(dict.fromkeys(result.part for result in results))
    figure, axes = plt.subplots(1, len(names), figsize=(4.4 * len(names), 4.4), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], names):
        part = PARTS[name]
        lines: dict[Measurement, list[tuple[int, float]]] = defaultdict(list)
        for result in results:
            if result.part == name:
                line = (result.contestant, Setting(0, native=result.setting.native))
                lines[line].append((part.x(result.setting), float(np.median(result.values))))
        values = [y for points in lines.values() for _, y in points]
        line_height = (max(values) / min(values)) ** 0.065
        # Heights of the labels beside the ends of lines, from bottom to top, without overlap
        heights: dict[int, float] = defaultdict(float)
        for (contestant, setting), points in sorted(lines.items(), key=lambda item: item[1][-1][1]):
            ax.loglog(*zip(*points), "o-" if setting.native else "o--", color=COLORS[contestant], markersize=4)
            x, y = points[-1]
            heights[x] = max(y, heights[x] * line_height)
            text = line_of(contestant, setting)
            ax.annotate(text, (x, heights[x]), (7, 0), textcoords="offset points", color=COLORS[contestant], va="center")
        ax.set(title=part.title, xlabel=part.x_label, ylabel=part.unit)
        ax.set_xticks(part.x_ticks)
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if part.unit == "MiB" else (1, 2, 5)))
        ax.xaxis.set_major_formatter(short)
        ax.yaxis.set_major_formatter(short)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="approximate duration of a measurement of speed; at least one rollout"
    )
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    parser.add_argument("--plot", type=Path, help="PNG file")
    args = parser.parse_args()
    th.set_num_threads(1)

    results: list[Result] = []
    for name in args.part:
        results += run(name, args.rounds, args.seconds)
        rows = [
            {
                "part": r.part,
                "contestant": r.contestant,
                **r.setting._asdict(),
                "unit": PARTS[r.part].unit,
                "values": r.values,
            }
            for r in results
        ]
        save(args, rows)
    if args.plot:
        plot(args.plot, results)


if __name__ == "__main__":
    main()

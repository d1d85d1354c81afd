"""
The zoo's commands must show, film and plot the trained agents of the checkout. They run as users run them: beside the folder
rl-trained-agents, with the package imported from an installed wheel.
"""

import re
import shutil

import pytest
import yaml
from helpers.agents import AGENTS, AT_LEAST, NEEDED, mean_return
from helpers.installed import Environment, output_of

IN_FOLDER = ("--algo", "vpg", "-f", "rl-trained-agents")


def test_each_agent_has_what_the_zoo_reads():
    assert {folder.name for folder in (AGENTS / "vpg").iterdir()} == {f"{env_id}_1" for env_id in AT_LEAST}
    for env_id in AT_LEAST:
        folder = AGENTS / "vpg" / f"{env_id}_1"
        for name in (f"{env_id}.zip", "evaluations.npz", "0.monitor.csv", f"{env_id}/args.yml", f"{env_id}/config.yml"):
            assert (folder / name).is_file(), folder / name
        config = dict(yaml.load((folder / env_id / "config.yml").read_text(), Loader=yaml.UnsafeLoader))
        assert (folder / env_id / "vecnormalize.pkl").is_file() == ("normalize" in config)


def test_the_agents_take_less_than_two_megabytes():
    assert sum(path.stat().st_size for path in AGENTS.rglob("*.*") if path.is_file()) < 2_000_000


def test_no_agent_tells_where_it_was_trained():
    for path in (*AGENTS.rglob("*.yml"), *AGENTS.rglob("*.txt")):
        assert not re.search(r"(^|\s)/", path.read_text()), path


@pytest.mark.parametrize("env_id", AT_LEAST)
def test_a_trained_agent_reaches_its_return(beside_agents: Environment, env_id: str):
    for package in NEEDED.get(env_id, ()):
        pytest.importorskip(package, reason=f"{env_id} needs it")
    steps, least = AT_LEAST[env_id]
    play = ("-m", "rl_zoo3.enjoy", *IN_FOLDER, "--env", env_id, "-n", str(steps), "--no-render")
    assert mean_return(output_of(beside_agents.run_warm(*play))) >= least


FILM = """
import sys
import numpy as np
from moviepy import VideoFileClip
with VideoFileClip(sys.argv[1]) as film:
    frames = [frame.astype(int) for frame in film.iter_frames()]
print(len(frames), *frames[0].shape, max(np.abs(frame - frames[0]).max() for frame in frames))
"""


def test_record_video_makes_a_film_of_the_swing_up(beside_agents: Environment):
    for module in ("moviepy", "pygame"):
        pytest.importorskip(module, reason="Films need the extra [render]")
    record = ("-m", "rl_zoo3.record_video", *IN_FOLDER, "--env", "CartPoleSwingUp-v0", "-n", "50", "-o", "films")
    output_of(beside_agents.run_warm(*record))
    (film,) = (beside_agents.cwd / "films").glob("*.mp4")
    process = beside_agents.run_warm("-c", FILM, film)
    output_of(process)
    n_frames, height, width, channels, change = map(int, process.stdout.split())
    assert n_frames >= 50
    assert min(height, width) >= 300
    assert channels == 3
    # Something moves
    assert change > 100


# A backend of matplotlib that tells what would be shown
BACKEND = """
from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvas
from matplotlib import pyplot

def show(*args, **kwargs):
    for number in pyplot.get_fignums():
        for line in pyplot.figure(number).axes[0].lines:
            print("line", line.get_label(), f"{line.get_xdata()[-1]:g}", f"{line.get_ydata()[-1]:g}")
"""


def lines_shown(installed: Environment, *command: str) -> list[tuple[str, float, float]]:
    """:return: label, last x and last y of the lines in the figures"""
    pytest.importorskip("seaborn", reason="The zoo's plot scripts need the extra [plots]")
    folder = installed.cwd / "backend"
    folder.mkdir(exist_ok=True)
    (folder / "telling_backend.py").write_text(BACKEND)
    variables = {"PYTHONPATH": str(folder), "MPLBACKEND": "module://telling_backend"}
    output = output_of(installed.run_warm("-m", *command, env=variables))
    return [(label, float(x), float(y)) for label, x, y in re.findall(r"^line (\S+) (\S+) (\S+)$", output, re.MULTILINE)]


def test_plot_train_shows_the_steps_of_all_environments(beside_agents: Environment):
    envs = ("-e", "CartPole-v1", "CartPoleSwingUp-v0")
    plot = ("rl_zoo3.plots.plot_train", "-a", "vpg", *envs, "-f", "rl-trained-agents")
    (cartpole, *cartpole_end), (swing_up, *swing_up_end) = lines_shown(beside_agents, *plot)
    assert (cartpole, swing_up) == ("CartPole-v1_1", "CartPoleSwingUp-v0_1")
    # 500 000 and 4 000 000 steps, less the episodes that were running at the end of 64 environments
    assert 500_000 - 64 * 500 <= cartpole_end[0] <= 500_000
    assert 4_000_000 - 64 * 500 <= swing_up_end[0] <= 4_000_000
    assert cartpole_end[1] > 450
    assert swing_up_end[1] > 300


def test_all_plots_and_plot_from_file_show_the_evaluations(beside_agents: Environment):
    env_id = "CartPoleSwingUp-v0"
    # The zoo's plot_from_file makes nothing of one run
    for run in (1, 2):
        folder = beside_agents.cwd / "twice" / "vpg" / f"{env_id}_{run}"
        folder.mkdir(parents=True)
        shutil.copy(AGENTS / "vpg" / f"{env_id}_1" / "evaluations.npz", folder)
    gather = ("rl_zoo3.plots.all_plots", "-a", "vpg", "-e", env_id, "-f", "rl-trained-agents", "twice", "-max", "4000000")
    once, twice = lines_shown(beside_agents, *gather, "-o", "plots")
    # In millions of steps
    assert once == ("VPG-rl-trained-agents", pytest.approx(4, abs=0.01), pytest.approx(359.6, abs=0.1))
    show = ("rl_zoo3.plots.plot_from_file", "-i", "plots.pkl", "--keep-keys", "VPG-twice")
    assert twice in lines_shown(beside_agents, *show)
    assert twice == ("VPG-twice", *once[1:])

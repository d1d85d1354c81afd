"""
The zoo's commands must show, film, plot, push and load the trained agents of the checkout. They run as users run them: beside
the folder rl-trained-agents, with the package imported from an installed wheel.
"""

import importlib.util
import re
import shutil

import pytest
import yaml
from helpers.installed import CHECKOUT, HOOK_OFF, Environment, output_of

AGENTS = CHECKOUT / "rl-trained-agents"
#: Steps to be played and the least mean return of the episodes in them
AT_LEAST = {
    "CartPole-v1": (2500, 500),
    "CartPoleSwingUp-v0": (2500, 350),
    "CartPoleSwingUp-v1": (2500, 400),
    "Acrobot-v1": (2000, -100),
    "Pendulum-v1": (6000, -250),
    "MountainCar-v0": (3000, -130),
    "LunarLander-v3": (4000, 200),
}
IN_FOLDER = ("--algo", "vpg", "-f", "rl-trained-agents")


@pytest.fixture(scope="module")
def beside_agents(installed: Environment) -> Environment:
    """The environment of the wheel, with a copy of the agents in its working folder."""
    shutil.copytree(AGENTS, installed.cwd / "rl-trained-agents")
    return installed


def mean_return(output: str) -> float:
    (mean,) = re.findall(r"Mean reward: (\S+) \+/-", output)
    return float(mean)


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def test_each_agent_has_what_the_zoo_reads():
    assert {folder.name for folder in (AGENTS / "vpg").iterdir()} == {f"{env_id}_1" for env_id in AT_LEAST}
    for env_id in AT_LEAST:
        folder = AGENTS / "vpg" / f"{env_id}_1"
        for name in (f"{env_id}.zip", "evaluations.npz", "0.monitor.csv", f"{env_id}/args.yml", f"{env_id}/config.yml"):
            assert (folder / name).is_file(), folder / name
        config = dict(yaml.load((folder / env_id / "config.yml").read_text(), Loader=yaml.UnsafeLoader))
        assert (folder / env_id / "vecnormalize.pkl").is_file() == ("normalize" in config)


def test_the_agents_take_less_than_a_megabyte():
    assert sum(path.stat().st_size for path in AGENTS.rglob("*.*") if path.is_file()) < 1_000_000


def test_no_agent_tells_where_it_was_trained():
    for path in (*AGENTS.rglob("*.yml"), *AGENTS.rglob("*.txt")):
        assert not re.search(r"(^|\s)/", path.read_text()), path


# ---------------------------------------------------------------------------------------------------------------
# Playing, filming, plotting
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", AT_LEAST)
def test_a_trained_agent_reaches_its_return(beside_agents: Environment, env_id: str):
    if env_id.startswith("LunarLander") and importlib.util.find_spec("Box2D") is None:
        pytest.skip("LunarLander needs gymnasium[box2d]")
    steps, least = AT_LEAST[env_id]
    play = ("-m", "rl_zoo3.enjoy", *IN_FOLDER, "--env", env_id, "-n", str(steps), "--no-render")
    assert mean_return(output_of(beside_agents.run(*play))) >= least


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
    output_of(beside_agents.run(*record))
    (film,) = (beside_agents.cwd / "films").glob("*.mp4")
    process = beside_agents.run("-c", FILM, film)
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
    output = output_of(installed.run("-m", *command, env=variables))
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


@pytest.mark.slow
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


# ---------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------

# The Hub as a folder. What is missing raises what huggingface_hub raises.
HUB = """
import os, shutil
from pathlib import Path
from types import SimpleNamespace
import huggingface_hub
from huggingface_hub import errors

HUB = Path(os.environ["HUB"])
NotFound = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)

class HfApi:
    def create_repo(self, repo_id, **kwargs):
        (HUB / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def snapshot_download(self, repo_id, local_dir):
        shutil.copytree(HUB / repo_id, local_dir, dirs_exist_ok=True)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, HUB / repo_id, dirs_exist_ok=True)

def hf_hub_download(repo_id, filename, **kwargs):
    path = HUB / repo_id / filename
    if not path.is_file():
        raise NotFound(f"404: {filename}", response=SimpleNamespace(headers={}, request=None))
    return str(path)

huggingface_hub.HfApi, huggingface_hub.hf_hub_download = HfApi, hf_hub_download
"""


def with_hub(installed: Environment) -> dict[str, str]:
    """:return: environment variables with which huggingface_hub is a folder"""
    site = installed.cwd / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(HUB)
    return {"PYTHONPATH": str(site), "HUB": str(installed.cwd / "the_hub"), "TRUST_REMOTE_CODE": "True"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("commands", "variables", "env_id"),
    [
        ("rl_zoo3.{}", {}, "CartPole-v1"),
        ("sb3_vpg {}", HOOK_OFF, "CartPoleSwingUp-v0"),
    ],
    ids=["with the hook, without VecNormalize", "without the hook, with VecNormalize"],
)
def test_an_agent_is_pushed_to_the_hub_and_loaded_from_it(
    beside_agents: Environment, commands: str, variables: dict[str, str], env_id: str
):
    def run(command: str, *arguments: str) -> str:
        whole = ("-m", *commands.format(command).split(), "--algo", "vpg", "--env", env_id, *arguments)
        return output_of(beside_agents.run(*whole, env=with_hub(beside_agents) | variables))

    run("push_to_hub", "-f", "rl-trained-agents", "-orga", "me", "--no-render")
    run("load_from_hub", "-f", "from_hub", "-orga", "me")
    steps, least = AT_LEAST[env_id]
    assert mean_return(run("enjoy", "-f", "from_hub", "-n", str(steps), "--no-render")) >= least
    for name in ("0.monitor.csv", "evaluations.npz", f"{env_id}/config.yml"):
        before, after = (beside_agents.cwd / folder / "vpg" / f"{env_id}_1" / name for folder in (AGENTS, "from_hub"))
        assert before.read_bytes() == after.read_bytes()

    _, metadata, card = (beside_agents.cwd / "the_hub/me" / f"vpg-{env_id}" / "README.md").read_text().split("---\n", 2)
    (result,) = yaml.safe_load(metadata)["model-index"]
    assert result["name"] == "VPG"
    assert result["results"][0]["dataset"]["name"] == env_id
    assert 'pip install "sb3_vpg[zoo]"' in card
    assert "pip install rl_zoo3" not in card
    assert f"python -m rl_zoo3.load_from_hub --algo vpg --env {env_id} -orga me -f logs/" in card


def test_model_cards_of_other_algorithms_stay_as_they_are(installed: Environment):
    script = """
import sys
from pathlib import Path
import rl_zoo3
from huggingface_hub.repocard import metadata_save
for algo in ("ppo", "vpg"):
    Path("card.md").write_text(f"pip install rl_zoo3; python -m rl_zoo3.enjoy --algo {algo} --env CartPole-v1")
    metadata_save("card.md", {"library_name": "stable-baselines3"})
    print("sb3_vpg" in Path("card.md").read_text())
"""
    process = installed.run("-c", script)
    output_of(process)
    assert process.stdout.split() == ["False", "True"]

"""``python -m sb3_vpg watch``: agents in folders of the zoo, in a film or a window, and bad input."""

import json

import pytest
from helpers.agents import AGENTS
from helpers.films import read_film
from helpers.installed import Environment, output_of

pytest.importorskip("pygame", reason="watch needs the extra [render]")

WATCH = ("-m", "sb3_vpg", "watch")
# A command line of the package, in a process in which more can be done
IN_PROCESS = """
import json, sys
from sb3_vpg.zoo import register
register()
from sb3_vpg.zoo.watch import __main__ as command

def watch(*arguments):
    sys.argv = ["watch", *arguments]
    command.main()
"""


def test_a_trained_agent_is_filmed(beside_agents: Environment):
    film = beside_agents.cwd / "film.gif"
    output = output_of(
        beside_agents.run_warm(*WATCH, "--env", "CartPoleSwingUp-v0", "-f", AGENTS.name, "-n", "20", "-o", film)
    )
    assert f"Saved {film}" in output
    assert "Warning" not in output
    # 100 steps and 25 frames per second
    assert len(read_film(film)) == 5


def test_where_there_is_no_display_the_film_is_beside_the_model(installed: Environment):
    script = """
from stable_baselines3 import DQN
DQN("MlpPolicy", "CartPole-v1", buffer_size=1).save("no_display/dqn/CartPole-v1_1/CartPole-v1.zip")
command.has_display = lambda: False
watch("--algo", "dqn", "--env", "CartPole-v1", "-f", "no_display", "-n", "4", "--stochastic")
"""
    folder = installed.cwd / "no_display" / "dqn" / "CartPole-v1_1"
    folder.mkdir(parents=True)
    output = output_of(installed.run_warm("-c", IN_PROCESS + script))
    assert "There is no display" in output
    (film,) = (folder / "videos").glob("*.gif")
    assert f"Saved {film}" in output
    assert len(read_film(film)) == 2


def test_a_window_shows_the_agent_with_the_statistics_of_its_training(beside_agents: Environment):
    script = """
windows = []
command.Window = lambda *args, window=command.Window: windows.append(window(*args)) or windows[0]
watch("--env", "CartPoleSwingUp-v0", "-f", "rl-trained-agents", "-n", "6")
(window,) = windows
step = window.frame.steps[0]
print(json.dumps([window.n_steps, window.screen.unit, step.reward, step.value]))
"""
    output = output_of(beside_agents.run_warm("-c", IN_PROCESS + script, env={"SDL_VIDEODRIVER": "dummy"}))
    n_steps, unit, reward, value = json.loads(output.splitlines()[-1])
    # Two steps for each picture
    assert n_steps in (6, 7)
    assert unit == "normalized rewards"
    assert reward == pytest.approx(-1, abs=0.1)
    assert abs(value) < 10


BAD_INPUT = {
    "--env CartPol-v1": "Environment `CartPol` doesn't exist. Did you mean: `CartPole",
    "-f missing": "The missing/vpg folder was not found. -f names the folder with the agents. `python -m sb3_vpg train --algo",
    "--algo ppo": "The rl-trained-agents/ppo folder was not found",
    "--exp-id 7": "CartPole-v1_7 folder was not found",
    "--load-last-checkpoint": "No checkpoint found for vpg on CartPole-v1",
    "-o film.avi": "-o film.avi is not allowed; allowed: a file name that ends with .gif or .mp4",
    "-o missing/film.gif": "-o missing/film.gif cannot be written: No such file or directory",
    "-o new.gif --env-kwargs mass:1": "The environment cannot be made: ",
    "--gym-packages no_such_package": "No module named 'no_such_package'",
}


def test_bad_input_is_an_error_in_one_line(beside_agents: Environment):
    script = f"""
for arguments in {list(BAD_INPUT)}:
    try:
        watch("-f", "rl-trained-agents", *arguments.split())
    except SystemExit as error:
        print(json.dumps([arguments, error.code]))
"""
    output = output_of(beside_agents.run_warm("-c", IN_PROCESS + script))
    errors = dict(json.loads(line) for line in output.splitlines() if line.startswith("["))
    assert errors.keys() == BAD_INPUT.keys()
    for arguments, message in BAD_INPUT.items():
        assert errors[arguments].startswith("error: ")
        assert message in errors[arguments]
    assert not (beside_agents.cwd / "new.gif").exists()


@pytest.mark.parametrize("arguments", ["-n 0", "--algo nothing", "--stochastic --deterministic"])
def test_arguments_are_checked(installed: Environment, arguments: str):
    process = installed.run_warm(*WATCH, *arguments.split())
    assert process.returncode == 2
    assert process.stderr.startswith("usage: python -m sb3_vpg watch")

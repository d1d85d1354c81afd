"""``torchrun ... -m sb3_vpg train``: one training in several processes, from an installed wheel, as users start it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.installed import Environment, output_of, script_in, wait_until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to find processes left behind")

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
TRAIN = ("-m", "sb3_vpg", "train", "--env", "CartPole-v1")
ENTRY = {
    "n_timesteps": 4000,
    "policy": "MlpPolicy",
    "n_envs": 8,
    "n_steps": 16,
    "normalize": True,
    "learning_rate": "lin_0.001",
}
TROUBLES = """
import os
import signal

from stable_baselines3.common.callbacks import BaseCallback

IN_RANK_1 = os.environ["RANK"] == "1"
FIRST_ATTEMPT = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


class Trouble(BaseCallback):
    def _on_step(self):
        return not (IN_RANK_1 and self.num_timesteps >= 2000) or self.what_happens()


class Stop(Trouble):
    def what_happens(self):
        return False


class Fail(Trouble):
    def what_happens(self):
        raise KeyError("sensor lost")


class DieOnce(Trouble):
    def what_happens(self):
        if FIRST_ATTEMPT:
            os.kill(os.getpid(), signal.SIGKILL)
        return True
"""


def arguments(environment: Environment, name: str, *more: str, trouble: str | None = None, **entry: Any) -> tuple[str, ...]:
    """
    :param name: of the folder for logs
    :param trouble: what happens to rank 1
    :param entry: of the hyperparameter file
    :return: arguments of a training
    """
    (environment.cwd / "troubles.py").write_text(TROUBLES)
    entry = {**ENTRY, **entry, **({} if trouble is None else {"callback": [f"troubles.{trouble}"]})}
    (environment.cwd / f"{name}.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    return (*TRAIN, "-f", name, "-conf", f"{name}.yml", "--eval-freq", "-1", *more)


def warm_ranks(environment: Environment) -> dict[str, str]:
    """:return: torchrun's environment variables, with which the ranks do without the seconds for imports, too"""
    return {"PYTHON_EXEC": str(environment.warm_python)}


def run_warm(environment: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run torchrun."""
    return environment.run_warm(*TORCHRUN, *arguments, env=warm_ranks(environment))


def left_behind(name: str) -> list[str]:
    """:return: command lines of processes of a training that are still there"""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in lines if f" -f {name} " in line]


def wait_for_episodes(monitor: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a training has written some episodes to a monitor file."""
    wait_until(lambda: monitor.is_file() and len(monitor.read_text().splitlines()) >= 10, process)


def load(environment: Environment, model: str) -> tuple[int, int]:
    """:return: timesteps and updates of a saved model, loaded in one process"""
    script = "import sys; from sb3_vpg import VPG; m = VPG.load(sys.argv[1]); print(m.num_timesteps, m._n_updates)"
    process = environment.run_warm("-c", script, model)
    output_of(process)
    n_timesteps, n_updates = map(int, process.stdout.split())
    return n_timesteps, n_updates


def test_one_folder_one_voice_and_counters_of_all(installed: Environment):
    more = ("-tb", "tb", "--eval-freq", "1000", "--save-freq", "2000", "-P")
    process = installed.run(*TORCHRUN, *arguments(installed, "together", *more))
    output = output_of(process)
    # Told once
    for once in ("Seed:", "Loading hyperparameters from:", "Using 8 environments", "Log path:", "Saving to"):
        assert output.count(once) == 1, output
    assert "falls back" not in output
    assert re.search(r"100% .* 4,096/4,000", output)

    (folder,) = (installed.cwd / "together" / "vpg").iterdir()
    # 8 environments and a rollout of 16 steps, in all
    assert load(installed, str(folder / "CartPole-v1.zip")) == (4096, 32)
    # Four environments in each rank, each with its file
    assert {file.name for file in folder.glob("*.monitor.csv")} == {f"{i}.monitor.csv" for i in range(8)}
    assert list(np.load(folder / "evaluations.npz")["timesteps"]) == pytest.approx([1000, 2000, 3000, 4000], abs=64)
    checkpoints = sorted(int(file.stem.split("_")[2]) for file in folder.glob("rl_model_*_steps.zip"))
    assert checkpoints == pytest.approx([2000, 4000], abs=64)
    assert {file.name for file in folder.glob("*.pkl")} == {f"rl_model_vecnormalize_{n}_steps.pkl" for n in checkpoints}
    assert len(list((installed.cwd / "tb").rglob("events.*"))) == 1
    output = output_of(installed.run_warm("-m", "sb3_vpg", "enjoy", "--no-render", "-f", "together", "-n", "500"))
    assert "Mean reward" in output


def test_a_callback_that_stops_one_rank_stops_all(installed: Environment):
    output_of(run_warm(installed, *arguments(installed, "stopped", trouble="Stop")))
    n_timesteps, _ = load(installed, "stopped/vpg/CartPole-v1_1/CartPole-v1.zip")
    assert 2000 <= n_timesteps < 2000 + 2 * 128
    assert left_behind("stopped") == []


def test_an_exception_in_one_rank_ends_the_job_and_is_shown(installed: Environment):
    start = time.monotonic()
    process = run_warm(installed, *arguments(installed, "failed", trouble="Fail"))
    assert process.returncode != 0
    # By the rank itself, by the other, by torchrun
    assert "KeyError: 'sensor lost'" in process.stderr
    assert "RuntimeError: The rollout failed in rank 1: KeyError: 'sensor lost'" in process.stderr
    root_cause = process.stderr[process.stderr.index("Root Cause") :]
    assert "sensor lost" in root_cause
    assert left_behind("failed") == []
    assert time.monotonic() - start < 120


@pytest.mark.parametrize("save_freq", [500, -1])
def test_after_a_kill_torchrun_goes_on_from_the_last_checkpoint(installed: Environment, save_freq: int):
    name = f"killed_{save_freq}"
    more = ("--save-freq", str(save_freq), "--seed", "1")
    process = run_warm(installed, "--max-restarts", "1", *arguments(installed, name, *more, trouble="DieOnce"))
    output = output_of(process)
    assert left_behind(name) == []
    first, second = (installed.cwd / name / "vpg" / f"CartPole-v1_{i}" for i in (1, 2))
    checkpoints = {int(file.stem.split("_")[2]): file for file in first.glob("rl_model_*_steps.zip")}
    assert bool(checkpoints) == (save_freq > 0)
    # torchrun may end rank 0 before it has noticed: then it saves its model, as it does whenever it is interrupted
    was_interrupted = (first / "CartPole-v1.zip").exists()
    assert ("Loading pretrained agent" in output) == (was_interrupted or bool(checkpoints))
    if checkpoints and not was_interrupted:
        newest = max(checkpoints)
        assert newest == pytest.approx(2000, abs=128)
        assert f"rl_model_vecnormalize_{newest}_steps.pkl" in output
        assert load(installed, str(checkpoints[newest]))[1] > 10
    # -n is the budget of both attempts together
    assert load(installed, str(second / "CartPole-v1.zip"))[1] == pytest.approx(32, abs=1)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_saves_its_model(installed: Environment, signal_number: signal.Signals):
    name = f"interrupted_job_{signal_number.name}"
    process = installed.start(*TORCHRUN, *arguments(installed, name, n_timesteps=1_000_000), env=warm_ranks(installed))
    wait_for_episodes(installed.cwd / name / "vpg/CartPole-v1_1/0.monitor.csv", process)
    process.send_signal(signal_number)
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert output.count("Saving to") == 1, output
    assert load(installed, f"{name}/vpg/CartPole-v1_1/CartPole-v1.zip")[1] > 0
    assert left_behind(name) == []


def test_the_script_in_the_documentation_trains_one_model(installed: Environment):
    threads = """
import os
print([open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")])
"""
    script = script_in("distributed.md").replace("100_000", "2_000")
    (installed.cwd / "train.py").write_text(script + threads)
    output = output_of(installed.run(*TORCHRUN, "train.py"))
    # Two ranks x 8 environments x 64 steps, told by one of them at its tenth update at the earliest
    assert "total_timesteps" not in output
    assert load(installed, "cartpole.zip") == (2048, 2)
    # Those of a process group that is still held would meet the end of the interpreter, and abort the process now and then
    assert output.count("python") == 2
    assert "gloo" not in output


REFUSED = {
    "environments that cannot be split": (
        ("-params", "n_envs:3"),
        "n_envs=3 cannot be split across 2 ranks; allowed: a mul",
    ),
    "another algorithm": (
        ("--algo", "ppo", "-conf", "ppo.yml"),
        "torchrun can only train VPG: run other algorithms in one",
    ),
    "a search": (("-optimize",), "a hyperparameter search in several independent processes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torchrun_is_not_for_is_refused(installed: Environment, case: str):
    more, message = REFUSED[case]
    (installed.cwd / "ppo.yml").write_text(yaml.safe_dump({"CartPole-v1": {"n_timesteps": 100, "policy": "MlpPolicy"}}))
    process = run_warm(installed, *arguments(installed, "refused", *more))
    assert process.returncode != 0
    assert message in process.stderr


def test_the_command_of_the_zoo_itself_is_refused(installed: Environment):
    train = ("-m", "rl_zoo3.train", "--algo", "vpg", "--env", "CartPole-v1", "-n", "100", "-f", "refused")
    process = run_warm(installed, *train)
    assert process.returncode != 0
    assert "train VPG with `torchrun ... -m sb3_vpg train`" in process.stderr


# ---------------------------------------------------------------------------------------------------------------
# Several machines: network namespaces, each with an address and a link to the other
# ---------------------------------------------------------------------------------------------------------------

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Names of two namespaces, and of the interface in each, with a link between them."""
    names = (f"vpga{os.getpid()}", f"vpgb{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make network namespaces: {error}")
    try:
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start_on(machine: str, node_rank: int, environment: Environment, name: str, **entry: Any) -> subprocess.Popen[str]:
    """Start the part of a training that runs on one of two machines, as the documentation says."""
    nodes = ("--nnodes", "2", "--node-rank", str(node_rank), "--master-addr", ADDRESSES[0], "--master-port", "29511")
    torchrun = ("-m", "torch.distributed.run", *nodes, "--nproc-per-node", "1")
    enter = ("ip", "netns", "exec", machine, "env", f"GLOO_SOCKET_IFNAME={machine}", "SB3_VPG_TIMEOUT=5")
    return environment.start(*torchrun, *arguments(environment, name, **entry), before=enter)


def test_two_machines_train_together(installed: Environment, machines: tuple[str, str]):
    first, second = (start_on(machine, i, installed, "machines") for i, machine in enumerate(machines))
    output, other_output = first.communicate(timeout=120)[0], second.communicate(timeout=120)[0]
    assert (first.returncode, second.returncode) == (0, 0), output + other_output
    assert output.count("Saving to") == 1
    assert "Saving to" not in other_output
    assert load(installed, "machines/vpg/CartPole-v1_1/CartPole-v1.zip") == (4096, 32)


def test_a_link_that_is_cut_is_an_error_on_both_sides(installed: Environment, machines: tuple[str, str]):
    jobs = [start_on(machine, i, installed, "cut", n_timesteps=100_000_000) for i, machine in enumerate(machines)]
    try:
        wait_for_episodes(installed.cwd / "cut/vpg/CartPole-v1_1/0.monitor.csv", jobs[0])
        ip("-n", machines[0], "link", "set", machines[0], "down")
        outputs = [job.communicate(timeout=60)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for rank, (job, output) in enumerate(zip(jobs, outputs)):
        assert job.returncode != 0
        assert f"RuntimeError: Rank {rank} of 2 lost the connection to the other ranks" in output
        assert "or the network failed" in output
    assert left_behind("cut") == []

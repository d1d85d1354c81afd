"""
Create the trained agents in `rl-trained-agents`: train them with the zoo's command, and keep only the files that the zoo's
`enjoy`, `record_video`, `push_to_hub` and plot scripts read.

    python benchmarks/trained_agents.py --train     # about half an hour on one core
    python benchmarks/trained_agents.py             # only collect, from the logs of an earlier training

Output for each environment: mean return of the last evaluation during training (20 deterministic episodes), and size in kB.

The agent is the final model. The optimizer's moments and the attributes that exact resuming needs (random states, last
observations) are removed. Training can continue from such a model (`-i`), with new moments. One monitor file has the episodes
of all environments, ordered by their end, with returns rounded to integers and times to hundredths of a second.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from stable_baselines3.common.monitor import load_results

from sb3_vpg import VPG

ENVIRONMENTS = (
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "Pendulum-v1",
    "LunarLander-v3",
    "CartPoleSwingUp-v0",
    "CartPoleSwingUp-v1",
    "Hopper-v5",
    "HalfCheetah-v5",
    "BipedalWalker-v3",
)
SETTINGS = "--seed 0 --eval-freq 50000 --n-eval-envs 5 --eval-episodes 20 --num-threads 1 --device cpu"
#: Attributes that are needed only to resume training
RESUMING_ATTRIBUTES = (
    "_random_states",
    "_last_obs",
    "_last_original_obs",
    "_last_episode_starts",
    "ep_info_buffer",
    "ep_success_buffer",
)
#: This line is removed from the archive's description of versions
OPERATING_SYSTEM = re.compile(rb"^- OS: .*\n", re.MULTILINE)


def train(env_id: str, logs: Path) -> None:
    """Run ``rl_zoo3.train``. Earlier runs of the environment are removed, so that the new one has number 1."""
    for earlier in (logs / "vpg").glob(f"{env_id}_*"):
        shutil.rmtree(earlier)
    command = [sys.executable, "-m", "rl_zoo3.train", "--algo", "vpg", "--env", env_id, "-f", str(logs), *SETTINGS.split()]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def collect(source: Path, target: Path, env_id: str, logs: Path) -> None:
    """
    Copy a run, reduced to the files of a trained agent.

    :param source: folder of the run
    :param target: folder to write; an existing folder is replaced at the end
    :param env_id: id of the environment
    :param logs: the log folder of the run, replaced by "logs" in the files
    """
    old, target = target, target.with_suffix(".new")
    shutil.rmtree(target, ignore_errors=True)
    (target / env_id).mkdir(parents=True)
    for path in (source / env_id).iterdir():
        if path.suffix in (".yml", ".txt"):
            text = path.read_text().replace(str(logs), "logs").replace(sys.executable, "python")
            (target / env_id / path.name).write_text(text)
        else:
            shutil.copy(path, target / env_id)
    save_weights(VPG.load(source / f"{env_id}.zip", device="cpu"), target / f"{env_id}.zip")
    np.savez_compressed(target / "evaluations.npz", **np.load(source / "evaluations.npz"))
    merge_monitor_files(source, target / "0.monitor.csv", env_id)
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)


def save_weights(model: VPG, path: Path) -> None:
    """Save the model, compressed, without the optimizer's moments and the attributes for resuming."""
    model.policy.optimizer.state.clear()
    content = io.BytesIO()
    model.save(content, exclude=RESUMING_ATTRIBUTES)
    with zipfile.ZipFile(content) as saved, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as compressed:
        for name in saved.namelist():
            member = saved.read(name)
            compressed.writestr(name, OPERATING_SYSTEM.sub(b"", member) if name == "system_info.txt" else member)


def merge_monitor_files(source: Path, path: Path, env_id: str) -> None:
    """
    Merge the monitor files of all environments into one. The sum of the lengths of its episodes is the number of steps of all
    environments.

    :param source: folder with the monitor files
    :param path: the file to write
    :param env_id: id of the environment
    """
    episodes = load_results(str(source)).sort_values("t", kind="stable")
    starts = [json.loads(file.read_text().partition("\n")[0][1:])["t_start"] for file in source.glob("*.monitor.csv")]
    lines = [f"{reward:.0f},{length},{time:.2f}" for reward, length, time in zip(episodes.r, episodes.l, episodes.t)]
    path.write_text("\n".join(["#" + json.dumps({"t_start": min(starts), "env_id": env_id}), "r,l,t", *lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=ENVIRONMENTS)
    parser.add_argument("--train", action="store_true", help="train first; replaces earlier runs in the log folder")
    parser.add_argument("--logs", type=Path, default=Path("build/agents"), help="log folder of the training")
    parser.add_argument("--output", type=Path, default=Path("rl-trained-agents"))
    args = parser.parse_args()

    for env_id in args.env:
        if args.train:
            train(env_id, args.logs)
        folder = args.output / "vpg" / f"{env_id}_1"
        collect(args.logs / "vpg" / f"{env_id}_1", folder, env_id, args.logs)
        last = np.load(folder / "evaluations.npz")["results"][-1]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1000
        print(f"{env_id:20} {last.mean():8.1f} {size:6.0f} kB", flush=True)


if __name__ == "__main__":
    main()

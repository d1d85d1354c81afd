"""
Command line: ``python -m sb3_vpg train --env CartPole-v1``.

It runs rl_zoo3's commands with VPG registered, and with VPG as the default algorithm. The package's own commands:
``watch`` shows a trained agent, ``compare`` and ``ablation`` run studies.
"""

import argparse
import importlib.util
import runpy
import sys
import warnings

from sb3_vpg.distributed.launcher import launched_by_torchrun, run_in_process_group
from sb3_vpg.envs import VEC_ENVS

COMMANDS = {
    "train": ("rl_zoo3.train", "train an agent; with -optimize, search for hyperparameters"),
    "enjoy": ("rl_zoo3.enjoy", "show a trained agent from the folder logs"),
    "watch": ("sb3_vpg.zoo.watch", "show a trained agent, its choices and its values (sb3_vpg's own command)"),
    "record_video": ("rl_zoo3.record_video", "record a video of a trained agent"),
    "record_training": ("rl_zoo3.record_training", "record videos of the checkpoints of a training run"),
    "plot_train": ("rl_zoo3.plots.plot_train", "plot returns during training: -a vpg"),
    "all_plots": ("rl_zoo3.plots.all_plots", "plot evaluations and print a table of the last ones: -a vpg"),
    "plot_from_file": ("rl_zoo3.plots.plot_from_file", "plot the results that all_plots has saved with -o"),
    "push_to_hub": ("rl_zoo3.push_to_hub", "upload a trained agent to the Hugging Face Hub"),
    "load_from_hub": ("rl_zoo3.load_from_hub", "download a trained agent from the Hub"),
    "compare": ("sb3_vpg.study", "compare algorithms and settings over environments and seeds, with a report"),
    "ablation": ("sb3_vpg.study", "the study of formulations: compare --config hyperparams/studies/ablation.yml -f ablation"),
}
LIST_OF_COMMANDS = "\n".join(f"  {command:17}{description}" for command, (_, description) in COMMANDS.items())
USAGE = f"""usage: python -m sb3_vpg COMMAND [ARGUMENTS]

Runs a command of RL Baselines3 Zoo. VPG is available as an algorithm, and is the default of --algo; that of -f is logs.

{LIST_OF_COMMANDS}

`train --vec-env envpool` trains in EnvPool's environments, `train --vec-env native` in gymnasium's vectorized forms, with
every algorithm.

`python -m sb3_vpg COMMAND --help` lists the arguments of a command, with an example.

examples:
  python -m sb3_vpg train --env CartPole-v1
  python -m sb3_vpg watch --env CartPole-v1
  python -m sb3_vpg compare --env CartPole-v1 --algo vpg a2c --seeds 4"""
# Shown below the help of the zoo's commands, which has none
EXAMPLES = {
    "train": "--env CartPole-v1 --progress",
    "enjoy": "--env CartPole-v1 --no-render",
    "record_video": "--env CartPole-v1 -n 500",
    "record_training": "--env CartPole-v1 -n 500",
    "plot_train": "-a vpg -e CartPole-v1 -f logs",
    "all_plots": "-a vpg -e CartPole-v1 -f logs -o results",
    "plot_from_file": "-i results.pkl",
    "push_to_hub": "--env CartPole-v1 -orga YOUR_NAME",
    "load_from_hub": "--env CartPole-v1 -orga YOUR_NAME",
}
# Commands to which `--algo vpg` is added unless --algo is given
WITH_ALGO = ("train", "enjoy", "record_video", "record_training", "push_to_hub", "load_from_hub")


def main() -> None:
    """Run the command line."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return
    if command not in COMMANDS:
        sys.exit(f"{USAGE}\n\nerror: unknown command {command!r}")
    if importlib.util.find_spec("rl_zoo3") is None:
        sys.exit("This command needs RL Baselines3 Zoo: pip install 'sb3_vpg[zoo]'")
    if COMMANDS[command][0] == "sb3_vpg.study" and importlib.util.find_spec("scipy") is None:
        sys.exit("This command draws plots: pip install 'sb3_vpg[plots]'")
    if command == "watch" and importlib.util.find_spec("pygame") is None:
        sys.exit("This command draws pictures: pip install 'sb3_vpg[render]'")

    arguments = sys.argv[2:]
    if command == "ablation":
        from sb3_vpg.zoo.hyperparameter_files import HYPERPARAMS

        arguments = ["--config", str(HYPERPARAMS / "studies" / "ablation.yml"), "--folder", "ablation", *arguments]
    if command in WITH_ALGO and not any(argument.split("=")[0] == "--algo" for argument in arguments):
        arguments = ["--algo", "vpg", *arguments]
    if command in WITH_ALGO and command != "train":
        # Where train has saved the agent. The last -f counts
        arguments = ["-f", "logs", *arguments]
    if command == "train":
        arguments = translate_vec_env(arguments)
    sys.argv = [f"sb3_vpg {command}", *arguments]
    if command == "train" and launched_by_torchrun():
        run_in_process_group(run, COMMANDS[command][0])
    else:
        try:
            run(COMMANDS[command][0])
        finally:
            if command in EXAMPLES and not {"-h", "--help"}.isdisjoint(arguments):
                if command == "train":
                    print(f"\n--vec-env may also be {' or '.join(VEC_ENVS)}")
                print(f"\nexample:\n  python -m sb3_vpg {command} {EXAMPLES[command]}")


def translate_vec_env(arguments: list[str]) -> list[str]:
    """
    :param arguments: arguments of ``train``
    :return: the arguments with ``--vec-env envpool`` or ``--vec-env native`` as the hyperparameter ``vec_env_class``
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--vec-env")
    # With the abbreviations that the zoo accepts
    hyperparams = ("--hyperparams"[:n] for n in range(len("--hy"), len("--hyperparams") + 1))
    parser.add_argument("-params", *hyperparams, dest="hyperparams", nargs="+", default=[])
    given, others = parser.parse_known_args(arguments)
    if given.vec_env in (None, "dummy", "subproc"):
        return arguments
    if given.vec_env not in VEC_ENVS:
        sys.exit(f"--vec-env {given.vec_env} is not allowed; allowed: dummy, subproc, {', '.join(VEC_ENVS)}")
    if given.vec_env == "envpool" and importlib.util.find_spec("envpool") is None:
        sys.exit("--vec-env envpool needs EnvPool: pip install 'sb3_vpg[envpool]' (Linux or macOS, Python 3.11 or newer)")
    return [*others, "-params", f"vec_env_class:'{VEC_ENVS[given.vec_env]}'", *given.hyperparams]


def run(module: str) -> None:
    """Run a module as a command, with VPG in the zoo."""
    from sb3_vpg.zoo import register

    register()
    # The zoo imports some of its own commands. Python warns of this when one of them is run
    warnings.filterwarnings("ignore", r"'rl_zoo3\..* found in sys\.modules", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

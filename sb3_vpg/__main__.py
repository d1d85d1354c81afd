"""
``python -m sb3_vpg train --env CartPole-v1``: rl_zoo3's commands with VPG registered explicitly, and as the default algorithm;
and one of our own, ``python -m sb3_vpg ablation``.
"""

import importlib.util
import runpy
import sys

from sb3_vpg.distributed.launcher import launched, run_together

COMMANDS = {
    "train": ("rl_zoo3.train", "train an agent, or search for hyperparameters: -optimize"),
    "enjoy": ("rl_zoo3.enjoy", "watch a trained agent, in the folder -f logs"),
    "record_video": ("rl_zoo3.record_video", "film a trained agent"),
    "record_training": ("rl_zoo3.record_training", "film the checkpoints of a training"),
    "plot_train": ("rl_zoo3.plots.plot_train", "plot returns during training: -a vpg"),
    "all_plots": ("rl_zoo3.plots.all_plots", "plot evaluations, and print a table of the last ones: -a vpg"),
    "plot_from_file": ("rl_zoo3.plots.plot_from_file", "plot what all_plots has written with -o"),
    "push_to_hub": ("rl_zoo3.push_to_hub", "upload a trained agent to the Hugging Face Hub"),
    "load_from_hub": ("rl_zoo3.load_from_hub", "download a trained agent from the Hub"),
    "ablation": ("sb3_vpg.study", "compare formulations over environments and seeds (sb3_vpg's own command)"),
}
LIST_OF_COMMANDS = "\n".join(f"  {command:17}{description}" for command, (_, description) in COMMANDS.items())
USAGE = f"""usage: python -m sb3_vpg COMMAND [ARGUMENTS]

Runs a command of RL Baselines3 Zoo with VPG as one of its algorithms, and as the default of --algo.

{LIST_OF_COMMANDS}

`python -m sb3_vpg COMMAND --help` lists the arguments of a command."""
# Commands whose --algo would else be ppo, or missing
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
    if command == "ablation" and importlib.util.find_spec("rliable") is None:
        sys.exit("This command draws plots: pip install 'sb3_vpg[plots]'")

    arguments = sys.argv[2:]
    if command in WITH_ALGO and not any(argument.split("=")[0] == "--algo" for argument in arguments):
        arguments = ["--algo", "vpg", *arguments]
    sys.argv = [f"sb3_vpg {command}", *arguments]
    if command == "train" and launched():
        run_together(run, COMMANDS[command][0])
    else:
        run(COMMANDS[command][0])


def run(module: str) -> None:
    """Run a module as a command, with VPG in the zoo."""
    from sb3_vpg.zoo import register

    register()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""``python -m sb3_vpg watch``: show a trained agent, its choices and its values, in a window or a film."""

import argparse
import importlib
import sys
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import pygame
import rl_zoo3.import_envs  # noqa: F401  registers environments
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import ALGOS, StoreDict
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from sb3_vpg.zoo.watch.agents import make_agent
from sb3_vpg.zoo.watch.drawing import Screen
from sb3_vpg.zoo.watch.films import check_film, write_film
from sb3_vpg.zoo.watch.loading import TrainedAgent
from sb3_vpg.zoo.watch.session import Session
from sb3_vpg.zoo.watch.window import Window, has_display

DESCRIPTION = """
Show a trained agent: the environment, beside it the probabilities or the Gaussian of the action, the value V(s) and the
advantage (the one-step TD residual). Other models show what they have: DQN its Q-values, SAC its action and Q(s, a).

Without a display, an animated GIF is written."""
EXAMPLES = """
examples:
  python -m sb3_vpg watch --env CartPoleSwingUp-v0
  python -m sb3_vpg watch --algo ppo --env CartPole-v1 -f rl-trained-agents --stochastic -n 300 -o film.mp4

keys: space: pause   right or s: one step   n: next episode   r: start over   q or escape: quit"""
#: Number of steps in a film by default
N_STEPS_OF_FILM = 500


def main() -> None:
    """Run the command line."""
    args = parse_arguments()
    try:
        for module in args.gym_packages:
            importlib.import_module(module)
        try:
            # Its error suggests other names
            gym.spec(args.env.gym_id)
        except gym.error.UnregisteredEnv as error:
            raise ValueError(f"{error} --gym-packages names the modules that register others") from error
        trained = TrainedAgent(args)
        film = args.output
        if film is None and not has_display():
            film = trained.folder / "videos" / f"{trained.name}.gif"
            film.parent.mkdir(exist_ok=True)
            print("There is no display: a film is written instead")
        if film is not None:
            check_film(film)
        watch(trained, args, film)
    except (ImportError, OSError, ValueError, gym.error.Error) as error:
        sys.exit(f"error: {error}")


def watch(trained: TrainedAgent, args: argparse.Namespace, film: Path | None) -> None:
    """
    Show an agent.

    :param trained: the agent
    :param args: arguments of the command line
    :param film: file of the film; None for a window
    """
    print(f"Loading {trained.model_file}")
    env = trained.make_env(args.seed, args.env_kwargs)
    model = trained.load_model(env, args.seed, args.device)
    agent = make_agent(model, env, args.deterministic or not (args.stochastic or trained.stochastic))
    gamma = getattr(model, "gamma", 1.0)
    normalize = unwrap_vec_normalize(env)
    normalized = normalize is not None and normalize.norm_reward
    title = f"{type(model).__name__} · {args.env.gym_id}"
    screen = Screen(title, agent.value_label, gamma, normalized, with_keys=film is None)
    session = Session(agent, env, gamma, args.seed)
    fps = env.get_attr("metadata")[0].get("render_fps") or 30
    if film is None:
        with suppress(KeyboardInterrupt):
            Window(session, screen, fps).run(args.n_timesteps)
    else:
        write_film(film, session, screen, fps, args.n_timesteps or N_STEPS_OF_FILM)
        print(f"Saved {film.resolve()}")
    env.close()
    pygame.quit()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sb3_vpg watch",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--algo", default="vpg", choices=list(ALGOS), help="algorithm (default: vpg)")
    parser.add_argument("--env", type=EnvironmentName, default="CartPole-v1", help="environment (default: CartPole-v1)")
    parser.add_argument(
        "-f",
        "--folder",
        default="logs",
        help="folder of the agents (default: logs, that of train)",
    )
    parser.add_argument(
        "-n",
        "--n-timesteps",
        type=positive,
        help=f"number of steps (default: until the window is closed; {N_STEPS_OF_FILM} for a film)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="write a film instead of opening a window: a .gif, or an .mp4, which may be long"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--deterministic", action="store_true", help="deterministic actions, the default except for Atari")
    actions.add_argument("--stochastic", action="store_true", help="actions drawn from the policy")
    parser.add_argument("--exp-id", type=int, default=0, help="number of the run (default: 0, the latest; -1: no run folder)")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--load-best", action="store_true", help="the best model instead of the last")
    model.add_argument("--load-checkpoint", type=int, help="the checkpoint after this number of steps")
    model.add_argument("--load-last-checkpoint", action="store_true", help="the last checkpoint")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages to import, which register environments")
    parser.add_argument(
        "--env-kwargs", nargs="+", action=StoreDict, default={}, help="arguments of the environment, as name:value"
    )
    parser.add_argument("--device", default="auto", help="PyTorch device (default: auto)")
    return parser.parse_args()


def positive(text: str) -> int:
    """:return: an integer >= 1"""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return number


if __name__ == "__main__":
    main()

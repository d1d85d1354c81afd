"""Find a trained agent in a folder of the zoo, and make its environment and model as the zoo's ``enjoy`` does."""

import argparse
from pathlib import Path
from typing import Any

import yaml
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, create_test_env, get_model_path, get_saved_hyperparams
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize


class TrainedAgent:
    """
    The files of an agent.

    :param args: arguments of the command line that choose the agent: env, algo, folder, exp_id, load_best, load_checkpoint,
        load_last_checkpoint
    :raises ValueError: if there is no such agent
    """

    def __init__(self, args: argparse.Namespace):
        self.algo, self.env_name = args.algo, args.env
        which = (args.load_best, args.load_checkpoint, args.load_last_checkpoint)
        try:
            # The zoo checks the folder by an assertion
            self.name, self.model_file, folder = get_model_path(args.exp_id, args.folder, args.algo, args.env, *which)
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"{error}. -f names the folder with the agents. `python -m sb3_vpg train --algo {args.algo} "
                f"--env {args.env.gym_id}` trains one in the folder logs"
            ) from error
        self.folder = Path(folder)
        settings = self.folder / args.env
        self.hyperparams, self.statistics = get_saved_hyperparams(str(settings), norm_reward=True)
        self.env_kwargs = self.hyperparams.pop("env_kwargs", None) or {}
        if (settings / "args.yml").is_file():
            # As in enjoy: those of the command line of the training replace those of the hyperparameters
            train_args = yaml.load((settings / "args.yml").read_text(), Loader=yaml.UnsafeLoader)
            self.env_kwargs = train_args["env_kwargs"] or self.env_kwargs
        gym_id = args.env.gym_id
        #: Whether ``enjoy`` uses stochastic actions by default
        self.stochastic = ExperimentManager.is_atari(gym_id) or ExperimentManager.is_minigrid(gym_id)

    def make_env(self, seed: int, env_kwargs: dict[str, Any]) -> VecEnv:
        """
        :param seed: seed of the environment
        :param env_kwargs: arguments of the environment, in addition to those of the training
        :return: one environment with the wrappers and statistics of the training. Rewards are normalized if they were in the
            training, since the value function predicts these
        :raises ValueError: if the environment cannot be made with these arguments, or files are missing
        """
        # create_test_env removes entries
        hyperparams = self.hyperparams.copy()
        try:
            env = create_test_env(
                self.env_name.gym_id,
                stats_path=self.statistics,
                seed=seed,
                hyperparams=hyperparams,
                env_kwargs={**self.env_kwargs, **env_kwargs, "render_mode": "rgb_array"},
                vec_env_cls=DummyVecEnv,
            )
        except TypeError as error:
            # gymnasium's error for arguments that the environment does not have
            raise ValueError(f"The environment cannot be made: {error}") from error
        normalize = unwrap_vec_normalize(env)
        if normalize is not None:
            normalize.norm_reward = hyperparams["normalize_kwargs"].get("norm_reward", True)
        return env

    def load_model(self, env: VecEnv, seed: int, device: str) -> BaseAlgorithm:
        """
        :param env: the environment of the agent
        :param seed: seed of the model
        :param device: PyTorch device
        :return: the model
        """
        algorithm = ALGOS[self.algo]
        kwargs: dict[str, Any] = {"seed": seed}
        if issubclass(algorithm, OffPolicyAlgorithm):
            # No memory for transitions. The two keywords exclude each other
            kwargs["buffer_size"] = 1
            if "optimize_memory_usage" in self.hyperparams:
                kwargs["optimize_memory_usage"] = False
            if "HerReplayBuffer" in self.hyperparams.get("replay_buffer_class", ""):
                kwargs["env"] = env
        # Files of other versions of Python may have schedules that cannot be loaded
        unused = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
        return algorithm.load(self.model_file, custom_objects=unused, device=device, **kwargs)

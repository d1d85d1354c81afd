"""Vectorized environment wrapper that multiplies rewards by a number."""

from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_vpg.common.checks import check_number


class ScaledRewards(VecEnvWrapper):
    """
    Multiplies rewards by a number, where running statistics of ``VecNormalize`` are not wanted. Episode statistics keep the
    environment's own rewards; the zoo's ``enjoy`` and ``watch`` show those multiplied. In a hyperparameter file: ::

        vec_env_wrapper:
          - sb3_vpg.envs.ScaledRewards: {factor: 0.1}

    :param venv: the environments
    :param factor: the number. Typical: such that returns are below ten.
    :raises ValueError: if it is not a finite number
    """

    def __init__(self, venv: VecEnv, factor: float):
        super().__init__(venv)
        check_number("factor", factor)
        # NumPy's float64 would change the type of the rewards
        self.factor = float(factor)

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, rewards * self.factor, dones, infos

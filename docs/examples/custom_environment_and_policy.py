"""
A custom environment and a custom policy: push a cart to the origin with a force that is
linear in position and velocity.

The costs are quadratic. Control theory therefore gives the optimal force, and the value
function is quadratic too. The policy has the same form: the actor has no hidden layers,
and the critic is linear in squares and products. VPG knows neither the equations of
motion nor the costs, and finds nearly the same two numbers.
"""

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_vpg import VPG

# Position and velocity after 0.2 s: A @ state + B @ force
A, B = np.array([[1.0, 0.2], [0.0, 1.0]]), np.array([[0.02], [0.2]])
GAMMA, COST_OF_FORCE = 0.95, 0.5


class PushToOrigin(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.state.astype(np.float32), {}

    def step(self, force):
        reward = -self.state @ self.state - COST_OF_FORCE * force @ force
        self.state = A @ self.state + B @ force
        return self.state.astype(np.float32), float(reward), False, False, {}


class Latent(th.nn.Module):
    """The inputs of the last, linear layers of actor and critic."""

    latent_dim_pi, latent_dim_vf = 2, 3

    def forward(self, state):
        return self.forward_actor(state), self.forward_critic(state)

    def forward_actor(self, state):
        return state

    def forward_critic(self, state):
        return th.cat([state**2, state.prod(dim=1, keepdim=True)], dim=1)


class LinearActorQuadraticCritic(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = Latent()


env = make_vec_env(lambda: gym.wrappers.TimeLimit(PushToOrigin(), 50), n_envs=8, seed=0)
rates = {"learning_rate": 0.02, "critic_learning_rate": 0.05}
model = VPG(LinearActorQuadraticCritic, env, gamma=GAMMA, seed=0, device="cpu", **rates)
for _ in range(4):
    model.learn(15_000, reset_num_timesteps=False)
    gain = model.policy.action_net.weight.detach().numpy()[0]
    print(f"after {model.num_timesteps} steps: force = {gain.round(2)} @ state")

cost_to_go = np.eye(2)
for _ in range(500):  # the discounted Riccati equation
    curvature = COST_OF_FORCE + GAMMA * B.T @ cost_to_go @ B
    gain = -np.linalg.solve(curvature, GAMMA * B.T @ cost_to_go @ A)
    cost_to_go = np.eye(2) + GAMMA * A.T @ cost_to_go @ (A + B @ gain)
print(f"control theory: force = {gain[0].round(2)} @ state")

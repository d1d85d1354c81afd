"""Run the networks of sb3-contrib's recurrent policies on whole sequences."""

from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_vpg.common.policy_runner import PolicyRunner

#: Hidden state and cell state of an LSTM, shape (layers, N, hidden size)
LSTMState = tuple[th.Tensor, th.Tensor]


class States(NamedTuple):
    """States of the LSTMs of actor and critic, as sb3-contrib's ``RNNStates``."""

    pi: LSTMState
    vf: LSTMState


def is_recurrent(policy: Any) -> bool:
    """:return: whether the policy has an LSTM in sb3-contrib's form"""
    return hasattr(policy, "lstm_actor")


def zero_states(policy: Any, n_envs: int) -> States:
    """:return: the states at the beginning of an episode"""
    lstm = policy.lstm_actor
    zeros = th.zeros((lstm.num_layers, n_envs, lstm.hidden_size), device=policy.device)
    return States((zeros, zeros), (zeros, zeros))


class RecurrentRunner(PolicyRunner):
    """
    Evaluates batches that consist of all steps of some environments, in order of environment and time. A sequence begins where
    an episode begins, with states of zero, or where the rollout begins, with the states of then. All sequences are processed
    together, and the gradient goes back to the beginning of each.

    :param policy: a policy of sb3-contrib with LSTMs
    :param first_states: states at the beginning of the rollout, of all environments
    """

    sequences = True

    def __init__(self, policy: Any, first_states: States):
        super().__init__(policy)
        self.first_states = first_states

    def evaluate(  # type: ignore[override]
        self, obs: PyTorchObs, actions: th.Tensor, with_values: bool, *, env_indices: th.Tensor, episode_starts: th.Tensor
    ) -> tuple[th.Tensor | None, th.Tensor, th.Tensor | None]:
        """
        :param env_indices: index of the environment of each step, shape (n,)
        :param episode_starts: whether each step begins an episode, shape (n,)
        """
        places, no_starts, states = self._sequences(env_indices, episode_starts)
        padded = [_pad(array, places, len(no_starts)) for array in (obs, self._actions(actions))]
        values, log_prob, entropy = self.policy.evaluate_actions(*padded, states, no_starts)  # type: ignore[call-arg]
        return (
            values.flatten()[places] if with_values else None,
            log_prob[places],
            None if entropy is None else entropy[places],
        )

    def values(  # type: ignore[override]
        self, obs: PyTorchObs, *, env_indices: th.Tensor, episode_starts: th.Tensor
    ) -> th.Tensor:
        places, no_starts, states = self._sequences(env_indices, episode_starts)
        padded = _pad(obs, places, len(no_starts))
        return self.policy.predict_values(padded, states.vf, no_starts).flatten()[places]  # type: ignore[call-arg]

    def _sequences(self, env_indices: th.Tensor, episode_starts: th.Tensor) -> tuple[th.Tensor, th.Tensor, States]:
        """
        :return: place of each step in an array of sequences of equal length, one after the other; zeros of the length of that
            array, since no episode begins within a sequence; states at the beginnings of the sequences
        """
        begins = episode_starts > 0.5
        begins[1:] |= env_indices[1:] != env_indices[:-1]
        begins[0] = True
        first = begins.nonzero().flatten()
        sequence = begins.cumsum(0) - 1
        longest = int(sequence.bincount().max())
        places = sequence * longest + th.arange(len(begins), device=begins.device) - first[sequence]
        running = (episode_starts[first] < 0.5).float()[:, None]

        def at_beginning(state: LSTMState) -> LSTMState:
            hidden, cell = (part[:, env_indices[first]] * running for part in state)
            return hidden, cell

        no_starts = th.zeros(len(first) * longest, device=places.device)
        return places, no_starts, States(*map(at_beginning, self.first_states))


def _pad(array: Any, places: th.Tensor, n: int) -> Any:
    """:return: an array of n rows with these rows at their places, and zeros elsewhere"""
    if isinstance(array, dict):
        return {key: _pad(part, places, n) for key, part in array.items()}
    return array.new_zeros((n, *array.shape[1:])).index_copy(0, places, array)

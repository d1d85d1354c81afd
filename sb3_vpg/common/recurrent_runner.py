"""
Run the networks of sb3-contrib's recurrent policies: step by step in the rollout, on whole sequences in the update.

:class:`RecurrentRunner` calls the methods of any policy. :class:`FastRecurrentRunner` computes the same numbers in less time,
for policies whose forward passes are sb3-contrib's own.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_vpg.common.layers import has_hooks, is_plain, needs_whole_batch
from sb3_vpg.common.policy_inputs import map_obs
from sb3_vpg.common.policy_runner import SB3_FORWARD, FastPolicyRunner, PolicyRunner, apply_layers, has_sb3_forward

CONTRIB_POLICY = "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy"

#: Hidden state and cell state of an LSTM, shape (layers, N, hidden size)
LSTMState = tuple[th.Tensor, th.Tensor]


class States(NamedTuple):
    """States of the LSTMs of actor and critic, as sb3-contrib's ``RNNStates``."""

    pi: LSTMState
    vf: LSTMState

    def to(self, device: th.device) -> "States":
        """:return: the states on this device"""
        pi, vf = ((hidden.to(device), cell.to(device)) for hidden, cell in self)
        return States(pi, vf)

    def __reduce__(self) -> tuple[Any, ...]:
        # A saved model may be loaded where there is no GPU
        return States, tuple(self.to(th.device("cpu")))


def is_finite(states: States) -> bool:
    """:return: whether all numbers are finite"""
    return all(bool(th.isfinite(part).all()) for state in states for part in state)


def is_recurrent(policy: Any) -> bool:
    """:return: whether the policy has an LSTM in sb3-contrib's form"""
    return hasattr(policy, "lstm_actor")


def zero_states(policy: Any, n_envs: int) -> States:
    """:return: the states at the beginning of an episode"""
    lstm = policy.lstm_actor
    zeros = th.zeros((lstm.num_layers, n_envs, lstm.hidden_size), device=policy.device)
    return States((zeros, zeros), (zeros, zeros))


class Group(NamedTuple):
    """
    Sequences of similar length in a batch. They are padded to the longest of them.

    :param steps: indices of their steps in the batch
    :param places: place of each of these steps in an array of sequences of equal length, one after the other
    :param n_places: length of that array
    :param states: states of the LSTMs at the beginnings of the sequences
    """

    steps: th.Tensor
    places: th.Tensor
    n_places: int
    states: States

    @property
    def no_starts(self) -> th.Tensor:
        """Zeros for all places, since no episode begins within a sequence."""
        return th.zeros(self.n_places, device=self.places.device)

    def pad(self, array: th.Tensor) -> th.Tensor:
        """:return: the padded sequences of an array of the batch; between them all steps in turn, for batch normalization"""
        own = array[self.steps]
        in_turn = own.detach()[th.arange(self.n_places, device=own.device) % len(own)]
        return in_turn.index_copy(0, self.places, own)


def in_order(groups: list[Group], outputs: Sequence[th.Tensor]) -> th.Tensor:
    """
    :param groups: all groups of a batch of n steps
    :param outputs: of each group, one row for each place
    :return: one row for each step of the batch
    """
    rows = th.cat([output[group.places] for group, output in zip(groups, outputs)])
    return rows[th.cat([group.steps for group in groups]).argsort()]


def cuts(lengths: np.ndarray) -> list[int]:
    """
    Where to cut sequences into groups. Padding costs time, and so does each call of an LSTM: a group is cut in two at the best
    place, if at least a third of its padded steps are saved.

    :param lengths: lengths of the sequences, the longest first
    :return: indices of the sequences with which a new group begins, in ascending order
    """
    n = np.arange(1, len(lengths))
    padded = n * lengths[0] + (len(lengths) - n) * lengths[1:]
    if len(n) == 0 or padded.min() > 2 / 3 * len(lengths) * lengths[0]:
        return []
    cut = int(n[padded.argmin()])
    return [*cuts(lengths[:cut]), cut, *(cut + other for other in cuts(lengths[cut:]))]


class RecurrentRunner(PolicyRunner):
    """
    Evaluates batches that consist of all steps of some environments, in order of environment and time. A sequence begins where
    an episode begins, with states of zero, or where the rollout begins, with the states of then. The gradient goes back to the
    beginning of each sequence.

    :param policy: a policy of sb3-contrib with LSTMs
    :param first_states: states at the beginning of the rollout, of all environments
    """

    sequences = True
    policy: Any

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
        outputs, groups = [], self._groups(env_indices, episode_starts)
        for group in groups:
            padded = map_obs(group.pad, obs), group.pad(self._actions(actions))
            values, log_prob, entropy = self.policy.evaluate_actions(*padded, group.states, group.no_starts)
            outputs.append([values.flatten(), log_prob, *([] if entropy is None else [entropy])])
        values, log_prob, *entropies = (in_order(groups, parts) for parts in zip(*outputs))
        return values if with_values else None, log_prob, entropies[0] if entropies else None

    def values(  # type: ignore[override]
        self, obs: PyTorchObs, *, env_indices: th.Tensor, episode_starts: th.Tensor
    ) -> th.Tensor:
        groups = self._groups(env_indices, episode_starts)
        padded = ((map_obs(group.pad, obs), group.states.vf, group.no_starts) for group in groups)
        return in_order(groups, [self.policy.predict_values(*inputs).flatten() for inputs in padded])

    def _groups(self, env_indices: th.Tensor, episode_starts: th.Tensor) -> list[Group]:
        """:return: sequences of similar length, see :func:`cuts`; all together if there is batch normalization"""
        begins = episode_starts > 0.5
        begins[1:] |= env_indices[1:] != env_indices[:-1]
        begins[0] = True
        sequence = begins.cumsum(0) - 1
        position = th.arange(len(begins), device=begins.device) - begins.nonzero().flatten()[sequence]
        lengths = sequence.bincount()
        longest_first = lengths.argsort(descending=True)
        ends = [0, *([] if needs_whole_batch(self.policy, 1) else cuts(lengths[longest_first].cpu().numpy())), len(lengths)]
        rank = longest_first.argsort()[sequence]

        groups = []
        for begin, end in itertools.pairwise(ends):
            steps = ((rank >= begin) & (rank < end)).nonzero().flatten()
            first = steps[begins[steps]]
            longest = int(position[steps].max()) + 1
            places = (begins[steps].cumsum(0) - 1) * longest + position[steps]
            running = (episode_starts[first] < 0.5).float()[:, None]
            pi, vf = (tuple(part[:, env_indices[first]] * running for part in state) for state in self.first_states)
            groups.append(Group(steps, places, len(first) * longest, States(pi, vf)))  # type: ignore[arg-type]
        return groups


class LSTMStepper:
    """
    One step of an LSTM for some environments, without gradient. NumPy computes the activations: PyTorch's take several times
    as long, and so does calling its LSTM for a single step.

    :param lstm: an LSTM on a CPU, see :func:`is_plain_lstm`
    """

    def __init__(self, lstm: nn.LSTM):
        # Shared with PyTorch, which updates them in place
        parameters = [[parameter.detach() for parameter in layer] for layer in lstm.all_weights]
        self._layers = [(w_input.T, w_hidden.T, b_input, b_hidden) for w_input, w_hidden, b_input, b_hidden in parameters]
        # tanh for the third of the four gates, sigmoid(x) = (1 + tanh(x / 2)) / 2 for the others
        self._scale = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], dtype=np.float32), lstm.hidden_size)

    def step(self, x: th.Tensor, state: LSTMState) -> tuple[th.Tensor, LSTMState]:
        """
        :param x: inputs, shape (N, input size)
        :param state: the state before the step
        :return: outputs of the last layer, shape (N, hidden size), and the state after the step
        """
        states = []
        for (w_input, w_hidden, b_input, b_hidden), hidden, cell in zip(self._layers, *state):
            gates = th.addmm(th.addmm(b_input + b_hidden, x, w_input), hidden, w_hidden).numpy()
            gates *= self._scale
            np.tanh(gates, out=gates)
            gates *= self._scale
            gates += 1 - self._scale
            input_gate, forget_gate, candidate, output_gate = np.split(gates, 4, axis=1)
            new_cell = forget_gate * cell.numpy() + input_gate * candidate
            x = th.from_numpy(output_gate * np.tanh(new_cell))
            states.append((x, th.from_numpy(new_cell)))
        hidden, cell = (th.stack(parts) for parts in zip(*states))
        return x, (hidden, cell)


class FastRecurrentRunner(RecurrentRunner):
    """
    Runner for a policy for which :func:`has_contrib_forward` is True. Results are those of :class:`RecurrentRunner` up to
    rounding, in less time. The KL divergence is exact, where the distribution has an analytical form.

    :param policy: a policy of sb3-contrib with LSTMs, on a CPU
    :param first_states: states at the beginning of the rollout, of all environments
    """

    samples_actions = True

    def __init__(self, policy: Any, first_states: States):
        super().__init__(policy, first_states)
        # What comes before and after the LSTMs
        self._feedforward = FastPolicyRunner(policy)
        self._actor_step = LSTMStepper(policy.lstm_actor)
        self._critic_step = None if policy.lstm_critic is None else LSTMStepper(policy.lstm_critic)

    @th.no_grad()
    def sample(
        self, obs: PyTorchObs, states: States, episode_starts: th.Tensor, with_values: bool
    ) -> tuple[np.ndarray, th.Tensor | None, States]:
        """
        Sample actions. With the same random state, they are those of the policy.

        :param obs: observations of N environments
        :param states: states before the step
        :param episode_starts: whether the observations begin an episode, shape (N,)
        :param with_values: whether to compute values. Without, the state of the critic is not updated
        :return: actions; values (None if not computed), shape (N,); states after the step
        """
        running = (1.0 - episode_starts)[:, None]
        pi, vf = (tuple(part * running for part in state) for state in states)
        features = self._feedforward.features(obs, self.policy.pi_features_extractor)
        latent, pi = self._actor_step.step(features, pi)  # type: ignore[arg-type]
        actions = self._feedforward.head.sample(apply_layers(self._feedforward.actor, latent))
        if not with_values:
            return actions, None, States(pi, vf)  # type: ignore[arg-type]
        if self.policy.shared_lstm:
            vf = pi
        else:
            features = self._critic_features(obs, features)
            if self._critic_step is None:
                latent = self.policy.critic(features)
            else:
                latent, vf = self._critic_step.step(features, vf)  # type: ignore[arg-type]
        return actions, apply_layers(self._feedforward.critic, latent).flatten(), States(pi, vf)  # type: ignore[arg-type]

    def evaluate(  # type: ignore[override]
        self, obs: PyTorchObs, actions: th.Tensor, with_values: bool, *, env_indices: th.Tensor, episode_starts: th.Tensor
    ) -> tuple[th.Tensor | None, th.Tensor, th.Tensor | None]:
        groups = self._groups(env_indices, episode_starts)
        features = self._feedforward.features(obs, self.policy.pi_features_extractor)
        latent = _run(self.policy.lstm_actor, features, groups, "pi")
        log_prob, entropy = self._feedforward.head.evaluate(
            apply_layers(self._feedforward.actor, latent), self._actions(actions)
        )
        if not with_values:
            return None, log_prob, entropy
        return self._sequence_values(groups, self._critic_features(obs, features), latent), log_prob, entropy

    def values(  # type: ignore[override]
        self, obs: PyTorchObs, *, env_indices: th.Tensor, episode_starts: th.Tensor
    ) -> th.Tensor:
        groups = self._groups(env_indices, episode_starts)
        features = self._feedforward.features(obs, self.policy.vf_features_extractor)
        latent = None
        if self.policy.shared_lstm:
            latent = _run(self.policy.lstm_actor, features, groups, "vf")
        return self._sequence_values(groups, features, latent)

    @th.no_grad()
    def snapshot(self, obs: PyTorchObs, actions: th.Tensor, **inputs: th.Tensor) -> Any:
        groups = self._groups(**inputs)
        features = self._feedforward.features(obs, self.policy.pi_features_extractor)
        latent = _run(self.policy.lstm_actor, features, groups, "pi")
        return self._feedforward.head.parameters(apply_layers(self._feedforward.actor, latent))

    def kl_divergence(self, before: Any, after: Any) -> float:
        return self._feedforward.kl_divergence(before, after)

    def _critic_features(self, obs: PyTorchObs, features: th.Tensor) -> th.Tensor:
        """:return: the features of the critic; ``features``, those of the actor, if they are the same"""
        if self.policy.share_features_extractor:
            return features
        return self._feedforward.features(obs, self.policy.vf_features_extractor)

    def _sequence_values(self, groups: list[Group], features: th.Tensor, actor_latent: th.Tensor | None) -> th.Tensor:
        """
        :param features: the features of the critic
        :param actor_latent: outputs of the actor's LSTM, used if the critic shares it
        :return: V(s), shape (n,)
        """
        if self.policy.shared_lstm:
            latent = actor_latent.detach()  # type: ignore[union-attr]
        elif self.policy.lstm_critic is None:
            latent = self.policy.critic(features)
        else:
            latent = _run(self.policy.lstm_critic, features, groups, "vf")
        return apply_layers(self._feedforward.critic, latent).flatten()


def _run(lstm: nn.LSTM, features: th.Tensor, groups: list[Group], role: str) -> th.Tensor:
    """
    :param features: shape (n, input size)
    :param role: "pi" or "vf": which states are the LSTM's
    :return: outputs of the LSTM, shape (n, hidden size)
    """
    outputs = []
    for group in groups:
        state = getattr(group.states, role)
        padded = group.pad(features).reshape(state[0].shape[1], -1, lstm.input_size)
        output, _ = lstm(padded.transpose(0, 1), state)
        outputs.append(output.transpose(0, 1).flatten(0, 1))
    return in_order(groups, outputs)


def is_plain_lstm(lstm: nn.Module) -> bool:
    """Whether :class:`LSTMStepper` can compute the LSTM: in single precision on a CPU, and with its default options."""
    if not is_plain(lstm, nn.LSTM) or has_hooks(lstm):
        return False
    options = (lstm.bidirectional, lstm.batch_first, lstm.proj_size > 0, not lstm.bias)
    return not any(options) and all(p.is_cpu and p.dtype == th.float32 for p in lstm.parameters())


def has_contrib_forward(policy: Any) -> bool:
    """:return: whether the forward passes are those of sb3-contrib's recurrent policies, without hooks, and on a CPU"""
    if not has_sb3_forward(policy, [CONTRIB_POLICY], [*SB3_FORWARD, "_process_sequence"]):
        return False
    lstms = [policy.lstm_actor, *([] if policy.lstm_critic is None else [policy.lstm_critic])]
    return all(map(is_plain_lstm, lstms)) and not (policy.critic is not None and has_hooks(policy.critic))


def make_recurrent_runner(policy: Any, first_states: States) -> RecurrentRunner:
    """:return: the fast runner if the policy's forward passes are sb3-contrib's own, else the general one"""
    return (FastRecurrentRunner if has_contrib_forward(policy) else RecurrentRunner)(policy, first_states)

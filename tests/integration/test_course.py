"""The notebooks of docs/course run as a reader downloads them, what they say holds, and their exercises can be solved."""

from pathlib import Path

import course
import execution
import nbformat
import numpy as np
import pytest
from helpers import mdp

from sb3_vpg.estimators import Formulation, gae

notebooks = pytest.mark.parametrize("notebook", execution.NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.slow
@notebooks
def test_a_notebook_runs_and_its_statements_hold(notebook: Path):
    if not execution.can_execute(notebook):
        pytest.skip("EnvPool is not installed")
    # The cells contain the assertions
    cells = {cell.id: cell for cell in execution.executed(notebook).cells if cell.cell_type == "code"}
    outputs = [output for cell in cells.values() for output in cell.outputs]
    messages = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not messages, "a reader sees warnings"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert cells["exercise-check"].outputs[0].text.startswith("Not written yet")


@notebooks
def test_a_notebook_has_no_outputs_and_an_exercise(notebook: Path):
    cells = nbformat.read(notebook, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")
    ids = [cell.id for cell in cells]
    exercise = [ids.index(f"exercise-{part}") for part in ("cell", "check")] + [ids.index("solution-cell")]
    assert exercise == sorted(exercise)
    solution = cells[exercise[-1]].source
    assert "check(solution)" in solution
    assert "assert rejects(check, " in solution, "the test must find a wrong answer"


def test_a_notebook_that_needs_envpool_is_shown_without_outputs_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    without = [path for path in execution.NOTEBOOKS if not execution.can_execute(path)]
    assert [path.stem for path in without] == ["8_to_ppo"]
    assert not any(cell.get("outputs") for cell in execution.executed(without[0]).cells)


def test_what_a_reader_downloads_contains_the_shared_module():
    first, *others = execution.standalone(execution.NOTEBOOKS[0]).cells
    assert first.source == "%%writefile course.py\n" + Path(course.__file__).read_text().rstrip()
    assert len(others) == len(nbformat.read(execution.NOTEBOOKS[0], as_version=4).cells)


def test_the_mdp_of_the_course_is_that_of_the_tests():
    model = mdp.make_model(1, n_episodes=1, estimator="reward_to_go", discount_state_distribution=True)
    logits = mdp.policy_logits(model).numpy()
    theta = logits[:, 1] - logits[:, 0]
    pi = mdp.action_probabilities(model)
    np.testing.assert_allclose(course.probability_of_action_1(theta), pi[:, 1])

    expected = {(t.states, t.actions): mdp.probability(t, pi) for t in mdp.trajectories(0.0)}
    columns = zip(*map(np.transpose, course.TRAJECTORIES[:2]), strict=True)
    found = dict(zip(((tuple(states), tuple(actions)) for states, actions in columns), course.probabilities(theta)))
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()))

    for ours, theirs in zip(course.true_values(pi, mdp.GAMMA), mdp.true_values(model, 0.0)):
        np.testing.assert_allclose(ours, theirs)
    formulation = Formulation("reward_to_go", discount_state_distribution=True, gamma=mdp.GAMMA)
    gradient = course.probabilities(theta) @ course.gradients(theta, formulation(course.rollout())[0])
    # One weight per state: the gradient of the logit of action 1
    np.testing.assert_allclose(gradient, mdp.true_gradient(model, 0.0)[: 2 * mdp.N_STATES].reshape(2, -1)[1], atol=1e-6)


def test_source_prints_the_code_without_the_docstring(capsys: pytest.CaptureFixture[str]):
    course.source(gae)
    printed = capsys.readouterr().out
    assert printed.startswith("# sb3_vpg/estimators.py\n")
    assert "return discounted_sum(td_residual(" in printed
    assert ":param" not in printed
    assert '"""' not in printed


def test_source_refuses_an_excerpt_that_is_gone():
    with pytest.raises(ValueError, match="'no such line' is not in gae"):
        course.source(gae, "no such line")


def test_an_exercise_is_not_written_correct_or_wrong(capsys: pytest.CaptureFixture[str]):
    def check(answer):
        assert answer() == 1

    def not_written():
        raise NotImplementedError

    course.attempt(check, not_written)
    course.attempt(check, lambda: 1)
    assert capsys.readouterr().out.splitlines()[-1] == "Correct."
    with pytest.raises(AssertionError):
        course.attempt(check, lambda: 2)
    assert course.rejects(check, lambda: 2)
    assert not course.rejects(check, lambda: 1)

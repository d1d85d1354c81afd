"""The examples in docs/examples run without warnings, show what they are to show, and print what docs/examples.md says."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.installed import CHECKOUT, call, output_of

EXAMPLES = sorted((CHECKOUT / "docs" / "examples").glob("*.py"))
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def without_numbers(text: str) -> list[str]:
    return NUMBER.sub("#", text).replace("[", " ").split()


def numbers_in(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def rows_of(table: str) -> dict[str, list[float]]:
    """The lines below the header: numbers, by the name in front of them."""
    return {NUMBER.split(line)[0].strip(): numbers_in(line) for line in table.splitlines()[1:]}


def check_quickstart(output: str):
    (before,), (_, after), (loaded,) = map(numbers_in, output.splitlines())
    assert before < 50 < 200 < after == loaded


def check_compare_formulations(output: str):
    final = {name: row[-1] for name, row in rows_of(output).items()}
    assert 1.5 * final.pop("total_return") < min(final.values())


def check_custom_environment_and_policy(output: str):
    *steps_and_gains, theory = map(numbers_in, output.splitlines())
    errors = [abs(gains[0] - theory[0]) + abs(gains[1] - theory[1]) for _, *gains in steps_and_gains]
    assert errors[-1] < 0.5 < errors[0]


def check_measure_gradient_variance(output: str):
    variance = {name: row[0] for name, row in rows_of(output).items()}
    assert min(variance, key=variance.get) == "td_residual"
    assert max(variance, key=variance.get) == "total_return"
    assert variance["time"] < variance["reward_to_go"] == 1


CHECKS: dict[str, Callable[[str], None]] = {
    "quickstart": check_quickstart,
    "compare_formulations": check_compare_formulations,
    "custom_environment_and_policy": check_custom_environment_and_policy,
    "measure_gradient_variance": check_measure_gradient_variance,
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_shows_what_it_is_to_show(example: Path, tmp_path: Path):
    command = (sys.executable, "-W", "error", example)
    output = output_of(call(*command, cwd=tmp_path, env={"PYTHONPATH": str(CHECKOUT)}))
    CHECKS[example.stem](output)

    gallery = (CHECKOUT / "docs" / "examples.md").read_text()
    shown = re.search(rf"{{literalinclude}} examples/{example.name}\n```\n\n```text\n(.*?)```\n", gallery, re.DOTALL)
    # Another machine may round in another way
    assert without_numbers(output) == without_numbers(shown[1])

# The commands of CONTRIBUTING.md, in an environment with `pip install -e ".[dev]"`
.PHONY: format lint type pytest doc check benchmark

# Sort imports, reformat
format:
	ruff check --select I --fix
	ruff format

lint:
	ruff format --check
	ruff check

type:
	mypy

pytest:
	python -m pytest -n 2

doc:
	python -m sphinx -W --keep-going -n -q docs build/docs

check: lint type pytest doc

# Frames per second as multiples of A2C's, beside the committed ones: under five minutes
benchmark:
	python benchmarks/slower.py

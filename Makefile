# Thin wrappers; each line can be run by hand.
.PHONY: install test slow distributed lint quickstart ci

install: .venv/bin/memlm

.venv/bin/memlm: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -e '.[test]'
	touch $@

test: install
	.venv/bin/pytest -n auto

slow: install
	.venv/bin/pytest -m 'slow and not distributed'

distributed: install
	.venv/bin/pytest -m distributed

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

quickstart: install
	.venv/bin/memlm fit --config configs/quickstart.yaml

ci:
	.ci/run

# Two commands are enough: `make lab CH=1` and `make test`. Both make .venv first.

CODE ?= src

.DEFAULT_GOAL := help
.PHONY: help setup lab stop grade test lint check lock clean
MAKEFLAGS += --no-print-directory

help: ## show this list
	@sed -nE 's/^([a-z]+):[^#]*## (\([^)]*\) )?(.*)/  make \1|\2|\3/p' Makefile | tr -d '()' | \
	  awk -F '|' '{ printf "%-38s %s\n", $$1 " " $$2, $$3 }'

# Nothing to do takes one start of Python. Otherwise the first Python that is new enough makes .venv.
setup: ## (PYTHON=python3.12) make .venv and install everything into it; does nothing twice
	@if [ -z "$(PYTHON)" ] && .venv/bin/python -IS scripts/setup_env.py --check 2>/dev/null; then exit 0; fi; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3); do \
	  if "$$python" -IS -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec "$$python" -I scripts/setup_env.py; \
	  fi; \
	done; \
	echo "topeka: Python 3.11 or newer is needed; looked for: $(or $(PYTHON),python3.11 to 3.14 and python3)." \
	  "Install it (Debian 12: apt install python3 python3-venv; macOS: brew install python@3.11)," \
	  "or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 3

lab: setup ## (CH=1 [NO_SERVE=1]) begin a chapter: JupyterLab, its labs, your next step
	@.venv/bin/topeka lab "$(or $(CH),$(error which chapter? make lab CH=1))" $(if $(NO_SERVE),--no-serve)

stop: setup ## end JupyterLab
	@.venv/bin/topeka stop

grade: setup ## (CH=1 [CODE=solutions]) grade a chapter, your code or the solutions
	@.venv/bin/topeka grade "$(or $(CH),$(error which chapter? make grade CH=1))" --code "$(CODE)"

test: setup ## run the packages' own tests, and every lab's tests against its solution
	@.venv/bin/python -m pytest shared/tests grader/tests labs --code solutions

lint: setup ## check formatting, types, and that SYLLABUS.md is up to date
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy
	@.venv/bin/topeka syllabus --check

check: setup ## for authors: skeletons fail, solutions pass, misconceptions are caught
	@.venv/bin/topeka check all

lock: setup ## resolve docker/requirements anew from the pyproject files
	@scripts/lock.sh

clean: ## remove .venv and caches, and nothing of your work; ends JupyterLab
	@if [ -x .venv/bin/topeka ]; then .venv/bin/topeka stop >/dev/null 2>&1 || true; fi
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .topeka/cache
	@find shared grader labs scripts -name __pycache__ -prune -exec rm -rf {} +

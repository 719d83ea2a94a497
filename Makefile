# Two commands are enough: `make lab CH=1` and `make test`.
#
# Without Docker, or with SANDBOX=local, the first call makes .venv. With a Docker Engine `make lab` starts the
# workspace's container instead. Inside that container the environment is the image's own, TOPEKA_VENV.

CODE ?= src
STACK ?= cpu
PROFILE ?= cpu
# Processes that run tests: a torch process takes about a gigabyte, so a machine of many cores does not get as many.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n)))
VENV := $(or $(TOPEKA_VENV),.venv)

.DEFAULT_GOAL := help
.PHONY: help setup lab up stop logs shell images grade test test-service test-containers lint check lock clean
MAKEFLAGS += --no-print-directory

help: ## show this list
	@sed -nE 's/^([a-z-]+):[^#]*## (\([^)]*\) )?(.*)/  make \1|\2|\3/p' Makefile | tr -d '()' | \
	  awk -F '|' '{ printf "%-46s %s\n", $$1 " " $$2, $$3 }'

# Nothing to do takes one start of Python. Otherwise the first Python that is new enough makes .venv.
setup: ## (PYTHON=python3.12) make .venv and install everything into it; does nothing twice
	@if [ -n "$(TOPEKA_VENV)" ]; then exit 0; fi; \
	if [ -z "$(PYTHON)" ] && .venv/bin/python -IS scripts/setup_env.py --check 2>/dev/null; then exit 0; fi; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3); do \
	  if "$$python" -IS -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec "$$python" -I scripts/setup_env.py; \
	  fi; \
	done; \
	echo "topeka: Python 3.11 or newer is needed; looked for: $(or $(PYTHON),python3.11 to 3.14 and python3)." \
	  "Install it (Debian 12: apt install python3 python3-venv; macOS: brew install python@3.11)," \
	  "or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 3

lab: ## (CH=1 [NO_SERVE=1] [SANDBOX=local]) begin a chapter: JupyterLab, the dashboard, its labs, your next step
	@chapter="$(or $(CH),$(error which chapter? make lab CH=1))"; \
	if [ -z "$(NO_SERVE)$(TOPEKA_VENV)" ] && [ "$(SANDBOX)" != local ] && python3 scripts/workspace.py usable 2>/dev/null; then \
	  exec python3 scripts/workspace.py lab "$$chapter"; \
	fi; \
	$(MAKE) setup && exec $(VENV)/bin/topeka lab "$$chapter" $(if $(NO_SERVE),--no-serve)

up: ## ([PROFILE=gpu]) start the containers of cpu, gpu or multi-gpu, and print their addresses
	@python3 scripts/workspace.py up "$(PROFILE)"

stop: ## end JupyterLab, the dashboard and the containers; your files and settings stay
	@if [ -x $(VENV)/bin/topeka ]; then $(VENV)/bin/topeka stop; fi
	@if [ -z "$(TOPEKA_VENV)" ] && python3 scripts/workspace.py usable 2>/dev/null; then python3 scripts/workspace.py stop; fi

logs: ## show what the containers said
	@python3 scripts/workspace.py logs

shell: ## a terminal in the workspace's container
	@python3 scripts/workspace.py shell

images: ## ([STACK=cuda]) build the images of cpu, cuda or multi-gpu
	@scripts/images.sh "$(STACK)"

grade: setup ## (CH=1 [CODE=solutions]) grade a chapter, your code or the solutions
	@$(VENV)/bin/topeka grade "$(or $(CH),$(error which chapter? make grade CH=1))" --code "$(CODE)"

PYTEST = $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal
ATTACKS = grader/tests/test_forging.py
IN_CONTAINERS = $(wildcard grader/tests/test_docker_*.py grader/tests/test_neighbour_*.py)

test: setup ## ([JOBS=1]) run the packages' own tests, and every lab's tests against its solution
	@$(PYTEST) shared/tests grader/tests labs --code solutions --ignore grader/tests/service --ignore $(ATTACKS) \
	  $(addprefix --ignore ,$(IN_CONTAINERS))

test-service: setup ## ([JOBS=1]) test the grader's service and dashboard: servers, workers, a browser; and attacks on gradings
	@$(PYTEST) grader/tests/service $(ATTACKS)

test-containers: setup ## test grading in containers, images, compose, code-server, JupyterLab and the devcontainer for real
	@$(PYTEST) $(IN_CONTAINERS)
	@scripts/test_containers.sh

lint: setup ## check formatting, types, and that SYLLABUS.md is up to date
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/topeka syllabus --check

check: setup ## for authors: skeletons fail, solutions pass, misconceptions are caught
	@$(VENV)/bin/topeka check all

lock: setup ## resolve docker/requirements anew from the pyproject files
	@scripts/lock.sh

clean: ## remove .venv and caches, and nothing of your work; ends what runs
	@if [ -x .venv/bin/topeka ]; then .venv/bin/topeka stop >/dev/null 2>&1 || true; fi
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .topeka/cache
	@find shared grader labs scripts -name __pycache__ -prune -exec rm -rf {} +

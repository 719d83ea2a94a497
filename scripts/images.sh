#!/usr/bin/env bash
# Build the images of a stack: scripts/images.sh [cpu|cuda|multi-gpu|grader|STACK-sandbox ...]
#
# Wheels of pip's find-links folder (or WHEELS=DIR) and the CA bundle of pip (or CA=FILE) are passed on where
# there are any, so that a network that works for `make setup` works here too.
set -euo pipefail
cd "$(dirname "$0")/.."
docker buildx version >/dev/null 2>&1 || {
    echo "images: docker buildx is needed (Debian: apt-get install docker-buildx)" >&2
    exit 3
}
folder=${WHEELS-${PIP_FIND_LINKS:-}}
export WHEELS=
[ ! -d "$folder" ] || WHEELS=$folder
export CA=${CA-${PIP_CERT:-}}
COMMIT=$(git describe --always --abbrev=12 --exclude='*' --dirty=+changes 2>/dev/null || echo unknown)
VERSIONS=$(python3 -c 'import json; print(json.dumps(json.load(open("docker/versions.json"))))')
export COMMIT VERSIONS
exec docker buildx bake --file docker/bake.hcl "${@:-cpu}" ${PROGRESS:+--progress "$PROGRESS"}

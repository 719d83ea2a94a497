#!/bin/sh
# Runs on your own machine before a devcontainer starts: the container's user becomes the checkout's owner, so
# that every file it writes is yours.
set -eu
cd "$(dirname "$0")/.."
mkdir -p .topeka
uid=$(stat -c %u . 2>/dev/null || stat -f %u .)
draft=.topeka/devcontainer.$1.$$
printf 'services:\n  workspace-%s:\n    user: "%s:0"\n' "$1" "$uid" >"$draft"
mv "$draft" ".topeka/devcontainer.$1.yaml"

#!/usr/bin/env bash
# Re-resolve docker/requirements/*.txt from the pyproject files, with hashes and without index lines.
#
#   cpu.txt        everything a CPU machine installs except torch and the CUDA libraries it may bring
#   torch-cpu.txt  the CPU build of torch (written by hand: one hash a wheel, see the file)
#   torch-pypi.txt torch as PyPI has it: a CUDA build on Linux, a CPU build on macOS
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
out=docker/requirements
export UV_CUSTOM_COMPILE_COMMAND="make lock"
common=(--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --quiet)

# Which CUDA libraries torch wants depends on where torch comes from, so they belong to torch-pypi.txt.
without=(--no-emit-package torch --no-emit-package topeka-shared --no-emit-package topeka-grader)
for name in $(env -u UV_FIND_LINKS "$uv" pip compile - "${common[@]}" --no-header --no-annotate <<<"torch==2.13.0" |
    sed -nE 's/^((nvidia|cuda|triton)[a-z0-9-]*)(\[[a-z,]*\])?==.*/\1/p'); do
    without+=(--no-emit-package "$name")
done

"$uv" pip compile pyproject.toml shared/pyproject.toml grader/pyproject.toml --group build --group dev \
    "${common[@]}" "${without[@]}" -o $out/cpu.txt
env -u UV_FIND_LINKS "$uv" pip compile - "${common[@]}" -c $out/cpu.txt -o $out/torch-pypi.txt <<<"torch==2.13.0"
git --no-pager diff --stat -- $out

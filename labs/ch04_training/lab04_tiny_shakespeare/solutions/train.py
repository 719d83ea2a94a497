"""A whole run: text, tokenizer, batches, training that survives Ctrl-C, a loss curve, text again.

    python labs/ch04_training/lab04_tiny_shakespeare/src/train.py [--steps 200] [--seed 1] [--resume]

Sources: Karpathy 2022, nanoGPT (the budget, the split, the recipe to compare with); Jordan et al. 2024, "Muon",
kellerjordan.github.io, and modded-nanogpt (which weights Muon is for); Fan et al. 2018, "Hierarchical Neural Story
Generation", section 5.1, arXiv:1805.04833 (top-k sampling).
"""

import argparse
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from display import draw_losses, interrupt_noted, progress_shown
from model import GPT, ModelConfig
from torch import Tensor, nn

try:
    from shared.earlier import solution_of
except ModuleNotFoundError:  # run as a program in a checkout where nothing is installed
    _checkout = next(p for p in Path(__file__).resolve().parents if (p / "shared" / "src").is_dir())
    sys.path.insert(0, str(_checkout / "shared" / "src"))
    from shared.earlier import solution_of

AdamW = solution_of("ch04/lab03", "optimizers").AdamW
Muon = solution_of("ch04/lab03", "optimizers").Muon
loop = solution_of("ch04/lab03", "training")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is made from a text, except the seed.

    The defaults are our recipe: 2,000 steps of 6 * 128 = 768 characters.

    Attributes:
        model: of which `vocab_size` is replaced by the number of characters in the text.
        steps: how many steps a whole run has.
        batch: how many windows of `model.context` characters a step sees.
        optimizer: "muon" for the matrices in the blocks and AdamW for the rest, or "adamw" for all.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon.
        betas: of AdamW.
        weight_decay: of Muon; with "adamw", of every weight with two axes.
        warmup: how many steps the learning rate takes to rise.
        decay: how it falls: "linear" to 0, or nanoGPT's "cosine" to a tenth.
        clip: largest norm of the gradients; None does not clip.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int = 2000
    batch: int = 6
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 2e-3
    muon_lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    warmup: int = 50
    decay: Literal["linear", "cosine"] = "linear"
    clip: float | None = None


# --- Part 1: text to batches ------------------------------------------------------------------


class CharTokenizer:
    """One token for each character.

    Attributes:
        characters: those it knows, in order; the token of `characters[i]` is i.
    """

    def __init__(self, characters: str) -> None:
        self.characters = characters

    @classmethod
    def of(cls, text: str) -> "CharTokenizer":
        """Return the tokenizer that knows the characters of `text`, sorted by code point."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tensor:
        """Return the tokens of `text`, int64, as many as it has characters.

        Raises:
            ValueError: the text has a character that the tokenizer does not know; the message shows it
                as `repr` does.
        """
        ids = {character: i for i, character in enumerate(self.characters)}
        if unknown := set(text) - ids.keys():
            raise ValueError(f"the tokenizer does not know {', '.join(map(repr, sorted(unknown)))}")
        return torch.tensor([ids[character] for character in text], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """Return the text of `ids`, (n,), on any device. It undoes `encode`."""
        return "".join(self.characters[i] for i in ids.tolist())


class Windows:
    """Batches of windows that begin anywhere in a text.

    Attributes:
        ids: the whole text, (n,).
        context: T, the length of a window.
        batch: B, how many windows are in a batch.
        generator: draws where they begin.
    """

    def __init__(self, ids: Tensor, context: int, batch: int, *, seed: int) -> None:
        """Remember the text, and seed the generator.

        Raises:
            ValueError: the text is too short for one window and the character after it.
        """
        if len(ids) <= context:
            raise ValueError(f"a window of {context} and what follows needs more than {len(ids)} characters")
        self.ids, self.context, self.batch = ids, context, batch
        self.generator = torch.Generator().manual_seed(seed)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both (B, T): the target of a character is the one after it.

        Windows begin at random, each independently of the others. Every beginning is equally likely for
        which inputs and targets lie inside the text. `generator` is the only source of randomness.
        """
        starts = torch.randint(len(self.ids) - self.context, (self.batch,), generator=self.generator)
        at = starts[:, None] + torch.arange(self.context + 1)  # (B, T + 1)
        windows = self.ids[at]
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what decides the batches to come."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go to where `state_dict` was taken."""
        self.generator.set_state(state["generator"])


# --- Part 2: what a model is worth ------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it is open, the model is in evaluation mode and nothing records gradients."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)


def validation_loss(model: GPT, ids: Tensor, *, batch: int = 64) -> float:
    """Return the mean loss, in nats per character, over all characters of a text but the first.

    The text is cut into windows of T = `model.config.context` that do not overlap: the first predicts
    characters 1 ... T from characters 0 ... T - 1, the next T + 1 ... 2 T from T ... 2 T - 1, and so on.
    The last one may be shorter. So each character is predicted exactly once, from those of its own
    window, and each counts the same.

    Args:
        model: see `evaluating`.
        ids: (n,), on the model's device.
        batch: how many whole windows the model sees at a time. The result does not depend on it, but for rounding.

    Raises:
        ValueError: the text has fewer than two characters.
    """
    if len(ids) < 2:
        raise ValueError("a loss needs two characters at least: one to see, one to predict")
    T = model.config.context
    whole = (len(ids) - 1) // T * T  # how many characters are predicted in whole windows
    inputs, targets = ids[:whole].view(-1, T), ids[1 : whole + 1].view(-1, T)
    pieces = list(zip(inputs.split(batch), targets.split(batch), strict=True)) if whole else []
    if whole < len(ids) - 1:
        pieces.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    with evaluating(model):
        total = sum(
            F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item() for x, y in pieces
        )
    return total / (len(ids) - 1)


def sample(
    model: GPT,
    tokenizer: CharTokenizer,
    prompt: str,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> str:
    """Return `length` characters that the model writes after `prompt`, without the prompt.

    One after the other: the logits after the last character, divided by `temperature`; all but the `top_k`
    largest are ruled out; a softmax; one draw. The model never sees more than its last
    `model.config.context` characters. At temperature 0 the character with the largest logit is taken.

    Args:
        model: see `evaluating`.
        tokenizer: the one it was trained with.
        prompt: at least one character.
        length: how many to write; 0 is fine.
        temperature: 0 or more.
        top_k: 1 or more; None, or more than there are characters, rules out none.
        generator: the only source of randomness, on the CPU; None is PyTorch's own.

    Raises:
        ValueError: the prompt is empty, or an argument is out of range.
    """
    if not prompt or length < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"need a prompt, length >= 0, temperature >= 0, top_k >= 1, not {length}, {temperature}, {top_k}"
        )
    ids = tokenizer.encode(prompt).to(next(model.parameters()).device)
    with evaluating(model):
        for _ in range(length):
            logits = model(ids[None, -model.config.context :])[0, -1].float().cpu()  # (V,)
            if temperature == 0:
                choice = logits.argmax(keepdim=True)
            else:
                if top_k is not None and top_k < len(logits):
                    logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
                choice = (logits / temperature).softmax(dim=-1).multinomial(1, generator=generator)
            ids = torch.cat((ids, choice.to(ids.device)))
    return tokenizer.decode(ids[len(prompt) :])


# --- Part 3: a step ---------------------------------------------------------------------------


def make_optimizers(model: GPT, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together have every parameter of `model` exactly once.

    "muon": lab 4.3's `Muon` for every parameter of `model.blocks` that has two axes, with `muon_lr` and
    `weight_decay`, `adjust_lr="match_rms_adamw"` and `ns_dtype=torch.float32`; and lab 4.3's `AdamW` for
    all others (embedding, head, whatever has one axis), with `lr`, `betas` and no decay. In this order.

    "adamw": one `AdamW` with `lr` and `betas`, and `weight_decay` for the weights with two axes only.
    """
    if recipe.optimizer == "adamw":
        flat = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": [p for p in model.parameters() if p.dim() >= 2]}]
        groups += [{"params": flat, "weight_decay": 0.0}] if flat else []
        return [AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)]
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    ours = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ours]
    return [
        Muon(
            matrices,
            lr=recipe.muon_lr,
            weight_decay=recipe.weight_decay,
            adjust_lr="match_rms_adamw",
            ns_dtype=torch.float32,
        ),
        AdamW(others, lr=recipe.lr, betas=recipe.betas, weight_decay=0.0),
    ]


def schedule(step: int, recipe: Recipe) -> float:
    """Return what the peak learning rates are multiplied by at step number `step` = 0 ... steps - 1.

    "linear": the product of a warm-up, (step + 1) / warmup until that reaches 1, and a fall,
    1 - step / steps, that starts at step 0. "cosine": nanoGPT's, from lab 4.3. A warm-up of 0 is none.
    """
    if recipe.decay == "cosine":
        return loop.learning_rate(
            step, peak=1.0, warmup=min(recipe.warmup, recipe.steps), total=recipe.steps, final=0.1
        )
    rise = min(1.0, (step + 1) / max(1, recipe.warmup))
    return rise * (1 - step / recipe.steps)


def take_step(
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    inputs: Tensor,
    targets: Tensor,
    clip: float | None,
) -> float:
    """Take one step of all optimizers, and return the mean loss before it."""
    model.zero_grad()
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    if clip is not None:
        loop.clip_gradients_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


# --- Part 4: the run --------------------------------------------------------------------------


@dataclass
class Run:
    """A training run between two steps: all that the next step depends on, and what has been measured.

    Attributes:
        recipe, tokenizer, model, optimizers, windows: what it is made of.
        folder: for `checkpoint.pt` and `loss.svg`; None saves nothing.
        losses: of each step so far.
        validation_losses: (how many steps had been taken, loss), see `train`.
    """

    recipe: Recipe
    tokenizer: CharTokenizer
    model: GPT
    optimizers: Sequence[torch.optim.Optimizer]
    windows: Windows
    folder: Path | None
    losses: list[float]
    validation_losses: list[tuple[int, float]]

    def save(self) -> None:
        """Write the checkpoint and the figure, each whole or not at all. Call it between two steps."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        loop.save_checkpoint(
            self.folder / "checkpoint.pt",
            step=len(self.losses),
            model=self.model,
            optimizers=self.optimizers,
            data=self,
        )
        draw_losses(self.folder / "loss.svg", self.losses, self.validation_losses, steps=self.recipe.steps)

    def load(self) -> None:
        """Go to where the run in `folder` was saved last.

        Raises:
            FileNotFoundError: no run was saved there.
            ValueError: it was another one: another recipe, or other characters.
        """
        if self.folder is None or not (file := self.folder / "checkpoint.pt").is_file():
            raise FileNotFoundError(f"there is no run to go on with in {self.folder}")
        saved = torch.load(file, map_location="cpu", weights_only=True)["data"]
        mine = self.state_dict()
        for name in ("recipe", "characters"):
            if saved[name] != mine[name]:
                raise ValueError(
                    f"the run in {self.folder} has another {name}: {saved[name]}, not {mine[name]}"
                )
        loop.load_checkpoint(file, model=self.model, optimizers=self.optimizers, data=self)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside model, optimizers and random generators."""
        return {
            "recipe": asdict(self.recipe),
            "characters": self.tokenizer.characters,
            "windows": self.windows.state_dict(),
            "losses": list(self.losses),
            "validation_losses": list(self.validation_losses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.windows.load_state_dict(state["windows"])
        self.losses[:] = state["losses"]
        self.validation_losses[:] = state["validation_losses"]


@dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        model: trained.
        tokenizer: its characters.
        losses: of each step, before the step, over the whole run.
        validation_losses: (how many steps had been taken, loss), see `train`.
    """

    model: GPT
    tokenizer: CharTokenizer
    losses: list[float]
    validation_losses: list[tuple[int, float]]


def train(
    text: str,
    recipe: Recipe = Recipe(),
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    validation: str | None = None,
    evaluate_every: int = 500,
    save_every: int = 100,
    progress: bool = False,
    resume: bool = False,
) -> Result:
    """Train a new model on `text`, or go on with one.

    Step number `step` = 0, 1, ...: the learning rates of `schedule(step, recipe)`, the next batch, `take_step`.

    With a `folder`, the run is saved before the first step, after every `save_every` steps, counted from
    the first one of the run, and after the last. It is only ever saved *between* two steps, when all
    optimizers have taken the same number, so that a run that goes on is bit for bit the one that was
    never interrupted.

    Ctrl-C finishes the step that is being taken, saves the run, and then raises KeyboardInterrupt.
    Whatever error ends a step in its midst leaves in `folder` what was saved last.

    Args:
        text: to learn.
        recipe: how.
        seed: of the first weights and of the batches: an equal seed gives an equal run.
        folder: where the run is saved, see `Run.save`.
        validation: another text. Its `validation_loss` is measured after every `evaluate_every` steps and
            after the last. Measuring does not change the run.
        evaluate_every: see `validation`.
        save_every: see above.
        progress: whether to show how far it is.
        resume: go on with the run in `folder`, up to `recipe.steps`, instead of beginning.

    Raises:
        ValueError: `resume` for a run of another recipe or other characters; the text is too short; the
            validation text has other characters.
        FileNotFoundError: `resume` without a run in `folder`.
        KeyboardInterrupt: after Ctrl-C.
    """
    torch.manual_seed(seed)
    tokenizer = CharTokenizer.of(text)
    model = GPT(replace(recipe.model, vocab_size=len(tokenizer.characters)))
    windows = Windows(tokenizer.encode(text), recipe.model.context, recipe.batch, seed=seed)
    folder = None if folder is None else Path(folder)
    run = Run(recipe, tokenizer, model, make_optimizers(model, recipe), windows, folder, [], [])
    held_out = None if validation is None else tokenizer.encode(validation)
    if resume:
        run.load()
    with interrupt_noted() as interrupted, progress_shown(recipe.steps, progress) as show:
        go_on(run, held_out, evaluate_every, save_every, show, interrupted)
    return Result(model, tokenizer, run.losses, run.validation_losses)


def go_on(
    run: Run,
    held_out: Tensor | None,
    evaluate_every: int,
    save_every: int,
    show: Callable[[int, float], None],
    interrupted: threading.Event,
) -> None:
    """Take the steps that `run` still lacks: the loop of `train`, whose docstring says what happens when.

    As many steps have been taken as there are numbers in `run.losses`; each step adds one.

    Args:
        run: changed in place.
        held_out: the validation text, (n,), or None.
        evaluate_every: see `train`.
        save_every: see `train`.
        show: called after each step with the number of steps taken and the loss of this one.
        interrupted: `interrupted.is_set()` once Ctrl-C was pressed.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
    """
    recipe = run.recipe
    run.save()
    for step in range(len(run.losses), recipe.steps):
        loop.set_learning_rates(run.optimizers, schedule(step, recipe))
        run.losses.append(take_step(run.model, run.optimizers, *run.windows.next_batch(), recipe.clip))
        done, last = step + 1, step + 1 == recipe.steps
        show(done, run.losses[-1])
        if held_out is not None and (last or done % evaluate_every == 0):
            run.validation_losses.append((done, validation_loss(run.model, held_out)))
        if last or done % save_every == 0 or interrupted.is_set():
            run.save()  # here, and nowhere else: all optimizers have taken the same steps
        if interrupted.is_set():
            raise KeyboardInterrupt


def load_model(folder: str | Path) -> tuple[GPT, CharTokenizer]:
    """Return the model that a run in `folder` saved last, in evaluation mode, and its tokenizer."""
    state = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
    tokenizer = CharTokenizer(state["data"]["characters"])
    config = state["data"]["recipe"]["model"] | {"vocab_size": len(tokenizer.characters)}
    model = GPT(ModelConfig(**config))
    model.load_state_dict(state["model"])
    return model.eval(), tokenizer


# --- Part 5: from the command line -------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on tiny Shakespeare from the command line; return the exit code."""
    from shared.data import DataUnavailable, tiny_shakespeare

    parser = argparse.ArgumentParser(description="Train a GPT on tiny Shakespeare, on the CPU.")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="length of the run (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "run",
        help="for checkpoint.pt and loss.svg (run/, beside src/)",
    )
    options = parser.parse_args(arguments)
    recipe = replace(Recipe(), steps=options.steps)
    figure = options.folder / "loss.svg"
    try:
        corpus = tiny_shakespeare()
        text, held_out = corpus.split()
        print(f"{corpus.name}: {len(corpus.text):,} characters. The loss curve is in {figure}")
        result = train(
            text,
            recipe,
            seed=options.seed,
            folder=options.folder,
            validation=held_out,
            progress=True,
            resume=options.resume,
        )
    except KeyboardInterrupt:
        print(
            f"\nStopped. The run is in {options.folder}: go on with the same command and --resume",
            file=sys.stderr,
        )
        return 130
    except (DataUnavailable, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(p.numel() for p in result.model.parameters())
    print(f"validation loss {result.validation_losses[-1][1]:.4f} nats per character, {size:,} parameters\n")
    generator = torch.Generator().manual_seed(options.seed)
    print(sample(result.model, result.tokenizer, "\n", 500, temperature=0.8, generator=generator))
    return 0


if __name__ == "__main__":
    sys.exit(main())

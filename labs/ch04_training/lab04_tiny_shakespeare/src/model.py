"""A GPT of less than a million parameters, as it is built in 2026, and the parts of 2019 to compare with.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2, as in nanoGPT);
Su et al. 2021, "RoFormer", section 3.4, arXiv:2104.09864 (rotary positions); Zhang and Sennrich 2019, "Root Mean
Square Layer Normalization", arXiv:1910.07467; Henry et al. 2020, "Query-Key Normalization for Transformers",
arXiv:2010.04245; Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202 (SwiGLU); Jordan et al.
2024, modded-nanogpt (the quiet start).

Shapes: B sequences, T characters, E = width features, H heads of D = E / H, F hidden features, V characters known.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what a `GPT` computes, except its weights.

    The defaults are our recipe. The other choices are GPT-2's, and code for them is given.

    Attributes:
        vocab_size: V, how many characters there are.
        context: how many characters the model is trained to look at.
        layers: number of blocks.
        heads: H.
        width: E, a multiple of H; D = E / H is even.
        positions: "rotary", or GPT-2's "learned", which ends at `context`.
        norm: "rms": RMSNorm without weights, also for the embedding. "layer": LayerNorm with a weight.
        qk_norm: whether queries and keys are normalised, head by head.
        activation: of the feed-forward layer: "swiglu", or GPT-2's "gelu".
        start: of the weights: "quiet", see `GPT.reset_parameters`, or "gpt2".
        tied: whether the head is the embedding's matrix once more. For `start="gpt2"` only.
        rotary_base: the slowest pair of features turns by nearly 1 / rotary_base from character to character.
    """

    vocab_size: int = 65
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128
    positions: Literal["rotary", "learned"] = "rotary"
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = True
    activation: Literal["swiglu", "gelu"] = "swiglu"
    start: Literal["quiet", "gpt2"] = "quiet"
    tied: bool = False
    rotary_base: float = 1000.0

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} cannot be cut into {self.heads} heads of an even size")
        if self.tied and self.start != "gpt2":
            raise ValueError('a head that starts at zero cannot be the embedding: tied needs start="gpt2"')


# --- Part 1: the two sub-layers ---------------------------------------------------------------


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles t * base^(-2 i / D), each (T, D / 2), float32.

    Row t is for position t = 0 ... T - 1, column i for the i-th pair of features.
    """
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)  # 2 i
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = position[:, None] * base ** (-pair / head_dim)  # (T, D / 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of features (x_i, x_{i + D/2}) by the angle of its position and pair.

    The pair (a, b) becomes (a cos - b sin, a sin + b cos). This is the layout of Llama in Hugging Face
    transformers: the first half of the features are the a, the second half the b.

    Args:
        x: (B, H, T, D), of any memory layout. It is not modified.
        cos: (T, D / 2), see `rotary_tables`.
        sin: (T, D / 2).

    Returns:
        (B, H, T, D), of the dtype of `x`, which may have fewer digits than the tables.
    """
    # YOUR CODE HERE
    # The pairs are (x_0, x_{D/2}), (x_1, x_{D/2 + 1}), ...: cut the last axis in the middle, then turn all
    # pairs at once and put the halves side by side again. cos and sin are (T, D / 2) and broadcast over B and H.
    # Tables are float32 even if x is bfloat16: what dtype comes out?
    raise NotImplementedError("turn every pair of features by its angle")


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no character reads a later one.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: nn.Linear, E -> E, without bias. Head h owns features
            h * D to (h + 1) * D of the first three's output and of the last one's input.
        config: the model's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        E = config.width
        self.q_proj, self.k_proj = nn.Linear(E, E, bias=False), nn.Linear(E, E, bias=False)
        self.v_proj, self.out_proj = nn.Linear(E, E, bias=False), nn.Linear(E, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each character reads from itself and those before it.

        Queries and keys, each head on its own: with `qk_norm` they are divided by the root of the mean
        of their D squares (`F.rms_norm` with its default eps); then, with "rotary" positions, rotated by
        their positions. Scores are divided by sqrt(D), as always.

        Args:
            x: (B, T, E).

        Returns:
            (B, T, E).
        """
        # YOUR CODE HERE
        # 1. Project three times, and cut each result into heads: (B, H, T, D), as in lab 1.3.
        # 2. Queries and keys, not values: norm (F.rms_norm over the features of one head), then rotate.
        # 3. F.scaled_dot_product_attention is fine here. It divides by sqrt(D); which argument hides the future?
        # 4. Put the heads side by side again, (B, T, E), and mix them by out_proj.
        raise NotImplementedError("causal attention with normed and rotated queries and keys")


class FeedForward(nn.Module):
    """The feed-forward layer, each character on its own: E -> F -> E, without biases.

    Attributes:
        up_proj: nn.Linear, E -> F. F is 4 E, but 8 E / 3 rounded down for SwiGLU, which has a third matrix.
        gate_proj: nn.Linear, E -> F, for SwiGLU only.
        down_proj: nn.Linear, F -> E.
        activation: as in `ModelConfig`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        E = config.width
        hidden = 8 * E // 3 if self.activation == "swiglu" else 4 * E
        if self.activation == "swiglu":
            self.gate_proj = nn.Linear(E, hidden, bias=False)
        self.up_proj, self.down_proj = nn.Linear(E, hidden, bias=False), nn.Linear(hidden, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, of the shape of `x`, (B, T, E).

        "swiglu": down_proj(silu(gate_proj(x)) * up_proj(x)).
        "gelu": down_proj(gelu(up_proj(x))), the exact GELU.
        """
        if self.activation == "gelu":
            return self.down_proj(F.gelu(self.up_proj(x)))
        # YOUR CODE HERE
        # GPT-2's layer is given. SwiGLU is lab 2.3's: of the two projections that widen, one goes through silu.
        # Look at the docstring for which.
        raise NotImplementedError("SwiGLU")


# --- Part 2: the model ------------------------------------------------------------------------


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm that stands before each sub-layer and before the head."""
    if config.norm == "rms":
        return nn.RMSNorm(config.width, elementwise_affine=False)
    return nn.LayerNorm(config.width, bias=False)


class Block(nn.Module):
    """A pre-norm block, as in lab 2.4."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention, self.feed_forward = CausalSelfAttention(config), FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after both sub-layers, (B, T, E)."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """Characters in, logits of each next character out.

    Attributes:
        config: what it was built from.
        embedding: nn.Embedding, V rows of E.
        positions: nn.Embedding, `context` rows of E, for "learned" positions only.
        blocks: nn.ModuleList of `Block`.
        norm: before the head.
        head: nn.Linear, E -> V, without bias. Tied, its weight is that of `embedding`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        if config.start == "gpt2":
            self.reset_parameters_as_gpt2()
        else:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, so that every block starts as the identity and every logit as 0.

        They come from PyTorch's own generator, which this does not seed.

        out_proj and down_proj of every block, and the head: all zeros. Every other weight of an
        nn.Linear: normal, with mean 0 and standard deviation sqrt(3 / (4 n)) for n inputs.
        Embeddings: normal, with mean 0 and standard deviation 1.
        """
        # YOUR CODE HERE
        # Walk over self.named_modules(): names look like blocks.2.attention.out_proj. Which modules write to the
        # stream, and which is the head? nn.init.zeros_ and nn.init.normal_ change a weight in place.
        # The number of inputs of an nn.Linear is its in_features: not the same for all of them.
        raise NotImplementedError("zeros for what writes, normal for the rest")

    @torch.no_grad()
    def reset_parameters_as_gpt2(self) -> None:
        """Draw all weights as GPT-2 does: standard deviation 0.02, less for what writes to the stream."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith(("out_proj", "down_proj"))
                nn.init.normal_(
                    module.weight, std=0.02 / math.sqrt(2 * self.config.layers) if writes else 0.02
                )

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the character after each one.

        The stream starts with the embeddings, plus those of the positions 0 ... T - 1 if they are learned.
        With norm "rms" it is first divided by the root of the mean of its E squares (`F.rms_norm`). Then come
        the blocks, `norm` and `head`.

        Args:
            ids: (B, T), integers from 0 to V - 1. With rotary positions T may exceed `context`.

        Returns:
            (B, T, V).
        """
        config = self.config
        x = self.embedding(ids)  # (B, T, E)
        if config.positions == "learned":
            x = x + self.positions.weight[: ids.shape[1]]
        # YOUR CODE HERE
        # 1. If the config says so, norm the embeddings.
        # 2. The blocks, one after the other; the last norm; the head.
        raise NotImplementedError("norm, blocks, norm, head")

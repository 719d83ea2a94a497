"""A GPT: embeddings, a stack of blocks, a last norm, and a head that shares the token embedding.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 and
table 2 (GPT-2: the last norm, the scaled initialisation, the four sizes); Press and Wolf 2017, "Using
the Output Embedding to Improve Language Models", arXiv:1608.05859 (tying).

Shapes: B sequences, T tokens, V = vocab_size, C = context, E = d_model features, L = num_layers blocks
of H = num_heads heads, F = d_ff hidden features.
"""

import math
from dataclasses import dataclass

import torch
from shared.earlier import solution_of
from torch import Tensor, nn

# Chapter 2's block: norm1, attention (qkv_proj, out_proj), norm2, feed_forward (up_proj, down_proj).
GPT2Block = solution_of("ch02/lab04").GPT2Block


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides a GPT's shape.

    Attributes:
        vocab_size: V.
        context: C, the most tokens a sequence may have.
        num_layers: L.
        num_heads: H, a divisor of E.
        d_model: E.
        d_ff: F; None means 4 * E.
        dropout: probability for the embeddings, the attention weights and what sub-layers return.
        eps: of every norm.
        tied: whether the head shares the token embedding's weight.
    """

    vocab_size: int = 50257
    context: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    d_model: int = 768
    d_ff: int | None = None
    dropout: float = 0.0
    eps: float = 1e-5
    tied: bool = True


GPT2_SIZES = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(num_layers=24, num_heads=16, d_model=1024),
    "gpt2-large": GPTConfig(num_layers=36, num_heads=20, d_model=1280),
    "gpt2-xl": GPTConfig(num_layers=48, num_heads=25, d_model=1600),
}


def parameter_count(config: GPTConfig) -> int:
    """Return how many numbers a GPT of this configuration learns, from a formula, without making it.

    A tied weight counts once.
    """
    V, C, L, E = config.vocab_size, config.context, config.num_layers, config.d_model
    F = 4 * E if config.d_ff is None else config.d_ff
    norm = 2 * E
    attention = E * 3 * E + 3 * E + E * E + E
    feed_forward = E * F + F + F * E + E
    head = 0 if config.tied else V * E
    return V * E + C * E + L * (2 * norm + attention + feed_forward) + norm + head


class GPT(nn.Module):
    """A decoder-only transformer, GPT-2's.

    Attributes:
        config: what it was made from.
        token_embedding: nn.Embedding, V x E.
        position_embedding: nn.Embedding, C x E.
        dropout: nn.Dropout, for the sum of the two.
        blocks: nn.ModuleList of L `GPT2Block`.
        final_norm: nn.LayerNorm, E.
        head: nn.Linear, E -> V, without bias. If tied, its weight is token_embedding.weight itself.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            GPT2Block(config.d_model, config.num_heads, config.d_ff, eps=config.eps, dropout=config.dropout)
            for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every parameter its first value.

        Weights of embeddings and linear layers are drawn from a normal distribution of mean 0 and
        standard deviation 0.02, except those of the 2L projections that write to the stream (`out_proj`
        and `down_proj`): 0.02 / sqrt(2L). Biases are 0. Norms have weight 1 and bias 0.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith(("out_proj", "down_proj"))
                module.weight.normal_(std=0.02 / math.sqrt(2 * self.config.num_layers) if writes else 0.02)
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """Return the stream before the first block, after each block, and after the last norm.

        Args:
            ids: (B, T), int64, each from 0 to V - 1, T from 1 to C.

        Returns:
            L + 2 tensors (B, T, E).

        Raises:
            ValueError: T is larger than C.
        """
        T = ids.shape[1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit a context of {self.config.context}")
        positions = torch.arange(T, device=ids.device)
        states = [self.dropout(self.token_embedding(ids) + self.position_embedding(positions))]  # (B, T, E)
        for block in self.blocks:
            states.append(block(states[-1]))
        return [*states, self.final_norm(states[-1])]

    def forward(self, ids: Tensor) -> Tensor:
        """Return for every token the logits of the one that follows it.

        Args:
            ids: as for `hidden_states`.

        Returns:
            (B, T, V).

        Raises:
            ValueError: T is larger than C.
        """
        return self.head(self.hidden_states(ids)[-1])

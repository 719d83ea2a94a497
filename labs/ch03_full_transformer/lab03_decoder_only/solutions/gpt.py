"""A GPT: embeddings, a stack of blocks, a last norm, and a head that shares the token embedding.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 and
table 2 (GPT-2: the last norm, the scaled initialisation, the four sizes); Press and Wolf 2017, "Using
the Output Embedding to Improve Language Models", arXiv:1608.05859 (tying); Fan et al. 2018,
"Hierarchical Neural Story Generation", section 5.4, arXiv:1805.04833 (sampling from the top k).

Shapes: B sequences, T tokens, V = vocab_size, C = context, E = d_model features, L = num_layers blocks
of H = num_heads heads, F = d_ff hidden features.
"""

import math
from dataclasses import dataclass

import torch
from shared.earlier import solution_of
from torch import Tensor, nn

# --- Part 1: the configuration ----------------------------------------------------------------

# Lab 2.4's block: norm1, attention (qkv_proj, out_proj), norm2, feed_forward (up_proj, down_proj).
# GPT2Block(d_model, num_heads, d_ff=None, *, eps=1e-5, dropout=0.0)
GPT2Block = solution_of("ch02/lab04").GPT2Block


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides a GPT's shape.

    Attributes:
        vocab_size: V.
        context: C, the most tokens that the model sees at once.
        num_layers: L.
        num_heads: H, a divisor of E.
        d_model: E.
        d_ff: F; None means 4 * E.
        dropout: probability, in [0, 1), for the embeddings, the attention weights and what sub-layers
            return.
        eps: of every norm.
        tied: whether the head shares the token embedding's weight.

    Raises:
        ValueError: a size is less than 1, H does not divide E, or dropout is outside [0, 1).
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

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "num_layers", "num_heads", "d_model", "d_ff"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


GPT2_SIZES = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(num_layers=24, num_heads=16, d_model=1024),
    "gpt2-large": GPTConfig(num_layers=36, num_heads=20, d_model=1280),
    "gpt2-xl": GPTConfig(num_layers=48, num_heads=25, d_model=1600),
}


def parameter_count(config: GPTConfig) -> int:
    """Return how many numbers a GPT of this configuration learns, by arithmetic on its sizes.

    No module is made for it. A tied weight counts once.

    Returns:
        An int, exact for any sizes.
    """
    V, C, L, E = config.vocab_size, config.context, config.num_layers, config.d_model
    F = 4 * E if config.d_ff is None else config.d_ff
    norm = 2 * E
    attention = (E * 3 * E + 3 * E) + (E * E + E)
    feed_forward = (E * F + F) + (F * E + E)
    head = 0 if config.tied else V * E
    return V * E + C * E + L * (2 * norm + attention + feed_forward) + norm + head


# --- Part 2: from logits to a token -----------------------------------------------------------


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one token for every row of logits.

    Token v is drawn with probability softmax(logits / temperature)[v], each row on its own. With
    `top_k` only the k tokens of the row's largest logits take part, in the same proportions. At
    temperature 0 the choice is the token of the largest logit.

    Args:
        logits: (B, V), of any memory layout. They may hold -inf, but not everywhere in a row. They are
            not modified.
        temperature: 0 or more.
        top_k: 1 or more; V or more is the same as None, all tokens. Which tokens of equal logits
            take the last of the k places is not specified.
        generator: what random numbers come from; None is torch's default generator.

    Returns:
        (B,), int64.

    Raises:
        ValueError: temperature is negative, or top_k is less than 1.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = (logits / temperature).softmax(dim=-1)  # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


# --- Part 3: the model ------------------------------------------------------------------------


class GPT(nn.Module):
    """A decoder-only transformer, GPT-2's.

    Its parameters are those of the modules below, and it has no persistent buffers. So the names in
    its state dict are such as "token_embedding.weight", "blocks.0.attention.qkv_proj.bias",
    "final_norm.weight" and "head.weight".

    Attributes:
        config: what it was made from.
        token_embedding: nn.Embedding, V x E.
        position_embedding: nn.Embedding, C x E.
        dropout: nn.Dropout, for the sum of the two.
        blocks: nn.ModuleList of L `GPT2Block`, the first to be applied first.
        final_norm: nn.LayerNorm, E.
        head: nn.Linear, E -> V, without bias. If tied, its weight is token_embedding.weight itself:
            the same Parameter, registered in both modules.
    """

    def __init__(self, config: GPTConfig) -> None:
        """Make the modules and give every parameter its first value, by `reset_parameters`.

        Under `torch.device("meta")` every parameter is on the meta device: a shape without memory.
        """
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
        """Give every parameter its first value, in place and whatever it was before.

        Weights of embeddings and linear layers are drawn from a normal distribution of mean 0 and
        standard deviation 0.02, except those of the 2L projections that write to the stream (`out_proj`
        and `down_proj`): 0.02 / sqrt(2L). Biases are 0. Norms have weight 1 and bias 0. Every number is
        drawn on its own, from torch's default generator: a seed determines the model.
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

        The stream starts as the sum of a token's embedding and that of its position, 0 for the first token
        of `ids`. In training mode that sum goes through dropout.

        Args:
            ids: (B, T), int64, each from 0 to V - 1, T from 1 to C, of any memory layout. They are
                not modified.

        Returns:
            L + 2 tensors (B, T, E), of the dtype of the parameters and on the device of `ids`.

        Raises:
            ValueError: T is larger than C.
        """
        T, C = ids.shape[1], self.config.context
        if T > C:
            raise ValueError(f"{T} tokens do not fit a context of {C}")
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
            (B, T, V), of the dtype of the parameters: the head's reading of the normalised stream.

        Raises:
            ValueError: T is larger than C.
        """
        return self.head(self.hidden_states(ids)[-1])

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue every sequence by `num_tokens` tokens, chosen one after the other by `sample`.

        Each is chosen from the logits of the last token there is. Of a sequence longer than C the model
        sees the last C tokens, at positions 0 to C - 1. It runs in evaluation mode and keeps nothing for a
        backward pass. Afterwards it is in the mode it was in before, also if an error was raised.

        Args:
            ids: (B, T), int64, T at least 1; T may be larger than C. They are not modified.
            num_tokens: 0 or more.
            temperature: as for `sample`.
            top_k: as for `sample`.
            generator: as for `sample`.

        Returns:
            (B, T + num_tokens), int64: `ids` and what follows them.

        Raises:
            ValueError: T is 0, num_tokens is negative, or `sample` refuses temperature or top_k.
        """
        if ids.shape[1] == 0:
            raise ValueError("there is no token to continue from")
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be 0 or more, not {num_tokens}")
        was_training = self.training
        self.eval()
        try:
            for _ in range(num_tokens):
                logits = self(ids[:, -self.config.context :])[:, -1]  # (B, V)
                token = sample(logits, temperature=temperature, top_k=top_k, generator=generator)
                ids = torch.cat([ids, token[:, None]], dim=1)  # (B, T + 1), and so on
        finally:
            self.train(was_training)
        return ids

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
    # YOUR CODE HERE
    # Walk through the model and write down the shape of every weight and every bias: two embeddings, L
    # blocks (two norms, four linear layers), one more norm, the head. Which of them have no bias? What
    # does `tied` change? Mind d_ff=None. Keep to ints: a float forgets the last digits of large numbers.
    raise NotImplementedError("the number of parameters, from the sizes")


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
    # YOUR CODE HERE
    # 1. Refuse what cannot be meant, with ValueError.
    # 2. Temperature 0 is a case of its own: there is nothing to draw, and nothing to divide by.
    # 3. top_k: find each row's k-th largest logit, and give what lies below it a probability of 0. Which
    #    logit has that probability? The logits you were given stay as they are.
    # 4. Divide, softmax, draw: look up torch.multinomial, its shape of result and its `generator`.
    raise NotImplementedError("one token for every row of logits")


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
        # YOUR CODE HERE
        # 1. Make the six modules that the class lists under Attributes. Each field of the configuration
        #    has somewhere to go, some of them several places.
        # 2. Tie the head: one Parameter in two modules, not two Parameters that are equal for now.
        # 3. self.reset_parameters(), once it is written.
        raise NotImplementedError("embeddings, blocks, last norm, head")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every parameter its first value, in place and whatever it was before.

        Weights of embeddings and linear layers are drawn from a normal distribution of mean 0 and
        standard deviation 0.02, except those of the 2L projections that write to the stream (`out_proj`
        and `down_proj`): 0.02 / sqrt(2L). Biases are 0. Norms have weight 1 and bias 0. Every number is
        drawn on its own, from torch's default generator: a seed determines the model.
        """
        # YOUR CODE HERE
        # Go through self.named_modules() (or self.named_parameters()) and treat each by its kind and name:
        # Tensor.normal_, fill_ and zero_ write into a parameter; a new Parameter would untie the head.
        # Which names end on one of the two projections that write to the stream? Biases: the linear layers
        # have some, the norms too, the head has none.
        raise NotImplementedError("normal weights, some of them smaller; zero biases; norms of 1 and 0")

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
        # YOUR CODE HERE
        # 1. More than C tokens: ValueError.
        # 2. The positions are 0 .. T - 1, on the device of `ids`. Look both tables up, add, drop out.
        # 3. Let each block read what the one before it returned, and keep every result.
        # 4. The last norm is one more entry; it replaces none.
        raise NotImplementedError("L + 2 streams: embedded, after each block, normalised")

    def forward(self, ids: Tensor) -> Tensor:
        """Return for every token the logits of the one that follows it.

        Args:
            ids: as for `hidden_states`.

        Returns:
            (B, T, V), of the dtype of the parameters: the head's reading of the normalised stream.

        Raises:
            ValueError: T is larger than C.
        """
        # YOUR CODE HERE
        # The head reads one of the hidden states. Which one?
        # There is no softmax here: the loss and `sample` take logits.
        raise NotImplementedError("logits, (B, T, V)")

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
        # YOUR CODE HERE
        # 1. Refuse what cannot be meant, with ValueError.
        # 2. Note self.training, then self.eval(); `try ... finally` brings it back, whatever happens.
        # 3. num_tokens times: logits of at most C tokens, those of the last position, `sample`, append
        #    (a new tensor: the caller keeps theirs). The token just chosen is read in the next turn.
        raise NotImplementedError("choose, append, repeat")

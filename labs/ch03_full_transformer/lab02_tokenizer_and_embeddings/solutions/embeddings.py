"""The two ends of a GPT: token and position embeddings, and an output head that shares their weights.

Sources: Press and Wolf 2017, "Using the Output Embedding to Improve Language Models", arXiv:1608.05859
(tying); Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.1
(learned positions, the same weight at both ends).

Shapes: B sequences, T tokens, V = vocab_size, C = context, E = d_model features. A `...` stands for
any number of leading dimensions, such as B, or none.
"""

import torch
from torch import Tensor, nn


class TiedEmbeddings(nn.Module):
    """Both ends of a GPT. They share the token weight: there is one parameter, used twice.

    Attributes:
        token: nn.Parameter, (V, E). Row i belongs to the token with id i.
        position: nn.Parameter, (C, E). Row p belongs to position p.
    """

    def __init__(self, vocab_size: int, context: int, d_model: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(vocab_size, d_model))
        self.position = nn.Parameter(0.01 * torch.randn(context, d_model))

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """Return for every token the sum of its row of `token` and the row of its position in `position`.

        Args:
            ids: (..., T), int64, each from 0 to V - 1, of any memory layout. They are not modified.
            start: position of the first token. The others follow: start, start + 1, ..., start + T - 1.

        Returns:
            (..., T, E), of the dtype of the parameters.

        Raises:
            ValueError: if `start` is negative, or the last token stands at position C or later.
        """
        T, C = ids.shape[-1], self.position.shape[0]
        if start < 0 or start + T > C:
            raise ValueError(f"positions {start} to {start + T - 1} do not fit a context of {C}")
        return self.token[ids] + self.position[start : start + T]  # (..., T, E) + (T, E)

    def logits(self, x: Tensor) -> Tensor:
        """Return the product of every row of `x` with every row of `token`: a score for each token.

        There is no bias and no scale.

        Args:
            x: (..., E), of the dtype of the parameters and of any memory layout. It is not modified.

        Returns:
            (..., V). Gradients reach `token` from here as well as from `embed`.
        """
        return x @ self.token.T  # (..., E) @ (E, V) -> (..., V)


def tied_gradient(
    ids: Tensor, grad_embedded: Tensor, x: Tensor, grad_logits: Tensor, vocab_size: int
) -> Tensor:
    """Return the gradient of a tied token weight, from both of its uses, by hand.

    Of a loss L that depends on W, (V, E), through embedded = W[ids] and through logits = x W^T.
    `x` counts as a constant here: what W did to it has reached us by `grad_embedded`.

    Args:
        ids: (B, T), int64. An id may occur many times.
        grad_embedded: dL / d embedded, (B, T, E).
        x: what the head was given, (B, T, E).
        grad_logits: dL / d logits, (B, T, V).
        vocab_size: V.

    Returns:
        dL / dW, (V, E), of the dtype of `grad_embedded`. No input is modified.
    """
    E = x.shape[-1]
    from_embedding = grad_embedded.new_zeros(vocab_size, E).index_add(
        0, ids.flatten(), grad_embedded.reshape(-1, E)
    )
    from_head = grad_logits.reshape(-1, vocab_size).T @ x.reshape(-1, E)  # (V, BT) @ (BT, E)
    return from_embedding + from_head

"""Networks on sequences: a causal character transformer, an LSTM, and the transformer on image patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention, (batch, length, width) to the same shape."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the attended values; with `causal` a position sees itself and what is before it."""
        batch, length, width = x.shape
        split = self.inputs(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)) with a GELU of 4 width."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, causal=causal))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        x = x + self.attention(x)
        result: Tensor = x + self.mlp(x)
        return result


def _init_weights_(model: nn.Module) -> None:
    """Weights from N(0, 0.02^2) and biases zero, as in GPT-2."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class Transformer(nn.Module):
    """Causal transformer on tokens: int64 (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, *, width: int = 96, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        _init_weights_(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.blocks(x))
        return logits


class LSTM(nn.Module):
    """Embedding, LSTM layers and a linear layer: int64 (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, *, width: int = 128, layers: int = 1) -> None:
        del context  # the same signature for every model
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position, from a zero state."""
        logits: Tensor = self.head(self.lstm(self.tokens(tokens))[0])
        return logits


class VisionTransformer(nn.Module):
    """Transformer on image patches, averaged over the patches: (batch, channels, height, width) to logits."""

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int, *, patch: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((height // patch) * (breadth // patch), width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        _init_weights_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        norm, linear = self.head
        logits: Tensor = linear(norm(self.blocks(x)).mean(1))
        return logits


SEQUENCE_MODELS: dict[str, Callable[..., nn.Module]] = {"transformer": Transformer, "lstm": LSTM}

"""A transformer that foretells characters, and the text it reads: that of text.pt.

The text is Python's own reference, which every Python ships for `help()`.
"""

import pydoc_data.topics

import torch
from torch import Tensor, nn
from torch.nn import functional

CONTEXT = 64
"""Characters that the network sees."""

LETTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The known characters; what is none of them is a blank."""

JUDGED = 8
"""Every eighth topic is for tests."""


class CharacterTransformer(nn.Module):
    """[N, T] int64 -> [N, T, letters] logits of the characters that follow; 0.32 M.

    A causal convolution over five characters, then blocks of attention and linear
    layers.
    """

    def __init__(self, width: int = 96, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, width))
        self.near = nn.Conv1d(width, width, 5)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character at every place."""
        x = self.embedding(tokens)  # [N, T, width]
        before = functional.pad(x.transpose(1, 2), (4, 0))  # nothing of what follows
        x = x + self.near(before).transpose(1, 2).relu() + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Block(nn.Module):
    """Attention to what came before, and two linear layers, each beside a shortcut."""

    HEADS = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to the same."""
        n, t, width = x.shape
        heads = self.qkv(self.norm1(x)).view(n, t, 3, self.HEADS, width // self.HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, T, width / heads]
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.narrow(functional.gelu(self.widen(self.norm2(x))))


def text(part: str) -> Tensor:
    """Characters as places in `LETTERS`, int64 [N].

    Args:
        part: "train" or "test", of different topics.
    """
    topics = sorted(pydoc_data.topics.topics.items())
    chosen = [
        page
        for index, (_, page) in enumerate(topics)
        if (index % JUDGED == 0) == (part == "test")
    ]
    place = {letter: index for index, letter in enumerate(LETTERS)}
    blank = place[" "]
    return torch.tensor([place.get(letter, blank) for letter in "\n".join(chosen)])


def passages(part: str, count: int) -> tuple[Tensor, Tensor]:
    """Passages of the text and what follows each of their characters, [count, T]."""
    letters = text(part)
    most = len(letters) - CONTEXT - 1
    starts = torch.linspace(0, most, count).long()[:, None]
    places = starts + torch.arange(CONTEXT)
    return letters[places], letters[places + 1]

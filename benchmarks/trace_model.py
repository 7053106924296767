"""The small Mixture-of-Experts language model of the router trace: its text, its tokens and its layers.

The text is what every Python installation carries: the standard library, as three domains (code, prose, tables).
`record_trace.py` trains the model and records its router; the examples train and serve it with other MoE layers.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sysconfig
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

DOMAINS = ("code", "prose", "tables")

# Text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A text, the domain that it belongs to, and where it is from."""

    domain: str
    name: str  # "json/decoder.py", relative to the standard library
    text: str

    @property
    def held_out(self) -> bool:
        """One document in five is kept from training, by its name, so that the choice needs no state."""
        return hashlib.sha256(f"{self.domain}:{self.name}".encode()).digest()[0] % 5 == 0


def split_source(source: str) -> tuple[str, str]:
    """Splits a module into its code, without comments and docstrings, and its prose, which is just those."""
    tree = ast.parse(source)
    prose = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is not None:
            prose.append(docstring)
            node.body = node.body[1:] or [ast.Pass()]
    comments = [
        token.string.lstrip("#! ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    return ast.unparse(tree), "\n\n".join([*prose, "\n".join(comments)])


def stdlib_documents() -> Iterator[Document]:
    """Yields code and prose of the standard library's modules, and the character tables among them."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        # Left out: what is installed or built on one machine, and tests, which many installations lack.
        if re.search(r"(^|/)(site-packages|test|tests|idle_test|config-[^/]*|_sysconfigdata[^/]*)(/|$)", name):
            continue
        if name.startswith("pydoc_data/"):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if name == "html/entities.py" or (name.startswith("encodings/") and "decoding_table" in source):
            yield Document("tables", name, source)
            continue
        try:
            code, prose = split_source(source)
        except (SyntaxError, tokenize.TokenError):  # lib2to3 carries broken modules on purpose
            continue
        yield Document("code", name, code)
        yield Document("prose", name, prose)


def reference_documents() -> Iterator[Document]:
    """Yields the topics of ``help()`` as prose and the names of Unicode characters as tables."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document("prose", f"pydoc_data/topics:{name}", text)
    for block in range(0, 0x3000, 0x100):
        lines = [
            f"U+{point:04X}\t{unicodedata.category(chr(point))}\t{unicodedata.name(chr(point), '<control>')}"
            for point in range(block, block + 0x100)
            if unicodedata.category(chr(point)) != "Cn"
        ]
        yield Document("tables", f"unicodedata:{block:04X}", "\n".join(lines))


# Byte-pair encoding -------------------------------------------------------------------------------

WORD = re.compile(r"\n[ ]*| ?[^\W\d_]+| ?\d| ?[^\w\s]{1,4}|\s|_")


class Tokenizer:
    """Byte-pair encoding: the 256 bytes, and the pairs merged most often in the commonest words."""

    def __init__(self, texts: list[str], size: int, n_words: int = 8000) -> None:
        """Learns ``size - 256`` merges from the ``n_words`` commonest words of ``texts``."""
        counts = Counter(word for text in texts for word in WORD.findall(text))
        words = [(list(word.encode()), count) for word, count in counts.most_common(n_words)]
        self.rank: dict[tuple[int, int], int] = {}
        self.known: dict[str, list[int]] = {}
        for new in range(256, size):
            pairs: Counter[tuple[int, int]] = Counter()
            for parts, count in words:
                for pair in pairwise(parts):
                    pairs[pair] += count
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            self.rank[best] = new
            for parts, _ in words:
                self._merge(parts, best, new)

    @staticmethod
    def _merge(parts: list[int], pair: tuple[int, int], new: int) -> None:
        at = 0
        while at < len(parts) - 1:
            if (parts[at], parts[at + 1]) == pair:
                parts[at : at + 2] = [new]
            at += 1

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, each below ``size``."""
        tokens: list[int] = []
        for word in WORD.findall(text):
            if word not in self.known:
                parts = list(word.encode())
                while pairs := self.rank.keys() & set(pairwise(parts)):
                    first = min(pairs, key=self.rank.__getitem__)
                    self._merge(parts, first, self.rank[first])
                self.known[word] = parts
            tokens += self.known[word]
        return tokens


# Model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; widths in features, ``context`` in tokens."""

    vocabulary: int = 1024
    context: int = 128
    width: int = 128
    heads: int = 4
    layers: int = 4
    n_experts: int = 64
    top_k: int = 6
    expert_width: int = 64


class MoE(nn.Module):
    """Softmax router, top-k, weights scaled to sum 1.

    Keeps the indices of its last forward, ``[tokens, top_k]`` int64.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Draws router and experts at random."""
        super().__init__()
        self.top_k = config.top_k
        self.n_experts = config.n_experts
        self.router = nn.Linear(config.width, config.n_experts, bias=False)
        self.up = nn.Parameter(torch.randn(config.n_experts, config.width, config.expert_width) * config.width**-0.5)
        self.down = nn.Parameter(
            torch.randn(config.n_experts, config.expert_width, config.width) * config.expert_width**-0.5 / config.layers
        )
        self.indices = torch.empty(0, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, width]`` to the same shape; any number of tokens per expert, none dropped."""
        weights, indices = torch.topk(functional.softmax(self.router(x), dim=-1), self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        self.indices = indices.detach()
        by_expert = torch.argsort(indices.flatten(), stable=True)
        counts = torch.bincount(indices.flatten(), minlength=self.n_experts).tolist()
        rows = by_expert // self.top_k
        # NOTE: unbind once. Indexing up[expert] would give every expert a gradient as large as all of them.
        parts = x.index_select(0, rows).split(counts)
        experts = zip(parts, self.up.unbind(), self.down.unbind(), strict=True)
        results = [functional.gelu(part @ up) @ down for part, up, down in experts]
        return torch.zeros_like(x).index_add(0, rows, torch.cat(results) * weights.flatten()[by_expert, None])


class Block(nn.Module):
    """Causal attention, then experts, each behind an RMS norm and around a residual."""

    def __init__(self, config: ModelConfig, make_moe: Callable[[], nn.Module] | None = None) -> None:
        """Draws attention and experts at random; ``make_moe`` makes the experts, by default a `MoE`."""
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.moe_norm = nn.RMSNorm(config.width)
        self.moe = MoE(config) if make_moe is None else make_moe()

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, context, width]`` to the same shape."""
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.moe(self.moe_norm(x).view(-1, width)).view_as(x)


class LanguageModel(nn.Module):
    """A causal transformer whose every feed-forward layer is a mixture of experts."""

    def __init__(self, config: ModelConfig, make_moe: Callable[[], nn.Module] | None = None) -> None:
        """Draws every layer at random; ``make_moe`` as for `Block`, once for each layer."""
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.randn(config.context, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config, make_moe) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, context]`` int64 to logits ``[batch, context, vocabulary]``."""
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token; ``[batch, context + 1]`` int64."""
        return functional.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

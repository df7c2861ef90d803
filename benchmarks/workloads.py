"""Texts of known lengths, made of whole words of the vocabulary, seeded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.config import ModelConfig
from model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Workload:
    """Texts and the tokens of each, special tokens included."""

    name: str
    texts: list[str]
    lengths: np.ndarray

    def flops(self, config: ModelConfig) -> float:
        """Of one pass: the products of the linear layers and of attention."""
        bert = config.bert
        linear = 2 * (4 * bert.hidden_size**2 + 2 * bert.hidden_size * bert.intermediate_size)
        attention = 4 * bert.hidden_size * self.lengths
        return float((self.lengths * (linear + attention)).sum() * bert.num_hidden_layers)


def lengths_of(name: str, count: int) -> np.ndarray:
    """Tokens of each text: `short` as STS-B's sentences, `mixed` log-normal paragraphs, `long` all 512."""
    random = np.random.default_rng(7)
    if name == "short":
        return np.clip(random.normal(14, 5, count).round(), 6, 40).astype(int)
    if name == "mixed":
        return np.clip(random.lognormal(np.log(98), 0.75, count).round(), 8, 256).astype(int)
    return np.full(count, 512)


def make_workload(name: str, count: int, folder: Path) -> Workload:
    """`count` texts for the tokenizer of a checkpoint."""
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder, config)
    words = np.array([word for n in range(2000, 12000) if (word := tokenizer.token_text(n)).isascii() and word.isalpha()])
    random = np.random.default_rng(11)
    lengths = lengths_of(name, count)
    texts = [" ".join(random.choice(words, length - 2)) for length in lengths]
    return Workload(name, texts, lengths)

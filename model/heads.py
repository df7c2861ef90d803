"""What stands on top of the hidden rows."""

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Batch
from model.bert import ACTIVATIONS
from model.config import BertConfig, DenseConfig
from model.errors import UnsupportedModel


class Pooler(nn.Module):
    """BERT's own pooler on the hidden rows of [CLS]: dense + tanh, [N, H] -> [N, H]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


class Classifier(nn.Module):
    """A score for each label, before softmax or sigmoid, from the hidden rows of [CLS]: [N, H] -> [N, labels]."""

    def __init__(self, hidden_size: int, labels: int) -> None:
        super().__init__()
        self.pooler = Pooler(hidden_size)
        self.linear = nn.Linear(hidden_size, labels)

    def forward(self, first: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.pooler(first))
        return scores


class MaskedLM(nn.Module):
    """A weight for each token of the vocabulary V (SPLADE, arXiv 2109.10086, equation 6): [T, H] -> [N, V], none below 0.

    log(1 + ReLU(x)) rises with x, so the maximum over a text's tokens is taken first, on few logits at a time.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        x = self.norm(self.activation(self.dense(hidden)))  # [T, H]
        together = np.flatnonzero(np.diff(np.cumsum(batch.lengths) // _DECODED_ROWS)) + 1
        lengths = np.split(batch.lengths, together)
        rows = torch.split(x, [int(some.sum()) for some in lengths])
        largest = [_largest(self.decoder(part), some.tolist()) for part, some in zip(rows, lengths, strict=True)]
        return torch.log1p(torch.relu(torch.cat(largest)))


_DECODED_ROWS = 256  # whose logits are in memory at once, give or take one text: 31 MB for a vocabulary of 30,522


def _largest(logits: Tensor, lengths: list[int]) -> Tensor:
    """The largest logit of each token of the vocabulary in each text: [rows, V] -> [texts, V]."""
    return torch.stack([text.amax(dim=0) for text in torch.split(logits, lengths)])


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid)
}


class Projection(nn.Module):
    """A sentence-transformers Dense module on pooled vectors: [N, in] -> [N, out]."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        if config.activation not in _ACTIVATIONS:
            raise UnsupportedModel(
                f"{config.folder}/config.json: activation_function {config.activation} is not supported; "
                f"supported are {', '.join(_ACTIVATIONS)}"
            )
        self.linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
        self.activation = _ACTIVATIONS[config.activation]()

    def forward(self, pooled: Tensor) -> Tensor:
        vectors: Tensor = self.activation(self.linear(pooled))
        return vectors

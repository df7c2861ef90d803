"""BERT (Devlin et al. 2018, arXiv 1810.04805): the architecture, once, on packed rows.

T tokens of the batch · N texts · L tokens of the longest text · H hidden size · A heads · D head size = H / A ·
I intermediate size
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import MultiHeadAttention
from model.batch import Batch
from model.config import Activation, BertConfig

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # the exact one, by erf (arXiv 1606.08415, section 2)
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Embeddings(nn.Module):
    """Token + segment + position (section 3.2 and figure 2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.token = _table(config.vocab_size, config.hidden_size)
        self.segment = _table(config.type_vocab_size, config.hidden_size)
        self.position = _table(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, batch: Batch) -> Tensor:
        summed = self.token(batch.input_ids) + self.segment(batch.type_ids) + self.position(batch.positions)
        x: Tensor = self.norm(summed)
        return x  # [T, H]


def _table(rows: int, columns: int) -> nn.Embedding:
    """An embedding whose rows a checkpoint will fill: drawing them at random first costs a second of start-up."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, columns))  # type: ignore[no-untyped-call]
    return table


class AddNorm(nn.LayerNorm):
    """LayerNorm of a sublayer's output and its residual (arXiv 1706.03762, section 3.1)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + residual)


class FeedForward(nn.Module):
    """Two linear layers with the activation between them: [T, H] -> [T, I] -> [T, H]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.up: nn.Module = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down: nn.Module = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.up(x))  # [T, I]
        x = self.down(x)
        return x  # [T, H]


class Layer(nn.Module):
    """Attention, then feed-forward, each with residual and LayerNorm: [T, H] -> [T, H]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.hidden_size, config.num_attention_heads)
        self.attention_norm: nn.Module = AddNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm: nn.Module = AddNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = self.attention_norm(self.attention(x, batch), x)
        x = self.feed_forward_norm(self.feed_forward(x), x)
        return x

    def first_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """The same for the first token of each text only: [T, H] -> [N, H]."""
        x = self.attention_norm(self.attention.first_rows(x, batch), x[batch.first])
        x = self.feed_forward_norm(self.feed_forward(x), x)
        return x


class Bert(nn.Module):
    """The encoder: a packed batch of T tokens -> hidden rows [T, H]."""

    layers: Sequence[Layer]

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings: nn.Module = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))  # type: ignore[assignment]

    def forward(self, batch: Batch) -> Tensor:
        x: Tensor = self.embeddings(batch)
        for layer in self.layers:
            x = layer(x, batch)
        return x

    def first_rows(self, batch: Batch) -> Tensor:
        """The hidden rows of [CLS] only: [N, H]. Nothing else of the last layer is read, so 9/12 of its products fall away."""
        x: Tensor = self.embeddings(batch)
        for layer in self.layers[:-1]:
            x = layer(x, batch)
        return self.layers[-1].first_rows(x, batch)

"""What stands on top of the hidden rows."""

import torch
from torch import Tensor, nn

from model.config import DenseConfig
from model.errors import UnsupportedModel


class Pooler(nn.Module):
    """BERT's own pooler on the hidden rows of [CLS]: dense + tanh, [N, H] -> [N, H]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


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

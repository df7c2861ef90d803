"""What a checkpoint is: BERT, a pooling, and what stands on it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.bert import Bert
from model.checkpoint import assign, load_bert, load_linear
from model.config import ModelConfig, PoolingMode, transformer_folder
from model.errors import UnsupportedModel
from model.heads import Pooler, Projection
from model.pooling import POOL, first_rows


class Encoder(nn.Module):
    """Packed batches to hidden rows [T, H], or to one vector per text [N, out]."""

    def __init__(self, config: ModelConfig, with_pooler: bool) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config.bert)
        self.pooler = Pooler(config.bert.hidden_size) if with_pooler else None
        self.dense = nn.Sequential(*map(Projection, config.dense))

    @classmethod
    def from_folder(cls, folder: Path) -> "Encoder":
        """Load a checkpoint in float32, ready to run.

        Raises CheckpointError or UnsupportedModel, each with what to do.
        """
        config = ModelConfig.from_folder(folder)
        tensors = load_bert(transformer_folder(folder))
        for number, dense in enumerate(config.dense):
            tensors |= {f"dense.{number}.{name}": t for name, t in load_linear(folder / dense.folder).items()}
        with torch.device("meta"):
            encoder = cls(config, with_pooler=any(name.startswith("pooler.") for name in tensors))
        assign(encoder, tensors, folder)
        return encoder.eval().requires_grad_(False)

    @property
    def poolings(self) -> tuple[PoolingMode, ...]:
        """The poolings that this checkpoint has the weights for."""
        return tuple(mode for mode in POOL if mode != "pooler" or self.pooler is not None)

    def forward(self, batch: Batch, pooling: PoolingMode) -> Tensor:
        """One vector per text: [N, out] float32."""
        if pooling not in self.poolings:
            raise UnsupportedModel(f"the checkpoint has no pooling {pooling!r}; wanted one of {', '.join(self.poolings)}")
        if POOL[pooling] is first_rows:
            return self._finish(self.bert.first_rows(batch), pooling)
        return self.pool(self.bert(batch), batch, pooling)

    def pool(self, hidden: Tensor, batch: Batch, pooling: PoolingMode) -> Tensor:
        """One vector per text, [N, out] float32, from hidden rows that are there already: [T, H]."""
        return self._finish(POOL[pooling](hidden, batch), pooling)

    def _finish(self, pooled: Tensor, pooling: PoolingMode) -> Tensor:
        pooled = pooled.float()
        if pooling == "pooler" and self.pooler is not None:
            pooled = self.pooler(pooled)
        vectors: Tensor = self.dense(pooled)
        return vectors

    def hidden(self, batch: Batch) -> Tensor:
        """The token matrix of all texts, end to end: [T, H] float32."""
        hidden: Tensor = self.bert(batch)
        return hidden.float()

"""What a checkpoint is: BERT, a pooling, and the head that stands on it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.bert import Bert
from model.checkpoint import assign, load_bert, load_linear
from model.config import POOLING_MODES, ModelConfig, PoolingChoice, PoolingMode, Task, transformer_folder
from model.errors import UnsupportedModel
from model.heads import Classifier, MaskedLM, Pooler, Projection
from model.pooling import POOL, first_rows


class Encoder(nn.Module):
    """Packed batches to hidden rows [T, H], or to one row per text [N, out]: its vector, or what the head makes of it."""

    def __init__(self, config: ModelConfig, with_pooler: bool) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config.bert)
        self.pooler = Pooler(config.bert.hidden_size) if with_pooler else None
        self.dense = nn.Sequential(*map(Projection, config.dense))
        self.classifier = Classifier(config.bert.hidden_size, len(config.labels)) if config.labels else None
        self.masked_lm = MaskedLM(config.bert) if config.kind == "sparse" else None

    @classmethod
    def from_folder(cls, folder: Path, pooling: PoolingChoice | None = None) -> "Encoder":
        """Load a checkpoint in float32, ready to run; `pooling` outweighs an embedder's own.

        Raises CheckpointError or UnsupportedModel, each with what to do.
        """
        config = ModelConfig.from_folder(folder, pooling)
        tensors = load_bert(transformer_folder(folder), config.kind, config.tie_word_embeddings)
        for number, dense in enumerate(config.dense):
            tensors |= {f"dense.{number}.{name}": t for name, t in load_linear(folder / dense.folder).items()}
        with torch.device("meta"):
            with_pooler = config.kind == "embedder" and any(name.startswith("pooler.") for name in tensors)
            encoder = cls(config, with_pooler)
        assign(encoder, tensors, folder)
        return encoder.eval().requires_grad_(False)

    @property
    def poolings(self) -> tuple[PoolingMode, ...]:
        """The poolings that an embedder has the weights for; other kinds have none."""
        if self.config.kind != "embedder":
            return ()
        return tuple(mode for mode in POOLING_MODES if mode != "pooler" or self.pooler is not None)

    def forward(self, batch: Batch, task: Task) -> Tensor:
        """One row per text: [N, out] float32."""
        tasks = self.poolings or (self.config.task,)
        if task not in tasks:
            raise UnsupportedModel(f"the checkpoint has no pooling {task!r}; wanted one of {', '.join(tasks)}")
        if POOL.get(task) is first_rows:
            return self._finish(self.bert.first_rows(batch), task)
        return self.pool(self.bert(batch), batch, task)

    def pool(self, hidden: Tensor, batch: Batch, task: Task) -> Tensor:
        """One row per text, [N, out] float32, from hidden rows that are there already: [T, H]."""
        if self.masked_lm is not None:
            weights: Tensor = self.masked_lm(hidden.float(), batch)
            return weights
        return self._finish(POOL[task](hidden, batch), task)

    def _finish(self, pooled: Tensor, task: Task) -> Tensor:
        head = self.classifier if task == "scores" else self.pooler if task == "pooler" else None
        pooled = pooled.float()
        rows: Tensor = self.dense(pooled if head is None else head(pooled))
        return rows

    def hidden(self, batch: Batch) -> Tensor:
        """The token matrix of all texts, end to end: [T, H] float32."""
        hidden: Tensor = self.bert(batch)
        return hidden.float()

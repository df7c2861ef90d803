"""Checkpoints for the tests: the name of the real one, and seeded random ones made with transformers."""

from pathlib import Path
from typing import Any

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    *"我在吃苹果手机一个新的",
]


def save_checkpoint(folder: Path, seed: int = 0, architecture: str = "BertModel", **options: Any) -> Path:
    """Write config.json, model.safetensors and vocab.txt of a random BERT. The folder may be changed by its caller."""
    import torch
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(**{"vocab_size": len(VOCABULARY), **sizes, **options})
    torch.manual_seed(seed)
    getattr(transformers, architecture)(config).eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder

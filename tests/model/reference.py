"""What transformers says, and checkpoints in every shape that the tests want."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import VOCABULARY
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.utils import logging

from model.tokens import Tokens

logging.disable_progress_bar()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def lively_bert(seed: int = 0, architecture: type[Any] = BertModel, **options: Any) -> Any:
    """A seeded BERT of transformers in which every weight matters: sharp attention, biases, LayerNorms that are no identity."""
    sizes = {"vocab_size": len(VOCABULARY), **SMALL, **options}
    # So large that attention is far from even, so small that 24 layers do not blow float32's own noise up to 1e-5.
    config = BertConfig(**sizes, initializer_range=0.6 * sizes["hidden_size"] ** -0.5, attn_implementation="eager")
    torch.manual_seed(seed)
    model = architecture(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def theirs(model: Any, row: Tokens) -> tuple[np.ndarray, np.ndarray | None]:
    """transformers' hidden rows [L, H] and pooler output [H] of one text, alone and therefore without padding."""
    with torch.inference_mode():
        output = model(input_ids=torch.from_numpy(row.ids).long()[None], token_type_ids=torch.from_numpy(row.types).long()[None])
    pooled = output.pooler_output
    return output.last_hidden_state[0].numpy(), None if pooled is None else pooled[0].numpy()


def random_rows(lengths: Sequence[int], vocab_size: int = len(VOCABULARY), segments: int = 1, seed: int = 0) -> list[Tokens]:
    """Texts of random ids; with `segments` the types rise within each text, as in a pair."""
    random = np.random.default_rng(seed)
    return [
        Tokens.of(random.integers(0, vocab_size, length), np.sort(random.integers(0, segments, length))) for length in lengths
    ]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a key that is set to None is taken out."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {key: value for key, value in content.items() if value is not None})


def sentence_transformers_layout(
    folder: Path,
    pooling: Mapping[str, Any] | None = None,
    dense: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]] = (),
    normalize: bool = False,
) -> Path:
    """Stand pooling, Dense (settings, tensors) and Normalize on a checkpoint folder, as sentence-transformers saves them."""
    kinds = ["Transformer", *(["Pooling"] if pooling else []), *["Dense"] * len(dense), *(["Normalize"] if normalize else [])]
    paths = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds) if place)]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    if pooling:
        write_json(folder / "1_Pooling" / "config.json", pooling)
    for path, (settings, tensors) in zip([path for path in paths if "Dense" in path], dense, strict=True):
        write_json(folder / path / "config.json", settings)
        save_file(dict(tensors), folder / path / "model.safetensors")
    return folder

"""Our encoder is transformers' BertModel, number by number, on the same random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import lively_bert, random_rows, theirs

from model.batch import pack
from model.bert import ACTIVATIONS, Embeddings
from model.config import BertConfig
from model.cpu import CpuRunner
from model.encoder import Encoder
from model.tokens import Tokens

SHORT = (1, 2, 5, 16, 33)
MIXED = (1, 2, 7, 33, 33, 128)
LONG = (512, 1, 300, 2)


def shape(layers: int, hidden: int, heads: int, inner: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner}
    return {**sizes, **others}


CONFIGURATIONS = [
    (shape(1, 32, 1, 64), LONG, 1),
    (shape(1, 32, 32, 64), MIXED, 2),
    (shape(1, 40, 5, 17, hidden_act="relu"), MIXED, 2),
    (shape(2, 32, 4, 128), LONG, 2),
    (shape(2, 48, 3, 96, hidden_act="gelu_new"), MIXED, 1),
    (shape(2, 64, 2, 256, hidden_act="silu"), MIXED, 2),
    (shape(2, 128, 2, 512), MIXED, 1),  # bert-tiny
    (shape(2, 100, 10, 30, hidden_act="relu", type_vocab_size=4), SHORT, 4),
    (shape(3, 64, 8, 64, hidden_act="silu", layer_norm_eps=1e-5), MIXED, 1),
    (shape(3, 72, 6, 150, type_vocab_size=1), MIXED, 1),
    (shape(4, 256, 4, 1024, hidden_act="gelu_new"), MIXED, 2),  # bert-mini
    (shape(4, 312, 12, 1200), MIXED, 2),  # TinyBERT
    (shape(4, 512, 8, 2048, hidden_act="relu"), MIXED, 2),  # bert-small
    (shape(5, 96, 12, 384, max_position_embeddings=64), SHORT, 2),
    (shape(6, 384, 12, 1536), (512, 3), 2),  # MiniLM-L6
    (shape(6, 128, 1, 512, hidden_act="gelu_new"), SHORT, 2),
    (shape(8, 160, 5, 640, hidden_act="silu"), SHORT, 1),
    (shape(10, 64, 4, 256, max_position_embeddings=600), (600, 1), 1),
    (shape(12, 384, 12, 1536, hidden_act="relu"), SHORT, 2),  # MiniLM-L12
    (shape(12, 192, 3, 768, layer_norm_eps=1e-6), MIXED, 2),
    (shape(18, 48, 4, 192, hidden_act="gelu_new"), MIXED, 2),
    (shape(24, 32, 2, 64), LONG, 2),
    (shape(2, 1024, 16, 1024, hidden_act="silu"), SHORT, 1),
    (shape(12, 768, 12, 3072), MIXED, 2),  # BERT-base
    (shape(24, 1024, 16, 1024), SHORT, 2),  # BERT-large, but for its 4096: half the time to make it
]


@pytest.mark.parametrize(
    ("options", "lengths", "segments"),
    CONFIGURATIONS,
    ids=["-".join(map(str, options.values())) + f"-{segments}seg" for options, _, segments in CONFIGURATIONS],
)
def test_equals_transformers(tmp_path: Path, options: dict[str, Any], lengths: tuple[int, ...], segments: int) -> None:
    model = lively_bert(vocab_size=50, **options)
    model.save_pretrained(tmp_path)
    rows = random_rows(lengths, 50, segments)
    wanted = [theirs(model, row) for row in rows]
    hidden, pooled = [hidden for hidden, _ in wanted], [pooled for _, pooled in wanted]

    encoder = Encoder.from_folder(tmp_path)
    with torch.inference_mode():
        plain = encoder.hidden(pack(rows)).numpy()
        np.testing.assert_allclose(plain, np.concatenate(hidden), rtol=0, atol=1e-5)
        np.testing.assert_allclose(encoder(pack(rows), "pooler").numpy(), np.stack(pooled), rtol=0, atol=1e-5)

    runner = CpuRunner(encoder)
    for ours, row in zip(runner.hidden(rows), hidden, strict=True):
        np.testing.assert_allclose(ours, row, rtol=0, atol=1e-5)
    np.testing.assert_allclose(runner(rows, "pooler"), np.stack(pooled), rtol=0, atol=1e-5)


def test_the_table_covers_what_it_claims() -> None:
    shapes = [options for options, _, _ in CONFIGURATIONS]
    assert len(shapes) >= 20
    assert {options.get("hidden_act", "gelu") for options in shapes} == set(ACTIVATIONS)
    assert {min(options["num_hidden_layers"] for options in shapes), max(options["num_hidden_layers"] for options in shapes)} == {
        1,
        24,
    }
    assert {min(options["hidden_size"] for options in shapes), max(options["hidden_size"] for options in shapes)} == {32, 1024}


@pytest.mark.parametrize(
    ("name", "at_one"),
    [("gelu", 0.8413447), ("gelu_new", 0.8411920), ("relu", 1.0), ("silu", 0.7310586)],  # gelu: Φ(1), no tanh in it
)
def test_activations_by_hand(name: str, at_one: float) -> None:
    values = ACTIVATIONS[name](torch.tensor([0.0, 1.0, -20.0]))  # type: ignore[index]
    torch.testing.assert_close(values, torch.tensor([0.0, at_one, 0.0]), rtol=0, atol=1e-6)


def test_embeddings_by_hand() -> None:
    """Token + segment + position, then LayerNorm: (1, 2, 3) has the mean 2 and the variance 2/3."""
    embeddings = Embeddings(BertConfig(vocab_size=2, hidden_size=3, num_attention_heads=1, max_position_embeddings=2))
    with torch.no_grad():
        embeddings.token.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        embeddings.segment.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        embeddings.position.weight.copy_(torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 3.0]]))
        out = embeddings(pack([Tokens.of([0, 1], [0, 1])]))
    torch.testing.assert_close(out[1], torch.tensor([-1.2247449, 0.0, 1.2247449]), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[0], torch.tensor([1.4142136, -0.7071068, -0.7071068]), rtol=0, atol=1e-6)


def test_a_word_has_another_row_in_another_context(make_checkpoint: Callable[..., Path]) -> None:
    """The same token at the same place: equal before the first layer, different after the last."""
    encoder = Encoder.from_folder(make_checkpoint(initializer_range=0.2))
    rows = [Tokens.of([2, 5, 6, 9, 3]), Tokens.of([2, 7, 8, 9, 10, 3])]
    with torch.inference_mode():
        before = encoder.bert.embeddings(pack(rows))
        after = encoder.hidden(pack(rows))
    assert torch.equal(before[3], before[5 + 3])
    assert torch.cosine_similarity(after[3], after[5 + 3], dim=0) < 0.99

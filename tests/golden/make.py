"""Make the golden vectors of all-MiniLM-L6-v2 with sentence-transformers (the extra `bench`): python tests/golden/make.py

Writes texts.json and vectors.npy, [N, 384] float32, normalised, in sentence-transformers' own float32 on a CPU.
"""

import json
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from model.hub import find_model

HERE = Path(__file__).parent
TEXTS = [
    "hello",
    "A man with a hard hat is dancing.",
    "The river bank was flooded after the storm.",
    "She opened an account at the savings bank.",
    " ",
    "?",
    "苹果手机",
    "我在吃苹果。",
    "Zażółć gęślą jaźń",
    "naïve café, e\u0301 composed and decomposed é",
    "👩‍👩‍👧‍👦 👍🏽 emoji",
    "מה שלומך היום?",
    "UPPER lower MiXeD İstanbul ß",
    "[CLS] [SEP] [MASK] spelled out",
    "tab\tnewline\nreturn\rnull\x00bell\x07",
    "supercalifragilisticexpialidocious",
    "x" * 150,
    "https://example.com/a/b?c=d&e=f#g user@example.com 3.14159 1,000,000 €20",
    "def embed(texts: list[str]) -> list[list[float]]: return model(texts)",
    *(" ".join(["word"] * n) for n in (2, 10, 50, 100, 253, 254, 255, 300, 1000)),
    *(" ".join(f"token{n % 97} and" for n in range(size)) for size in (3, 20, 60, 200)),
    "The quick brown fox jumps over the lazy dog. " * 8,
    "Attention is all you need: softmax(Q K^T / sqrt(d_k)) V.",
]


def main() -> None:
    model = SentenceTransformer(str(find_model("sentence-transformers/all-MiniLM-L6-v2")), device="cpu")
    vectors = model.encode(TEXTS, batch_size=1, normalize_embeddings=True)
    (HERE / "texts.json").write_text(json.dumps(TEXTS, indent=1) + "\n")
    np.save(HERE / "vectors.npy", vectors.astype(np.float32))


if __name__ == "__main__":
    main()

"""From what a client sends to rows, without a server: prompts of pairs, texts of no tokens."""

import json
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from app.errors import EmptyInput
from app.inputs import NO_PROMPT, Encoding, Input, Item, Reader
from app.settings import Settings
from model.config import BertConfig, ModelConfig
from model.tokenizer import Tokenizer

PROMPTS = {"prompts": {"ask": "ask a ", "other": "b "}, "default_prompt_name": "ask"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reranker as sentence-transformers' CrossEncoder saves one with a default prompt."""
    folder = tmp_path_factory.mktemp("prompted")
    save_checkpoint(folder, architecture="BertForSequenceClassification", num_labels=1)
    (folder / "config_sentence_transformers.json").write_text(json.dumps(PROMPTS))
    return folder


@pytest.mark.parametrize(("name", "before"), [(None, "ask a "), ("ask", "ask a "), ("other", "b "), (NO_PROMPT, "")])
async def test_a_prompt_stands_before_the_first_text_of_a_pair(folder: Path, name: str | None, before: str) -> None:
    """As sentence_transformers.base.modality.prepend_prompt_to_texts has it."""
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder, config)
    inputs: list[Input] = [("x y", "z"), "x", [7, 8]]
    encoded = await Reader(Settings(), config, tokenizer).read(inputs, Encoding(prompt_name=name))
    wanted = [*tokenizer.encode([(f"{before}x y", "z"), f"{before}x"]), tokenizer.encode_ids([7, 8])]
    assert [row.ids.tolist() for row in encoded.rows] == [row.ids.tolist() for row in wanted]
    assert [row.types.tolist() for row in encoded.rows] == [row.types.tolist() for row in wanted]
    assert encoded.characters == len("x yzx") + 2 * len(before)


@pytest.fixture
def unframed() -> Reader:
    """Of a tokenizer without special tokens, which finds no token in white space."""
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Reader(Settings(), ModelConfig(BertConfig()), Tokenizer(backend, 512, 3))


@pytest.mark.parametrize("bad", [" ", "\n\t", (" ", "  "), ""])
async def test_a_text_of_no_tokens_is_an_empty_input(unframed: Reader, bad: Input) -> None:
    with pytest.raises(EmptyInput, match="an input is empty; wanted a text"):
        await unframed.read(["a b", bad], Encoding())
    encoded = await unframed.read(["a b", bad, "b"], Encoding(partial=True))
    assert [isinstance(item, Item) for item in encoded.items] == [True, False, True]
    assert isinstance(encoded.items[1], EmptyInput)
    assert [row.ids.tolist() for row in encoded.rows] == [[0, 1], [1]]

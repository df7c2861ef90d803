"""The same ids, segments, cuts and offsets as transformers' fast tokenizer, and never a padded token."""

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import edit_json, lively_bert, write_json
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from model.batch import pack
from model.config import ModelConfig
from model.encoder import Encoder
from model.errors import CheckpointError, InvalidTokens, UnsupportedModel
from model.excerpts import excerpt
from model.shortcut import find_shortcut
from model.tokenizer import Tokenizer

TOKENIZER_FILES = ("config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder, ModelConfig.from_folder(folder))


def copy_of(minilm: Path, folder: Path, *names: str) -> Path:
    """Some of MiniLM's files: a vocabulary of 30,522 entries, without the weights."""
    folder.mkdir()
    for name in ("config.json", *names):
        shutil.copy(minilm / name, folder)
    return folder


@pytest.fixture(scope="session")
def folders(minilm: Path, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with a tokenizer of each kind."""
    home = tmp_path_factory.mktemp("tokenizers")
    cased = copy_of(minilm, home / "cased", "vocab.txt")
    write_json(cased / "tokenizer_config.json", {"do_lower_case": False, "tokenizer_class": "BertTokenizer"})
    stated = copy_of(minilm, home / "stated", "tokenizer.json")
    write_json(stated / "tokenizer_config.json", {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False})
    return {
        "tokenizer.json": minilm,
        "vocab.txt": copy_of(minilm, home / "plain", "vocab.txt"),
        "vocab.txt, cased": cased,
        "tokenizer.json, outweighed by tokenizer_config.json": stated,
        "Chinese vocab.txt": make_checkpoint(initializer_range=0.2),
    }


KINDS = [
    "tokenizer.json",
    "vocab.txt",
    "vocab.txt, cased",
    "tokenizer.json, outweighed by tokenizer_config.json",
    "Chinese vocab.txt",
]


@pytest.fixture(scope="session")
def both(folders: dict[str, Path]) -> Callable[[str], tuple[Tokenizer, Any]]:
    """Ours and transformers' tokenizer of each kind."""
    made: dict[str, tuple[Tokenizer, Any]] = {}

    def get(kind: str) -> tuple[Tokenizer, Any]:
        if kind not in made:
            theirs = AutoTokenizer.from_pretrained(folders[kind])
            assert theirs.is_fast
            theirs.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
            made[kind] = load(folders[kind]), theirs
        return made[kind]

    return get


Both = Callable[[str], tuple[Tokenizer, Any]]
UNCUT = 10_000


# The same ids --------------------------------------------------------------------------------------------------------


def test_the_table_is_long_enough() -> None:
    assert len(set(HOSTILE)) == len(HOSTILE) >= 60


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_strings(both: Both, kind: str) -> None:
    ours, theirs = both(kind)
    for text, row in zip(HOSTILE, ours.encode(HOSTILE, UNCUT), strict=True):
        assert row.ids.tolist() == theirs(text)["input_ids"], ascii(text)
        assert not row.types.any()
        assert (row.cut, row.offsets) == (0, None)
        assert (row.ids.dtype, row.types.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_count_characters(both: Both, kind: str) -> None:
    ours, theirs = both(kind)
    for text, row in zip(HOSTILE, ours.encode(HOSTILE, UNCUT, with_offsets=True), strict=True):
        assert row.offsets is not None
        wanted = theirs(text, return_offsets_mapping=True)
        assert row.ids.tolist() == wanted["input_ids"]
        assert [tuple(pair) for pair in row.offsets.tolist()] == wanted["offset_mapping"], ascii(text)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
@settings(deadline=None, max_examples=150, database=None)
def test_any_string(both: Both, text: str) -> None:
    ours, theirs = both("tokenizer.json")
    assert ours.encode([text])[0].ids.tolist() == theirs(text)["input_ids"]


ASCII = st.text(st.characters(max_codepoint=127), max_size=40) | st.text("aB1_.,'[]CLS \n\0", max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(ASCII, min_size=1, max_size=4), st.sampled_from(["B,", "é", "[SEP]", "\x1f"]))
@settings(deadline=None, max_examples=100, database=None)
def test_texts_in_ascii_and_others_side_by_side(both: Both, kind: str, texts: list[str], other: str) -> None:
    ours, theirs = both(kind)
    texts = [*texts, texts[0] + other, texts[-1]]
    pairs = [(text, other) for text in texts]
    assert [row.ids.tolist() for row in ours.encode(texts, UNCUT)] == [theirs(text)["input_ids"] for text in texts]
    for row, pair in zip(ours.encode(pairs, UNCUT), pairs, strict=True):
        wanted = theirs(*pair)
        assert (row.ids.tolist(), row.types.tolist()) == (wanted["input_ids"], wanted["token_type_ids"])


@pytest.mark.parametrize(
    ("text", "laid_out"),
    [
        ("It's 5_000 (five...).", "it's 5 _ 000 (five . . . ) . "),
        ("A plain Text.", "a plain text."),
        ("", ""),
        ("café", None),
        ("a[MASK]b", None),
        ("a\x7fb", None),
        (("A", "B"), ("a", "b")),
        (("A", "é"), None),
    ],
)
def test_which_texts_take_the_shortcut(minilm: Path, text: Any, laid_out: Any) -> None:
    shortcut = load(minilm)._shortcut
    assert shortcut is not None
    assert shortcut.lay_out(text) == laid_out


def test_a_tokenizer_that_searches_what_it_has_normalized_has_no_shortcut(minilm: Path) -> None:
    backend = Backend.from_file(str(minilm / "tokenizer.json"))
    backend.add_tokens([AddedToken("ohm", normalized=True)])
    assert find_shortcut(backend, False) is None
    assert Tokenizer(backend, 256, 40_000).encode(["OHM"])[0].ids.tolist()[1] == backend.token_to_id("ohm")


def test_offsets_by_hand(both: Both) -> None:
    ours, _ = both("tokenizer.json")
    text = "😀 Cafe\u0301 BANK"
    row = ours.encode([text], with_offsets=True)[0]
    assert row.offsets is not None
    assert [text[start:end] for start, end in row.offsets] == ["", "😀", "Cafe", "BANK", ""]
    assert [ours.token_text(int(token)) for token in row.ids] == ["[CLS]", "[UNK]", "cafe", "bank", "[SEP]"]


def test_a_batch_of_any_lengths_is_not_padded(minilm: Path) -> None:
    """MiniLM's own tokenizer.json asks for 128 tokens, padded and cut."""
    assert json.loads((minilm / "tokenizer.json").read_text())["padding"]["strategy"] == {"Fixed": 128}
    rows = load(minilm).encode(["a", "a b c", "", "word " * 200])
    assert [len(row) for row in rows] == [3, 5, 2, 202]
    assert all(0 not in row.ids for row in rows)
    assert load(minilm).encode([]) == []


# Pairs ---------------------------------------------------------------------------------------------------------------

PAIRS = list(zip(HOSTILE[::2], HOSTILE[1::2], strict=False))


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.txt"])
def test_pairs(both: Both, kind: str) -> None:
    ours, theirs = both(kind)
    for pair, row in zip(PAIRS, ours.encode(PAIRS, UNCUT, with_offsets=True), strict=True):
        wanted = theirs([pair], return_offsets_mapping=True)
        assert row.ids.tolist() == wanted["input_ids"][0]
        assert row.types.tolist() == wanted["token_type_ids"][0]
        assert row.offsets is not None
        assert [tuple(offsets) for offsets in row.offsets.tolist()] == wanted["offset_mapping"][0]


def test_a_pair_by_hand(both: Both) -> None:
    ours, _ = both("tokenizer.json")
    texts, pair = ours.encode(["river bank", ("river", "savings bank")])
    assert texts.types.tolist() == [0, 0, 0, 0]
    assert [ours.token_text(int(token)) for token in pair.ids] == ["[CLS]", "river", "[SEP]", "savings", "bank", "[SEP]"]
    assert pair.types.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize(
    ("stated", "segments"),
    [
        ({}, True),
        ({"tokenizer_class": "BertTokenizerFast"}, True),
        ({"tokenizer_class": "ElectraTokenizer"}, True),
        ({"model_input_names": ["input_ids", "attention_mask"]}, False),
        ({"tokenizer_class": "DistilBertTokenizer"}, False),
        ({"tokenizer_class": "DistilBertTokenizerFast"}, False),
        ({"tokenizer_class": "DistilBertTokenizer", "model_input_names": ["input_ids", "token_type_ids"]}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "token_type_ids"]}, True),
    ],
)
def test_segments_are_told_where_transformers_tells_them(
    minilm: Path, tmp_path: Path, stated: dict[str, Any], segments: bool, with_offsets: bool
) -> None:
    folder = copy_of(minilm, tmp_path / "stated", "tokenizer.json", "vocab.txt")
    write_json(folder / "tokenizer_config.json", stated)
    theirs = AutoTokenizer.from_pretrained(folder)
    for pair in (("river", "savings bank"), ("café", "苹果 " * 20)):  # by the shortcut, and not
        (row,) = load(folder).encode([pair], 20, with_offsets=with_offsets)
        wanted = theirs(*pair, truncation="longest_first", max_length=20)
        assert ("token_type_ids" in wanted) == segments
        assert row.ids.tolist() == wanted["input_ids"]
        assert row.types.tolist() == wanted.get("token_type_ids", [0] * len(row))


def test_a_model_with_one_segment_has_no_second(minilm: Path, tmp_path: Path) -> None:
    folder = copy_of(minilm, tmp_path / "one", "tokenizer.json")
    edit_json(folder / "config.json", type_vocab_size=1)
    assert not load(folder).encode([("river", "bank")])[0].types.any()


# Cutting -------------------------------------------------------------------------------------------------------------

LONG = ["one two three four five six seven eight nine ten", "", "unaffable " * 5, "[MASK] a [SEP] b [CLS] c", "苹果👍 " * 4]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [2, 3, 4, 7, 12, 30])
def test_cut_texts(both: Both, side, limit: int) -> None:
    ours, theirs = both("tokenizer.json")
    theirs.truncation_side = side
    for text, row in zip(LONG, ours.encode(LONG, limit, side, with_offsets=True), strict=True):
        wanted = theirs(text, truncation=True, max_length=limit, return_offsets_mapping=True)
        assert row.ids.tolist() == wanted["input_ids"]
        assert row.offsets is not None
        assert [tuple(offsets) for offsets in row.offsets.tolist()] == wanted["offset_mapping"]
        assert row.cut == len(theirs(text)["input_ids"]) - len(row)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 20])
def test_cut_pairs_longest_first(both: Both, side, limit: int) -> None:
    ours, theirs = both("tokenizer.json")
    theirs.truncation_side = side
    words = [*"abcdefghijkl"]
    pairs = [
        (" ".join(words[:first]), " ".join(words[:second])) for first in (0, 1, 2, 5, 6, 12) for second in (0, 1, 2, 5, 6, 12)
    ]
    for pair, row in zip(pairs, ours.encode(pairs, limit, side), strict=True):
        wanted = theirs([pair], truncation="longest_first", max_length=limit)  # a lone pair with an empty end is no pair there
        assert row.ids.tolist() == wanted["input_ids"][0], pair
        assert row.types.tolist() == wanted["token_type_ids"][0]
        assert row.cut == len(theirs([pair])["input_ids"][0]) - len(row)


PIECES = [
    *(
        "the river",
        "unaffable",
        "cafe\u0301",
        "İstanbul",
        "ΟΔΟΣ",
        "我在吃",
        "苹",
        "一",
        "가나",
        "豈",
        "鿿",
        "㐀",
        "👍🏽",
        "a" * 120,
    ),
    *("[MASK]", "[SEP]", "[UNK]", "[CL", "S]", ".", "'", "-", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000"),
    *("\u0301", "\u200d", "\x00"),
]
LONG_TEXTS = st.lists(st.sampled_from(PIECES), min_size=5, max_size=80).map("".join)
SIDES = st.sampled_from(["left", "right"])


@given(LONG_TEXTS, st.integers(2, 6), SIDES)
@settings(deadline=None, max_examples=100, database=None)
def test_a_long_text_that_is_not_read_to_its_end_is_cut_to_the_same_tokens(folders: Any, text: str, limit: int, side) -> None:
    for tokenizer in excerpting(folders):
        for with_offsets in (False, True):
            whole, part = (tokenizer.encode([text, "a"], limit, side, with_offsets, enough=enough)[0] for enough in (None, limit))
            assert part.ids.tolist() == whole.ids.tolist()
            assert bool(part.cut) == bool(whole.cut)
            assert not with_offsets or part.offsets.tolist() == whole.offsets.tolist()


def assert_parted(tokenizer: Tokenizer, text: str, size: int, side) -> None:
    """The tokens of an excerpt are those of the text, to the last one."""
    part = excerpt(text, size, side, tokenizer._parting) if tokenizer._parting else text
    ids, whole = (row.ids[1:-1].tolist() for row in tokenizer.encode([part, text], UNCUT))
    assert min(size, len(text)) <= len(part)
    assert ids == (whole[: len(ids)] if side == "right" else whole[len(whole) - len(ids) :])


@given(LONG_TEXTS, st.integers(0, 100), SIDES)
@settings(deadline=None, max_examples=200, database=None)
def test_no_token_goes_across_the_end_of_an_excerpt(folders: Any, text: str, size: int, side) -> None:
    for tokenizer in excerpting(folders):
        assert_parted(tokenizer, text, size, side)


@functools.cache
def of_folder(folder: Path, lower_case: bool) -> Tokenizer:
    return Tokenizer.from_folder(folder, replace(ModelConfig.from_folder(folder), lower_case=lower_case))


def excerpting(folders: dict[str, Path]) -> list[Tokenizer]:
    return [of_folder(folders[kind], lower_case) for kind in KINDS for lower_case in (False, True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("word", ["river ", "苹果"])
def test_what_is_read_of_a_long_text_is_bounded(folders: dict[str, Path], side, word: str) -> None:
    tokenizer = of_folder(folders["tokenizer.json"], False)
    (row,) = tokenizer.encode([word * 50_000], 10, side, enough=10)
    assert len(row) == 10
    assert 10 < len(row) + row.cut < 150  # tokens of 100 characters and the way to the end of a word
    (exact,) = tokenizer.encode([word * 100], 10, side, enough=1000)
    assert len(exact) + exact.cut == len(tokenizer.encode([word * 100], UNCUT)[0])


ACROSS = [AddedToken("river bank"), AddedToken("苹果"), AddedToken("x", single_word=True)]


@pytest.mark.parametrize("added", ACROSS, ids=lambda token: token.content)
def test_a_text_is_parted_nowhere_where_an_added_token_could_stand_across(minilm: Path, added: AddedToken) -> None:
    backend = Backend.from_file(str(minilm / "tokenizer.json"))
    backend.add_tokens([added])
    tokenizer = Tokenizer(backend, 256, 40_000)
    text = "一二 x三苹果 x我 river bank. " * 10
    for size in range(40):
        for side in ("left", "right"):
            assert_parted(tokenizer, text, size, side)


def test_the_models_own_limit(minilm: Path) -> None:
    tokenizer = load(minilm)
    row = tokenizer.encode(["word " * 1000])[0]
    assert (len(row), row.cut) == (256, 746)
    assert [len(row) for row in tokenizer.encode(["word " * 254, "word " * 255])] == [256, 256]
    assert [row.cut for row in tokenizer.encode(["word " * 254, "word " * 255])] == [0, 1]


@pytest.mark.parametrize("limit", [0, 1])
def test_a_limit_below_the_frame_leaves_the_frame_and_says_so(both: Both, limit: int) -> None:
    ours, _ = both("tokenizer.json")
    for row in (ours.encode(["a b c"], limit)[0], ours.encode_ids([1037, 1038, 1039], limit)):
        assert row.ids.tolist() == [101, 102]
        assert row.cut == 3


# Ids from the client -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "limit", "side", "wanted", "cut"),
    [
        ([7592], 256, "right", [101, 7592, 102], 0),
        ([101, 7592, 102], 256, "right", [101, 7592, 102], 0),
        ([], 256, "right", [101, 102], 0),
        ([101, 102], 256, "right", [101, 102], 0),
        ([101], 256, "right", [101, 101, 102], 0),
        ([7592, 102], 256, "right", [101, 7592, 102, 102], 0),
        ([5, 6, 7, 8], 5, "right", [101, 5, 6, 7, 102], 1),
        ([5, 6, 7, 8], 5, "left", [101, 6, 7, 8, 102], 1),
        ([101, 5, 6, 7, 8, 102], 4, "right", [101, 5, 6, 102], 2),
        ([101, 5, 6, 7, 8, 102], 4, "left", [101, 7, 8, 102], 2),
        ([5, 6], 2, "left", [101, 102], 2),
        ([0, 30521], 256, "right", [101, 0, 30521, 102], 0),
    ],
)
def test_ids_are_framed_once_and_cut(both: Both, ids: list[int], limit: int, side, wanted: list[int], cut: int) -> None:
    ours, _ = both("tokenizer.json")
    row = ours.encode_ids(ids, limit, side)
    assert row.ids.tolist() == wanted
    assert row.types.tolist() == [0] * len(wanted)
    assert row.cut == cut


@pytest.mark.parametrize("bad", [-1, 30522, 2**31, 2**63, -(2**70)])
def test_ids_outside_the_vocabulary_are_refused(both: Both, bad: int) -> None:
    ours, _ = both("tokenizer.json")
    for refuse in (ours.encode_ids, ours.decode):
        with pytest.raises(InvalidTokens, match=f"token id {bad} is outside the vocabulary; wanted 0 to 30521"):
            refuse([101, bad, 102])


@pytest.mark.parametrize("text", HOSTILE)
def test_ids_of_a_text_give_the_text_again(both: Both, text: str) -> None:
    ours, theirs = both("tokenizer.json")
    row = ours.encode([text])[0]
    assert ours.encode_ids(row.ids.tolist()).ids.tolist() == row.ids.tolist()
    assert ours.decode(row.ids.tolist()) == theirs.decode(row.ids, skip_special_tokens=True)
    assert ours.decode(row.ids.tolist(), skip_special_tokens=False) == theirs.decode(row.ids)


def test_tokens_are_described(both: Both) -> None:
    ours, _ = both("tokenizer.json")
    encoding = ours.describe("word " * 300 + "[MASK]")
    assert len(encoding.ids) == 303
    assert [ours.is_special(token) for token in encoding.ids] == [True, *[False] * 300, True, True]
    assert ours.describe("word", special_tokens=False).ids == [2773]
    assert ours.token_text(2773) == "word"


def test_a_row_of_the_embedding_without_an_entry(minilm: Path, tmp_path: Path) -> None:
    """More rows than entries, as in checkpoints that were padded to a round number."""
    folder = copy_of(minilm, tmp_path / "padded", "tokenizer.json")
    edit_json(folder / "config.json", vocab_size=30528)
    tokenizer = load(folder)
    assert tokenizer.token_text(30525) == ""
    assert tokenizer.encode_ids([30525]).ids.tolist() == [101, 30525, 102]


# Lower case of sentence-transformers ---------------------------------------------------------------------------------


def test_lower_case_of_sentence_transformers(folders: dict[str, Path], both: Both, tmp_path: Path) -> None:
    """do_lower_case lowers before a cased tokenizer; offsets are still those of the text as it came."""
    folder = Path(shutil.copytree(folders["vocab.txt, cased"], tmp_path / "lower"))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": True})
    lower, (cased, _) = load(folder), both("vocab.txt, cased")
    texts = ["The BANK of İstanbul", "ok", "[MASK] Word"]
    for text, row in zip(texts, lower.encode(texts, with_offsets=True), strict=True):
        assert row.ids.tolist() != cased.encode([text])[0].ids.tolist() or text == "ok"
        assert row.offsets is not None
        assert row.offsets.max() == len(text)
    assert lower.encode(["The BANK"])[0].ids.tolist() == cased.encode(["the bank"])[0].ids.tolist()
    assert lower.encode([("The", "BANK")])[0].ids.tolist() == cased.encode([("the", "bank")])[0].ids.tolist()
    assert lower.describe("BANK").ids == cased.describe("bank").ids
    assert lower.encode(["[MASK]"])[0].ids.tolist() == [101, 103, 102]


# Files ---------------------------------------------------------------------------------------------------------------


def test_vocab_txt_is_converted_once(
    make_checkpoint: Callable[..., Path], both: Both, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = both("Chinese vocab.txt")
    kept = list((cache / "bertd").glob("*.tokenizer.json"))
    assert kept
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a second conversion"))
    again = load(make_checkpoint(initializer_range=0.2))
    assert [row.ids.tolist() for row in again.encode(HOSTILE)] == [row.ids.tolist() for row in before.encode(HOSTILE)]
    assert not [path for path in (cache / "bertd").iterdir() if path not in kept]


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_changed_file_is_converted_anew(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = Path(shutil.copytree(folders["vocab.txt, cased"], tmp_path / "changed"))
    with (folder / name).open("a") as file:
        file.write("\n")
    if not (folder / name).read_text().strip():
        (folder / name).write_text("{}")
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nValueError: stopped here\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(CheckpointError, match=r"can't be read \(ValueError: stopped here\)"):
        load(folder)
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written(
    folders: dict[str, Path], both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs the next start its time, and nothing else."""
    ours, theirs = both("Chinese vocab.txt")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    converted = subprocess.CompletedProcess([], 0, theirs.backend_tokenizer.to_str(), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: converted)
    again = load(folders["Chinese vocab.txt"])
    assert [row.ids.tolist() for row in again.encode(HOSTILE)] == [row.ids.tolist() for row in ours.encode(HOSTILE)]


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer; wanted tokenizer\.json or vocab\.txt"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "WordPiece"}}', "\x00\x01"])
def test_a_tokenizer_json_that_is_none(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* can't be read"):
        load(folder)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["BertJapaneseTokenizer", "HerbertTokenizerFast"])
def test_another_familys_vocab_txt_is_refused_by_name(folder: Path, place: str, kind: str) -> None:
    """Its words are split by something else before WordPiece: the ids would be wrong in silence."""
    (folder / place).exists() or write_json(folder / place, {})
    edit_json(folder / place, tokenizer_class=kind)
    with pytest.raises(UnsupportedModel, match=f"tokenizer_class {kind} is not supported without a tokenizer.json"):
        load(folder)


def test_a_tokenizer_with_more_entries_than_the_model(minilm: Path, tmp_path: Path) -> None:
    folder = copy_of(minilm, tmp_path / "small", "tokenizer.json")
    edit_json(folder / "config.json", vocab_size=30521)
    with pytest.raises(CheckpointError, match="the tokenizer gives ids up to 30521, wanted below 30521"):
        load(folder)


def described(content: str, special: bool = False) -> dict[str, Any]:
    return {"content": content, **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False), "special": special}


@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"foo": 30521}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"30521": described("foo")}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["foo"]}),
        ("tokenizer_config.json", {"extra_special_tokens": ["foo"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"my_token": "foo"}}),
        ("tokenizer_config.json", {"my_token": "foo"}),
        ("special_tokens_map.json", {"additional_special_tokens": ["foo"]}),
        ("special_tokens_map.json", {"bos_token": described("foo")}),
    ],
)
def test_a_token_that_tokenizer_json_lacks_is_refused_by_name(
    minilm: Path, tmp_path: Path, name: str, content: dict[str, Any], kind: str
) -> None:
    """transformers adds it, so that its ids would be others."""
    folder = copy_of(minilm, tmp_path / "added", "tokenizer.json")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": kind})
    assert load(folder).encode(["a xfoo"])[0].ids.tolist() == AutoTokenizer.from_pretrained(folder)("a xfoo")["input_ids"]
    write_json(folder / name, {"tokenizer_class": kind, **content} if name == "tokenizer_config.json" else content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json lacks added tokens that .* name: 'foo'; wanted"):
        load(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.convert_ids_to_tokens(theirs("xfoo")["input_ids"])[2] == "foo"
    theirs.save_pretrained(folder)
    edit_json(folder / "config.json", vocab_size=len(theirs))
    assert load(folder).encode(["a xfoo"])[0].ids.tolist() == theirs("a xfoo")["input_ids"]


def test_tokens_that_transformers_reads_nowhere_are_not_missed(minilm: Path, tmp_path: Path) -> None:
    """Older files beside an added_tokens_decoder, and a token that special_tokens_map.json takes back."""
    folder = copy_of(minilm, tmp_path / "older", "tokenizer.json", "special_tokens_map.json")
    write_json(folder / "tokenizer_config.json", {"cls_token": "[unused5]"})
    edit_json(folder / "special_tokens_map.json", cls_token="[CLS]")
    taken_back = load(folder), AutoTokenizer.from_pretrained(folder)
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"101": described("[CLS]", special=True)}})
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": ["foo"]})
    write_json(folder / "added_tokens.json", {"foo": 30522})
    for ours, theirs in (taken_back, (load(folder), AutoTokenizer.from_pretrained(folder))):
        assert ours.encode(["xfoo [unused5]"])[0].ids.tolist() == theirs("xfoo [unused5]")["input_ids"]


@pytest.mark.parametrize("kind", ["BertTokenizerFast", "DistilBertTokenizerFast", "RobertaTokenizerFast"])
def test_a_folder_that_transformers_saves_lacks_nothing(minilm: Path, tmp_path: Path, kind: str) -> None:
    if kind == "RobertaTokenizerFast":
        letters = {letter: place for place, letter in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *"abc"])}
        theirs = transformers.RobertaTokenizerFast(vocab=letters, merges=[])
    else:
        theirs = getattr(transformers, kind).from_pretrained(minilm)
    folder = copy_of(minilm, tmp_path / "saved")
    theirs.add_tokens(["foo"])
    theirs.save_pretrained(folder)
    edit_json(folder / "config.json", vocab_size=30_600)
    for text in ("a abc xfoo", "ab [MASK] <mask>"):
        assert load(folder).encode([text])[0].ids.tolist() == theirs(text)["input_ids"]


# Chinese -------------------------------------------------------------------------------------------------------------


def test_a_chinese_word_in_two_contexts_has_two_rows(folders: dict[str, Path]) -> None:
    """苹果, the fruit in 吃苹果 and the phone in 苹果手机: one embedding at one place, two rows at the end."""
    folder = folders["Chinese vocab.txt"]
    tokenizer, encoder = load(folder), Encoder.from_folder(folder)
    fruit, phone = tokenizer.encode(["在吃苹果", "一个苹果手机"])
    names = [[tokenizer.token_text(int(token)) for token in row.ids] for row in (fruit, phone)]
    assert names == [["[CLS]", *"在吃苹果", "[SEP]"], ["[CLS]", *"一个苹果手机", "[SEP]"]]
    with torch.inference_mode():
        before = encoder.bert.embeddings(pack([fruit, phone]))
        after = encoder.hidden(pack([fruit, phone]))
    for place in (3, 4):  # 苹 and 果
        assert torch.equal(before[place], before[len(fruit) + place])
        assert torch.cosine_similarity(after[place], after[len(fruit) + place], dim=0) < 0.99


def test_a_checkpoint_of_transformers_with_its_own_tokenizer(both: Both, tmp_path: Path) -> None:
    """Saved together by transformers, as most checkpoints of today are."""
    ours, theirs = both("vocab.txt")
    lively_bert(vocab_size=len(theirs)).save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert [row.ids.tolist() for row in again.encode(HOSTILE)] == [row.ids.tolist() for row in ours.encode(HOSTILE)]

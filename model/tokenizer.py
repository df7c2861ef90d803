"""Texts or pairs of texts -> Tokens. Never pads; says how much it cut."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, normalizers
from tokenizers import Tokenizer as Backend

from model.config import Json, ModelConfig, read_json, transformer_folder
from model.errors import CheckpointError, InvalidTokens, UnsupportedModel
from model.excerpts import Side, excerpt, parting
from model.shortcut import Text, find_shortcut
from model.tokens import Tokens

Places = NDArray[np.intp]

_CHARACTERS = 10  # of a token: more than most texts have, so that an excerpt is rarely too short


class Tokenizer:
    """The tokenizer of a checkpoint, the same ids as transformers' fast one."""

    def __init__(self, backend: Backend, max_tokens: int, vocab_size: int, lowers: bool = False, segments: bool = True) -> None:
        """`lowers`: make capitals small before anything else, as sentence-transformers' `do_lower_case` asks.

        `segments`: whether the second text of a pair is the second segment; else all is the first.
        """
        backend.no_truncation()
        backend.no_padding()
        self.max_tokens = max_tokens
        self.vocab_size = vocab_size
        self._backend = backend
        self._segments = segments
        self._parting = parting(backend)
        self._shortcut = find_shortcut(backend, lowers)
        if lowers:  # character by character, which parts texts nowhere else
            first = [backend.normalizer] if backend.normalizer else []
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *first])
        empty = backend.encode("").ids  # a lone text's frame of special tokens, [CLS] [SEP]
        self._special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        self._before, self._after = empty[: (len(empty) + 1) // 2], empty[(len(empty) + 1) // 2 :]

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> "Tokenizer":
        """Load tokenizer.json, or vocab.txt converted through transformers.

        Raises CheckpointError where neither can be read or the ids are not the model's, UnsupportedModel for a
        vocab.txt that is no BERT's.
        """
        home = transformer_folder(folder)
        backend = _read_backend(home)
        last, rows = max(backend.get_vocab().values(), default=0), config.bert.vocab_size
        if last >= rows:
            raise CheckpointError(
                f"{folder}: the tokenizer gives ids up to {last}, wanted below {rows}, config.json's vocab_size"
            )
        segments = config.bert.type_vocab_size > 1 and _has_segments(home)
        return cls(backend, config.max_tokens, rows, config.lower_case, segments)

    def encode(
        self,
        texts: Sequence[Text],
        max_tokens: int | None = None,
        cut_side: Side = "right",
        with_offsets: bool = False,
        max_second: int | None = None,
        enough: int | None = None,
    ) -> list[Tokens]:
        """Tokens of each text with its special tokens, cut to `max_tokens` on one side.

        Of a pair the second text is cut to `max_second` tokens, and then the longer of both first. `Tokens.cut` says how
        many tokens were left out; of a text with more than `enough` tokens it may say less, as the rest is not read.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        encodings = self._read(texts, None if enough is None else max(limit, enough), cut_side, with_offsets)
        answers = []
        for text, encoding in zip(texts, encodings, strict=True):
            pair = isinstance(text, tuple)
            row = _tokens(encoding, pair and self._segments, with_offsets)
            fits = len(encoding) <= limit and max_second is None
            answers.append(row if fits else _cut(row, encoding, limit, cut_side, max_second if pair else None))
        return answers

    @property
    def frame(self) -> tuple[int, int]:
        """How many special tokens stand before and after a lone text."""
        return len(self._before), len(self._after)

    def encode_ids(self, ids: Sequence[int], max_tokens: int | None = None, cut_side: Side = "right") -> Tokens:
        """Tokens of a text that the client tokenized: framed with special tokens unless it already is.

        Raises InvalidTokens for an id outside the vocabulary.
        """
        bad = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise InvalidTokens(f"token id {bad} is outside the vocabulary; wanted 0 to {self.vocab_size - 1}")
        body, before, after = list(ids), self._before, self._after
        if self.is_framed(body):
            body = body[len(before) : len(body) - len(after)]
        room = max(0, (self.max_tokens if max_tokens is None else max_tokens) - len(before) - len(after))
        cut = max(0, len(body) - room)
        kept = body[:room] if cut_side == "right" else body[len(body) - min(room, len(body)) :]
        tokens = Tokens.of([*before, *kept, *after])
        return Tokens(tokens.ids, tokens.types, cut)

    def is_framed(self, ids: Sequence[int]) -> bool:
        """Whether token ids begin and end with the special tokens of a text."""
        before, after = self._before, self._after
        long_enough = len(ids) >= len(before) + len(after)
        return long_enough and ids[: len(before)] == before and ids[len(ids) - len(after) :] == after

    def _read(self, texts: Sequence[Text], enough: int | None, side: Side, with_offsets: bool) -> list[Encoding]:
        """Whole texts; of those with more than `enough` tokens perhaps only the part that is kept, with more than these."""
        if enough is None or self._parting is None or (side == "left" and with_offsets):  # offsets count from the start
            return self._encode_all(texts, with_offsets)
        size = enough * _CHARACTERS
        parts = [excerpt(text, size, side, self._parting) if isinstance(text, str) else text for text in texts]
        encodings = self._encode_all(parts, with_offsets)
        short = [n for n, encoding in enumerate(encodings) if len(encoding) <= enough and len(parts[n]) < len(texts[n])]
        for place, encoding in zip(short, self._encode_all([texts[n] for n in short], with_offsets), strict=True):
            encodings[place] = encoding
        return encodings

    def _encode_all(self, texts: Sequence[Text], with_offsets: bool) -> list[Encoding]:
        if with_offsets or self._shortcut is None:
            return _encode(self._backend, texts, with_offsets)
        laid_out = [self._shortcut.lay_out(text) for text in texts]
        short = iter(_encode(self._shortcut.backend, [text for text in laid_out if text is not None]))
        others = [text for text, laid in zip(texts, laid_out, strict=True) if laid is None]
        long = iter(_encode(self._backend, others))
        return [next(long if laid is None else short) for laid in laid_out]

    def describe(self, text: str, special_tokens: bool = True) -> Encoding:
        """Ids, offsets and special-token mask of a text of any length, nothing cut."""
        return self._backend.encode(text, add_special_tokens=special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        bad = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise InvalidTokens(f"token id {bad} is outside the vocabulary; wanted 0 to {self.vocab_size - 1}")
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> str:
        """The vocabulary's entry of an id; empty for a row of the embedding that no entry stands for."""
        return self._backend.id_to_token(token) or ""

    def is_special(self, token: int) -> bool:
        return token in self._special


def _encode(backend: Backend, texts: Sequence[Text], with_offsets: bool = False) -> list[Encoding]:
    if len(texts) <= 1:  # the library's batches wake its threads, which costs more than a lone text
        return [backend.encode(text) if isinstance(text, str) else backend.encode(*text) for text in texts]
    return backend.encode_batch(texts) if with_offsets else backend.encode_batch_fast(texts)


def _cut(row: Tokens, encoding: Encoding, limit: int, side: Side, max_second: int | None) -> Tokens:
    """The row without the tokens of its texts that are too many."""
    sequences = np.array([-1 if sequence is None else sequence for sequence in encoding.sequence_ids])  # -1: special tokens
    parts: list[Places] = [np.flatnonzero(sequences == place) for place in (0, 1)]
    if max_second is not None:
        parts[1] = _shortened(parts[1], max_second, side)
    frame = np.flatnonzero(sequences < 0)
    lengths = _share([len(part) for part in parts], max(0, limit - len(frame)))
    kept = [_shortened(part, length, side) for part, length in zip(parts, lengths, strict=True)]
    places = np.sort(np.concatenate([frame, *kept]))
    offsets = None if row.offsets is None else row.offsets[places]
    return Tokens(row.ids[places], row.types[places], len(row) - len(places), offsets)


def _shortened(places: Places, length: int, side: Side) -> Places:
    return places[:length] if side == "right" else places[max(0, len(places) - length) :]


def _share(lengths: list[int], room: int) -> list[int]:
    """Lengths cut to `room` in all, the longer first, of two equals the first (transformers' "longest_first")."""
    shorter = min(min(lengths), room // 2)
    longer = min(max(lengths), room - shorter)
    return [shorter, longer] if lengths[0] <= lengths[1] else [longer, shorter]


def _tokens(encoding: Encoding, segments: bool, with_offsets: bool) -> Tokens:
    ids = np.fromiter(encoding.ids, np.int32, len(encoding))
    types = np.array(encoding.type_ids, dtype=np.int32) if segments else np.zeros(len(ids), dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2) if with_offsets else None
    return Tokens(ids, types, offsets=offsets)


# Classes of transformers that read vocab.txt as WordPiece, all in the same way.
_WORD_PIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")

# Classes that tell a model the segments of a pair where tokenizer_config.json has no model_input_names; others, and those
# that transformers does not know, do not.
_WITH_SEGMENTS = (
    *("BertTokenizer", "ElectraTokenizer", "ConvBertTokenizer", "MobileBertTokenizer", "LayoutLMTokenizer"),
    *("DPRContextEncoderTokenizer", "DPRQuestionEncoderTokenizer", "LxmertTokenizer", "SqueezeBertTokenizer"),
)


def _tokenizer_class(folder: Path, settings: Json) -> str:
    """The class of transformers that reads a folder; older versions end its name with `Fast`."""
    return str(settings.get("tokenizer_class") or read_json(folder / "config.json").get("tokenizer_class") or "BertTokenizer")


def _has_segments(folder: Path) -> bool:
    """Whether transformers' tokenizer tells the segments of a pair apart."""
    settings = read_json(folder / "tokenizer_config.json")
    names = settings.get("model_input_names")
    if isinstance(names, list):
        return "token_type_ids" in names
    return _tokenizer_class(folder, settings).removesuffix("Fast") in _WITH_SEGMENTS


def _read_backend(folder: Path) -> Backend:
    fast, vocab = folder / "tokenizer.json", folder / "vocab.txt"
    settings = read_json(folder / "tokenizer_config.json")
    kind = _tokenizer_class(folder, settings)
    word_piece = kind.removesuffix("Fast") in _WORD_PIECE
    if not word_piece and not fast.is_file():
        raise UnsupportedModel(f"{folder}: tokenizer_class {kind} is not supported without a tokenizer.json; add that file")
    if not fast.is_file() and not vocab.is_file():
        raise CheckpointError(f"{folder} holds no tokenizer; wanted tokenizer.json or vocab.txt")
    try:
        if not fast.is_file():
            return Backend.from_str(_converted(folder))
        backend = Backend.from_file(str(fast))
        backend = _as_stated(backend, settings) if word_piece else backend
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the tokenizer in {folder} can't be read ({error}); restore its files") from None
    _check_added(folder, settings, backend)
    return backend


def _check_added(folder: Path, settings: Json, backend: Backend) -> None:
    """Refuse a tokenizer.json without a token that transformers would add to it: its ids would be others."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = sorted(_stated_tokens(folder, settings) - added)
    if missing:
        raise CheckpointError(
            f"{folder}: tokenizer.json lacks added tokens that the files beside it name: {', '.join(map(repr, missing))}; wanted "
            "all of them in it, load the folder with transformers' AutoTokenizer and save it again"
        )


def _stated_tokens(folder: Path, settings: Json) -> set[str]:
    """The added and special tokens that the files beside tokenizer.json name, as far as transformers reads these."""
    decoder = settings.get("added_tokens_decoder")
    older: Json = {} if decoder is not None else read_json(folder / "special_tokens_map.json")
    tokens = [*(_members(decoder) if decoder is not None else read_json(folder / "added_tokens.json"))]
    for source in (settings, older):
        for key in ("extra_special_tokens", "additional_special_tokens"):
            tokens += _members(source.get(key))
    tokens += [token for key, token in {**settings, **older}.items() if key.endswith("_token")]
    contents = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return {content for content in contents if isinstance(content, str) and content}


def _members(tokens: Any) -> list[Any]:
    """What a list, or an object of tokens by name or id, holds."""
    return list(tokens.values() if isinstance(tokens, dict) else tokens) if isinstance(tokens, dict | list) else []


def _as_stated(backend: Backend, settings: Json) -> Backend:
    """What tokenizer_config.json says, or leaves at its default, outweighs tokenizer.json: transformers reads a BERT so."""
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            strip_accents=settings.get("strip_accents"),
            lowercase=settings.get("do_lower_case", True),
        )
    return backend


# What the conversion reads.
_DESCRIPTION = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CONVERT = (
    "import sys; from transformers import BertTokenizerFast; "
    "print(BertTokenizerFast.from_pretrained(sys.argv[1], local_files_only=True).backend_tokenizer.to_str())"
)


def _converted(folder: Path) -> str:
    """vocab.txt as a tokenizer.json, converted once through transformers and kept in the user's cache.

    transformers imports torch, so it runs in a process of its own: this one stays small.
    """
    described = b"\0".join((folder / name).read_bytes() for name in _DESCRIPTION if (folder / name).is_file())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = home / "bertd" / f"{hashlib.sha256(described).hexdigest()}.tokenizer.json"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    command = [sys.executable, "-X", "utf8", "-c", _CONVERT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise CheckpointError(done.stderr.strip().rsplit("\n", 1)[-1])
    converted = json.dumps(json.loads(done.stdout.strip().rsplit("\n", 1)[-1]), ensure_ascii=False)
    _keep(kept, converted)
    return converted


def _keep(path: Path, content: str) -> None:
    """Write atomically; a cache that can't be written only costs the next start its time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError:
        return

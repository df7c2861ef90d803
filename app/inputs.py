"""From what a client sends to rows for the queue: prompts, cutting, splitting, refusals, and tokens with their names."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np

from app.cores import TOKENIZERS
from app.errors import EmptyInput, InvalidInput, ServiceError, TooManyTokens
from app.settings import OnOverflow, Settings
from model.chunks import characters, chunk_spans
from model.config import ModelConfig
from model.errors import InvalidTokens
from model.excerpts import Side
from model.tokenizer import Tokenizer
from model.tokens import Tokens
from model.windows import Pieces, split

Input = str | list[int] | tuple[str, str]
"""A text, the ids of a text that the client has tokenized, or a pair of texts."""

_SMALL = 1000  # characters that are tokenized in the event loop: 0.1 ms, what a thread costs
_LARGE = 100_000  # characters that take so long, 0.1 s and more, that they wait among themselves
_UNCUT = 2**31 - 1

NO_PROMPT = ""
"""As the name of a prompt: none, whatever the checkpoint's default is."""

CONTEXT = 0.25
"""Of a window that it shares with its neighbour where the rows of single tokens are wanted."""

T = TypeVar("T")


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens. None leaves a choice to the server or the model.

    partial     a bad text is an error in its place, and its neighbours get their answers; else it refuses the request
    max_second  tokens that are kept of the second text of a pair
    splits      whether a text could be split: else a refusal does not advise it
    """

    on_overflow: OnOverflow | None = None
    side: Side = "right"
    prompt_name: str | None = None
    partial: bool = False
    max_second: int | None = None
    splits: bool = True


@dataclass(frozen=True)
class Token:
    """A token as the client reads it: `text[start:end]` in characters; special tokens have no place in the text."""

    id: int
    text: str
    special: bool
    start: int | None
    end: int | None


@dataclass(frozen=True, slots=True)
class Item:
    """A text on its way to the engine: its tokens, whole or cut, and the pieces that they are encoded in."""

    tokens: Tokens
    pieces: Pieces

    @property
    def truncated(self) -> bool:
        return any(row.cut for row in (self.tokens, *self.pieces.rows))


@dataclass(frozen=True)
class Encoded:
    """The texts of a request, each encoded or refused."""

    items: list[Item | ServiceError]
    characters: int
    seconds: float

    @property
    def rows(self) -> list[Tokens]:
        """What the engine has to encode."""
        return [row for item in self.items if isinstance(item, Item) for row in item.pieces.rows]


@dataclass(frozen=True, slots=True)
class Span:
    """Where a chunk stands: `text[start:end]` in code points, and its rows `matrix[first:last]`."""

    start: int
    end: int
    first: int
    last: int


class Reader:
    """Reads inputs with the tokenizer; long work runs in threads."""

    def __init__(self, settings: Settings, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._prompts = config.prompts
        self._default_prompt = config.default_prompt
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(max_workers=TOKENIZERS, thread_name_prefix="tokenize")
        self._large = ThreadPoolExecutor(max_workers=TOKENIZERS, thread_name_prefix="tokenize-large")

    async def read(self, inputs: Sequence[Input], options: Encoding, overlap: float = 0.0, with_offsets: bool = False) -> Encoded:
        """Texts as rows that the encoder can take. Windows of a split text share a part of `overlap` with their neighbours."""
        start = time.perf_counter()
        prompt = self.prompt(options.prompt_name)
        size = _size(inputs) + len(prompt) * sum(not isinstance(item, list) for item in inputs)
        reading = [
            self.off_loop(partial(self._items, inputs[part], part.start, prompt, options, overlap, with_offsets), size)
            for part in _parts(len(inputs), size)
        ]
        items = await reading[0] if len(reading) == 1 else await _joined(reading)
        return Encoded(items, size, time.perf_counter() - start)

    async def read_chunks(
        self, texts: Sequence[str], options: Encoding, chunk_tokens: int, overlap_tokens: int, overlap: float, late: bool
    ) -> tuple[Encoded, list[list[Span]]]:
        """Where the chunks of each text stand; with the texts, encoded in windows if `late`, else in a row per chunk."""
        whole = replace(options, on_overflow=options.on_overflow or "split")
        encoded = await self.read(texts, whole, overlap, with_offsets=True)
        self.check_tokens(len(item.tokens) for item in encoded.items if isinstance(item, Item))
        shift = len(self.prompt(options.prompt_name))
        limits = chunk_tokens, overlap_tokens

        def find() -> list[list[Span]]:
            return [_spans(text, item, shift, *limits) for text, item in zip(texts, encoded.items, strict=True)]

        spans = await self.off_loop(find, encoded.characters)
        self.check_tokens(span.last - span.first for its in spans for span in its)
        return encoded if late else await self._alone(texts, encoded, spans, options), spans

    async def _alone(self, texts: Sequence[str], whole: Encoded, spans: list[list[Span]], options: Encoding) -> Encoded:
        """The same texts, with each chunk as a text of its own."""
        chunks = [text[span.start : span.end] for text, its in zip(texts, spans, strict=True) for span in its]
        encoded = await self.read(chunks, replace(options, on_overflow="truncate", partial=False))
        rows = iter(encoded.rows)
        items = [
            replace(item, pieces=replace(item.pieces, rows=list(islice(rows, len(its))))) if isinstance(item, Item) else item
            for item, its in zip(whole.items, spans, strict=True)
        ]
        return Encoded(items, whole.characters, whole.seconds + encoded.seconds)

    async def tokenize(self, texts: Sequence[str], special_tokens: bool, prompt_name: str | None) -> list[list[Token]]:
        """The tokens of each text, nothing cut. Raises TooManyTokens for more than a request may have encoded."""
        prompt = self.prompt(prompt_name)

        def read() -> list[list[Token]]:
            encodings = [self._tokenizer.describe(prompt + text, special_tokens) for text in texts]
            self.check_tokens(map(len, encodings))
            return [
                self._named(text, encoding.ids, encoding.offsets, len(prompt))
                for text, encoding in zip(texts, encodings, strict=True)
            ]

        return await self.off_loop(read, _size(texts))

    async def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        decode = self._tokenizer.decode
        return await self.off_loop(lambda: [decode(ids, skip_special_tokens) for ids in rows], sum(map(len, rows)))

    async def off_loop(self, function: Callable[[], T], size: int) -> T:
        """Call a function in a thread; in the event loop where so few characters are sooner done than the way there.

        Large work has threads of its own, so that it delays no small work, however much of it there is.
        """
        try:
            if size <= _SMALL:
                return function()
            threads = self._large if size > _LARGE else self._threads
            return await asyncio.get_running_loop().run_in_executor(threads, function)
        except InvalidTokens as error:
            raise InvalidInput(str(error)) from None

    def prompt(self, name: str | None) -> str:
        """What stands before each text, and the first of a pair: the prompt of that name, or the checkpoint's default one.

        Token ids get none.
        """
        if name == NO_PROMPT:
            return ""
        if name is not None and name not in self._prompts:
            raise InvalidInput(f"prompt_name is none of this model's. Available prompts: {sorted(self._prompts)}")
        return self._prompts.get(name or self._default_prompt or "", "")

    def owns(self, ids: Sequence[int]) -> bool:
        """Whether token ids can only be this model's: of its vocabulary, and framed with its special tokens."""
        return self._tokenizer.is_framed(ids) and 0 <= min(ids) <= max(ids) < self._tokenizer.vocab_size

    def room(self, prompt_name: str | None) -> int:
        """The most tokens of a text that the model takes at once, beside the special ones and a prompt's."""
        return self._tokenizer.max_tokens - len(self._tokenizer.encode([self.prompt(prompt_name)], _UNCUT)[0])

    def check_tokens(self, lengths: Iterable[int]) -> None:
        """Raises TooManyTokens where that is more than one request may have encoded."""
        tokens, limit = sum(lengths), self._settings.max_request_tokens
        if tokens > limit:
            raise TooManyTokens(f"{tokens} tokens to encode in one request; wanted at most {limit}, send fewer or shorter texts")

    def name_tokens(self, inputs: Sequence[Input], encoded: Encoded, prompt_name: str | None) -> list[list[Token]]:
        """The tokens of each encoded input; ids have no places in a text."""
        shift = len(self.prompt(prompt_name))
        return [
            self._named_item(item, read.tokens, shift) if isinstance(read, Item) else []
            for item, read in zip(inputs, encoded.items, strict=True)
        ]

    def _named_item(self, item: Input, row: Tokens, shift: int) -> list[Token]:
        if isinstance(item, str) and row.offsets is not None:
            return self._named(item, row.ids.tolist(), row.offsets.tolist(), shift)
        return self._named("", row.ids.tolist(), [(0, 0)] * len(row))

    def _items(
        self, inputs: Sequence[Input], first: int, prompt: str, options: Encoding, overlap: float, with_offsets: bool
    ) -> list[Item | ServiceError]:
        """These inputs, of which the first stands at that place in the request."""
        on_overflow = options.on_overflow or self._settings.on_overflow
        most = self._settings.max_request_tokens
        limit = most if on_overflow == "split" else self._tokenizer.max_tokens
        texts = [_prompted(item, prompt) for item in inputs if not isinstance(item, list)]
        enough = limit if on_overflow == "truncate" else most  # who is told a number of tokens is told it up to here
        encoded = iter(self._tokenizer.encode(texts, limit, options.side, with_offsets, options.max_second, enough))
        items: list[Item | ServiceError] = []
        for place, item in enumerate(inputs, first):
            try:
                row = self._tokenizer.encode_ids(item, limit, options.side) if isinstance(item, list) else next(encoded)
                for part in item if isinstance(item, tuple) else [item]:
                    check_not_empty(part, "a text" if isinstance(part, str) else "a list of token ids")
                check_not_empty(row, "a text")  # a tokenizer without special tokens finds none in white space
                if row.cut and on_overflow != "truncate":
                    raise self._too_long("the text" if options.partial else f"text {place}", row, on_overflow, options.splits)
                items.append(self._item(row, prompt if isinstance(item, str) else "", overlap))
            except (ServiceError, InvalidTokens) as error:
                if not options.partial:
                    raise
                items.append(error if isinstance(error, ServiceError) else InvalidInput(str(error)))
        return items

    def _item(self, row: Tokens, prompt: str, overlap: float) -> Item:
        """Each window is framed as the whole text is, prompt included: without it a model takes a text for another kind."""
        before, after = self._tokenizer.frame
        limit = self._tokenizer.max_tokens
        if len(row) <= limit:
            return Item(row, Pieces([row], [(0, len(row) - before - after)], before, after))
        if prompt:
            ids = self._tokenizer.describe(prompt, special_tokens=False).ids
            before += _common(ids, row.ids[before : before + len(ids)].tolist())
        room = limit - before - after
        if room < 1:
            raise InvalidInput(f"the prompt leaves a text no room in {limit} tokens; take a shorter one or on_overflow: truncate")
        return Item(row, split(row, limit, before, after, int(overlap * room)))

    def _too_long(self, subject: str, row: Tokens, on_overflow: OnOverflow, splits: bool) -> ServiceError:
        tokens, most = len(row) + row.cut, self._settings.max_request_tokens
        count = f"more than {most}" if tokens > most else str(tokens)
        if on_overflow == "split":
            return TooManyTokens(
                f"{subject} has {count} tokens in one request; wanted at most {most}, send fewer or shorter texts"
            )
        return InvalidInput(
            f"{subject} has {count} tokens; wanted at most {self._tokenizer.max_tokens}, "
            f"shorten it or send on_overflow: truncate{' or split' if splits else ''}"
        )

    def _named(self, text: str, ids: Sequence[int], offsets: Sequence[Sequence[int]], shift: int = 0) -> list[Token]:
        """Tokens with their places in the text; those of the prompt, `shift` characters before it, have none."""
        name, special = self._tokenizer.token_text, self._tokenizer.is_special
        return [
            Token(token, text[start - shift : end - shift], False, start - shift, end - shift)
            if end > start >= shift
            else Token(token, name(token), special(token), None, None)
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]


def check_not_empty(item: Sized, wanted: str) -> None:
    if not item:
        raise EmptyInput(f"an input is empty; wanted {wanted}")


def _prompted(item: str | tuple[str, str], prompt: str) -> str | tuple[str, str]:
    """A text behind a prompt; of a pair the first one, as sentence-transformers' CrossEncoder has it."""
    return prompt + item if isinstance(item, str) else (prompt + item[0], item[1])


def _size(inputs: Sequence[Input]) -> int:
    """Characters of the texts; token ids have none."""
    return sum(len(item) if isinstance(item, str) else sum(map(len, item)) for item in inputs if not isinstance(item, list))


def _parts(count: int, size: int) -> list[slice]:
    """The parts of a list of so many inputs with so many characters that are read at once: one, unless that is large work."""
    parts = min(count, TOKENIZERS) if size > _LARGE else 1
    return [slice(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


async def _joined(parts: Iterable[Awaitable[list[T]]]) -> list[T]:
    """What parts of a list gave, in one list; raises the first error in the order of the list, whichever came first."""
    joined = []
    for part in await asyncio.gather(*parts, return_exceptions=True):
        if isinstance(part, BaseException):
            raise part
        joined += part
    return joined


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their start."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _spans(text: str, item: Item | ServiceError, shift: int, chunk_tokens: int, overlap_tokens: int) -> list[Span]:
    """The chunks of a text whose tokens have offsets that count from `shift` characters before it."""
    if isinstance(item, ServiceError) or item.tokens.offsets is None:
        return []
    rows = np.flatnonzero(item.tokens.offsets[:, 1] > shift)  # those of the text: neither special nor of the prompt
    offsets = np.maximum(item.tokens.offsets[rows] - shift, 0).tolist()
    return [
        Span(*characters(text, offsets, first, last), int(rows[first]), int(rows[last - 1]) + 1)
        for first, last in chunk_spans(text, offsets, chunk_tokens, overlap_tokens)
    ]

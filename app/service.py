"""What the service can do, in words. Every dialect, and the command line, calls these methods."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np

from app.engine import HIDDEN, Engine, EngineOptions
from app.errors import DeadlineExceeded, EmptyInput, InvalidInput, Overloaded, ServiceError
from app.metrics import Metrics
from app.scheduler import Answer, Scheduler
from app.settings import Settings
from model.config import ModelConfig, PoolingMode, transformer_folder, weight_files
from model.errors import InvalidTokens
from model.hub import digest, find_model
from model.tokenizer import Side, Text, Tokenizer
from model.tokens import Tokens
from model.vectors import FloatArray, Metric, compare, normalize, shorten

Input = str | list[int]
"""A text, or the ids of a text that the client has tokenized."""

VERSION = version("bertd")

_TOKENIZERS = 2  # threads that tokenize; the library releases the interpreter lock
_FRAME = 2  # special tokens around a text
_PATIENCE = 0.1  # seconds until work without a deadline asks a full queue again
_SMALL = 1000  # characters that are tokenized in the event loop: 0.1 ms, what a thread costs

T = TypeVar("T")


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens. None leaves a choice to the server or the model."""

    truncate: bool | None = None
    side: Side = "right"
    prompt_name: str | None = None


@dataclass(frozen=True)
class Embedding(Encoding):
    """How tokens become vectors."""

    pooling: PoolingMode | None = None
    normalize: bool = True
    dimensions: int | None = None


@dataclass(frozen=True)
class Stats:
    """What a request cost: real tokens (special ones included), characters, texts that were cut, seconds by stage."""

    texts: int
    tokens: int
    characters: int
    truncated: int
    tokenize: float
    queue: float
    infer: float
    device: str


@dataclass(frozen=True)
class Token:
    """A token as the client reads it: `text[start:end]` in characters; special tokens have no place in the text."""

    id: int
    text: str
    special: bool
    start: int | None
    end: int | None


@dataclass(frozen=True)
class Encoded:
    """Texts on their way to the engine."""

    rows: list[Tokens]
    characters: int
    seconds: float


@dataclass(frozen=True)
class Space:
    """What two vectors must have in common to be compared. `model` is the SHA-256 of the weights."""

    model: str
    dimension: int
    pooling: PoolingMode
    prompt_name: str | None
    prompt: str


class Service:
    """An encoder with everything around it that a request needs."""

    def __init__(
        self,
        settings: Settings,
        config: ModelConfig,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        metrics: Metrics,
        facts: dict[str, Any],
    ) -> None:
        self.settings = settings
        self.config = config
        self.metrics = metrics
        self.facts = facts
        self.scheduler = scheduler
        self.closing = asyncio.Event()  # set when the server stops: work that takes long gives up
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(max_workers=facts["tokenization_workers"], thread_name_prefix="tokenize")

    async def embed(self, inputs: Sequence[Input], options: Embedding) -> tuple[FloatArray, Stats]:
        """One vector per text: [N, out]."""
        pooling = self._pooling(options.pooling)
        self._check_dimensions(options.dimensions)
        encoded = await self._encode(inputs, options)
        answer = await self._infer(encoded.rows, pooling)
        vectors = shorten(np.stack(_results(answer)), options.dimensions)
        return normalize(vectors) if options.normalize else vectors, self._account(encoded, answer)

    async def embed_many(
        self, texts: Sequence[str], options: Embedding, progress: Callable[[int], object] = lambda count: None
    ) -> tuple[FloatArray, int]:
        """One vector per text, [N, out], for any number of texts, and how many of them were cut.

        They go through the queue in slices that take turns with the rows of others. Where `embed` would be refused
        because the queue is full, this waits; no deadline applies. `progress` is told of each slice that is done.
        """
        pooling = self._pooling(options.pooling)
        vectors = np.empty((len(texts), self.config.dimension), dtype=np.float32)
        truncated = done = 0
        for part in self._slices(texts):
            encoded = await self._encode(part, options)
            answer = await self._submit_patiently(encoded.rows, pooling)
            vectors[done : done + len(part)] = _results(answer)
            truncated += self._account(encoded, answer).truncated
            done += len(part)
            progress(len(part))
        return normalize(vectors) if options.normalize else vectors, truncated

    async def embed_tokens(
        self, inputs: Sequence[Input], options: Encoding, with_tokens: bool = False
    ) -> tuple[list[FloatArray], list[list[Token]], Stats]:
        """One matrix [L, H] per text, special tokens included; with the tokens that its rows stand for where asked."""
        encoded = await self._encode(inputs, options, with_offsets=with_tokens)
        answer = await self._infer(encoded.rows, HIDDEN)
        prompt = self._prompt(options.prompt_name)
        tokens = [self._describe(*pair, prompt) for pair in zip(inputs, encoded.rows, strict=True)] if with_tokens else []
        return _results(answer), tokens, self._account(encoded, answer)

    async def similarity(
        self, a: Sequence[str], b: Sequence[str], options: Embedding, metric: Metric
    ) -> tuple[FloatArray, Stats]:
        """Every text of `a` against every text of `b`: [len(a), len(b)]."""
        _check_not_empty([*a], "a list of texts")
        _check_not_empty([*b], "a list of texts")
        vectors, stats = await self.embed([*a, *b], options)
        return compare(vectors[: len(a)], vectors[len(a) :], metric), stats

    async def tokenize(self, texts: Sequence[str], special_tokens: bool, prompt_name: str | None) -> list[list[Token]]:
        """The tokens of each text, nothing cut."""
        self._check_list(texts)
        prompt = self._prompt(prompt_name)
        tokens_of = self._tokens_of
        return await self._off_loop(lambda: [tokens_of(text, special_tokens, prompt) for text in texts], _characters(texts))

    async def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """The text of each list of token ids."""
        self._check_list(rows)
        decode = self._tokenizer.decode
        return await self._off_loop(lambda: [decode(ids, skip_special_tokens) for ids in rows], sum(map(len, rows)))

    def space(self, pooling: PoolingMode | None, prompt_name: str | None) -> Space:
        """The space of the vectors that `embed` gives under these options."""
        named = prompt_name or self.config.default_prompt
        return Space(self.facts["sha256"], self.config.dimension, self._pooling(pooling), named, self._prompt(prompt_name))

    def info(self) -> dict[str, Any]:
        """What is served and what was decided at start: TEI's keys, then ours."""
        facts, settings = self.facts, self.settings
        return {
            "model_id": settings.model,
            "model_sha": facts["sha256"],
            "model_dtype": facts["dtype"],
            "served_model_name": settings.model,
            "model_type": {"embedding": {"pooling": settings.pooling or self.config.pooling}},
            "max_concurrent_requests": max(1, self.scheduler.max_queue_tokens // self.config.max_tokens),
            "max_input_length": self.config.max_tokens,
            "max_batch_tokens": facts["max_batch_tokens"],
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_client_batch_size,
            "auto_truncate": True,
            "tokenization_workers": facts["tokenization_workers"],
            "version": VERSION,
            "dimension": self.config.dimension,
            "poolings": facts["poolings"],
            "prompts": sorted(self.config.prompts),
            "device": facts["device"],
            "dtype": facts["dtype"],
            "kernel": facts["kernel"],
            "threads": facts["threads"],
            "max_queue_tokens": self.scheduler.max_queue_tokens,
            "max_body_bytes": settings.max_body_bytes,
            "tokens_per_second": round(facts["tokens_per_second"]),
        }

    async def _encode(self, inputs: Sequence[Input], options: Encoding, with_offsets: bool = False) -> Encoded:
        start = time.perf_counter()
        self._check_list(inputs)
        for item in inputs:
            _check_not_empty(item, "text" if isinstance(item, str) else "a list of token ids")
        prompt = self._prompt(options.prompt_name)
        texts = [prompt + item if isinstance(item, str) else item for item in inputs] if prompt else inputs
        rows = await self._off_loop(lambda: self._encode_all(texts, options.side, with_offsets), _characters(texts))
        if options.truncate is False:
            self._check_lengths(rows)
        return Encoded(rows, _characters(texts), time.perf_counter() - start)

    def _encode_all(self, inputs: Sequence[Input], side: Side, with_offsets: bool) -> list[Tokens]:
        texts: list[Text] = [item for item in inputs if isinstance(item, str)]
        encoded = iter(self._tokenizer.encode(texts, cut_side=side, with_offsets=with_offsets))
        return [next(encoded) if isinstance(item, str) else self._tokenizer.encode_ids(item, cut_side=side) for item in inputs]

    async def _infer(self, rows: list[Tokens], task: str) -> Answer:
        timeout = self.settings.request_timeout
        try:
            async with asyncio.timeout(timeout):
                return await self.scheduler.submit(rows, task)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout:g} s; send fewer texts or try again later") from None

    def _slices(self, texts: Sequence[str]) -> Iterator[Sequence[str]]:
        """Texts in lists that fill half of the queue at most. A token stands for a character at least, so this is cautious."""
        room, limit = self.scheduler.max_queue_tokens // 2, self.settings.max_client_batch_size
        start = tokens = 0
        for place, text in enumerate(texts):
            size = min(len(text) + _FRAME, self.config.max_tokens)
            if place > start and (tokens + size > room or place - start == limit):
                yield texts[start:place]
                start, tokens = place, 0
            tokens += size
        yield texts[start:]

    async def _submit_patiently(self, rows: list[Tokens], task: str) -> Answer:
        while True:
            try:
                return await self.scheduler.submit(rows, task)
            except Overloaded:
                await asyncio.sleep(_PATIENCE)

    async def _off_loop(self, function: Callable[[], T], size: int) -> T:
        """Call a function of the tokenizer in a thread; in the event loop where that is sooner done than the way there."""
        try:
            if size <= _SMALL:
                return function()
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except InvalidTokens as error:
            raise InvalidInput(str(error)) from None

    def _pooling(self, asked: PoolingMode | None) -> PoolingMode:
        pooling = asked or self.settings.pooling or self.config.pooling
        if pooling not in self.facts["poolings"]:
            raise InvalidInput(
                f"pooling {pooling!r} is not there in this checkpoint; wanted one of {', '.join(self.facts['poolings'])}"
            )
        return pooling

    def _check_dimensions(self, dimensions: int | None) -> None:
        if dimensions is not None and not 1 <= dimensions <= self.config.dimension:
            raise InvalidInput(f"dimensions is {dimensions}; wanted 1 to {self.config.dimension}")

    def _check_list(self, items: Sequence[object]) -> None:
        _check_not_empty(items, "a list of inputs")
        limit = self.settings.max_client_batch_size
        if len(items) > limit:
            raise InvalidInput(f"{len(items)} inputs in one request; wanted at most {limit}, split the list")

    def _check_lengths(self, rows: list[Tokens]) -> None:
        for place, row in enumerate(rows):
            if row.cut:
                raise InvalidInput(
                    f"inputs[{place}] has {len(row) + row.cut} tokens; wanted at most {self._tokenizer.max_tokens}, "
                    "shorten it or send truncate: true"
                )

    def _prompt(self, name: str | None) -> str:
        """What stands before each text: the prompt of that name, or the checkpoint's default one. Token ids get none."""
        prompts = self.config.prompts
        if name is not None and name not in prompts:
            raise InvalidInput(f"prompt_name {name!r} is not known. Available prompts: {sorted(prompts)}")
        return prompts.get(name or self.config.default_prompt or "", "")

    def _tokens_of(self, text: str, special_tokens: bool, prompt: str) -> list[Token]:
        encoding = self._tokenizer.describe(prompt + text, special_tokens)
        return self._named(text, encoding.ids, encoding.offsets, len(prompt))

    def _describe(self, item: Input, row: Tokens, prompt: str) -> list[Token]:
        if isinstance(item, str) and row.offsets is not None:
            return self._named(item, row.ids.tolist(), row.offsets.tolist(), len(prompt))
        return self._named("", row.ids.tolist(), [(0, 0)] * len(row))

    def _named(self, text: str, ids: Sequence[int], offsets: Sequence[Sequence[int]], shift: int = 0) -> list[Token]:
        """Tokens with their places in the text; those of the prompt, `shift` characters before it, have none."""
        name, special = self._tokenizer.token_text, self._tokenizer.is_special
        return [
            Token(token, text[start - shift : end - shift], False, start - shift, end - shift)
            if end > start >= shift
            else Token(token, name(token), special(token), None, None)
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]

    def _account(self, encoded: Encoded, answer: Answer) -> Stats:
        rows = encoded.rows
        stats = Stats(
            texts=len(rows),
            tokens=sum(map(len, rows)),
            characters=encoded.characters,
            truncated=sum(row.cut > 0 for row in rows),
            tokenize=encoded.seconds,
            queue=answer.queue_seconds,
            infer=answer.infer_seconds,
            device=self.facts["device"],
        )
        self.metrics.texts.inc(stats.texts)
        self.metrics.tokens.inc(stats.tokens)
        self.metrics.truncated.inc(stats.truncated)
        for stage in ("tokenize", "queue", "infer"):
            self.metrics.stages[stage].observe(getattr(stats, stage))
        return stats


def _results(answer: Answer) -> list[FloatArray]:
    """The arrays of an answer; raises the first row's error if there is one."""
    results = []
    for outcome in answer.outcomes:
        if isinstance(outcome, ServiceError):
            raise outcome
        results.append(outcome)
    return results


def _characters(inputs: Sequence[Input]) -> int:
    return sum(len(item) for item in inputs if isinstance(item, str))


def _check_not_empty(item: Sequence[object], wanted: str) -> None:
    if not item:
        raise EmptyInput(f"an input is empty; wanted {wanted}")


@asynccontextmanager
async def running_service(settings: Settings, metrics: Metrics) -> AsyncIterator[Service]:
    """Start everything that a service needs, and stop it at the end.

    Raises ModelError or EngineError when the model cannot be served.
    """
    folder = find_model(settings.model, settings.revision)
    config = ModelConfig.from_folder(folder)
    files = weight_files(transformer_folder(folder))
    options = EngineOptions(str(folder), settings.device, settings.dtype, settings.threads, settings.max_batch_tokens)
    engines = [Engine(options)]
    starting = asyncio.ensure_future(_start_all(engines, options))
    try:
        sha256, tokenizer = await asyncio.gather(
            asyncio.to_thread(digest, files), asyncio.to_thread(Tokenizer.from_folder, folder, config)
        )
        await starting
        batch_tokens = min(engine.facts["max_batch_tokens"] for engine in engines)
        scheduler = Scheduler(engines, metrics, batch_tokens, settings.max_queue_tokens)
        facts = {**engines[0].facts, "model": settings.model, "sha256": sha256, "tokenization_workers": _TOKENIZERS}
        metrics.model_info.labels(settings.model, sha256, facts["dtype"], facts["device"]).set(1)
        yield Service(settings, config, tokenizer, scheduler, metrics, facts)
        await scheduler.drain()
    finally:
        starting.cancel()
        await asyncio.gather(*(engine.stop() for engine in engines))


async def _start_all(engines: list[Engine], options: EngineOptions) -> None:
    """Start the first engine and, where it finds more devices of its kind and none was named, one for each of the others."""
    await engines[0].start()
    if options.device in ("auto", "cuda"):
        engines += [Engine(replace(options, device=f"cuda:{n}")) for n in range(1, engines[0].facts["devices"])]
        await asyncio.gather(*(engine.start() for engine in engines[1:]))

"""What the service can do, in words. Every dialect, and the command line, calls these methods."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np

from app.engine import HIDDEN, SPARSE, Engine, EngineOptions
from app.errors import EmptyInput, InvalidInput, NotReady, Overloaded, ServiceError, WrongKind
from app.inputs import TOKENIZERS, Encoded, Encoding, Input, Item, Reader, Span, Token
from app.metrics import Metrics
from app.record import current_record
from app.scheduler import Answer, Outcome, Scheduler
from app.settings import Settings
from model.cgroup import memory_limit
from model.config import Kind, ModelConfig, PoolingMode, transformer_folder, weight_files, with_article
from model.hub import digest, find_model
from model.tokenizer import Tokenizer
from model.tokens import Tokens
from model.vectors import Array, FloatArray, Metric, OutputDtype, compare, normalize, quantize, shorten, sigmoid, softmax
from model.windows import Pieces

Merge = Callable[[Pieces, list[FloatArray]], FloatArray]
"""What the engine gave for the pieces of a text, as one array."""

ROUTES: Mapping[Kind, str] = {
    "embedder": "/embed, /embed_all, /embed_chunks, /similarity, /score, /v1/embeddings, /classify",
    "classifier": "/predict, /classify",
    "reranker": "/rerank, /v1/rerank, /v2/rerank, /score, /predict, /classify",
    "sparse": "/embed_sparse",
}
"""What a model of each kind answers, for the refusal of everything else."""

VERSION = version("bertd")

_FRAME = 2  # special tokens around a text
_PATIENCE = 0.1  # seconds until work without a deadline asks a full queue again
_CONTEXT = 0.25  # of a window that it shares with its neighbour where the rows of single tokens are wanted


@dataclass(frozen=True)
class Embedding(Encoding):
    """How tokens become vectors."""

    pooling: PoolingMode | None = None
    normalize: bool = True
    dimensions: int | None = None
    output_dtype: OutputDtype = "float32"


@dataclass(frozen=True)
class Chunking(Embedding):
    """How a text is parted: chunks of so many of its tokens, special ones and a prompt's not counted.

    late  a chunk's vector is the mean over its rows of the whole text's matrix (arXiv 2409.04701), not that of its text alone
    """

    chunk_tokens: int = 128
    overlap_tokens: int = 0
    late: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """`text[start:end]`, in code points of the client's text."""

    start: int
    end: int
    embedding: FloatArray


@dataclass(frozen=True, slots=True)
class Detail:
    """What was done to one text: tokens that were encoded for it, whether it was cut, in how many pieces; or why it failed."""

    tokens: int
    truncated: bool
    pieces: int
    error: ServiceError | None = None


@dataclass(frozen=True)
class Scoring(Encoding):
    """How texts and pairs become scores."""

    raw: bool = False  # as the classifier gives them


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
    details: list[Detail]

    @property
    def errors(self) -> list[ServiceError | None]:
        """Why each text failed; None for those that did not."""
        return [detail.error for detail in self.details]


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
        self.name = settings.served_model_name or settings.model
        self.started = int(time.time())
        self.closing = asyncio.Event()  # set when the server stops: work that takes long gives up
        self.reader = Reader(settings, config, tokenizer)

    async def embed(self, inputs: Sequence[Input], options: Embedding) -> tuple[Array, Stats]:
        """One vector per text: [N, out] of the output dtype. With `partial`, the row of a text that failed is zeros and its
        detail says why."""
        self._check_kind("embedder")
        _check_dtype(options.output_dtype, options.normalize)
        self._check_list(inputs)
        self._check_dimensions(options.dimensions)
        pooling = self._pooling(options.pooling)
        encoded = await self.reader.read(inputs, options)
        outcomes, stats = await self._infer(
            encoded, pooling, lambda pieces, vectors: pieces.vector(vectors, pooling), options.partial
        )
        (rows,) = await self._quantize([self._finish(outcomes, options)], options.output_dtype)
        return rows, stats

    async def embed_many(
        self,
        texts: Sequence[str],
        options: Embedding,
        progress: Callable[[int], object] = lambda count: None,
        where: str = "texts[{}]",
    ) -> tuple[FloatArray, int]:
        """The vectors that `embed` gives, [N, out], for any number of texts, and how many of them were cut.

        They go through the queue in slices that take turns with the rows of others. Where `embed` would be refused
        because the queue is full, this waits; no deadline applies, and what a request may hold is what a text may.
        `progress` is told of each slice that is done. A text is refused by its place, as `where` puts it.
        """
        self._check_kind("embedder")
        pooling = self._pooling(options.pooling)
        vectors = np.empty((len(texts), self.config.dimension), dtype=np.float32)
        truncated = done = 0
        for part in self._slices(texts):
            encoded = await self.reader.read(part, replace(options, partial=True))
            self._check_each(encoded, done, where)
            answer = await self._submit_patiently(encoded.rows, pooling)
            outcomes = await self._merge(encoded, answer, lambda pieces, vectors: pieces.vector(vectors, pooling))
            vectors[done : done + len(part)] = np.stack(_raise_first(outcomes))
            truncated += self._account(encoded, answer, outcomes).truncated
            done += len(part)
            progress(len(part))
        return normalize(vectors) if options.normalize else vectors, truncated

    async def embed_tokens(
        self, inputs: Sequence[Input], options: Encoding, with_tokens: bool = False, output_dtype: OutputDtype = "float32"
    ) -> tuple[list[Array], list[list[Token]], Stats]:
        """One matrix [L, H] per text, special tokens included; with the tokens that its rows stand for where asked.

        With `partial`, a text that failed has no rows and its detail says why.
        """
        self._check_kind("embedder")
        _check_dtype(output_dtype, normalized=False)
        self._check_list(inputs)
        encoded = await self.reader.read(inputs, options, _CONTEXT, with_offsets=with_tokens)
        outcomes, stats = await self._infer(encoded, HIDDEN, Pieces.matrix, options.partial)
        matrices = _filled(outcomes, np.empty((0, self.config.bert.hidden_size), dtype=np.float32))
        tokens = self.reader.name_tokens(inputs, encoded, options.prompt_name) if with_tokens else []
        return await self._quantize(matrices, output_dtype), tokens, stats

    async def embed_chunks(self, texts: Sequence[str], options: Chunking) -> tuple[list[list[Chunk]], Stats]:
        """The chunks of each text, in order; of a text of any length where `on_overflow` does not say otherwise.

        With `partial`, a text that failed has no chunks and its detail says why.
        """
        self._check_kind("embedder")
        self._check_list(texts)
        self._check_dimensions(options.dimensions)
        pooling = self._pooling(options.pooling)
        self._check_chunking(options)
        limits = options.chunk_tokens, options.overlap_tokens
        encoded, spans = await self.reader.read_chunks(texts, options, *limits, _CONTEXT, options.late)
        if options.late:
            outcomes, stats = await self._infer(encoded, HIDDEN, Pieces.matrix, options.partial)
        else:
            outcomes, stats = await self._infer(encoded, pooling, lambda _, vectors: np.array(vectors), options.partial)
        return [self._chunks(*pair, options) for pair in zip(outcomes, spans, strict=True)], stats

    async def similarity(
        self, a: Sequence[str], b: Sequence[str], options: Embedding, metric: Metric
    ) -> tuple[FloatArray, Stats]:
        """Every text of `a` against every text of `b`: [len(a), len(b)]; of no meaning beside a text that failed, with `partial`.

        The details are those of `a`, then those of `b`.
        """
        for texts in (a, b):
            _check_not_empty(texts, "a list of texts")
        vectors, stats = await self.embed([*a, *b], options)
        return compare(vectors[: len(a)], vectors[len(a) :], metric), stats

    async def embed_sparse(self, inputs: Sequence[Input], options: Encoding) -> tuple[list[FloatArray], Stats]:
        """The tokens of the vocabulary that each text stands for: N matrices [n, 2] of id and weight, by id.

        With `partial`, a text that failed has none and its detail says why.
        """
        self._check_kind("sparse")
        outcomes, stats = await self._whole(inputs, options, SPARSE)
        return _filled(outcomes, np.empty((0, 2), dtype=np.float32)), stats

    async def predict(self, inputs: Sequence[Input], options: Scoring) -> tuple[FloatArray, Stats]:
        """The score of each label for each text or pair: [N, labels], in the order of `config.labels`.

        With `partial`, the row of one that failed has no meaning and its detail says why.
        """
        self._check_kind("classifier", "reranker")
        outcomes, stats = await self._whole(inputs, options, "scores")
        scores = np.stack(_filled(outcomes, np.zeros(len(self.config.labels), dtype=np.float32)))
        return scores if options.raw else self._shares(scores), stats

    async def rerank(self, query: str, texts: Sequence[str], options: Scoring) -> tuple[FloatArray, Stats]:
        """How well each text answers the query: [N], in the order of the texts; `partial` as with `predict`."""
        self._check_kind("reranker")
        _check_not_empty(query, "a query")
        scores, stats = await self.predict([(query, text) for text in texts], options)
        return scores[:, 0], stats

    async def score(
        self, a: Sequence[str], b: Sequence[str], options: Scoring
    ) -> tuple[FloatArray, list[ServiceError | None], Stats]:
        """How well each text of `b` goes with its neighbour in `a`, or with the only one there: [len(b)].

        By a reranker; the cosine, by an embedder, whose details are those of `a`, then those of `b`. With `partial`, each
        pair has its error or None; where the only text of `a` is bad, its error is raised.
        """
        self._check_kind("embedder", "reranker")
        for texts in (a, b):
            _check_not_empty(texts, "a list of texts")
        if len(a) == 1:
            _check_not_empty(a[0], "a text")
        if len(a) not in (1, len(b)):
            raise InvalidInput(f"{len(a)} texts against {len(b)}; wanted one against any number, or as many on each side")
        if self.config.kind == "reranker":
            first = [*a] * len(b) if len(a) == 1 else a
            scores, stats = await self.predict([*zip(first, b, strict=True)], options)
            return scores[:, 0], stats.errors, stats
        how = Embedding(on_overflow=options.on_overflow, side=options.side, partial=options.partial)
        vectors, stats = await self.embed([*a, *b], how)
        errors = stats.errors
        if len(a) == 1 and errors[0]:
            raise errors[0]
        cosines: FloatArray = (vectors[: len(a)] * vectors[len(a) :]).sum(axis=1)
        of_a = errors[: len(a)] if len(a) == len(b) else [None] * len(b)
        return cosines, [one or other for one, other in zip(of_a, errors[len(a) :], strict=True)], stats

    async def tokenize(self, texts: Sequence[str], special_tokens: bool, prompt_name: str | None) -> list[list[Token]]:
        """The tokens of each text, nothing cut."""
        self._check_list(texts)
        return await self.reader.tokenize(texts, special_tokens, prompt_name)

    async def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """The text of each list of token ids."""
        self._check_list(rows)
        return await self.reader.decode(rows, skip_special_tokens)

    def space(self, pooling: PoolingMode | None, prompt_name: str | None) -> Space:
        """The space of the vectors that `embed` gives under these options."""
        named = prompt_name or self.config.default_prompt
        return Space(self.facts["sha256"], self.config.dimension, self._pooling(pooling), named, self.reader.prompt(prompt_name))

    def info(self) -> dict[str, Any]:
        """What is served and what was decided at start: TEI's keys, then ours."""
        facts, settings = self.facts, self.settings
        return {
            "model_id": settings.model,
            "model_sha": facts["sha256"],
            "model_dtype": facts["dtype"],
            "served_model_name": self.name,
            "model_type": self._model_type(),
            "max_concurrent_requests": max(1, self.scheduler.max_queue_tokens // self.config.max_tokens),
            "max_input_length": self.config.max_tokens,
            "max_batch_tokens": facts["max_batch_tokens"],
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_client_batch_size,
            "auto_truncate": settings.on_overflow == "truncate",
            "tokenization_workers": facts["tokenization_workers"],
            "version": VERSION,
            "kind": self.config.kind,
            "dimension": self.config.dimension,
            "poolings": facts["poolings"],
            "prompts": sorted(self.config.prompts),
            "device": facts["device"],
            "dtype": facts["dtype"],
            "kernel": facts["kernel"],
            "threads": facts["threads"],
            "lanes": facts["lanes"],
            "on_overflow": settings.on_overflow,
            "max_request_tokens": settings.max_request_tokens,
            "max_queue_tokens": self.scheduler.max_queue_tokens,
            "max_body_bytes": settings.max_body_bytes,
            "tokens_per_second": round(facts["tokens_per_second"]),
            "memory_limit": memory_limit(),
        }

    def _model_type(self) -> dict[str, Any]:
        """The kind of the model in TEI's words."""
        config = self.config
        if config.kind in ("embedder", "sparse"):
            return {"embedding": {"pooling": "splade" if config.kind == "sparse" else config.pooling}}
        numbered = {str(place): label for place, label in enumerate(config.labels)}
        return {config.kind: {"id2label": numbered, "label2id": {label: int(place) for place, label in numbered.items()}}}

    def _shares(self, scores: FloatArray) -> FloatArray:
        """Scores [N, labels] as probabilities; the numbers of a regression are the answer as they are (as transformers)."""
        if self.config.problem_type == "regression":
            return scores
        alone = len(self.config.labels) == 1 or self.config.problem_type == "multi_label_classification"
        return sigmoid(scores) if alone else softmax(scores)

    async def _whole(self, inputs: Sequence[Input], options: Encoding, task: str) -> tuple[list[Outcome], Stats]:
        """What the engine gives for texts or pairs that are not split: what is no mean has no mean of windows."""
        if options.on_overflow == "split":
            raise InvalidInput(f"on_overflow is split, and {task} of windows can't be merged; send truncate or error")
        self._check_list(inputs)
        habit = options.on_overflow or self.settings.on_overflow
        encoded = await self.reader.read(inputs, replace(options, on_overflow="truncate" if habit == "split" else habit))
        return await self._infer(encoded, task, lambda _, parts: parts[0], options.partial)

    async def _infer(self, encoded: Encoded, task: str, merge: Merge, partial: bool) -> tuple[list[Outcome], Stats]:
        """What `merge` makes of the engine's answers for the pieces of each text; raises the first error, if not `partial`."""
        rows = encoded.rows
        self.reader.check_tokens(map(len, rows))
        answer = await self._submit(rows, task)
        outcomes = await self._merge(encoded, answer, merge)
        _raise_first([outcome for outcome in outcomes if isinstance(outcome, NotReady) or not partial])
        return outcomes, self._account(encoded, answer, outcomes)

    async def _merge(self, encoded: Encoded, answer: Answer, merge: Merge) -> list[Outcome]:
        size = 0 if len(encoded.rows) == len(encoded.items) else encoded.characters  # nothing to merge, or something
        return await self.reader.off_loop(lambda: _merged(encoded, answer, merge), size)

    async def _submit(self, rows: list[Tokens], task: str) -> Answer:
        if not rows:
            return Answer([], 0.0, 0.0)
        return await self.scheduler.submit(rows, task)

    def _slices(self, texts: Sequence[str]) -> Iterator[Sequence[str]]:
        """Texts in lists of half the queue's tokens at most, if a character is a token; so that they are never all in memory."""
        room, limit = self.scheduler.max_queue_tokens // 2, self.settings.max_client_batch_size
        start = characters = 0
        for place, text in enumerate(texts):
            if place > start and (characters + len(text) + _FRAME > room or place - start == limit):
                yield texts[start:place]
                start, characters = place, 0
            characters += len(text) + _FRAME
        yield texts[start:]

    async def _submit_patiently(self, rows: Sequence[Tokens], task: str) -> Answer:
        """The answer for any number of rows, which go in parts of half the queue's tokens at most."""
        answers = [await self._submit_until_admitted(part, task) for part in _parts(rows, self.scheduler.max_queue_tokens // 2)]
        outcomes = [outcome for answer in answers for outcome in answer.outcomes]
        return Answer(outcomes, sum(a.queue_seconds for a in answers), sum(a.infer_seconds for a in answers))

    async def _submit_until_admitted(self, rows: Sequence[Tokens], task: str) -> Answer:
        while True:
            try:
                return await self.scheduler.submit(rows, task)
            except Overloaded:
                await asyncio.sleep(_PATIENCE)

    def _check_each(self, encoded: Encoded, start: int, where: str) -> None:
        """Raises the error of the first text that has one, or is too much for a request, by its place."""
        for place, item in enumerate(encoded.items, start):
            try:
                if isinstance(item, ServiceError):
                    raise item
                self.reader.check_tokens(map(len, item.pieces.rows))
            except ServiceError as error:
                raise type(error)(f"{where.format(place)}: {error.message}") from None

    def _finish(self, outcomes: Iterable[Outcome], options: Embedding) -> FloatArray:
        """Pooled vectors as the client wants them: [N, out]."""
        rows = _filled(outcomes, np.zeros(self.config.dimension, dtype=np.float32))
        vectors = shorten(np.stack(rows), options.dimensions)
        return normalize(vectors) if options.normalize else vectors

    def _chunks(self, outcome: Outcome, spans: list[Span], options: Chunking) -> list[Chunk]:
        """The chunks of a text out of its token matrix if `late`, else out of one vector per chunk: [C, out]."""
        if isinstance(outcome, ServiceError) or not spans:
            return []
        rows = [outcome[span.first : span.last].mean(axis=0) for span in spans] if options.late else outcome
        return [Chunk(span.start, span.end, vector) for span, vector in zip(spans, self._finish(rows, options), strict=True)]

    async def _quantize(self, arrays: list[FloatArray], dtype: OutputDtype) -> list[Array]:
        if dtype == "float32":
            return arrays
        return await self.reader.off_loop(lambda: [quantize(array, dtype) for array in arrays], sum(a.size for a in arrays))

    def _pooling(self, asked: PoolingMode | None) -> PoolingMode:
        pooling = asked or self.config.pooling
        if pooling not in self.facts["poolings"]:
            raise InvalidInput(
                f"pooling {pooling!r} is not there in this checkpoint; wanted one of {', '.join(self.facts['poolings'])}"
            )
        return pooling

    def _check_kind(self, *wanted: Kind) -> None:
        kind = self.config.kind
        if kind not in wanted:
            raise WrongKind(
                f"the model is {with_article(kind)}, wanted {' or '.join(map(with_article, wanted))}; "
                f"send the request to {ROUTES[kind]}, or serve a model of that kind"
            )

    def _check_dimensions(self, dimensions: int | None) -> None:
        if dimensions is not None and not 1 <= dimensions <= self.config.dimension:
            raise InvalidInput(f"dimensions is {dimensions}; wanted 1 to {self.config.dimension}")

    def _check_list(self, items: Sequence[object]) -> None:
        _check_not_empty(items, "a list of inputs")
        limit = self.settings.max_client_batch_size
        if len(items) > limit:
            raise InvalidInput(f"{len(items)} inputs in one request; wanted at most {limit}, split the list")

    def _check_chunking(self, options: Chunking) -> None:
        room = self.reader.room(options.prompt_name)
        if not 1 <= options.chunk_tokens <= room:
            raise InvalidInput(f"chunk_tokens is {options.chunk_tokens}; wanted 1 to {room}")
        if not 0 <= options.overlap_tokens < options.chunk_tokens:
            raise InvalidInput(
                f"overlap_tokens is {options.overlap_tokens}; wanted 0 to {options.chunk_tokens - 1}, below chunk_tokens"
            )
        if options.late and options.pooling not in (None, "mean"):
            raise InvalidInput(f"pooling is {options.pooling} and late is true; late chunks are means: send mean or none")
        if options.late and self.config.dense:
            raise WrongKind(
                "this checkpoint projects its vectors, and late chunks are means of rows before that; send late: false"
            )

    def _account(self, encoded: Encoded, answer: Answer, outcomes: Sequence[Outcome]) -> Stats:
        details = [_detail(*pair) for pair in zip(encoded.items, outcomes, strict=True)]
        stats = Stats(
            texts=len(details),
            tokens=sum(detail.tokens for detail in details),
            characters=encoded.characters,
            truncated=sum(detail.truncated for detail in details),
            tokenize=encoded.seconds,
            queue=answer.queue_seconds,
            infer=answer.infer_seconds,
            device=self.facts["device"],
            details=details,
        )
        self.metrics.texts.inc(stats.texts)
        self.metrics.tokens.inc(stats.tokens)
        self.metrics.truncated.inc(stats.truncated)
        stages = [(stage, getattr(stats, stage)) for stage in ("tokenize", "queue", "infer")]
        for stage, seconds in stages:
            self.metrics.stages[stage].observe(seconds)
        current_record().encoded(stats.texts, stats.tokens, stats.truncated, stages)
        return stats


def _merged(encoded: Encoded, answer: Answer, merge: Merge) -> list[Outcome]:
    """One outcome per text: its refusal, the error of its first piece that failed, or what `merge` makes of its pieces."""
    coming = iter(answer.outcomes)
    outcomes: list[Outcome] = []
    for item in encoded.items:
        if isinstance(item, ServiceError):
            outcomes.append(item)
            continue
        parts = list(islice(coming, len(item.pieces.rows)))
        error = next((part for part in parts if isinstance(part, ServiceError)), None)
        outcomes.append(error or merge(item.pieces, [part for part in parts if not isinstance(part, ServiceError)]))
    return outcomes


def _parts(rows: Sequence[Tokens], room: int) -> Iterator[Sequence[Tokens]]:
    """Rows in lists of at most so many tokens, or of one row."""
    start = tokens = 0
    for place, row in enumerate(rows):
        if place > start and tokens + len(row) > room:
            yield rows[start:place]
            start, tokens = place, 0
        tokens += len(row)
    yield rows[start:]


def _filled(outcomes: Iterable[Outcome], missing: FloatArray) -> list[FloatArray]:
    """The outcomes, with something else in the place of errors."""
    return [missing if isinstance(outcome, ServiceError) else outcome for outcome in outcomes]


def _raise_first(outcomes: Sequence[Outcome]) -> list[FloatArray]:
    """The outcomes, which must be arrays; raises the first that is an error."""
    for outcome in outcomes:
        if isinstance(outcome, ServiceError):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, ServiceError)]


def _detail(item: Item | ServiceError, outcome: Outcome) -> Detail:
    error = outcome if isinstance(outcome, ServiceError) else None
    if isinstance(item, ServiceError):
        return Detail(0, False, 0, error)
    rows = item.pieces.rows
    return Detail(sum(map(len, rows)), item.truncated, len(rows), error)


def _check_dtype(dtype: OutputDtype, normalized: bool) -> None:
    if dtype in ("int8", "uint8") and not normalized:
        raise InvalidInput(
            f"output_dtype {dtype} divides the range of vectors of length 1, and these are not; "
            "wanted float32, float16, binary or ubinary here"
        )


def _check_not_empty(item: Sequence[object], wanted: str) -> None:
    if not item:
        raise EmptyInput(f"an input is empty; wanted {wanted}")


@asynccontextmanager
async def running_service(settings: Settings, metrics: Metrics) -> AsyncIterator[Service]:
    """Start everything that a service needs, and stop it at the end.

    Raises ModelError or EngineError when the model cannot be served.
    """
    folder = await asyncio.to_thread(find_model, settings.model, settings.revision)
    config = await asyncio.to_thread(ModelConfig.from_folder, folder, settings.pooling)
    files = weight_files(transformer_folder(folder))
    options = EngineOptions(
        str(folder), settings.device, settings.dtype, settings.threads, settings.max_batch_tokens, settings.pooling
    )
    engines = [Engine(options, settings.engine_timeout)]
    starting = asyncio.ensure_future(_start_all(engines, options, settings.engine_timeout))
    try:
        sha256, tokenizer = await asyncio.gather(
            asyncio.to_thread(digest, files), asyncio.to_thread(Tokenizer.from_folder, folder, config)
        )
        await starting
        await asyncio.gather(*(engine.check(config.task) for engine in engines))
        batch_tokens = min(engine.facts["max_batch_tokens"] for engine in engines)
        scheduler = Scheduler(engines, metrics, batch_tokens, settings.max_queue_tokens)
        facts = {**engines[0].facts, "model": settings.model, "sha256": sha256, "tokenization_workers": TOKENIZERS}
        yield Service(settings, config, tokenizer, scheduler, metrics, facts)
        await scheduler.drain()
    finally:
        starting.cancel()
        await asyncio.gather(*(engine.stop() for engine in engines))


async def _start_all(engines: list[Engine], options: EngineOptions, timeout: float) -> None:
    """Start the first engine and, where it finds more devices of its kind and none was named, one for each of the others."""
    await engines[0].start()
    if options.device in ("auto", "cuda"):
        engines += [Engine(replace(options, device=f"cuda:{n}"), timeout) for n in range(1, engines[0].facts["devices"])]
        await asyncio.gather(*(engine.start() for engine in engines[1:]))

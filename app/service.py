"""The encoder with its queue, as what stands on it sees it: texts are read, encoded, merged and counted here."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app.child import Child
from app.cores import TOKENIZERS
from app.engine import Engine, EngineOptions
from app.errors import EngineError, InvalidInput, NotReady, WrongKind
from app.inputs import Encoded, Reader, Token, check_not_empty
from app.metrics import Metrics
from app.outcomes import Merge, Stats, detail_of, merged, raise_first
from app.record import current_record
from app.scheduler import Answer, Scheduler
from app.settings import Settings
from app.waiting import Outcome
from model.config import Kind, ModelConfig, PoolingMode, checkpoint_files, transformer_folder, weight_files, with_article
from model.errors import CheckpointError
from model.hub import digest, find_model, stamps
from model.tokenizer import Tokenizer
from model.tokens import Tokens

ROUTES: Mapping[Kind, str] = {
    "embedder": "/embed, /embed_all, /embed_chunks, /similarity, /score, /v1/embeddings, /classify",
    "classifier": "/predict, /classify",
    "reranker": "/rerank, /v1/rerank, /v2/rerank, /score, /predict, /classify",
    "sparse": "/embed_sparse",
}
"""What a model of each kind answers, for the refusal of everything else."""

VERSION = version("bertd")


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

    async def tokenize(self, texts: Sequence[str], special_tokens: bool, prompt_name: str | None) -> list[list[Token]]:
        """The tokens of each text, nothing cut."""
        self.check_list(texts)
        return await self.reader.tokenize(texts, special_tokens, prompt_name)

    async def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """The text of each list of token ids."""
        self.check_list(rows)
        return await self.reader.decode(rows, skip_special_tokens)

    def space(self, pooling: PoolingMode | None, prompt_name: str | None) -> Space:
        """The space of the vectors that `embed` gives under these options."""
        self.check_kind("embedder")
        named = self.config.default_prompt if prompt_name is None else prompt_name
        return Space(self.facts["sha256"], self.config.dimension, self.pooling(pooling), named, self.reader.prompt(prompt_name))

    async def infer(self, encoded: Encoded, task: str, merge: Merge, partial: bool) -> tuple[list[Outcome], Stats]:
        """What `merge` makes of the engine's answers for the pieces of each text; raises the first error, if not `partial`."""
        rows = encoded.rows
        self.reader.check_tokens(map(len, rows))
        answer = await self._submit(rows, task)
        outcomes = await self.merge(encoded, answer, merge)
        raise_first([outcome for outcome in outcomes if isinstance(outcome, NotReady) or not partial])
        return outcomes, self.account(encoded, answer, outcomes)

    async def merge(self, encoded: Encoded, answer: Answer, merge: Merge) -> list[Outcome]:
        size = 0 if len(encoded.rows) == len(encoded.items) else encoded.characters  # nothing to merge, or something
        return await self.reader.off_loop(lambda: merged(encoded, answer, merge), size)

    async def _submit(self, rows: list[Tokens], task: str) -> Answer:
        if not rows:
            return Answer([], 0.0, 0.0)
        return await self.scheduler.submit(rows, task)

    def pooling(self, asked: PoolingMode | None) -> PoolingMode:
        pooling = asked or self.config.pooling
        if pooling not in self.facts["poolings"]:
            raise InvalidInput(
                f"pooling {pooling!r} is not there in this checkpoint; wanted one of {', '.join(self.facts['poolings'])}"
            )
        return pooling

    def check_kind(self, *wanted: Kind) -> None:
        kind = self.config.kind
        if kind not in wanted:
            raise WrongKind(
                f"the model is {with_article(kind)}, wanted {' or '.join(map(with_article, wanted))}; "
                f"send the request to {ROUTES[kind]}, or serve a model of that kind"
            )

    def check_dimensions(self, dimensions: int | None) -> None:
        if dimensions is not None and not 1 <= dimensions <= self.config.dimension:
            raise InvalidInput(f"dimensions is {dimensions}; wanted 1 to {self.config.dimension}")

    def check_list(self, items: Sequence[object]) -> None:
        check_not_empty(items, "a list of inputs")
        limit = self.settings.max_client_batch_size
        if len(items) > limit:
            raise InvalidInput(f"{len(items)} inputs in one request; wanted at most {limit}, split the list")

    def account(self, encoded: Encoded, answer: Answer, outcomes: Sequence[Outcome]) -> Stats:
        details = [detail_of(*pair) for pair in zip(encoded.items, outcomes, strict=True)]
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


@asynccontextmanager
async def running_service(
    settings: Settings, metrics: Metrics, early: Child | None = None, meanwhile: Callable[[], None] = lambda: None
) -> AsyncIterator[Service]:
    """Start everything that a service needs, and stop it at the end; call `meanwhile` in a thread while the engine loads.

    `early` is its first engine process, where one was started beforehand.
    Raises ModelError or EngineError when the model cannot be served.
    """
    folder = await asyncio.to_thread(find_model, settings.model, settings.revision)
    found = await asyncio.to_thread(_stamps, folder)
    config = await asyncio.to_thread(ModelConfig.from_folder, folder, settings.pooling)
    files = weight_files(transformer_folder(folder))
    options = EngineOptions(
        str(folder), settings.device, settings.dtype, settings.threads, settings.max_batch_tokens, settings.pooling
    )
    engines = [Engine(options, settings.engine_timeout, early=early)]
    starting = asyncio.ensure_future(_start_all(engines, options, settings.engine_timeout))
    try:
        sha256, tokenizer, _ = await asyncio.gather(
            asyncio.to_thread(digest, files),
            asyncio.to_thread(Tokenizer.from_folder, folder, config),
            asyncio.to_thread(meanwhile),
        )
        await starting
        if await asyncio.to_thread(_stamps, folder) != found:  # the digest may be that of other weights than an engine's
            raise EngineError("the files of the checkpoint changed while they were read; try again")
        await asyncio.gather(*(engine.check(config.task) for engine in engines))
        batch_tokens = min(engine.facts["max_batch_tokens"] for engine in engines)
        scheduler = Scheduler(engines, metrics, batch_tokens, settings.max_queue_tokens)
        facts = {**engines[0].facts, "model": settings.model, "sha256": sha256, "tokenization_workers": 2 * TOKENIZERS}
        yield Service(settings, config, tokenizer, scheduler, metrics, facts)
        await scheduler.drain()
    finally:
        starting.cancel()
        await asyncio.gather(*(engine.stop() for engine in engines))


def _stamps(folder: Path) -> list[list[int]] | None:
    """Those of config.json and the weights; None where one of these is missing."""
    try:
        return stamps(checkpoint_files(folder))
    except (CheckpointError, OSError):
        return None


async def _start_all(engines: list[Engine], options: EngineOptions, timeout: float) -> None:
    """Start the first engine and, where it finds more devices of its kind and none was named, one for each of the others."""
    await engines[0].start()
    if options.device in ("auto", "cuda"):
        engines += [Engine(replace(options, device=f"cuda:{n}"), timeout) for n in range(1, engines[0].facts["devices"])]
        await asyncio.gather(*(engine.start() for engine in engines[1:]))

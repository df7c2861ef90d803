"""What the service does when the engine fails on a part of a request."""

import asyncio
import threading
from dataclasses import replace

import pytest
from fake_worker import FAIL, NOT_A_NUMBER
from test_scheduler import PuppetEngine, turns

from app.bulk import embed_many
from app.chunking import Chunking, embed_chunks
from app.cores import TOKENIZERS
from app.embedding import Embedding, embed, embed_tokens
from app.engine import State
from app.errors import EngineError, InvalidInput, NotReady, WrongKind
from app.inputs import Encoding
from app.metrics import Metrics
from app.scheduler import Scheduler
from app.service import Service
from app.settings import Settings
from model.config import DenseConfig, ModelConfig
from model.tokenizer import Tokenizer
from model.tokens import Tokens

FACTS = {"poolings": ("mean",), "device": "cpu"}


@pytest.fixture(scope="module")
def config(minilm):
    """MiniLM's, but with the two numbers a row that the fake engine gives."""
    config = ModelConfig.from_folder(minilm)
    return replace(config, bert=replace(config.bert, hidden_size=2, num_attention_heads=1), max_tokens=6)


@pytest.fixture(scope="module")
def make_service(minilm, config):
    tokenizer = Tokenizer.from_folder(minilm, config)

    def make(engine, config=config):
        scheduler = Scheduler([engine], Metrics(), max_batch_tokens=100, max_queue_tokens=1000)
        return Service(Settings(), config, tokenizer, scheduler, scheduler._metrics, FACTS)

    return make


@pytest.mark.parametrize("bad", [FAIL, NOT_A_NUMBER])
async def test_a_text_on_which_the_encoder_fails_leaves_its_neighbours_alone(engine, make_service, bad):
    service = make_service(engine)
    inputs = [[7], [bad], [8, 9]]
    options = Embedding(partial=True, normalize=False)
    vectors, stats = await embed(service, inputs, options)
    assert vectors[[0, 2]].tolist() == [[101 + 7 + 102, 3], [101 + 8 + 9 + 102, 4]]
    assert vectors[1].tolist() == [0, 0]
    assert [type(detail.error) for detail in stats.details] == [type(None), EngineError, type(None)]
    assert [detail.tokens for detail in stats.details] == [3, 3, 4]
    with pytest.raises(EngineError):
        await embed(service, inputs, Embedding())


async def test_a_window_on_which_the_encoder_fails_fails_its_text(engine, make_service):
    service = make_service(engine)
    inputs = [[7] * 10, [7] * 9 + [FAIL], [8]]
    matrices, _, stats = await embed_tokens(service, inputs, Encoding("split", partial=True))
    assert [len(matrix) for matrix in matrices] == [12, 0, 3]
    assert [detail.error is None for detail in stats.details] == [True, False, True]
    assert [detail.pieces for detail in stats.details] == [3, 3, 1]


async def test_partial_does_not_hide_that_the_engine_is_gone(make_service):
    engine = PuppetEngine()
    service = make_service(engine)
    asked = asyncio.ensure_future(embed(service, [[7]], Embedding(partial=True)))
    await turns()
    engine.state = State.FAILED
    engine.on_change()
    with pytest.raises(NotReady):
        await asked


async def test_work_without_a_deadline_waits_for_an_engine_that_starts_again_behind_a_full_queue(make_service, monkeypatch):
    monkeypatch.setattr("app.bulk._PATIENCE", 0.0)
    engine = PuppetEngine(state=State.STARTING)
    service = make_service(engine)
    others = [asyncio.ensure_future(service.scheduler.submit([Tokens.of([5] * 100)], "mean")) for _ in range(10)]
    await turns()
    with pytest.raises(NotReady):
        await embed(service, ["a text"], Embedding())
    many = asyncio.ensure_future(embed_many(service, ["a text", "another"], Embedding()))
    await turns()
    assert not many.done()
    engine.state = State.READY
    engine.on_change()
    await turns()
    while not many.done():
        await (engine.answer() if engine.busy else turns())
    assert (await many)[0].shape == (2, 2)
    await asyncio.gather(*others)


async def test_large_work_of_some_does_not_hold_up_small_work_of_others(make_service):
    reader = make_service(PuppetEngine()).reader
    done = threading.Event()
    large = [asyncio.ensure_future(reader.off_loop(done.wait, 8 * 2**20)) for _ in range(10)]
    try:
        assert await asyncio.wait_for(reader.off_loop(lambda: "small", 5000), timeout=20) == "small"
        assert not any(job.done() for job in large)
    finally:
        done.set()
        await asyncio.gather(*large)


async def test_a_large_list_is_read_in_parts_at_once_and_answered_in_order(make_service, monkeypatch):
    reader = make_service(PuppetEngine()).reader
    inputs = [f"{number} " * (1 + number % 3) for number in range(101)]
    whole = await reader.read(inputs, Encoding())
    together, encode = threading.Barrier(TOKENIZERS), Tokenizer.encode

    def encode_together(self, texts, *options):
        together.wait(30)
        return encode(self, texts, *options)

    monkeypatch.setattr("app.inputs._LARGE", 300)
    monkeypatch.setattr("app.inputs._SMALL", 0)
    monkeypatch.setattr(Tokenizer, "encode", encode_together)
    parted = await reader.read(inputs, Encoding())
    assert [row.ids.tolist() for row in parted.rows] == [row.ids.tolist() for row in whole.rows]
    assert len(parted.items) == len(inputs)


async def test_of_a_large_list_the_first_text_that_is_refused_is_named(make_service, monkeypatch):
    reader = make_service(PuppetEngine()).reader
    monkeypatch.setattr("app.inputs._LARGE", 300)
    inputs = ["a b"] * 400
    inputs[250] = inputs[390] = "a b c d e f"
    with pytest.raises(InvalidInput, match=r"text 250 has 8 tokens"):
        await reader.read(inputs, Encoding(on_overflow="error"))


async def test_late_chunks_need_a_checkpoint_without_projections(make_service, config):
    projected = replace(config, dense=(DenseConfig("2_Dense", 2, 3, True, "Tanh"),))
    with pytest.raises(WrongKind, match="late: false"):
        await embed_chunks(make_service(PuppetEngine(), projected), ["a"], Chunking(chunk_tokens=2, late=True))

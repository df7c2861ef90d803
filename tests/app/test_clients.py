"""The clients that people have, over real sockets, against the vectors of sentence-transformers."""

import base64
import json
from pathlib import Path

import httpx
import huggingface_hub
import langchain_huggingface
import langchain_openai
import numpy as np
import openai
import pytest
import tiktoken
from huggingface_hub.errors import HfHubHTTPError
from servers import running_server

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = json.loads((GOLDEN / "texts.json").read_text())
VECTORS = np.load(GOLDEN / "vectors.npy")
NO_BREAKS = [n for n, text in enumerate(TEXTS) if "\n" not in text]  # LangChain's Hugging Face client makes them spaces
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def assert_golden(rows, wanted=VECTORS):
    np.testing.assert_allclose(np.array(rows), wanted, rtol=0, atol=2e-6)


@pytest.fixture
def hub_client(monkeypatch):
    """huggingface_hub, as it is outside of tests: the suite forbids it every network, this machine's included."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return huggingface_hub


@pytest.fixture(scope="module", params=["/v1", ""])
def client(server, request):
    with openai.OpenAI(base_url=server.url + request.param, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("encoding_format", [openai.omit, "float", "base64"])
def test_openai_embeddings(client, encoding_format):
    answer = client.embeddings.create(model="any", input=TEXTS, encoding_format=encoding_format)
    rows = [item.embedding for item in answer.data]
    if encoding_format == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert_golden(rows)
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    assert answer.model == MINILM


@pytest.mark.parametrize("encoding_format", [openai.omit, "float"])
def test_openai_reads_errors_in_their_places_and_keeps_details(client, encoding_format):
    query = {"partial": True, "details": True}
    answer = client.embeddings.create(
        model="any", input=["hello", "", TEXTS[1]], extra_query=query, encoding_format=encoding_format
    )
    good, bad, last = answer.data
    assert_golden([good.embedding, last.embedding], VECTORS[:2])
    assert (bad.object, bad.index, bad.embedding) == ("error", 1, [])
    problem = {"message": "an input is empty; wanted a text", "type": "invalid_request_error", "param": None, "code": None}
    assert bad.model_extra == {"error": problem}
    details = answer.model_extra["details"]
    assert details[:2] == [{"tokens": 3, "truncated": False, "pieces": 1}, {"tokens": 0, "truncated": False, "pieces": 0}]
    assert sum(detail["tokens"] for detail in details) == answer.usage.prompt_tokens


async def test_openai_embeddings_async(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = await client.embeddings.create(model="any", input="hello", dimensions=32)
    cut = VECTORS[0, :32] / np.linalg.norm(VECTORS[0, :32])
    assert_golden(answer.data[0].embedding, cut)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)


def test_openai_output_dtype_is_an_extra_field(client):
    answer = client.embeddings.create(
        model="any", input=TEXTS[0], encoding_format="float", extra_body={"output_dtype": "ubinary"}
    )
    assert answer.data[0].embedding == np.packbits(VECTORS[0] > 0).tolist()


def test_openai_models(client):
    (listed,) = client.models.list()
    assert client.models.retrieve(MINILM) == listed
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.models.retrieve("nobody/nothing")


@pytest.mark.parametrize(("bad", "message"), [("", "empty"), ([], "empty"), ([[15339]], "check_embedding_ctx_length=False")])
def test_openai_reads_what_is_wrong(client, bad, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.embeddings.create(model="any", input=bad)
    assert refused.value.type == "invalid_request_error"


def test_openai_sends_the_key(make_checkpoint):
    with running_server(model=make_checkpoint(), api_key="sesame") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame")
        assert len(client.embeddings.create(model="any", input="abc").data[0].embedding) == 32
        with pytest.raises(openai.AuthenticationError, match="Bearer KEY") as refused:
            client.with_options(api_key="wrong").embeddings.create(model="any", input="abc")
        assert refused.value.code == "invalid_api_key"


def test_huggingface_hub_feature_extraction(server, hub_client):
    client = hub_client.InferenceClient(model=f"{server.url}/embed")
    assert_golden(client.feature_extraction(TEXTS[1]), VECTORS[1:2])
    assert_golden(client.feature_extraction(TEXTS, normalize=True, truncate=True, truncation_direction="right"))
    with pytest.raises(HfHubHTTPError, match="422"):
        client.feature_extraction(TEXTS[1], prompt_name="query")


async def test_huggingface_hub_feature_extraction_async(server, hub_client):
    async with hub_client.AsyncInferenceClient(model=f"{server.url}/embed") as client:
        assert_golden(await client.feature_extraction(TEXTS))


def test_huggingface_hub_sentence_similarity(server, hub_client):
    client = hub_client.InferenceClient(model=f"{server.url}/similarity")
    scores = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    np.testing.assert_allclose(scores, VECTORS[1:] @ VECTORS[0], rtol=0, atol=2e-6)


def langchain(server, **options):
    return langchain_openai.OpenAIEmbeddings(model=MINILM, base_url=f"{server.url}/v1", api_key="none", **options)


async def test_langchain_openai(server):
    async with httpx.AsyncClient() as http:
        embeddings = langchain(server, check_embedding_ctx_length=False, http_async_client=http)
        assert_golden(embeddings.embed_documents(TEXTS))
        assert_golden(embeddings.embed_query(TEXTS[0]), VECTORS[0])
        assert_golden(await embeddings.aembed_documents(TEXTS))


def test_langchain_openai_is_told_that_its_token_ids_are_foreign(server, monkeypatch):
    """tiktoken's vocabularies are on a server of OpenAI; here every byte is a token."""
    ranks = {bytes([n]): n for n in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: encoding)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        langchain(server).embed_documents(["hello world"])


async def test_langchain_huggingface(server, hub_client):
    embeddings = langchain_huggingface.HuggingFaceEndpointEmbeddings(model=MINILM)
    embeddings.client = hub_client.InferenceClient(model=f"{server.url}/embed")
    texts, wanted = [TEXTS[n] for n in NO_BREAKS], VECTORS[NO_BREAKS]
    assert_golden(embeddings.embed_documents(texts), wanted)
    assert_golden(embeddings.embed_query(TEXTS[0]), VECTORS[0])
    async with hub_client.AsyncInferenceClient(model=f"{server.url}/embed") as embeddings.async_client:
        assert_golden(await embeddings.aembed_documents(texts), wanted)

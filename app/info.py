"""What is told of a server, by GET /info, `bertd info` and the lines at its start."""

from pydantic import BaseModel, Field

from app.service import VERSION, Service
from app.settings import OnOverflow
from model.cgroup import memory_limit
from model.config import Kind, ModelConfig, PoolingChoice, PoolingMode


class Pooled(BaseModel):
    pooling: PoolingChoice = Field(description="that of a request that names none")


class Labelled(BaseModel):
    id2label: dict[str, str] = Field(description="the name of each label by its number")
    label2id: dict[str, int] = Field(description="the number of each label by its name")


class EmbeddingModel(BaseModel):
    embedding: Pooled = Field(description="the model gives vectors")


class ClassifierModel(BaseModel):
    classifier: Labelled = Field(description="the model gives a score for each label")


class RerankerModel(BaseModel):
    reranker: Labelled = Field(description="the model gives one score for each pair")


class Info(BaseModel):
    """What is served and what was decided at start: the keys of text-embeddings-inference (TEI), then ours."""

    model_id: str = Field(description="BERTD_MODEL: a folder, or a name")
    model_sha: str = Field(description="SHA-256 of the weights")
    model_dtype: str = Field(description="the same as dtype")
    served_model_name: str = Field(description="name of the model in answers")
    model_type: EmbeddingModel | ClassifierModel | RerankerModel = Field(description="what the model gives, in the words of TEI")
    max_concurrent_requests: int = Field(description="texts of max_input_length that fit the queue")
    max_input_length: int = Field(description="tokens of one text that the model takes, special ones included")
    max_batch_tokens: int = Field(description="tokens of one batch")
    max_batch_requests: int | None = Field(description="always null: what bounds a batch is its tokens")
    max_client_batch_size: int = Field(description="texts of one request")
    auto_truncate: bool = Field(description="whether a text that is too long is cut, where a request does not say")
    tokenization_workers: int = Field(description="threads of the tokenizer, half of them for large texts and lists")
    version: str = Field(description="that of bertd")
    kind: Kind = Field(description="what the checkpoint is; the routes that answer depend on it")
    dimension: int = Field(description="how many numbers a text becomes")
    poolings: list[PoolingMode] = Field(description="those that a request may name")
    prompts: list[str] = Field(description="names of the checkpoint's prompts")
    device: str = Field(description="where the encoder runs: cpu, or cuda:N")
    dtype: str = Field(description="arithmetic of the encoder")
    kernel: str = Field(description="what computes attention and linear layers")
    threads: int = Field(description="threads of the encoder")
    lanes: int = Field(description="batches at once")
    on_overflow: OnOverflow = Field(description="what becomes of a text that is too long, where a request does not say")
    max_request_tokens: int = Field(description="tokens of one request, after cutting and splitting")
    max_queue_tokens: int = Field(description="tokens that may wait")
    max_body_bytes: int = Field(description="bytes in the body of one request")
    tokens_per_second: int = Field(description="rate of the encoder, measured at start")
    memory_limit: int | None = Field(description="bytes that the container may use; null without a limit")


def info_of(service: Service) -> Info:
    facts, settings, config = service.facts, service.settings, service.config
    queue_tokens = service.scheduler.max_queue_tokens
    return Info(
        model_id=settings.model,
        model_sha=facts["sha256"],
        model_dtype=facts["dtype"],
        served_model_name=service.name,
        model_type=_model_type(config),
        max_concurrent_requests=max(1, queue_tokens // config.max_tokens),
        max_input_length=config.max_tokens,
        max_batch_tokens=facts["max_batch_tokens"],
        max_batch_requests=None,
        max_client_batch_size=settings.max_client_batch_size,
        auto_truncate=settings.on_overflow == "truncate",
        tokenization_workers=facts["tokenization_workers"],
        version=VERSION,
        kind=config.kind,
        dimension=config.dimension,
        poolings=facts["poolings"],
        prompts=sorted(config.prompts),
        device=facts["device"],
        dtype=facts["dtype"],
        kernel=facts["kernel"],
        threads=facts["threads"],
        lanes=facts["lanes"],
        on_overflow=settings.on_overflow,
        max_request_tokens=settings.max_request_tokens,
        max_queue_tokens=queue_tokens,
        max_body_bytes=settings.max_body_bytes,
        tokens_per_second=round(facts["tokens_per_second"]),
        memory_limit=memory_limit(),
    )


def _model_type(config: ModelConfig) -> EmbeddingModel | ClassifierModel | RerankerModel:
    if config.kind in ("embedder", "sparse"):
        return EmbeddingModel(embedding=Pooled(pooling="splade" if config.kind == "sparse" else config.pooling))
    named = {str(place): label for place, label in enumerate(config.labels)}
    labels = Labelled(id2label=named, label2id={label: int(place) for place, label in named.items()})
    return ClassifierModel(classifier=labels) if config.kind == "classifier" else RerankerModel(reranker=labels)

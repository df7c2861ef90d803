"""What clients of text-embeddings-inference send, and what they are answered."""

from pydantic import BaseModel, Field, StrictBool, StrictStr

from app.api.fields import Common, Finished, Ids, Inputs, Many, Output, Overflow, PerText, Pooled, Raw, Side, examples
from app.api.responses import ErrorBody, TextDetail
from app.scoring import Scoring
from model.vectors import Metric

Vector = list[float]
Vectors = list[Vector | ErrorBody] | list[str | ErrorBody]


class EmbedRequest(Finished, Output):
    model_config = examples({"inputs": ["hello", "world"], "dimensions": 16}, {"inputs": "hello", "encoding_format": "base64"})

    inputs: Inputs


class EmbedAllRequest(Common, Output):
    model_config = examples(
        {"inputs": "river bank", "return_tokens": True}, {"inputs": ["a", "river bank"], "encoding_format": "base64"}
    )

    inputs: Inputs
    return_tokens: StrictBool | None = Field(None, description="name the token that each row stands for")


class OneToMany(BaseModel):
    source_sentence: StrictStr
    sentences: Many[StrictStr]


class ManyToMany(BaseModel):
    a: Many[StrictStr]
    b: Many[StrictStr]


class SimilarityParameters(Pooled):
    metric: Metric | None = Field(
        None, description="cosine (default), dot or euclidean; dot and euclidean compare vectors as pooled"
    )


class SimilarityRequest(BaseModel):
    model_config = examples(
        {"inputs": {"source_sentence": "a fruit", "sentences": ["apple", "car"]}},
        {"inputs": {"a": ["a fruit"], "b": ["apple", "car"]}, "parameters": {"metric": "dot"}},
    )

    inputs: OneToMany | ManyToMany
    parameters: SimilarityParameters | None = None


class EmbedSparseRequest(Common):
    model_config = examples({"inputs": ["hello", "world"]})

    inputs: Inputs


class Weight(BaseModel):
    """A token of the vocabulary that a text stands for."""

    index: int
    value: float


class SparseEmbeddings(BaseModel):
    """The answer of /embed_sparse with `details`."""

    embeddings: list[list[Weight] | ErrorBody]
    details: list[TextDetail]


class Scored(Overflow, Raw):
    """Options of routes that score texts."""

    truncation_direction: Side | None = Field(None, description="the side on which a long text is cut")

    def scoring(self, query: PerText) -> Scoring:
        side = self.truncation_direction or "right"
        return Scoring(on_overflow=self.habit, side=side, partial=query.partial, raw=self.raw)


class PredictRequest(Scored):
    model_config = examples({"inputs": [["a good film"], ["a premise", "a hypothesis"]]}, {"inputs": "a good film"})

    inputs: StrictStr | Many[StrictStr] | Many[Many[StrictStr]] = Field(
        description="a text, a list of one text, a list of two: one pair, or a list of such lists"
    )


class Prediction(BaseModel):
    score: float
    label: str


Predictions = list[Prediction] | list[list[Prediction] | ErrorBody]


class PredictionsWithDetails(BaseModel):
    """The answer of /predict with `details`."""

    predictions: Predictions
    details: list[TextDetail]


class RerankRequest(Scored):
    model_config = examples({"query": "a fruit", "texts": ["apple", "car"], "return_text": True})

    query: StrictStr
    texts: Many[StrictStr]
    return_text: StrictBool | None = None


class Rank(BaseModel):
    index: int
    text: str | None = None
    score: float


class Unranked(ErrorBody):
    """A text that failed, with `partial`: after those that have a score."""

    index: int


class Ranks(BaseModel):
    """The answer of /rerank with `details`."""

    ranks: list[Rank | Unranked]
    details: list[TextDetail]


class TokenizeRequest(BaseModel):
    model_config = examples({"inputs": "hello world"})

    inputs: StrictStr | Many[StrictStr]
    add_special_tokens: StrictBool | None = None
    prompt_name: StrictStr | None = None


class DecodeRequest(BaseModel):
    model_config = examples({"ids": [5, 6]}, {"ids": [[5], [6]]})

    ids: Ids | Many[Ids]
    skip_special_tokens: StrictBool | None = None


class SimpleToken(BaseModel):
    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Embeddings(BaseModel):
    """The answer of /embed with `details`."""

    embeddings: list[Vector | str | ErrorBody]
    details: list[TextDetail]


class NamedRow(BaseModel):
    text: str
    start: int | None
    end: int | None


class TokenMatrix(BaseModel):
    """A matrix with what was asked for beside it."""

    tokens: list[NamedRow] | None = None
    embeddings: list[Vector] | str
    shape: tuple[int, int] | None = None


class Matrices(BaseModel):
    """The answer of /embed_all with `details`."""

    embeddings: list[list[Vector] | TokenMatrix | ErrorBody]
    details: list[TextDetail]


Scores = list[float | ErrorBody] | list[list[float | ErrorBody] | ErrorBody]


class ScoresWithDetails(BaseModel):
    """The answer of /similarity with `details`: those of the source or of `a` come first."""

    scores: Scores
    details: list[TextDetail]

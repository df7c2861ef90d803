"""What a checkpoint folder says about itself: config.json and the files of sentence-transformers beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from model.errors import CheckpointError, UnsupportedModel

Activation = Literal["gelu", "gelu_new", "relu", "silu"]
PoolingMode = Literal["cls", "pooler", "mean", "max", "last"]
PoolingChoice = PoolingMode | Literal["splade"]
Task = PoolingMode | Literal["scores", "sparse"]
"""What an encoder makes of a text: a vector by a pooling, a score for each label, a weight for each token of the vocabulary."""
Kind = Literal["embedder", "classifier", "reranker", "sparse"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class BertConfig:
    """The shape of the encoder, under the names of config.json."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Activation = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}; correct the file"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UnsupportedModel(
                f"config.json: hidden_act {self.hidden_act!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, config: Json) -> "BertConfig":
        """Read config.json; refuse by name what the architecture here does not do."""
        model_type = config.get("model_type")
        if model_type != "bert":
            raise UnsupportedModel(f"config.json: model_type {model_type!r} is not supported; supported is 'bert'")
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise UnsupportedModel(
                f"config.json: position_embedding_type {positions!r} is not supported; supported is 'absolute'"
            )
        if config.get("is_decoder"):
            raise UnsupportedModel("config.json: is_decoder is true; supported are encoders")
        sizes: dict[str, Any] = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for name, value in sizes.items():
            wanted: Any = str if name == "hidden_act" else (int, float) if name == "layer_norm_eps" else int
            if not isinstance(value, wanted) or isinstance(value, bool) or (wanted is int and value < 1):
                raise CheckpointError(f"config.json: {name} is {value!r}; correct the file")
        return cls(**sizes)


@dataclass(frozen=True)
class DenseConfig:
    """A sentence-transformers Dense module: a linear layer on the pooled vector."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a checkpoint folder says, with BERT's own habits where it is silent."""

    bert: BertConfig
    kind: Kind = "embedder"
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    pooling: PoolingMode = "cls"
    dense: tuple[DenseConfig, ...] = ()
    normalize: bool = False
    max_tokens: int = 512
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    architecture: str = "BertModel"
    tie_word_embeddings: bool = True

    @property
    def dimension(self) -> int:
        """How many numbers a text becomes: the length of its vector, its labels, or the vocabulary."""
        if self.kind == "sparse":
            return self.bert.vocab_size
        return len(self.labels) or (self.dense[-1].out_features if self.dense else self.bert.hidden_size)

    @property
    def task(self) -> Task:
        """What is made of a text where nothing else is asked for."""
        if self.kind == "embedder":
            return self.pooling
        return "sparse" if self.kind == "sparse" else "scores"

    @classmethod
    def from_folder(cls, folder: Path, pooling: PoolingChoice | None = None) -> "ModelConfig":
        """Read a checkpoint folder, plain or in the layout of sentence-transformers; `pooling` outweighs an embedder's own.

        Raises CheckpointError for files that are missing or broken, UnsupportedModel for what is not run here.
        """
        transformer, modules = _modules(folder)
        config = read_json(transformer / "config.json", required=True)
        bert = BertConfig.from_json(config)
        limits = read_json(transformer / "sentence_bert_config.json")
        _check_options(limits)
        prompts = read_json(folder / "config_sentence_transformers.json")
        architecture = str((config.get("architectures") or ["BertModel"])[0])
        kind = _kind(architecture, config, modules, pooling)
        return cls(
            bert=bert,
            kind=kind,
            labels=_labels(config) if kind in ("classifier", "reranker") else (),
            problem_type=_problem_type(config),
            pooling=pooling if pooling and pooling != "splade" else _pooling(modules),
            dense=_projections(bert.hidden_size, [(path, settings) for kind, path, settings in modules if kind == "Dense"]),
            normalize=any(kind == "Normalize" for kind, _, _ in modules),
            max_tokens=_max_tokens(bert, limits, read_json(transformer / "tokenizer_config.json")),
            lower_case=bool(limits.get("do_lower_case")),
            prompts=prompts.get("prompts") or {},
            default_prompt=prompts.get("default_prompt_name"),
            architecture=architecture,
            tie_word_embeddings=config.get("tie_word_embeddings") is not False,
        )


def transformer_folder(folder: Path) -> Path:
    """Where config.json, the tokenizer and the weights lie: `folder`, or 0_Transformer in old layouts."""
    return _modules(folder)[0]


# Files of weights, the preferred first; an index names the shards that lie beside it.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder; CheckpointError where there are none or a shard is missing."""
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights; wanted one of {', '.join(_WEIGHTS)}")
    return _shards(found) if found.suffix == ".json" else [found]


def checkpoint_files(folder: Path) -> list[Path]:
    """config.json and the weights of a checkpoint: what decides its vectors. Raises as `weight_files`."""
    transformer = transformer_folder(folder)
    return [transformer / "config.json", *weight_files(transformer)]


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} holds no weight_map; restore the file")
    names = sorted(set(map(str, weight_map.values())))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}; restore them")
    return [index.parent / name for name in names]


def read_json(path: Path, required: bool = False) -> Json:
    """The object in a JSON file; an empty one where the file is missing and not required."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} is missing: {path.parent} is not a checkpoint folder; name one that holds it")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore the file") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, wanted an object; restore the file")
    return content


_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_SPARSE_MODULES = ("Transformer", "SpladePooling")
_MODULE_NAMES = {"MLMTransformer": "Transformer"}  # in the first SPLADE folders of sentence-transformers


def _modules(folder: Path) -> tuple[Path, list[tuple[str, str, Json]]]:
    """modules.json as the transformer's folder and (kind, folder, settings) of what follows it, in order."""
    path = folder / "modules.json"
    if not path.is_file():
        return folder, []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [(_module_kind(entry["type"]), str(entry.get("path", ""))) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a list of modules ({error!r}); restore the file") from None
    outside = [sub for _, sub in found if Path(sub).is_absolute() or ".." in Path(sub).parts]
    if outside:
        raise CheckpointError(f"{path} names folders outside {folder}: {', '.join(outside)}; restore the file")
    kinds = [kind for kind, _ in found]
    known = _SPARSE_MODULES if "SpladePooling" in kinds else _MODULES
    for kind in kinds:
        if kind not in known:
            raise UnsupportedModel(f"{path}: module {kind} is not supported; supported are {', '.join(known)}")
    repeated = any(kinds.count(kind) > 1 for kind in kinds if kind != "Dense")
    if kinds != sorted(kinds, key=known.index) or kinds[:1] != ["Transformer"] or repeated:
        raise UnsupportedModel(f"{path}: the order {' -> '.join(kinds)} is not supported; wanted {' -> '.join(known)}")
    rest = [(kind, sub, read_json(folder / sub / "config.json", required=kind != "Normalize")) for kind, sub in found[1:]]
    for _, sub, settings in rest:
        if settings.get("module_input_name", "sentence_embedding") != "sentence_embedding" or settings.get("use_residual"):
            raise UnsupportedModel(
                f"{folder / sub / 'config.json'}: a module on token embeddings or with a residual is not supported; "
                "wanted one on the sentence embedding"
            )
    return folder / found[0][1], rest


def _module_kind(name: object) -> str:
    """The class of a module without the path to it, which differs between versions."""
    stem = str(name).rsplit(".", 1)[-1]
    return _MODULE_NAMES.get(stem, stem)


def _kind(architecture: str, config: Json, modules: list[tuple[str, str, Json]], pooling: PoolingChoice | None) -> Kind:
    """What a checkpoint is: as modules.json says or, where that names no pooling, as the architecture does.

    A masked language model is an embedder, unless SPLADE is asked for: people pool bert-base-uncased and its like.
    """
    settings = {kind: settings for kind, _, settings in modules}
    kind: Kind = "embedder"
    if "SpladePooling" in settings or (pooling == "splade" and architecture == "BertForMaskedLM" and not settings):
        _check_splade(settings.get("SpladePooling", {}))
        kind = "sparse"
    elif architecture == "BertForSequenceClassification" and "Pooling" not in settings:
        kind = "reranker" if len(_labels(config)) == 1 else "classifier"
    if pooling is not None and kind != ("sparse" if pooling == "splade" else "embedder"):
        raise UnsupportedModel(
            f"pooling {pooling} was asked for and the checkpoint is {with_article(kind)} ({architecture}); ask for none"
        )
    return kind


def with_article(kind: Kind) -> str:
    """A kind with its article, for messages."""
    return {"embedder": "an embedder", "sparse": "a sparse embedder"}.get(kind, f"a {kind}")


def _check_splade(settings: Json) -> None:
    """Refuse the variants of SPLADE that are not run here."""
    for name, wanted in {"pooling_strategy": "max", "activation_function": "relu"}.items():
        found = settings.get(name, wanted)
        if found != wanted:
            raise UnsupportedModel(f"SpladePooling with {name} {found!r} is not supported; supported is {wanted!r}")


def _labels(config: Json) -> tuple[str, ...]:
    """The names of a classifier's outputs, in order; without id2label as transformers makes them up."""
    stated = config.get("id2label")
    if stated is None:
        count = config.get("num_labels", 2)
        stated = {str(place): f"LABEL_{place}" for place in range(count if type(count) is int else 0)}
    places = [str(place) for place in range(len(stated))] if isinstance(stated, dict) else []
    if not places or stated.keys() != set(places):
        raise CheckpointError("config.json: id2label or num_labels is not labels numbered from 0; correct the file")
    return tuple(str(stated[place]) for place in places)


def _problem_type(config: Json) -> ProblemType | None:
    stated = config.get("problem_type")
    if stated is not None and stated not in PROBLEM_TYPES:
        raise CheckpointError(
            f"config.json: problem_type is {stated!r}, wanted one of {', '.join(PROBLEM_TYPES)}; correct the file"
        )
    found: ProblemType | None = stated
    return found


_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_POOLING_NAMES: Mapping[str, PoolingMode] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "last": "last",
    "lasttoken": "last",
}


def _pooling(modules: list[tuple[str, str, Json]]) -> PoolingMode:
    settings = next((settings for kind, _, settings in modules if kind == "Pooling"), None)
    if settings is None:
        return "cls" if not modules else "mean"
    named = settings.get("pooling_mode")
    modes = [mode for key, mode in _LEGACY_POOLING.items() if settings.get(key)]
    if named is not None:
        modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    elif not modes:
        modes = ["mean"]  # as sentence-transformers
    if len(modes) != 1 or modes[0] not in _POOLING_NAMES:
        raise UnsupportedModel(
            f"pooling {' + '.join(modes) or 'of no kind'} is not supported; wanted one of cls, mean, max, last"
        )
    if settings.get("include_prompt") is False:
        raise UnsupportedModel("pooling with include_prompt false is not supported; wanted true")
    return _POOLING_NAMES[modes[0]]


def _projections(width: int, modules: list[tuple[str, Json]]) -> tuple[DenseConfig, ...]:
    """The Dense modules; each takes what the one before it gives, the first the hidden size."""
    dense = tuple(_dense(path, settings) for path, settings in modules)
    for one in dense:
        if one.in_features != width:
            raise CheckpointError(f"{one.folder}/config.json: in_features is {one.in_features}, wanted {width}; correct the file")
        width = one.out_features
    return dense


def _dense(path: str, settings: Json) -> DenseConfig:
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    for name in ("in_features", "out_features"):
        if type(settings.get(name)) is not int or settings[name] < 1:
            raise CheckpointError(f"{path}/config.json: {name} is {settings.get(name)!r}, wanted a number; restore the file")
    return DenseConfig(path, settings["in_features"], settings["out_features"], settings.get("bias", True), activation)


# What sentence_bert_config.json hands to transformers for the model, its configuration and its tokenizer, the older name first.
_MODEL_OPTIONS = ("model_args", "model_kwargs", "config_args", "config_kwargs")
_TOKENIZER_OPTIONS = ("tokenizer_args", "processor_kwargs")

# Those that give no other numbers here: where files are fetched from, in which dtype and by which kernels a model runs, padding.
_WITHOUT_EFFECT = frozenset(
    (
        *("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code"),
        *("torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "use_safetensors"),
        *("add_pooling_layer", "use_cache", "use_fast", "padding", "padding_side", "pad_to_multiple_of", "return_tensors"),
    )
)


def _check_options(limits: Json) -> None:
    """Refuse by name what sentence-transformers would do otherwise for an option in sentence_bert_config.json."""
    calls = _object(limits, "processing_kwargs")
    found = {
        **{name: _object(limits, name) for name in (*_MODEL_OPTIONS, *_TOKENIZER_OPTIONS)},
        **{f"processing_kwargs.{name}": _object(calls, name) for name in ("common", "text")},  # others are no text's
    }
    for name, options in found.items():
        known = _WITHOUT_EFFECT | ({"model_max_length"} if name in _TOKENIZER_OPTIONS else set())
        for option, value in options.items():
            if option not in known:
                raise UnsupportedModel(
                    f"sentence_bert_config.json: {name} with {option} {value!r} is not supported; "
                    "take it out, or save the model again with it applied"
                )


def _object(settings: Json, name: str) -> Json:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"sentence_bert_config.json: {name} is {value!r}, wanted an object; correct the file")
    return value


def _max_tokens(bert: BertConfig, limits: Json, tokenizer: Json) -> int:
    """The model's own habit: max_seq_length, else the tokenizer's limit, never more than there are positions.

    Where sentence_bert_config.json hands the tokenizer a limit, that is its own.
    """
    handed: Json = next((limits[name] for name in _TOKENIZER_OPTIONS if limits.get(name)), {})
    own = tokenizer.get("model_max_length", tokenizer.get("max_len"))  # max_len: its name before 2020
    stated = handed.get("model_max_length") or limits.get("max_seq_length") or own or bert.max_position_embeddings
    if not isinstance(stated, int | float) or not stated >= 1:
        raise CheckpointError(f"max_seq_length or model_max_length is {stated!r}, wanted a number of tokens; correct the file")
    return int(min(stated, bert.max_position_embeddings))

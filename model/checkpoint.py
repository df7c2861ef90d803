"""Weights from a checkpoint folder into our modules: one table of names, strict, no code from the files is ever run."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model.config import Kind, weight_files
from model.errors import CheckpointError

Tensors = dict[str, Tensor]

# Names here -> names in public checkpoints, {} for a layer's number. Queries, keys and values are one layer here.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "bert.embeddings.token": ("embeddings.word_embeddings",),
    "bert.embeddings.segment": ("embeddings.token_type_embeddings",),
    "bert.embeddings.position": ("embeddings.position_embeddings",),
    "bert.embeddings.norm": ("embeddings.LayerNorm",),
    "bert.layers.{}.attention.qkv": (
        "encoder.layer.{}.attention.self.query",
        "encoder.layer.{}.attention.self.key",
        "encoder.layer.{}.attention.self.value",
    ),
    "bert.layers.{}.attention.output": ("encoder.layer.{}.attention.output.dense",),
    "bert.layers.{}.attention_norm": ("encoder.layer.{}.attention.output.LayerNorm",),
    "bert.layers.{}.feed_forward.up": ("encoder.layer.{}.intermediate.dense",),
    "bert.layers.{}.feed_forward.down": ("encoder.layer.{}.output.dense",),
    "bert.layers.{}.feed_forward_norm": ("encoder.layer.{}.output.LayerNorm",),
    "classifier.pooler.dense": ("pooler.dense",),
    "classifier.linear": ("classifier",),
    "masked_lm.dense": ("cls.predictions.transform.dense",),
    "masked_lm.norm": ("cls.predictions.transform.LayerNorm",),
    "masked_lm.decoder": ("cls.predictions.decoder",),
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PREFIX = re.compile(r"^(bert\.|model\.)+")
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # LayerNorm in files converted from TensorFlow

_BUFFERS = re.compile(r"^embeddings\.(position_ids|token_type_ids)$")  # recomputed here
_HEADS = re.compile(r"^(pooler|cls|classifier|qa_outputs)\.")
# The heads that a checkpoint of each kind needs; others that lie in the file are left aside.
_OWN_HEADS: Mapping[Kind, tuple[str, ...]] = {
    "embedder": ("pooler.",),
    "classifier": ("pooler.", "classifier."),
    "reranker": ("pooler.", "classifier."),
    "sparse": ("cls.predictions.",),
}


def load_bert(folder: Path, kind: Kind, tied: bool) -> Tensors:
    """The weights of a transformer's folder in float32, under transformers' names, with the head of its kind.

    `tied`: a decoder that the file lacks is the table of token embeddings. Raises CheckpointError for files that are
    missing or broken.
    """
    named: Tensors = {}
    for name, tensor in read_tensors(folder).items():
        plain = _plain_name(name)
        if plain in named:
            raise CheckpointError(f"{folder} holds {plain} twice, once as {name}; restore its files")
        if _BUFFERS.match(plain) or (_HEADS.match(plain) and not plain.startswith(_OWN_HEADS[kind])):
            continue
        if not tensor.is_floating_point():
            raise CheckpointError(f"{folder}: {name} is {tensor.dtype}, wanted floating point; serve an unquantized checkpoint")
        named[plain] = tensor.float()
    return _with_decoder(named, tied) if kind == "sparse" else named


def _with_decoder(named: Tensors, tied: bool) -> Tensors:
    """The decoder as a layer of its own: files leave out what it shares, and know its bias by two names."""
    words, bias = "embeddings.word_embeddings.weight", "cls.predictions.bias"
    decoder = {}
    if tied and words in named:
        decoder["cls.predictions.decoder.weight"] = named[words]
    if bias in named:
        decoder["cls.predictions.decoder.bias"] = named.pop(bias)
    return decoder | named


def load_linear(folder: Path) -> Tensors:
    """The weights of a sentence-transformers Dense module: linear.weight and linear.bias."""
    return {name: tensor.float() for name, tensor in read_tensors(folder).items()}


def assign(module: nn.Module, tensors: Tensors, source: Path) -> None:
    """Hand `tensors` to a module; CheckpointError names every tensor that is missing, left over or of a wrong shape."""
    sources = {ours: _their_names(ours) for ours in module.state_dict()}
    wanted = _shapes(module, sources)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing {name} {wanted[name]}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected {name} {found[name]}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {found[name]}, wanted {wanted[name]}" for name in wanted.keys() & found.keys() if found[name] != wanted[name]
    ]
    if problems:
        raise CheckpointError(f"{source} does not match its config.json: {'; '.join(sorted(problems))}; restore its files")
    parts = {ours: [tensors[name] for name in names] for ours, names in sources.items()}
    joined = {ours: torch.cat(some) if len(some) > 1 else some[0] for ours, some in parts.items()}
    module.load_state_dict(joined, assign=True)


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a folder's weight files, under the names in them."""
    tensors: Tensors = {}
    for path in weight_files(folder):
        tensors |= _read_file(path)
    return tensors


def _read_file(path: Path) -> Tensors:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of broken bytes the readers raise whatever they stumble over
        raise CheckpointError(f"{path} can't be read ({_first_line(error)}); restore the file") from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no table of tensors; restore the file")
    return dict(content)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200]


def _plain_name(name: str) -> str:
    """A name in a file without its prefix, LayerNorm's old names made new."""
    stem, dot, leaf = _PREFIX.sub("", name).rpartition(".")
    return f"{stem}{dot}{_OLD_NAMES.get(leaf, leaf)}"


def _their_names(ours: str) -> list[str]:
    """The tensors of a file that make up one of ours; a name that the table lacks is the same there."""
    stem, _, leaf = ours.rpartition(".")
    pattern = _NUMBER.sub("{}", stem)
    return [f"{name.format(*_NUMBER.findall(stem))}.{leaf}" for name in _NAMES.get(pattern, (pattern,))]


def _shapes(module: nn.Module, sources: Mapping[str, list[str]]) -> dict[str, list[int]]:
    """What a file must hold: the shape of each tensor, a joined one in equal parts."""
    state = module.state_dict()
    return {
        name: [state[ours].shape[0] // len(names), *state[ours].shape[1:]] for ours, names in sources.items() for name in names
    }

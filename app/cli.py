"""The command line: serve, info, embed, fit, health. Each calls the same functions as the server."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app import logs
from app.child import ENDING, Child, start_engine
from app.cores import TOKENIZERS
from app.memory import keep_memory_small
from app.settings import Settings, SettingsError, flag
from app.texts import WRITERS, TextsError, check_target, read_texts, write_vectors

_KEEP_ALIVE = 75  # seconds: longer than proxies and pools keep a connection, so that it is never closed under a request
_UNLIMITED = 2**40
_NO_TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}  # read by libraries, in the engine's process too
_NO_THREADS = ("TOKENIZERS_PARALLELISM", "false")  # of the tokenizer's library: ours are enough, and wake nobody for a list
_CHUNK = 512  # texts of a command in one submission
_HEALTH_SECONDS = 3.0  # that `bertd health` waits; below what Docker and Kubernetes give a probe
# Nobody else waits for the encoder of a command.
_ALONE = {
    **dict.fromkeys(("max_queue_tokens", "max_request_tokens"), _UNLIMITED),
    "max_client_batch_size": _CHUNK,
}


class Failure(Exception):
    """A command that can't go on; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code. Expected failures end in one line on standard error and code 1."""
    options = vars(_parser().parse_args(arguments))
    command: Callable[..., None] = options.pop("command")
    flags = {name: options.pop(name) for name in Settings.model_fields if name in options}
    for number in ENDING:
        signal.signal(number, _terminate)
    try:
        settings = Settings.read(os.environ, {name: value for name, value in flags.items() if value is not None})
        keep_memory_small(1 + TOKENIZERS)  # before there is a second thread
        logs.set_up(settings.log_level, settings.log_format)
        os.environ.update(_NO_TELEMETRY)
        os.environ.setdefault(*_NO_THREADS)
        command(settings, **options)
    except (SettingsError, Failure) as error:
        print(f"bertd: {error}", file=sys.stderr)
        return 1
    return 0


def _terminate(number: int, frame: object) -> None:
    """End a command that has no event loop yet, or no longer.

    Process 1 of a container has no default for a signal: it would ignore it. Python's own KeyboardInterrupt, where it comes
    while a class is made, has the interpreter end itself by the signal, whoever has caught it.
    """
    raise SystemExit(128 + number)


def serve(settings: Settings) -> None:
    """Serve over HTTP until SIGTERM or SIGINT; every accepted request is answered first."""
    if not os.isatty(0):
        signal.signal(signal.SIGHUP, lambda *_: None)  # until the server listens: what it asks for is being loaded
    sock = _listen(settings)
    with start_engine() as early:
        _serve(settings, sock, early)


def _serve(settings: Settings, sock: socket.socket, early: Child) -> None:
    from app.auth import Keys
    from app.memory import pass_over_what_stays
    from app.record import PROBES
    from app.serving import Serving, running_serving
    from app.traces import open_tracer

    Keys(settings)  # a file without keys is refused before the model is loaded

    def load_the_app() -> None:
        """What only the server needs: half of all that this process loads."""
        for module in ("app.main", "app.server"):
            import_module(module)

    async def run(serving: Serving) -> None:
        import uvicorn

        from app.info import info_of
        from app.main import counted_refusal, create_app
        from app.observe import observed_refusal
        from app.server import Server, connection_limit
        from app.wire import Wire

        limit = connection_limit(settings.max_connections)
        refuse = observed_refusal(serving.metrics, counted_refusal(serving.metrics))
        probes = [f"{settings.url_prefix or ''}{path}" for path in PROBES]
        wire = Wire(settings.header_timeout, settings.body_timeout, limit, probes, refuse)
        config = uvicorn.Config(
            create_app(settings, serving, tracer),
            http=wire.protocol(),
            ws="none",
            lifespan="off",  # the app is sent requests and nothing else
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE,
        )
        banner = _banner(info_of(serving.current.service), sock, settings)
        server = Server(config, serving, settings.grace_period, lambda: print(banner, flush=True))
        pass_over_what_stays()
        with _the_port(settings):  # uvloop would pass over it that another server listens there by now
            sock.listen()
        await server.serve([sock])
        if server.cut_off:
            ended = "by a second signal, or because BERTD_GRACE_PERIOD was over"
            raise Failure(f"stopped before {server.cut_off} requests were answered, {ended}")

    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    if settings.log_inputs:
        logging.getLogger("bertd.request").warning("BERTD_LOG_INPUTS is on: the log will hold texts of clients")
    with open_tracer(settings) as tracer:
        _around(partial(running_serving, early=early, meanwhile=load_the_app), settings, run)


def info(settings: Settings) -> None:
    """Print what would be served and what is decided on this machine, as JSON."""
    from app.info import info_of

    async def run(service: Any) -> None:
        print(json.dumps(info_of(service).model_dump(), indent=2))

    _with_service(settings, run)


def health(settings: Settings) -> None:
    """Ask the server with these settings whether it is well: a probe for containers."""
    import http.client

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=_HEALTH_SECONDS)
    try:
        connection.request("GET", f"{settings.url_prefix or ''}/health")
        answer = connection.getresponse()
        body = answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"no server answers on {host}:{settings.port} ({error}); is it still starting?") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise Failure(f"the server on {host}:{settings.port} is not well: {answer.status} {body}")


def embed(settings: Settings, file: Path, output: Path | None, **options: Any) -> None:
    """Embed a file, one text per line or JSONL, into .npy, .jsonl or .safetensors."""
    target = output or file.with_suffix(".npy")
    if target.suffix not in WRITERS:
        raise Failure(f"{target} ends in {target.suffix or 'nothing'}; wanted one of {', '.join(WRITERS)}")
    try:
        texts = read_texts(file)
        check_target(target, file)

        async def run(service: Any) -> None:
            write_vectors(target, texts, await _embed_all(service, file, texts, options))

        _with_service(settings.model_copy(update=_ALONE), run)
    except TextsError as error:
        raise Failure(str(error)) from None
    print(f"{len(texts)} vectors in {target}", file=sys.stderr)


def fit(settings: Settings, file: Path, text: str, label: str, name: str, balanced: bool, prompt_name: str | None) -> None:
    """Fit a classifier on the labelled texts of a CSV file and keep it for the server."""
    from app.examples import ExamplesError, read_examples

    try:
        examples = read_examples(file, text, label)
    except ExamplesError as error:
        raise Failure(str(error)) from None

    async def run(service: Any) -> None:
        from tqdm import tqdm

        from app.classification import Classification
        from app.embedding import Embedding

        options = Embedding(prompt_name=prompt_name)
        with tqdm(total=len(examples), unit="text", disable=None) as progress:
            outcome = await Classification(service).fit(name, examples, options, balanced, progress.update)
        print(_report(name, outcome))

    _with_service(settings.model_copy(update=_ALONE), run)


def _report(name: str, outcome: Any) -> str:
    """What was fitted and, where examples could be held out, the confusion table and the figures out of it."""
    card, judged = outcome.card, outcome.card.cross_validation
    lines = [f"{name}: {sum(card.counts.values())} examples of {len(card.labels)} labels in {outcome.seconds:.1f} s"]
    if card.truncated:
        lines.append(f"{card.truncated} texts were longer than the model takes and were cut")
    if judged.reason:
        return "\n".join([*lines, f"not judged: {judged.reason}"])
    width = max(map(len, card.labels))
    columns = [str(place) for place in range(1, len(card.labels) + 1)]
    size = max(len(str(outcome.confusion.max())), len(columns[-1])) + 2
    lines.append(f"held-out examples of each label (row) by the label that they were taken for, {judged.folds} folds:")
    lines.append(" " * (width + 5) + "".join(column.rjust(size) for column in columns))
    for column, label, row in zip(columns, card.labels, outcome.confusion, strict=True):
        lines.append(f"{column:>4} {label:<{width}}" + "".join(str(count).rjust(size) for count in row))
    return "\n".join([*lines, f"accuracy {judged.accuracy:.3f}, macro-F1 {judged.macro_f1:.3f}"])


async def _embed_all(service: Any, file: Path, texts: list[str], options: Mapping[str, Any]) -> Any:
    import numpy as np
    from tqdm import tqdm

    from app.embedding import Embedding, embed

    how = Embedding(**options, partial=True)
    chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
    vectors, truncated = [], 0
    with tqdm(total=len(texts), unit="text", disable=None) as progress:
        coming = asyncio.ensure_future(embed(service, chunks[0], how))
        for following in [*chunks[1:], None]:
            current, coming = coming, asyncio.ensure_future(embed(service, following, how)) if following else coming
            rows, stats = await current
            for number, detail in enumerate(stats.details, int(progress.n) + 1):
                if detail.error:
                    raise Failure(f"{file}, line {number}: {detail.error}")
            vectors.append(rows)
            truncated += stats.truncated
            progress.update(len(rows))
    if truncated:
        print(f"bertd: {truncated} texts were longer than {service.config.max_tokens} tokens and were cut", file=sys.stderr)
    return np.concatenate(vectors)


def _with_service(settings: Settings, run: Callable[[Any], Any]) -> None:
    with start_engine() as early:
        from app.service import running_service

        _around(partial(running_service, early=early), settings, run)


def _around(running: Callable[..., Any], settings: Settings, run: Callable[[Any], Any]) -> None:
    """Run a coroutine around what `running` starts, in an event loop of its own."""
    import uvloop

    from app.errors import ServiceError
    from app.metrics import Metrics
    from model.errors import ModelError

    ended_by: list[int] = []

    async def around() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end(number: int) -> None:
            ended_by.append(number)
            task.cancel()

        for number in ENDING:  # what a handler of Python's raises, a callback of the loop may swallow
            loop.add_signal_handler(number, end, number)
        async with running(settings, Metrics()) as started:
            await run(started)

    try:
        uvloop.run(around())
    except asyncio.CancelledError:
        raise SystemExit(128 + ended_by[0]) from None
    except (ModelError, ServiceError) as error:
        raise Failure(str(error)) from None


def _listen(settings: Settings) -> socket.socket:
    """The port, taken before anything slow starts; nobody can connect until the server listens on it."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _the_port(settings):
        sock.bind((settings.host, settings.port))
    return sock


@contextlib.contextmanager
def _the_port(settings: Settings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{settings.host}:{settings.port} can't be listened on ({error.strerror}); choose another --port or --host"
        ) from None


_FIRST: Mapping[str, tuple[str, str]] = {
    "embedder": ("/embed", '{"inputs": "hello"}'),
    "classifier": ("/predict", '{"inputs": "hello"}'),
    "reranker": ("/rerank", '{"query": "hello", "texts": ["goodbye", "hello"]}'),
    "sparse": ("/embed_sparse", '{"inputs": "hello"}'),
}
"""The path and body of a first request to a model of each kind."""


def _banner(told: Any, sock: socket.socket, settings: Settings) -> str:
    host, port = sock.getsockname()[:2]
    path, body = _FIRST[told.kind]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}{settings.url_prefix or ''}"
    key = '-H "Authorization: Bearer $KEY" ' if settings.api_key or settings.api_key_file else ""
    slow = () if told.device != "cpu" or _has_kernels() else (_NO_KERNELS,)
    limits = (
        f"{told.max_input_length} tokens a text, {told.max_batch_tokens} a batch, "
        f"{told.max_queue_tokens} in the queue, {told.max_client_batch_size} texts a request"
    )
    return "\n".join(
        (
            f"model    {told.model_id} (SHA-256 {told.model_sha[:16]}…)",
            f"kind     {told.kind}, {told.dimension} numbers a text",
            f"device   {told.device}, {told.dtype}, {told.kernel}, {told.threads} threads",
            *slow,
            f"limits   {limits}",
            f"ready    {url}  (docs at {url}/docs)",
            f"try      curl {url}{path} -H 'Content-Type: application/json' {key}-d '{body}'",
        )
    )


_NO_KERNELS = (
    "slow     no compiled kernels, and no int8: a C compiler was missing when the package was installed; "
    "install one and install again"
)


def _has_kernels() -> bool:
    """Whether a library of kernels was built with the package, or there is none for such a machine."""
    built = any(find_spec(f"model._kernels_{kind}") for kind in ("avx512", "avx2"))
    return built or platform.machine() not in ("x86_64", "AMD64")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bertd", description="Text embeddings over HTTP from a BERT encoder.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (serve, info, embed, fit, health):
        about = (command.__doc__ or "").split("\n", 1)[0]
        sub = commands.add_parser(command.__name__, help=about, description=about)
        sub.set_defaults(command=command)
        for name, option in Settings.model_fields.items():
            sub.add_argument(flag(name), dest=name, metavar=name.upper(), help=option.description)
        if add_options := _OPTIONS.get(command.__name__):
            add_options(sub)
    return parser


def _embed_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", metavar="FILE", type=Path, help="one text per line, or .jsonl")
    sub.add_argument("-o", "--output", type=Path, help=f"{', '.join(WRITERS)}; default: FILE with the suffix .npy")
    sub.add_argument("--no-normalize", dest="normalize", action="store_false", help="keep the length of each vector")
    sub.add_argument("--dimensions", type=int, help="keep this many numbers of each vector")


def _fit_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", metavar="FILE", type=Path, help="CSV in UTF-8; its first row names the columns")
    sub.add_argument("--text", required=True, metavar="COLUMN", help="column of the texts")
    sub.add_argument("--label", required=True, metavar="COLUMN", help="column of the labels")
    sub.add_argument("--name", required=True, help="name to keep the classifier under")
    sub.add_argument("--balanced", action="store_true", help="rare labels weigh as much as frequent ones")
    sub.add_argument("--prompt-name", help="a prompt of the checkpoint to put before each text")


_OPTIONS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {"embed": _embed_options, "fit": _fit_options}


if __name__ == "__main__":
    sys.exit(main())

"""Every option: type, default, help, limits. The only reader of BERTD_ variables."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

PREFIX = "BERTD_"

_ORIGIN = r"[a-z][a-z0-9+.-]*://[^/,\s*]+"
OnOverflow = Literal["truncate", "error", "split"]
"""What becomes of a text with more tokens than the model takes."""

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class SettingsError(Exception):
    """An option that cannot be used; says which, what was found and what was wanted."""


class Settings(BaseModel):
    """Options of the service; each is an environment variable BERTD_NAME and a flag --name of `bertd serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        min_length=1,
        description="a folder, a Hugging Face name, or a name that an installed package carries",
    )
    revision: str | None = Field(None, description="commit, branch or tag of a model on the Hugging Face Hub")
    served_model_name: str | None = Field(
        None, min_length=1, description="name of the model in answers; default: that of `BERTD_MODEL`"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    url_prefix: str | None = Field(
        None, pattern=r"^(/[\w.~-]+)+$", description="path before that of every route, as `/embeddings-api`"
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="arithmetic of the encoder; auto is float32 on a CPU"
    )
    pooling: Literal["cls", "pooler", "mean", "max", "last", "splade"] | None = Field(
        None,
        description="pooling where a request names none; splade: sparse vectors from a masked language model; "
        "default: the checkpoint's own",
    )
    on_overflow: OnOverflow = Field(
        "truncate",
        description="a text that is too long, where a request does not say: cut it, refuse it, or split it into windows",
    )
    threads: int = Field(0, ge=0, description="threads of the encoder; 0 takes the cores that the container may use")
    max_batch_tokens: int = Field(0, ge=0, le=2**20, description="tokens in one batch; 0 leaves it to the device")
    max_queue_tokens: int = Field(0, ge=0, description="tokens that may wait; 0 takes about 2 s of work")
    max_client_batch_size: int = Field(2048, ge=1, description="texts in one request")
    max_request_tokens: int = Field(65536, ge=1, description="tokens to encode in one request, after cutting and splitting")
    max_body_bytes: int = Field(8 * 2**20, ge=1, description="bytes in the body of one request")
    data_dir: str = Field("~/.local/share/bertd", min_length=1, description="folder that fitted classifiers are kept in")
    request_timeout: float = Field(30.0, gt=0, description="seconds until a request is answered 504")
    engine_timeout: float = Field(
        20.0, ge=1, description="seconds without a sign of life, while it works, after which the engine is ended and started anew"
    )
    header_timeout: float = Field(10.0, gt=0, description="seconds in which the head of a request must arrive")
    body_timeout: float = Field(
        30.0, gt=0, description="seconds in which a body must arrive, and in which a client must take more of an answer"
    )
    max_connections: int = Field(4096, ge=1, description="connections at once, where the process may have so many descriptors")
    grace_period: float = Field(30.0, ge=0, description="seconds that accepted requests get when the server stops")
    api_key: SecretStr | None = Field(
        None, description="keys that clients send as `Authorization: Bearer KEY`, comma-separated; default: nobody needs one"
    )
    api_key_file: str | None = Field(
        None, min_length=1, description="file with more such keys, one a line; it is read again when it changes"
    )
    admin_key: SecretStr | None = Field(
        None, description="key of the routes below `/admin/`, which are not there without it; no API key opens them"
    )
    metrics_public: bool = Field(True, description="whether `/metrics` is answered without a key")
    cors_origins: str | None = Field(
        None,
        pattern=rf"^(\*|{_ORIGIN}(,\s*{_ORIGIN})*)$",
        description="origins whose web pages may use the server, comma-separated as `https://a.example,https://b.example`, "
        "or `*` for all; default: none",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json: an object a line; text: for eyes; auto: text on a terminal, else json"
    )
    log_inputs: bool = Field(
        False, description="the line of a request holds the first 1000 characters of its body: texts of clients, in the log"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="OpenTelemetry collector that gets traces over OTLP/HTTP, as `http://localhost:4318`; "
        "wants the extra `otel`, which the images lack",
    )

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.api_key is not None and not self.api_keys:
            raise ValueError("api_key is empty; unset it or give a key")
        if self.admin == "":
            raise ValueError("admin_key is empty; unset it or give a key")
        if self.admin in self.api_keys:
            raise ValueError("admin_key is one of the API keys; give it a key of its own")
        if not self.metrics_public and self.api_key is None and self.api_key_file is None:
            raise ValueError("metrics_public is false and there is no key to ask for; set api_key or api_key_file")
        return self

    @property
    def api_keys(self) -> list[str]:
        """The keys of `api_key`, without those of the file."""
        return _parts(self.api_key.get_secret_value() if self.api_key else "")

    @property
    def admin(self) -> str | None:
        """The admin key."""
        return self.admin_key.get_secret_value().strip() if self.admin_key else None

    @property
    def origins(self) -> list[str]:
        return _parts(self.cors_origins or "")

    @classmethod
    def read(cls, environment: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> "Settings":
        """Settings from BERTD_* variables, flags before them. Raises SettingsError that names every bad option."""
        known = {variable(name): name for name in cls.model_fields}
        ours = {name: value for name, value in environment.items() if name.startswith(PREFIX) and not _is_foreign(name, value)}
        unknown = ours.keys() - known.keys()
        if unknown:
            raise SettingsError(f"unknown setting {', '.join(sorted(unknown))}; known are {', '.join(known)}")
        found: dict[str, Any] = {known[name]: value for name, value in ours.items() if value != ""}
        given = dict(flags or {})
        try:
            return cls.model_validate(found | given)
        except ValidationError as error:
            raise SettingsError("; ".join(_problem(detail, given) for detail in error.errors())) from None


def _parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _problem(detail: Any, flags: Mapping[str, Any]) -> str:
    """What is wrong, in a line: which option, what was found, unless it is a key, and what was wanted."""
    message = re.sub("^(Value error,|Input should be|String should have) ", "", detail["msg"])
    if not detail["loc"]:  # options that contradict each other, which the message names
        return message
    name = detail["loc"][0]
    option = Settings.model_fields[name]
    where = flag(name) if name in flags else variable(name)
    found = "set" if SecretStr in get_args(option.annotation) else repr(detail["input"])
    unfit = detail["type"] == "string_pattern_mismatch"  # nobody reads a pattern
    return f"{where} is {found}; wanted {option.description if unfit else message}"


_SERVICE_LINK = re.compile(PREFIX + r"(SERVICE_HOST|SERVICE_PORT.*|PORT_\d+_.*)")


def _is_foreign(name: str, value: str) -> bool:
    """Whether Kubernetes set a variable for a Service that is called bertd (BERTD_PORT=tcp://… among them)."""
    return bool(_SERVICE_LINK.fullmatch(name)) or (name == variable("port") and value.startswith("tcp://"))


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"

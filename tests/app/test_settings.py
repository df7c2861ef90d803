import pytest

from app.settings import Settings, SettingsError, variable


def test_flags_come_before_the_environment_and_the_environment_before_defaults():
    settings = Settings.read({"BERTD_PORT": "9000", "BERTD_THREADS": "3", "OTHER": "x"}, {"port": "9001"})
    assert (settings.port, settings.threads, settings.host) == (9001, 3, "127.0.0.1")


def test_an_empty_variable_is_the_same_as_none():
    assert Settings.read({"BERTD_API_KEY": "", "BERTD_PORT": ""}).port == 8080


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BERTD_PORT": "lots"}, "BERTD_PORT"),
        ({"BERTD_PORT": "70000"}, "BERTD_PORT"),
        ({"BERTD_DEVICE": "tpu"}, "BERTD_DEVICE"),
        ({"BERTD_DTYPE": "float64"}, "BERTD_DTYPE"),
        ({"BERTD_POOLING": "sum"}, "BERTD_POOLING"),
        ({"BERTD_REQUEST_TIMEOUT": "0"}, "BERTD_REQUEST_TIMEOUT"),
        ({"BERTD_API_KEY": "  "}, "api_key is empty"),
        ({"BERTD_API_KEY": " , "}, "api_key is empty"),
        ({"BERTD_ADMIN_KEY": " "}, "admin_key is empty"),
        ({"BERTD_API_KEY": "a, b", "BERTD_ADMIN_KEY": "b"}, "admin_key is one of the API keys"),
        ({"BERTD_METRICS_PUBLIC": "false"}, "there is no key to ask for"),
        ({"BERTD_CORS_ORIGINS": "a.example"}, "BERTD_CORS_ORIGINS"),
        ({"BERTD_CORS_ORIGINS": "https://a.example/"}, "BERTD_CORS_ORIGINS"),
        ({"BERTD_CORS_ORIGINS": "*, https://a.example"}, "BERTD_CORS_ORIGINS"),
        ({"BERTD_OTLP_ENDPOINT": "collector:4318"}, "BERTD_OTLP_ENDPOINT"),
        ({"BERTD_LOG_FORMAT": "xml"}, "BERTD_LOG_FORMAT"),
        ({"BERTD_URL_PREFIX": "api"}, "BERTD_URL_PREFIX"),
        ({"BERTD_URL_PREFIX": "/api/"}, "BERTD_URL_PREFIX"),
        ({"BERTD_URL_PREFIX": "/a//b"}, "BERTD_URL_PREFIX"),
        ({"BERTD_MAX_BATCH_TOKENS": "100000000"}, "BERTD_MAX_BATCH_TOKENS is '100000000'; wanted less than or equal to 1048576"),
        ({"BERTD_PROT": "1"}, "unknown setting BERTD_PROT"),
        ({"BERTD_PORT": "x", "BERTD_THREADS": "y"}, "BERTD_THREADS"),
    ],
)
def test_a_bad_option_is_named(environment, message):
    with pytest.raises(SettingsError, match=message):
        Settings.read(environment)


@pytest.mark.parametrize(
    ("environment", "flags", "line"),
    [
        ({"BERTD_DEVICE": "tpu"}, {}, "BERTD_DEVICE is 'tpu'; wanted auto, cpu, cuda or cuda:N"),
        ({"BERTD_PORT": "80"}, {"port": "70000"}, "--port is '70000'; wanted less than or equal to 65535"),
        ({"BERTD_PORT": "70000"}, {"host": "::"}, "BERTD_PORT is '70000'; wanted less than or equal to 65535"),
        ({}, {"served_model_name": ""}, "--served-model-name is ''; wanted at least 1 character"),
        ({}, {"url_prefix": "api"}, "--url-prefix is 'api'; wanted path before that of every route, as `/embeddings-api`"),
        ({"BERTD_ADMIN_KEY": " "}, {}, "admin_key is empty; unset it or give a key"),
    ],
)
def test_a_bad_option_is_a_line_that_says_what_was_found_and_wanted(environment, flags, line):
    with pytest.raises(SettingsError) as refused:
        Settings.read(environment, flags)
    assert str(refused.value) == line


def test_variables_that_kubernetes_sets_for_a_service_of_our_name_are_not_ours():
    links = {
        "BERTD_PORT": "tcp://10.0.0.1:80",
        "BERTD_SERVICE_HOST": "10.0.0.1",
        "BERTD_SERVICE_PORT_HTTP": "80",
        "BERTD_PORT_80_TCP": "tcp://10.0.0.1:80",
        "BERTD_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert Settings.read(links) == Settings()


def test_a_key_is_not_shown():
    keys = {"BERTD_API_KEY": "secret", "BERTD_ADMIN_KEY": "secretive"}
    assert "secret" not in repr(Settings.read(keys))
    with pytest.raises(SettingsError) as refused:
        Settings.read({"BERTD_API_KEY": "secret", "BERTD_ADMIN_KEY": "secret"})
    assert "secret" not in str(refused.value)
    with pytest.raises(SettingsError) as refused:
        Settings.read({}, {"api_key": b"\xffsecret"})
    assert "secret" not in str(refused.value)


def test_lists_are_parted_at_commas():
    settings = Settings.read({"BERTD_API_KEY": "a, b,,", "BERTD_CORS_ORIGINS": "https://a.example, http://localhost:3000"})
    assert settings.api_keys == ["a", "b"]
    assert settings.origins == ["https://a.example", "http://localhost:3000"]


def test_every_option_has_a_help():
    assert all(option.description for option in Settings.model_fields.values())
    assert variable("max_batch_tokens") == "BERTD_MAX_BATCH_TOKENS"

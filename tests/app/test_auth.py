"""Keys without a server: the file that is read again, and what is compared."""

import hmac
import os

import httpx
import pytest
from servers import run_bertd

from app import auth
from app.auth import Keys, RequireKey
from app.main import refusal
from app.settings import Settings, SettingsError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# of the search team\n\n  first \nsecond\n")
    return path


@pytest.fixture
def impatient(monkeypatch):
    """Every question is a look at the file."""
    monkeypatch.setattr(auth, "_LOOK_SECONDS", 0.0)


def keys_of(file, **settings):
    return Keys(Settings(api_key_file=str(file), **settings))


async def served(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def statuses(keys, offered, path="/embed", scheme="Bearer "):
    """The status for each key, from an app that answers whoever gets to it."""
    app = RequireKey(served, keys, refusal)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bertd") as client:
        answers = [await client.post(path, headers={"authorization": f"{scheme}{key}".encode()}) for key in offered]
    return [answer.status_code for answer in answers]


@pytest.mark.anyio
async def test_the_keys_of_the_settings_and_of_the_file_are_good(file):
    keys = keys_of(file, api_key="third, fourth")
    good = ["first", "second", "third", "fourth"]
    bad = ["# of the search team", "", "firs", "firstt", "first,second", "FIRST"]
    assert await statuses(keys, good + bad) == [200] * 4 + [401] * len(bad)


@pytest.mark.anyio
async def test_the_scheme_may_be_written_in_any_case_and_a_key_in_any_letters():
    keys = Keys(Settings(api_key="clé"))
    assert [await statuses(keys, ["clé", "cle"], scheme=scheme) for scheme in ("Bearer ", "bearer   ")] == [[200, 401]] * 2
    assert [await statuses(keys, ["clé"], scheme=scheme) for scheme in ("", "Basic ", "Bearer")] == [[401]] * 3


@pytest.mark.anyio
async def test_without_keys_everything_but_admin_is_open():
    assert await statuses(Keys(Settings()), [""]) == [200]
    assert await statuses(Keys(Settings()), [""], "/admin/reload") == [404]
    assert await statuses(Keys(Settings(admin_key="sesame")), ["", "sesame"], "/admin/reload") == [401, 200]
    assert await statuses(Keys(Settings(admin_key="sesame")), ["", "sesame"]) == [200, 200]


def replace(file, text):
    """As a careful program does it: the name leads to the old file or to the new one."""
    file.with_suffix(".new").write_text(text)
    os.replace(file.with_suffix(".new"), file)


@pytest.mark.anyio
@pytest.mark.usefixtures("impatient")
async def test_a_changed_file_is_read_again(file):
    keys = keys_of(file)
    replace(file, "second\nnewest\n")
    assert await statuses(keys, ["first", "second", "newest"]) == [401, 200, 200]
    with file.open("a") as opened:
        opened.write("another\n")
    assert await statuses(keys, ["another"]) == [200]


@pytest.mark.anyio
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda file: file.unlink(), "can't be read"),
        (lambda file: file.write_text("# nothing\n"), "holds no key"),
        (lambda file: file.write_text("sesame\n"), "holds the admin key"),
    ],
)
async def test_a_file_that_is_spoilt_keeps_its_keys_and_is_named_once(file, caplog, spoil, problem):
    keys = keys_of(file, admin_key="sesame")
    spoil(file)
    for _ in range(3):
        assert await statuses(keys, ["first", "sesame"]) == [200, 401]
    (line,) = [record.getMessage() for record in caplog.records]
    assert problem in line
    assert "first" not in line
    assert "sesame" not in line
    replace(file, "mended\n")
    assert await statuses(keys, ["first", "mended"]) == [401, 200]


def test_the_file_is_looked_at_once_a_second_at_most(file, monkeypatch):
    keys = keys_of(file)
    looks = []
    monkeypatch.setattr(auth, "_state", looks.append)
    clock = [keys._next_look]
    monkeypatch.setattr(auth.time, "monotonic", lambda: clock[0])
    for _ in range(1000):
        keys.current("ApiKey")
        clock[0] += 0.002
    assert len(looks) == 2


@pytest.mark.parametrize("content", [None, "", "# nothing\n\n", "sesame\n"])
def test_a_bad_file_is_refused_at_start(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=r"BERTD_API_KEY_FILE: .*keys .*wanted"):
        keys_of(file, admin_key="sesame")


def test_a_bad_file_is_one_line_before_anything_is_loaded(tmp_path):
    done = run_bertd("serve", "--port", 0, "--model", "/nowhere", BERTD_API_KEY_FILE=str(tmp_path / "none"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("bertd: BERTD_API_KEY_FILE: ")


@pytest.mark.anyio
async def test_every_key_is_compared_whichever_fits_and_all_are_of_one_length(file, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    for offered in ("first", "a much longer third key", "wrong" * 100):
        compared.clear()
        await statuses(keys_of(file, api_key="a much longer third key"), [offered])
        assert len(compared) == 3
        assert {len(side) for pair in compared for side in pair} == {32}

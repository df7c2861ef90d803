"""The docs are true: every route, setting, error and metric has its place, and every link leads somewhere."""

import re
from pathlib import Path

import pytest
from checkpoints import MINILM
from test_layers import ORDER

from app import errors
from app.main import create_api, refusal
from app.metrics import Metrics
from app.settings import Settings, variable

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ROUTES = [(method.upper(), path) for path, methods in create_api(refusal).openapi()["paths"].items() for method in methods]


def text_of(name):
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_has_a_heading_in_the_api_page_and_a_line_in_the_readme(method, path):
    assert f"\n## {method} {path}\n" in text_of("api.md")
    assert f"`{method} {path}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_api_page_has_no_route_that_is_not_there():
    headings = re.findall(r"^## (GET|POST|PUT|DELETE) (\S+)$", text_of("api.md"), re.M)
    assert sorted(headings) == sorted(ROUTES)


def test_every_setting_is_described_with_its_default():
    rows = dict(re.findall(r"^\| `(BERTD_\w+)` \| (.*) \|$", text_of("settings.md"), re.M))
    assert list(rows) == [variable(name) for name in Settings.model_fields]
    for name, option in Settings.model_fields.items():
        default = "none" if option.default is None else str(option.default)
        assert rows[variable(name)] == f"`{default}` | {option.description}"


def test_every_error_is_listed_with_its_status():
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServiceError)]
    for kind in tree:
        assert f"| {kind.status} | `{kind.word}` |" in text_of("api.md")
        assert re.search(rf"{kind.__name__} +{kind.status} {kind.word}", errors.__doc__), kind


def test_every_refusal_is_explained_to_who_runs_the_server():
    (section,) = re.findall(r"^## What each refusal means\n(.*?)^## ", text_of("operations.md"), re.M | re.S)
    explained = [refusal for row in re.findall(r"^\| (\d.*?) \|", section, re.M) for refusal in row.split(", ")]
    tree = {f"{kind.status} `{kind.word}`" for kind in vars(errors).values() if isinstance(kind, type)}
    assert sorted(explained) == sorted(tree)


def test_every_metric_is_listed():
    families = [family.name + ("_total" if family.type == "counter" else "") for family in Metrics().registry.collect()]
    assert sorted(re.findall(r"^\| `((?:bertd|process|python)_\w+)`", text_of("operations.md"), re.M)) == sorted(families)


@pytest.mark.parametrize("module", ORDER)
def test_every_module_is_in_the_architecture_page(module):
    assert f"`{module}`" in text_of("architecture.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readme_names_the_default_model():
    assert MINILM in (ROOT / "README.md").read_text(encoding="utf-8")

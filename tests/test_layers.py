"""Imports go strictly down: a module imports only from levels below its own, and all of model/ lies below all of app/."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = {
    "model": [
        {"errors", "tokens", "vectors", "chunks", "cgroup", "excerpts", "scratch", "lean"},
        {"config", "shortcut"},
        {"batch", "hub", "checkpoint", "tokenizer", "windows"},
        {"attention", "pooling"},
        {"bert"},
        {"compiled", "compiled_cuda", "heads"},
        {"encoder", "graphs", "linear"},
        {"cpu", "cuda", "finetune"},
        {"runner"},
    ],
    "app": [
        {"settings", "errors", "render", "frames", "negotiation", "lifeline", "child", "cores", "memory", "record"},
        {"metrics", "engine", "compression", "classifiers", "fitting", "waiting", "wire", "cors", "logs", "traces", "texts"},
        {"worker", "scheduler", "inputs"},
        {"outcomes"},
        {"service"},
        {"embedding", "info"},
        {"bulk", "chunking", "scoring"},
        {"classification", "middleware"},
        {"auth", "observe", "serving", "api.json_route", "api.fields", "api.responses"},
        {"api.answers", "api.tei_bodies", "examples"},
        {"api.tei", "api.openai", "api.chunks", "api.rerank", "api.vllm", "api.classify", "api.ops", "api.admin"},
        {"api.dispatch", "server"},
        {"main"},
        {"cli"},
    ],
}
ORDER = [f"{package}.{module}" for package, levels in LEVELS.items() for level in levels for module in sorted(level)]
LEVEL = {
    f"{package}.{module}": (package == "app", height)
    for package, levels in LEVELS.items()
    for height, level in enumerate(levels)
    for module in level
}


def path_of(module):
    return ROOT / (module.replace(".", "/") + ".py")


def imports_of(module):
    """Every module of ours that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in LEVEL)


def test_every_module_has_a_level():
    files = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for package in LEVELS
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert files == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down(module):
    assert not [name for name in imports_of(module) if LEVEL[name] >= LEVEL[module]]


def test_nothing_in_app_imports_torch_or_transformers_or_scikit_learn_on_import():
    modules = ", ".join(name for name in ORDER if name.startswith("app."))
    code = f"import sys; import {modules}; print([m for m in ('torch', 'transformers', 'sklearn', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_module_has_a_name_that_says_nothing():
    stems = {path.stem for folder in ("app", "model", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert "test_layers" in stems
    assert not stems & {"utils", "common", "helpers", "base", "manager"}

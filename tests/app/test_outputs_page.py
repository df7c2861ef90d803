"""The examples of docs/outputs.md run, and give the vectors that the page promises."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

PAGE = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.S | re.M)
TEXTS = {"vectors": ["hello", "world"], "matrices": ["hello", "a longer text"]}
SHOW = """
const found = {NAME};
console.log(JSON.stringify(found.map(rows => Array.from(rows))));
"""


def examples(language):
    return [code for found, code in EXAMPLES if found == language]


def result_of(code):
    """The name of what an example ends in."""
    return re.findall(r"^(?:const )?(\w+) =", code, re.M)[-1]


@pytest.fixture(scope="module")
def wanted(server):
    vectors = np.array(server.post("/embed", inputs=TEXTS["vectors"]).json(), dtype=np.float32)
    matrices = [np.array(matrix) for matrix in server.post("/embed_all", inputs=TEXTS["matrices"]).json()]
    largest = 5 / np.sqrt(384)
    integers = np.clip(np.floor((vectors + largest) / (2 * largest / 255)), 0, 255) - 128
    return {"vectors": vectors, "matrices": matrices, "bits": vectors > 0, "integers": integers}


def assert_as_promised(found, name, wanted):
    tolerance = 1 if name == "integers" else 2e-6
    for got, row in zip(found, wanted[name], strict=True):
        np.testing.assert_allclose(np.array(got, dtype=np.float64).ravel(), row.ravel(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("code", examples("python"))
def test_python_examples(server, wanted, code):
    names = {}
    exec(code.replace("http://localhost:8080", server.url), names)
    assert_as_promised(names[result_of(code)], result_of(code), wanted)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("code", examples("js"))
def test_javascript_examples(server, wanted, code):
    script = code.replace("http://localhost:8080", server.url) + SHOW.replace("{NAME}", result_of(code))
    done = subprocess.run(["node", "--input-type=module", "-"], input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert_as_promised(json.loads(done.stdout), result_of(code), wanted)


HELLO = -0.06277183  # the first number of the vector of "hello", as the README shows it


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("code", examples("sh"))
def test_shell_examples(server, wanted, code):
    command = code.replace("localhost:8080", server.url)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if "binary" in code:
        assert json.loads(done.stdout) == [(np.packbits(wanted["bits"][0]).astype(int) - 128).tolist()]
    elif "safetensors" in code:
        file = safetensors.numpy.save({"0": wanted["matrices"][0].astype(np.float32)})
        assert done.stdout == f"{len(file)} bytes\n"
    else:
        assert float(re.search(r"-?[\d.]+", done.stdout)[0]) == pytest.approx(HELLO, abs=2e-6)


@pytest.mark.parametrize("heading", ["JSON", "base64", "Octets", "safetensors", "Numbers", "Compression"])
def test_every_format_is_shown_in_three_languages(heading):
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
    assert re.findall(r"^```(\w+)$", section, re.M) == ["python", "js", "sh"]
    assert all(code.count("\n") <= 3 for language, code in EXAMPLES)

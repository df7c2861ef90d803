"""`bertd fit` on files of all kinds."""

import numpy as np
import pytest
from servers import run_bertd, running_server
from test_serve import one_line

from app.classification import MAX_EXAMPLES
from app.classifiers import Store
from app.examples import ExamplesError, read_examples

GOOD = b"text,label,more\nabc,x,1\n"


def read(folder, content, text="text", label="label"):
    (folder / "data.csv").write_bytes(content)
    return [(example.text, example.label) for example in read_examples(folder / "data.csv", text, label)]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"text,label\nabc,x\n", [("abc", "x")]),
        (b"\xef\xbb\xbftext,label\r\nabc,x\r\n\r\ndef,y\r\n", [("abc", "x"), ("def", "y")]),
        (b'label,id,text\nx,1,"a, ""b""\nc"\n', [('a, "b"\nc', "x")]),
        ("text,label\n苹果\u2028 ,é\n".encode(), [("苹果\u2028 ", "é")]),
        (b"text,label\nabc,x", [("abc", "x")]),
        (b"text,label\n", []),
    ],
)
def test_examples_are_read_as_a_spreadsheet_wrote_them(tmp_path, content, wanted):
    assert read(tmp_path, content) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b" ,x,1\n", r"row 2 \(line 3\): the text is empty"),
        (GOOD + b"abc,,1\n", r"row 2 \(line 3\): the label is empty"),
        (GOOD + b'"a\nb",x,1\nabc,x\n', r"row 3 \(line 5\): it has 2 columns, wanted 3"),
        (GOOD + b"a, b,x,1\n", r"row 2 \(line 3\): it has 4 columns, wanted 3"),
        (GOOD + b'"a"b,x,1\n', r"row 2 \(line 3\): .*is a quote left open"),
        (GOOD + b'abc,"x,1\nabc,x,1\n', r"row 2 \(line 4\): .*is a quote left open"),
        (GOOD + b"abc," + b"l" * 201 + b",1\n", r"row 2 \(line 3\): the label has 201 characters"),
        (GOOD + b"abc\xff,x,1\n", r"line 3 is not UTF-8 \(byte 4: 0xff\)"),
        ("text,label\nabc,x\n".encode("utf-16"), "line 1 is not UTF-8"),
        (b"", "column 'text' is not there; the columns are none"),
        (b"Text;Label\n", "column 'text' is not there; the columns are 'Text;Label'"),
        (b"text,labels\n", "column 'label' is not there; the columns are 'text', 'labels'"),
        (b"text,label,text\n", "column 'text' is there more than once"),
    ],
)
def test_the_first_bad_row_is_named(tmp_path, content, message):
    with pytest.raises(ExamplesError, match=rf"data\.csv.*{message}"):
        read(tmp_path, content)


def test_a_bad_row_in_a_large_file_is_named_with_its_number(tmp_path):
    with pytest.raises(ExamplesError, match=r"row 90001 \(line 90002\): the label is empty"):
        read(tmp_path, b"text,label\n" + b"a" * 1000 + b",x\n" + (b"a" * 1000 + b",x\n") * 89_999 + b"b,\n")


def test_one_row_too_many_is_named(tmp_path):
    with pytest.raises(ExamplesError, match=f"row {MAX_EXAMPLES + 1} .* is one more than the {MAX_EXAMPLES}"):
        read(tmp_path, b"text,label\n" + b"a,x\n" * (MAX_EXAMPLES + 5))


def test_a_fit_is_served_and_a_bad_one_leaves_it(make_checkpoint, tmp_path):
    (tmp_path / "data.csv").write_text(
        "a,b\n" + "".join(f"{'ab' if n % 3 else 'xy'} {n},{'x' if n % 3 else 'y'}\n" for n in range(30))
    )
    (tmp_path / "lone.csv").write_text("a,b\nabc,x\ndef,y\n")
    (tmp_path / "bad.csv").write_text("a,b\nabc,x\n,y\n")
    (tmp_path / "one.csv").write_text("a,b\nabc,x\ndef,x\n")

    def fit(file, *options):
        options = ["--text", "a", "--label", "b", "--name", "letters", "--data-dir", tmp_path / "data", *options]
        return run_bertd("fit", tmp_path / file, "--model", make_checkpoint(), *options)

    with running_server(model=make_checkpoint(), data_dir=tmp_path / "data") as server:
        assert "not judged: 2 of 2 labels have one example" in fit("lone.csv").stdout
        assert server.client.get("/classifiers/letters").json()["counts"] == {"x": 1, "y": 1}
        done = fit("data.csv", "--balanced", "--pooling", "mean")
        assert done.returncode == 0, done.stderr
        before = server.client.get("/classifiers/letters").json()
        assert (before["counts"], before["class_weight"], before["pooling"]) == ({"x": 20, "y": 10}, "balanced", "mean")
        table = [list(map(int, line.split()[2:])) for line in done.stdout.split("\n") if line[:6].strip() in ("1 x", "2 y")]
        assert np.sum(table, axis=1).tolist() == [20, 10]
        assert f"accuracy {np.trace(table) / 30:.3f}" in done.stdout
        for file, *options, message in [
            ("bad.csv", "row 2 (line 3): the text is empty"),
            ("one.csv", "1 different labels; wanted 2"),
            ("none.csv", "can't be read"),
            ("data.csv", "--name", "../up", "wanted 1 to 64"),
        ]:
            assert message in one_line(fit(file, *options))
        assert server.client.get("/classifiers/letters").json() == before
    assert Store(tmp_path / "data/classifiers").names() == ["letters"]

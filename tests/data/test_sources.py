"""Every kind of file gives the same rows, and every broken file one line that names it."""

from __future__ import annotations

import builtins
import gzip
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxtune.data.formats import read_examples
from jaxtune.data.sources import folder_files, read_rows
from jaxtune.types import UserError

ROWS = [{"id": "1", "text": 'say "hi",\u2028now'}, {"id": "2", "text": "café"}]
TAB = "id\ttext\n" + "".join(f"{r['id']}\t{r['text']}\n" for r in ROWS)
CSV = 'id,text\n1,"say ""hi"",\u2028now"\n2,café\n'
FILES = {
    "a.jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS),
    "a.json": json.dumps(ROWS),
    "named.json": json.dumps({row["id"]: row for row in ROWS}),
    "a.csv": CSV,
    "a.tsv": TAB,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_reads_the_same_rows(tmp_path: Path, name: str, bom: bytes, zipped: bool) -> None:
    raw = bom + FILES[name].encode()
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    assert [row for _, row in read_rows(path)] == ROWS


def test_numbers_are_lines_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}\r\n')
    assert list(read_rows(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (4, {"a": 2})]
    (tmp_path / "a.csv").write_text('a,b\n1,"two\nlines"\n\n3,4\n')
    assert list(read_rows(tmp_path / "a.csv")) == [(2, {"a": "1", "b": "two\nlines"}), (5, {"a": "3", "b": "4"})]


def test_txt_is_lines_or_a_headerless_table(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('1\t"unbalanced\n2\tb\n')
    assert [row for _, row in read_rows(tmp_path / "a.txt")] == [{"text": '1\t"unbalanced'}, {"text": "2\tb"}]
    named = [row for _, row in read_rows(tmp_path / "a.txt", ("n", "t"))]
    assert named == [{"n": "1", "t": '"unbalanced'}, {"n": "2", "t": "b"}]


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "x" * 200_000 + "\n")
    assert len(next(read_rows(tmp_path / "a.csv"))[1]["a"]) == 200_000


@pytest.mark.parametrize("zipped", [False, True])
def test_parquet(tmp_path: Path, zipped: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    if zipped:
        raw, path = path.read_bytes(), tmp_path / "a.parquet.gz"
        path.write_bytes(gzip.compress(raw))
    assert list(read_rows(path)) == list(enumerate(ROWS, 1))


BAD = {
    "not json": ("a.jsonl", b'{"a": 1}\n{"a" 2}\n', r"^a\.jsonl:2: not JSON \(Expecting ':'.*column 6\)"),
    "list in jsonl": ("a.jsonl", b"[1]\n", r"^a\.jsonl:1: is a JSON list; expected an object"),
    "bytes": ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"^a\.jsonl:2: byte 0xff is not UTF-8"),
    "object in json": ("a.json", b'{"a": 1}', r"^a\.json: holds a JSON object; expected a list"),
    "lines in json": ("a.json", b'{"a": 1}\n{"a": 2}', r"^a\.json:2: not JSON \(Extra data.*\.jsonl"),
    "string in json": ("a.json", b'[{"a": 1}, "b"]', r"^a\.json:2: is a JSON string"),
    "csv columns": ("a.csv", b"a,b\n1,2\n1,2,3\n", r"^a\.csv:3: 3 columns; expected 2 \(a, b\)"),
    "csv quotes": ("a.csv", b'a,b\n1,"2\n', r"^a\.csv:2: not CSV \(unexpected end of data\)"),
    "tsv columns": ("a.tsv", b"a\tb\n1\n", r"^a\.tsv:2: 1 columns; expected 2"),
    "twice": ("a.csv", b"a,a\n1,2\n", r"^a\.csv:1: column name 'a' appears twice"),
    "suffix": ("a.xlsx", b"", r"^a\.xlsx: unknown kind of data file '\.xlsx'; known: \.jsonl, \.json, \.csv"),
    "only gz": ("a.gz", b"", r"^a\.gz: unknown kind of data file ''"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9], r"^a\.jsonl\.gz: not a whole gzip file"),
    "no gzip": ("a.jsonl.gz", b'{"a": 1}\n', r"^a\.jsonl\.gz: not a whole gzip file"),
    "no parquet": ("a.parquet", b"nothing like it", r"^a\.parquet: not a Parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_files_are_named_in_one_line(tmp_path: Path, case: str) -> None:
    name, raw, message = BAD[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message) as error:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(error.value)


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"trian\.jsonl' does not exist; did you mean 'train\.jsonl'"):
        list(read_rows(tmp_path / "trian.jsonl"))


def test_a_folder_is_its_files_less_the_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.jsonl", "deep/a.csv", ".ipynb_checkpoints/b-checkpoint.jsonl", "deep/._a.csv", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert folder_files(tmp_path) == [tmp_path / "b.jsonl", tmp_path / "deep" / "a.csv"]
    assert folder_files(tmp_path, ".ipynb*/*") == [tmp_path / ".ipynb_checkpoints" / "b-checkpoint.jsonl"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: object, **more: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install jaxtune\[parquet\]"):
        list(read_rows(tmp_path / "a.parquet"))


def test_a_folder_holds_rows_in_many_files(tmp_path: Path, data: ConfigDict) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b" / "c.json").write_text('{"text": "three"}')  # one object: one row
    (tmp_path / "b" / "notes.md").write_text("not rows")
    data.chat = False
    examples, dropped = read_examples(tmp_path, data)
    assert [(e.row_id, e.text) for e in examples] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:2", "two"),
        ("b/c.json:1", "three"),
    ]
    assert not dropped
    data.files = "b/*.json"
    assert [e.text for e in read_examples(tmp_path, data)[0]] == ["three"]
    data.files = "*.csv"
    with pytest.raises(UserError, match=r"has no file that matches data.files='\*.csv'; it holds 'a.jsonl', 'b'"):
        read_examples(tmp_path, data)
    with pytest.raises(UserError, match="rename it to .jsonl"):  # a file named by itself is a table, not one row
        list(read_rows(tmp_path / "b" / "c.json"))


PREPARE = """\
def shout(row):
    return {"text": row["text"].upper()} if row["text"] != "two" else None
def broken(row):
    return row["missing"]
def number(row):
    return 3
"""


def test_rows_pass_through_a_function_of_the_users_own(tmp_path: Path, data: ConfigDict) -> None:
    (tmp_path / "own.py").write_text(PREPARE)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    data.chat = False
    data.prepare = f"{tmp_path / 'own.py'}:shout"
    examples, dropped = read_examples(tmp_path / "a.jsonl", data)
    assert [e.text for e in examples] == ["ONE"]
    assert dropped == {"by_data_prepare": 1}
    for name, message in {
        "own.py:broken": r"a.jsonl:1: data.prepare='.*' failed: KeyError: 'missing'",
        "own.py:number": r"a.jsonl:1: data.prepare='.*' returned 3; expected a row",
        "own.py:shuot": r"has no function 'shuot'; did you mean 'shout'",
        "owm.py:shout": "there is no file",
        "own.py": "expected 'package.module:function'",
    }.items():
        data.prepare = f"{tmp_path / name}"
        with pytest.raises(UserError, match=message):
            read_examples(tmp_path / "a.jsonl", data)
    data.prepare = "no_such_module:f"
    with pytest.raises(UserError, match="importing 'no_such_module' failed: ModuleNotFoundError"):
        read_examples(tmp_path / "a.jsonl", data)

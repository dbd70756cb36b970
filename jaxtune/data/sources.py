"""Files to rows: every supported table or list becomes `(row number, dictionary)`, or one line that says why not."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from jaxtune.types import UserError, nearest

Row = dict[str, Any]
_OLD_MAC = r"lines end in \r alone, as on old Macs; save it with line ends \n (Unix) or \r\n (Windows)"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")


def folder_files(folder: Path, pattern: str = "") -> list[Path]:
    """Returns the data files of a folder and the folders in it that match `pattern` ("" = all but hidden ones), in the order of their names.

    Raises:
      UserError: there is none, or the pattern is none.
    """

    def hidden(path: Path) -> bool:  # .ipynb_checkpoints holds copies, "._rows.jsonl" a Mac's notes on rows.jsonl
        return not pattern and any(part.startswith(".") for part in path.relative_to(folder).parts)

    try:
        found = sorted(path for path in folder.glob(pattern or "**/*") if path.is_file() and not hidden(path))
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data.files={pattern!r} is no pattern ({error}); expected one such as '*.jsonl'") from None
    found = found if pattern else [path for path in found if _kind_of_file(path) in SUFFIXES]
    if not found:
        names = ", ".join(sorted(repr(path.name) for path in folder.iterdir())[:6]) or "nothing"
        wanted = f"that matches data.files={pattern!r}" if pattern else f"of rows ({', '.join(SUFFIXES)})"
        raise UserError(f"folder {str(folder)!r} has no file {wanted}; it holds {names}")
    return found


def sha256(path: Path, pattern: str = "") -> str:
    """The SHA-256 of a file's bytes; of a folder, of its data files' names and bytes."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = hashlib.sha256()
    for each in folder_files(path, pattern):
        found.update(f"{each.relative_to(path)}\n{sha256(each)}\n".encode())
    return found.hexdigest()


def read_rows(path: Path, columns: tuple[str, ...] = (), lone_object: bool = False) -> Iterator[tuple[int, Row]]:
    """Yields `(number, row)` of a data file; the number is the 1-based line, or the entry of a list or Parquet table.

    Formats by suffix, each optionally `.gz`: .jsonl, .json (a list of objects, or an object of objects, a row each), .csv,
    .tsv, .txt, .parquet. Without `columns` the first row of a .csv or .tsv names them, and a .txt holds one `{"text": …}`
    per line; with `columns` a table has no header row and a .txt is tab-separated. Tab-separated fields have no quoting.
    Blank lines are skipped.
    With `lone_object` a .json may also hold one object, which is one row.

    Raises:
      UserError: the file is missing, empty of structure, malformed, cut short, not UTF-8 or of an unknown kind.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; expected a data file ({', '.join(SUFFIXES)})")
    suffix = _suffix(path)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"data file {str(path)!r} does not exist{near}")
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")) as file:
            if suffix == ".parquet":
                yield from _parquet(path, file)
            elif suffix == ".json":
                yield from _json_list(path, file, lone_object)
            elif suffix == ".jsonl":
                yield from _json_lines(path, file)
            else:
                yield from _table(path, file, suffix, columns)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path.name}: not a whole gzip file ({error}); fetch or compress it again") from None


def _kind_of_file(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _suffix(path: Path) -> str:
    suffix = _kind_of_file(path)
    if suffix not in SUFFIXES:
        raise UserError(f"{path.name}: unknown kind of data file {suffix!r}; known: {', '.join(SUFFIXES)} (also .gz)")
    return suffix


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    # Decoded line by line, so that a bad byte is reported with its line; only "\n" ends a line (U+2028 does not).
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            if b"\r" in raw.rstrip() and not raw.endswith(b"\n") and _suffix(path) != ".json":
                raise UserError(f"{path.name}: {_OLD_MAC}")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path.name}:{number}: byte {error.object[error.start]:#04x} is not UTF-8; save the file as UTF-8"
            ) from None


def _json_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path, file):
        if line.strip():
            yield number, _object(path, number, _parse(f"{path.name}:{number}", line))


def _json_list(path: Path, file: BinaryIO, lone_object: bool) -> Iterator[tuple[int, Row]]:
    text = "".join(line for _, line in _lines(path, file))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise UserError(f"{path.name}:{error.lineno}: not JSON ({error.msg}, column {error.colno}){hint}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path.name}: not JSON that can be read ({error})") from None
    if isinstance(rows, dict) and rows and all(isinstance(value, dict) for value in rows.values()):
        rows = list(rows.values())  # by name: {"a": {…}, "b": {…}}
    elif lone_object and isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path.name}: holds a JSON {_kind(rows)}; expected a list of objects, or rename it to .jsonl")
    _whole_characters(path.name, text, rows)
    for number, row in enumerate(rows, 1):
        yield number, _object(path, number, row)


def _parse(where: str, line: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); expected one object a line") from None
    except (RecursionError, ValueError) as error:  # brackets nested too deep, a number of thousands of digits
        raise UserError(f"{where}: not JSON that can be read ({error}); expected one object a line") from None
    _whole_characters(where, line, value)
    return value


def _whole_characters(where: str, text: str, value: Any) -> None:
    """JSON can write half of a character (a lone surrogate, as in a cut-off emoji): no tokenizer takes that."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(f"{where}: {half!r} is half of a character; mend the text, or remove it") from None


def _object(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f'{path.name}:{number}: is a JSON {_kind(row)}; expected an object such as {{"messages": […]}}')
    return row


def _kind(value: Any) -> str:
    names = {list: "list", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _table(path: Path, file: BinaryIO, suffix: str, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    if suffix == ".txt" and not columns:
        for number, line in _lines(path, file):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}
        return
    names = list(columns)
    for number, cells in _comma_cells(path, file) if suffix == ".csv" else _tab_cells(path, file):
        if not names:
            names = cells
            if len(set(names)) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"{path.name}:{number}: column name {twice!r} appears twice; rename one")
        elif len(cells) != len(names):
            raise UserError(
                f"{path.name}:{number}: {len(cells)} columns; expected {len(names)} ({', '.join(names)}); "
                "mend the row, or name the columns in data.columns"
            )
        else:
            yield number, dict(zip(names, cells, strict=True))


def _tab_cells(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(path, file):
        if line.strip():
            yield number, line.rstrip("\r\n").split("\t")


def _comma_cells(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the standard library stops at 131,072 characters, a long document does not
    reader = csv.reader((line for _, line in _lines(path, file)), strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        hint = _OLD_MAC if "new-line character" in str(error) else "check the quotes of this row"
        raise UserError(f"{path.name}:{number}: not CSV ({error}); {hint}") from None


def _parquet(path: Path, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path.name}: reading Parquet needs pyarrow: pip install jaxtune[parquet]") from None
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file)
        number = 0
        for block in table.iter_batches():
            for row in block.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path.name}: not a Parquet file ({str(error).splitlines()[0]})") from None

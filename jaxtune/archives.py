"""Wheels, zips and tars as a list of members; unpacking that cannot leave its folder. Used by `fetch`."""

from __future__ import annotations

import contextlib
import difflib
import re
import stat
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from jaxtune.types import UserError

CHUNK_BYTES = 1 << 20
_TAR = re.compile(r".*\.(tar(\.(gz|bz2|xz))?|tgz)")
_EXPECTED = ".whl .zip .tar .tar.gz .tgz .tar.bz2 or .tar.xz"
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError)


class Member(NamedTuple):
    """One entry that is no folder; `kind` is file | symbolic link | hard link | device."""

    name: str
    kind: str
    open: Callable[[], Any]


@contextlib.contextmanager
def members(archive: Path, what: str) -> Iterator[list[Member]]:
    """Yields the members of `archive`, which stays open meanwhile; `what` opens the messages of a `UserError`."""
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as zipped:
                infos = [info for info in zipped.infolist() if not info.is_dir()]
                yield [Member(info.filename, _zip_kind(info), partial(zipped.open, info)) for info in infos]
        elif _TAR.fullmatch(archive.name):
            with tarfile.open(archive) as tar:
                entries = [entry for entry in tar if not entry.isdir()]
                yield [Member(entry.name, _tar_kind(entry), partial(tar.extractfile, entry)) for entry in entries]
        else:
            raise UserError(f"{what}: {archive.name!r} is not an archive that '#' can enter; expected {_EXPECTED}")
    except _DAMAGE as error:
        raise UserError(
            f"{what}: {archive.name!r} is damaged or no archive: {error}; choose another version"
        ) from error


def _zip_kind(info: zipfile.ZipInfo) -> str:
    return "symbolic link" if stat.S_ISLNK(info.external_attr >> 16) else "file"


def _tar_kind(entry: tarfile.TarInfo) -> str:
    return "file" if entry.isreg() else "symbolic link" if entry.issym() else "hard link" if entry.islnk() else "device"


def choose(names: list[str], wanted: str, what: str) -> str:
    """Returns the file or folder meant by `wanted`: itself, or the only one that ends so (`pkg-1/a` for `a`), or ""."""
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    known = sorted({*names, *folders} - {".", "/"})
    matches = [wanted] if wanted in known else [name for name in known if name.endswith("/" + wanted)]
    if not wanted or not matches:
        return ""
    if len(matches) > 1:
        listed = ", ".join(map(repr, matches[:4]))
        raise UserError(f"{what}: {wanted!r} fits {len(matches)} members; write one in full: {listed}")
    return matches[0]


def unpack(archive: Path, wanted: str, to: Path, what: str) -> None:
    """Writes the file or folder `wanted` of `archive` to `to`; "" is all of it.

    Raises:
      UserError: no such member; a member that would be written elsewhere, or is no plain file.
    """
    with members(archive, what) as found:
        names = [one.name for one in found]
        chosen = choose(names, wanted, what)
        if wanted and not chosen:
            raise UserError(f"{what} has no member {wanted!r}{near(wanted, names, 'archive')}")
        for one in found:
            if chosen and one.name != chosen and not one.name.startswith(chosen + "/"):
                continue
            inside = one.name[len(chosen) :].removeprefix("/") if chosen else one.name
            target = under(to, inside, f"{what}: {one.name!r} of {archive.name!r}")
            if one.kind != "file":
                refused = f"refusing {one.name!r} of {archive.name!r}: it is a {one.kind}"
                raise UserError(f"{what}: {refused}; only plain files are unpacked, choose a member that is one")
            with one.open() as file:
                copy(chunks(file), target)


def under(base: Path, inside: str, what: str) -> Path:
    """Returns `base/inside`, refusing a path that would leave `base`."""
    if ".." in PurePosixPath(inside).parts or inside.startswith("/") or re.search(r"\\|^[A-Za-z]:", inside):
        raise UserError(f"{what}: refused, it would be written outside its folder; choose another archive or member")
    return base / inside if inside else base


def near(name: str, known: list[str], where: str) -> str:
    """Returns "; did you mean …?" with the paths nearest to `name`, whole or by last part, or else the first few."""
    by_last = {PurePosixPath(path).name: path for path in reversed(known)}
    close = [by_last[last] for last in difflib.get_close_matches(PurePosixPath(name).name, list(by_last), 3, 0.6)]
    close = list(dict.fromkeys([*close, *difflib.get_close_matches(name, known, 3, 0.6)]))[:3]
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; the {where} holds {', '.join(map(repr, known[:8])) or 'nothing'}{' …' if len(known) > 8 else ''}"


def copy(parts: Iterable[bytes], to: Path, total_bytes: int = 0) -> int:
    """Writes `parts` to `to` and returns their bytes; a copy of over two seconds shows progress and the time left."""
    to.parent.mkdir(parents=True, exist_ok=True)
    start = shown = time.monotonic()
    done_bytes = 0
    with to.open("wb") as file:
        for part in parts:
            file.write(part)
            done_bytes += len(part)
            now = time.monotonic()
            if now - shown > (2 if sys.stderr.isatty() else 15):
                shown = now
                rate = done_bytes / (now - start)
                left = (
                    f" of {total_bytes / 1e6:.0f}, {(total_bytes - done_bytes) / rate:.0f} s left"
                    if total_bytes
                    else ""
                )
                print(f"{to.name}: {done_bytes / 1e6:.0f} MB{left}", file=sys.stderr)
    return done_bytes


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    """Yields what is left of `file`, 1 MiB at a time."""
    return iter(lambda: file.read(CHUNK_BYTES), b"")

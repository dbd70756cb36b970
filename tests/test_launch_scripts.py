"""The launch scripts: they parse, explain themselves, and print exactly the commands they would run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("tpu_vm.sh", "queued_resource.sh")
ARGS = ("--name=my tpu", "--zone=us-west4-a", "--type=v5litepod-16", "--workdir=gs://bucket/my runs")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launch scripts are for bash")


def call(script: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=60, check=False
    )


@pytest.fixture
def repo(tmp_path):
    """The scripts beside a config whose name needs quoting."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "my $HOME run.py").write_text("")
    return tmp_path


@pytest.fixture
def fake_gcloud(tmp_path):
    """Puts a `gcloud` first in PATH: it logs its arguments; each run ends with the next code of the file `codes`."""
    tool = tmp_path / "bin" / "gcloud"
    tool.parent.mkdir()
    tool.write_text(f"""#!/usr/bin/env bash
cd {shlex.quote(str(tmp_path))}
echo "$@" | head -1 >> log
case "$*" in
  *" describe "*) cat state ;;
  *jaxtune.launch*) code=$(head -1 codes); sed -i.old 1d codes
    if [ "$code" = gone ]; then echo SUSPENDED > state; exit 255; fi; exit "$code" ;;
  *" create "*) echo ACTIVE > state ;;
esac
""")
    tool.chmod(0o755)
    (tmp_path / "state").write_text("ACTIVE\n")
    return {"GRACE_SECONDS": "0", "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_parses_and_explains_itself(script):
    assert subprocess.run(["bash", "-n", ROOT / "launch" / script], check=False).returncode == 0
    done = call(ROOT / "launch" / script, "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--zone=",), "--zone is missing"),
        (("--nonsense",), "unknown option --nonsense"),
        (("--type=v99-8",), "give --version"),
        (("--config=configs/none.py",), "there is no configs/none.py"),
    ],
)
def test_wrong_options(repo, script, change, message):
    done = call(repo / "launch" / script, *ARGS, "--config=configs/my $HOME run.py", *change, "--dry-run")
    assert done.returncode == 2
    assert message in done.stderr
    assert not commands(done.stdout)


def test_queue_needs_a_workdir_that_outlives_the_vm(repo):
    done = call(repo / "launch" / "queued_resource.sh", *ARGS, "--config=configs/my $HOME run.py", "--workdir=runs/x")
    assert done.returncode == 2
    assert "expected gs://" in done.stderr


def test_tpu_vm_dry_run(repo):
    done = call(
        *(
            repo / "launch" / "tpu_vm.sh",
            *ARGS,
            "--config=configs/my $HOME run.py",
            "--project=p",
            "--spot",
            "--delete",
            "--dry-run",
        ),
        *("--", "--config.train.steps=3", "--config.name=a 'b'"),
    )
    assert done.returncode == 0, done.stderr
    create, _, copy, install, run, delete = commands(done.stdout)
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "my tpu"]
    assert {"--zone=us-west4-a", "--project=p", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)
    assert "--version=v2-alpha-tpuv5-lite" in create
    assert copy[4:5] == ["scp"]
    for step in (copy, install, run):
        assert {"--worker=all", "--zone=us-west4-a", "--project=p"} <= set(step)
    (remote,) = [word.removeprefix("--command=") for word in run if word.startswith("--command=")]
    words = shlex.split(remote)
    assert words[:6] == ["cd", "jaxtune", "&&", ".venv/bin/python", "-m", "jaxtune.launch"]
    assert words[6:8] == ["--config=configs/my $HOME run.py", "--workdir=gs://bucket/my runs"]
    assert words[8:] == ["--config.train.steps=3", "--config.name=a 'b'"]
    assert delete[4:6] == ["delete", "my tpu"]
    assert "--quiet" in delete


def test_local_workdir_is_fetched_from_the_first_host(repo):
    done = call(
        repo / "launch" / "tpu_vm.sh",
        *ARGS,
        "--config=configs/my $HOME run.py",
        "--workdir=runs/x",
        "--existing",
        "--dry-run",
    )
    fetch = commands(done.stdout)[-1]
    assert fetch[3:7] == ["tpu-vm", "scp", "--recurse", "my tpu:jaxtune/runs/x"]
    assert "--worker=0" in fetch
    assert "costs money" in done.stderr
    assert not any("create" in command for command in commands(done.stdout))


def test_queued_dry_run(repo):
    done = call(
        repo / "launch" / "queued_resource.sh",
        *ARGS,
        "--config=configs/my $HOME run.py",
        "--spot",
        "--valid-until=6h",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    listed = commands(done.stdout)
    assert listed[0][2:6] == ["tpus", "queued-resources", "create", "my tpu-request"]
    wanted = {"--node-id=my tpu", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"}
    assert wanted | {"--valid-until-duration=6h", "--zone=us-west4-a"} <= set(listed[0])
    assert any("--config=configs/my\\ \\$HOME\\ run.py" in word for command in listed for word in command)
    assert listed[-1][3:6] == ["queued-resources", "delete", "my tpu-request"]
    assert "--force" in listed[-1]


@pytest.mark.parametrize(
    ("codes", "exit_code", "requests", "resumed"),
    [
        (["0"], 0, 1, 0),
        (["75", "0"], 0, 1, 1),  # saved: resume on the slice that is still there
        (["gone", "75", "0"], 0, 2, 2),  # preempted: a new slice, then resume twice
        (["255", "0"], 0, 1, 1),  # the connection was lost
        (["1"], 1, 1, 0),  # a real failure is not retried
        (["75", "75", "75"], 75, 1, 2),  # more than --retries
    ],
)
def test_preemption_resumes(repo, fake_gcloud, codes, exit_code, requests, resumed):
    (repo / "codes").write_text("\n".join(codes) + "\n")
    done = call(
        repo / "launch" / "queued_resource.sh", *ARGS, "--config=configs/my $HOME run.py", "--retries=2", **fake_gcloud
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    log = (repo / "log").read_text().splitlines()
    assert sum("queued-resources create" in line for line in log) == requests
    runs = [line for line in log if "jaxtune.launch" in line]
    assert sum("--config.checkpoint.resume=True" in line for line in runs) == resumed
    assert "queued-resources delete" in log[-1]

#!/usr/bin/env bash
# Trains on a Cloud TPU VM: create, install, run on every host, fetch the results, delete on request.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --config=FILE [options] [-- ARGUMENTS]

  --name=NAME         of the TPU VM
  --zone=ZONE         e.g. us-west4-a
  --type=TYPE         accelerator type: v4-8, v5litepod-8, v5p-8, v6e-8 ...
  --config=FILE       config, by its path in the repository: configs/quickstart.py
  --workdir=PATH      gs://bucket/folder, or a folder on the VM, fetched at the end (default: runs/NAME)
  --project=PROJECT   Google Cloud project (default: gcloud's own)
  --version=VERSION   TPU software version (default: by the type)
  --spot              cheaper; the VM can be taken back at any moment (see queued_resource.sh)
  --existing          the VM is there: do not create it
  --delete            delete the VM afterwards, whatever happened; without it the VM goes on costing money
  --dry-run           print the commands and run none
  -- ARGUMENTS        go to python -m jaxtune.launch, e.g. --config.train.steps=100

Exit code: the run's own; 75 means that it saved its state and wants to be resumed.
TEXT
}

fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }

name='' zone='' type='' config='' workdir='' project='' version='' spot='' existing='' delete='' dry=''
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=1 ;;
    --existing) existing=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1; see --help" ;;
  esac
  shift
done
for option in name zone type config; do
  [ -n "${!option}" ] || fail "--$option is missing; see --help"
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$root/$config" ] || fail "there is no $config in $root; --config takes a path inside the repository"
workdir=${workdir:-runs/$name}
if [ -z "$version" ]; then
  case "$type" in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "no software version is known for type $type; give --version" ;;
  esac
fi

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [ -n "$dry" ] || "$@"
}

where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --ssh-flag=-oServerAliveInterval=30 "--command=$1"
}

archive=$(mktemp "${TMPDIR:-/tmp}/jaxtune.XXXXXX")
finish() {
  code=$?
  rm -f "$archive"
  if [ -n "$delete" ]; then
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet || echo "DELETE FAILED: $name still costs money" >&2
  else
    echo "$name is still there and costs money: gcloud compute tpus tpu-vm delete $name ${where[*]}" >&2
  fi
  exit "$code"
}
trap finish EXIT

if [ -z "$existing" ]; then
  create=(gcloud compute tpus tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version")
  # The VM reads and writes gs:// as its service account: it needs the scope as well as the role.
  run "${create[@]}" --scopes=https://www.googleapis.com/auth/cloud-platform ${spot:+--spot}
fi

run tar -czf "$archive" -C "$root" --exclude=.git --exclude='.venv*' --exclude=./runs .
run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxtune.tgz" "${where[@]}" --worker=all
# TPU images bring Python 3.10; uv fetches a newer one without root.
on_all_hosts 'set -e; mkdir -p jaxtune; tar -xzf jaxtune.tgz -C jaxtune; cd jaxtune
if [ ! -x .venv/bin/python ]; then
  if python3 -c "import sys, ensurepip; sys.exit(sys.version_info < (3, 11))"; then python3 -m venv .venv
  else python3 -m pip install --quiet --user uv; python3 -m uv venv --seed --python 3.12 .venv; fi
fi
.venv/bin/python -m pip install --quiet -r requirements.lock -e ".[tpu,gcs]"'

command='cd jaxtune && .venv/bin/python -m jaxtune.launch'
command+=$(printf ' %q' "--config=$config" "--workdir=$workdir" "$@")
code=0
on_all_hosts "$command" || code=$?

case "$workdir" in
  gs://*) echo "results: $workdir" ;;
  *) # the first host writes metrics, report and export; ~/jaxtune is where the run started
    case "$workdir" in /*) from=$workdir ;; *) from=jaxtune/$workdir ;; esac
    run mkdir -p "$root/runs"
    run gcloud compute tpus tpu-vm scp --recurse "$name:$from" "$root/runs/" "${where[@]}" --worker=0 || [ "$code" -ne 0 ] || code=1 ;;
esac
exit "$code"

#!/usr/bin/env bash
# Trains on a TPU slice from the queue: request, wait, run, and after each preemption request again and resume.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/queued_resource.sh --name=NAME --zone=ZONE --type=TYPE --config=FILE --workdir=gs://… [options] [-- ARGUMENTS]

  --name=NAME         of the TPU VM; the queued resource is NAME-request
  --zone=ZONE         e.g. us-west4-a
  --type=TYPE         accelerator type: v4-8, v5litepod-16, v5p-32, v6e-64 ...
  --config=FILE       config, by its path in the repository
  --workdir=gs://…    where the run keeps its state: it must outlive the VM
  --project=PROJECT   Google Cloud project (default: gcloud's own)
  --version=VERSION   TPU software version (default: by the type)
  --spot              spot capacity: cheaper, can be taken back at any moment
  --valid-until=TIME  give up waiting in the queue after this long, e.g. 6h (default: wait for ever)
  --retries=N         resume at most N times (default: 20)
  --keep              keep the slice at the end; it goes on costing money
  --dry-run           print the commands and run none
  -- ARGUMENTS        go to python -m jaxtune.launch

Exit code: the run's own.
TEXT
}

fail() { echo "queued_resource.sh: $*" >&2; exit 2; }

name='' zone='' type='' config='' workdir='' project='' version='' spot='' valid='' retries=20 keep='' dry=''
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
    --valid-until=*) valid=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --keep) keep=1 ;;
    --dry-run) dry=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1; see --help" ;;
  esac
  shift
done
for option in name zone type config workdir; do
  [ -n "${!option}" ] || fail "--$option is missing; see --help"
done
case "$workdir" in gs://*) ;; *) fail "--workdir is $workdir; expected gs://…: what is on the VM is lost with it" ;; esac
case "$retries" in '' | *[!0-9]*) fail "--retries is $retries; expected a number" ;; esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/../$config" ] || fail "there is no $config in the repository"
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

request=$name-request
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
queued=(gcloud compute tpus queued-resources)

state() { "${queued[@]}" describe "$request" "${where[@]}" '--format=value(state.state)' 2>/dev/null || echo GONE; }

obtain() {
  local options=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version")
  options+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  [ -z "$spot" ] || options+=(--spot)
  [ -z "$valid" ] || options+=("--valid-until-duration=$valid")
  run "${queued[@]}" create "$request" "${where[@]}" "${options[@]}"
  if [ -n "$dry" ]; then
    run "${queued[@]}" describe "$request" "${where[@]}" '--format=value(state.state)'
    return
  fi
  local now='' last=''
  while now=$(state) && [ "$now" != ACTIVE ]; do
    [ "$now" = "$last" ] || echo "$(date +%H:%M:%S) $request: $now"
    last=$now
    case "$now" in FAILED | SUSPENDING | SUSPENDED | GONE) return 1 ;; esac
    sleep 30
  done
}

release() { run "${queued[@]}" delete "$request" "${where[@]}" --force --quiet; }

held=''
finish() {
  code=$?
  if [ -n "$held" ] && [ -n "$keep" ]; then
    echo "$name is still there and costs money: ${queued[*]} delete $request ${where[*]} --force" >&2
  elif [ -n "$held" ]; then
    release || echo "DELETE FAILED: $request may still cost money" >&2
  fi
  exit "$code"
}
trap finish EXIT

train=("$here/tpu_vm.sh" "--name=$name" "--zone=$zone" "--type=$type" "--config=$config" "--workdir=$workdir" --existing)
train+=("--version=$version")
[ -z "$project" ] || train+=("--project=$project")
[ -z "$dry" ] || train+=(--dry-run)
train+=(-- "$@")

attempt=0
while :; do
  if [ -z "$held" ]; then
    held=1
    obtain || fail "the request for $type in $zone was not granted; see: ${queued[*]} describe $request ${where[*]}"
  fi
  code=0
  "${train[@]}" || code=$?
  [ "$code" -ne 0 ] || exit 0
  [ "$code" -ne 2 ] || exit 2 # a wrong option: trying again would say the same
  # 75: saved, resume me. 255: ssh lost the host. Any other code counts as a preemption only when the slice is really
  # gone, which the queue notices late: the hosts that survive fail first.
  [ "$code" -eq 75 ] || sleep "${GRACE_SECONDS:-60}"
  now=$(state)
  if [ "$code" -ne 75 ] && [ "$code" -ne 255 ] && [ "$now" = ACTIVE ]; then exit "$code"; fi
  attempt=$((attempt + 1))
  [ "$attempt" -le "$retries" ] || { echo "queued_resource.sh: gave up after $retries retries" >&2; exit "$code"; }
  echo "attempt $attempt of $retries: exit code $code, slice $now; resuming from $workdir"
  [ "$attempt" -gt 1 ] || train+=(--config.checkpoint.resume=True)
  if [ "$now" != ACTIVE ]; then
    release || true # it may be gone already
    held=''
  fi
done

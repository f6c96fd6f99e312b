#!/usr/bin/env bash
# Starts one run on every worker of a TPU VM slice, over ssh.
#
#   launch/tpu_vm.sh NAME ZONE CONFIG WORKDIR [flags of rrt train ...]
#   launch/tpu_vm.sh my-v5e-16 us-west4-a experiments/tinyllama_11x2.py \
#       /mnt/shared/runs/a --config.mesh.fsdp=16
#
# WORKDIR lies on a disk that all workers mount. The checkout is copied to every worker and
# installed there once; the same command resumes a run. PROJECT names another project than
# gcloud's default. DRY=1 prints the commands instead.
set -euo pipefail

if (($# < 4)); then
  sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4

run() {
  if [[ -n ${DRY:-} ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
gcloud_tpu() {
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" --zone="$zone" --worker=all \
    ${PROJECT:+--project="$PROJECT"}
}

root=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz --output="$archive" HEAD

gcloud_tpu scp "$archive" "$name:rrt.tar.gz"
gcloud_tpu ssh "$name" --command="set -e
  mkdir -p rrt && tar xzf rrt.tar.gz -C rrt
  [ -d rrt-venv ] || python3 -m venv rrt-venv
  rrt-venv/bin/pip install -q -e './rrt[train,convert,tpu]'"
gcloud_tpu ssh "$name" --command="cd rrt && ../rrt-venv/bin/python -m rrt.train --distributed \
--config=$(printf '%q' "$config") --workdir=$(printf '%q' "$workdir") $(printf '%q ' "$@")"

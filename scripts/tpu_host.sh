#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'END'
Becomes train.py on one host of Cloud TPU VMs; scripts/tpu_vm.sh starts it on every host.

    scripts/tpu_host.sh [--dry-run] [ARGUMENTS of train.py]

Sets JAX_COORDINATOR_ADDRESS, unless it is set, to the first host that the metadata server names: worker 0
of slice 0. JAX takes the number of processes and its own place among them from the same server.

--dry-run, or DRY_RUN=1, prints the address and the command instead of running it.
END
}

metadata() {
  curl --silent --show-error --fail --retry 5 --header Metadata-Flavor:Google \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Several slices have an address in tpu-env. Workers are listed as HOST,HOST or as NAME:ID:HOST,NAME:ID:HOST.
first_host() {
  local host
  host=$(metadata tpu-env | sed -n "s/^MEGASCALE_COORDINATOR_ADDRESS: *'\{0,1\}\([^':]*\).*/\1/p")
  if [[ -z $host ]]; then
    host=$(metadata worker-network-endpoints)
    host=${host%%,*}
    host=${host##*:}
  fi
  echo "$host"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit
fi
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${JAX_COORDINATOR_ADDRESS:-} ]]; then
  host=$(first_host)
  if [[ -z $host ]]; then
    echo "the metadata server names no host: is this a Cloud TPU VM?" >&2
    exit 1
  fi
  export JAX_COORDINATOR_ADDRESS="$host:8482" # the port that JAX takes where it chooses
fi
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" .venv/bin/python train.py "$@"
  echo
else
  exec .venv/bin/python train.py "$@"
fi

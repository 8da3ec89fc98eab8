#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'END'
Trains on TPU slices of GKE, from a machine that has xpk, gcloud and kubectl.

    scripts/xpk.sh [--dry-run] [ARGUMENTS of train.py]

Environment:
    CLUSTER, ZONE, PROJECT  the cluster, made with `xpk cluster create`
    WORKLOAD                name of the run there: small letters, digits and hyphens
    TYPE                    TPU type, for example v5litepod-16
    SLICES                  number of slices, 1 if not set
    STORAGE                 an xpk storage to mount, for a workdir that is not in a bucket (gs://)
    IMAGE                   image with everything of requirements-tpu.txt and tokenizers; without it every host
                            installs them into python:3.11 at every start
    RESTARTS                how often a run that died or was told to stop is started again, 0 if not set
    XPK_FLAGS               further flags of `xpk workload create`, separated by spaces
    LIBTPU_INIT_ARGS, JAX_COMPILATION_CACHE_DIR
                            passed on to train.py where set

--dry-run, or DRY_RUN=1, prints the command instead of running it. XPK_FLAGS=--dry-run runs xpk, which then prints
the manifest and what it would do.
END
}

DRY_RUN=${DRY_RUN:-0}
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit
fi
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${CLUSTER:?is needed}" "${ZONE:?is needed}" "${PROJECT:?is needed}" "${WORKLOAD:?is needed}" "${TYPE:?is needed}"

command="exec python train.py" # so that GKE's SIGTERM reaches it, not a shell around it
for argument; do command+=" $(printf %q "$argument")"; done
if [[ -z ${IMAGE:-} ]]; then
  command="pip install --quiet --requirement requirements-tpu.txt 'tokenizers>=0.21' && $command"
fi
tree=$(mktemp -d) # what is committed, without .venv and runs
trap 'rm -r "$tree"' EXIT
flags=(
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
  --workload="$WORKLOAD" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --max-restarts="${RESTARTS:-0}"
  --restart-on-exit-codes=1,75 # beside 42 and 127 to 255; not 2, bad settings
  --base-docker-image="${IMAGE:-python:3.11}" --script-dir="$tree" --command="$command"
)
if [[ -n ${STORAGE:-} ]]; then flags+=(--storage="$STORAGE"); fi
for variable in LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR; do
  if [[ -n ${!variable:-} ]]; then flags+=(--env="$variable=${!variable}"); fi
done
# shellcheck disable=SC2206
flags+=(${XPK_FLAGS:-})
if [[ $DRY_RUN == 1 ]]; then
  printf '%q ' xpk workload create "${flags[@]}"
  echo
else
  git archive HEAD | tar -x -C "$tree"
  xpk workload create "${flags[@]}"
fi

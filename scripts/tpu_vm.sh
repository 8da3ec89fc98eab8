#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'END'
Runs laep_jax on Cloud TPU VMs, from a machine that has gcloud.

    scripts/tpu_vm.sh [--dry-run] ACTION [ARGUMENTS]

    create [FLAGS]     a slice, or with SLICES several of them; FLAGS go to gcloud, for example --spot
    install            copies the committed tree to every host and installs it there
    each COMMAND       runs a shell command on every host
    train [ARGUMENTS]  starts train.py on every host, detached; ARGUMENTS are those of train.py
    log                follows what process 0 says
    stop               tells train.py on every host to save and end, and waits for it; the next `train` goes on from there
    delete             gives the machines back

Environment:
    NAME, ZONE         of the TPU; needed always
    TYPE               accelerator type, for example v5litepod-16; needed by create
    SLICES             number of slices, 1 if not set; the same in every call
    PROJECT            Google Cloud project, gcloud's own if not set
    VERSION            software version of the TPU VM; by default the one Google lists for TYPE
    LIBTPU_INIT_ARGS, JAX_COMPILATION_CACHE_DIR
                       passed on to train.py where set

--dry-run, or DRY_RUN=1, prints the commands instead of running them.
END
}

fail() {
  echo "$*" >&2
  exit 2
}

run() {
  if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() {
  run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

each() {
  tpu "$KIND" ssh "$NAME" "${HOSTS[@]}" --command="$1"
}

software() {
  case $TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "VERSION is needed for TYPE=$TYPE" ;;
  esac
}

create() {
  local version
  version=${VERSION:-$(software)}
  if ((SLICES == 1)); then
    tpu tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="$version" "$@"
  else
    tpu queued-resources create "$NAME" --accelerator-type="$TYPE" --runtime-version="$version" \
      --node-count="$SLICES" --node-prefix="$NAME" "$@"
  fi
}

install() {
  tree=$(mktemp -d)
  trap 'rm -r "$tree"' EXIT
  run git archive --prefix=laep_jax/ --output="$tree/laep_jax.tar.gz" HEAD
  tpu "$KIND" scp "$tree/laep_jax.tar.gz" "$NAME:" "${HOSTS[@]}"
  # uv brings its own Python: the one of the TPU VM may be older than 3.11.
  each "set -e; tar -xzf laep_jax.tar.gz; cd laep_jax; curl -LsSf https://astral.sh/uv/install.sh | sh; \
~/.local/bin/uv venv --clear --python 3.11; ~/.local/bin/uv pip install -r requirements-tpu.txt 'tokenizers>=0.21'"
}

train() {
  local command=(env) variable
  for variable in LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR; do
    if [[ -n ${!variable:-} ]]; then command+=("$variable=${!variable}"); fi
  done
  command+=(scripts/tpu_host.sh "$@")
  each "cd laep_jax; nohup $(printf '%q ' "${command[@]}")> ../train.log 2>&1 < /dev/null &"
}

main() {
  DRY_RUN=${DRY_RUN:-0}
  if [[ ${1:-} == --dry-run ]]; then
    DRY_RUN=1
    shift
  fi
  local action=${1:-}
  case $action in
    -h | --help) usage && exit ;;
    create | install | each | train | log | stop | delete) shift ;;
    *) usage >&2 && exit 2 ;;
  esac
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  SLICES=${SLICES:-1}
  : "${NAME:?is needed, the name of the TPU}" "${ZONE:?is needed, its zone}"
  KIND=tpu-vm HOSTS=(--worker=all) FIRST=(--worker=0)
  if ((SLICES > 1)); then
    KIND=queued-resources HOSTS=(--node=all --worker=all) FIRST=(--node=0 --worker=0)
  fi
  case $action in
    create) : "${TYPE:?is needed, for example v5litepod-16}" && create "$@" ;;
    each) [[ $# == 1 ]] || fail "each takes one command, in quotes" && each "$1" ;;
    log) tpu "$KIND" ssh "$NAME" "${FIRST[@]}" --command="tail --lines=100 --follow train.log" ;;
    # The bracket keeps pkill from ending its own shell.
    stop) each "pkill -TERM -f '[t]rain\.py'; while pgrep -f '[t]rain\.py' > /dev/null; do sleep 1; done" ;;
    delete)
      if ((SLICES > 1)); then
        tpu queued-resources delete "$NAME" --force
      else
        tpu tpu-vm delete "$NAME"
      fi
      ;;
    *) "$action" "$@" ;;
  esac
}

main "$@"

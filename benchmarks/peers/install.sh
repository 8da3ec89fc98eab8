#!/usr/bin/env bash
# Installs one of the programs that `python -m benchmarks peers` measures into an environment of its own.
#
#     bash benchmarks/peers/install.sh transformers|maxtext FOLDER
#
# makes FOLDER/transformers or FOLDER/maxtext anew. Its last line tells what is missing where that fails.
# FOLDER/NAME/installed.txt lists what was installed and is there only after success. TRANSFORMERS_PYTHON and
# MAXTEXT_PYTHON name other interpreters. On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares some GB of CUDA libraries.
set -euo pipefail

peer=$1
mkdir -p "$2"
environment=$(cd "$2" && pwd)/$peer
here=$(cd "$(dirname "$0")" && pwd)

# The first of the interpreters that runs and is at least Python 3.$1.
find_python() {
    local least=$1
    shift
    for python in "$@"; do
        if "$python" -c "import sys; sys.exit(sys.version_info < (3, $least))" 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    echo "needs Python 3.$least or newer, found none among: $*" >&2
    return 1
}

make_environment() {
    rm -rf "$environment"
    "$1" -m venv "$environment"
}

case $peer in
transformers)
    python=$(find_python 10 ${TRANSFORMERS_PYTHON:-python3 python3.13 python3.12 python3.11})
    make_environment "$python"
    "$environment/bin/pip" install --requirement "$here/transformers.txt"
    ;;
maxtext)
    python=$(find_python 12 ${MAXTEXT_PYTHON:-python3 python3.13 python3.12})
    make_environment "$python"
    # The wheel names no dependencies but carries lists of lower bounds, which are meant to be met at the bound.
    "$environment/bin/pip" install maxtext==0.2.5 uv
    lists=$("$environment/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/dependencies
    "$environment/bin/uv" pip install --python "$environment/bin/python" --resolution lowest \
        --requirement "$lists/requirements/generated_requirements/decoupled-requirements.txt"
    ;;
*)
    echo "no peer $peer; there are transformers and maxtext" >&2
    exit 2
    ;;
esac
"$environment/bin/pip" freeze >"$environment/installed.txt.part"
mv "$environment/installed.txt.part" "$environment/installed.txt"

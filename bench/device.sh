#!/usr/bin/env bash
# What a person runs on a machine with a GPU to check and time the kernels. That machine needs no TensorRT, no Python
# package and no network: everything is packed beforehand, on a machine with nvcc and this project's environment.
#
#   bench/device.sh pack DIR        builds the plugin library and its conformance runner, and writes the cases: DIR then
#                                   holds all that is needed, some 30 MB (ten minutes; CASES=2000 of each op,
#                                   ARCHITECTURES="90" of the library, JOBS=2)
#   bench/device.sh run DIR OUT     on the GPU's machine, under eight minutes: judges every case with every tactic,
#                                   times the layers of Scout and Maverick, and lets compute-sanitizer watch some cases
#                                   if it is there. One file for each in OUT; exit status 1 if one of them failed.
set -euo pipefail

usage() {
    sed -n '5,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

pack() {
    local to=$1 root
    root=$(cd "$(dirname "$0")/.." && pwd)
    mkdir -p "$to"
    cmake -S "$root" -B "$to/build" -DCMAKE_BUILD_TYPE=Release -DSHUNTYARD_CUDA=machine -DSHUNTYARD_CONFORMANCE=ON \
        -DSHUNTYARD_CUDA_ARCHITECTURES="${ARCHITECTURES:-90}" >"$to/build.log"
    cmake --build "$to/build" --parallel "${JOBS:-2}" --target shuntyard_plugins shuntyard_conformance >>"$to/build.log"
    cp "$to/build/plugins/native/libshuntyard_plugins.so" "$to/build/plugins/native/conformance/shuntyard_conformance" \
        "$to"
    rm -r "$to/build"
    cd "$root"
    python -m tests.plugins.conformance --cases "${CASES:-2000}" --sums tensor --large --write "$to/cases.bin.gz"
    # The plain kernels sum in fp32: they are held to closer bounds.
    python -m tests.plugins.conformance --cases "$((${CASES:-2000} / 10))" --seed 1 --write "$to/plain.bin.gz"
    python -m tests.plugins.conformance --timing --write "$to/timing.bin.gz"
    du -sh "$to"
}

# watched NAME SECONDS CASES RUNNER...: the runner, on cases from stdin, for at most so long; its words in NAME.txt.
watched() {
    local name=$1 seconds=$2 cases=$3 status=0
    shift 3
    echo "== $name"
    gzip -dc "$dir/$cases.bin.gz" | timeout -k 5 "$seconds" "$@" >"$out/$name.txt" 2>&1 || status=$?
    tail -n 12 "$out/$name.txt"
    if [ "$status" -ne 0 ]; then
        echo "$name: exit status $status (124: it took longer than $seconds s)" | tee -a "$out/$name.txt"
        failed=1
    fi
}

run() {
    dir=$1 out=$2 failed=0
    mkdir -p "$out"
    { nvidia-smi || true; uname -a; } >"$out/machine.txt" 2>&1
    local runner=("$dir/shuntyard_conformance" "$dir/libshuntyard_plugins.so" -)
    watched cases 140 cases "${runner[@]}" --every-tactic
    watched shifted 30 plain "${runner[@]}" --shift 4
    watched plain 30 plain "${runner[@]}" --tactic 1 --only experts-
    watched timing 110 timing "${runner[@]}" --time
    # But for the plain kernels, of which a large call takes seconds.
    watched tactics 60 timing "${runner[@]}" --time --every-tactic --except 1 --only "Scout linear channel dynamic uniform"
    if command -v compute-sanitizer >/dev/null; then
        local tool
        for tool in memcheck racecheck; do
            watched "$tool" 55 cases compute-sanitizer --tool "$tool" --error-exitcode 9 "${runner[@]}" --every-tactic \
                --every 100
        done
    else
        echo "compute-sanitizer is not there: nothing watched the memory" | tee "$out/sanitizer.txt"
    fi
    return "$failed"
}

case "${1:-}" in
    pack) [ $# -eq 2 ] || usage; pack "$2" ;;
    run) [ $# -eq 3 ] || usage; run "$2" "$3" ;;
    *) usage ;;
esac

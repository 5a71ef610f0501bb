#!/usr/bin/env bash
# What a person runs on a machine with a GPU to check and time the kernels. That machine needs no TensorRT, no Python
# package and no network: everything is packed beforehand, on a machine with nvcc and this project's environment.
#
#   bench/device.sh pack DIR        builds the plugin library and its conformance runner, and writes the cases: DIR then
#                                   holds all that is needed, some 30 MB (ten minutes; CASES=2000 of each op,
#                                   ARCHITECTURES="90" of the library, JOBS=2, PYTHON=.venv/bin/python). DIR must not
#                                   be there yet, or be empty; it appears when it is complete
#   bench/device.sh run DIR OUT     on the GPU's machine, under eight minutes: judges every case with every tactic,
#                                   times the layers of Scout and Maverick, and lets compute-sanitizer watch some cases
#                                   if it is there. One file for each in OUT; exit status 1 if one of them failed,
#                                   2 if it could not run.
set -euo pipefail
unset CDPATH

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
packed=(shuntyard_conformance libshuntyard_plugins.so cases.bin.gz plain.bin.gz timing.bin.gz)
work='' partial='' # what must not stay behind, whatever happens

clean_up() {
    rm -rf ${work:+"$work"} ${partial:+"$partial"}
}
trap clean_up EXIT

usage() {
    sed -n '5,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 2
}

# The Python of this project's environment, as a path that holds from everywhere; links in it are what makes it that.
find_python() {
    local given=${PYTHON:-} found
    if [ -z "$given" ]; then
        given=$root/.venv/bin/python
        [ -x "$given" ] || given=python3
    fi
    found=$(command -v -- "$given") ||
        fail "there is no Python at $given" "PYTHON=PATH says which one has this project installed"
    printf '%s/%s\n' "$(cd "$(dirname "$found")" && pwd)" "$(basename "$found")"
}

# logged COMMAND...: its words go to the log, and the last of them to stderr if it fails.
logged() {
    if ! "$@" >>"$partial/build.log" 2>&1; then
        tail -n 20 "$partial/build.log" >&2
        fail "$(basename "$1") fails: its last lines stand above" "nothing was left behind; mend it and pack again"
    fi
}

pack() {
    local to python cmake found count=${CASES:-2000} jobs=${JOBS:-2}
    to=$(realpath -m -- "$1")
    [[ $count =~ ^[1-9][0-9]*$ ]] || fail "CASES is '$count'" "give a whole number, at least 1"
    [[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "JOBS is '$jobs'" "give a whole number, at least 1"
    if [ -e "$to" ] && { [ ! -d "$to" ] || [ -n "$(ls -A -- "$to")" ]; }; then
        fail "$to is there already" "give a directory that does not exist yet, or an empty one"
    fi
    python=$(find_python) || exit
    cd "$root" # where the tests are a package
    found=$("$python" -c 'import ml_dtypes, numpy, tests.plugins.conformance.__main__' 2>&1) ||
        fail "$python cannot make cases: $(tail -n 1 <<<"$found")" \
            "install this project there, with its packages for development, or say PYTHON=PATH of another"
    cmake=$(PATH=$(dirname "$python"):$PATH command -v cmake) ||
        fail "there is no cmake" "install it in PATH or beside $python"
    PATH=$PATH:${CUDA_HOME:-/none}/bin:${CUDA_PATH:-/none}/bin:/usr/local/cuda/bin command -v nvcc >/dev/null ||
        fail "there is no nvcc" "install a CUDA toolkit, and say CUDA_HOME=PATH if nvcc is not in PATH"
    { mkdir -p "$(dirname "$to")" && [ -w "$(dirname "$to")" ]; } 2>/dev/null ||
        fail "$(dirname "$to") cannot be written" "give a directory elsewhere"
    mkdir "$to.partial" 2>/dev/null ||
        fail "$to.partial is there already" "another pack is at work on it, or was killed: then remove it"
    partial=$to.partial
    work=$(mktemp -d)

    logged "$cmake" -S "$root" -B "$work" -DCMAKE_BUILD_TYPE=Release -DSHUNTYARD_CUDA=machine \
        -DSHUNTYARD_CONFORMANCE=ON -DSHUNTYARD_CUDA_ARCHITECTURES="${ARCHITECTURES:-90}"
    logged "$cmake" --build "$work" --parallel "$jobs" --target shuntyard_plugins shuntyard_conformance
    cp "$work/plugins/native/libshuntyard_plugins.so" "$work/plugins/native/conformance/shuntyard_conformance" \
        "$partial"
    cases "$count" --sums tensor --large --write "$partial/cases.bin.gz"
    # The plain kernels sum in fp32: they are held to closer bounds.
    cases "$(((count + 9) / 10))" --seed 1 --write "$partial/plain.bin.gz"
    cases 1 --timing --write "$partial/timing.bin.gz"
    [ ! -d "$to" ] || rmdir "$to"
    mv -T "$partial" "$to"
    partial=''
    du -sh "$to"
}

cases() {
    "$python" -m tests.plugins.conformance --cases "$@" || fail "the cases cannot be made" "the reason stands above"
}

# watched NAME SECONDS CASES RUNNER...: the runner, on cases from stdin, for at most so long; its words in NAME.txt.
watched() {
    local name=$1 seconds=$2 cases=$3 status=0 remark=''
    shift 3
    echo "== $name"
    gzip -dc "$dir/$cases.bin.gz" | timeout -k 5 "$seconds" "$@" >"$out/$name.txt" 2>&1 || status=$?
    tail -n 12 "$out/$name.txt"
    if [ "$status" -ne 0 ]; then
        [ "$status" -ne 124 ] || remark=": it took longer than $seconds s"
        echo "$name: exit status $status$remark" | tee -a "$out/$name.txt"
        failed=1
    fi
}

# One case: is there a device, and does the runner start?
probe() {
    local said status=0
    said=$(gzip -dc "$dir/plain.bin.gz" | timeout -k 5 60 "${runner[@]}" --every 1000000 2>&1) || status=$?
    said=$(tail -n 1 <<<"$said")
    case $status:$said in
        2:*"there is no CUDA device"*)
            fail "${said#shuntyard_conformance: }" "run this on a machine with a GPU and its driver; nvidia-smi lists both" ;;
        2:* | 126:* | 127:*)
            fail "the runner cannot run here: $said" "pack it on a machine like this one (system, processor, C library)" ;;
        124:*) fail "the runner took longer than 60 s for one case" "see with nvidia-smi what else the GPU does" ;;
    esac
}

run() {
    local file
    dir=$(realpath -m -- "$1") out=$(realpath -m -- "$2") failed=0
    for file in "${packed[@]}"; do
        [ -s "$dir/$file" ] || fail "$dir/$file is missing" "give the directory that '$0 pack DIR' has made, whole"
    done
    for file in "$dir"/*.gz; do
        gzip -t "$file" 2>/dev/null || fail "$file is damaged" "copy the packed directory again"
    done
    [ -x "$dir/shuntyard_conformance" ] ||
        fail "$dir/shuntyard_conformance may not be run" "chmod +x: some ways to copy lose that"
    runner=("$dir/shuntyard_conformance" "$dir/libshuntyard_plugins.so" -)
    probe
    { mkdir -p "$out" && [ -w "$out" ]; } 2>/dev/null || fail "$out cannot be written" "give another directory for OUT"
    { nvidia-smi || true; uname -a; } >"$out/machine.txt" 2>&1
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

case "${1:-}:$#" in
    pack:2) pack "$2" ;;
    run:3) run "$2" "$3" ;;
    -h:1 | --help:1) usage ;;
    *)
        usage >&2
        exit 2
        ;;
esac

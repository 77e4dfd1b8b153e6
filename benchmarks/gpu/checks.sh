#!/usr/bin/env bash
# What a GPU has to show, one part after the other, each with a time limit: where a GPU is lent by the minute.
#
#   OUT=FOLDER_FOR_LOGS [PYTHON=python3] benchmarks/gpu/checks.sh [tests] [lsun] [sd14] [features] [compiled]
#
# Without a name: all of them. Beside an H100 or H200 and 16 cores the first took 25 s, the second 46, the third, with
# four images, 73; the others were never timed. They want the GPU for themselves; CIFAR-10 is benchmarks/gpu/cifar10.sh.
set -uo pipefail
: "${OUT:?a folder for the logs}"
mkdir -p "$OUT"
out=$(realpath "$OUT")
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

part() { # NAME SECONDS COMMAND…
    timeout "$2" "${@:3}" > "$out/$1.log" 2>&1
    echo "$1: exit status $? after $SECONDS s in all; $(tail -n 1 "$out/$1.log")"
}

step() { part "$1" "$2" "$python" -m benchmarks.finetune_step --device cuda --rounds 7 "${@:3}"; }

[ $# -gt 0 ] || set -- tests lsun sd14 features compiled
for name; do
    case $name in
        tests) part tests 120 "$python" -m pytest -v -m gpu tests/unit tests/integration/test_families.py ;;
        lsun) step lsun 120 --shape lsun --batch-size 8 --leave-out compile ;;
        sd14) step sd14 150 --shape sd14 --batch-size 8 --leave-out channels_last compile ;;
        features) part features 120 "$python" -m benchmarks.features --device cuda --num-images 2000 --rounds 1 ;;
        compiled) step compiled 400 --shape lsun --batch-size 8 --leave-out channels_last ;;
        *) echo "unknown: $name" && exit 2 ;;
    esac
done

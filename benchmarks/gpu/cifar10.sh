#!/usr/bin/env bash
# One piece of CIFAR-10's whole way, at most PIECE_SECONDS long; call it again until it prints the table.
#
#   IMAGES=FOLDER_OF_JPEGS STATE=FOLDER [DEVICE=cuda] [PIECE_SECONDS=540] [CARRY=all] [TOY=1] benchmarks/gpu/cifar10.sh [OPTION …]
#
# All that one piece leaves the next is in STATE, in files of at most 15 MB (benchmarks/gpu/parted_state.py), so that
# pieces may run on different machines. CARRY=model takes the pretrained model alone along, 60 MB: decouple, merge and
# evaluate must then fit in one piece. Options go to benchmarks.gpu.cifar10 (--help). The result is STATE/result.json
# beside the parts.
set -euo pipefail
: "${IMAGES:?a folder of images, for example CIFAR-10 as JPEG files}" "${STATE:?a folder for what pieces leave behind}"
images=$(realpath "$IMAGES") state=$(realpath -m "$STATE")
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" -m benchmarks.gpu.cifar10 --images "$images" --state "$state" --device "${DEVICE:-cuda}" \
    --piece-seconds "${PIECE_SECONDS:-540}" --carry "${CARRY:-all}" ${TOY:+--toy} "$@"

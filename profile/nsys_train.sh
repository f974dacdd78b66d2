#!/bin/sh
# Captures steps of a training run with nsys, exports the capture, and reports on it.
#
#   profile/nsys_train.sh --recipe real_gesture --out runs/profiled --data.root /data/gesture ...
#
# Arguments are those of train.py; --out is required. START (default 20) steps warm up, then STEPS
# (default 10) are captured: cuDNN has chosen its algorithms and the loader's queue is filled by
# then. The run ends with the capture. PYTHON and NSYS name the programs.
set -eu

PYTHON=${PYTHON:-python}
NSYS=${NSYS:-nsys}
START=${START:-20}
STEPS=${STEPS:-10}
here=$(dirname "$0")

fail() {
    echo "nsys_train.sh: $1" >&2
    exit 2
}

out=
next=
for argument; do
    if [ -n "$next" ]; then out=$argument; next=; fi
    case $argument in
        --out) next=yes ;;
        --out=*) out=${argument#--out=} ;;
    esac
done
[ -n "$out" ] || fail "--out: name the run folder, as for train.py."
command -v "$NSYS" > /dev/null || fail "$NSYS is not installed; it comes with NVIDIA Nsight Systems. Without it: train.py ... --log.profile torch."

folder=$out/profile
mkdir -p "$folder"
# The run calls cudaProfilerStart and cudaProfilerStop around the steps. Graphs are shown by their
# kernels. Sampling of the processor is off: it slows down the decoders that are to be measured.
code=0
"$NSYS" profile --trace=cuda,nvtx,osrt --sample=none --cpuctxsw=none \
    --capture-range=cudaProfilerApi --capture-range-end=stop-shutdown --kill=sigterm \
    --cuda-graph-trace=node --force-overwrite=true --output="$folder/nsys" \
    "$PYTHON" "$here/../train.py" "$@" \
    --log.profile nsys --log.profile_start "$START" --log.profile_steps "$STEPS" \
    --train.max_steps $((START + STEPS + 1)) || code=$?
# 143: nsys ended the run after the capture, as asked.
[ "$code" -eq 0 ] || [ "$code" -eq 143 ] || exit "$code"
[ -e "$folder/nsys.nsys-rep" ] || fail "nsys captured nothing; did the run reach step $START on a GPU?"
"$NSYS" export --type=sqlite --force-overwrite=true --output="$folder/nsys.sqlite" "$folder/nsys.nsys-rep"
"$PYTHON" "$here/nsys_report.py" "$folder/nsys.sqlite"

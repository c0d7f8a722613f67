#!/usr/bin/env bash
# Train on one machine: one process a card, or two processes on a machine without cards.
#
#   launch/torchrun.sh tiny --parallel.ep 2
#   NPROC=8 launch/torchrun.sh moe-3b --name first --train.steps 100
#
# All words go to `python -m launch train`. Settings, each overridden by the environment:
#   NPROC            processes
#   OMP_NUM_THREADS  threads a process (torchrun alone would say 1)
#   PYTHON           the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
cards=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$((cards > 0 ? cards : 2))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}

# glibc hands large blocks back to the kernel at once, and each page of the next one faults again. Kept instead, gathers
# of table rows are four times as fast and a training step on a CPU gains 7 to 11 % (2 cores, AMX). malloc reads these
# when a process starts, so the program cannot set them itself.
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}

# Without --local-addr the processes ask for the address of the host's name, which containers may not know.
exec "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$NPROC" -m launch train "$@"

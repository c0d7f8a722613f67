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

. launch/malloc.sh

# Without --local-addr the processes ask for the address of the host's name, which containers may not know.
exec "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$NPROC" -m launch train "$@"

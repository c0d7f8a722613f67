#!/usr/bin/env bash
# Train under MPI: the processes find one another through mpi4py, on one machine or on those of a host file.
#
#   launch/mpirun.sh tiny --parallel.ep 2
#   NPROC=16 HOSTFILE=hosts launch/mpirun.sh moe-3b --name first
#
# All words go to `python -m launch train`. Settings, each overridden by the environment:
#   NPROC            processes, over all machines
#   HOSTFILE         Open MPI's host file: one "name slots=N" a line; every machine sees this directory under the same path
#   OMP_NUM_THREADS  threads a process
#   PYTHON, MPIRUN   the interpreter, Open MPI's mpirun
set -euo pipefail
cd "$(dirname "$0")/.."

bin=$([ -x .venv/bin/python ] && echo .venv/bin/ || true)
PYTHON=${PYTHON:-${bin}python$([ -n "$bin" ] || echo 3)}
MPIRUN=${MPIRUN:-$([ -x "${bin:-/}mpirun" ] && echo "${bin}mpirun" || echo mpirun)}
cards=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$((cards > 0 ? cards : 2))}

. launch/malloc.sh

options=(-n "$NPROC")
# mpirun would bind each process to one core; ours compute with several threads.
options+=(--bind-to none)
if [ -n "${HOSTFILE:-}" ]; then options+=(--hostfile "$HOSTFILE"); else options+=(--oversubscribe); fi
if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi  # as in a container
# Variables that other machines would not inherit. -x NAME passes a value of the user's, too.
for name in "${!MALLOC_@}" OMP_NUM_THREADS MASTER_ADDR MASTER_PORT; do
  if [ -n "${!name:-}" ]; then options+=(-x "$name"); fi
done

exec "$MPIRUN" "${options[@]}" "$PYTHON" -m launch train "$@"

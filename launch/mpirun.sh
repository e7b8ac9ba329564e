#!/usr/bin/env bash
# Trains with mpirun: NPROC ranks in all, on this host or on HOSTS. The ranks agree by mpi4py where they meet.
#
#   launch/mpirun.sh --steps 100
#   NPROC=16 HOSTS=node0:8,node1:8 launch/mpirun.sh --steps 100       MPICH, and Open MPI alike
set -euo pipefail
cd "$(dirname "$0")/.."
command -v mpiexec >/dev/null || PATH=$PATH:$PWD/.venv/bin  # what `make` installed
command -v mpiexec >/dev/null || { echo "$0: no mpiexec: activate your environment, or run \`make install\` first" >&2; exit 2; }

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 4))}  # without GPUs: 4 ranks on the processor

hosts=()
[ -z "${HOSTS:-}" ] || hosts=(--host "$HOSTS")

# `-m mpi4py`: a rank that fails ends the whole job.
exec mpiexec -n "$NPROC" "${hosts[@]}" python -m mpi4py examples/train.py "$@"

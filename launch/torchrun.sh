#!/usr/bin/env bash
# Trains with torchrun: one rank per GPU, or NPROC ranks, on one node or several.
#
#   launch/torchrun.sh --steps 100                                    one node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh ...     on the first of two nodes
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/torchrun.sh ...     on the second
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH=$PATH:$PWD/.venv/bin  # what `make` installed
command -v torchrun >/dev/null || { echo "$0: no torchrun: activate your environment, or run \`make install\` first" >&2; exit 2; }

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 4))}  # without GPUs: 4 ranks on the processor
NNODES=${NNODES:-1}

if [ "$NNODES" -eq 1 ]; then
    where=(--standalone)  # finds a free port by itself
else
    where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?which node is this, 0 to NNODES - 1?}"
           --master-addr "${MASTER_ADDR:?where is node 0?}" --master-port "${MASTER_PORT:-29500}")
fi

exec torchrun "${where[@]}" --nproc-per-node "$NPROC" examples/train.py "$@"

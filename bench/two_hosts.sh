#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces, a link between them that is slowed to RATE, and two ranks on each.
# Trains by plans as `make demo` does. Needs root, ip and tc; nothing leaves the machine.
#   bench/two_hosts.sh RATE [flags of examples/train.py]      e.g. bench/two_hosts.sh 200mbit --steps 10
set -euo pipefail
cd "$(dirname "$0")/.."
rate=${1:?usage: bench/two_hosts.sh RATE [flags of examples/train.py]}
shift
hosts=(seqpar-a seqpar-b)
cleanup() { for host in "${hosts[@]}"; do ip netns del "$host" 2>/dev/null || true; done; }
trap cleanup EXIT
cleanup
for host in "${hosts[@]}"; do ip netns add "$host"; ip -n "$host" link set lo up; done
ip link add link0 netns seqpar-a type veth peer name link0 netns seqpar-b
for i in 0 1; do
    ip -n "${hosts[$i]}" addr add "10.77.0.$((i + 1))/24" dev link0
    ip -n "${hosts[$i]}" link set link0 up
    ip netns exec "${hosts[$i]}" tc qdisc add dev link0 root tbf rate "$rate" burst 256kb latency 50ms
done
export GLOO_SOCKET_IFNAME=link0 OMP_NUM_THREADS=1
for i in 1 0; do
    ip netns exec "${hosts[$i]}" .venv/bin/torchrun --nnodes 2 --node-rank "$i" --nproc-per-node 2 \
        --master-addr 10.77.0.1 --master-port 29400 examples/train.py --plan --no-compare --logdir '' "$@" &
    last=$!
done
wait "$last"

#!/usr/bin/env bash
# The groups of a cluster as separate nodes on this machine: to try a run file's placement, and what happens when a node goes.
#   cluster/local.sh start     head, decode, teacher and student nodes, each with a folder of its own; prints the address
#   cluster/local.sh status    which of them run
#   cluster/local.sh kill NODE end one at once, as a machine that vanishes
#   cluster/local.sh stop      end them: only the processes that `start` recorded, never those of another Ray on this machine
set -euo pipefail

state=${VKD_LOCAL_DIR:-${TMPDIR:-/tmp}/vkd-local}  # short: sockets in it may have 107 characters
port=${VKD_LOCAL_PORT:-6399}
dashboard_port=${VKD_LOCAL_DASHBOARD_PORT:-8299}
cpus=${VKD_LOCAL_CPUS:-1}  # of each node but the head
store_bytes=${VKD_LOCAL_STORE_BYTES:-268435456}
ready_s=${VKD_LOCAL_READY_S:-120}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}  # `ray get-auth-token --generate` once, or RAY_AUTH_MODE=disabled on a machine of your own
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # `stop` means now
export RAY_USAGE_STATS_ENABLED=0

alive() {  # NODE: does the process that was recorded run, and is it ours (a number may have been given to another process since)?
  [ -r "$state/$1.pid" ] && { tr '\0' ' ' < "/proc/$(cat "$state/$1.pid")/cmdline"; } 2> /dev/null | grep -q "temp-dir=$state/$1 "
}

launch() {  # NODE ARGUMENT...: `ray start --block` as leader of a process group of its own
  local name=$1
  shift
  mkdir -p "$state/$name"
  setsid ray start --block --temp-dir="$state/$name" --object-store-memory="$store_bytes" "$@" \
    > "$state/$name.log" 2>&1 < /dev/null &
  echo $! > "$state/$name.pid"
}

wait_for() {  # NODE: until `ray start` says that its node runs
  for ((i = 0; i < ready_s * 5; i++)); do
    grep -q "Ray runtime started" "$state/$1.log" && return
    alive "$1" || break
    sleep 0.2
  done
  echo "$1 does not start:" >&2
  tail -n 20 "$state/$1.log" >&2
  exit 1
}

end() {  # SIGNAL NODE: its whole group, whose leader was recorded
  alive "$2" && kill "-$1" -- "-$(cat "$state/$2.pid")" 2> /dev/null || true
}

start() {
  local name
  mkdir -p "$state"
  for name in head decode teacher student; do
    if alive "$name"; then echo "$name runs already: cluster/local.sh stop" >&2; exit 1; fi
  done
  launch head --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" --num-cpus=0 --num-gpus=0 \
    --labels=vkd-group=head
  wait_for head
  for name in decode teacher student; do
    launch "$name" --address="127.0.0.1:$port" --num-cpus="$cpus" --num-gpus=0 --dashboard-agent-listen-port=0 \
      --labels="vkd-group=$name"
  done
  for name in decode teacher student; do wait_for "$name"; done
  echo "address 127.0.0.1:$port  jobs http://127.0.0.1:$dashboard_port  logs $state"
}

stop() {
  local name i
  for name in student teacher decode head; do end TERM "$name"; done
  for ((i = 0; i < 50; i++)); do
    running > /dev/null || break
    sleep 0.2
  done
  for name in student teacher decode head; do end KILL "$name"; rm -f "$state/$name.pid"; done
}

running() {
  local name found=1
  for name in head decode teacher student; do
    if alive "$name"; then echo "$name $(cat "$state/$name.pid")"; found=0; fi
  done
  return $found
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  status) running || { echo "nothing runs"; exit 1; } ;;
  kill) end KILL "${2:?NODE}" ;;
  *) sed -n '2,6p' "$0" | cut -c3-; exit 2 ;;
esac

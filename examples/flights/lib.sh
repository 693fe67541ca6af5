# What the demo needs besides s4: a cluster that goes away again, steps that are shown and timed, checks.
# Sourced by demo.sh.

TIMEFORMAT='  [%R s]'

title() { printf '\n# %s\n' "$*"; }

# Show the commands on stdin as a user would type them, run them, and say how long they took.
run() {
    local commands
    commands=$(cat)
    printf '$ %s\n' "$commands"
    # stdin is not ours to give away: a command that reads it must see an empty one
    time eval "$commands" </dev/null
}

# check WHAT WANTED GOT
check() {
    if [ "$2" != "$3" ]; then
        echo "WRONG: $1: expected $2, got '$3'" >&2
        return 1
    fi
    echo "  ok: $1: $3"
}

# Start a cluster of $1 nodes in folder $2 and point s4 at it.
start_cluster() {
    printf '$ s4-server local --nodes %s --dir %s &\n' "$1" "$2"
    : >"$2/out"
    s4-server local --nodes "$1" --dir "$2" >"$2/out" 2>"$2/log" </dev/null &
    cluster=$!
    local left=300 # tenths of a second
    until grep -q '^export S4_CONF_PATH=' "$2/out"; do
        if [ $((left -= 1)) -lt 0 ] || ! kill -0 "$cluster" 2>/dev/null; then
            echo "fatal: the cluster did not start; its log:" >&2
            tail -n 20 "$2/log" >&2
            return 1
        fi
        sleep 0.1
    done
    printf '$ export S4_CONF_PATH=%s/s4.conf\n' "$2"
    export S4_CONF_PATH=$2/s4.conf
}

# Stop the cluster, if it runs, and wait until all of it is gone.
stop_cluster() {
    [ -n "${cluster:-}" ] || return 0
    local pid=$cluster
    cluster=
    kill "$pid" 2>/dev/null || true
    wait "$pid"
}

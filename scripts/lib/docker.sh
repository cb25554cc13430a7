# shellcheck shell=bash
# Sourced after setup.sh: is there a Docker engine, and, in CI, make sure that there is.

# Asks the engine itself, through the SDK: a socket or a client program proves nothing.
docker_available() {
    "$ROOT/.venv/bin/python" -c 'import docker; docker.from_env(timeout=5).ping()' >/dev/null 2>&1
}

_wait_for_docker() {
    local _
    for _ in {1..60}; do
        if docker_available; then return; fi
        sleep 1
    done
    return 1
}

# An engine that was killed leaves files that name its process. While that number is a zombie, or somebody
# else's, a new engine believes them and does not start.
_remove_stale_pid_files() {
    local folder name state
    for folder in /proc/[0-9]*; do
        read -r name 2>/dev/null <"$folder/comm" || continue
        state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "$folder/status" 2>/dev/null) || continue
        if [[ $name =~ ^(dockerd|containerd)$ && $state != Z ]]; then return; fi
    done
    rm -f /var/run/docker.pid /var/run/docker/containerd/containerd.pid
}

# A CI machine may come without Docker; the tests need the real engine, so it is installed and started there.
# Never done on anyone's own machine: without CI set, this does nothing.
ensure_docker_for_ci() {
    if [[ -z ${CI:-} ]] || docker_available; then return; fi
    if [[ $(id -u) != 0 ]]; then
        echo "docker: no engine answers, and only root can install and start one." >&2
        echo "        Give this CI job a Docker engine (DOCKER_HOST or /var/run/docker.sock), or run it as root." >&2
        return 1
    fi

    local log
    log=$(mktemp -d)/docker.log
    if ! command -v dockerd >/dev/null; then
        echo "docker: CI without an engine: installing docker.io, debootstrap and iptables"
        if ! {
            apt-get update -q &&
                DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
                    docker.io debootstrap iptables
        } >"$log" 2>&1 </dev/null; then
            tail -n 20 "$log" >&2
            echo "docker: apt-get failed (log: $log). Put Docker into the CI image, or fix its package sources." >&2
            return 1
        fi
        # Where there is an init system, installing has started it.
        if docker_available; then return; fi
    fi

    echo "docker: CI without an engine: starting dockerd, log in $log"
    _remove_stale_pid_files
    setsid nohup dockerd >>"$log" 2>&1 </dev/null &
    if ! _wait_for_docker; then
        tail -n 20 "$log" >&2
        echo "docker: dockerd did not answer within a minute (log: $log)." >&2
        return 1
    fi
}

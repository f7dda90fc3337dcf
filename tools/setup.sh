# shellcheck shell=bash
# Sourced by ./demo and ./check (bash): the machine's packages and the virtual environment, each only when missing.
# Says what it installs and changes before it does. Mirrors and registries are the machine's own configuration.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$top/.venv

# What Python compiles is kept beside the packages, and out of the work tree, whatever the machine says of it: a run
# starts hundreds of interpreters, and each test worker would rewrite every test's assertions again.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$venv/pycache

trap 'say interrupted; exit 130' INT

say() { printf '%s\n' "$*"; }
stop() { printf 'stopped: %s\n' "$*" >&2; exit "${code:-1}"; }

# have_packages NAME…: install the Debian packages that are missing.
have_packages() {
    local missing=() name
    for name in "$@"; do
        dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q ' installed$' || missing+=("$name")
    done
    [ ${#missing[@]} = 0 ] && return
    [ "$(id -u)" = 0 ] || stop "these Debian packages are missing and only root can install them: ${missing[*]}"
    say "Installing Debian packages (they stay installed): ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null || stop 'apt-get update failed: is there a network, and are the sources right?'
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$top/.setup.log" 2>&1 ||
        { tail -n 20 "$top/.setup.log" >&2; stop 'apt-get install failed (its last lines are above)'; }
    rm -f "$top/.setup.log"
    # Debian starts a service when its package is installed; the lab starts a registry of its own.
    if [[ " ${missing[*]} " = *' docker-registry '* ]] && [ -d /run/systemd/system ]; then
        say 'Its service docker-registry is not wanted: stopped and disabled'
        systemctl --quiet disable --now docker-registry.service || stop 'docker-registry.service could not be stopped'
    fi
}

need_apt() {
    command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
        stop 'this needs a Debian-like system with apt (Debian 12 or newer): no apt-get was found here; use a Debian container or VM'
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# have_venv: the virtual environment with exactly what pyproject.toml pins; made again when that changes.
have_venv() {
    local python stamp
    python=$(find_python) || { need_apt; have_packages python3 python3-venv; python=$(find_python); } ||
        stop 'Python 3.11 or newer with venv is needed'
    # The environment names its own place, so a checkout that was moved needs a new one.
    stamp="$top $("$python" -V) $(sha256sum <"$top/pyproject.toml")"
    # The stamp is written last: an interrupted set-up has none and is done again.
    [ -e "$venv/.stamp" ] && [ "$(cat "$venv/.stamp")" = "$stamp" ] && return
    say "Making the virtual environment .venv and installing the packages that pyproject.toml pins"
    rm -f "$venv/.stamp"
    "$python" -m venv --clear "$venv" || stop 'python -m venv failed'
    (cd "$top" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]') \
        2>"$venv/.pip.log" || { tail -n 20 "$venv/.pip.log" >&2; stop 'the packages could not be installed (above)'; }
    printf '%s' "$stamp" >"$venv/.stamp"
}

LAB_PACKAGES=(debootstrap systemd-container iproute2 openssh-client nix-bin git ca-certificates procps docker-registry skopeo)

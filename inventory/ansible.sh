#!/bin/sh
# The inventory beside this file as an Ansible inventory script: ansible -i inventory/ansible.sh all -m ping
# Ansible asks with --list, or with --host NAME. NIXOPS_INVENTORY names another inventory file, NIXOPS_INVOKE the
# invoke to run where it is neither in the project's .venv nor on the PATH.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
inventory=${NIXOPS_INVENTORY:-$here/hosts.yml}
project=$here/..
invoke=${NIXOPS_INVOKE:-$project/.venv/bin/invoke}
[ -x "$invoke" ] || invoke=invoke

case "${1-}" in
    --list) exec "$invoke" --search-root "$project" inventory --format ansible --inventory "$inventory" ;;
    --host) exec "$invoke" --search-root "$project" inventory --format ansible --inventory "$inventory" --host "${2:?a host is missing}" ;;
    *) echo "usage: $0 --list | --host NAME" >&2; exit 2 ;;
esac

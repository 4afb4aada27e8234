#!/bin/bash
# First process of a container (below tini). With and without ssh:
#
#   mhc-entrypoint train CONFIG ...   any subcommand of mhc-dist, run in place of this script
#   mhc-entrypoint sshd               a node that another container starts processes on
#   mhc-entrypoint mpi mpirun ...     mpirun, with ssh made ready for the daemons it starts elsewhere
#   mhc-entrypoint -- COMMAND ...     anything else
#
# ssh is used only where keys are mounted at MHC_SSH_KEYS (default: .ssh in the home folder): `id_*` to reach
# others, `authorized_keys` to be reached. Nothing here needs root: sshd runs as this user on port 2222.
set -euo pipefail

keys="${MHC_SSH_KEYS:-${HOME}/.ssh}"
port="${MHC_SSH_PORT:-2222}"

# Keys come from a read-only volume whose files may belong to root; ssh refuses a key that others may read.
private="${TMPDIR:-/tmp}/mhc-ssh"

copy_keys() {
    install -d -m 700 "${private}"
    local key
    for key in "${keys}"/id_* "${keys}"/authorized_keys; do
        [ -e "${key}" ] && install -m 600 "${key}" "${private}/"
    done
    return 0
}

use_ssh_client() {
    copy_keys
    local key arguments="-o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=${private}/known_hosts"
    for key in "${private}"/id_*; do
        case "${key}" in *.pub | *'*') ;; *) arguments="${arguments} -i ${key}" ;; esac
    done
    # pdsh and mhc-dist read the first, Open MPI's daemons the second. What the user has set comes first.
    export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} ${arguments} -p ${port}"
    export PRTE_MCA_plm_ssh_args="${PRTE_MCA_plm_ssh_args:-} ${arguments} -p ${port}"
}

run_sshd() {
    copy_keys
    if [ ! -s "${private}/authorized_keys" ]; then
        echo "mhc-entrypoint: no authorized_keys in ${keys}: nobody could log in. Mount a volume with keys" \
             "there, or name its folder in MHC_SSH_KEYS." >&2
        exit 2
    fi
    [ -e "${private}/host_key" ] || ssh-keygen -q -t ed25519 -N "" -f "${private}/host_key"
    # Processes started over ssh see the environment of this container.
    export_names=(PATH MHC_METRICS_PORT NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME)
    {
        echo "Port ${port}"
        echo "HostKey ${private}/host_key"
        echo "AuthorizedKeysFile ${private}/authorized_keys"
        echo "PidFile none"
        echo "PasswordAuthentication no"
        echo "KbdInteractiveAuthentication no"
        echo "UsePAM no"
        echo "StrictModes no"
        printf 'SetEnv'
        local name
        for name in "${export_names[@]}"; do
            [ -n "${!name:-}" ] && printf ' %s=%s' "${name}" "${!name}"
        done
        echo
    } > "${private}/sshd_config"
    exec /usr/sbin/sshd -D -e -f "${private}/sshd_config"
}

case "${1:-}" in
    sshd) run_sshd ;;
    mpi) shift; use_ssh_client; exec "$@" ;;
    --) shift; exec "$@" ;;
    *)
        if compgen -G "${keys}/id_*" > /dev/null; then use_ssh_client; fi
        exec mhc-dist "$@"
        ;;
esac

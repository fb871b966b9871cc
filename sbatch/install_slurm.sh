#!/bin/bash
# sudo sbatch/install_slurm.sh — what sbatch/devcluster needs, from the distribution: Slurm, its accounting, munge, ACLs.
# Installs only what is missing, as root on Debian or Ubuntu; elsewhere says why it does nothing. No service has to run.
set -euo pipefail

packages=()
need() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || packages+=("$2"); }
need slurmctld slurm-wlm
need slurmdbd slurmdbd
need munged munge
need mariadbd mariadb-server
need setfacl acl

give_up() {
    echo "install_slurm: nothing done: $1; missing: ${packages[*]}" >&2
    # In CI the Slurm tests must run, so that a machine without Slurm is a failure.
    [ "${CI:-}" = true ] && exit 1
    exit 0
}

if [ ${#packages[@]} -eq 0 ]; then
    echo "install_slurm: all there"
    exit 0
fi
command -v apt-get >/dev/null || give_up "no apt-get on this machine"
[ "$(id -u)" -eq 0 ] || give_up "not root"

export DEBIAN_FRONTEND=noninteractive
echo "install_slurm: installing ${packages[*]}"
apt-get update -q
apt-get install -q -y --no-install-recommends "${packages[@]}"

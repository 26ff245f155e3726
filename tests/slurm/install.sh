#!/bin/sh
# Installs SLURM's daemons where that is possible. Where it is not, it says why, and the tests are skipped.
set -eu

is_here() {
    for program in slurmctld slurmd munged sbatch; do
        command -v "$program" >/dev/null || return 1
    done
}

if [ "$(id -u)" -ne 0 ]; then
    echo "The tests with SLURM are skipped: they need root, to start its daemons."
elif is_here; then
    echo "SLURM is here: $(slurmctld -V)."
elif ! command -v apt-get >/dev/null; then
    echo "The tests with SLURM are skipped: they need slurmctld, slurmd, munged and sbatch, and there is no apt-get."
else
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet=2 && apt-get install --yes --quiet=2 --no-install-recommends \
        munge slurm-client slurm-wlm-basic-plugins slurmctld slurmd >/dev/null ||
        echo "The tests with SLURM are skipped: apt-get could not install it, as it says above."
fi

#!/usr/bin/env bash
# Train on this machine under mpirun.
#
#   launch/local.sh python -m mpi4py train.py ARGUMENT...
#
# Ctrl-C, SIGTERM or SIGUSR2 let the program save and stop at the next step; a second Ctrl-C ends it at once.
# `-m mpi4py` ends all ranks when one of them fails with an exception.
#
# Knobs, with their defaults (env.sh has those of all scripts):
#   RANKS      number of ranks; the cores of this machine, at most 4
#   WALLTIME   seconds after which to save and stop; none
#
# Exit codes: 0 finished; 85 saved and stopped, run it again to go on; 64 no command; 69 no mpirun; else the command's.

stop='' interrupts=0
trap 'stop=1' USR2 TERM
trap 'stop=1; interrupts=$((interrupts + 1)); [ "$interrupts" -lt 2 ] || kill -TERM "$launcher"' INT
set -u
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

command_line "$@"
cores=$(nproc)
: "${RANKS:=$((cores < 4 ? cores : 4))}" "${WALLTIME:=}"
settings $((cores > RANKS ? cores / RANKS : 1))
[ -z "$WALLTIME" ] || export DISTCKPT_DEADLINE=$(($(date +%s) + WALLTIME))
stripe
mpirun_command "$RANKS"
run "${start[@]}" "${RANK[@]}" "${command[@]}"
exit "$status"

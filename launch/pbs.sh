#!/usr/bin/env bash
# Train under PBS (OpenPBS, PBS Pro, Torque): a job that comes to its walltime saves, submits itself anew and goes on.
#
#   qsub -v TRAIN="python -m mpi4py train.py ARGUMENT..." launch/pbs.sh
#
# PBS has no warning before the walltime, and its SIGTERM leaves ranks under mpirun 2 seconds. So PreemptionGuard asks
# qstat for the walltime, lets all ranks save in time and exit with 85. `qsig -s USR2 JOB` does the same at any time.
# `-m mpi4py` ends all ranks when one of them fails with an exception.
#
# Knobs, with their defaults (env.sh has those of all scripts; the options below are changed on qsub's command line):
#   RANKS        number of ranks; the lines of $PBS_NODEFILE, which are the mpiprocs
#   QSUB_ARGS    options of qsub when the job submits itself anew; give those here that were given to qsub. None
#   RESTARTS     counts the restarts; 0
#   LAUNCH_DIR   this folder; launch/ in the folder where qsub was called
#
# Exit codes: 0 finished, or submitted anew; 85 saved and stopped, but not submitted (REQUEUE=0, MAX_RESTARTS, or qsub
# failed); 64 no command; 69 no mpirun; else the command's.
#
#PBS -N distckpt
#PBS -l select=1:ncpus=4:mpiprocs=4
#PBS -l walltime=01:00:00
#PBS -j oe

stop=''
trap 'stop=1' USR2 TERM # first of all: without a trap the signal would end this script
set -u
cd "${PBS_O_WORKDIR:-.}" || exit
: "${LAUNCH_DIR:=$PWD/launch}" # PBS runs a copy of this file somewhere else
# shellcheck source=launch/env.sh
. "$LAUNCH_DIR/env.sh"

command_line "$@"
: "${RANKS:=$(wc -l <"${PBS_NODEFILE:-/dev/null}")}" "${QSUB_ARGS:=}" "${RESTARTS:=0}"
settings "${NCPUS:-1}"
stripe
# An mpirun built without PBS (tm) takes the nodes from the file.
[ ! -s "${PBS_NODEFILE:-}" ] || export OMPI_MCA_orte_default_hostfile=${OMPI_MCA_orte_default_hostfile:-$PBS_NODEFILE}
mpirun_command "$RANKS"
run "${start[@]}" "${RANK[@]}" "${command[@]}"
if may_restart "$RESTARTS"; then
    export RESTARTS=$((RESTARTS + 1)) TRAIN="${command[*]@Q}"
    # shellcheck disable=SC2086 # several options, to be split
    qsub -V $QSUB_ARGS "$LAUNCH_DIR/pbs.sh" && exit 0
    say "qsub failed: submit it again to go on"
fi
exit "$status"

#!/usr/bin/env bash
# Train under LSF: a job that comes to its run limit saves, is requeued and goes on.
#
#   TRAIN="python -m mpi4py train.py ARGUMENT..." bsub < launch/lsf.sh
#
# Five minutes before the limit LSF sends SIGUSR2 (-wa, -wt), which this script forwards to all ranks through mpirun;
# `bkill -s USR2 JOB` does the same at any time. PreemptionGuard, which also asks bjobs for the time left, lets all ranks
# save the same step and exit with 85, and LSF requeues jobs that exit with 85 (-Q).
# `-m mpi4py` ends all ranks when one of them fails with an exception.
#
# Knobs, with their defaults (env.sh has those of all scripts; the options below are changed on bsub's command line, as
# in `bsub -W 720 < launch/lsf.sh`; `bsub -Q ""` switches requeueing off, and the queue's MAX_JOB_REQUEUE limits it, not
# REQUEUE and MAX_RESTARTS):
#   RANKS        number of ranks; LSB_DJOB_NUMPROC, which is bsub -n
#   LAUNCH_DIR   this folder; launch/ in the folder where bsub was called
#
# Exit codes: 0 finished; 85 saved and stopped, and requeued by LSF; 64 no command; 69 no mpirun; else the command's.
#
#BSUB -J distckpt
#BSUB -n 4
#BSUB -W 60
#BSUB -wa USR2
#BSUB -wt 5
#BSUB -Q 85
#BSUB -o distckpt-%J.log

stop=''
trap 'stop=1' USR2 TERM # first of all: without a trap the signal would end this script
set -u
cd "${LS_SUBCWD:-.}" || exit
: "${LAUNCH_DIR:=$PWD/launch}" # LSF runs a copy of this file somewhere else
# shellcheck source=launch/env.sh
. "$LAUNCH_DIR/env.sh"

command_line "$@"
: "${RANKS:=${LSB_DJOB_NUMPROC:-1}}"
settings 1
stripe
mpirun_command "$RANKS"
run "${start[@]}" "${RANK[@]}" "${command[@]}"
exit "$status"

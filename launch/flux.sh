#!/usr/bin/env bash
# Train under Flux: a job that comes to its time limit saves, submits itself anew and goes on.
#
#   flux batch [OPTION...] launch/flux.sh python -m mpi4py train.py ARGUMENT...
#
# PreemptionGuard asks `flux job timeleft`, lets all ranks save in time and exit with 85. SIGUSR2 or SIGTERM to this
# script does the same at any time.
# `-m mpi4py` ends all ranks when one of them fails with an exception.
#
# Knobs, with their defaults (env.sh has those of all scripts; the options below are changed on flux batch's command line):
#   LAUNCHER     flux, or mpirun
#   RANKS        number of ranks; all cores of the allocation divided by THREADS
#   FLUX_ARGS    options of flux submit, such as "-o mpi=none -o pmi=pmix" for Open MPI 5; none
#   BATCH_ARGS   options of flux batch when the job submits itself anew; give those here that were given to it. None
#   RESTARTS     counts the restarts; 0
#   LAUNCH_DIR   this folder; launch/ in the folder where flux batch was called
#
# Exit codes: 0 finished, or submitted anew; 85 saved and stopped, but not submitted (REQUEUE=0, MAX_RESTARTS, or flux
# batch failed); 64 no command, or another LAUNCHER; 69 no launcher; else the command's.
#
#flux: --job-name=distckpt
#flux: --nslots=4
#flux: --time-limit=60m
#flux: --output=distckpt-{{id}}.log

stop=''
trap 'stop=1' USR2 TERM # first of all: without a trap the signal would end this script
set -u
: "${LAUNCH_DIR:=$PWD/launch}" # Flux runs a copy of this file somewhere else
# shellcheck source=launch/env.sh
. "$LAUNCH_DIR/env.sh"

# `flux submit` returns at once, and `flux job attach` does not pass signals on: the job gets them by its id.
forward() {
    if [ "$LAUNCHER" = flux ]; then flux job kill --signal=SIGUSR2 "$id"; else kill -USR2 "$launcher"; fi 2>/dev/null
}

command_line "$@"
: "${LAUNCHER:=flux}" "${FLUX_ARGS:=}" "${BATCH_ARGS:=}" "${RESTARTS:=0}" "${THREADS:=1}"
cores=$(flux resource list -n -s up -o '{ncores}')
: "${RANKS:=$((cores / THREADS))}"
settings "$THREADS"
stripe
case $LAUNCHER in
    mpirun)
        mpirun_command "$RANKS"
        run "${start[@]}" "${RANK[@]}" "${command[@]}" ;;
    flux)
        # shellcheck disable=SC2086 # several options, to be split
        id=$(flux submit --ntasks="$RANKS" --cores-per-task="$THREADS" $FLUX_ARGS "${RANK[@]}" "${command[@]}") ||
            fail "$MISSING" "flux submit failed"
        run flux job attach "$id" ;;
    *) fail "$USAGE" "LAUNCHER: expected flux or mpirun. Got $LAUNCHER." ;;
esac
if may_restart "$RESTARTS"; then
    export RESTARTS=$((RESTARTS + 1))
    # shellcheck disable=SC2086 # several options, to be split
    flux --parent batch $BATCH_ARGS "$LAUNCH_DIR/flux.sh" "${command[@]}" && exit 0
    say "flux batch failed: submit it again to go on"
fi
exit "$status"

# shellcheck shell=bash
# What the launch scripts share. Sourced by them, first thing after their trap; it starts nothing by itself.
#
# Knobs, each an environment variable, with its default; README.md has the table:
#   TRAIN            the command, where the scheduler passes no arguments; quoted as for the shell
#   THREADS          threads per rank; the script's default is the cores per rank
#   CKPT_DIR         folder of the checkpoints, striped on Lustre; none
#   CKPT_GB          size of one checkpoint in GB, for the striping; 10
#   STRIPE_COUNT     Lustre stripes of a checkpoint; by CKPT_GB
#   STRIPE_SIZE      size of a stripe; 4M
#   REQUEUE          1: a run that has saved and stopped early is started again; 0: it is not
#   MAX_RESTARTS     how often, at most; 100
#   MPIRUN           mpirun
#   MPIRUN_ARGS      further options of mpirun; none
#   RESEND_SECONDS   seconds after which a signal to stop is sent once more; 5

: "${TRAIN:=}" "${CKPT_DIR:=}" "${CKPT_GB:=10}" "${STRIPE_COUNT:=}" "${STRIPE_SIZE:=4M}"
: "${REQUEUE:=1}" "${MAX_RESTARTS:=100}" "${MPIRUN:=mpirun}" "${MPIRUN_ARGS:=}" "${RESEND_SECONDS:=5}"

# Exit codes of the scripts beside those of the command.
readonly STOPPED=85   # the command has saved and stopped before its end (distckpt.cluster.EXIT_CODE)
readonly USAGE=64     # no command, or another LAUNCHER
readonly MISSING=69   # no launcher

# Ignores the signal to stop until the program handles it: without a handler it would end a rank that still imports.
# shellcheck disable=SC2034 # for the scripts
readonly RANK=(bash -c 'trap "" USR2; exec "$@"' rank)

stop=${stop:-}
launcher=''

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() { local status=$1; shift; say "$*"; exit "$status"; }

# command_line ARGUMENT...: sets the array `command` to the arguments, or to $TRAIN.
command_line() {
    [ $# -gt 0 ] || eval "set -- $TRAIN"
    [ $# -gt 0 ] || fail "$USAGE" "no command: pass it as arguments, or in TRAIN. Usage in the first lines of this script."
    # shellcheck disable=SC2034 # for the scripts
    command=("$@")
}

# settings THREADS: exports what the ranks need.
settings() {
    # As many threads as cores per rank: torch would take all cores of the node, in each rank.
    export OMP_NUM_THREADS=${THREADS:-$1}
    # Locks fail or hang on Lustre, GPFS and NFS without flock; distckpt does not need them (HDF5 1.10.7 and newer).
    export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-BEST_EFFORT}
    # Data sieving of Open MPI before 4.1.7 and 5.0.6 may write (ompi#12718) and read (ompi#10546) wrong bytes.
    export OMPI_MCA_fbtl_posix_write_datasieving=${OMPI_MCA_fbtl_posix_write_datasieving:-0}
    export OMPI_MCA_fbtl_posix_read_datasieving=${OMPI_MCA_fbtl_posix_read_datasieving:-0}
    case $("$MPIRUN" --version 2>/dev/null) in
        *"(Open MPI) 4.0.2"* | *"(Open MPI) 4.0.3"*)
            # Its default for collective writes may hang (ompi#7109).
            export OMPI_MCA_fcoll=${OMPI_MCA_fcoll:-^vulcan} ;;
    esac
}

# stripe: spreads the files of $CKPT_DIR over as many OSTs as their size deserves; where it is not on Lustre, nothing.
stripe() {
    local count=$STRIPE_COUNT
    [ -n "$CKPT_DIR" ] || return 0
    mkdir -p "$CKPT_DIR" || return 0
    [ "$(stat -f -c %T "$CKPT_DIR" 2>/dev/null)" = lustre ] && command -v lfs >/dev/null || return 0
    # The numbers of NERSC for single shared files.
    if [ -n "$count" ]; then :
    elif [ "$CKPT_GB" -lt 1 ]; then count=1
    elif [ "$CKPT_GB" -lt 10 ]; then count=8
    elif [ "$CKPT_GB" -lt 100 ]; then count=24
    else count=72; fi
    lfs setstripe --stripe-count "$count" --stripe-size "$STRIPE_SIZE" "$CKPT_DIR" ||
        say "$CKPT_DIR: lfs setstripe failed; its files keep the default striping"
}

# mpirun_command [RANKS]: sets the array `start` to mpirun with the ranks, its options and the settings to pass on.
mpirun_command() {
    local name
    command -v "$MPIRUN" >/dev/null || fail "$MISSING" "$MPIRUN is not on the path: module load your site's MPI, or set MPIRUN"
    start=("$MPIRUN")
    [ -z "${1:-}" ] || start+=(-n "$1")
    case ${1:-} in
        1 | 2) # Open MPI would bind each of so few ranks to one core, which all its threads would share.
            export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
            export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none} ;;
    esac
    case $("$MPIRUN" --version 2>/dev/null) in
        *"Open MPI"*) # it passes on to other nodes what begins with OMPI_, and what it is told; others pass on everything
            for name in OMP_NUM_THREADS HDF5_USE_FILE_LOCKING DISTCKPT_DEADLINE PYTHONPATH; do
                [ -z "${!name:-}" ] || start+=(-x "$name")
            done ;;
    esac
    # shellcheck disable=SC2206 # several options, to be split
    start+=($MPIRUN_ARGS)
}

# forward: tells the ranks to save and stop. flux.sh has its own.
forward() { kill -USR2 "$launcher" 2>/dev/null; }

# run COMMAND...: runs a launcher in the background, for bash runs no trap while a command runs in the foreground, and
# forwards the signal to stop, again and again: ranks that are not ready yet ignore it. Sets `status`.
run() {
    local waited
    say "$*"
    (trap '' USR2; exec "$@") &
    launcher=$!
    while kill -0 "$launcher" 2>/dev/null; do
        if [ -z "$stop" ]; then
            wait "$launcher" # returns when a trap has run, too
            continue
        fi
        for ((waited = 0; waited < RESEND_SECONDS; waited++)); do
            kill -0 "$launcher" 2>/dev/null || break
            sleep 1
            [ "$waited" != 0 ] || forward # not before the launcher has had a second to set its handlers
        done
    done
    wait "$launcher"
    status=$?
    launcher=''
}

# may_restart COUNT: whether this run, which was restarted COUNT times, has stopped early and is to be started again.
may_restart() {
    [ "$status" = "$STOPPED" ] && [ "$REQUEUE" = 1 ] || return 1
    [ "$1" -lt "$MAX_RESTARTS" ] || { say "restarted $1 times, as often as MAX_RESTARTS allows"; return 1; }
}

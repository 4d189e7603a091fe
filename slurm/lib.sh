# shellcheck shell=bash
# What the batch scripts share; docs/slurm.md lists the variables. Sourced by scripts that set ADAPTIVE_HOME: the
# checkout, or the copy of the code that `adaptive submit` made.
#
# Once traps are set there is no command substitution: bash 5.2 aborts when a trap runs during one.

say() { printf '%(%F %T)T job %s: %s\n' -1 "${SLURM_JOB_ID:-none}" "$*" >&2; }

fail() { # CODE WORDS...
  local code=$1
  shift
  say "error: $*"
  exit "$code"
}

export ADAPTIVE_HOME

prepare() { # program: python and the words before it; and the environment of all that follows
  local modules=()
  read -r -a modules <<< "${ADAPTIVE_MODULES:-}"
  if [ "${#modules[@]}" -gt 0 ]; then
    # shellcheck disable=SC1091  # defines `module` on clusters that have it
    type module > /dev/null 2>&1 || . /etc/profile
    module load "${modules[@]}" || fail 1 "ADAPTIVE_MODULES = '$ADAPTIVE_MODULES' cannot be loaded"
  fi
  if [ -n "${ADAPTIVE_SETUP:-}" ]; then
    # shellcheck disable=SC1090
    . "$ADAPTIVE_SETUP" || fail 1 "ADAPTIVE_SETUP = '$ADAPTIVE_SETUP' failed"
  fi
  local container=() python
  read -r -a container <<< "${ADAPTIVE_CONTAINER:-}"
  read -r -a srun_options <<< "${ADAPTIVE_SRUN:-}"
  python=${ADAPTIVE_PYTHON:-python3}
  if [ -z "${ADAPTIVE_PYTHON:-}" ] && [ -x "$ADAPTIVE_HOME/.venv/bin/python" ]; then
    python=$ADAPTIVE_HOME/.venv/bin/python
  fi
  if [ "${#container[@]}" = 0 ] && [ "${#srun_options[@]}" = 0 ]; then
    command -v "$python" > /dev/null || fail 1 "no interpreter $python; ADAPTIVE_PYTHON names another"
    # DeepSpeed's first start compiles an operator with the environment's ninja.
    case $python in */*) PATH="$(cd "$(dirname "$python")" && pwd):$PATH" ;; esac
    export PATH
  fi
  # The code in ADAPTIVE_HOME runs: it is put in front here, where no module, no ADAPTIVE_SETUP and no image's own
  # environment comes after it, and with -P the working folder, a checkout that goes on changing, is not looked into.
  # shellcheck disable=SC2016  # expanded by the shell that is started, in the container
  program=("${container[@]}" sh -c \
    'export ADAPTIVE_HOME="$0" PYTHONPATH="$0${PYTHONPATH:+:$PYTHONPATH}"; exec "$@"' "$ADAPTIVE_HOME" "$python")
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  # From Slurm 22.05 on srun does not take this from sbatch.
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"; fi
  answer=$(mktemp) || fail 1 "no temporary file can be made in ${TMPDIR:-/tmp}"
  trap 'rm -f "$answer"' EXIT
}

# Slurm signals this shell alone (--signal=B:USR1@300), or shell and tasks: USR1 asks the ranks to save and leave, however
# often it comes. They get a TERM of their own where Slurm means all.
listen() {
  asked='' ranks=''
  trap 'ask USR1' USR1
  trap 'ask TERM' TERM
}

ask() {
  noted=1
  if [ -n "$asked" ]; then return; fi
  asked=1 asked_after=$SECONDS
  say "$1: the ranks are asked to save and leave"
  if [ -n "$ranks" ]; then kill -USR1 "$ranks" 2> /dev/null; fi
}

await() { # PID: sets code to its exit code, whatever signals interrupt the waiting
  local found
  code=''
  while :; do
    noted=''
    wait "$1"
    found=$?
    # Interrupted when it had just ended: the shell has forgotten it, the code before was its own.
    if [ "$found" = 127 ] && [ -n "$code" ]; then break; fi
    code=$found
    if [ -z "$noted" ]; then break; fi
  done
}

helper() { # WORDS...: a small Python program, once; what it prints goes to the file $answer
  local options=() option
  for option in "${srun_options[@]}"; do # labels are for people
    case $option in --label | -l) ;; *) options+=("$option") ;; esac
  done
  if [ "${#srun_options[@]}" -gt 0 ]; then
    srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "${options[@]}" \
      "${program[@]}" "$@" > "$answer" &
  else
    "${program[@]}" "$@" > "$answer" &
  fi
  await $!
}

# A killed slurmstepd leaves srun waiting until the time limit: when rank 0 has left its exit code and a while has
# passed, srun is ended.
watch_results() { # PID of srun
  trap - USR1 TERM EXIT
  while [ ! -s "$results/rank-0" ]; do sleep 2; done
  sleep "${ADAPTIVE_GRACE:-60}"
  say "rank 0 has ended, srun has not noticed: ending it"
  kill -TERM "$1"
  sleep 20
  kill -KILL "$1"
}

stage_shards() {
  if [ -z "${ADAPTIVE_STAGE:-}" ]; then return; fi
  say "bringing shards to $ADAPTIVE_STAGE on every node"
  srun --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    "${srun_options[@]}" "${program[@]}" -u -P -m adaptive.jobs.stage -- "$@" &
  await $!
  if [ "$code" != 0 ] && [ -z "$asked" ]; then say "the shards could not be staged"; fi
}

train() { # CONFIG [key=value ...]: trains, and requeues the job where another start goes on
  prepare
  listen
  local words=() task=()
  if [ -n "${seed:-}" ]; then task=(--seed "$seed" --group "$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID"); fi
  helper -P -m adaptive.jobs.requeue begin "${task[@]}" -- "$@"
  # 71: the file system did not answer, and could not be asked how often either.
  if [ "$code" = 71 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${ADAPTIVE_MAX_STALLED:-3}" ]; then requeue; fi
  if [ "$code" != 0 ]; then exit "$code"; fi
  while IFS= read -r -d '' word; do words+=("$word"); done < "$answer"
  # The ranks meet on this node, the first: at a port that is free here.
  export MASTER_PORT=${words[0]}
  folder=${words[1]} results=${words[2]}
  export ADAPTIVE_RESULTS=$results
  words=("${words[@]:3}")
  say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $folder"

  code=0
  if [ -z "$asked" ]; then stage_shards "${words[@]}"; fi
  if [ -n "$asked" ]; then code=75; fi
  if [ "$code" = 0 ]; then
    # A task that fails ends the others, which would otherwise wait for it.
    srun --kill-on-bad-exit=1 "${srun_options[@]}" \
      "${program[@]}" -u -P -m adaptive train "${words[@]}" &
    ranks=$!
    watch_results "$ranks" &
    local watcher=$!
    disown "$watcher"
    await "$ranks"
    kill "$watcher" 2> /dev/null
  fi
  trap '' USR1 TERM
  ranks=''
  local limit=() job decision='' trained=$code
  if [ -n "$asked" ] && scontrol -o show job "$SLURM_JOB_ID" > "$answer"; then
    read -r job < "$answer"
    if [[ $job =~ \ TimeLimit=([0-9:-]+)\  ]]; then limit=(--after "$asked_after" --limit "${BASH_REMATCH[1]}"); fi
  fi
  helper -P -m adaptive.jobs.requeue end ${asked:+--asked} "${limit[@]}" --code "$code" -- "$folder"
  case $code in
    0) read -r decision code < "$answer" ;;
    10 | 12) code=$trained ;; # done, stop: the answer's disk is full
    11) decision=requeue code=${asked:+75} ;;
    *) fail "$code" "it cannot be told whether to requeue; not requeued" ;;
  esac
  code=${code:-$trained}
  if [ "$decision" = requeue ]; then requeue; fi
  exit "$code"
}

requeue() {
  if [ "${ADAPTIVE_REQUEUE:-1}" = 0 ]; then
    say "not requeued (ADAPTIVE_REQUEUE=0); the same command goes on"
    return
  fi
  # A cancelled job is not brought back.
  if ! scontrol -o show job "$SLURM_JOB_ID" | grep -E ' JobState=RUNNING | Reason=TimeLimit ' > /dev/null; then
    say "not requeued: the job is being ended by Slurm or its owner"
    return
  fi
  say "requeueing"
  rm -f "$answer"
  trap - USR1 TERM EXIT
  if scontrol requeue "$SLURM_JOB_ID"; then sleep 60; fi # Slurm ends this shell
  say "scontrol requeue failed; the same command goes on"
}

evaluate() { # RUN [options of adaptive evaluate]
  prepare
  srun --nodes=1 --ntasks=1 "${srun_options[@]}" "${program[@]}" -u -P -m adaptive evaluate "$@"
}

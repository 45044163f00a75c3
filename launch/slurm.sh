#!/usr/bin/env bash
# One node or several, from the repository's root, on a disk that they share:
#   sbatch --nodes 2 --gpus-per-node 2 launch/slurm.sh lora_alpaca.yaml lora.r=8
#   LAUNCH=launch/zero3.yaml sbatch --nodes 2 --gpus-per-node 2 launch/slurm.sh lora_alpaca_bf16.yaml
#   DRY_RUN=1 SLURM_JOB_NUM_NODES=2 SLURM_GPUS_ON_NODE=2 bash launch/slurm.sh lora_alpaca.yaml
# Five minutes before --time ends the run saves and the job is requeued, and goes on from there.
# LAUNCH: the accelerate file that says what is sharded (launch/ddp.yaml).
# RUN: the run's folder (runs/<config>-<job id>); beside it, in <folder>.logs, each node's log.
# PROCESSES_PER_NODE: as many as GPUs. DRY_RUN=1: print each node's command, and change nothing.
# Precision and batch size belong to the config, not here.
#SBATCH --job-name=recipe
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

say() { echo "slurm.sh: $*"; }

refuse() {
  say "$*" >&2
  exit 2
}

check() {
  [[ $# -gt 0 && $1 != -* ]] \
    || refuse "config: none given. Name one: sbatch launch/slurm.sh lora_alpaca.yaml"
  [ -f recipe/train.py ] || refuse "$PWD: not the repository's root. Submit from there."
  [ -f "$LAUNCH" ] || refuse "LAUNCH: there is no file $LAUNCH. Name one of launch/*.yaml."
  [ -n "$DRY_RUN" ] || [ -n "${SLURM_JOB_NODELIST:-}" ] \
    || refuse "no SLURM job: submit it with sbatch, or set DRY_RUN=1 to see the commands."
  [[ $PROCESSES =~ ^[1-9][0-9]*$ ]] \
    || refuse "GPUs: none on this node. Add --gpus-per-node N, or set PROCESSES_PER_NODE."
  local argument
  for argument in "$@"; do
    case $argument in
      training.output_dir=* | training.resume_from_checkpoint=*)
        refuse "${argument%%=*}: set here, so that a requeued job finds its run. Use RUN=folder."
        ;;
    esac
  done
}

newest_step() { # of the run's checkpoints; 0 without one
  local folder step newest=0
  for folder in "$RUN"/checkpoint-*/; do
    step=${folder%/}
    step=${step##*/checkpoint-}
    if [[ $step =~ ^[0-9]+$ ]] && ((step > newest)); then newest=$step; fi
  done
  echo "$newest"
}

# What train.py is given. A requeued job has its run's own settings, whatever became of the config;
# of a new one train.py says what differs from the run that it goes on with.
choose_arguments() {
  local argument
  if [ "$FIRST_STEP" = 0 ]; then
    TRAIN=(--config "$@" "training.output_dir=$RUN")
    return
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    TRAIN=(--config "$@" "training.resume_from_checkpoint=$RUN")
    return
  fi
  TRAIN=(--config "$RUN/settings.yaml" "training.resume_from_checkpoint=$RUN")
  for argument in "$@"; do
    if [[ $argument == --* ]]; then TRAIN+=("$argument"); fi
  done
}

# A run that was killed before its first checkpoint left a folder that train.py would refuse.
set_aside() {
  local number=1
  while [ -e "$RUN.unsaved-$number" ]; do number=$((number + 1)); done
  say "$RUN: stopped before its first checkpoint. Set aside as $RUN.unsaved-$number; begins anew."
  [ -n "$DRY_RUN" ] || mv -- "$RUN" "$RUN.unsaved-$number"
}

is_left_over() {
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$FIRST_STEP" = 0 ] \
    && { [ -e "$RUN/settings.yaml" ] || [ -e "$RUN/.settings.yaml.partial" ]; }
}

# accelerate calls torchrun in its own process. It takes no rendezvous id, but torchrun's own
# variables; and whatever the file says, a rendezvous other than static must be asked for here.
node_command() { # rank of the node
  COMMAND=(env "PET_RDZV_ID=$JOB" "PET_RDZV_ENDPOINT=$FIRST_NODE:$PORT"
    accelerate launch --quiet --config_file "$LAUNCH"
    --num_machines "$NODES" --num_processes "$((NODES * PROCESSES))" --machine_rank "$1"
    --main_process_ip "$FIRST_NODE" --main_process_port "$PORT"
    --rdzv_backend c10d --rdzv_conf "is_host=$(($1 == 0))" recipe/train.py "${TRAIN[@]}")
}

# Runs on each node. Where SLURM tracks processes by cgroups, a signal reaches this shell alone.
# torchrun would die of USR1, and give the training 30 s after a TERM: both pass it by.
# shellcheck disable=SC2329
on_node() {
  local launcher='' heard='' code=0
  trap 'heard=USR1; pkill -USR1 -P "$launcher"' USR1
  trap 'heard=TERM; pkill -TERM -P "$launcher"' TERM
  node_command "$SLURM_NODEID"
  (
    trap '' USR1
    exec "${COMMAND[@]}"
  ) &
  launcher=$!
  wait "$launcher" || code=$?
  while kill -0 "$launcher" 2>/dev/null; do
    # Stopped behind its last step: torchrun would wait 5 minutes for the one that failed.
    [ ! -d "$RUN/adapter" ] || pgrep -P "$launcher" >/dev/null || kill "$launcher"
    code=0
    wait "$launcher" || code=$?
  done
  [ -n "$heard" ] || return "$code"
  # Not an error: with --kill-on-bad-exit it would end nodes that are still saving.
  echo "$heard" >"$RUN.logs/stopped"
}

run_step() { # sets CODE
  local step sender=''
  # Sent again until the step ends, as it is not heard while models are loaded.
  trap 'ASKED=yes; trap "" USR1; send_again >/dev/null 2>&1 & sender=$!' USR1
  trap 'trap "" TERM' TERM # the step saves first
  srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --export=ALL \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" \
    --kill-on-bad-exit=1 --wait=0 --output="$RUN.logs/node-%n.log" --open-mode=append \
    bash -c "$(declare -p JOB NODES PROCESSES FIRST_NODE PORT LAUNCH RUN TRAIN)
      $(declare -f node_command on_node)
      on_node" &
  step=$!
  CODE=0
  wait "$step" || CODE=$?
  while kill -0 "$step" 2>/dev/null; do
    CODE=0
    wait "$step" || CODE=$?
  done
  [ -z "$sender" ] || kill "$sender" 2>/dev/null || true
}

# shellcheck disable=SC2329
send_again() {
  while true; do
    scancel --signal=USR1 "$SLURM_JOB_ID" || true
    sleep 20
  done
}

is_preempted() { [[ $(scontrol show job --oneliner "$SLURM_JOB_ID") =~ \ PreemptTime=[0-9] ]]; }

requeue() {
  say "$RUN: job $SLURM_JOB_ID is requeued, and begins behind step $(newest_step)."
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  say "job $SLURM_JOB_ID: cannot be requeued. Submit it again with RUN=$RUN." >&2
  exit 3
}

conclude() {
  local stopped
  stopped=$(cat "$RUN.logs/stopped" 2>/dev/null || true)
  if [ -n "$ASKED$stopped" ]; then
    if [ -d "$RUN/adapter" ]; then finished; fi
    if is_preempted; then requeue; fi
    if [ -n "$ASKED" ]; then
      if [ "$(newest_step)" -gt "$FIRST_STEP" ]; then requeue; fi
      say "$RUN: no checkpoint since this start, so it is not requeued. Raise --time." >&2
      exit 3
    fi
  fi
  if [ "$CODE" != 0 ]; then # of one node; the others may have been stopped for it
    say "$RUN: the training failed ($CODE); $RUN.logs says why." >&2
    exit "$CODE"
  fi
  [ -n "$stopped" ] || exit 0
  say "$RUN: stopped by SIG$stopped and not requeued. To go on, submit it with RUN=$RUN." >&2
  exit 143
}

finished() {
  say "$RUN is finished: its adapter is there."
  exit 0
}

dry_run() {
  local rank
  for ((rank = 0; rank < NODES; rank++)); do
    node_command "$rank"
    printf 'node %s:' "$rank"
    printf ' %q' "${COMMAND[@]}"
    printf '\n'
  done
}

DRY_RUN=${DRY_RUN:-} LAUNCH=${LAUNCH:-launch/ddp.yaml} JOB=${SLURM_JOB_ID:-0}
NODES=${SLURM_JOB_NUM_NODES:-1}
PROCESSES=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-${DRY_RUN:+1}}}
RUN=${RUN:-runs/$(basename -- "${1:-}" .yaml)-$JOB} PORT=$((20000 + JOB % 10000)) ASKED=''
check "$@"
if [ -d "$RUN/adapter" ]; then finished; fi
if [ -d .venv/bin ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
FIRST_NODE=first-node
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  FIRST_NODE=${FIRST_NODE%%$'\n'*}
fi
FIRST_STEP=$(newest_step)
choose_arguments "$@"
if is_left_over; then set_aside; fi
if [ -n "$DRY_RUN" ]; then
  dry_run
  exit 0
fi
mkdir -p "$RUN.logs"
rm -f "$RUN.logs/stopped"
run_step
conclude

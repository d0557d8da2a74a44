#!/usr/bin/env bash
# A training run as a SLURM job that goes on until it is finished. Copy this file, change the lines marked <-, and
#
#   sbatch slurm.sh experiment=shapes_ddpm budget.images=2_000_000     one run
#   sbatch --array=0-4 slurm.sh experiment=shapes_ddpm                 five, seed=0 to seed=4
#
# What stands behind slurm.sh is what stands behind `python train.py` elsewhere. Everything is in one log per job, also
# what comes after a requeue. The run lives in outputs/SET_MODEL/job_NUMBER_..., which a requeued job finds again, so the
# words must stay the same; `run_dir=FOLDER` takes another.

#SBATCH --job-name=atelier
#SBATCH --nodes=1                       # <-
#SBATCH --ntasks-per-node=1             # <- processes on each node: as many as GPUs
##SBATCH --gpus-per-node=1              # <- with one # where the cluster has GPUs
##SBATCH --partition=gpu                # <- likewise
#SBATCH --cpus-per-task=4               # <- what decodes images: data.num_workers
#SBATCH --time=04:00:00                 # <- of one turn; a run may take many
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
PYTHON=${PYTHON:-python}                # <- of the environment, or: source PATH/bin/activate
TRAIN=${TRAIN:-train.py}                # <- where the repository lies, if sbatch is called elsewhere
ARCHIVE=${ARCHIVE:-}                    # <- a .tar of the set, to be read from the nodes' own disks
LOCAL=${LOCAL:-${TMPDIR:-/tmp}}         # <- such a disk
MAX_TURNS=${MAX_TURNS:-20}              # <- then it stops, also where each turn ends before anything is saved

turn=$((${SLURM_RESTART_COUNT:-0} + 1))
tasks=$((${SLURM_NTASKS:-1} / SLURM_JOB_NUM_NODES))
echo "== job $SLURM_JOB_ID, turn $turn, $SLURM_JOB_NODELIST, $(date '+%F %T')"

words=("$@" "trainer=ddp" "trainer.devices=$tasks" "trainer.num_nodes=$SLURM_JOB_NUM_NODES")
words+=("budget.until=job_end")         # a minute before the end it saves and leaves, with exit code 138
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    words+=("seed=$SLURM_ARRAY_TASK_ID")
fi

# Each node unpacks the set once; a turn that comes to the same node finds it. Files are known by their content, so
# that the run sees the same set on every node.
if [ -n "$ARCHIVE" ]; then
    place=$LOCAL/$(basename "$ARCHIVE" .tar)
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
        [ -e "$1.whole" ] && exit 0
        rm -rf "$1" && mkdir -p "$1" && tar -xf "$2" -C "$1" && touch "$1.whole"
    ' unpack "$place" "$ARCHIVE" || exit 1
    words+=("data.root=$place")
fi

# The ranks tell one another when one fails, so srun need not kill the others, whose exit codes would hide the cause.
trap : TERM USR1                        # preemption: this shell stays to see what the run says
srun --kill-on-bad-exit=0 "$PYTHON" "$TRAIN" "${words[@]}"
code=$?

# 138: the job's end is near, or SLURM sent USR1; everything is saved, and the next turn goes on. 143: SLURM ends the job
# and decides itself what follows, a turn after preemption, none after scancel. Else it is an error, which would come again.
echo "== job $SLURM_JOB_ID, turn $turn ended with $code, $(date '+%F %T')"
case $code in
    138)
        if [ "$turn" -ge "$MAX_TURNS" ]; then
            echo "== $MAX_TURNS turns; sbatch again with run_dir= goes on"
            exit "$code"
        fi
        scontrol requeue "$SLURM_JOB_ID" && sleep 60
        ;;
    143)
        sleep 600                       # until SLURM has decided; a script that ends now is not started again
        ;;
esac
exit "$code"

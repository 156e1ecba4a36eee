# Of megatron_precision, for the batch shell; errors, retries and restarts are set before it.
set +vx
# A host of several addresses prints them all; the rendezvous takes one.
head_node_ip=${head_node_ip%% *}
# The tasks of an array are one job, one after another.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
export EARLIER_ARRAY_TASKS=$((${SLURM_ARRAY_TASK_ID:-1} - 1))
start=${SLURM_RESTART_COUNT:-0}
[ "$EARLIER_ARRAY_TASKS" -eq 0 ] || start=$SLURM_ARRAY_TASK_ID.$start
# What an earlier start of this job said of its end is kept, and is not this one's.
if [ -d "$errors" ]; then
    mv "$errors" "$errors.before-$job$([ "$start" = 0 ] || echo "-$start")"
fi
# The job is started again after its time limit and after a pre-emption, as often as --restarts
# says; after a failure as often as --retries says; and never after a mistake of the user's, which
# another start repeats. Of an array, the next task goes on after a stop, and the tasks that have
# nothing to do are cancelled. What no rank has recorded is a stop.
srun() {
    command srun "$@"
    local code=$? failures
    if [ "$code" -eq 126 ] || [ "$code" -eq 127 ]; then
        mkdir -p "$errors"
        printf 'rank 0 time_s %s kind crash\nthe command of the job was not found (exit code %s)\n' \
            "$(date +%s.%N)" "$code" > "$errors/rank0.txt"
    fi
    failures=$(ls -d "$errors.before-$job"-* 2>/dev/null | wc -l)
    if [ "$code" -eq 0 ]; then
        stop_here
    elif grep -qs '^rank .* kind user$' "$errors"/rank*.txt; then
        code=2
        stop_here
    elif [ -d "$errors" ]; then
        [ "$failures" -lt "$retries" ] || stop_here
    elif [ -n "$SLURM_ARRAY_JOB_ID" ]; then
        TORCHX_MAX_RETRIES=0
    elif [ $((${SLURM_RESTART_COUNT:-0} - failures)) -ge "$restarts" ]; then
        stop_here
    fi
    return "$code"
}
stop_here() {
    TORCHX_MAX_RETRIES=0
    [ -z "$SLURM_ARRAY_JOB_ID" ] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
}
# The last lines of the log are the reason: what the rank that failed first has recorded.
show_failure() {
    local first
    first=$(grep -s '^rank ' /dev/null "$errors"/rank*.txt | sort -k4 | head -n 1 | cut -d: -f1)
    if [ -n "$first" ]; then
        echo "============================== the job failed =============================="
        cat "$first"
    fi
}
trap show_failure EXIT

# Of megatron_precision, for the batch shell; errors and retries are set before it.
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
# The job is started again after its time limit and after a pre-emption; after a failure as often
# as --retries says, and never after a mistake of the user's, which another start repeats. Of an
# array, the tasks that have nothing to do then are cancelled.
srun() {
    command srun "$@"
    local code=$? failures
    if [ "$code" -ne 0 ] && grep -qs '^rank .* kind user$' "$errors"/rank*.txt; then
        code=2
        stop_here
    elif [ "$code" -ne 0 ] && [ -d "$errors" ]; then
        failures=$(ls -d "$errors" "$errors.before-$job"-* 2>/dev/null | wc -l)
        [ "$failures" -le "$retries" ] || stop_here
    elif [ "$code" -eq 0 ]; then
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

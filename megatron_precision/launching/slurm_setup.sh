# Of megatron_precision, for the batch shell; errors and retries are set before it.
set +vx
# A host of several addresses prints them all; the rendezvous takes one.
head_node_ip=${head_node_ip%% *}
# What an earlier start of this job said of its end is kept, and is not this one's.
if [ -d "$errors" ]; then
    mv "$errors" "$errors.before-$SLURM_JOB_ID${SLURM_RESTART_COUNT:+-$SLURM_RESTART_COUNT}"
fi
# The job is started again after its time limit and after a pre-emption; after a failure as often
# as --retries says, and never after a mistake of the user's, which another start repeats.
srun() {
    command srun "$@"
    local code=$? failures
    if [ "$code" -ne 0 ] && grep -qs '^rank .* kind user$' "$errors"/rank*.txt; then
        code=2
        TORCHX_MAX_RETRIES=0
    elif [ "$code" -ne 0 ] && [ -d "$errors" ]; then
        failures=$(ls -d "$errors" "$errors.before-$SLURM_JOB_ID"-* 2>/dev/null | wc -l)
        [ "$failures" -le "$retries" ] || TORCHX_MAX_RETRIES=0
    fi
    return "$code"
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

#!/bin/sh
# One machine of a training: sh node.sh RECIPE [--set STAGE.FIELD=VALUE ...], on each with its JOB_COMPLETION_INDEX.
# The first trains; the others wait until it says what, and join. What comes before pretrain must be sealed.
set -eu
if [ "$JOB_COMPLETION_INDEX" = 0 ]; then
  exec llmill run --only pretrain "$@"
fi
fingerprint=$(llmill plan --json "$@" | python -c '
import json, sys
print(next(step["fingerprint"] for step in json.load(sys.stdin) if step["stage"] == "pretrain"))')
folder=$LLMILL_HOME/store/pretrain/$fingerprint
until [ -f "$folder.partial/scratch/job.json" ]; do
  if [ -d "$folder" ]; then
    exit 0 # it is trained already
  fi
  sleep 2
done
exec llmill join "$folder.partial/scratch/job.json"

#!/bin/sh
# Begins a run, or goes on with it where it has a checkpoint: for schedulers that start a job again.
#   run_or_resume.sh FILE DIR [--set KEY=VALUE ...]
# All processes of a run call it. They agree: the first one makes the folder only when all have come.
set -eu
file=$1 dir=$2
shift 2
if ls "$dir"/checkpoints/[0-9]* >/dev/null 2>&1; then
  exec fedjax-llm resume "$dir"
fi
exec fedjax-llm run "$file" --out "$dir" "$@"

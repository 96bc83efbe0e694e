#!/usr/bin/env bash
# What users do on a login node, in the environment of requirements/gpu.lock on a machine without a GPU:
# tools/test_gpu_env.sh VENV. Each command has to end with its expected status; prints one line a command.
set -uo pipefail
python=$1/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
recipe=examples/qwen2.5-7b-8gpu/config.yaml
failed=0

expect() { # STATUS WORDS COMMAND...
  local status=$1 words=$2 begin=$SECONDS found
  shift 2
  "$python" -m treepo_mcore "$@" >"$work/out" 2>&1
  found=$?
  if [ "$found" = "$status" ] && grep -q -- "$words" "$work/out" && ! grep -q "^Traceback" "$work/out"; then
    echo "ok    $((SECONDS - begin)) s  treepo-mcore $*"
  else
    echo "WRONG status $found, expected $status and '$words'  treepo-mcore $*"
    tail -5 "$work/out"
    failed=1
  fi
}

expect 0 "GPU" plan "$recipe" --nodes 1 --gpu h100
expect 0 "busiest link" plan reshard "$recipe" --nodes 1
expect 0 "dry run passed" train "$recipe" --dry-run
expect 0 "SBATCH" launch slurm "$recipe"
leaf='{"path": ["a"], "reward": 1.0, "n_tokens": 3}'
echo "{\"prompt_id\": \"p\", \"leaves\": [$leaf]}" >"$work/trees.jsonl"
expect 0 "mean_length" trees stats "$work/trees.jsonl"
expect 1 "GPU" doctor
expect 2 "no GPU on this machine" train "$recipe"
expect 2 "no GPU on this machine" eval "$recipe" data.eval=data/train.parquet
exit $failed

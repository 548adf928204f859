#!/usr/bin/env bash
# Submits score -> sft -> export, each to start when the one before it has succeeded:
#     slurm/pipeline.sh RECIPE.yaml [key=value ...] -- SCORE OPTIONS
# Example:
#     slurm/pipeline.sh recipes/sft/qwen2.5-7b.yaml model.hf=/models/Qwen2.5-7B -- \
#         --model /models/teacher --data 'data/*.jsonl' --tensor-parallel 2
# Writes scored.parquet, the run and export/ into the recipe's output_dir.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/cluster.env"

usage() {
  sed -n '2,7s/^# \?//p' "${BASH_SOURCE[0]}" >&2
  exit 1
}

recipe=()
while (($#)) && [[ $1 != -- ]]; do
  recipe+=("$1")
  shift
done
((${#recipe[@]} && $# > 1)) || usage
shift

# The recipe is read here, so that a mistake in it is said now and not after hours of scoring; not so where Python
# is in a container: then output_dir and cluster.num_nodes must be on the command line.
nodes=1 output_dir=
if [[ -z ${PEAR_CONTAINER:-} ]]; then
  python=${PEAR_PYTHON:-$(dirname "$here")/.venv/bin/python}
  read -r nodes output_dir < <("$python" "$here/check_recipe.py" "${recipe[@]}" data.train=scored.parquet) || exit 1
else
  for override in "${recipe[@]:1}"; do
    case $override in
      output_dir=*) output_dir=${override#*=} ;;
      cluster.num_nodes=*) nodes=${override#*=} ;;
    esac
  done
  [[ -n $output_dir ]] || { echo "error: with PEAR_CONTAINER, give output_dir=..." >&2; exit 1; }
fi

submit() { sbatch --parsable "$@" | cut -d';' -f1; }  # the id, without the cluster's name
after() { echo "--dependency=afterok:$1 --kill-on-invalid-dep=yes"; }

jobs=()
trap '((${#jobs[@]} % 3 == 0)) || scancel "${jobs[@]}"' EXIT  # all three or none

mkdir -p "$output_dir"
score=$(submit "$here/score.sbatch" --output "$output_dir/scored.parquet" "$@")
jobs+=("$score")
# shellcheck disable=SC2046  # two options
sft=$(submit $(after "$score") --nodes="$nodes" "$here/sft.sbatch" "${recipe[@]}" \
  "data.train=$output_dir/scored.parquet")
jobs+=("$sft")
# shellcheck disable=SC2046
export=$(submit $(after "$sft") "$here/export.sbatch" --checkpoint "$output_dir" --output "$output_dir/export")
jobs+=("$export")

cat <<END
score   job $score  pear-score-$score.log   -> $output_dir/scored.parquet
sft     job $sft  pear-sft-$sft.log     -> $output_dir/checkpoints ($nodes node(s))
export  job $export  pear-export-$export.log  -> $output_dir/export
Watch: squeue --jobs=$score,$sft,$export; tail -F pear-score-$score.log
A stage that fails cancels those after it; its log says why. Cancel all: scancel $score $sft $export
END

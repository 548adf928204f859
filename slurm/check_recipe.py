"""Whether a recipe can be trained on the nodes of a job, and what the scripts must know of it.

    python check_recipe.py RECIPE.yaml [--nodes N --processes P] [key=value ...]

Prints cluster.num_nodes and output_dir.
"""

from __future__ import annotations

import argparse
import sys

from pear_megatron.errors import PearError, RecipeError
from pear_megatron.plan import make_plan
from pear_megatron.recipe import Recipe, load_recipe


def check(path: str, overrides: list[str], nodes: int | None, processes: int | None) -> Recipe:
    """The recipe, if it fits its cluster, and its cluster is the job's.

    Raises:
        RecipeError: it is wrong, does not fit, or was made for other nodes.
    """
    recipe = load_recipe(path, overrides)
    cluster = recipe.cluster
    if nodes not in (None, cluster.num_nodes):
        raise RecipeError(
            f"{path}: cluster.num_nodes is {cluster.num_nodes} and the job has {nodes} node(s); submit it with "
            f"`sbatch --nodes={cluster.num_nodes} ...`, or train on other nodes with cluster.num_nodes={nodes}"
        )
    if processes not in (None, cluster.gpus_per_node):
        raise RecipeError(
            f"{path}: cluster.gpus_per_node is {cluster.gpus_per_node} and the job runs {processes} process(es) a "
            f"node; train on other nodes with cluster.gpus_per_node={processes}, or see NPROC_PER_NODE and "
            "SBATCH_GPUS_PER_NODE in slurm/cluster.env"
        )
    make_plan(recipe).check()
    return recipe


def main() -> None:
    """Reads the command line; errors of the user's making end with exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--processes", type=int)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    try:
        recipe = check(args.recipe, args.overrides, args.nodes, args.processes)
    except PearError as error:
        sys.exit(f"error: {error}")
    print(recipe.cluster.num_nodes, recipe.output_dir)


if __name__ == "__main__":
    main()

"""read_problems_config: a problem set as the command line names it."""

from __future__ import annotations

from pathlib import Path

from pear_megatron.errors import RecipeError
from pear_megatron.problems.problem import ProblemsConfig, ProblemSet
from pear_megatron.recipe.load import read_values, validate_as


def read_problems_config(path: str, grader: str | None = None) -> ProblemsConfig:
    """A problem set from a file.

    Args:
        path: .jsonl with problems; or .yaml with the keys of ProblemsConfig, or with an RL recipe, of which
            it is ``data.validation``.
        grader: the Python file that grades a .jsonl; None = the one of the same name beside it.
    """
    file = Path(path).expanduser()
    if file.suffix in (".yaml", ".yml"):
        if grader:
            raise RecipeError(f"--grader is for .jsonl problems; {path} names its own grader")
        values = read_values(file)
        if isinstance(values, dict) and "data" in values:
            values = (values["data"] or {}).get("validation")
            if values is None:
                raise RecipeError(
                    f"{path}: the recipe has no data.validation; add the held-out problems there"
                )
        return validate_as(ProblemsConfig, file, values)
    beside = file.with_suffix(".py")
    if grader is None and not beside.is_file():
        raise RecipeError(
            f"{path}: no grader; name one with --grader, or put it beside the problems as {beside}"
        )
    return validate_as(ProblemsConfig, file, {"jsonl": path, "grader": grader or str(beside)})


def load_problems(config: ProblemsConfig) -> ProblemSet:
    """The problems of a set, the same every time."""
    if config.grader:
        from pear_megatron.problems.jsonl import read_problems

        problems = read_problems(config)
        graded_by = Path(config.grader).expanduser().read_text(encoding="utf-8")
    else:
        from pear_megatron.problems.reasoning_gym import make_problems

        problems = make_problems(config)
        graded_by = config.extract
    return ProblemSet(tuple(problems), graded_by)

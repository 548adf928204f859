"""The comparison's page: one HTML file that needs nothing else, and works without JavaScript."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from pear_megatron.compare import figures
from pear_megatron.compare.checks import other_data
from pear_megatron.compare.outcome import Measure, Outcome, show


def page(outcome: Outcome) -> str:
    """The whole page."""
    style = files("pear_megatron.inspect").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(
        [
            _head(outcome),
            _curves(outcome),
            _table(outcome, differences=True),
            _table(outcome, differences=False),
            _seeds(outcome),
            _tuning(outcome),
            _arms(outcome),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>The same RL from different checkpoints</title>\n<style>\n{style}"
        "section svg { max-width: 100%; height: auto; }\n</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(outcome: Outcome) -> str:
    recipe = outcome.recipe
    grpo = outcome.results[0].cell.rl.grpo
    before = outcome.results[0].before
    facts = {
        "arms x seeds": f"{len(recipe.arms)} x {len(outcome.seeds)}"
        + ("" if len(outcome.seeds) == len(recipe.seeds) else f" complete of {len(recipe.seeds)}"),
        "offline phase": recipe.offline.recipe.rpartition("/")[2],
        "RL": f"{recipe.rl.recipe.rpartition('/')[2]}: {grpo.max_num_steps} steps of {grpo.num_prompts_per_step} x "
        f"{grpo.num_generations_per_prompt}",
        "evaluations": f"{len(before.problems) if before else 0} held-out problems, {recipe.eval.num_samples} "
        "samples each",
        "checked": "in each seed all arms saw the same trajectories in the same order (but for those with data of "
        "their own), the same RL problems in the same order, and were asked the same held-out problems",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        f'<header><h1>The same RL from different checkpoints</h1><dl class="facts-list">{rows}</dl></header>'
    )


def _curves(outcome: Outcome) -> str:
    svg = figures.to_svg(figures.learning_curves(outcome))
    return f'<section id="curves"><h2>Learning curves</h2><figure>{svg}</figure></section>'


def _seeds(outcome: Outcome) -> str:
    svg = figures.to_svg(figures.every_seed(outcome))
    return f'<section id="seeds"><h2>Every seed</h2><figure>{svg}</figure></section>'


def _table(outcome: Outcome, *, differences: bool) -> str:
    baseline = outcome.recipe.baseline
    head = "".join(f'<th scope="col">{escape(m.title)}</th>' for m in outcome.measures)
    rows = []
    for arm in outcome.recipe.arms:
        if differences and arm == baseline:
            continue
        cells = "".join(_cell(outcome, m, arm, differences) for m in outcome.measures)
        rows.append(f'<tr><th scope="row">{escape(arm)}</th>{cells}</tr>')
    title = f"Difference from {baseline}, paired by seed" if differences else "Means"
    words = (
        "Means and 95 % intervals: Student's over seeds, with the problems' share where a measure has problems. "
        "An interval in bold does not contain 0. Nothing corrects for the number of comparisons. "
        if differences
        else "Means and 95 % intervals. A run that does not reach the reward counts with RL's length. "
    )
    if len(outcome.seeds) == 1:
        words += "One seed: intervals of pass@k cover problems only; of the others there are none."
    return (
        f"<section><h2>{escape(title)}</h2><p>{words}</p>"
        f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</section>"
    )


def _cell(outcome: Outcome, measure: Measure, arm: str, difference: bool) -> str:
    estimate = measure.difference(arm, outcome.recipe.baseline) if difference else measure.estimate(arm)
    known = measure.values[arm].ndim == 2 or len(outcome.seeds) > 1
    mean, _, bounds = show(estimate, measure.key, signed=difference, known=known).partition(" ")
    text = f"{mean}<br/><small>{bounds}</small>" if bounds else mean
    clear = difference and known and (estimate.low > 0 or estimate.high < 0)
    return f"<td>{f'<strong>{text}</strong>' if clear else text}</td>"


def _tuning(outcome: Outcome) -> str:
    tune = outcome.recipe.tune
    if tune is None or not outcome.tuning:
        return ""
    head = "".join(f'<th scope="col">{value:g}</th>' for value in tune.values)
    rows = []
    for arm, tried in outcome.tuning.items():
        best = max(tried, key=lambda value: tried[value])
        cells = "".join(
            f"<td>{f'<strong>{tried[v]:.3f}</strong>' if v == best else f'{tried[v]:.3f}'}</td>"
            for v in tune.values
        )
        rows.append(f'<tr><th scope="row">{escape(arm)}</th>{cells}</tr>')
    return (
        f"<section><h2>How {escape(tune.key)} was chosen</h2><p>Mean reward during RL on seed {tune.seed}, which is "
        f"none of the seeds above; the best one (bold) was taken for the arm.</p>"
        f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</section>"
    )


def _arms(outcome: Outcome) -> str:
    rows = []
    for arm, overrides in outcome.recipe.arms.items():
        cell = outcome.of(arm)[0].cell
        text = (
            "no offline phase" if overrides is None else " ".join([*overrides, *outcome.chosen.get(arm, ())])
        )
        note = "other data" if other_data(cell) else ""
        rows.append(
            f'<tr><th scope="row">{escape(arm)}</th><td><code>{escape(text)}</code></td><td>{note}</td></tr>'
        )
    return (
        "<section><h2>What the arms change</h2>"
        f'<div class="wide"><table><tbody>{"".join(rows)}</tbody></table></div></section>'
    )

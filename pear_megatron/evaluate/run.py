"""evaluate: samples responses of a checkpoint to problems, grades them, and writes what they come to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pear_megatron.data.tokenizer import load_tokenizer
from pear_megatron.errors import EvalError
from pear_megatron.evaluate.engines import load_engine
from pear_megatron.evaluate.results import Results, summarize
from pear_megatron.evaluate.samples import FILE, SampleFile, Slot, plan_batches, sample_seed
from pear_megatron.evaluate.sampling import Engine
from pear_megatron.evaluate.settings import EvalSettings, check_folder, write_settings
from pear_megatron.megatron.checkpoint.model_folder import check_model_folder, read_model_facts
from pear_megatron.problems.problem import ProblemSet
from pear_megatron.problems.prompts import encode_prompts, end_tokens
from pear_megatron.progress import sampling_progress
from pear_megatron.schema import describe
from pear_megatron.storage import PATIENCE, lock


def evaluate(
    model: str | Path,
    problems: ProblemSet,
    output: str | Path,
    *,
    ks: Sequence[int],
    right_at: float = 1.0,
    batch_size: int = 32,
    **settings: Any,
) -> Results:
    """Draws ``num_samples`` responses to each problem, unless ``output`` holds them, and grades them.

    Writes settings.json, samples.jsonl and results.json. Started again after it was killed, it continues.

    Args:
        model: a Hugging Face folder.
        right_at: the score from which a response is right.
        batch_size: prompts at once.
        settings: of EvalSettings, but for its digests.

    Raises:
        EvalError: the model cannot be used, a setting is wrong, or the folder holds another evaluation.
        DataError: a prompt does not fit the model.
        GraderError: a response cannot be graded.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig

    folder, output = check_model_folder(model), Path(output)
    settings.setdefault("dtype", "bf16" if torch.cuda.is_available() else "fp32")
    chosen = _settings(
        model=str(folder),
        weights=read_model_facts(folder).digest,
        problems=problems.prompts_digest,
        grading=problems.grading_digest,
        **settings,
    )
    ks = _check_ks(ks, chosen.num_samples)
    tokenizer = load_tokenizer(str(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:
        raise EvalError(f"{folder / 'config.json'} cannot be read: {error}") from error
    limit = getattr(config, "max_position_embeddings", None)
    prompts = encode_prompts(tokenizer, problems, chosen.max_new_tokens, limit, chosen.chat_template_kwargs)
    named = (
        GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    )
    end_ids = end_tokens(tokenizer, named)
    with lock(output, "evaluation", patience=PATIENCE):
        rows = _samples(output, chosen, problems, prompts, batch_size, folder, tokenizer, end_ids)
        ids = [problem.id for problem in problems]
        results = Results(chosen.model_dump(mode="json"), right_at, ks, summarize(rows, ids, right_at))
        results.write(output)
    return results


def _samples(
    output: Path,
    chosen: EvalSettings,
    problems: ProblemSet,
    prompts: list[list[int]],
    batch_size: int,
    folder: Path,
    tokenizer: Any,
    end_ids: Any,
) -> list[dict[str, Any]]:
    """Every response, graded: what the evaluation's folder holds, and what is still to be drawn."""
    regrade = check_folder(output, chosen)
    ids = [problem.id for problem in problems]
    batches = plan_batches([len(prompt) for prompt in prompts], chosen.num_samples, batch_size)
    samples = SampleFile(output / FILE, ids, batches)
    if regrade:
        by_id = dict(zip(ids, problems, strict=True))
        print(
            f"the grader or the answers changed: grading {len(samples.rows)} responses again", file=sys.stderr
        )
        samples.grade_again(lambda problem_id, response: by_id[problem_id].grade(response))
    write_settings(output, chosen)
    if samples.missing:
        engine = load_engine(chosen.engine, folder, end_ids, chosen.sampling, chosen.dtype)
        with sampling_progress(len(samples.rows), sum(map(len, batches))) as advance:
            for batch in samples.missing:
                rows = _draw(engine, tokenizer, problems, prompts, batch, chosen.seed)
                samples.add(rows)
                advance(len(rows), rows)
    return samples.rows


def _draw(
    engine: Engine,
    tokenizer: Any,
    problems: ProblemSet,
    prompts: list[list[int]],
    batch: Sequence[Slot],
    seed: int,
) -> list[dict[str, Any]]:
    seeds = [sample_seed(seed, problems[slot.problem].id, slot.sample) for slot in batch]
    completions = engine.generate([prompts[slot.problem] for slot in batch], seeds)
    rows = []
    for slot, completion in zip(batch, completions, strict=True):
        problem = problems[slot.problem]
        response = tokenizer.decode(completion.tokens, skip_special_tokens=True)
        rows.append(
            {
                "id": problem.id,
                "sample": slot.sample,
                "response": response,
                "score": problem.grade(response),
                "truncated": completion.truncated,
                "tokens": completion.tokens,
            }
        )
    return rows


def _settings(**values: Any) -> EvalSettings:
    try:
        return EvalSettings(**values)
    except ValidationError as error:
        raise EvalError(describe(error, "settings")) from error


def _check_ks(ks: Sequence[int], num_samples: int) -> list[int]:
    wrong = [k for k in ks if not 1 <= k <= num_samples]
    if wrong or not ks:
        raise EvalError(
            f"--k {','.join(map(str, ks))}: each k of pass@k is from 1 to --num-samples {num_samples}"
        )
    return sorted(set(ks))

"""`pear-megatron score`: behaviour log-probs for offline trajectories."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pear_megatron.commands.text_options import (
    ChatTemplateKwargsOption,
    ChatTemplateOption,
    MultiTurnOption,
    text_settings,
)
from pear_megatron.streams import log_lines

if TYPE_CHECKING:
    from pear_megatron.score.run import ScoreJob
    from pear_megatron.score.source import ScoreSettings

EPILOG = (
    "Example: pear-megatron score --model path/to/teacher --data 'data/*.jsonl' --output scored.parquet "
    "--tensor-parallel 2"
)


Backend = Literal["megatron", "hf", "import"]
WriteAs = Literal["behavior", "policy", "reference"]


def score(
    data: Annotated[list[str], typer.Option(help="JSONL or Parquet file; again for more; globs allowed")],
    output: Annotated[Path, typer.Option(help="Parquet file to write, as training reads it")],
    files: Annotated[list[str] | None, typer.Argument(help="more files", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="a Hugging Face folder, or a run or checkpoint of this package")
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(
            help="import: log-probs that vLLM, SGLang, an OpenAI-compatible server, slime, verl or NeMo-RL recorded. "
            "Default: megatron where it has the architecture, else hf"
        ),
    ] = None,
    write_as: Annotated[
        WriteAs,
        typer.Option(
            "--as",
            help="policy: the column policy_logprobs, for `inspect`, beside existing behavior_logprobs; reference: the "
            "column reference_logprobs, of the model that training starts from, likewise",
        ),
    ] = "behavior",
    top_k: Annotated[
        int,
        typer.Option(
            min=0,
            max=127,  # and the token that is there: data.topk.MAX_ENTRIES
            help="write the K likeliest tokens of each decision as well, for pear.base_loss=kl (8 K bytes per "
            "decision); import: of those that the engine recorded",
        ),
    ] = 0,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="ranks that share each layer")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="stages")] = 1,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="default: bf16 on a GPU, fp32 without")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="default: the model's")] = None,
    multi_turn: MultiTurnOption = None,
    chat_template: ChatTemplateOption = None,
    chat_template_kwargs: ChatTemplateKwargsOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="positions, at most; default: the model's max_position_embeddings"),
    ] = None,
    overlong: Annotated[Literal["error", "drop"], typer.Option(help="longer rows")] = "error",
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="rows x longest row; default: 16384 on a GPU, 2048 without")
    ] = None,
    raw_logprobs: Annotated[
        bool,
        typer.Option(
            "--raw-logprobs",
            help="import: the engine logged the model's own log-probs, at temperature 1 and over all tokens, "
            "whatever it sampled with",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start over")] = False,
) -> None:
    """Write each token's log-prob under the policy that wrote it (temperature 1), aligned with input_ids.

    The same command continues an interrupted one. Uses all GPUs of a machine: copies of the model, each over
    tensor x pipeline parallel ranks; torchrun does it over several machines.
    """
    from pear_megatron.errors import ScoreError
    from pear_megatron.ranks import is_main

    log_lines(logging.INFO if is_main() else logging.ERROR)
    from pear_megatron.score.source import ScoreSettings

    chosen, why = _backend(model, backend, write_as)
    if raw_logprobs and backend != "import":
        raise ScoreError(
            "--raw-logprobs is about recorded log-probs; give it with --backend import, or leave it out"
        )
    if top_k and write_as != "behavior":
        raise ScoreError(
            f"--top-k writes the likeliest tokens under the policy that wrote the data; leave --as {write_as} "
            "or --top-k out"
        )
    _run(
        ScoreSettings(
            data=[*data, *(files or [])],
            output=output,
            backend=chosen,
            model=model,
            write_as=write_as,
            top_k=top_k,
            tokenizer=tokenizer,
            **text_settings(multi_turn, chat_template, chat_template_kwargs),
            max_length=max_length,
            overlong=overlong,
            raw_logprobs=raw_logprobs,
            overwrite=overwrite,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            dtype=dtype or _default_dtype(),
            max_tokens_per_batch=max_tokens_per_batch,
        ),
        why,
    )


def _run(settings: ScoreSettings, why: str) -> None:
    from pear_megatron.megatron.checkpoint.model_folder import check_split
    from pear_megatron.ranks import ensure_ranks
    from pear_megatron.score.backends import refuse_to_split
    from pear_megatron.score.ranks import Ranks
    from pear_megatron.score.run import ScoreJob

    refuse_to_split(settings.backend, settings.tensor_parallel * settings.pipeline_parallel)
    if settings.backend == "megatron" and settings.model:
        check_split(settings.model, settings.tensor_parallel, settings.pipeline_parallel)
    job = ScoreJob(settings)
    alone = "WORLD_SIZE" not in os.environ
    if alone and job.prepare():  # before any rank is started: what is wrong with the data is said at once
        return
    ensure_ranks(settings.tensor_parallel * settings.pipeline_parallel, copies=_copies(settings, job, alone))
    logging.getLogger("pear_megatron").info("backend %s: %s", settings.backend, why)
    with Ranks() as ranks:
        if alone or not ranks.from_main(job.prepare):
            job.score(ranks)


def _backend(model: str | None, backend: Backend | None, write_as: WriteAs) -> tuple[str, str]:
    """(the backend asked for or else the one that fits the model, why)."""
    from pear_megatron.errors import ScoreError
    from pear_megatron.score.backends import choose_backend

    if backend == "import":
        if write_as != "behavior":
            raise ScoreError(
                f"--as {write_as} takes a model's log-probs, --backend import those of the generator"
            )
        return backend, "log-probs that the generator recorded"
    if model is None:
        raise ScoreError("--model is missing: name the policy that wrote the data, or give --backend import")
    fitting, why = choose_backend(model)
    if backend == "megatron" and fitting == "hf":
        raise ScoreError(f"--backend megatron: {why}; take --backend hf")
    return (backend, "asked for") if backend else (fitting, why)


def _default_dtype() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"


def _copies(settings: ScoreSettings, job: ScoreJob, alone: bool) -> int:
    """Copies of the model to start: as many as the machine's GPUs hold and there are chunks to score."""
    import torch

    if not alone or settings.backend != "megatron":
        return 1
    size = settings.tensor_parallel * settings.pipeline_parallel
    return max(1, min(torch.cuda.device_count() // size, job.num_missing()))

"""`pear-megatron export`: a trained checkpoint into a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

EPILOG = "Example: pear-megatron export --checkpoint results/run --output exports/run-step-1000"


def export(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="a run, its checkpoints/, one of them, or the output of convert", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option(help="the Hugging Face folder to write", show_default=False)],
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="with --pipeline-parallel: N x M processes share the writing")
    ] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="see --tensor-parallel")] = 1,
    dtype: Annotated[Literal["bf16", "fp32"] | None, typer.Option(help="default: as stored")] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest safetensors file: 5GB, 500MB, 2GiB")] = "5GB",
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter", help="of a LoRA run: write the adapters alone, as PEFT's folder, not merged"
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what --output holds")] = False,
    hf: Annotated[
        Path | None,
        typer.Option(help="for checkpoints of Megatron-Bridge only: the folder they were converted from"),
    ] = None,
) -> None:
    """Write a folder that transformers, vLLM and NeMo-RL open: weights, configuration, tokenizer."""
    from pear_megatron.ranks import ensure_ranks, is_main
    from pear_megatron.storage import check_output

    check_output(output, source=checkpoint, overwrite=overwrite)
    if hf is not None:
        from pear_megatron.hf.bridge import export_with_bridge, refuse_options
        from pear_megatron.megatron.checkpoint.paths import resolve

        refuse_options(
            tensor_parallel=tensor_parallel > 1,
            pipeline_parallel=pipeline_parallel > 1,
            dtype=dtype is not None,
            max_shard_size=max_shard_size != "5GB",
            adapter=adapter,
        )
        check_output(output, source=hf, overwrite=overwrite)
        exported = resolve(checkpoint)
        export_with_bridge(exported, hf, output)
        print(f"exported {exported.resolve()}")
        print(f"{output}: open it with AutoModelForCausalLM.from_pretrained")
        return
    if adapter:
        from pear_megatron.megatron.checkpoint.export import export_adapters

        exported = export_adapters(checkpoint, output)
        print(_said(exported))
        print(f"{output}: open it with peft.PeftModel.from_pretrained, or with load_adapter of the model")
        return
    ensure_ranks(tensor_parallel * pipeline_parallel)
    import torch

    from pear_megatron.hf.safetensors_files import parse_size
    from pear_megatron.megatron.checkpoint.export import export_checkpoint

    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    try:
        exported = export_checkpoint(
            checkpoint, output, precision=dtype, max_shard_size=parse_size(max_shard_size)
        )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if is_main():
        print(_said(exported))
        print(
            f"{output}: open it with AutoModelForCausalLM.from_pretrained, or as policy.model_name of NeMo-RL"
        )


def _said(exported: Path) -> str:
    """Which checkpoint was exported, and whether there is a better one."""
    from pear_megatron.megatron.checkpoint.paths import best_step, checkpoint_path

    folder = exported.resolve()
    best = best_step(folder.parent)
    other = best is not None and checkpoint_path(folder.parent, best).name != folder.name
    hint = f"; the best one by checkpoint.keep_best is step {best}: --checkpoint {folder.parent / 'best'}"
    return f"exported {folder}" + (hint if other else "")

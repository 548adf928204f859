"""`pear-megatron convert`: a Hugging Face checkpoint into Megatron-Core's format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

EPILOG = "Example: pear-megatron convert --hf models/Qwen2.5-7B --output checkpoints/qwen2.5-7b --tensor-parallel 2"


def convert(
    hf: Annotated[Path, typer.Option(help="folder of the Hugging Face checkpoint", show_default=False)],
    output: Annotated[Path, typer.Option(help="folder of the new checkpoint", show_default=False)],
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="processes that share each layer meanwhile")
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(min=1, help="processes that share the layers meanwhile")
    ] = 1,
    expert_parallel: Annotated[
        int, typer.Option(min=1, help="of these processes, those that share a mixture's experts")
    ] = 1,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="default: bf16 if all tensors are, else fp32")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what --output holds")] = False,
) -> None:
    """Make a checkpoint that checkpoint.pretrained takes, on any layout, from a Hugging Face folder."""
    from pear_megatron.ranks import ensure_ranks, is_main
    from pear_megatron.recipe.hf_config import UnsupportedArchitecture, model_keys
    from pear_megatron.storage import check_output

    check_output(output, source=hf, overwrite=overwrite)
    try:
        model_keys(hf)
    except UnsupportedArchitecture as reason:
        from pear_megatron.hf.bridge import convert_with_bridge, refuse_options

        refuse_options(
            tensor_parallel=tensor_parallel > 1,
            pipeline_parallel=pipeline_parallel > 1,
            expert_parallel=expert_parallel > 1,
            dtype=dtype is not None,
        )
        convert_with_bridge(hf, output, reason)
        print(
            f"{output}: for Megatron-Bridge's own loop (config.checkpoint.pretrained_checkpoint; PEAR's loss there: "
            "pear_megatron.adapters.bridge.finetune), not for pear_megatron.train. Back to Hugging Face: "
            f"pear-megatron export --checkpoint {output} --hf {hf} --output NEW"
        )
        return
    ensure_ranks(max(tensor_parallel, expert_parallel) * pipeline_parallel)
    warnings.simplefilter("ignore")  # of libraries, on every rank
    from pear_megatron.megatron.checkpoint.convert import convert_checkpoint
    from pear_megatron.megatron.layout import shutdown

    convert_checkpoint(
        hf,
        output,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        precision=dtype,
    )
    shutdown()
    if is_main():
        print(f"{output}: train from it with checkpoint.pretrained={output}")

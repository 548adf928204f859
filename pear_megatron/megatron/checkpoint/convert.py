"""A Hugging Face folder as a Megatron-Core checkpoint that any layout can load."""

from __future__ import annotations

from pathlib import Path

from pear_megatron.hf.assets import write_model_files
from pear_megatron.megatron.checkpoint.load_model import load_for_inference
from pear_megatron.megatron.checkpoint.saver import save_model
from pear_megatron.ranks import from_main
from pear_megatron.storage import abandon, begin, naming, partial_of, publish


def convert_checkpoint(
    folder: Path,
    output: Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    precision: str | None = None,
) -> None:
    """Writes the checkpoint, with model.yaml and hf/ beside it; it appears whole or not at all.

    Starts process groups (see load_for_inference).

    Args:
        folder: the Hugging Face checkpoint.
        output: root of the new one, put in the place of what may be there.
        tensor_parallel, pipeline_parallel: ranks that share the model while it is in memory, as many as
            torchrun started; the checkpoint does not depend on them.
        expert_parallel: of these ranks, those that share a mixture's experts.
        precision: ``bf16`` or ``fp32``; None = bf16 if every tensor is, else fp32.

    Raises:
        RecipeError, CheckpointError: on every rank: the source cannot be read or the output not be written.
    """
    model, keys, layout = load_for_inference(
        folder,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        precision=precision,
    )
    partial = partial_of(output)

    def finish() -> None:
        write_model_files(partial, keys, _precision(model), source=folder)
        publish(output)

    try:
        from_main(lambda: begin(output))
        save_model(partial, 0, layout, model)
        from_main(naming(output)(finish))
    finally:
        abandon(output)


def _precision(model: object) -> str:
    return "bf16" if model.config.bf16 else "fp32"  # type: ignore[attr-defined]

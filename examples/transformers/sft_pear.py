"""PEAR with Hugging Face's Trainer: scored trajectories in, a checkpoint folder out.

    torchrun --nproc-per-node 8 -m examples.transformers.sft_pear --model /models/Qwen2.5-7B \
        --data scored.parquet --output_dir results/pear --seq_length 4096 --bf16 --learning_rate 1e-5 \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --gradient_checkpointing

All of TrainingArguments are options (--help). A JSON file of PearConfig's fields is --pear; default: token weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments

from pear_megatron import PearConfig
from pear_megatron.adapters.transformers import PearTrainer, Trajectories
from pear_megatron.data import DataConfig
from pear_megatron.errors import PearError


@dataclass
class Given:
    """What TrainingArguments do not have."""

    model: str = field(metadata={"help": "Hugging Face folder to start from"})
    data: str = field(metadata={"help": "scored trajectories: a file, or a pattern in quotes"})
    validation_data: str | None = field(default=None, metadata={"help": "held-out trajectories"})
    seq_length: int = field(
        default=4096, metadata={"help": "the longest row; a trajectory of n tokens takes n - 1"}
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "as many trajectories as fit into a row; without, one, padded to the longest of its batch"
        },
    )
    pear: Path | None = field(default=None, metadata={"help": "JSON file of PearConfig's fields"})


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = HfArgumentParser((Given, TrainingArguments))
    given, args = parser.parse_args_into_dataclasses(arguments)
    pear = (
        PearConfig.model_validate_json(given.pear.read_text()) if given.pear else PearConfig(variant="token")
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32")  # --bf16 computes in bfloat16

    def rows(files: str) -> Trajectories:
        data = DataConfig(
            train=files, seq_length=given.seq_length, packing=given.packing, tokenizer=given.model
        )
        return Trajectories(data, pear, vocab_size=model.config.vocab_size)

    trainer = PearTrainer(
        model,
        args,
        pear=pear,
        train_dataset=rows(given.data),
        eval_dataset=rows(given.validation_data) if given.validation_data else None,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    try:
        main()
    except PearError as error:
        sys.exit(f"error: {error}")

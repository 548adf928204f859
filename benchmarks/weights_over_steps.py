"""How importance weights move as training goes: a model's own samples, scored by it, trained on under several settings.

The weights begin at 1 (times the discount), since the policy is the behaviour policy, and move with the
policy alone. docs/weights.md reads the tables.

Example:
    python -m benchmarks.weights_over_steps --output results/weights
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from examples.launch import RECIPES, command, train
from examples.puzzles.smollm2 import make_folder
from pear_megatron.storage import write_atomically

TOPICS = (
    "the sea", "a bridge", "bread", "winter", "a library", "trains", "honey", "the moon",
    "a garden", "salt", "clocks", "rivers", "a violin", "maps", "coffee", "mountains",
)  # fmt: skip
# Each beside the recipe's own, at the learning rate of --lr.
SETTINGS = {
    "default": [],
    "lr / 10": ["optimizer.lr={lr_10}"],
    "sequence normalised": ["pear.normalize=sequence"],
    "ceiling at 2": ["pear.log_weight_clip=[-10,0.7]"],
    "ratios within 0.08": ["pear.log_ratio_clip=[-0.08,0.08]"],
    "plain SFT": ["pear.variant=none"],
}
COLUMNS = {
    "step": "step",
    "nll": "nll",
    "log ratio": "pear/log_ratio",
    "mean weight": "pear/weight",
    "effective sample size": "pear/effective_sample_size",
    "at the ceiling": "pear/weight_at_ceiling",
    "gradient norm": "grad_norm",
}


def write_samples(model: Path, path: Path, *, count: int, max_new_tokens: int, seed: int = 0) -> None:
    """The model's answers at temperature 1, as rows of ``input_ids`` and ``loss_mask``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    policy.generation_config = GenerationConfig()  # neither top-k nor penalties
    end = tokenizer.eos_token_id
    questions = [f"Write a short paragraph about {TOPICS[i % len(TOPICS)]}." for i in range(count)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(seed)
    drawn = policy.generate(
        **prompts, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_new_tokens,
        eos_token_id=end, pad_token_id=end,
    )[:, prompts["input_ids"].shape[1] :]  # fmt: skip
    rows = []
    for i, response in enumerate(drawn.tolist()):
        prompt = prompts["input_ids"][i][prompts["attention_mask"][i].bool()].tolist()
        response = response[: response.index(end) + 1] if end in response else response
        mask = [0] * len(prompt) + [1] * len(response)
        rows.append(json.dumps({"id": str(i), "input_ids": prompt + response, "loss_mask": mask}) + "\n")
    write_atomically(path, "".join(rows))


def markdown(name: str, rows: list[dict[str, Any]]) -> str:
    """One run's steps as a table."""
    lines = [
        f"**{name}**",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| " + " | ".join("---" for _ in COLUMNS) + " |",
    ]
    for row in rows:
        lines.append("| " + " | ".join(f"{row[key]:.3g}" for key in COLUMNS.values()) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/weights"), metavar="DIR")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args(arguments)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    model = args.model.resolve() if args.model else output / "smollm2"
    if args.model is None:
        make_folder(model)
    samples, scored = output / "samples.jsonl", output / "scored.parquet"
    if not samples.exists():
        write_samples(model, samples, count=args.samples, max_new_tokens=args.max_new_tokens)
    command(output, "score", "--model", model, "--data", samples, "--output", scored)
    common = [
        f"model.hf={model}", f"data.train={scored}", f"train.max_steps={args.steps}", f"optimizer.lr={args.lr}",
        "optimizer.lr_warmup_steps=0", "optimizer.lr_decay_style=constant",
        "parallel.tensor_model_parallel_size=1", "cluster.gpus_per_node=1",
        "train.global_batch_size=4", "data.seq_length=128", "data.packing=false",
    ]  # fmt: skip
    tables = []
    for name in args.only:
        run = output / name.replace(" ", "-").replace("/", "by")
        overrides = [text.format(lr_10=args.lr / 10) for text in SETTINGS[name]]
        train(RECIPES / "puzzles.yaml", run, [*common, *overrides], processes=1)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tables.append(markdown(name, rows))
    (output / "tables.md").write_text("\n".join(tables))
    print("\n".join(tables))


if __name__ == "__main__":
    main()

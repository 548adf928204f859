"""GRPO on one machine with TRL's GRPOTrainer, on the CPU or one GPU.

pear-megatron grpo --engine trl --config recipes/grpo_trl/X.yaml --checkpoint EXPORT --output DIR [key=value ...]
"""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pear_megatron.data.tokenizer import load_tokenizer
from pear_megatron.errors import RecipeError, of_the_system
from pear_megatron.megatron.checkpoint.model_folder import check_model_folder
from pear_megatron.problems.load import load_problems
from pear_megatron.problems.problem import ProblemSet
from pear_megatron.problems.prompts import as_tokenizer_takes_it, encode_prompts, end_tokens
from pear_megatron.rl.trl.recipe import DataConfig, TrlRecipe
from pear_megatron.storage import PATIENCE, lock

log = logging.getLogger("pear_megatron")


def prompt_order(num_problems: int, num_prompts_per_step: int, max_num_steps: int, seed: int) -> list[int]:
    """Which problem each place of each step asks, [max_num_steps * num_prompts_per_step].

    All problems in a shuffled order, then all in another, and so on. It depends on nothing but the arguments:
    every checkpoint gets the same prompts in the same order, and a longer run begins as a shorter one.
    """
    order: list[int] = []
    for epoch in range(-(-num_prompts_per_step * max_num_steps // num_problems)):
        order += random.Random(f"{seed}:{epoch}").sample(range(num_problems), num_problems)
    return order[: num_prompts_per_step * max_num_steps]


def training_problems(data: DataConfig) -> ProblemSet:
    """``data.train`` without the problems that ``data.validation`` asks too.

    Raises:
        DataError, GraderError: the problems cannot be read.
        RecipeError: none is left.
    """
    problems = load_problems(data.train)
    if data.validation is None:
        return problems
    kept = problems.without(load_problems(data.validation))
    if not kept:
        raise RecipeError(
            f"all {len(problems)} problems of data.train are in data.validation too; use another seed or file"
        )
    if len(kept) < len(problems):
        print(
            f"left out {len(problems) - len(kept)} training problems that data.validation asks too",
            file=sys.stderr,
        )
    return kept


def run(recipe: TrlRecipe, checkpoint: str | Path, output: str | Path) -> Path:
    """Trains a checkpoint, or continues the run that ``output`` holds.

    ``output`` gets config.yaml, metrics.jsonl (a line a step), checkpoints/ (Hugging Face folders as well, with
    the optimizer) and final/.

    Args:
        recipe: how.
        checkpoint: a Hugging Face folder.
        output: the run's folder.

    Returns:
        output/final, a Hugging Face folder.

    Raises:
        PearError: the checkpoint, the problems or the folder cannot be used, or a response cannot be graded.
        ImportError: trl or reasoning-gym is missing.
    """
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ImportError(f"GRPO with TRL needs trl ({error}); pip install 'pear-megatron[rl]'") from error
    from pear_megatron.megatron.checkpoint.model_folder import read_model_facts
    from pear_megatron.rl.trl.run_folder import TrlRunFolder

    model = check_model_folder(checkpoint)
    problems = training_problems(recipe.data)
    with lock(Path(output), "pear-megatron grpo", patience=PATIENCE):
        folder = TrlRunFolder(Path(output), recipe, read_model_facts(model).digest)
        latest, done = folder.latest_checkpoint()
        folder.forget_after(done)
        if done < recipe.grpo.max_num_steps:
            folder.remove_final()
            trainer = _trainer(recipe, model, problems, folder)
            try:
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
            except Exception as error:
                if of_the_system(error, None):
                    folder.latest_checkpoint()  # removes the one that was being written
                raise
        elif done > recipe.grpo.max_num_steps:
            log.warning(
                "nothing to do: %s is at step %d already, and grpo.max_num_steps is %d",
                output,
                done,
                recipe.grpo.max_num_steps,
            )
        return folder.make_final()


def _trainer(recipe: TrlRecipe, model: Path, problems: ProblemSet, folder: Any) -> Any:
    from datasets import Dataset
    from transformers import ProgressCallback
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils import logging
    from trl import GRPOTrainer

    from pear_megatron.rl.trl.run_folder import KeepLast, WriteMetrics

    logging.disable_progress_bar()  # of loading and saving weights
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of TRL's own calls
    tokenizer = load_tokenizer(str(model))
    tokenizer.padding_side = "left"
    new_tokens = _max_new_tokens(recipe, tokenizer, problems)
    grpo = recipe.grpo
    order = prompt_order(len(problems), grpo.num_prompts_per_step, grpo.max_num_steps, grpo.seed)
    prompts = [as_tokenizer_takes_it(tokenizer, problem) for problem in problems]
    asked: list[int] = []
    trainer = GRPOTrainer(
        model=_load(model, tokenizer),
        reward_funcs=reward_function(problems, asked),
        args=_arguments(recipe, new_tokens, folder.checkpoints),
        train_dataset=Dataset.from_dict({"prompt": [prompts[i] for i in order], "problem": order}),
        processing_class=tokenizer,
        callbacks=[WriteMetrics(folder, recipe, asked), KeepLast(folder, recipe.checkpointing.keep_last)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _load(folder: Path, tokenizer: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{folder} cannot be loaded: {error}") from error
    ends = end_tokens(tokenizer, model.generation_config)  # TRL stops at these
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return model


def _max_new_tokens(recipe: TrlRecipe, tokenizer: Any, problems: ProblemSet) -> int:
    """The longest response there may be; DataError where a prompt leaves no room for it."""
    total, wanted = recipe.policy.max_total_sequence_length, recipe.policy.generation.max_new_tokens
    kwargs = recipe.policy.tokenizer.chat_template_kwargs
    prompts = encode_prompts(tokenizer, problems, wanted or 1, total, kwargs)
    return wanted or total - max(map(len, prompts))


def reward_function(problems: ProblemSet, asked: list[int]) -> Callable[..., list[float | None]]:
    """What GRPOTrainer calls: the problems' own graders; ``asked`` gets the number of each response's problem."""

    def grade(completions: list[Any], problem: list[int], **_: Any) -> list[float | None]:
        asked.extend(problem)
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return [problems[i].grade(text) for i, text in zip(problem, texts, strict=True)]

    return grade


def _arguments(recipe: TrlRecipe, max_new_tokens: int, checkpoints: Path) -> Any:
    import torch
    from trl import GRPOConfig

    grpo, loss, policy = recipe.grpo, recipe.loss_fn, recipe.policy
    updates = recipe.updates_per_step
    return GRPOConfig(
        output_dir=str(checkpoints),
        seed=grpo.seed,
        max_steps=grpo.max_num_steps * updates,
        num_generations=grpo.num_generations_per_prompt,
        generation_batch_size=recipe.rollouts,
        per_device_train_batch_size=policy.train_micro_batch_size,
        gradient_accumulation_steps=recipe.rollouts // updates // policy.train_micro_batch_size,
        shuffle_dataset=False,  # prompt_order has shuffled it
        max_completion_length=max_new_tokens,
        chat_template_kwargs=policy.tokenizer.chat_template_kwargs,
        temperature=policy.generation.temperature,
        top_p=policy.generation.top_p,
        beta=loss.reference_policy_kl_penalty,
        use_bias_correction_kl=False,  # NeMo-RL's KL penalty has no ratio in it either
        epsilon=loss.ratio_clip_min,
        epsilon_high=loss.ratio_clip_max,
        scale_rewards="group" if grpo.normalize_rewards else "none",
        loss_type="dapo",  # the mean over all of a step's tokens: NeMo-RL's token_level_loss
        learning_rate=policy.optimizer.kwargs.lr,
        lr_scheduler_type="constant",
        weight_decay=policy.optimizer.kwargs.weight_decay,
        adam_beta1=policy.optimizer.kwargs.betas[0],
        adam_beta2=policy.optimizer.kwargs.betas[1],
        adam_epsilon=policy.optimizer.kwargs.eps,
        max_grad_norm=policy.max_grad_norm,
        bf16=policy.precision == "bfloat16",
        gradient_checkpointing=policy.activation_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=updates,
        save_steps=recipe.checkpointing.save_period * updates,
        report_to=[],
        disable_tqdm=True,
    )

"""TrlRecipe: the YAML keys of GRPO on one machine; NeMo-RL's where they mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pear_megatron.problems.problem import ProblemsConfig
from pear_megatron.recipe.load import read_values, validate_as
from pear_megatron.schema import StrictModel


class GrpoConfig(StrictModel):
    """The algorithm.

    Attributes:
        num_prompts_per_step, num_generations_per_prompt: their product is a step's rollouts.
        max_num_steps: steps of rollouts.
        normalize_rewards: divide a group's advantages by its rewards' standard deviation.
        seed: of the prompts' order and of sampling.
    """

    num_prompts_per_step: int = Field(default=32, ge=1)
    num_generations_per_prompt: int = Field(default=8, ge=2)
    max_num_steps: int = Field(ge=1)
    normalize_rewards: bool = True
    seed: int = Field(default=42, ge=0)


class LossConfig(StrictModel):
    """The clipped policy loss, a mean over the step's tokens.

    Attributes:
        reference_policy_kl_penalty: times the KL divergence (k3) from the checkpoint; 0 keeps no copy of it.
        ratio_clip_min, ratio_clip_max: the ratio is clipped to [1 - min, 1 + max].
    """

    reference_policy_kl_penalty: float = Field(default=0.0, ge=0)
    ratio_clip_min: float = Field(default=0.2, gt=0)
    ratio_clip_max: float = Field(default=0.2, gt=0)


class GenerationConfig(StrictModel):
    """How rollouts are drawn.

    Attributes:
        temperature, top_p: of sampling.
        max_new_tokens: None = what the longest prompt leaves of policy.max_total_sequence_length.
    """

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1)


class OptimizerKwargs(StrictModel):
    """Of torch.optim.AdamW; the learning rate is constant.

    Attributes:
        lr, weight_decay, betas, eps: by torch's names.
    """

    lr: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)


class OptimizerConfig(StrictModel):
    """The optimizer, as NeMo-RL nests it."""

    kwargs: OptimizerKwargs = OptimizerKwargs()


class TokenizerConfig(StrictModel):
    """How prompts are rendered.

    Attributes:
        chat_template_kwargs: arguments of the chat template, those that the offline phase rendered with.
    """

    chat_template_kwargs: dict[str, Any] | None = None


class PolicyConfig(StrictModel):
    """The model and its training.

    Attributes:
        model_name: folder of the Hugging Face checkpoint that RL starts from; --checkpoint wins.
        train_global_batch_size: rollouts of an optimizer step; None = all of a step's, which is on-policy.
        train_micro_batch_size: rollouts of a forward pass; bounds the memory.
        max_total_sequence_length: tokens of a prompt and its response.
        precision: bfloat16 keeps float32 weights and computes in bfloat16.
        max_grad_norm: the gradient's largest norm.
        activation_checkpointing: saves memory, costs time.
    """

    model_name: str | None = None
    train_global_batch_size: int | None = Field(default=None, ge=1)
    train_micro_batch_size: int = Field(default=4, ge=1)
    max_total_sequence_length: int = Field(ge=2)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    max_grad_norm: float = Field(default=1.0, gt=0)
    activation_checkpointing: bool = False
    tokenizer: TokenizerConfig = TokenizerConfig()
    generation: GenerationConfig = GenerationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class DataConfig(StrictModel):
    """The problems.

    Attributes:
        train: what RL asks; problems whose prompt is also in ``validation`` are left out.
        validation: held out; ``pear-megatron eval --problems RECIPE.yaml`` asks these.
    """

    train: ProblemsConfig
    validation: ProblemsConfig | None = None


class CheckpointingConfig(StrictModel):
    """Checkpoints, of which the latest whole one is continued from.

    Attributes:
        save_period: steps between them.
        keep_last: how many stay; None = all.
    """

    save_period: int = Field(default=20, ge=1)
    keep_last: int | None = Field(default=None, ge=1)


class TrlRecipe(StrictModel):
    """One RL run with TRL's GRPOTrainer."""

    grpo: GrpoConfig
    loss_fn: LossConfig = LossConfig()
    policy: PolicyConfig
    data: DataConfig
    checkpointing: CheckpointingConfig = CheckpointingConfig()

    @property
    def rollouts(self) -> int:
        """Responses of a step."""
        return self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on a step's rollouts."""
        return self.rollouts // (self.policy.train_global_batch_size or self.rollouts)

    @model_validator(mode="after")
    def _check(self) -> Self:
        batch = self.policy.train_global_batch_size or self.rollouts
        if self.rollouts % batch:
            raise ValueError(
                f"policy.train_global_batch_size {batch} does not divide the {self.rollouts} rollouts of a step "
                "(grpo.num_prompts_per_step x num_generations_per_prompt)"
            )
        if batch % self.policy.train_micro_batch_size:
            raise ValueError(
                f"policy.train_micro_batch_size {self.policy.train_micro_batch_size} does not divide the {batch} "
                "rollouts of an optimizer step"
            )
        return self


def load_trl_recipe(path: str | Path, overrides: list[str] | None = None) -> TrlRecipe:
    """Reads a recipe, its parents and ``key=value`` overrides.

    Raises:
        RecipeError: a missing file, bad YAML, an unknown key (with the nearest known one) or a bad value.
    """
    return validate_as(TrlRecipe, Path(path), read_values(Path(path), overrides, folder="grpo_trl"))

"""Recipe: the YAML keys of a run and what they mean, one class a section."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from pear_megatron.config import PearConfig
from pear_megatron.data.config import DataConfig
from pear_megatron.schema import StrictModel

# What a checkpoint can be the best by; the last one is better when it is higher, the others when lower.
BestMetric = Literal["validation/nll", "validation/loss", "validation/pear/effective_sample_size"]

_EXPERT_KEYS = (
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
)


class ModelConfig(StrictModel):
    """A Llama/Qwen-like GPT, dense or with a mixture of experts in every layer, in Megatron-Core's words.

    Attributes:
        hf: folder of a Hugging Face checkpoint that training starts from. Keys below that a recipe does not
            give come from its config.json; keys that it gives must agree with it.
        num_layers, hidden_size, num_attention_heads: the transformer's sizes.
        ffn_hidden_size: inner width of a layer's MLP.
        num_query_groups: key and value heads; None = num_attention_heads.
        kv_channels: width of an attention head; None = hidden_size / num_attention_heads.
        vocab_size: tokens, before Megatron pads them.
        max_position_embeddings: longest context that the model is made for.
        normalization, norm_epsilon: of the layers' norms.
        activation: of the MLP; ``swiglu`` has a gate.
        position_embedding_type, rotary_base: ``rope`` rotates by frequencies of this base.
        rope_scaling_factor: Llama-3's scaling of the rotary frequencies, with its low and high frequency
            factors 1 and 4 and its original length 8192 (all that Megatron-Core has); None = none.
        yarn_rotary_scaling_factor, yarn_original_max_position_embeddings: YaRN (arXiv 2309.00071), which stretches
            the second, the length the model was trained at, by the first; its betas are 32 and 1. None = none.
        add_bias_linear: biases in all linear layers.
        add_qkv_bias: biases in the query, key and value projections (Qwen2).
        qk_layernorm: norms of queries and keys (Qwen3).
        share_embeddings_and_output_weights: the output layer is the embedding (tied).
        num_moe_experts: experts of every layer; None = a dense model.
        moe_router_topk: experts that a token goes to.
        moe_ffn_hidden_size: width of an expert; None = ffn_hidden_size, which a mixture has no other use for.
        moe_router_pre_softmax: a token's weights are the softmax over all experts (transformers' norm_topk_prob
            false); false = over those that it goes to, so that they add up to 1.
        moe_shared_expert_intermediate_size: width of the expert that every token goes to; None = there is none.
        moe_shared_expert_gate: a sigmoid gate scales that expert's output (Qwen2-MoE).
        init_method_std, embedding_init_method_std: standard deviation of fresh weights; the latter None = the former.
    """

    hf: str | None = None
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    ffn_hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int | None = None
    kv_channels: int | None = None
    vocab_size: int = Field(ge=2)
    max_position_embeddings: int = Field(ge=1)
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = Field(default=1e-6, gt=0)
    activation: Literal["swiglu", "gelu"] = "swiglu"
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: int = Field(default=10000, ge=1)
    rope_scaling_factor: float | None = Field(default=None, gt=0)
    yarn_rotary_scaling_factor: float | None = Field(default=None, ge=1)
    yarn_original_max_position_embeddings: int | None = Field(default=None, ge=1)
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    share_embeddings_and_output_weights: bool = False
    num_moe_experts: int | None = Field(default=None, ge=1)
    moe_router_topk: int | None = Field(default=None, ge=1)
    moe_ffn_hidden_size: int | None = Field(default=None, ge=1)
    moe_router_pre_softmax: bool = False
    moe_shared_expert_intermediate_size: int | None = Field(default=None, ge=1)
    moe_shared_expert_gate: bool = False
    init_method_std: float = Field(default=0.02, gt=0)
    embedding_init_method_std: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_yarn(self) -> Self:
        if (self.yarn_rotary_scaling_factor is None) != (self.yarn_original_max_position_embeddings is None):
            raise ValueError(
                "yarn_rotary_scaling_factor and yarn_original_max_position_embeddings go together; give both or none"
            )
        if self.yarn_rotary_scaling_factor is not None and (
            self.rope_scaling_factor is not None or self.position_embedding_type != "rope"
        ):
            raise ValueError(
                "yarn_rotary_scaling_factor needs position_embedding_type rope, without rope_scaling_factor "
                "(Llama-3's scaling); leave one of them out"
            )
        return self

    @property
    def longest_context(self) -> int:
        """Positions the model is made for: with YaRN, config.json often keeps the length before it."""
        stretched = (self.yarn_rotary_scaling_factor or 1) * (self.yarn_original_max_position_embeddings or 1)
        return max(self.max_position_embeddings, int(stretched))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; change one or set kv_channels"
            )
        groups = self.num_query_groups or self.num_attention_heads
        if self.num_attention_heads % groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups {groups}"
            )
        self._check_experts()
        return self

    def _check_experts(self) -> None:
        if self.num_moe_experts is None:
            for key in _EXPERT_KEYS:
                if getattr(self, key):
                    raise ValueError(
                        f"{key} {getattr(self, key)} needs num_moe_experts; set that or leave it out"
                    )
            return
        if self.moe_router_topk is None:
            raise ValueError("num_moe_experts needs moe_router_topk: how many experts a token goes to")
        if self.moe_router_topk > self.num_moe_experts:
            raise ValueError(
                f"moe_router_topk {self.moe_router_topk} exceeds num_moe_experts {self.num_moe_experts}"
            )
        if self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            raise ValueError(
                "moe_router_topk 1 needs moe_router_pre_softmax: over one expert the softmax is 1, and the router "
                "would learn nothing"
            )
        if self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None:
            raise ValueError("moe_shared_expert_gate needs moe_shared_expert_intermediate_size; set both")
        if self.add_bias_linear:
            raise ValueError("add_bias_linear does not go with num_moe_experts; leave it out")


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(StrictModel):
    """LoRA: the model's weights are frozen, and each projection named gets ``alpha / rank * B A`` beside it.

    Attributes:
        rank: rows of A and columns of B.
        alpha: see above.
        target_modules: projections, by their Hugging Face names; every layer has them.
    """

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    target_modules: tuple[Projection, ...] = Field(default=get_args(Projection), min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.target_modules)) != len(self.target_modules):
            raise ValueError(f"target_modules names a projection twice: {', '.join(self.target_modules)}")
        return self


class ParallelConfig(StrictModel):
    """How the model is split over ranks, in Megatron's words; what is left of the world is data parallel.

    Attributes:
        tensor_model_parallel_size: ranks that share each layer.
        pipeline_model_parallel_size: stages, each with its part of the layers.
        virtual_pipeline_model_parallel_size: model chunks a pipeline stage holds (the interleaved schedule).
        context_parallel_size: ranks that share each sequence, in zigzag chunks; needs Transformer Engine.
        sequence_parallel: norms and dropout split over the tensor-parallel ranks.
        expert_model_parallel_size: ranks that share each layer's experts; they are ranks of tensor, context and
            data parallelism, so that the world does not grow by them.
        expert_tensor_parallel_size: ranks that share each expert; None = tensor_model_parallel_size.
        use_distributed_optimizer: the optimizer's state is split over the data-parallel ranks.
        overlap_grad_reduce, overlap_param_gather: data-parallel collectives beside the computation.
        tp_comm_overlap: tensor-parallel collectives beside the GEMMs; needs sequence_parallel and Transformer Engine.
    """

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    context_parallel_size: int = Field(default=1, ge=1)
    sequence_parallel: bool = False
    expert_model_parallel_size: int = Field(default=1, ge=1)
    expert_tensor_parallel_size: int | None = Field(default=None, ge=1)
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tp_comm_overlap: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tp_comm_overlap and not self.sequence_parallel:
            raise ValueError("tp_comm_overlap needs sequence_parallel; set it, or leave tp_comm_overlap out")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce; set both"
            )
        return self


class ProfileConfig(StrictModel):
    """Steps whose every operation is written down, for a look at where the time goes.

    Attributes:
        start, stop: the first and the last of them, counted from 1.
        ranks: that are looked at.
    """

    start: int = Field(ge=1)
    stop: int = Field(ge=1)
    ranks: list[int] = Field(default=[0], min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stop < self.start:
            raise ValueError(f"stop {self.stop} comes before start {self.start}; both steps are profiled")
        if min(self.ranks) < 0:
            raise ValueError(f"ranks {self.ranks}: ranks count from 0")
        return self


class TrainConfig(StrictModel):
    """Length of the run and size of its batches (sequences of ``data.seq_length`` tokens).

    Attributes:
        max_steps: optimizer steps; None = num_epochs.
        num_epochs: each trains every trajectory once; the last, shorter batch of an epoch is a full step, normalised
            by its own number of decisions (docs/checkpoints.md). With weights of sources an epoch is as much as they
            hold together (docs/data.md).
        global_batch_size: rows of an optimizer step, over all ranks.
        micro_batch_size: rows of one forward pass.
        precision: of weights and computation; with ``bf16`` the optimizer keeps float32 weights.
        log_interval: steps between lines of the log; metrics.jsonl has every step.
        loss_normalization: ``token``: the loss is the mean over the global batch's decisions. ``trajectory``: the
            mean over its trajectories of the mean over their decisions (docs/method.md, Loss).
        eval_interval: steps between evaluations on ``data.validation``; None = before the first step and after the
            last alone, which are evaluated in any case.
        recompute_granularity, recompute_method, recompute_num_layers: activation recomputation, as Megatron
            names it; ``full`` needs a method and a number of layers, ``selective`` neither.
        recompute_modules: what ``selective`` recomputes in every layer, by Megatron's names: attention's core, the MLP
            of a dense model; None = the first.
        fp8: the layers' GEMMs in FP8, in Transformer Engine: ``e4m3``, or ``hybrid``, with e5m2 for gradients. Weights
            stay in bf16, and so do attention, the output layer and what is saved. None = none.
        fp8_recipe: what shares a scale: a ``tensorwise`` whole tensor, ``blockwise`` 128 values or 128 x 128 weights,
            ``mxfp8`` 32 values; goes with fp8 (docs/memory-and-speed.md).
        attention: how the trajectories of a row stay apart. ``transformer_engine``: in its layers; ``varlen``: torch's
            flash attention, over each trajectory, in Megatron's own; ``mask``: a mask of S x S positions, the
            reference; ``auto``: the first that this machine and the precision have (docs/long-sequences.md).
        output_chunk_tokens: compute the output layer and the loss for so many tokens of a micro-batch at a time,
            so that logits take memory for those alone; its GEMM runs once more in backward. None = all at
            once. Needs megatron-core 0.19+ (docs/long-sequences.md).
        check_alignment: before the first step, compare the model's log-probs with the behaviour log-probs of
            the first batch, and refuse data that fit better shifted by a token or two.
        moe_aux_loss_coeff: of the routers' load-balancing loss; its gradient alone is added, ``loss`` is without it.
        moe_z_loss_coeff: of the routers' z-loss (docs/moe.md).
        profile: steps to write a profile of; None = none.
    """

    max_steps: int | None = Field(default=None, ge=1)
    num_epochs: int = Field(default=1, ge=1)
    global_batch_size: int = Field(default=64, ge=1)
    micro_batch_size: int = Field(default=1, ge=1)
    loss_normalization: Literal["token", "trajectory"] = "token"
    eval_interval: int | None = Field(default=None, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["e4m3", "hybrid"] | None = None
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] | None = None
    attention: Literal["auto", "transformer_engine", "varlen", "mask"] = "auto"
    log_interval: int = Field(default=1, ge=1)
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = Field(default=None, ge=1)
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] | None = Field(default=None, min_length=1)
    output_chunk_tokens: int | None = Field(default=None, ge=1)
    check_alignment: bool = True
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    moe_z_loss_coeff: float = Field(default=0.0, ge=0)
    profile: ProfileConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.recompute_modules is not None and self.recompute_granularity != "selective":
            raise ValueError(
                f"recompute_modules names what recompute_granularity=selective recomputes, and that is "
                f"{self.recompute_granularity}; set it, or leave recompute_modules out"
            )
        if (self.fp8 is None) != (self.fp8_recipe is None):
            raise ValueError(
                f"fp8 and fp8_recipe go together (they are {self.fp8} and {self.fp8_recipe}); give both or none"
            )
        if self.fp8 is not None and (self.precision != "bf16" or self.attention in ("varlen", "mask")):
            changes = ["precision=bf16"] if self.precision != "bf16" else []
            changes += ["attention=auto"] if self.attention in ("varlen", "mask") else []
            raise ValueError(
                f"fp8 {self.fp8} is of Transformer Engine's layers over bf16 weights, and precision is "
                f"{self.precision}, attention {self.attention}; set {' and '.join(changes)}, or leave fp8 out"
            )
        needed = self.recompute_granularity == "full"
        for key in ("recompute_method", "recompute_num_layers"):
            if needed != (getattr(self, key) is not None):
                raise ValueError(
                    f"{key} goes with recompute_granularity=full, and only with it "
                    f"(recompute_granularity is {self.recompute_granularity}, {key} is {getattr(self, key)})"
                )
        return self


StateDtype = Literal["fp32", "fp16", "bf16", "fp8"]


class OptimizerConfig(StrictModel):
    """The optimizer and its learning-rate schedule, in Megatron's words; steps are optimizer steps.

    Attributes:
        optimizer: ``adam`` is AdamW. ``muon`` (arXiv 2502.16982) takes the layers' matrices and leaves embeddings,
            output layer, norms and biases to AdamW; both have the same lr.
        lr: the highest; the first step's, without a warm-up.
        min_lr: where the decay ends.
        lr_decay_style: its shape, from ``lr`` after the warm-up to ``min_lr``.
        weight_decay, adam_beta1, adam_beta2, adam_eps: AdamW's.
        clip_grad: the gradient's largest norm; 0 = it is not clipped.
        lr_warmup_steps: lr rises in equal parts, from 0 at the first step, which changes nothing then, to ``lr``
            at the step after these.
        lr_decay_steps: step at which lr reaches ``min_lr``, the warm-up included; None = that after the last of
            the run. A run that is to be extended later keeps its schedule if this is its final length.
        muon_momentum, muon_extra_scale_factor: of Muon; its updates have a root mean square of the latter.
        use_precision_aware_optimizer: Transformer Engine's FusedAdam keeps its state in the types below.
        main_grads_dtype, main_params_dtype: of the gradients that are summed and reduced, and of the main weights
            (fp32, of which 16 bits are the weight itself, or fp16).
        exp_avg_dtype, exp_avg_sq_dtype: of Adam's two moments.
        optimizer_cpu_offload: the state of ``optimizer_offload_fraction`` of the parameters lies in the host's memory,
            and its CPUs update it. Needs use_precision_aware_optimizer, whose path it takes, with a state in fp32.
        optimizer_offload_fraction: see optimizer_cpu_offload.
    """

    optimizer: Literal["adam", "muon"] = "adam"
    lr: float = Field(default=1e-5, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_steps: int = Field(default=0, ge=0)
    lr_decay_steps: int | None = Field(default=None, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    muon_extra_scale_factor: float = Field(default=1.0, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)
    use_precision_aware_optimizer: bool = False
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    exp_avg_dtype: StateDtype = "fp32"
    exp_avg_sq_dtype: StateDtype = "fp32"
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} exceeds lr {self.lr}; lower it, or raise lr")
        if self.lr_decay_steps is not None and self.lr_decay_steps <= self.lr_warmup_steps:
            raise ValueError(
                f"lr_decay_steps {self.lr_decay_steps} counts the warm-up and must exceed lr_warmup_steps "
                f"{self.lr_warmup_steps}"
            )
        state = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        adam, aware = self.optimizer == "adam", self.use_precision_aware_optimizer
        self._only(not adam, ("muon_momentum", "muon_extra_scale_factor"), "optimizer=muon")
        self._only(adam, ("use_precision_aware_optimizer",), "optimizer=adam")
        self._only(
            aware, ("main_grads_dtype", *state, "optimizer_cpu_offload"), "use_precision_aware_optimizer=true"
        )
        self._only(self.optimizer_cpu_offload, ("optimizer_offload_fraction",), "optimizer_cpu_offload=true")
        self._only(
            not self.optimizer_cpu_offload, state, "optimizer_cpu_offload=false (its state is float32)"
        )
        return self

    def _only(self, holds: bool, keys: tuple[str, ...], condition: str) -> None:
        """Refuses keys that are not at their default where the condition does not hold."""
        for key in keys:
            if not holds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} {getattr(self, key)} needs {condition}; set that, or leave {key} out"
                )


class CheckpointConfig(StrictModel):
    """What a run starts from and when it saves; it always saves at its end.

    Attributes:
        pretrained: a Megatron-Core checkpoint to start from: a run, or the output of ``convert``.
        save_interval: steps between checkpoints.
        keep_last: how many checkpoints stay, the newest; null = all.
        keep_best: metric of the evaluations on ``data.validation``: an evaluation that is better than all before it
            saves a checkpoint, which stays beside the newest until a better one is there. None = none is kept.
        export_interval: steps between exports of a saved checkpoint as a Hugging Face folder; a multiple of
            save_interval. The end of a run is exported as well. None = no exports.
        async_save: write in the background while training goes on.
        resume: continue what output_dir holds; False refuses to.
    """

    pretrained: str | None = None
    save_interval: int | None = Field(default=None, ge=1)
    keep_last: int | None = Field(default=2, ge=1)
    keep_best: BestMetric | None = None
    export_interval: int | None = Field(default=None, ge=1)
    async_save: bool = False
    resume: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.export_interval is None:
            return self
        if self.save_interval is None or self.export_interval % self.save_interval:
            raise ValueError(
                f"export_interval {self.export_interval} exports saved checkpoints and must be a multiple of "
                f"save_interval, which is {self.save_interval}; change one of them"
            )
        return self


class LoggingConfig(StrictModel):
    """Where metrics go beside metrics.jsonl and TensorBoard: Weights & Biases, where a project is named.

    Attributes:
        wandb_project: None = W&B is not used.
        wandb_name: the run's name there; None = that of output_dir.
    """

    wandb_project: str | None = None
    wandb_name: str | None = None


class ClusterConfig(StrictModel):
    """What the recipe's layout was made for: ``plan`` checks against it and sft.sbatch asks for it.

    Attributes:
        num_nodes, gpus_per_node: as NeMo-RL names them.
        gpu: its memory and peak FLOP/s are known to ``plan`` and to the MFU that training reports.
    """

    num_nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=8, ge=1)
    gpu: Literal["A100-80GB", "H100-80GB", "H200-141GB", "B200-180GB", "cpu"] = "H100-80GB"


# GPUs of ClusterConfig that Transformer Engine refuses a recipe on.
_WITHOUT_FP8 = {
    "tensorwise": ("A100-80GB",),
    "blockwise": ("A100-80GB",),
    "mxfp8": ("A100-80GB", "H100-80GB", "H200-141GB"),
}


class Recipe(StrictModel):
    """One training run.

    Attributes:
        output_dir: folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/.
        seed: of initial weights and data order.
        lora: train adapters beside frozen weights; None = train all weights.
        model, parallel, train, optimizer, checkpoint, logging, cluster, data, pear: see their classes.
    """

    output_dir: str = Field(min_length=1)
    seed: int = Field(default=1234, ge=0)
    model: ModelConfig
    lora: LoraConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()
    data: DataConfig
    pear: PearConfig = PearConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.seq_length > self.model.longest_context:
            raise ValueError(
                f"data.seq_length {self.data.seq_length} exceeds model.max_position_embeddings "
                f"{self.model.longest_context}"
            )
        if self.data.validation is None:
            for key, value in (
                ("train.eval_interval", self.train.eval_interval),
                ("checkpoint.keep_best", self.checkpoint.keep_best),
            ):
                if value is not None:
                    raise ValueError(
                        f"{key} {value} needs held-out trajectories; name their files in data.validation, or "
                        "leave it out"
                    )
        if self.checkpoint.keep_best is not None and self.train.eval_interval is None:
            raise ValueError(
                f"checkpoint.keep_best {self.checkpoint.keep_best} has the last step's evaluation alone to choose "
                "from; set train.eval_interval, or leave it out"
            )
        if "$" in self.output_dir:
            raise ValueError(
                f"output_dir {self.output_dir} has a $ in it, which nothing replaces here; write the value, or in YAML "
                "${oc.env:NAME}"
            )
        if self.model.hf and self.checkpoint.pretrained:
            raise ValueError(
                "model.hf and checkpoint.pretrained both name weights to start from; give one of them"
            )
        self._check_experts()
        self._check_memory_and_speed()
        if self.lora is not None and not (self.model.hf or self.checkpoint.pretrained):
            raise ValueError(
                "lora trains adapters of a model that is there; give model.hf or checkpoint.pretrained, or leave "
                "lora out"
            )
        if self.lora is not None and self.model.activation != "swiglu":
            raise ValueError(
                f"lora needs the projections of a Llama-like model, and model.activation is {self.model.activation}; "
                "leave lora out"
            )
        return self

    def _check_memory_and_speed(self) -> None:
        distributed, bf16 = self.parallel.use_distributed_optimizer, self.train.precision == "bf16"
        if self.optimizer.optimizer == "muon" and (distributed or self.lora is not None):
            raise ValueError(
                "optimizer.optimizer muon works on a model's whole matrices: not with "
                "parallel.use_distributed_optimizer, which cuts them, nor with lora; set that to "
                "false, or optimizer.optimizer=adam"
            )
        if self.optimizer.use_precision_aware_optimizer and not (distributed and bf16):
            raise ValueError(
                "optimizer.use_precision_aware_optimizer needs parallel.use_distributed_optimizer and "
                "train.precision=bf16; set both, or leave it out"
            )
        fp8_recipe, gpu = self.train.fp8_recipe, self.cluster.gpu
        if gpu in _WITHOUT_FP8.get(fp8_recipe or "", ()):
            raise ValueError(
                f"train.fp8_recipe {fp8_recipe} does not run on cluster.gpu {gpu}; correct cluster.gpu, take another "
                "recipe, or leave train.fp8 and train.fp8_recipe out"
            )

    def _check_experts(self) -> None:
        if self.lora is not None and self.model.num_moe_experts is not None:
            raise ValueError(
                "lora has no adapters for a mixture of experts (model.num_moe_experts); leave lora out"
            )
        if self.model.num_moe_experts is None:
            for key in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
                if getattr(self.train, key):
                    raise ValueError(
                        f"train.{key} is of routers, and model.num_moe_experts is not set; leave it out"
                    )
        elif self.parallel.tensor_model_parallel_size > 1 and not self.parallel.sequence_parallel:
            raise ValueError(
                "a mixture of experts with parallel.tensor_model_parallel_size "
                f"{self.parallel.tensor_model_parallel_size} needs parallel.sequence_parallel, or every "
                "tensor-parallel rank would route every token; set it to true"
            )


def head_size(model: ModelConfig) -> int:
    """Width of an attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def query_groups(model: ModelConfig) -> int:
    """Number of key and value heads."""
    return model.num_query_groups or model.num_attention_heads


def expert_size(model: ModelConfig) -> int:
    """Width of an expert."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """Ranks that share each expert."""
    return parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Columns of the output layer over all tensor-parallel ranks: Megatron's make-vocab-size-divisible-by is 128."""
    multiple = 128 * tp_size
    return -(-vocab_size // multiple) * multiple

"""pear_loss: logits and offline trajectories in, Megatron's (loss_sum, num_tokens, report) out.

``pear_linear_loss`` is the same from the output layer's input, without logits that grow with the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from pear_megatron.config import PearConfig
from pear_megatron.ops.arguments import (
    POSITIVE_TOLERANCE,
    require_alike,
    require_behavior,
    require_config,
    require_constants,
    require_everywhere,
    require_fine,
    require_mask,
    require_tensors,
)
from pear_megatron.ops.output_layer import linear_statistics
from pear_megatron.ops.statistics import TokenStatistics, TopK, vocab_parallel_statistics
from pear_megatron.ops.suffix_sum import as_cu_seqlens
from pear_megatron.weights import dft_factor, reward_per_token, statistic_names, weights_and_statistics

# The report's key of [sources, len(report_keys(config)), 2], there where ``num_sources`` is given.
BY_SOURCE = "by_source"
_MASS_TOLERANCE = 1e-3  # of a decision's top-k; the loader's is finer

Normalization = Literal["token", "trajectory"]


def report_keys(config: PearConfig) -> tuple[str, ...]:
    """The report's keys, in their order: a pipeline stage without logits must know them to reduce them."""
    kl = ("kl",) if config.base_loss == "kl" else ()
    entropy = ("pear/entropy",) if config.needs_entropy else ()
    return ("loss", "nll", *kl, *entropy, *(f"pear/{name}" for name in statistic_names(config)))


# Those of every config, which a loop reads that has neither a KL nor entropies.
REPORT_KEYS = report_keys(PearConfig())


def _check_arguments(
    config: PearConfig,
    behavior_logprobs: Tensor | None,
    reference_logprobs: Tensor | None,
    reward: Tensor | None,
    token_weights: Tensor | None,
    mask: Tensor,
    normalization: Normalization,
    **tensors: Tensor,
) -> None:
    """What is wrong with the call, said before the output layer's work is done. The first tensor has the device."""
    require_config(config)
    require_tensors(**tensors)
    device = next(iter(tensors.values())).device
    require_tensors(device, **tensors)
    require_mask(mask, device)
    require_behavior(
        behavior_logprobs,
        device,
        config,
        reference_logprobs=reference_logprobs,
        has_reward=reward is not None,
    )
    require_alike(mask, behavior_logprobs=behavior_logprobs, reference_logprobs=reference_logprobs)
    require_constants(reward=reward, token_weights=token_weights)
    if isinstance(reward, Tensor):
        require_alike(mask, reward=reward)
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization must be 'token' or 'trajectory', got {normalization!r}")


def topk_of(
    config: PearConfig,
    behavior_topk: TopK | None,
    *,
    mask: Tensor | None = None,
) -> TopK | None:
    """The top-k, where the config's base loss takes one.

    With ``mask`` its entries are looked at, on a CPU alone: a GPU would have to be waited for.

    Raises:
        ValueError: it takes one and there is none; on a decision the probabilities add up to more than 1.
    """
    if config.base_loss != "kl":
        return None
    if behavior_topk is None:
        raise ValueError(
            "base_loss 'kl' needs behavior_topk, (ids [T, k] int32, log-probs [T, k] float32) of the behaviour "
            "policy; 'nll' does without"
        )
    if mask is not None and not mask.is_cuda and not torch.compiler.is_compiling():
        _check_mass(*behavior_topk, mask)
    return behavior_topk


def _check_mass(ids: Tensor, logprobs: Tensor, mask: Tensor) -> None:
    require_tensors(**{"behavior_topk[0]": ids, "behavior_topk[1]": logprobs})
    if logprobs.shape != ids.shape or ids.shape[:-1].numel() != mask.numel():
        return  # said by the op
    k = ids.shape[-1]
    mass = logprobs.detach().double().exp().masked_fill(ids < 0, 0.0).reshape(-1, k).sum(dim=1)
    heavy = (mass > 1 + _MASS_TOLERANCE) & mask.reshape(-1)
    if heavy.any():
        token = int(heavy.int().argmax())
        raise ValueError(
            f"behavior_topk at token {token}: its probabilities add up to {float(mass[token]):.6g}; log-probs must be "
            "normalised over the whole vocabulary"
        )


def _check_statistics(
    config: PearConfig, mask: Tensor, logprob: Tensor, kl: Tensor | None, entropy: Tensor | None
) -> None:
    """What loss_of_logprobs is given of each token: all that the config asks for, aligned with the mask."""
    for name, x, asked, setting in (
        ("kl", kl, config.base_loss == "kl", f"base_loss {config.base_loss!r}"),
        ("entropy", entropy, config.needs_entropy, "report_entropy or entropy_power"),
    ):
        if asked and x is None:
            raise ValueError(f"{setting} needs {name}, a number per token; give it, or leave the setting out")
        if not asked and x is not None:
            raise ValueError(f"{name} is given and the config does not ask for it; leave it out")
    require_alike(mask, logprob=logprob, kl=kl, entropy=entropy)
    require_fine("logprob", logprob)
    positive = (logprob.detach() > POSITIVE_TOLERANCE).reshape(-1) & mask.reshape(-1)
    require_everywhere(positive.logical_not(), "logprob", "positive on a decision: give log p, not -log p")


def _check_source(source: Tensor, cu: Tensor, num_sources: int) -> None:
    """[segments], each one of the sources."""
    require_tensors(cu.device, source=source)
    if source.shape != (cu.numel() - 1,):
        raise ValueError(
            f"source has shape {tuple(source.shape)}; give one per trajectory ({cu.numel() - 1})"
        )
    if source.is_floating_point():  # whose numbers would be compared with none
        raise ValueError(f"source is {source.dtype}; give the number of each trajectory's source (.long())")
    inside = (source >= 0) & (source < num_sources)
    require_everywhere(inside, "source", f"no number from 0 to num_sources - 1 = {num_sources - 1}")


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """[T] or [B, S] -> [T] float32, 0 off the mask."""
    return x.reshape(-1).float().where(mask.reshape(-1), 0.0)


def _check_rows(mask: Tensor, cu: Tensor, cp_size: int) -> None:
    """In [B, S] every row begins a trajectory: one that ran over its end would be weighed by another row's tokens."""
    if mask.dim() != 2 or mask.shape[0] <= 1 or torch.compiler.is_compiling():
        return
    rows, length = mask.shape
    begins = torch.arange(1, rows, dtype=cu.dtype, device=cu.device) * length * cp_size
    require_everywhere(
        (begins[:, None] == cu).any(dim=1),  # isin would wait for the device
        "cu_seqlens",
        f"not at the beginnings of all {rows} rows of {length} tokens: give [B, S] tensors with every row's end "
        "among the boundaries, and Megatron's [S, B] transposed",
    )


def _checked_token_weights(token_weights: Tensor, mask: Tensor) -> Tensor:
    """[T] or [B, S] floating -> [T] float32, 0 off the mask."""
    require_tensors(mask.device, token_weights=token_weights)
    if token_weights.shape not in (mask.shape, (mask.numel(),)):
        raise ValueError(
            f"token_weights has shape {tuple(token_weights.shape)} and mask {tuple(mask.shape)}; give one number "
            "per token of this rank, aligned with target"
        )
    if not token_weights.is_floating_point():
        raise ValueError(f"token_weights are {token_weights.dtype}; give floating-point numbers (.float())")
    factor = token_weights.float().reshape(-1)
    factor = factor.where(mask.reshape(-1), 0.0)
    finite = factor.isfinite()
    if factor.is_cuda:
        require_everywhere(finite, "token_weights", "not finite on a decision")
    elif not torch.compiler.is_compiling() and not finite.all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(
            f"token_weights are not finite on {len(bad)} of {int(mask.sum())} decisions, first at flat position "
            f"{bad[0]}: {factor[bad[0]]}; give a finite number to every decision (0 takes it out of the gradient)"
        )
    return factor


def pear_loss(
    logits: Tensor,
    target: Tensor,
    behavior_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    reward: Tensor | None = None,
    token_weights: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    behavior_topk: TopK | None = None,
    normalization: Normalization = "token",
    source: Tensor | None = None,
    num_sources: int = 0,
    tp_group: torch.distributed.ProcessGroup | None = None,
    cp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The reweighted SFT loss of one micro-batch (docs/method.md, Loss).

    ``target``, ``behavior_logprobs`` and ``mask`` are aligned with the logits: entry i belongs to the
    token that logits[i] predict (data files are aligned with ``input_ids``; the loader shifts, once).

    Args:
        logits: [T, V_local] or [B, S, V_local] float32, bfloat16 or float16.
        target: [T] or [B, S] int64, global token ids; anything off the mask.
        behavior_logprobs: [T] or [B, S] floating; may be None with ``variant: none`` or ``ratio: reference``.
        mask: [T] or [B, S] bool, True on decisions.
        cu_seqlens: [segments + 1] integer over the flat tokens of the whole pack.
        config: how the loss is reweighted.
        reward: [segments] (one per trajectory) or [T]; default 1. Below zero = negative example.
        token_weights: [T] or [B, S] floating, this rank's tokens as ``target`` has them; default 1. A factor of
            each decision's coefficient, of either sign; it changes neither ``num_tokens`` nor the importance
            weights, and ``negative_scale`` does not look at it. Anything off the mask.
        reference_logprobs: [T] or [B, S] floating, of the initial model; needed with ``ratio: reference`` and
            ``dft_policy: reference``, and where ``negative_floor`` counts from, if they are given.
        behavior_topk: ([T, k] int32, [T, k] float32), or [B, S, k]: ids of the behaviour policy's likeliest tokens at
            each decision (-1 = no entry) and their log-probs; needed with ``base_loss: kl``. Anything off the mask.
            Their probabilities add up to 1 at most: looked at on a CPU, and not on a GPU, which would have to be
            waited for. Whether the target is one of them is not looked at; the loader refuses rows where it is not.
        normalization: what the loss is divided by: ``token``, the number of decisions; ``trajectory``, the number
            of trajectories with decisions, after each trajectory's decisions were averaged.
        source: [segments] int64, which of ``num_sources`` data sets each trajectory comes from.
        num_sources: 0 = the report does not tell sources apart.
        tp_group: ranks that share the vocabulary; None = whole.
        cp_group: ranks that share each trajectory in zigzag chunks; None = whole.
        vocab_size: number of real tokens, where the vocabulary is padded.
        inplace_backward: let backward write over the logits.

    Returns:
        loss_sum: scalar float32, the sum over this rank's decisions; divide by the global ``num_tokens``
            (Megatron does under ``calculate_per_token_loss``).
        num_tokens: scalar int32, this rank's decisions; by trajectory, their number on the first context-parallel
            rank and 0 on the others, so that the sum over all ranks counts each once.
        report: name -> [sum, count] float32, to be added over micro-batches and ranks: ``loss``,
            ``nll`` (unweighted, per token), ``kl`` and ``pear/entropy`` where the config has them, and ``pear/...``
            (see importance_weights). With ``num_sources`` also
            ``by_source``: [num_sources, len(report_keys(config)), 2], the same of each source, in that order.

    Raises:
        ValueError, TypeError, IndexError: see vocab_parallel_logprob and importance_weights; a reward or
            token_weights that do not fit the tokens, token_weights that are not finite on a decision (on CUDA
            a device-side assertion).
    """
    return _loss(
        lambda: vocab_parallel_statistics(
            logits,
            target,
            topk=topk_of(config, behavior_topk, mask=mask),
            tail=config.kl_tail,
            entropy=config.needs_entropy,
            mask=mask,
            tp_group=tp_group,
            vocab_size=vocab_size,
            inplace_backward=inplace_backward,
        ),
        {"logits": logits, "target": target},
        behavior_logprobs,
        mask,
        cu_seqlens,
        config,
        reward=reward,
        token_weights=token_weights,
        reference_logprobs=reference_logprobs,
        normalization=normalization,
        source=source,
        num_sources=num_sources,
        cp_group=cp_group,
    )


def pear_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    behavior_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    chunk_tokens: int,
    reward: Tensor | None = None,
    token_weights: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    behavior_topk: TopK | None = None,
    normalization: Normalization = "token",
    source: Tensor | None = None,
    num_sources: int = 0,
    tp_group: torch.distributed.ProcessGroup | None = None,
    cp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden_gradient: bool = True,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """``pear_loss(hidden @ weight.T, ...)`` in memory that does not grow with V x T (see linear_logprob).

    Args:
        hidden: [T, H] floating, the output layer's input, alike on the ranks of tp_group.
        weight: [V_local, H] of the same dtype, this rank's rows of the output layer.
        target, behavior_logprobs, mask: [T], as in pear_loss.
        cu_seqlens, config, ...: as in pear_loss, and so are all others that it has.
        chunk_tokens: rows of logits that exist at a time.
        reduce_hidden_gradient: see linear_logprob.

    Returns:
        loss_sum, num_tokens, report: as pear_loss.

    Raises:
        ValueError, TypeError, IndexError: see linear_logprob and pear_loss.
    """
    return _loss(
        lambda: linear_statistics(
            hidden,
            weight,
            target,
            chunk_tokens=chunk_tokens,
            topk=topk_of(config, behavior_topk, mask=mask),
            tail=config.kl_tail,
            entropy=config.needs_entropy,
            mask=mask,
            tp_group=tp_group,
            vocab_size=vocab_size,
            reduce_hidden_gradient=reduce_hidden_gradient,
        ),
        {"hidden": hidden, "weight": weight, "target": target},
        behavior_logprobs,
        mask,
        cu_seqlens,
        config,
        reward=reward,
        token_weights=token_weights,
        reference_logprobs=reference_logprobs,
        normalization=normalization,
        source=source,
        num_sources=num_sources,
        cp_group=cp_group,
    )


def loss_of_logprobs(
    logprob: Tensor,
    behavior_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    kl: Tensor | None = None,
    entropy: Tensor | None = None,
    reward: Tensor | None = None,
    token_weights: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    normalization: Normalization = "token",
    source: Tensor | None = None,
    num_sources: int = 0,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What pear_loss does once it has what the logits say of each token, in [T] or [B, S] float32.

    Args:
        logprob: log-probabilities, differentiable; anything off the mask, and so are kl and entropy.
        kl: the divergences of ``base_loss: kl``, differentiable; without it None.
        entropy: of the target policy, without a gradient; None where the config does not ask for it.
        behavior_logprobs, mask, cu_seqlens, config, reward, token_weights, reference_logprobs, normalization,
            source, num_sources, cp_group: as in pear_loss.

    Returns:
        loss_sum, num_tokens, report: as pear_loss.

    Raises:
        ValueError, TypeError: as pear_loss; log-probabilities of 16 bits, or positive on a decision; a kl or an
            entropy that the config does not ask for, or none where it does.
    """

    def given() -> TokenStatistics:
        _check_statistics(config, mask, logprob, kl, entropy)
        return TokenStatistics(logprob, kl, entropy)

    return _loss(
        given,
        {"logprob": logprob},
        behavior_logprobs,
        mask,
        cu_seqlens,
        config,
        reward=reward,
        token_weights=token_weights,
        reference_logprobs=reference_logprobs,
        normalization=normalization,
        source=source,
        num_sources=num_sources,
        cp_group=cp_group,
    )


def _loss(
    statistics: Callable[[], TokenStatistics],
    tensors: dict[str, Tensor],
    behavior_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: PearConfig,
    *,
    reward: Tensor | None,
    token_weights: Tensor | None,
    reference_logprobs: Tensor | None,
    normalization: Normalization,
    source: Tensor | None,
    num_sources: int,
    cp_group: torch.distributed.ProcessGroup | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of ``statistics()``, which are taken of ``tensors`` once the call is known to be right."""
    _check_arguments(
        config,
        behavior_logprobs,
        reference_logprobs,
        reward,
        token_weights,
        mask,
        normalization,
        **tensors,
    )
    cu = as_cu_seqlens(cu_seqlens, mask.device)
    if (source is None) != (not num_sources):
        raise ValueError(
            f"source and num_sources go together (source is {'None' if source is None else 'given'}, num_sources is "
            f"{num_sources}); give both, or none for a report that does not tell sources apart"
        )
    if source is not None:
        _check_source(source, cu, num_sources)
    cp_size = 1 if cp_group is None else cp_group.size()
    _check_rows(mask, cu, cp_size)
    found = statistics()
    logprob = _masked(found.logprob, mask)  # [T]
    kl, entropy = (None if x is None else _masked(x, mask) for x in found[1:])
    behavior = None if behavior_logprobs is None else behavior_logprobs.reshape(-1)
    decisions = mask.reshape(-1)
    weights, stats, stats_by_source = weights_and_statistics(
        logprob,
        behavior,
        decisions,
        cu,
        config,
        reference_logprobs=None if reference_logprobs is None else reference_logprobs.reshape(-1),
        reward=reward,
        entropy=entropy,
        cp_group=cp_group,
        source=source,
        num_sources=num_sources,
    )

    coefficient = weights
    if reward is not None:
        r = reward_per_token(reward, cu, weights.numel(), cp_size).where(decisions, 0.0)
        require_everywhere(r.isfinite(), "reward", "not finite on a decision")
        coefficient = weights * torch.where(r < 0, r * config.negative_scale, r)
    if token_weights is not None:
        coefficient = coefficient * _checked_token_weights(token_weights, mask)
    num_decisions = decisions.sum(dtype=torch.int32)
    counted = num_tokens = num_decisions
    if normalization == "trajectory":
        per_trajectory = _decisions_per_trajectory(decisions, cu, cp_group)
        share = per_trajectory.clamp_min(1).float().reciprocal()
        lengths = cu.diff() // cp_size
        coefficient = coefficient * share.repeat_interleave(lengths, output_size=weights.numel())
        counted = (per_trajectory > 0) & (cp_group is None or cp_group.rank() == 0)  # [segments]
        num_tokens = counted.sum(dtype=torch.int32)
    base = -logprob
    if config.base_loss == "kl":
        assert kl is not None
        if config.dft_power:  # of the NLL alone
            initial = None if reference_logprobs is None else reference_logprobs.reshape(-1)
            base = dft_factor(logprob, initial, config).where(decisions, 0.0) * base
        base = kl if config.kl_weight == 1.0 else torch.lerp(base, kl, config.kl_weight)
    base = base.where(coefficient != 0, 0.0)  # a token that the model holds impossible may weigh nothing
    loss_sum = torch.dot(coefficient, base)

    per_token = {"loss": coefficient * base.detach(), "nll": -logprob.detach()}
    if kl is not None:
        per_token["kl"] = kl.detach()
    if entropy is not None:
        per_token["pear/entropy"] = entropy.detach()
    counts = num_decisions.float()
    report = {name: torch.stack([value.sum(), counts]) for name, value in per_token.items()}
    report["loss"] = torch.stack([loss_sum.detach(), num_tokens.float()])
    names = (f"pear/{name}" for name in statistic_names(config))
    report.update(zip(names, stats, strict=True))
    if source is not None and num_sources:
        rows = torch.stack(list(per_token.values()))
        sums = _sums_by_source(rows, decisions, counted, source, num_sources, cu.diff() // cp_size)
        report[BY_SOURCE] = torch.cat([sums, stats_by_source], dim=1)
    return loss_sum, num_tokens, report


def _decisions_per_trajectory(
    decisions: Tensor, cu: Tensor, cp_group: torch.distributed.ProcessGroup | None
) -> Tensor:
    """[T] bool of this rank -> [segments] int32, decisions of each trajectory over all context-parallel ranks."""
    cp_size = 1 if cp_group is None else cp_group.size()
    ends = torch.nn.functional.pad(decisions.cumsum(0, dtype=torch.int32), (1, 0))  # [T + 1]
    count = ends[cu.long() // cp_size].diff()
    if cp_size > 1:
        torch.distributed.all_reduce(count, group=cp_group)
    return count


def _sums_by_source(
    per_token: Tensor, decisions: Tensor, counted: Tensor, source: Tensor, num_sources: int, lengths: Tensor
) -> Tensor:
    """[num_sources, n, 2] float32: (sum, count) of the loss, and of what is a mean over decisions.

    Args:
        per_token: [n, T], the loss of each token first, 0 off the decisions.
        decisions: [T] bool.
        counted: [segments] bool, the trajectories that the loss is divided by; or a scalar: by the decisions.
        source: [segments].
        num_sources: how many there are.
        lengths: [segments], this rank's tokens of each.
    """
    of_token = source.repeat_interleave(lengths, output_size=decisions.numel())
    rows = []
    for s in range(num_sources):
        here = of_token == s
        sums = (per_token * here).sum(dim=1)  # [n]
        counts = (decisions & here).sum().float().repeat(len(sums))
        if counted.dim():
            counts[0] = (counted & (source == s)).sum()
        rows.append(torch.stack([sums, counts], dim=1))
    return torch.stack(rows)

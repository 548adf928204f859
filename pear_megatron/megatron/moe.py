"""A mixture's router and layer specification: padding is never routed, and the routers' losses count each token once.

Megatron-Core's router leaves padding out of its losses alone, and routes it. Its losses are made for a step whose
loss counts every token: under ``calculate_per_token_loss`` they are multiplied by the tokens of the micro-batch, and
every gradient is then divided by the number of tokens in the loss. Here those are the decisions, which are fewer
(prompts); and 0.16 forgets a factor of TP x CP, and later versions take a rank's own tokens for its share where
padding makes shares uneven. So the router below adds up its losses itself (docs/moe.md):

    gradient of   coefficient * sum over micro-batches (tokens * loss of the micro-batch) / tokens of the step
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pear_megatron.errors import RecipeError

METRICS = ("moe/aux_loss", "moe/z_loss")
_ROUTED = len(METRICS)  # position of the routed tokens among a router's sums


@functools.cache
def router_class() -> type:
    """The router, a ``TopKRouter`` (a function, for Megatron-Core is imported when it is needed)."""
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter

    if not hasattr(
        moe_utils, "te_general_gemm"
    ):  # 0.16 asks whether it is None, and imports it with TE alone
        moe_utils.te_general_gemm = None

    class Router(TopKRouter):  # type: ignore[misc]
        """Routes what is no padding.

        Attributes:
            loss_scale: what the losses' gradients are multiplied with: (divisor of the step's gradients) / (tokens of
                the step that are no padding).
            sums: [3] float64, of the step so far and this rank's share: tokens * auxiliary loss, tokens * z-loss (both
                without their coefficients), and tokens routed.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.loss_scale = 1.0
            self.sums = torch.zeros(_ROUTED + 1, dtype=torch.float64, device=torch.cuda.current_device())

        def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """[S, B, experts] logits, [S, B] mask, True on padding -> [S*B, experts] weights and whether."""
            if padding_mask is not None and padding_mask.shape[0] != logits.shape[0]:
                # Only the first pipeline stage splits the mask as sequence parallelism splits the tokens.
                padding_mask = padding_mask.chunk(self.tp_group.size())[self.tp_group.rank()]
            probs, routed = super().routing(logits, padding_mask)
            if padding_mask is not None:
                padding = padding_mask.reshape(-1, 1)
                probs, routed = probs.masked_fill(padding, 0.0), routed & ~padding
            if self._counts():
                self.sums[_ROUTED] += routed.sum() / self.topk
            return probs, routed

        def _counts(self) -> bool:
            return self.training and torch.is_grad_enabled()  # once, where activations are recomputed

        def _apply_aux_loss(
            self,
            probs: Tensor,
            scores_for_aux_loss: Tensor,
            routing_map: Tensor,
            with_padding_mask: bool = False,
        ) -> Tensor:
            """Adds the gradient of this rank's share of tokens * E * sum_i f_i P_i (arXiv 2101.03961, with top k).

            f_i is the share of the choices, and P_i the mean score, that expert i gets from the micro-batch's tokens
            on all ranks of TP x CP; their shares of the loss add up to the loss. A micro-batch may be all padding.
            """
            group = self.tp_cp_group
            chosen = routing_map.sum(dim=0, dtype=torch.float32)  # [experts]
            if group.size() > 1:
                torch.distributed.all_reduce(chosen, group=group)
            share = (
                scores_for_aux_loss.sum(dim=0) * chosen / chosen.sum().clamp(min=1)
            ).sum() * self.num_experts
            self.sums[0] += share.detach()
            coefficient = self.get_aux_loss_coeff("aux_loss") * self.loss_scale
            return MoEAuxLossAutoScaler.apply(probs, share * coefficient)

        def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
            """Adds the gradient of the sum over this rank's tokens of logsumexp(logits)^2 (arXiv 2202.08906)."""
            coefficient = self.config.moe_z_loss_coeff
            if not coefficient or not self._counts():
                return logits
            squares = torch.logsumexp(logits, dim=-1).square()
            if padding_mask is not None:
                squares = squares.masked_fill(padding_mask, 0.0)
            total = squares.sum()
            self.sums[1] += total.detach()
            return MoEAuxLossAutoScaler.apply(logits, total * (coefficient * self.loss_scale))

    return Router


def use_router(layer_spec: Any) -> Any:
    """Puts the router into a mixture's layer specification, which is changed and given back.

    The local layers' norm before the experts also gets the name that Transformer Engine's layers store it by.
    """
    submodules = layer_spec.submodules
    mixture = submodules.mlp  # a ModuleSpec (0.16), or a partial of MoELayer
    parts = mixture.keywords if isinstance(mixture, functools.partial) else vars(mixture)
    parts["submodules"].router = router_class()
    names = dict(submodules.sharded_state_dict_keys_map or {})
    names.pop("pre_mlp_layernorm.", None)
    submodules.sharded_state_dict_keys_map = names
    return layer_spec


def routers(model: Any) -> list[Any]:
    """The routers of a model, wrapped or not, or of a list of chunks."""
    kind, chunks = router_class(), model if isinstance(model, list) else [model]
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, kind)]


def count_dispatched(model: Any) -> None:
    """Tells the dispatchers that the tokens they send are those that are routed, not all times top k."""
    for module in model.modules():
        if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
            dispatcher.preprocess = functools.partial(_preprocess, dispatcher, dispatcher.preprocess)


def _preprocess(dispatcher: Any, original: Any, routed: Tensor) -> Tensor:
    counts = original(routed)
    dispatcher.num_out_tokens = routed.sum()  # as mcore has it where it drops tokens
    dispatcher._maybe_update_cuda_sync_point("before_permutation_1")
    return counts


def start_step(model: Any, *, divisor: float, tokens: int) -> None:
    """Makes the routers' losses means over the tokens of the step that begins.

    Args:
        model: a model, wrapped or not, or a list of chunks.
        divisor: what the step's gradients will be divided by.
        tokens: of the whole step, without padding.
    """
    for router in routers(model):
        router.loss_scale = divisor / max(tokens, 1)
        router.sums.zero_()


def step_sums(model: Any, device: torch.device) -> Tensor:
    """[2] float64, this rank's share of METRICS times the step's tokens and the model's layers."""
    sums = [router.sums[:_ROUTED] for router in routers(model)]
    return torch.stack(sums).sum(dim=0) if sums else torch.zeros(_ROUTED, dtype=torch.float64, device=device)


def routed_tokens(model: Any) -> Iterable[float]:
    """Tokens that each of this rank's routers has routed in the step so far."""
    return [float(router.sums[_ROUTED]) for router in routers(model)]


def check_recompute(method: str | None) -> None:
    """Refuses what would route padding.

    Raises:
        RecipeError: ``train.recompute_method`` block, where Megatron-Core loses the padding mask of other layers.
    """
    import importlib.util

    if method == "block" and importlib.util.find_spec("megatron.core.recompute") is None:
        raise RecipeError(
            "train.recompute_method block: this version of Megatron-Core does not tell the layers that it does not "
            "recompute which tokens are padding, and the experts would get it; use uniform, or megatron-core 0.19+"
        )

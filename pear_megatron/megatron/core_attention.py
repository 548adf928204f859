"""VarlenAttention: the core attention that lets mcore's local layers train packed rows."""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from pear_megatron.errors import RecipeError
from pear_megatron.megatron.causal_attention import causal_attention, packed_causal_attention


class VarlenAttention(DotProductAttention):
    """mcore's ``core_attention`` for ``PackedSeqParams`` (thd) and for plain causal rows, in memory linear in S.

    A caller's own attention mask is mcore's unfused attention, of S x S scores, as in the class above.

    Raises:
        RecipeError: the config asks for what torch's causal kernels do not compute.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # mcore divides scores by the layer's number here and multiplies them again in its softmax.
        self._scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)
        for name, value, only in (
            ("attention_dropout", self.attention_dropout.p, 0),
            ("softmax_type", self.config.softmax_type, "vanilla"),
            ("window_size", self.scale_mask_softmax.window_size, None),
        ):
            if value != only:
                raise RecipeError(
                    f"{name} {value!r}: attention without Transformer Engine has {only!r} only; use its layer spec"
                )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of this rank's heads.

        Args:
            query: [T, H, D] of a packed row, or [S, B, H, D].
            key, value: the same with G heads.
            attention_mask: bool [B, 1, S, S], True = masked out; None = causal.
            attn_mask_type: not looked at, as in mcore's; the model is causal.
            attention_bias: refused, as in mcore's.
            packed_seq_params: the segments of a packed row.

        Returns:
            [T, H, D] of a packed row, else [S, B, H * D].

        Raises:
            ValueError: packed sequences of another format than thd, or with a mask.
        """
        if attention_mask is None:  # views would keep the fused projection's whole output for backward
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        if packed_seq_params is not None:
            if packed_seq_params.qkv_format != "thd" or attention_mask is not None:
                raise ValueError(
                    f"packed sequences are taken as thd without a mask; got {packed_seq_params.qkv_format} "
                    f"with{'out' if attention_mask is None else ''} one"
                )
            # Padding belongs to its segment: nothing real comes after it.
            padded = packed_seq_params.cu_seqlens_q_padded
            return packed_causal_attention(
                *(query, key, value),
                packed_seq_params.cu_seqlens_q if padded is None else padded,
                packed_seq_params.max_seqlen_q,
                scale=self._scale,
            )
        if attention_mask is not None or attention_bias is not None:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias=attention_bias
            )
        return causal_attention(query, key, value, scale=self._scale).flatten(2)

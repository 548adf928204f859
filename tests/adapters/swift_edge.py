"""mcore-bridge's and ms-swift's own files without a GPU: Transformer Engine's layers replaced at the edge.

mcore-bridge builds models of Transformer Engine's layers alone. Here Megatron's own layers stand for them, under the
same names and with the same parameters, so that mcore-bridge's own code loads, trains and saves the weights; packed
rows go through ``VarlenAttention``. For tests of ``megatron sft``'s loop on CPU ranks.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from typing import Any

import torch
from packaging.version import Version

from tests.adapters import bridge_edge

# With any value: attention that gives zeros, for context parallelism, which Transformer Engine would have to do.
NO_ATTENTION = "PEAR_TEST_NO_ATTENTION"


def install() -> None:
    """Call it before anything imports megatron."""
    importlib.import_module(
        "swift.sequence_parallel"
    )  # scripts functions of torch's, before they are replaced
    edge = bridge_edge._Edge()
    sys.meta_path.insert(0, edge)
    from pear_megatron.megatron import cpu

    cpu.enable()
    put_layers()
    edge.hidden = False
    _move_within_the_host()


def put_layers() -> None:
    """Megatron's own layers in the place of Transformer Engine's."""
    engine: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
    stand_ins = _layers()
    vars(engine).update(stand_ins)
    provider: Any = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
    specs: Any = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    for module in (provider, specs):
        vars(module).update({name: layer for name, layer in stand_ins.items() if hasattr(module, name)})
    specs.HAVE_TE, specs.TESpecProvider = True, provider.TESpecProvider
    block: Any = importlib.import_module("megatron.core.transformer.transformer_block")
    block.LayerNormImpl = stand_ins["TENorm"]
    importlib.import_module("megatron.core.utils")._te_version = Version("2.0")  # type: ignore[attr-defined]


def _move_within_the_host() -> None:
    """mcore-bridge moves weights that it saves to "cuda"."""
    original = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(self, *("cpu" if x == "cuda" else x for x in args), **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]


def _layers() -> dict[str, Any]:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from pear_megatron.megatron.core_attention import VarlenAttention

    class RMSNorm(torch.nn.RMSNorm):
        """Zero-centred, as Gemma's: Transformer Engine's name, by which Bridge knows it."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)

    class TENorm:
        """A factory, as the original is."""

        def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:  # type: ignore[misc]
            if config.layernorm_zero_centered_gamma:
                return RMSNorm(hidden_size, eps)
            return WrappedTorchNorm(config, hidden_size, eps)

    class TELinear(torch.nn.Module):
        """What LoRA asks a layer for; and a whole layer on every rank, as LoRA makes one."""

        parallel_mode: Any = None
        use_bias, tp_size = False, 1  # when it is printed
        in_features = property(lambda self: self.input_size)
        out_features = property(lambda self: self.output_size)

        def __init__(
            self, input_size: int = 0, output_size: int = 0, *, config: Any = None, **_: Any
        ) -> None:
            super().__init__()
            if config is not None:
                self.input_size, self.output_size, self.config = input_size, output_size, config
                self.weight = torch.nn.Parameter(
                    torch.empty(output_size, input_size, dtype=config.params_dtype)
                )

        def forward(self, x: torch.Tensor) -> Any:
            return x @ self.weight.T, None

    class TEColumnParallelLinear(ColumnParallelLinear, TELinear):
        def __init__(
            self, *args: Any, tp_comm_buffer_name: Any = None, name: Any = None, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)

    class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
        return_layernorm_output = False

        def __init__(self, input_size: int, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, *args, config=config, **kwargs)
            norm = TENorm(config, input_size, config.layernorm_epsilon)
            self.layer_norm_weight = norm.weight
            self._shift = int(config.layernorm_zero_centered_gamma)
            self._eps = config.layernorm_epsilon

        def forward(self, x: torch.Tensor) -> Any:
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], self._shift + self.layer_norm_weight, self._eps)
            output, bias = super().forward(x)
            return ((output, x) if self.return_layernorm_output else output), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> Any:
            from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

            axes = {"weight": 0, "bias": 0}
            state = self.state_dict(prefix="", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)

    class TERowParallelLinear(RowParallelLinear, TELinear):
        def __init__(
            self, *args: Any, tp_comm_buffer_name: Any = None, name: Any = None, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)

    class TEDotProductAttention(VarlenAttention):
        def __init__(self, config: Any, *args: Any, k_channels: Any = None, v_channels: Any = None,
                     num_splits: Any = None, name: Any = None, **kwargs: Any) -> None:  # fmt: skip
            if NO_ATTENTION in os.environ:
                config = copy.copy(config)
                config.context_parallel_size = 1
            super().__init__(config, *args, **kwargs)

        def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if NO_ATTENTION in os.environ:
                return query * 0.0
            return super().forward(query, *args, **kwargs)

    class TEGroupedLinear(torch.nn.Module):
        """None is built, nor of its kinds."""

    class TEColumnParallelGroupedLinear(TEGroupedLinear):
        pass

    class TERowParallelGroupedLinear(TEGroupedLinear):
        pass

    return {
        name: layer for name, layer in locals().items() if isinstance(layer, type) and name.startswith("TE")
    } | {"HAVE_TE": False}

"""Megatron-Bridge's own files without a GPU: what they import and cannot have there is replaced at the edge.

Transformer Engine, ModelOpt and NVIDIA's resiliency extension become modules whose names can be imported, inherited
from and written into annotations, and which raise when called. Four functions of ModelOpt that Bridge calls on every
model do what they do for one that ModelOpt has not touched: nothing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

EDGE = {"transformer_engine", "modelopt", "nvidia_resiliency_ext"}
UNTOUCHED = {
    "modelopt.torch.distill.plugins.megatron": ["get_tensor_shapes_adjust_fn_for_distillation"],
    "modelopt.torch.opt.plugins": ["save_sharded_modelopt_state", "restore_modelopt_state"],
    "modelopt.torch.quantization.utils": ["is_quantized"],
}


class _Absent(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__} is not here")


class _AbsentModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}", (), {})


class _Edge(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Hides the edge's modules while Megatron-Core imports (it goes without them), then stands for them."""

    hidden = True

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in EDGE:
            return None
        if self.hidden:
            raise ModuleNotFoundError(name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        return _AbsentModule(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__ = []


def install(layers: Callable[[], object] = lambda: None) -> None:
    """Call it before anything imports megatron.

    Args:
        layers: what to put in the place of Transformer Engine's layers, before Bridge looks at them.
    """
    edge = _Edge()
    sys.meta_path.insert(0, edge)
    from pear_megatron.megatron import cpu

    cpu.enable()
    for name in (
        "core.models.gpt.gpt_layer_specs", "core.extensions.transformer_engine", "core.datasets.utils", "training",
    ):  # fmt: skip
        importlib.import_module(f"megatron.{name}")
    layers()
    sys.modules["megatron.core.datasets.utils"].compile_helpers = lambda: None  # type: ignore[attr-defined]
    edge.hidden = False
    for name, functions in UNTOUCHED.items():
        module = importlib.import_module(name)
        for function in functions:
            setattr(module, function, lambda *args, **kwargs: None)
    # LoRA takes Megatron's classes around Transformer Engine, some of which are None, for Transformer Engine.
    importlib.import_module("megatron.bridge.peft.utils").HAVE_TE = False  # type: ignore[attr-defined]

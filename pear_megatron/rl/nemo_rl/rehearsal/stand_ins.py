"""What takes the place of GPUs, Ray and data sets while NeMo-RL's own code runs: it says nothing and starts nothing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

# What only the environments of NeMo-RL's workers have.
_OF_WORKERS = ("megatron", "modelopt")
_ROWS = 4096


class TrainingBegins(BaseException):
    """NeMo-RL wants its first worker: all that it checks before has passed. No ``except Exception`` swallows it."""


class _AnyClass(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __getitem__(cls, key: Any) -> Any:
        return Anything


class Anything(SimpleNamespace, metaclass=_AnyClass):
    """A class and object that take every call and have every attribute, beside those they are given."""

    def __init__(self, *_: Any, **given: Any) -> None:
        super().__init__(**given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *_: Any, **given: Any) -> Any:
        """Another one."""
        return Anything(**given)


class _Module(ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class _Finder(MetaPathFinder, Loader):
    """Finds packages of the workers where this environment has none."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """Called by import, after all other finders."""
        if name.partition(".")[0] not in _OF_WORKERS:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Called by import."""
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Called by import."""


_FINDER = _Finder()


def import_of_workers(name: str) -> ModuleType:
    """A module that only NeMo-RL's workers import."""
    if _FINDER not in sys.meta_path:  # not earlier: others look around for what is installed
        sys.meta_path.append(_FINDER)
    return importlib.import_module(name)


class Unborn:
    """A worker, engine or environment: whoever needs it has begun to train."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __iter__(self) -> Any:
        raise TrainingBegins

    def __len__(self) -> int:
        raise TrainingBegins

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TrainingBegins(name)


class Workers(Unborn):
    """The policy's: keeps what it is sent."""

    batches: Any = None

    def run_all_workers_sharded_data(self, *_: Any, data: Any, **__: Any) -> None:
        """The batch of each data-parallel rank."""
        Workers.batches = data
        raise TrainingBegins


class Cluster:
    """Nodes and GPUs by their number."""

    _sorted_bundle_indices = None

    def __init__(self, bundle_ct_per_node_list: list[int], num_gpus_per_node: int = 8, **_: Any) -> None:
        self.bundles, self.num_gpus_per_node = bundle_ct_per_node_list, num_gpus_per_node

    def world_size(self) -> int:
        """GPUs of all nodes."""
        return sum(self.bundles)

    def node_count(self) -> int:
        """Nodes."""
        return len(self.bundles)

    def _init_placement_groups(self, **_: Any) -> None:
        raise TrainingBegins

    def get_placement_groups(self) -> Any:
        """Needs Ray."""
        raise TrainingBegins


def data_set(kind: Any, base: type) -> Any:
    """A class of data set with ``base``'s methods and without its rows, which may be on a hub or large."""
    import inspect

    from datasets import Dataset

    needed = [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]

    def start(self: Any, **settings: Any) -> None:
        for name in needed:
            if settings.get(name) is None:
                raise ValueError(f"{settings['dataset_name']} needs {name}")
        self.task_name = settings["dataset_name"]
        self.dataset = Dataset.from_dict({"task_name": [self.task_name] * _ROWS})
        self.val_dataset = None
        if "split_validation_size" in inspect.signature(kind).parameters:
            self.split_train_validation(settings.get("split_validation_size", 0), settings.get("seed", 42))

    # The real signature: NeMo-RL warns of settings that are not in it.
    return type("RowlessDataSet", (base,), {"__init__": start, "__signature__": inspect.signature(kind)})

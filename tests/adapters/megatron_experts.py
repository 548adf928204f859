"""The example's program, whose local layers store the norm before the experts as Transformer Engine's layers do.

Checkpoints of this package have that name; Megatron-LM's local layers, which nobody trains experts with on a GPU, have
another.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "megatron_lm"))
import pretrain_pear
from megatron.core.transformer.transformer_layer import TransformerLayer

original = TransformerLayer.sharded_state_dict


def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
    self.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return original(self, *args, **kwargs)


if __name__ == "__main__":
    TransformerLayer.sharded_state_dict = sharded_state_dict
    pretrain_pear.main()

"""What pear-megatron must do where it is installed: README's ten lines, and ops with the float64 reference's answers.

make wheels and Dockerfile.cpu run it, away from the checkout.
"""

import re
from importlib.metadata import metadata
from pathlib import Path

import torch

import pear_megatron
from pear_megatron.config import PearConfig
from pear_megatron.ops import pear_weights, reference, vocab_parallel_logprob

torch.manual_seed(0)
here = Path(pear_megatron.__file__).parent
assert "site-packages" in here.parts, f"imported from {here}"
assert pear_megatron.__version__ == metadata("pear-megatron")["Version"]

(ten_lines,) = re.findall(r"```python\n(.*?)```", metadata("pear-megatron").get_payload(), flags=re.DOTALL)
names: dict = {}
exec(ten_lines, names)
assert torch.isfinite(names["logits"].grad).all()
loss, tokens = (names[name].item() for name in ("loss_sum", "num_tokens"))
print(f"    pear_loss: {loss / tokens:.4f} over {tokens} tokens")

logits, target = torch.randn(24, 64), torch.randint(64, (24,))
mask, cu_seqlens = torch.arange(24) % 5 > 0, torch.tensor([0, 7, 24], dtype=torch.int32)
logprobs = vocab_parallel_logprob(logits, target, mask=mask)
torch.testing.assert_close(logprobs.double(), reference.logprob(logits, target, mask), rtol=0, atol=1e-6)
behavior = logprobs - 0.1 * torch.randn(24)
config = PearConfig(variant="token")
weights, _ = pear_weights(logprobs, behavior, mask, cu_seqlens, config)
expected, _ = reference.weights(logprobs, behavior, mask, cu_seqlens, config)
torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
print(f"    ops: log-probs and weights are those of the reference, torch {torch.__version__}")

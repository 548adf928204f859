"""Every kernel once on small inputs, for compute-sanitizer (benchmarks/gpu.sh runs it).

compute-sanitizer --tool memcheck python -m tests.gpu.small_cases
compute-sanitizer --tool racecheck python -m tests.gpu.small_cases
"""

from __future__ import annotations

import torch

from pear_megatron.ops.library import ops
from pear_megatron.ops.statistics import vocab_parallel_statistics
from pear_megatron.ops.weights import pear_weights
from tests.gpu.device import DEVICE
from tests.packs import CONFIGS, SEQUENCE_MEAN, make_pack


def run_topk_kl(logits: torch.Tensor, mask: torch.Tensor) -> None:
    """The kernels of the KL and the entropy, on the logits' own top-k with a gap."""
    k = min(40, logits.shape[1])
    logprobs, ids = logits.float().log_softmax(-1).topk(k)
    ids[::2, 1:] = ids[::2, 1:].where(torch.rand(ids[::2, 1:].shape) < 0.7, -1)
    for tail in ("none", "bucket"):
        leaf = logits.clone().requires_grad_()
        found = vocab_parallel_statistics(
            leaf * 1.0,
            ids[:, 0],
            topk=(ids.int(), logprobs),
            tail=tail,
            entropy=True,
            mask=mask,
            inplace_backward=tail == "none",
        )
        assert found.entropy is not None
        assert found.kl is not None
        (found.logprob + found.kl).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert found.entropy.isfinite().all()


def main() -> None:
    torch.set_default_device(DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (7, 1000, 5001, 40_003):  # a warp, 256 and 512 threads a row
            wide = torch.randn(6, columns + 3).to(dtype)
            target, mask, grad = torch.randint(columns, (6,)), torch.rand(6) < 0.7, torch.randn(6)
            for logits in (wide[:, :columns].contiguous(), wide[:, 3:]):
                args = (target, mask, 0, columns)
                stats = ops.statistics_forward(logits, *args)
                logprob, normalizer, *_ = ops.statistics_combine(stats[None], mask, columns)
                rest = (target, mask, normalizer, grad, 0, columns - columns // 8)
                out = ops.statistics_backward(logits, *rest)
                ops.statistics_backward_(logits, *rest)
                assert torch.equal(out, logits)
                assert logprob.isfinite().all()
                run_topk_kl(wide[:, :columns].contiguous(), mask)
                # A chunk of rows in the middle, its vectors at any alignment.
                rows = slice(1, 4)
                ops.statistics_forward(logits[rows], target[rows], mask[rows], 0, columns)
                ops.statistics_backward_(logits[rows], *(x[rows] for x in rest[:4]), 0, columns)
    for lengths in ([3, 0, 700, 1500, 1], [1] * 300):
        pack = make_pack(lengths)
        for config in (*CONFIGS, SEQUENCE_MEAN):
            for factor in (None, torch.rand(len(pack.mask))):
                weights, _ = pear_weights(*pack.inputs(), config, factor)
                assert weights.isfinite().all()
        for exclusive in (True, False):
            ops.segmented_suffix_sum(pack.logprobs, pack.cu_seqlens, None, exclusive)
        ops.segment_sum(pack.logprobs, pack.cu_seqlens)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()

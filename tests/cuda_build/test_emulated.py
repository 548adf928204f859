"""The CUDA kernels' own source, run on the CPU thread by thread, against float64.

What this cannot show is what only a GPU has: its memory model, its approximate exp2, its speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pear_megatron import PearConfig
from pear_megatron.ops import STATISTICS, reference
from pear_megatron.ops.weights import _VARIANTS
from tests.cuda_build.emulated import emulated_ops
from tests.ops.test_logprob import DTYPES, assert_rounds_to, float64_answer
from tests.ops.test_statistics import TAILS, Problem, assert_close
from tests.packs import CONFIGS, SEQUENCE_MEAN, Pack, config_id, make_pack

INF, NAN = float("inf"), float("nan")
# Widths around a vector (8, 4), a warp's rows (2048), a block's (32768) and the ends of their loops.
COLUMNS = [1, 7, 8, 9, 63, 1025, 2048, 2063, 8200, 32775]


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    return emulated_ops()


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forward(ops, logits, target, mask=None, start=0, size=None) -> tuple[Tensor, Tensor]:
    size = size or logits.shape[1]
    stats = ops.statistics_forward(logits, target, mask, start, size)
    return ops.statistics_combine(stats[None], mask, size)[:2]


def check_logprob(ops, logits: Tensor, target: Tensor, mask=None, words=None) -> None:
    """Values and both gradients against float64; padded columns must come out 0."""
    words = words or logits.shape[1]
    grad = torch.randn(len(target))
    expected, exact = float64_answer(logits[:, :words], target, grad, mask)
    exact = torch.nn.functional.pad(exact, (0, logits.shape[1] - words))
    logprob, normalizer = forward(ops, logits, target, mask, 0, words)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    args = (target, mask, normalizer, grad, 0, words)
    out = ops.statistics_backward(logits, *args)
    assert_rounds_to(out, exact)
    ops.statistics_backward_(logits, *args)
    assert torch.equal(logits, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_logprob_at_every_width(ops, dtype, columns):
    rows = 5 if columns < 5000 else 2
    check_logprob(ops, (4 * torch.randn(rows, columns)).to(dtype), torch.randint(columns, (rows,)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 201, 2100])
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_logprob_of_rows_at_any_alignment(ops, dtype, columns, offset):
    wide = torch.randn(4, columns + 13).to(dtype)
    before = wide.clone()
    check_logprob(ops, wide[:, offset : offset + columns], torch.randint(columns, (4,)))
    wide[:, offset : offset + columns] = before[:, offset : offset + columns]
    assert torch.equal(wide, before)  # nothing beside the rows was touched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "words"), [(128, 101), (2304, 2200), (2304, 3)])
@pytest.mark.parametrize("padding", [NAN, INF, -INF])
def test_padded_columns_and_rows_off_the_mask_are_not_looked_at(ops, dtype, columns, words, padding):
    logits = torch.randn(7, columns).to(dtype)
    logits[:, words:] = padding
    mask = torch.tensor([True, False, True, True, False, True, False])
    target = torch.randint(words, (7,)).where(mask, -100)
    logits[~mask] = NAN
    expected, exact = float64_answer(logits[mask][:, :words], target[mask], torch.ones(4))
    logprob, normalizer = forward(ops, logits, target, mask, 0, words)
    torch.testing.assert_close(logprob[mask].double(), expected, rtol=1e-5, atol=1e-5)
    out = ops.statistics_backward(logits, target, mask, normalizer, torch.ones(7), 0, words)
    assert_rounds_to(out[mask][:, :words], exact)
    assert (logprob[~mask] == 0).all()
    assert (out[~mask] == 0).all()
    assert (out[:, words:] == 0).all()


def test_shards_of_the_vocabulary_one_of_them_only_padding(ops):
    logits, target = torch.randn(4, 90), torch.tensor([0, 29, 30, 59])
    expected, exact = float64_answer(logits[:, :60], target, torch.ones(4))
    shards = [shard.contiguous() for shard in logits.chunk(3, dim=1)]
    stats = torch.stack([ops.statistics_forward(x, target, None, 30 * r, 60) for r, x in enumerate(shards)])
    assert stats[2].tolist() == [[-INF, 0.0, -INF]] * 4
    logprob, normalizer, *_ = ops.statistics_combine(stats, None, 60)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    for r, x in enumerate(shards):
        grad = ops.statistics_backward(x, target, None, normalizer, torch.ones(4), 30 * r, 60)
        wanted = exact[:, 30 * r : 30 * r + 30] if r < 2 else torch.zeros(4, 30, dtype=torch.float64)
        assert_rounds_to(grad, wanted)


@pytest.mark.parametrize("columns", [300, 3000])
def test_nan_and_inf_stay_visible(ops, columns):
    logits = torch.randn(6, columns)
    logits[0, columns - 1] = NAN
    logits[1, 10] = INF
    logits[2, :-5] = -INF
    logits[3, 5] = -INF
    logits[4] = -INF
    logits[5] = NAN
    target = torch.tensor([0, 0, columns - 2, 5, 2, 1])
    logprob, _ = forward(ops, logits, target)
    expected = reference.logprob(logits, target)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_target_outside_the_vocabulary_is_a_device_side_assertion(ops):
    with pytest.raises(RuntimeError, match=r"device-side assertion.*outside the vocabulary"):
        ops.statistics_forward(torch.randn(2, 9), torch.tensor([0, 9]), None, 0, 9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 9, 2063, 32775])
@pytest.mark.parametrize("k", [1, 33, 128])
@pytest.mark.parametrize("offset", [0, 3])
def test_kl_and_entropy_at_every_width_and_alignment(ops, dtype, columns, k, offset):
    """A warp, 256 and 512 threads a row; the last columns are padding."""
    k, rows = min(k, columns), 5 if columns < 5000 else 2
    problem = Problem.random(rows, columns, k, dtype)
    wide = torch.full((rows, offset + columns + 5), NAN, dtype=dtype)
    wide[:, offset : offset + columns] = problem.logits
    logits, vocab = wide[:, offset:], (0, columns)
    of_token = (problem.target, problem.mask)
    for tail in TAILS:
        lp, expected, entropy, exact = problem.exact(tail)
        stats = ops.statistics_forward(logits, *of_token, *vocab, problem.ids, True)
        found = ops.statistics_combine(
            stats[None], problem.mask, columns, problem.ids, problem.logprobs, True, tail == "bucket"
        )
        logprob, normalizer, ours, kl, log_pi, terms = found
        for got, wanted in ((logprob, lp), (ours, entropy), (kl, expected)):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        topk = (problem.ids, problem.logprobs, log_pi, terms, problem.kl_grad)
        args = (*of_token, normalizer, problem.grad, *vocab, *topk)
        out = ops.statistics_backward(logits, *args)
        assert_close(out[:, :columns], exact, dtype)
        assert not out[:, columns:].any()
        copy = wide.clone()
        ops.statistics_backward_(copy[:, offset:], *args)
        assert torch.equal(copy[:, offset:], out)
        assert copy[:, :offset].isnan().all()  # nothing beside the rows was touched
        assert wide[:, :offset].isnan().all()


# A warp, 256 and 512 threads a row; of the widest a thread has more turns than a word has bits.
@pytest.mark.parametrize(("columns", "threads"), [(50, 32), (1500, 32), (8200, 256), (300_000, 512)])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_top_ks_columns_are_left_out_wherever_they_lie(ops, columns, threads, entropy):
    """One thread's alone, neighbours, those of both ends, and any; ids of other ranks and none among them."""
    turns = torch.arange(3, columns, 4 * threads)  # vectors of four are dealt to the threads in turns
    ends = torch.cat([torch.arange(7), torch.arange(columns - 6, columns)])
    anywhere = torch.randperm(columns)[: columns // 3][:400]
    of_others = torch.tensor([columns, -1, columns + 7])
    start = 1000
    for held in (turns, turns.flip(0), ends, anywhere):
        ids = torch.cat([held, of_others])[torch.randperm(len(held) + 3)]
        wide = torch.randn(1, columns + 1)
        logits = wide[:, 1:]  # the first vector begins after three columns
        logits[0, held] += 60
        stats = ops.statistics_forward(
            logits,
            torch.tensor([start]),
            None,
            start,
            10**6,
            torch.where(ids < 0, -1, ids + start)[None].int(),
            entropy,
        )
        rest = logits[0].double().index_fill(0, held, -INF)
        weights = (rest - rest.max()).exp()
        wanted = [rest.max(), weights.sum(), logits[0, 0]]
        wanted += [(weights * (rest - rest.max()).clamp_min(-1e3)).sum()] * entropy
        inside = (ids >= 0) & (ids < columns)
        wanted += logits[0, ids.where(inside, 0)].where(inside, -INF)
        torch.testing.assert_close(stats[0].double(), torch.stack(wanted).double(), rtol=1e-5, atol=1e-5)


def test_kl_and_entropy_of_shards_of_the_vocabulary_one_of_them_only_padding(ops):
    problem = Problem.random(4, 60, 9)
    lp, expected, entropy, exact = problem.exact("bucket")
    shards = torch.nn.functional.pad(problem.logits, (0, 30), value=NAN).split(30, dim=1)
    shards = [shard.contiguous() for shard in shards]
    of_token = (problem.target, problem.mask)
    stats = [
        ops.statistics_forward(x, *of_token, 30 * r, 60, problem.ids, True) for r, x in enumerate(shards)
    ]
    logprob, normalizer, ours, kl, log_pi, terms = ops.statistics_combine(
        torch.stack(stats), problem.mask, 60, problem.ids, problem.logprobs, True, True
    )
    for got, wanted in ((logprob, lp), (ours, entropy), (kl, expected)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    topk = (problem.ids, problem.logprobs, log_pi, terms, problem.kl_grad)
    gradients = [
        ops.statistics_backward(x, *of_token, normalizer, problem.grad, 30 * r, 60, *topk)
        for r, x in enumerate(shards)
    ]
    assert_close(torch.cat(gradients[:2], 1), exact)
    assert not gradients[2].any()


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([3, 50], [-1.0, -1.0], "an id of the top-k is outside the vocabulary"),
        ([3, -2], [-1.0, -1.0], "an id of the top-k is outside the vocabulary"),
        ([3, 3], [-1.0, -2.0], "an id is twice in a token's top-k"),
        ([-1, -1], [-1.0, -2.0], "no entry of any mass"),
        ([3, -1], [-INF, -2.0], "no entry of any mass"),
        ([3, 4], [-1.0, 0.5], "NaN or positive"),
        ([3, 4], [NAN, -0.5], "NaN or positive"),
    ],
)
def test_a_top_k_that_is_none_is_a_device_side_assertion(ops, ids, logprobs, message):
    topk = torch.tensor([[3, 4], ids], dtype=torch.int32), torch.tensor([[-1.0, -2.0], logprobs])
    for mask in (torch.tensor([True, False]), torch.tensor([True, True])):
        stats = ops.statistics_forward(torch.randn(2, 50), torch.zeros(2).long(), mask, 0, 50, topk[0])
        if mask[1]:
            with pytest.raises(RuntimeError, match=f"device-side assertion.*{message}"):
                ops.statistics_combine(stats[None], mask, 50, *topk)
        else:
            ops.statistics_combine(stats[None], mask, 50, *topk)


# Chunks are 256 tokens at least: segments inside one, over two, over many, empty ones, one for all.
LAYOUTS = [
    [],
    [0, 0],
    [1] * 70,
    [0, 3, 0, 0, 31, 32, 33, 0],
    [255, 256, 257, 1, 512, 0],
    [2000],
    [0, 1500, 2, 700, 1],
]


def random_layout() -> list[int]:
    lengths = torch.rand(int(torch.randint(1, 30, ())))
    return (1200 * lengths**6).long().tolist()


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_suffix_sums_of_any_layout(ops, multiprocessors):
    ops.set_multiprocessors(multiprocessors)
    for lengths in [*LAYOUTS, *(random_layout() for _ in range(10))]:
        x, cu, carry = torch.randn(sum(lengths)), bounds(lengths), torch.randn(len(lengths))
        parts = [part.double() for part in x.split(lengths)]
        inclusive = [part.flip(0).cumsum(0).flip(0) for part in parts]
        out = ops.segmented_suffix_sum(x, cu, carry, False)
        expected = [part + c for part, c in zip(inclusive, carry, strict=True)]
        torch.testing.assert_close(out.double(), torch.cat([*expected, x[:0].double()]), rtol=1e-6, atol=1e-6)
        out = ops.segmented_suffix_sum(x, cu, None, True)
        expected = [part - own for part, own in zip(inclusive, parts, strict=True)]
        torch.testing.assert_close(out.double(), torch.cat([*expected, x[:0].double()]), rtol=1e-6, atol=1e-6)
        sums = torch.tensor([part.sum() for part in parts], dtype=torch.float64)
        torch.testing.assert_close(ops.segment_sum(x, cu).double(), sums, rtol=1e-6, atol=1e-6)


def test_nan_and_inf_stay_within_their_segment_and_out_of_their_own_exclusive_sum(ops):
    x = torch.ones(1000)
    x[[300, 700]] = torch.tensor([NAN, INF])
    out = ops.segmented_suffix_sum(x, bounds([400, 600]), None, True)
    assert out[:300].isnan().all()
    assert torch.equal(out[300:400], torch.arange(99.0, -1, -1))
    assert (out[400:700] == INF).all()
    assert torch.equal(out[700:], torch.arange(299.0, -1, -1))


def weights(ops, pack: Pack, config: PearConfig, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return ops.pear_weights(
        *pack.inputs(),
        _VARIANTS[config.variant],
        config.gamma,
        config.block_size,
        *config.log_ratio_clip,
        *config.log_weight_clip,
        config.baseline == "sequence_mean",
        config.normalize == "sequence",
        config.tau if config.sequence_scale == "mean" else None,
        factor,
    )


def check_weights(ops, pack: Pack, config: PearConfig, factor: Tensor | None = None) -> None:
    out, stats = weights(ops, pack, config, factor)
    expected, sums = reference.weights(*pack.inputs(), config, factor)
    torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-12)
    assert torch.equal(out[~pack.mask], torch.zeros(int((~pack.mask).sum())))
    wanted = torch.tensor([sums[name] for name in STATISTICS], dtype=torch.float64)
    torch.testing.assert_close(stats.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [*CONFIGS, SEQUENCE_MEAN], ids=config_id)
def test_weights_and_statistics_of_any_layout(ops, config):
    for lengths in [*LAYOUTS[:5], [0, 900, 2, 400, 1], *(random_layout() for _ in range(2))]:
        check_weights(ops, make_pack(lengths, spread=0.05), config)


@pytest.mark.parametrize("config", [*CONFIGS, SEQUENCE_MEAN], ids=config_id)
def test_factors_multiply_the_weights_and_what_is_counted_of_them(ops, config):
    for lengths in ([0, 900, 2, 400, 1], random_layout()):
        pack = make_pack(lengths, spread=0.05)
        factor = torch.rand(len(pack.mask))
        factor[torch.rand(len(pack.mask)) < 0.3] = 0.0
        factor[: sum(lengths[:2])] = 0.0  # a trajectory that weighs nothing
        factor[~pack.mask] = NAN
        check_weights(ops, pack, config, factor)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 2e-5])
@pytest.mark.parametrize("config", CONFIGS[::3], ids=config_id)
def test_a_behaviour_logprob_that_is_none_is_a_device_side_assertion(ops, config, bad):
    pack = make_pack([300, 0, 700], spread=0.05)
    pack.behavior_logprobs[~pack.mask] = bad
    check_weights(ops, pack, config)  # off the mask anything may stand
    pack.behavior_logprobs[pack.mask.nonzero()[500]] = bad
    with pytest.raises(RuntimeError, match=r"device-side assertion.*NaN, infinite or positive"):
        weights(ops, pack, config)


@pytest.mark.parametrize("block_size", [1, 2, 255, 256, 300, 10_000])
def test_blocks_that_end_in_another_chunk(ops, block_size):
    config = PearConfig(variant="block", block_size=block_size, gamma=0.999)
    check_weights(ops, make_pack([1100, 10, 600], spread=0.02), config)
    sparse = make_pack([1500], spread=0.02, decisions=0.01)  # chunks without a block's end
    check_weights(ops, sparse, config)


def test_weights_are_the_same_bits_on_any_number_of_multiprocessors(ops):
    pack = make_pack([700, 3, 0, 1900, 40], spread=0.05)
    for config in CONFIGS[::4]:
        results = []
        for multiprocessors in (1, 2, 4):
            ops.set_multiprocessors(multiprocessors)
            results.append(weights(ops, pack, config)[0])
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_what_is_off_the_mask_may_be_anything(ops):
    pack = make_pack([600, 20])
    clean = {config_id(config): weights(ops, pack, config) for config in CONFIGS}
    pack.logprobs[~pack.mask] = NAN
    pack.behavior_logprobs[~pack.mask] = -INF
    for config in CONFIGS:
        for ours, before in zip(weights(ops, pack, config), clean[config_id(config)], strict=True):
            assert torch.equal(ours, before)


@pytest.mark.parametrize("cu", [[1, 3, 6], [0, 4, 3, 6], [0, 3, 5], [0, 9, 6], [0, -4, 6]])
def test_bad_boundaries_are_a_device_side_assertion(ops, cu):
    with pytest.raises(RuntimeError, match="device-side assertion"):
        ops.segmented_suffix_sum(torch.randn(6), torch.tensor(cu, dtype=torch.int32), None, True)

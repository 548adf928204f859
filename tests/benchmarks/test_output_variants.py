"""Every way through the output layer that the benchmark compares gives the same loss and the same gradients."""

from __future__ import annotations

import pytest
import torch

from pear_megatron import PearConfig

TOKENS, HIDDEN, COLUMNS = 60, 16, 90
NAMES = [
    "ours, whole logits",
    "ours, four bytes",
    "ours, chunks of 7",
    "ours, chunks of 7, reduced twice",
    "ours, chunks of 7, one sweep from the end",
]


def make_case():
    from peers import Case

    case = Case.random(TOKENS, COLUMNS, 0.3, torch.device("cpu"))
    case.cu_seqlens = torch.tensor([0, 3, 3, 17, 21, 60], dtype=torch.int32)
    hidden, weight = torch.randn(TOKENS, HIDDEN) / 4, torch.randn(COLUMNS, HIDDEN)
    logprob = (hidden @ weight.t()).log_softmax(-1).gather(1, case.target[:, None])[:, 0]
    case.behavior = logprob + 0.2 * torch.randn(TOKENS)  # ratios within their clip, and beyond it
    return hidden, weight, case


def loss_and_gradients(name, hidden, weight, case):
    from experiments.output_variants import variants

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = variants([7])[name](torch.device("cpu"))(*leaves, case)
    return [loss.detach(), *torch.autograd.grad(2 * loss, leaves)]


@pytest.mark.parametrize("name", NAMES[1:])
def test_loss_and_gradients_are_those_of_whole_logits(name):
    inputs = make_case()
    expected = loss_and_gradients(NAMES[0], *inputs)
    torch.testing.assert_close(loss_and_gradients(name, *inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 21, 59, 60, 100])
def test_one_sweep_carries_the_suffix_over_chunks_of_any_size(chunk_tokens):
    from experiments.output_variants import from_the_end, pear, pear_loss

    hidden, weight, case = make_case()
    expected = pear_loss(hidden @ weight.t(), *pear(case))[0]
    got = from_the_end(chunk_tokens)(hidden, weight, case)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_one_sweep_refuses_weights_that_look_back():
    from experiments.one_sweep import one_sweep_loss
    from experiments.output_variants import pear

    hidden, weight, case = make_case()
    args = (hidden, weight, *pear(case)[:-1])
    for config in (
        PearConfig(variant="sequence"),
        PearConfig(normalize="sequence"),
        PearConfig(baseline="sequence_mean"),
    ):
        with pytest.raises(ValueError, match="token variant with its gamma and clips alone"):
            one_sweep_loss(*args, config, chunk_tokens=7)

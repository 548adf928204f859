"""The stretches world: its policies' log-probs are exact, its verifier and careful share read what is written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from examples.stretches import world

STYLES = np.array(list(itertools.product([False, True], repeat=world.NUM_STRETCHES)))  # [16, 4]


def _answers(careful_probability: float = world.BEHAVIOR_CAREFUL, count: int = 200) -> world.Answers:
    rng = np.random.default_rng(7)
    return world.sample_answers(rng, world.sample_problems(rng, count), careful_probability)


def test_the_program_is_run_as_its_operations_say() -> None:
    functions = [lambda x: x + 7, lambda x: 5 * x, lambda x: x**3, lambda x: 11 - x]
    prompts = world.sample_problems(np.random.default_rng(0), 50)
    for prompt, values in zip(prompts.tolist(), world.run_program(prompts).tolist(), strict=True):
        x = prompt[-1]
        for token, value in zip(prompt[:-1], values, strict=True):
            x = functions[(token - world.OPERATION_0) % 4](x) % 23
            assert x == value


def test_values_residues_operations_and_end_are_different_tokens() -> None:
    assert len(set(world.TOKENS)) == len(world.TOKENS) == world.VOCAB_SIZE == 37
    rng = np.random.default_rng(0)
    prompts = world.sample_problems(rng, 2000)
    responses = world.sample_answers(rng, prompts, 0.5).responses
    operations = prompts[:, :-1].reshape(-1, world.NUM_STRETCHES, world.STRETCH_LENGTH)
    assert set(np.unique(operations[..., :-1])) == set(range(28, 32))
    assert set(np.unique(operations[..., -1])) == set(range(32, 36))  # marked, where a stretch ends
    assert set(np.unique(prompts[:, -1])) == set(range(23))
    assert set(np.unique(responses[:, :-1])) == set(range(28))
    assert set(np.unique(responses[:, -1])) == {world.END}


def test_both_styles_end_a_stretch_in_the_value_and_coarse_hides_the_rest() -> None:
    values = np.tile(np.arange(20, 12, -1), world.NUM_STRETCHES)[None]
    response = world.write_answers(values, np.array([[True, False, True, False]]))[0]
    stretches = response[:-1].reshape(world.NUM_STRETCHES, world.STRETCH_LENGTH)
    careful = [20, 19, 18, 17, 16, 15, 14, 13]
    coarse = [23 + 0, 23 + 4, 23 + 3, 23 + 2, 23 + 1, 23 + 0, 23 + 4, 13]
    assert stretches.tolist() == [careful, coarse, careful, coarse]


@pytest.mark.parametrize("careful_probability", [world.BEHAVIOR_CAREFUL, world.BASE_CAREFUL])
def test_the_probabilities_of_all_answers_to_a_problem_sum_to_one(careful_probability: float) -> None:
    values = world.run_program(world.sample_problems(np.random.default_rng(3), 1))
    # A trajectory's probability, by style; sampling often enough shows every style with its log-probs.
    rng = np.random.default_rng(4)
    prompts = np.repeat(world.sample_problems(np.random.default_rng(3), 1), 40_000, axis=0)
    answers = world.sample_answers(rng, prompts, careful_probability)
    seen = {
        tuple(response): logprobs.sum()
        for response, logprobs in zip(answers.responses.tolist(), answers.logprobs, strict=True)
    }
    all_answers = world.write_answers(np.repeat(values, len(STYLES), axis=0), STYLES)
    assert set(seen) == set(map(tuple, all_answers.tolist()))
    assert sum(map(np.exp, seen.values())) == pytest.approx(1.0, abs=1e-12)


def test_every_token_logprob_is_that_of_the_answers_which_share_the_prefix() -> None:
    # From the definition of a conditional: over all 16 answers to a problem, weighted by their styles,
    # log p(token | prefix) = log of the weight that goes on with the token over the weight at the prefix.
    p = world.BEHAVIOR_CAREFUL
    answers = _answers(count=40)
    style_weights = np.where(STYLES, p, 1 - p).prod(axis=1)
    for prompt, response, logprobs in zip(answers.prompts, answers.responses, answers.logprobs, strict=True):
        values = np.repeat(world.run_program(prompt[None]), len(STYLES), axis=0)
        same = world.write_answers(values, STYLES) == response
        agrees = np.concatenate([np.ones((16, 1), bool), np.logical_and.accumulate(same, axis=1)], axis=1)
        prefix_weight = style_weights @ agrees
        np.testing.assert_allclose(logprobs, np.log(prefix_weight[1:] / prefix_weight[:-1]), atol=1e-12)


def test_the_behaviour_policy_is_careful_as_often_as_its_logprobs_say() -> None:
    answers = _answers(count=20_000)
    firsts = answers.responses[:, : world.NUM_OPERATIONS : world.STRETCH_LENGTH] < world.MODULUS
    standard_error = np.sqrt(0.12 * 0.88 / firsts.size)
    assert firsts.mean() == pytest.approx(0.12, abs=4 * standard_error)
    assert (firsts == answers.careful).all()
    np.testing.assert_array_equal(
        answers.logprobs[:, : world.NUM_OPERATIONS : world.STRETCH_LENGTH],
        np.where(firsts, np.log(0.12), np.log1p(-0.12)),
    )


def test_guesses_are_wrong_where_a_coarse_stretch_ends_and_their_logprobs_exact() -> None:
    rng = np.random.default_rng(5)
    prompts = world.sample_problems(rng, 20_000)
    guessed = world.sample_guesses(rng, prompts, 0.12)
    ends = guessed.responses[:, 7:32:8]
    wrong = ends != world.stretch_ends(prompts)
    assert not wrong[guessed.careful].any()  # a careful stretch is never guessed
    # A guess is uniform: wrong with probability 22/23, and each value as likely as its log-prob says.
    coarse = ~guessed.careful
    share = 22 / 23
    assert wrong[coarse].mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / coarse.sum()))
    counts = np.bincount(ends[coarse], minlength=23)
    assert len(counts) == 23
    np.testing.assert_allclose(counts / coarse.sum(), 1 / 23, atol=4 * np.sqrt(1 / 23 / coarse.sum()))
    expected = np.zeros((len(prompts), 33))
    expected[:, :32:8] = np.where(guessed.careful, np.log(0.12), np.log1p(-0.12))
    expected[:, 7:32:8] = np.where(coarse, -np.log(23), 0.0)
    np.testing.assert_array_equal(guessed.logprobs, expected)
    # An answer is right if each stretch is careful or guessed right; the rest is as the other policy writes it.
    chance = (0.12 + 0.88 / 23) ** 4
    assert guessed.right.mean() == pytest.approx(chance, abs=4 * np.sqrt(chance / len(prompts)))
    others = np.ones(33, bool)
    others[7:32:8] = False
    plain = world.write_answers(world.run_program(prompts), guessed.careful)
    assert (guessed.responses[:, others] == plain[:, others]).all()


def test_the_verifier_asks_for_every_stretch_end_and_nothing_else() -> None:
    answers = _answers(0.5)
    assert world.verify(answers.prompts, answers.responses).all()
    for position in range(world.RESPONSE_LENGTH):
        spoiled = answers.responses.copy()
        spoiled[:, position] = (spoiled[:, position] + 1) % world.MODULUS
        is_end = position % world.STRETCH_LENGTH == world.STRETCH_LENGTH - 1
        expected = not is_end or position == world.NUM_OPERATIONS
        assert (world.verify(answers.prompts, spoiled) == expected).all(), position


def test_the_verifier_takes_several_answers_to_a_problem() -> None:
    answers = _answers(count=6)
    responses = np.stack([answers.responses, np.roll(answers.responses, 1, axis=0)], axis=1)
    verdicts = world.verify(answers.prompts[:, None], responses)
    assert verdicts.shape == (6, 2)
    assert verdicts[:, 0].all()
    assert not verdicts[:, 1].any()


def test_careful_stretches_are_those_with_values_only() -> None:
    answers = _answers(0.5)
    assert (world.careful_stretches(answers.responses) == answers.careful).all()
    one_residue = world.sample_answers(np.random.default_rng(0), answers.prompts, 1 - 1e-12).responses
    one_residue[:, 3] = world.RESIDUE_0
    one_residue[:, 31] = world.END
    assert (world.careful_stretches(one_residue) == [False, True, True, False]).all()


def test_a_rendered_trajectory_shows_start_operations_symbols_and_verdict() -> None:
    answers = _answers(count=1)
    text = world.render(answers.prompts[0], answers.responses[0])
    words = text.split()
    assert words[:2] == ["start", str(answers.prompts[0, -1])]
    assert words[-2:] == [".", "right"]
    assert sum(word.rstrip(";") in world.OPERATIONS for word in words) == world.NUM_OPERATIONS
    wrong = answers.responses[0].copy()
    wrong[7] = (wrong[7] + 1) % world.MODULUS
    assert world.render(answers.prompts[0], wrong).endswith("wrong")

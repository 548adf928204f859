"""The stretches world: programs over Z_23, answers in stretches, a behaviour policy with exact log-probs.

A problem is a program of 32 operations and the value it starts from. An answer has one symbol per operation
and an end token: 33 decisions, in 4 stretches of 8 symbols. Whoever writes the answer picks a style for each
stretch:

    careful   every symbol is the value after its operation: each follows from the one before it
    coarse    the first 7 symbols are the values mod 5; only the last is the value itself

A small left-to-right model can follow a careful stretch but not a coarse one: the last symbol of a coarse
stretch needs eight operations at once. The verifier asks for the value at the end of each of the 4 stretches.

The behaviour policy never errs and makes one random choice per stretch, careful with a known probability, so
its log-probs are exact: the first symbol of a stretch has the log-probability of its style, every other symbol
follows from what came before it and has log-probability 0. Values and residues are different tokens, which is
why the first symbol gives the style away.

Tokens (vocabulary 37):

    0..22    a value x of Z_23                        "0" .. "22"
    23..27   a residue, x mod 5                       "~0" .. "~4"
    28..31   an operation: x+7, 5x, x^3, 11-x
    32..35   the same as the last one of a stretch    "x+7;" .. "11-x;"
    36       end of the answer                        "."

Layout (66 tokens): 32 operations, the start value, 32 symbols, the end token. The start value stands next to
the answer so that every symbol is predicted from the value (or residue) just before it, and its operation
always stands 32 tokens before that. The marked operations tell a model with rotary positions, which knows
distances and no places, where a stretch ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MODULUS = 23
RESIDUES = 5
NUM_STRETCHES = 4
STRETCH_LENGTH = 8
NUM_OPERATIONS = NUM_STRETCHES * STRETCH_LENGTH
_ENDS = slice(STRETCH_LENGTH - 1, NUM_OPERATIONS, STRETCH_LENGTH)  # where each stretch ends

OPERATIONS = ("x+7", "5x", "x^3", "11-x")
_OUTPUT = np.array(  # [operation, x] -> value; each row is a permutation of Z_23
    [
        [(x + 7) % MODULUS for x in range(MODULUS)],
        [5 * x % MODULUS for x in range(MODULUS)],
        [x**3 % MODULUS for x in range(MODULUS)],
        [(11 - x) % MODULUS for x in range(MODULUS)],
    ]
)

RESIDUE_0 = MODULUS
OPERATION_0 = RESIDUE_0 + RESIDUES
END = OPERATION_0 + 2 * len(OPERATIONS)
VOCAB_SIZE = END + 1

PROMPT_LENGTH = NUM_OPERATIONS + 1
RESPONSE_LENGTH = NUM_OPERATIONS + 1
SEQUENCE_LENGTH = PROMPT_LENGTH + RESPONSE_LENGTH

TOKENS = (
    *(str(x) for x in range(MODULUS)),
    *(f"~{x}" for x in range(RESIDUES)),
    *OPERATIONS,
    *(f"{name};" for name in OPERATIONS),
    ".",
)

# How the two policies of this world write, and which operations they know.
BEHAVIOR_CAREFUL = 0.12
BASE_CAREFUL = 0.9
ALL_OPERATIONS = (0, 1, 2, 3)
BASE_OPERATIONS = (0, 1, 3)


@dataclass(frozen=True)
class Answers:
    """Answers of a policy to N problems, with the log-probability of each of their tokens."""

    prompts: np.ndarray  # [N, 33] token ids
    responses: np.ndarray  # [N, 33] token ids
    logprobs: np.ndarray  # [N, 33] of the policy that wrote the answers
    careful: np.ndarray  # [N, 4] bool

    def __getitem__(self, chosen: np.ndarray) -> Answers:
        """The chosen ones."""
        return Answers(
            self.prompts[chosen], self.responses[chosen], self.logprobs[chosen], self.careful[chosen]
        )

    @property
    def right(self) -> np.ndarray:
        """Which answers the verifier accepts: bool [N]."""
        return verify(self.prompts, self.responses)


def sample_problems(
    rng: np.random.Generator, count: int, operations: Sequence[int] = ALL_OPERATIONS
) -> np.ndarray:
    """Draw ``count`` problems over the given operations: prompts [count, 33]."""
    program = rng.choice(np.asarray(operations), size=(count, NUM_OPERATIONS)) + OPERATION_0
    program[:, _ENDS] += len(OPERATIONS)
    start = rng.integers(MODULUS, size=(count, 1))
    return np.concatenate([program, start], axis=1)


def run_program(prompts: np.ndarray) -> np.ndarray:
    """The value after each operation: prompts [N, 33] -> values [N, 32]."""
    operations = (prompts[:, :NUM_OPERATIONS] - OPERATION_0) % len(OPERATIONS)
    x = prompts[:, NUM_OPERATIONS]
    values = np.empty_like(operations)
    for j in range(NUM_OPERATIONS):
        x = _OUTPUT[operations[:, j], x]
        values[:, j] = x
    return values


def stretch_ends(prompts: np.ndarray) -> np.ndarray:
    """The values that the verifier asks for: prompts [N, 33] -> [N, 4]."""
    return at_ends(run_program(prompts))


def at_ends(symbols: np.ndarray) -> np.ndarray:
    """Those symbols that end a stretch: [..., 32 or 33] -> [..., 4]."""
    return symbols[..., _ENDS]


def to_text(tokens: np.ndarray) -> str:
    """Token ids [n] as the world's tokenizer reads them."""
    return " ".join(TOKENS[t] for t in tokens)


def write_answers(values: np.ndarray, careful: np.ndarray) -> np.ndarray:
    """Write values [N, 32] in the style of each stretch, careful [N, 4]: responses [N, 33]."""
    shows_value = np.repeat(careful, STRETCH_LENGTH, axis=1)
    shows_value[:, _ENDS] = True  # both styles end in the value itself
    symbols = np.where(shows_value, values, RESIDUE_0 + values % RESIDUES)
    return np.concatenate([symbols, np.full((len(symbols), 1), END)], axis=1)


def sample_answers(rng: np.random.Generator, prompts: np.ndarray, careful_probability: float) -> Answers:
    """Let the policy that writes a stretch carefully with ``careful_probability`` answer the prompts."""
    careful = rng.random((len(prompts), NUM_STRETCHES)) < careful_probability
    logprobs = np.zeros((len(prompts), RESPONSE_LENGTH))
    logprobs[:, :NUM_OPERATIONS:STRETCH_LENGTH] = np.where(
        careful, np.log(careful_probability), np.log1p(-careful_probability)
    )
    return Answers(prompts, write_answers(run_program(prompts), careful), logprobs, careful)


def sample_guesses(rng: np.random.Generator, prompts: np.ndarray, careful_probability: float) -> Answers:
    """The same policy with one difference: it guesses the value at the end of each coarse stretch.

    The guess is uniform over Z_23, and its log-probability exact. Most of these answers are wrong: they are
    the negative examples of this world.
    """
    answers = sample_answers(rng, prompts, careful_probability)
    coarse = ~answers.careful
    guesses = rng.integers(MODULUS, size=coarse.shape)
    answers.responses[:, _ENDS] = np.where(coarse, guesses, answers.responses[:, _ENDS])
    answers.logprobs[:, _ENDS] = np.where(coarse, -np.log(MODULUS), 0.0)
    return answers


def verify(prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """Whether all four stretches end in the right value: [..., 33], [..., 33] -> bool [...].

    A response shorter than 33 tokens has to be padded (with END, say); only its stretch ends are read.
    """
    shape = np.broadcast_shapes(prompts.shape[:-1], responses.shape[:-1])
    flat_prompts = np.broadcast_to(prompts, (*shape, PROMPT_LENGTH)).reshape(-1, PROMPT_LENGTH)
    values = run_program(flat_prompts).reshape(*shape, NUM_OPERATIONS)
    return (at_ends(responses) == at_ends(values)).all(axis=-1)


def careful_stretches(responses: np.ndarray) -> np.ndarray:
    """Which stretches can be followed step by step, all 8 symbols being values: [..., 33] -> bool [..., 4].

    This reads the style alone; the values may be wrong.
    """
    symbols = responses[..., :NUM_OPERATIONS]
    is_value = (symbols >= 0) & (symbols < MODULUS)
    return is_value.reshape(*symbols.shape[:-1], NUM_STRETCHES, STRETCH_LENGTH).all(axis=-1)


def render(prompt: np.ndarray, response: np.ndarray | None = None) -> str:
    """One trajectory as text: a line per stretch, its operations, then what was written for them."""
    operations = [TOKENS[t] for t in prompt[:NUM_OPERATIONS]]
    lines = [f"start {TOKENS[prompt[NUM_OPERATIONS]]}"]
    for s in range(NUM_STRETCHES):
        stretch = slice(s * STRETCH_LENGTH, (s + 1) * STRETCH_LENGTH)
        lines.append("  do    " + " ".join(f"{name:>4}" for name in operations[stretch]))
        if response is not None:
            lines.append("  write " + " ".join(f"{TOKENS[t]:>4}" for t in response[stretch]))
    if response is not None:
        verdict = "right" if verify(prompt, response) else "wrong"
        lines.append(f"{''.join(TOKENS[t] for t in response[NUM_OPERATIONS:])} {verdict}")
    return "\n".join(lines)

"""How the position vectors of the stretches world's model begin."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.stretches import world


def shared_position_embedding(table: Tensor) -> Tensor:
    """A copy of a position table [max_pos, hidden] in which operation j and answer slot j share a vector.

    To write symbol j the model has to look up operation j; both places beginning with the same vector is a
    hint where to look. (A hint only: with initial weights of standard deviation 0.07 a 2-layer model of width
    64 finds the look-up within 400 steps without it, with 0.02 not even with it.) With next-token prediction
    the place that matters is where the symbol is *predicted*, one before where it stands. With the layout of
    world.py (j from 0 to 31):

        operation j                          stands at position j
        symbol j                             stands at position 33 + j
        symbol j is predicted at position    32 + j, which holds the start value or symbol j - 1

    so the table's rows 0..31 are copied to rows 32..63. Row 64, where the end token is predicted, and row 65,
    which predicts nothing, keep their own vectors. The vectors are shared at the start of training only.
    """
    if table.dim() != 2 or table.shape[0] < world.SEQUENCE_LENGTH - 1:
        raise ValueError(
            f"the position table must be [max_pos, hidden] with max_pos >= {world.SEQUENCE_LENGTH - 1}, "
            f"got {tuple(table.shape)}"
        )
    first = world.PROMPT_LENGTH - 1
    with torch.no_grad():
        shared = table.clone()
        shared[first : first + world.NUM_OPERATIONS] = table[: world.NUM_OPERATIONS]
    return shared

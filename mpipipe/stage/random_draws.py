"""Counter-based random numbers: u = f(seed, position), and the token that u selects.

There is no generator state, so a draw does not depend on which other sequences share the step, on
the number of stages, or on a preemption before it. Everything on tensors is plain torch
arithmetic without host synchronisation, fit for a CUDA graph. `tests/oracles/random_draws.py`
has the same function on Python integers.

The bits are SplitMix64's: G. L. Steele, D. Lea, C. H. Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014; constants as in S. Vigna's public-domain splitmix64.c (variant 13 of D.
Stafford's mixers). The generator's n-th output is mix(key + n·gamma), which makes it addressable.

Shape suffixes: S rows to sample, V vocabulary, N blocks of tokens, B tokens of a block.
"""

from __future__ import annotations

import torch

__all__ = [
    "draw_token_ids",
    "seed_key",
    "signed_key",
    "uniforms",
]

_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the Weyl sequence visits every state
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_BITS = 64
_MASK = (1 << _BITS) - 1
_BLOCK_TOKENS = 256  # near the square root of vocabularies of 32k to 256k
_DOUBLE_BITS = 53  # a double's significand: u = k / 2^53 is exact


def seed_key(seed: int) -> int:
    """The 64-bit starting state for a seed of any size and sign, in [0, 2^64).

    Seeds are absorbed in 64-bit limbs, lowest first, so that all of their bits count; the mixing
    keeps the streams of neighbouring seeds apart.
    """
    key = _mix(_GAMMA if seed >= 0 else 2 * _GAMMA & _MASK)
    rest = abs(seed)
    while True:
        key = _mix((key ^ (rest & _MASK)) + _GAMMA & _MASK)
        rest >>= _BITS
        if rest == 0:
            return key


def uniforms(keys_S: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """The uniforms u in [0, 1) per row: int64 keys (`signed_key`) and positions → float64 [S].

    Torch's int64 addition and multiplication wrap round, which is what arithmetic modulo 2^64 asks.
    """
    state_S = keys_S + (positions_S + 1) * _signed(_GAMMA)
    state_S = (state_S ^ _shift_right(state_S, 30)) * _signed(_MULTIPLIER_1)
    state_S = (state_S ^ _shift_right(state_S, 27)) * _signed(_MULTIPLIER_2)
    state_S = state_S ^ _shift_right(state_S, 31)
    return _shift_right(state_S, _BITS - _DOUBLE_BITS).double() * 2.0**-_DOUBLE_BITS


def signed_key(seed: int) -> int:
    """`seed_key` as the int64 of the same bits, for `uniforms`."""
    return _signed(seed_key(seed))


def draw_token_ids(scores_SV: torch.Tensor, uniforms_S: torch.Tensor) -> torch.Tensor:
    """One token id per row by inversion of the cumulated softmax of `scores_SV`: int64 [S].

    The tokens lie on the line in the order of their ids. In that order a rounding error in a score
    moves an interval's borders by as little; in order of probability it could swap two intervals
    and with them the drawn token, and would need a sort (3.9 ms a row of 49,152 against 0.3 ms for
    all of this, one core). First the block of tokens is found, then the token inside: a running
    sum over all of a row is the slowest thing one can ask of a GPU here. The sums are kept in
    float64; -inf scores are never drawn. Rows with a NaN get some id below V.
    """
    weights_SV = (scores_SV - scores_SV.amax(dim=-1, keepdim=True)).exp_()
    vocabulary = weights_SV.shape[-1]
    num_whole = vocabulary // _BLOCK_TOKENS
    whole_SV = weights_SV[:, : num_whole * _BLOCK_TOKENS]
    whole_SNB = whole_SV.view(len(scores_SV), num_whole, _BLOCK_TOKENS)
    rest_SB = weights_SV[:, num_whole * _BLOCK_TOKENS :]
    sums_SN = torch.cat(
        [
            whole_SNB.sum(dim=-1, dtype=torch.float64),
            rest_SB.sum(dim=-1, keepdim=True, dtype=torch.float64),
        ],
        dim=-1,
    )
    cumulated_SN = sums_SN.cumsum(dim=-1)
    target_S1 = uniforms_S.unsqueeze(-1) * cumulated_SN[:, -1:]
    block_S1 = _interval_of(target_S1, cumulated_SN)
    before_S1 = cumulated_SN.gather(-1, (block_S1 - 1).clamp_(min=0))
    target_S1 = torch.where(block_S1 > 0, target_S1 - before_S1, target_S1)
    ids_SB = block_S1 * _BLOCK_TOKENS + torch.arange(_BLOCK_TOKENS, device=scores_SV.device)
    block_SB = weights_SV.gather(-1, ids_SB.clamp(max=vocabulary - 1)).double()
    block_SB = block_SB.masked_fill_(ids_SB >= vocabulary, 0)
    offset_S1 = _interval_of(target_S1, block_SB.cumsum(dim=-1))
    return (block_S1 * _BLOCK_TOKENS + offset_S1).clamp_(max=vocabulary - 1).squeeze(-1)


def _interval_of(target_S1: torch.Tensor, cumulated_SN: torch.Tensor) -> torch.Tensor:
    """The index of the interval that holds the target; never one of no width."""
    # Rounded, u·total may be the total itself, which no interval contains.
    total_S1 = cumulated_SN[:, -1:]
    below_total_S1 = torch.nextafter(total_S1, torch.zeros_like(total_S1))
    target_S1 = torch.minimum(target_S1, below_total_S1)
    index_S1 = torch.searchsorted(cumulated_SN, target_S1, right=True)
    return index_S1.clamp_(max=cumulated_SN.shape[-1] - 1)  # after a NaN there is none


def _mix(state: int) -> int:
    state = (state ^ state >> 30) * _MULTIPLIER_1 & _MASK
    state = (state ^ state >> 27) * _MULTIPLIER_2 & _MASK
    return state ^ state >> 31


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned `value`."""
    return value - (1 << _BITS) if value >> (_BITS - 1) else value


def _shift_right(values_S: torch.Tensor, num_bits: int) -> torch.Tensor:
    """A shift that fills with zeros; torch's own fills with the sign."""
    return (values_S >> num_bits) & ((1 << (_BITS - num_bits)) - 1)

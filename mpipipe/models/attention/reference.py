"""The reference attention: one sequence after the other, every score written out, in float32.

Slow and obvious on purpose: the other backends are tested against it.
"""

from __future__ import annotations

import torch

from mpipipe.models.attention.base import AttentionBackend, AttentionInputs

__all__ = ["ReferenceAttention"]


class ReferenceAttention(AttentionBackend):
    """softmax(scale · Q Kᵀ) V per sequence and query head."""

    name = "reference"
    needs_seq_lens = True
    head_major = False

    def attend_stored(self, inputs: AttentionInputs) -> torch.Tensor:
        """See `AttentionBackend`."""
        layer, query_THD, key_TKD, _, cache, layout, options = inputs
        device = query_THD.device
        group = query_THD.shape[1] // key_TKD.shape[1]
        outputs: list[torch.Tensor] = []
        for index, seq in enumerate(layout.seq_lens):
            key_LKD, value_LKD = cache.read(layer, index, seq, layout)
            query_QHD = query_THD[seq.query_start : seq.query_start + seq.query_len]
            key_LHD = key_LKD.repeat_interleave(group, dim=1)
            value_LHD = value_LKD.repeat_interleave(group, dim=1)
            scores_HQL = torch.einsum("qhd,lhd->hql", query_QHD.float(), key_LHD.float())
            scores_HQL = scores_HQL * options.scale
            if options.softcap is not None:
                scores_HQL = options.softcap * torch.tanh(scores_HQL / options.softcap)
            query_position_Q1 = torch.arange(seq.num_computed, seq.kv_len, device=device)[:, None]
            key_position_L = torch.arange(seq.kv_len, device=device)
            hidden_QL = key_position_L > query_position_Q1
            if options.window is not None:
                hidden_QL = hidden_QL | (key_position_L <= query_position_Q1 - options.window)
            weights_HQL = scores_HQL.masked_fill(hidden_QL, float("-inf")).softmax(dim=-1)
            outputs.append(torch.einsum("hql,lhd->qhd", weights_HQL, value_LHD.float()))
        return torch.cat(outputs).to(query_THD.dtype)

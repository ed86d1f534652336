"""Stand-ins for attention kernels that run on GPUs only.

Each has the signature of its peer, refuses what the peer's source refuses, and returns what the peer returns, computed
on a CPU in float32. Sources: Dao-AILab/flash-attention at 0251105a (flash_attn/flash_attn_interface.py and
csrc/flash_attn/flash_api.cpp; hopper/flash_attn_interface.py and hopper/flash_api.cpp; flash_attn/cute/interface.py)
and torch 2.11 and 2.13 (torch/nn/attention/varlen.py).
"""

from itertools import pairwise
from typing import Any

import torch

Tensor = torch.Tensor
HALVES = (torch.float16, torch.bfloat16)


def attention(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, scale: float | None, back: int | None,
    ahead: int | None, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Computes the attention of several sequences, (tokens, heads, width), of whose keys the last is aligned with the
    last query. Each query sees keys from `back` before it to `ahead` after it; None is no limit."""
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        queries, keys, values = (t.float().transpose(0, 1) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        groups = len(queries) // len(keys)
        keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
        scores = queries @ keys.mT * (q.shape[2] ** -0.5 if scale is None else scale)
        if softcap > 0:
            scores = softcap * (scores / softcap).tanh()
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if back is not None:
            seen &= distance <= back
        if ahead is not None:
            seen &= distance >= -ahead
        assert seen.any(1).all()
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(*scores.shape[:2], 1)], dim=2)
        outputs.append((scores.softmax(2)[..., : k1 - k0] @ values).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    one_width: bool,
) -> None:
    """Refuses what all of them refuse. None of them takes a length that is no int: pybind and schemas of operators are
    strict. A length that is too small is not refused there, but leaves queries out."""
    if q.dtype not in HALVES or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if any(t.dtype != torch.int32 or not t.is_contiguous() for t in (ends_q, ends_k)):
        raise RuntimeError("cu_seqlens_q must have dtype int32")
    if any(type(length) is not int for length in (max_q, max_k)):
        raise TypeError("incompatible function arguments")
    if max(q.shape[2], v.shape[2]) > 256 or q.shape[2] % 8 or v.shape[2] % 8:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if one_width and v.shape[2] != q.shape[2]:
        raise RuntimeError("v must have shape (total_k, num_heads_k, head_size)")
    for ends, total, longest in ((ends_q, len(q), max_q), (ends_k, len(k), max_k)):
        assert ends[0] == 0
        assert ends[-1] == total
        assert int(ends.diff().max()) <= longest


def limits(causal: bool, window_size: Any, kind: type = int) -> tuple[int | None, int | None]:
    """Returns both sides of a window. Causal attention sees nothing ahead, whatever the window says, and numbers below
    0 are no limits."""
    if len(window_size) != 2 or not all(isinstance(side, kind) for side in window_size):
        raise TypeError("window_size must be a pair")
    back, ahead = (None if side is None or side < 0 else side for side in window_size)
    return back, 0 if causal else ahead


def flash_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Any:  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, one_width=True)
    assert dropout_p == 0.0
    assert alibi_slopes is block_table is None
    output = attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, *limits(causal, window_size), softcap=softcap
    )
    return (output, None, None) if return_attn_probs else output


def flash_3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Any = None, seqused_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
    qv: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: Any = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, one_width=False)
    assert seqused_q is seqused_k is qv is q_descale is k_descale is v_descale is None
    output = attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, *limits(causal, window_size), softcap=softcap
    )
    if deterministic and q.shape[2] > 192 and output.requires_grad:
        output.register_hook(_refused)
    return (output, None) if return_attn_probs else output


def _refused(grad: Tensor) -> Tensor:
    raise RuntimeError("Deterministic backward not supported for hdim 256.")


def flash_4(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None, seqused_q: Any = None, seqused_k: Any = None, gather_kv_indices: Any = None,
    page_table: Any = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None), learnable_sink: Tensor | None = None,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
    score_mod: Any = None, score_mod_bwd: Any = None, mask_mod: Any = None, block_sparse_tensors: Any = None,
    aux_tensors: Any = None, aux_scalars: Any = None, return_lse: bool = False, scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None, disable_scheduler_metadata: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """It always returns a pair. Without cumulative lengths it takes rows of one length, which ours are not."""
    assert qv is seqused_q is seqused_k is None
    assert cu_seqlens_q is not None and cu_seqlens_k is not None  # noqa: PT018 - mypy reads it
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0, one_width=False)
    if learnable_sink is not None:
        assert learnable_sink.shape == (q.shape[1],)
        assert learnable_sink.dtype in (*HALVES, torch.float32)
    back, ahead = limits(causal, window_size, kind=int | None)  # type: ignore[arg-type]
    output = attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, back, ahead, softcap, learnable_sink
    )
    return output, None


def varlen_2_13(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """The signature of torch 2.13, which refuses groups unless it is told."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return varlen_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )  # type: ignore[arg-type]


def varlen_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """The signature of torch 2.11, which takes groups without being told. A window says how far ahead a query sees."""
    check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, one_width=True)
    return attention(query, key, value, cu_seq_q, cu_seq_k, scale, *limits(False, window_size))

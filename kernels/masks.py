"""Who sees whom: documents packed into rows, and the dense mask that says the same to plain torch.

A document is a run of neighbouring tokens. Kernels take documents as *spans*: for each token the first token of its document
and one past its last, (B, 2, S) int32. A query then sees a range of keys and a key is seen by a range of queries, both with
ends that never step back from one token to the next. So the first and last row of a tile say which tiles it must visit and
which of those need no mask, for causal masks, windows and documents alike, and making spans needs no look at the device.
"""

import torch
from torch import Tensor


def document_spans(documents_BS: Tensor) -> Tensor:
    """Spans (B, 2, S) int32 of documents given as a number for each token; a new number starts a new document."""
    B, S = documents_BS.shape
    place_S = torch.arange(S, dtype=torch.int32, device=documents_BS.device)
    changes = documents_BS[:, 1:] != documents_BS[:, :-1]
    edge = torch.ones(B, min(S, 1), dtype=torch.bool, device=documents_BS.device)
    starts = torch.where(torch.cat((edge, changes), 1), place_S, 0).cummax(1).values
    ends = torch.where(torch.cat((changes, edge), 1), place_S + 1, S).flip(1).cummin(1).values.flip(1)
    return torch.stack((starts, ends), 1).to(torch.int32)


def length_spans(cumulative: Tensor, n_tokens: int) -> Tensor:
    """Spans (1, 2, S) int32 of one row of documents given as cumulative lengths (0, n1, n1 + n2, ...), S = n_tokens.

    Empty documents are allowed; tokens before the first length and past the last make documents of their own, and a document
    that goes on past the row ends with it: kernels read as far as spans say.
    """
    place_S = torch.arange(n_tokens, dtype=cumulative.dtype, device=cumulative.device)
    bounds = torch.cat((cumulative.new_zeros(1), cumulative.clamp(0, n_tokens), cumulative.new_full((1,), n_tokens)))
    end_S = torch.searchsorted(bounds, place_S, right=True).clamp(1, len(bounds) - 1)
    return torch.stack((bounds[end_S - 1], bounds[end_S]))[None].to(torch.int32)


def dense_mask(n_queries: int, n_keys: int, causal: bool, window: int, spans_B2S: Tensor | None,
               device: torch.device) -> Tensor:
    """(T, S) bool, or (B, 1, T, S) with documents: true where a query may see a key.

    Query t stands at place S - T + t, whether there are more keys or more queries.
    """
    key_S = torch.arange(n_keys, device=device)
    query_T = torch.arange(n_keys - n_queries, n_keys, device=device)
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if causal:
        mask = key_S[None, :] <= query_T[:, None]
    if window:
        mask = mask & (query_T[:, None] - key_S[None, :] < window)
    if spans_B2S is not None:
        starts_BS = spans_B2S[:, 0]
        mask = mask & (starts_BS[:, None, n_keys - n_queries:, None] == starts_BS[:, None, None, :])
    return mask

"""What is read for some samples: rows of tokens with what is known of them, or records."""

from dataclasses import dataclass, field

import numpy as np

from officina.trainer.data.shards import Lost


@dataclass(slots=True)
class Rows:
    """Tokens of some samples. n rows, T = seq_len."""

    tokens: np.ndarray
    """(n, T + 1) in the shards' dtype."""
    border_rows: np.ndarray
    """(b,) row of each document border, sorted."""
    border_columns: np.ndarray
    """(b,) column 1..T of each first token of a document, sorted within a row."""
    removed: np.ndarray | None = None
    """(n, T + 1) bool, tokens of documents that were removed on request, or of lost blocks; None if there are none."""
    lost: Lost = field(default_factory=dict)
    """Lost blocks under the rows; `RowReader` gives them in `lost_of`."""
    digest: int = 0
    """See `RowReader`."""
    lost_of: dict[str, Lost] = field(default_factory=dict)
    """Lost blocks under the rows, by source."""
    trained: np.ndarray | None = None
    """(n, T + 1) bool, tokens that carry loss as labels; None: all."""
    filled: np.ndarray | None = None
    """(n,) tokens before the padding; None: no row has any."""
    pair_rows: np.ndarray | None = None
    """(k,) row of each preference pair, sorted; None where there is no reference."""
    reference: np.ndarray | None = None
    """(k, 2) fp32, the reference's log-probabilities of its answers."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a user's own data."""

    content: bytes
    """Empty if a lost block holds a part of it."""
    where: str
    """Names it in an error."""
    lost: Lost
    """Lost blocks under it."""

"""Ranked lists as a long table of raw ids, one row for each place of a list."""

from __future__ import annotations

import numpy as np

from vaecf.errors import VaecfError
from vaecf.evaluation.ranking import RankedLists

SCORES = ("log_probability", "probability", "logit")


def check_score(score: str | None) -> None:
    """Raises VaecfError if `score` is neither None nor one of `SCORES`."""
    if score not in (None, *SCORES):
        raise VaecfError(f"score={score!r}: use one of {', '.join(SCORES)}")


def columns(
    lists: RankedLists,
    ids: np.ndarray,
    score: str | None,
    *,
    model: str,
    has_probabilities: bool,
) -> dict[str, np.ndarray]:
    """Returns ranked lists as a long table.

    Args:
      ids: raw ids of all items [items].
      score: one of `SCORES`; None takes the first that the model has.
      model: name of the model, for messages.
      has_probabilities: whether the scores are logits of probabilities.

    Returns:
      {'row': user's row in `lists`, 'rank': from 1, 'item': raw id, 'score':
      float32}, without the places after the end of a list.

    Raises:
      VaecfError: the score is unknown, or the model has no probabilities.
    """
    check_score(score)
    if not has_probabilities and score not in (None, "logit"):
        raise VaecfError(
            f"score={score!r}: {model} has no probabilities; use score='logit'"
        )
    score = score or (SCORES[0] if has_probabilities else "logit")
    row, rank = np.nonzero(lists.item_UK >= 0)
    value = lists.score_UK[row, rank]
    if score != "logit":
        value = value - lists.log_total_U[row]
    if score == "probability":
        value = np.exp(value)
    return {
        "row": row,
        "rank": rank + 1,
        "item": ids[lists.item_UK[row, rank]],
        "score": value,
    }

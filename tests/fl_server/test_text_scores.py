"""Sums of generated texts, as clients may lie about them."""

from __future__ import annotations

import pytest

from fl_server.exchange import Reply
from fl_server.text_scores import NAMES, read_text_sums
from vblora.errors import UpdateError

HONEST = dict.fromkeys(NAMES, 4.0)


@pytest.mark.parametrize(
    "lie",
    [{"text-prompts": 1e-320}, {"text-exact": 5.0}, {"text-rouge": 1e9}, {"text-bleu-length": float("nan")}],
)
def test_sums_that_would_make_no_score_are_refused(lie: dict[str, float]):
    assert read_text_sums(Reply("0", metrics=HONEST)) == HONEST
    with pytest.raises(UpdateError, match="sums of generated texts lack or misstate text-"):
        read_text_sums(Reply("0", metrics=HONEST | lie))

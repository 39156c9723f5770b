"""Settings: read from dashes, all faults told together, the schedule."""

from __future__ import annotations

import pytest

from fl_server.settings import ServerSettings
from vblora.errors import ConfigError


def test_reads_its_keys_and_leaves_others_alone():
    found = ServerSettings.from_run_config(
        {"rounds": 3, "clients-per-round": 2, "wait-seconds": 5, "resume": True, "model": "minilm"}
    )
    assert (found.rounds, found.clients_per_round, found.wait_seconds, found.resume) == (3, 2, 5, True)
    assert found.clients == ServerSettings().clients


def test_tells_all_faults_together():
    with pytest.raises(ConfigError) as error:
        ServerSettings.from_run_config(
            {
                "rounds": 0,
                "seed": "one",
                "eval-every": True,
                "schedule": "linear",
                "out": "",
                "clients": 3,
                "clients-per-round": 4,
                "timeout-seconds": float("nan"),
            }
        )
    assert str(error.value) == (
        "server settings: rounds is 0, expected 1 to 1000000; seed is 'one', expected a whole number; "
        "eval-every is True, expected a whole number; timeout-seconds is nan, expected 0 to 604800; "
        "clients-per-round is 4 but there are 3 clients; lower clients-per-round or raise clients; "
        "schedule is 'linear', expected one of cosine, root, constant; "
        "out is empty, expected the run directory"
    )


def test_late_clients_must_fit():
    with pytest.raises(ConfigError, match="late-clients is 2 without freeze-bank"):
        ServerSettings(late_clients=2)
    with pytest.raises(
        ConfigError, match="late-clients is 6, which leaves fewer than the 5 clients-per-round"
    ):
        ServerSettings(late_clients=6, freeze_bank=3)

    with pytest.raises(ConfigError, match=r"late-clients is 2, which come after round 8 .* of 8; raise"):
        ServerSettings(late_clients=2, freeze_bank=8, rounds=8)


def test_a_share_of_the_replies_closes_a_round():
    assert [ServerSettings(close_at=share).enough(25) for share in (0.28, 0.29, 1.0)] == [7, 8, 25]
    assert ServerSettings(close_at=0.56).enough(25) == 14
    assert ServerSettings(close_at=0.1, quorum=3).enough(5) == 3


def test_schedule():
    cosine = ServerSettings(rounds=11, warmup_rounds=0, final_scale=0.2)
    assert [cosine.lr_scale(number) for number in (1, 6, 11)] == pytest.approx([1.0, 0.6, 0.2])
    warm = ServerSettings(rounds=10, warmup_rounds=3, schedule="constant")
    assert [warm.lr_scale(number) for number in range(1, 6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    both = ServerSettings(rounds=10, warmup_rounds=3)
    assert [both.lr_scale(number) for number in (3, 4, 10)] == pytest.approx([0.75, 1.0, 0.1])
    root = ServerSettings(rounds=20, warmup_rounds=1, schedule="root")
    assert [root.lr_scale(number) for number in (1, 2, 5, 17)] == pytest.approx([0.5, 1, 0.5, 0.25])
    assert ServerSettings(rounds=1).lr_scale(1) == 1.0
    assert 0 < ServerSettings(rounds=2, warmup_rounds=5).lr_scale(2) <= 1


def test_logits_rest_between_their_rounds():
    every = ServerSettings()
    assert {every.frozen(number) for number in range(1, 9)} == {""}
    third = ServerSettings(logits_every=3)
    assert [third.frozen(number) for number in range(1, 6)] == ["", "logits", "logits", "", "logits"]


def test_late_clients_are_not_drawn_however_few_came():
    late = ServerSettings(clients=10, clients_per_round=5, freeze_bank=3, late_clients=5)
    assert [list(late.eligible(list("abcdefg")[:came], 3)) for came in (3, 5, 7)] == [[], [], ["a", "b"]]
    assert late.eligible("abc", 4) == "abc"


def test_what_is_frozen_or_personal_is_silent():
    plain = ServerSettings(logits_every=2, freeze_bank=3)
    assert [plain.silent(number) for number in (1, 2, 4)] == [set(), {"logits"}, {"bank"}]
    own = ServerSettings(personal="head, logits", freeze_bank=1)
    assert [own.silent(number) for number in (1, 2)] == [{"head", "logits"}, {"bank", "head", "logits"}]


def test_a_frozen_bank_leaves_every_round_to_the_logits():
    both = ServerSettings(logits_every=2, freeze_bank=3)
    assert [both.frozen(number) for number in range(1, 7)] == ["", "logits", "", "bank", "bank", "bank"]


def test_what_selections_are_averaged_by():
    with pytest.raises(ConfigError, match="clip-updates is 2 with logit-mean logits, where one client may"):
        ServerSettings(logit_mean="logits", clip_updates=2.0)
    with pytest.raises(ConfigError, match="logit-mean is 'sets', expected one of weights, logits"):
        ServerSettings(logit_mean="sets")

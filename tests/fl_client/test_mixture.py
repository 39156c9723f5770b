"""How mixed labels are, and what a client of one label does."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest

from fl_client.assembly import Texts, assemble
from fl_client.base import Base
from fl_client.mixture import label_mixture
from fl_client.personal import PersonalSettings
from fl_client.site import Site
from tests.fl_client.sites import make_site
from tests.vblora.tiny import LABELS, make_base
from vblora.state import initial_state


@pytest.mark.parametrize(
    ("targets", "classes", "expected"),
    [([1, 1, 1], 2, 0.0), ([0], 77, 0.0), ([0, 1, 0, 1], 2, 1.0), ([0, 0, 0, 1], 2, 0.75), ([0, 1], 3, 0.75)],
)
def test_by_hand(targets, classes, expected):
    assert label_mixture(np.array(targets), classes) == pytest.approx(expected)


def test_it_is_the_chance_of_a_pair_that_differs():
    rng = np.random.default_rng(0)
    targets = rng.choice(5, 4000, p=[0.5, 0.3, 0.1, 0.05, 0.05])
    pairs = rng.choice(targets, (100_000, 2))
    chance = (pairs[:, 0] != pairs[:, 1]).mean()
    assert label_mixture(targets, 5) == pytest.approx(chance / 0.8, abs=0.01)


def of_one_label(label_mix: bool = True) -> Site:
    """A site whose client 0 has texts of one label, the others of two."""
    site = make_site(3)
    targets = site.train.targets.copy()
    for client, rows in enumerate(site.parts):
        targets[rows] = np.arange(len(rows)) % 2 if client else 1
    settings = replace(site.settings, local=replace(site.settings.local, label_mix=label_mix))
    return replace(site, settings=settings, train=replace(site.train, targets=targets))


def moved(site: Site) -> list[bool]:
    """Whether each client's update changes anything."""
    state = initial_state(site.blueprint)
    steps = dict.fromkeys(range(3), 2)
    found = dict(site.train_clients(state, steps, round_number=1, scale=1.0))
    return [any(change.any() for change in found[client].update.dense.values()) for client in range(3)]


def test_a_client_of_one_label_teaches_nothing():
    assert moved(of_one_label()) == [False, True, True]
    assert moved(of_one_label(label_mix=False)) == [True, True, True]


@pytest.mark.parametrize(("personal", "first"), [("head", True), ("head,logits", True), ("logits", False)])
def test_a_head_of_its_own_learns_what_there_is(personal: str, first: bool):
    site = of_one_label()
    own = replace(site.settings, personal=PersonalSettings(personal))
    assert moved(replace(site, settings=own)) == [first, True, True]


def test_clients_of_one_label_are_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    site = of_one_label()
    texts = Texts(site.train, site.parts, site.test, site.own, LABELS, {})
    base = Base(make_base("bert", layers=1), None, 0)
    assemble(site.settings, texts, base)
    assert "1 of 3 clients have texts of one label only" in caplog.text
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr("fl_client.assembly.current_process", lambda: Mock(daemon=True))  # a helper
        assemble(site.settings, texts, Base(make_base("bert", layers=1), None, 0))
    assert not caplog.text
    local = replace(site.settings.local, label_mix=False)
    assemble(replace(site.settings, local=local), texts, Base(make_base("bert", layers=1), None, 0))
    assert not caplog.text

"""What stays with a client is kept, loaded, never sent; a cohort of such clients trains as each alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client.memory import Memory
from fl_client.personal import Part, PersonalSettings, keep_back, with_part
from fl_client.scoring import evaluate, evaluate_cohort
from fl_client.serve import Answer, Question, answer
from fl_client.site import Site
from fl_client.train import Job, train_cohort
from tests.fl_client.sites import make_site
from tests.fl_client.test_train import SETTINGS, TASKS, WIDE, check_same, make_examples, make_jobs, make_model
from tests.vblora.tiny import LORA, adapt, make_base, make_state
from vblora.errors import ConfigError, RunError
from vblora.frame import section_bytes
from vblora.rounding import WIRES
from vblora.state import State, Update, initial_state
from vblora.wire import decode_update, encode_state

CHOICES = ["head", "logits", "head,logits"]


# --- Settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "parts"),
    [("none", set()), ("head", {"head"}), ("logits", {"logits"}), ("logits, head", {"head", "logits"})],
)
def test_parts_are_named(named: str, parts: set[str]):
    assert PersonalSettings(named).parts == parts


@pytest.mark.parametrize("named", ["", "bank", "head,none", "heads", "head,"])
def test_other_names_are_refused(named: str):
    with pytest.raises(ConfigError, match="expected none, head, logits or head,logits"):
        PersonalSettings(named)


def test_an_adapter_must_have_what_is_personal():
    lora = adapt(make_base("bert", layers=1), LORA).blueprint
    language = adapt(make_base("llama", layers=1)).blueprint
    with pytest.raises(ConfigError, match="a lora adapter has no logits; expected none or head"):
        PersonalSettings("head,logits").check(lora)
    with pytest.raises(ConfigError, match="causal-lm trains no task head; expected none or logits"):
        PersonalSettings("head").check(language)
    PersonalSettings("head").check(lora)
    PersonalSettings("logits").check(language)


def test_a_site_checks_itself_whatever_it_is_told():
    site = make_site(2, family="llama")
    with pytest.raises(ConfigError, match="no task head"):
        replace(site, settings=replace(site.settings, personal=PersonalSettings("head")))


# --- Parts ---------------------------------------------------------------------------


def test_a_part_goes_through_a_file_in_few_bytes():
    state = make_state(make_model().blueprint)
    part = Part(state.dense["head"], state.topk)
    arrays = part.arrays()
    assert arrays["positions"].dtype == np.uint16, "h is 300"
    again = Part.of(arrays)
    assert with_part(state, again).digest == state.digest
    assert Part.of(Part().arrays()) == Part()
    assert with_part(state, None) is state


@pytest.mark.parametrize("personal", CHOICES)
def test_what_is_kept_and_what_is_sent_make_the_whole(personal: str):
    blueprint = make_model().blueprint
    reference, other = make_state(blueprint), make_state(blueprint, 1)
    start = with_part(reference, Part(other.dense["head"], other.topk))
    change = {name: np.full_like(array, 0.5) for name, array in reference.dense.items()}
    moved = make_state(blueprint, 2).topk
    update = Update(reference.version, reference.digest, 7, change, moved)
    sent, part = keep_back(update, start, reference, PersonalSettings(personal).parts)
    assert (sent.dense["bank"] == 0.5).all()
    if "head" in personal:
        assert not sent.dense["head"].view(np.uint32).any()
        assert part.head is not None
        assert (part.head == start.dense["head"] + np.float32(0.5)).all()
    else:
        assert part.head is None
        assert (sent.dense["head"] == 0.5).all()
    assert (sent.topk is reference.topk) == ("logits" in personal)
    assert part.topk is (moved if "logits" in personal else None)


# --- Cohorts -------------------------------------------------------------------------


def starts_for(state: State, count: int, head: bool) -> list[State]:
    """Clients without a part, with selections near and far, and with heads of their own."""
    blueprint = make_model("bert" if head else "llama").blueprint
    others = [make_state(blueprint, 10 + number) for number in range(count)]
    parts = [Part(other.dense.get("head"), other.topk) for other in others]
    return [with_part(state, None if number % 3 == 0 else part) for number, part in enumerate(parts)]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_clients_with_parts_of_their_own_train_side_by_side_as_alone(family: str):
    model = make_model(family, WIDE, 1)
    state = make_state(model.blueprint, scale=0.05)
    starts = starts_for(state, 8, family == "bert")
    jobs = [replace(job, start=start) for job, start in zip(make_jobs(), starts, strict=True)]
    together = train_cohort(model, TASKS[family], state, jobs, SETTINGS)
    for job, expected in zip(jobs, together, strict=True):
        (alone,) = train_cohort(model, TASKS[family], state, [job], SETTINGS)
        check_same(alone, expected)
    still = replace(SETTINGS, lr_bank=0.0, lr_logits=0.0, lr_head=0.0)
    for trained, start in zip(train_cohort(model, TASKS[family], state, jobs, still), starts, strict=True):
        assert not any(array.any() for array in trained.update.dense.values())
        assert trained.update.topk is not None
        assert start.topk is not None
        assert trained.update.topk.same_rows(start.topk).all(), "each keeps its own bits"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_clients_with_parts_of_their_own_are_scored_side_by_side_as_alone(family: str):
    model = make_model(family)
    state = make_state(model.blueprint, scale=0.05)
    starts = starts_for(state, 5, family == "bert")
    texts = [make_examples(count, count) for count in (4, 0, 11, 1, 7)]
    together = evaluate_cohort(model, TASKS[family], starts, texts, batch_tokens=60)
    for start, examples, expected in zip(starts, texts, together, strict=True):
        alone = evaluate(model, TASKS[family], start, examples)
        assert alone == pytest.approx(expected, rel=1e-6)
    assert together[1]["eval-examples"] == 0


def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns():
    model, jobs = make_model(), make_jobs()[2:5]
    state = make_state(model.blueprint, scale=0.05)
    for trained in train_cohort(model, TASKS["bert"], state, jobs, SETTINGS, frozen={"bank"}):
        assert not trained.update.dense["bank"].view(np.uint32).any()
        assert trained.update.dense["head"].any()
        assert trained.update.topk is not None
        assert state.topk is not None
        assert not trained.update.topk.same_rows(state.topk).all()


# --- A site --------------------------------------------------------------------------


def personal_site(personal: str, memory: Memory | None = None, **wire: bool) -> Site:
    site = make_site(4)
    settings = replace(
        site.settings, personal=PersonalSettings(personal), wire=replace(WIRES["default"], **wire)
    )
    return replace(site, settings=settings, memory=memory or Memory(None))


def ask(site: Site, state: State, number: int, kind: str = "train", **more: Any) -> Mapping[int, Answer]:
    blob = encode_state(state, site.blueprint)
    config = {"round": number, "lr-scale": 1.0, "run": "one", **more}
    return {
        found.client: found for found in answer(site, [Question(c, kind, blob, config) for c in range(4)])
    }


def later(site: Site, version: int) -> State:
    """A state of a later round, not so far from the start."""
    return replace(make_state(site.blueprint, 5, scale=0.02), version=version)


@pytest.mark.parametrize("personal", CHOICES)
def test_a_personal_part_is_never_in_a_blob(personal: str):
    site = personal_site(personal, feedback=True)
    hidden = {"head": {"head"}, "logits": {"selection", "positions", "gaps"}}
    for number, state in ((1, initial_state(site.blueprint)), (2, later(site, 1))):
        for found in ask(site, state, number).values():
            sections = set(section_bytes(found.blob))
            assert "bank" in sections
            for part in ("head", "logits"):
                assert bool(sections & hidden[part]) == (part not in personal), (part, sections)
            update = decode_update(found.blob, site.blueprint, state)
            if "head" in personal:
                assert not update.dense["head"].any()
            if "logits" in personal:
                assert update.topk is state.topk


@pytest.mark.parametrize("personal", CHOICES)
def test_a_client_goes_on_from_its_own_part(personal: str):
    site = personal_site(personal)
    ask(site, initial_state(site.blueprint), 1)
    first = {client: site.memory.personal(client, 1) for client in range(4)}
    state = later(site, 1)
    own = ask(site, state, 2)
    for client, part in first.items():
        start = with_part(state, part)
        job = Job(str(client), site.train.take(site.parts[client]), (0, 2, client), start=start)
        (alone,) = train_cohort(site.model, site.task, state, [job], site.settings.local, pad=site.pad)
        assert own[client].metrics["train-loss"] == pytest.approx(alone.loss, rel=1e-6)
        kept = site.memory.personal(client, 2)
        assert kept is not None
        if "head" in personal:
            expected = start.dense["head"] + alone.update.dense["head"]
            np.testing.assert_allclose(kept.head, expected, atol=1e-6)
        if "logits" in personal:
            assert kept.topk is not None
            assert alone.update.topk is not None
            assert (kept.topk.positions == alone.update.topk.positions).all()
    shared = ask(personal_site("none"), state, 2)
    assert [shared[client].metrics["train-loss"] for client in range(4)] != pytest.approx(
        [own[client].metrics["train-loss"] for client in range(4)]
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_round_that_is_trained_again_starts_where_it_did(on_disk: bool, tmp_path: Path):
    def memory() -> Memory:
        return Memory(tmp_path if on_disk else None)

    site = personal_site("head,logits", memory=memory())
    ask(site, initial_state(site.blueprint), 1)
    state = later(site, 1)
    once = ask(site, state, 2)
    if on_disk:  # another process
        site = replace(site, memory=memory())
    assert {c: found.blob for c, found in ask(site, state, 2).items()} == {
        c: found.blob for c, found in once.items()
    }


def test_process_and_disk_remember_the_same(tmp_path: Path):
    found = []
    for memory in (Memory(None), Memory(tmp_path)):
        site = personal_site("head,logits", memory=memory)
        ask(site, initial_state(site.blueprint), 1)
        found.append([answered.blob for answered in ask(site, later(site, 1), 2).values()])
    assert found[0] == found[1]


def test_a_damaged_part_is_told_not_forgotten(tmp_path: Path):
    site = personal_site("head", memory=Memory(tmp_path))
    ask(site, initial_state(site.blueprint), 1)
    (path,) = tmp_path.glob("one/personal/3/*")
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(RunError, match=r"personal/3/0000001.safetensors: a client's personal part cannot be"):
        ask(site, later(site, 1), 2)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_part_is_not_restarted_where_the_run_goes_back_too_far(tmp_path: Path, on_disk: bool):
    memory = Memory(tmp_path if on_disk else None)
    memory.open("one")

    def keep(version: int) -> None:
        memory.keep_personal(3, version, Part(head=np.full(2, version, np.float32)))

    keep(4)
    assert memory.personal(3, 3) is None, "its first turn, which is taken again"
    keep(5)
    with pytest.raises(RunError, match=r"3: .* of versions 4, 5, the run has gone back to 3; .* delete"):
        memory.personal(3, 3)
    assert memory.personal(2, 3) is None
    keep(6)
    with pytest.raises(RunError, match="of versions 5, 6, the run has gone back to 4"):
        memory.personal(3, 4)
    assert memory.personal(3, 5).head.tolist() == [5, 5]


def test_a_frozen_bank_is_not_sent_nor_what_waited_for_it():
    site = personal_site("none", feedback=True)
    for found in ask(site, initial_state(site.blueprint), 1).values():
        assert "bank" in section_bytes(found.blob)
    assert site.memory.waiting(0, 1)["bank"].any()
    for found in ask(site, later(site, 1), 2, frozen="bank").values():
        assert {"head", "frame"} <= set(section_bytes(found.blob)) <= {"head", "selection", "frame"}


# --- Own scores ----------------------------------------------------------------------


def test_own_scores_are_of_own_texts_under_the_own_part():
    site = personal_site("head")
    start = initial_state(site.blueprint)
    ask(site, start, 1)
    state = later(site, 1)
    found = ask(site, state, 1, "evaluate", own=1)
    for client in range(4):
        own = with_part(state, site.memory.personal(client, 1))
        expected = evaluate(site.model, site.task, own, site.test.take(site.own[client]), pad=site.pad)
        told = {name.replace("own-", "eval-"): value for name, value in found[client].metrics.items()}
        assert told == pytest.approx(expected, rel=1e-6)
    assert sum(answered.metrics["own-examples"] for answered in found.values()) == len(site.test)


def test_without_personal_parts_own_scores_add_up_to_the_common_one():
    site = personal_site("none")
    state = later(site, 1)
    found = ask(site, state, 1, "evaluate", own=1, shard=0, shards=1)
    for name in ("loss-sum", "correct", "examples"):
        whole = found[0].metrics[f"eval-{name}"]
        assert sum(answered.metrics[f"own-{name}"] for answered in found.values()) == pytest.approx(whole)


def test_a_site_alone_is_scored_once(monkeypatch: pytest.MonkeyPatch):
    site = make_site(1)
    state = initial_state(site.blueprint)
    monkeypatch.setattr(Site, "evaluate_own", lambda *_: iter([]))
    config = {"round": 0, "shard": 0, "shards": 1, "own": True}
    (found,) = answer(site, [Question(0, "evaluate", encode_state(state, site.blueprint), config)])
    assert found.metrics["own-loss-sum"] == found.metrics["eval-loss-sum"]

"""A site of its own, loaded once: a real tiny model over two csv files."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fl_client.assembly import Texts
from fl_client.base import Base
from fl_client.discreet import reason_for_server
from fl_client.questions import Question, Scalar
from fl_client.resident import Budget, Resident
from fl_client.settings import SiteSettings
from fl_server.aggregate import aggregate
from tests.conftest import full_disk
from tests.simulations.conftest import tiny_bert, topics  # noqa: F401 (fixtures)
from vblora.errors import ConfigError, DataError
from vblora.frame import section_bytes
from vblora.spec import Blueprint
from vblora.state import initial_state
from vblora.wire import decode_update, encode_state

RUN = {"local-steps": 3, "batch-size": 4, "max-length": 32, "seed": 2}


@pytest.fixture
def resident(tiny_bert: Path, topics: Path, tmp_path: Path) -> Resident:  # noqa: F811
    return Resident({"model": str(tiny_bert), "data": str(topics)}, tmp_path)


def test_one_base_for_all_questions_of_a_run(resident: Resident):
    resident.load(RUN)
    hello = json.loads(resident.answer(Question(5, "hello"), RUN).text)
    described = json.loads(resident.answer(Question(5, "describe"), RUN).text)
    blueprint = Blueprint.from_json(described["blueprint"])
    assert hello["examples"] == described["train_examples"] == 216
    blob = encode_state(initial_state(blueprint), blueprint)
    config = {"round": 1, "lr-scale": 1.0}
    found = resident.answer(Question(5, "train", blob, config), RUN)
    assert (found.client, found.metrics["steps"], found.error) == (0, 3, "")
    assert decode_update(found.blob, blueprint).examples == 12
    faster = resident.answer(Question(5, "train", blob, config), {**RUN, "local-steps": 2})
    assert faster.metrics["steps"] == 2
    asked = Question(5, "evaluate", blob, {"round": 0, "shard": 1, "shards": 3})
    assert resident.answer(asked, RUN).metrics["eval-examples"] == described["test_examples"]
    assert resident.bases_loaded == 1


def test_another_adapter_takes_another_base(resident: Resident):
    resident.load(RUN)
    hello = Question(0, "hello")
    first = resident.answer(hello, RUN).text
    with pytest.raises(ConfigError, match="rank"):
        resident.answer(hello, {**RUN, "rank": -1})
    assert resident.answer(hello, {**RUN, "rank": 2}).text != first
    assert resident.bases_loaded == 2


@pytest.mark.parametrize("bad", [{"adapter": "lora", "personal": "logits"}, {"cuda-graphs": True}], ids=str)
def test_a_refused_run_leaves_nothing_in_the_base(resident: Resident, bad: dict[str, Scalar]):
    clean = Resident(resident.own, resident._state / "clean").answer(Question(0, "describe"), RUN)
    with pytest.raises(ConfigError):
        resident.answer(Question(0, "hello"), {**RUN, **bad})
    assert resident.answer(Question(0, "describe"), RUN) == clean


def test_a_base_is_given_up_where_its_adapter_fails(resident: Resident, monkeypatch: pytest.MonkeyPatch):
    clean = Resident(resident.own, resident._state / "clean").answer(Question(0, "describe"), RUN)
    with monkeypatch.context() as patch:
        patch.setattr("fl_client.assembly.CohortSizer", None)  # the adapter is in the base by then
        with pytest.raises(TypeError):
            resident.answer(Question(0, "hello"), RUN)
    assert resident.answer(Question(0, "describe"), RUN) == clean
    assert resident.bases_loaded == 2


def test_training_stops_when_its_seconds_are_over(resident: Resident):
    described = json.loads(resident.answer(Question(0, "describe"), RUN).text)
    blueprint = Blueprint.from_json(described["blueprint"])
    blob = encode_state(initial_state(blueprint), blueprint)
    question = Question(0, "train", blob, {"round": 1, "lr-scale": 1.0, "seconds": 1e-9})
    found = resident.answer(question, {**RUN, "local-steps": 50})
    assert found.metrics["steps"] == 1
    assert 0 < found.metrics["train-loss"] < 5
    assert decode_update(found.blob, blueprint).examples == 4


def test_loading_takes_of_the_time_to_train(resident: Resident, monkeypatch: pytest.MonkeyPatch):
    described = json.loads(resident.answer(Question(0, "describe"), RUN).text)
    blueprint = Blueprint.from_json(described["blueprint"])
    config = {"round": 1, "lr-scale": 1.0, "seconds": 0.5}
    question = Question(0, "train", encode_state(initial_state(blueprint), blueprint), config)
    run = {**RUN, "local-steps": 3}
    assert resident.answer(question, run).metrics["steps"] == 3
    open_parts = resident._open

    def slowly(settings: SiteSettings) -> tuple[Texts, Base]:
        time.sleep(0.5)
        return open_parts(settings)

    monkeypatch.setattr(resident, "_open", slowly)
    assert resident.answer(question, {**run, "batch-size": 3}).metrics["steps"] == 3, "nothing is loaded"
    assert resident.answer(question, {**run, "max-examples": 100}).metrics["steps"] == 1


def test_a_personal_part_outlives_the_trainer(resident: Resident, tmp_path: Path):
    run = {**RUN, "personal": "head,logits"}
    described = json.loads(resident.answer(Question(0, "describe"), run).text)
    blueprint = Blueprint.from_json(described["blueprint"])
    start = initial_state(blueprint)
    for number in (1, 2):
        state = replace(start, version=number - 1)
        config = {"round": number, "lr-scale": 1.0, "run": "one"}
        found = resident.answer(Question(0, "train", encode_state(state, blueprint), config), run)
        assert set(section_bytes(found.blob)) == {"bank", "frame"}
    asked = Question(0, "train", encode_state(replace(start, version=1), blueprint), config)
    assert Resident(resident.own, tmp_path).answer(asked, run).blob == found.blob
    assert Resident(resident.own, tmp_path / "bare").answer(asked, run).blob != found.blob
    told = resident.answer(Question(0, "evaluate", asked.blob, {"round": 1, "run": "one", "own": True}), run)
    assert set(told.metrics) == {"own-examples", "own-loss-sum", "own-correct"}
    assert told.metrics["own-examples"] == described["test_examples"]


def test_a_site_may_give_a_round_less(tiny_bert: Path, topics: Path, tmp_path: Path):  # noqa: F811
    own = {"model": str(tiny_bert), "data": str(topics)}
    site = Resident(own, tmp_path, Budget(steps=2))
    described = json.loads(site.answer(Question(0, "describe"), RUN).text)
    blueprint = Blueprint.from_json(described["blueprint"])
    blob = encode_state(initial_state(blueprint), blueprint)
    question = Question(0, "train", blob, {"round": 1, "lr-scale": 1.0})
    assert site.answer(question, RUN).metrics == pytest.approx(
        {"steps": 2, "examples": 8, "train-loss": 1.1}, abs=0.5
    )
    assert site.answer(question, {**RUN, "local-steps": 1}).metrics["steps"] == 1
    short = Resident(own, tmp_path / "short", Budget(seconds=1e-9))
    assert short.answer(question, {**RUN, "local-steps": 50}).metrics["steps"] == 1
    with pytest.raises(ConfigError, match=r"--train-seconds is -1.*; --max-steps is -2"):
        Budget(-1, -2)


def test_a_restarted_site_goes_on_where_it_was(tiny_bert: Path, topics: Path, tmp_path: Path):  # noqa: F811
    """Reference states and error feedback come from disk: the same updates as without a restart."""
    own = {"model": str(tiny_bert), "data": str(topics)}
    run = {**RUN, "wire-feedback": "on", "wire-up-bits": 2.0}

    def updates(restart: bool) -> list[bytes]:
        folder = tmp_path / str(restart)
        site = Resident(own, folder)
        described = json.loads(site.answer(Question(0, "describe"), run).text)
        blueprint = Blueprint.from_json(described["blueprint"])
        state, base, blobs = initial_state(blueprint), None, []
        for number in range(1, 4):
            blob = encode_state(state, blueprint, base)
            asked = Question(0, "train", blob, {"round": number, "lr-scale": 1.0, "run": "a"})
            found = site.answer(asked, run)
            assert found.text == "", "it holds the state that this one builds on"
            blobs.append(found.blob)
            update = decode_update(found.blob, blueprint, state)
            base, state = state, aggregate(state, [update], blueprint)
            if restart:
                site = Resident(own, folder)
        return blobs

    assert updates(True) == updates(False)
    assert list(tmp_path.glob("True/memory/a/waiting/0/*"))


def test_a_full_disk_is_told_and_the_next_round_is_as_ever(resident: Resident):
    described = json.loads(resident.answer(Question(0, "describe"), RUN).text)
    blueprint = Blueprint.from_json(described["blueprint"])
    asked = Question(
        0, "train", encode_state(initial_state(blueprint), blueprint), {"round": 1, "lr-scale": 1.0}
    )
    with full_disk(100), pytest.raises(OSError, match="File too large") as fault:
        resident.answer(asked, RUN)
    assert reason_for_server(fault.value) == "it failed (File too large); the site's own log says why"
    assert resident.answer(asked, RUN).metrics["steps"] == 3


def test_progress_of_an_evaluation_is_told(resident: Resident):
    described = json.loads(resident.answer(Question(0, "describe"), RUN).text)
    blueprint = Blueprint.from_json(described["blueprint"])
    blob = encode_state(initial_state(blueprint), blueprint)
    told: list[tuple[int, int]] = []
    asked = Question(0, "evaluate", blob, {"round": 0, "shard": 0, "shards": 1})
    resident.answer(asked, RUN, lambda done, steps: told.append((done, steps)))
    assert told
    assert told[-1][0] == told[-1][1] == len(told)


def test_sites_agree_on_labels_by_name(tiny_bert: Path, tmp_path: Path):  # noqa: F811
    def blueprint(name: str, rows: list[str], labels: str) -> Blueprint:
        path = tmp_path / f"{name}.csv"
        path.write_text("text,label\n" + "\n".join(f"apple bread {n},{row}" for n, row in enumerate(rows)))
        site = Resident({"model": str(tiny_bert), "data": str(path), "labels": labels}, tmp_path)
        described = json.loads(site.answer(Question(0, "describe"), RUN).text)
        return Blueprint.from_json(described["blueprint"])

    here = blueprint("here", ["sport", "food"] * 6, "food,space,sport")
    there = blueprint("there", ["space"] * 12, "sport, food, space")
    assert here.labels == there.labels == ("food", "space", "sport")
    assert here.fingerprint == there.fingerprint


def test_labels_that_do_not_fit_are_named(resident: Resident, tiny_bert: Path, topics: Path):  # noqa: F811
    with pytest.raises(DataError, match=r"1 values .* not among the 3 of --labels \('sport'\)"):
        resident.load({**RUN, "labels": "food,space,other"})
    own = {"model": str(tiny_bert), "data": str(topics), "labels": "food,space,sport"}
    site = Resident(own, topics.parent)
    with pytest.raises(ConfigError, match="the run says 'a,b'; agree on one"):
        site.answer(Question(0, "hello"), {**RUN, "labels": "a,b"})
    assert site.answer(Question(0, "hello"), {**RUN, "labels": "sport, food,space"}).text


def test_labels_ask_for_a_label_column(tiny_bert: Path, tmp_path: Path):  # noqa: F811
    path = tmp_path / "notes.csv"
    path.write_text("text,verdict\n" + "".join(f"apple bread {n},good\n" for n in range(12)))
    site = Resident({"model": str(tiny_bert), "data": str(path), "labels": "bad,good"}, tmp_path)
    with pytest.raises(DataError, match=r"found no label column among 'text', 'verdict'; name it with"):
        site.load(RUN)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A csv of 60 notes of nine patients, with a label and a verdict for each."""
    path = tmp_path / "notes.csv"
    rows = [f"bread {n} of cheese,{('no', 'yes')[n % 2]},patient {n % 9},{'abc'[n % 3]}" for n in range(60)]
    path.write_text("\n".join(["text,label,patient,verdict", *rows]))
    return path


@pytest.mark.parametrize(
    "columns",
    [
        {"label-column": "patient"},
        {"text-column": "label+patient", "label-column": "text"},
        {"label-column": "nothing", "text-column": "nothing", "eval-split": "test"},
    ],
    ids=lambda columns: columns["label-column"],
)
def test_a_run_names_no_column_of_a_site(
    notes: Path,
    tiny_bert: Path,  # noqa: F811
    columns: dict[str, Scalar],
    tmp_path: Path,
):
    """Label names leave the site: a server could read any column as such."""
    own = {"model": str(tiny_bert), "data": str(notes)}
    for names, found in (({}, ("no", "yes")), ({"label-column": "verdict"}, ("a", "b", "c"))):
        site = Resident({**own, **names}, tmp_path)
        run = {**RUN, "task": "classification", **columns}
        described = json.loads(site.answer(Question(0, "describe"), run).text)
        assert Blueprint.from_json(described["blueprint"]).labels == found


def test_a_column_of_texts_is_not_taken_for_labels(tiny_bert: Path, tmp_path: Path):  # noqa: F811
    path = tmp_path / "summaries.csv"
    path.write_text("text,target\n" + "".join(f"bread {n},cheese {n // 2}\n" for n in range(60)))
    own = {"model": str(tiny_bert), "data": str(path)}
    run = {**RUN, "task": "classification"}
    with pytest.raises(DataError, match=r"'target' holds 30 values in 5\d rows, hardly classes") as fault:
        Resident(own, tmp_path).answer(Question(0, "describe"), run)
    assert reason_for_server(fault.value).startswith("its data does not fit the run")
    assert Resident({**own, "label-column": "target"}, tmp_path).answer(Question(0, "describe"), run).text


@pytest.mark.parametrize(
    "own",
    [
        {"checkpointing": True, "accumulate": 2},
        {"dtype": "bfloat16", "recompute": True},
        {"dtype": "float16"},
        {"quantize": "4bit", "checkpointing": True},
    ],
    ids=lambda own: "-".join(map(str, own.values())),
)
def test_a_small_device_is_the_sites_own_affair(
    own: dict[str, Scalar],
    tiny_bert: Path,  # noqa: F811
    topics: Path,  # noqa: F811
    tmp_path: Path,
):
    """The run does not know: adapter and update are those that other sites have, near enough."""
    if "quantize" in own:
        pytest.importorskip("bitsandbytes")
    named: dict[str, Scalar] = {"model": str(tiny_bert), "data": str(topics)}
    site, other = Resident({**named, **own}, tmp_path / "own"), Resident(named, tmp_path / "other")
    told = [json.loads(one.answer(Question(0, "describe"), RUN).text) for one in (site, other)]
    assert told[0]["blueprint"] == told[1]["blueprint"]
    blueprint = Blueprint.from_json(told[0]["blueprint"])
    blob = encode_state(initial_state(blueprint), blueprint)
    asked = Question(0, "train", blob, {"round": 1, "lr-scale": 1.0})
    run = {**RUN, "wire": "lossless"}
    found, expected = (decode_update(one.answer(asked, run).blob, blueprint) for one in (site, other))
    assert found.examples == expected.examples
    bank, like = (update.dense["bank"].ravel() for update in (found, expected))
    least = 0.2 if "quantize" in own else 0.8  # 4 bits make another base of so small a one
    assert bank @ like > least * np.linalg.norm(bank) * np.linalg.norm(like)

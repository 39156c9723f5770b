"""What a site tells its server when something fails: nothing of its files."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from fl_client.chats import in_template
from fl_client.discreet import described_for_server, reason_for_server
from fl_client.settings import AdapterSettings
from vblora.adapters import LoRASpec
from vblora.errors import ConfigError, DataError, ModelError, RunError, StartError, WireError
from vblora.start import Found

SECRET = "Mr Smith has measles"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError(f"/srv/notes.csv: has values not among --labels ({SECRET!r})"), "its data does not fit"),
        (ValueError(f"could not parse {SECRET!r}"), "it failed (ValueError)"),
        (ModelError(f"--model: /home/{SECRET}/llama has no config.json"), "its files or its settings"),
        (RunError(f"/srv/{SECRET}/state: damaged"), "its files or its settings"),
        (ConfigError(f"start: rank is 2, the adapter in /srv/{SECRET} has 4"), "its files or its settings"),
        (StartError(f"start {SECRET}: no adapter there"), "its files or its settings"),
        (OSError(28, "No space left on device", f"/srv/{SECRET}"), "it failed (No space left on device)"),
        (KeyError(SECRET), "it failed (KeyError)"),
    ],
)
def test_no_text_and_no_path(error: Exception, told: str):
    reason = reason_for_server(error)
    assert reason.startswith(told)
    assert "log says why" in reason
    assert "Smith" not in reason
    assert "/" not in reason


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("rank is -1, expected 1 or more"),
        WireError("blob: checksum does not match"),
        ModelError("--target-modules: 'q' fits no linear layer; the base has query, key"),
    ],
)
def test_what_the_server_itself_has_sent_or_asked_is_told(error: Exception):
    assert reason_for_server(error) == str(error)


def test_options_that_an_adapter_of_a_file_does_not_have_are_told_without_its_name():
    found = Found(SECRET, LoRASpec(rank=4), frozenset(), None)
    with pytest.raises(ConfigError) as fault:
        AdapterSettings(rank=2).require(found)
    told = reason_for_server(fault.value)
    assert "rank is 2, the adapter of --start has 4; leave it out" in told
    assert "Smith" not in told


def test_what_a_chat_template_says_of_a_conversation_stays():
    tokenizer = Mock(apply_chat_template=Mock(side_effect=ValueError(f"Unexpected role {SECRET!r}")))
    with pytest.raises(DataError, match="Unexpected role 'Mr Smith") as fault:
        in_template(tokenizer, (("user", "hello"),), "hi")
    assert reason_for_server(fault.value) == "its data does not fit the run; the site's own log says why"


def test_memory_that_is_short():
    import torch

    assert reason_for_server(torch.cuda.OutOfMemoryError("tried to allocate")).startswith("out of GPU memory")


def test_names_of_files_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = described_for_server(json.dumps({"model": "/srv/models/llama", "data": "/srv/notes.csv"}))
    assert json.loads(told) == {"model": "llama", "data": "notes.csv"}
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("~/study-hiv/notes.csv", "~root/notes.csv", "./study-hiv/notes.csv", "../notes.csv"):
        told = described_for_server(json.dumps({"model": "models", "data": path}))
        assert json.loads(told) == {"model": "models", "data": "notes.csv"}
    here = json.loads(described_for_server(json.dumps({"model": "models/../models", "data": "."})))
    assert here == {"model": "models", "data": tmp_path.name}
    hub = json.dumps({"model": "meta/llama", "data": "notes"})
    assert json.loads(described_for_server(hub)) == json.loads(hub)

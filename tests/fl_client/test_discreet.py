"""What a site tells its server when something fails: nothing of its files."""

from __future__ import annotations

import json

import pytest

from fl_client.discreet import described_for_server, reason_for_server
from vblora.errors import ConfigError, DataError, ModelError, RunError, WireError

SECRET = "Mr Smith has measles"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError(f"/srv/notes.csv: has values not among --labels ({SECRET!r})"), "its data does not fit"),
        (ValueError(f"could not parse {SECRET!r}"), "it failed (ValueError)"),
        (ModelError(f"--model: /home/{SECRET}/llama has no config.json"), "its model or its folder"),
        (RunError(f"/srv/{SECRET}/state: damaged"), "its model or its folder"),
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


def test_memory_that_is_short():
    import torch

    assert reason_for_server(torch.cuda.OutOfMemoryError("tried to allocate")).startswith("out of GPU memory")


def test_names_of_files_without_folders():
    told = described_for_server(json.dumps({"model": "/srv/models/llama", "data": "/srv/notes.csv"}))
    assert json.loads(told) == {"model": "llama", "data": "notes.csv"}
    hub = json.dumps({"model": "meta/llama", "data": "notes"})
    assert json.loads(described_for_server(hub)) == json.loads(hub)

"""What a run was asked for, kept beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fl_server.config_file import CONFIG_FILE, read_config, require_same_config, save_config
from vblora.errors import ConfigError, RunError

CONFIG = {"rounds": 3, "lr-bank": 0.01, "model": "minilm", "cohort": 0, "out": "runs/here", "resume": True}


def test_a_config_is_kept_without_its_place(tmp_path: Path):
    save_config(tmp_path, CONFIG)
    kept = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert kept == read_config(tmp_path) == {"rounds": 3, "lr-bank": 0.01, "model": "minilm", "cohort": 0}


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\x00"])
def test_a_damaged_config_is_an_error_of_the_run(tmp_path: Path, content: str):
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(RunError, match="not readable"):
        read_config(tmp_path)
    with pytest.raises(RunError, match="no run here"):
        read_config(tmp_path / "nowhere")


def test_what_may_change_when_a_run_goes_on(tmp_path: Path):
    require_same_config(tmp_path, CONFIG)  # stopped before its config was written
    save_config(tmp_path, CONFIG)
    require_same_config(tmp_path, {**CONFIG, "rounds": 9, "cohort": 4, "out": "elsewhere", "new-key": 1})
    with pytest.raises(ConfigError, match=r"resume: lr-bank is 1, .* 0\.01; model is 'b', .*; give what"):
        require_same_config(tmp_path, {**CONFIG, "model": "b", "lr-bank": 1})

"""A client that tries to wreck the bank of a real task, without and with `clip-updates`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_client.opening import open_site
from fl_client.settings import SiteSettings
from simulations.bench.poison import measure, run
from simulations.config import default_config
from tests.simulations.conftest import small_config


def test_a_liar_wrecks_the_score_unless_it_is_cut_back(tiny_bert: Path, topics: Path, tmp_path: Path):
    changes = {"clients": 6, "clients_per_round": 6, "rounds": 6, "local_steps": 15, "partition": "iid"}
    rates = {"lr_bank": 0.03, "lr_head": 0.2, "batch_size": 16, "eval_every": 6}
    config = small_config(tiny_bert, topics, tmp_path, **changes, **rates)
    site = open_site(SiteSettings.from_run_config(config))
    honest = measure(site, config, 0.0, False)
    wrecked, kept = (measure(site, config, factor, True) for factor in (0.0, 1.0))
    print(honest, wrecked, kept)
    assert honest.final > honest.start + 0.4
    assert not wrecked.final > honest.final - 0.4
    assert kept.final > max(wrecked.final + 0.3, honest.final - 0.2)
    assert (honest.cut, wrecked.cut, kept.cut) == (0, 0, 6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sst2_survives_a_liar(assets: Path, minilm: Path, capsys: pytest.CaptureFixture[str]):
    given = {"model": str(minilm), "data": str(assets / "data" / "sst2"), "max-examples": 4000}
    given |= {"clients": 5, "clients-per-round": 5, "rounds": 8, "local-steps": 10, "max-length": 48}
    given |= {"eval-examples": 400, "partition": "iid"}
    rows = {(row.poisoned, row.factor): row.final for row in run({**default_config(), **given}, [0.0, 1.0])}
    assert rows[False, 0.0] > 0.75
    assert not rows[True, 0.0] > 0.6, "without clipping one liar is enough"
    assert rows[True, 1.0] > rows[False, 0.0] - 0.05
    assert rows[False, 1.0] > rows[False, 0.0] - 0.02, "clipping costs honest clients little"
    assert "lies" in capsys.readouterr().out

"""Sums of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from fl_client.scoring import evaluate
from fl_client.tasks import SUMS, CausalLM
from tests.fl_client.test_train import (
    TASKS,
    WIDE,
    make_examples,
    make_model,
)
from tests.vblora.tiny import LORA, make_state
from vblora.state import initial_state

# --- Evaluation ----------------------------------------------------------------------


@pytest.mark.parametrize("spec", [WIDE, LORA], ids=["vblora", "lora"])
@pytest.mark.parametrize("family", TASKS)
def test_sums_are_those_of_a_plain_loop(family, spec):
    model, task, examples = make_model(family, spec), TASKS[family], make_examples(23, 9)
    state = make_state(model.blueprint, scale=0.05)
    found = evaluate(model, task, state, examples, batch_tokens=40)
    expected = dict.fromkeys(SUMS, 0.0)
    model.bind(model.load(state))
    for index in range(len(examples)):
        tokens = torch.from_numpy(examples.text(index).astype(np.int64)).unsqueeze(0)
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        target = int(examples.targets[index])
        if isinstance(task, CausalLM):
            first = max(1, target)
            scores, right = logits[0, first - 1 : -1], tokens[0, first:]
        else:
            scores, right = logits, torch.tensor([target])
        expected["eval-examples"] += len(right)
        expected["eval-loss-sum"] += float(functional.cross_entropy(scores, right, reduction="sum"))
        expected["eval-correct"] += int((scores.argmax(-1) == right).sum())
    model.unbind()
    assert found == pytest.approx(expected, rel=1e-5)
    assert isinstance(found["eval-examples"], int)


def test_sums_of_shards_add_up():
    model, examples = make_model(), make_examples(23, 9)
    state = initial_state(model.blueprint)
    whole = evaluate(model, TASKS["bert"], state, examples, batch_tokens=4096)
    parts = [
        evaluate(model, TASKS["bert"], state, examples.take(part), batch_tokens=20)
        for part in (np.arange(7), np.arange(7, 22), np.arange(22, 23), np.empty(0, np.int64))
    ]
    assert {name: sum(part[name] for part in parts) for name in SUMS} == pytest.approx(whole, rel=1e-6)
    assert parts[-1] == dict.fromkeys(SUMS, 0)

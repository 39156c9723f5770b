"""A cohort trains as each of its clients would alone; scores add up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fl_client.batches import Batch, Examples, collate, plan_round
from fl_client.scoring import evaluate
from fl_client.tasks import CausalLM, Classification, Task
from fl_client.train import RATES, Job, LocalSettings, Trained, train_cohort
from tests.vblora.tiny import KINDS, LABELS, LORA, VBLORA, VOCABULARY, adapt, make_base, make_state
from vblora.errors import ConfigError, UpdateError
from vblora.model import AdaptedModel
from vblora.rows import MixedRows
from vblora.spec import AdapterSpec
from vblora.state import State, check_update, initial_state
from vblora.wire import decode_update, encode_update

CPU = torch.device("cpu")
SETTINGS = LocalSettings(steps=12, batch_size=3, lr_logits=0.02)
WIDE = replace(VBLORA, num_vectors=300)  # rows outgrow the first width within 12 steps
TASKS: dict[str, Task] = {
    "bert": Classification(LABELS),
    "llama": CausalLM(),
    "llama-cls": Classification(LABELS),
}


def make_examples(count: int, seed: int) -> Examples:
    """Texts of 2 to 8 tokens; the target is a class and a prompt's length alike."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 9, count)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Examples(
        rng.integers(3, VOCABULARY, starts[-1]).astype(np.int32), starts, rng.integers(0, 3, count)
    )


def make_jobs() -> list[Job]:
    """Eight clients, no two alike: from one text to many, from one step to more than the settings say, two of
    them at a slower pace."""
    counts, steps = [1, 2, 3, 5, 8, 20, 50, 7], [None, 1, 12, 5, 15, None, 3, 9]
    paces = {2: 0.25, 6: 0.7}
    return [
        Job(str(number), make_examples(count, number), (0, 4, number), taken, pace=paces.get(number, 1.0))
        for number, (count, taken) in enumerate(zip(counts, steps, strict=True))
    ]


def make_model(family: str = "bert", spec: AdapterSpec = WIDE, width: int | None = None) -> AdaptedModel:
    """In float64: what tells a cohort from its clients alone is then an error, not a sum in another order.

    (Adam divides by a gradient's own size, and so turns the rounding of one that is nearly 0 into a step.)
    """
    model = adapt(make_base(family, layers=1).double(), spec)
    if width is not None:
        model.source = MixedRows(model.blueprint, CPU, width)
    return model


def check_same(one: Trained, other: Trained, tolerance: float = 1e-5) -> None:
    assert (one.steps, one.examples) == (other.steps, other.examples)
    assert one.loss == pytest.approx(other.loss, abs=tolerance)
    assert one.update.dense.keys() == other.update.dense.keys()
    for name, array in one.update.dense.items():
        np.testing.assert_allclose(array, other.update.dense[name], atol=tolerance, rtol=0)
    if one.update.topk is not None:
        np.testing.assert_array_equal(one.update.topk.positions, other.update.topk.positions)
        np.testing.assert_allclose(one.update.topk.gaps, other.update.topk.gaps, atol=tolerance, rtol=0)


# --- Cohorts -------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("spec", [WIDE, LORA], ids=["vblora", "lora"])
@pytest.mark.parametrize("family", TASKS)
def test_a_cohort_of_eight_gives_what_each_client_gets_alone(family, spec, clip_norm):
    model, jobs = make_model(family, spec, 1 if spec is WIDE else None), make_jobs()
    state = make_state(model.blueprint, scale=0.05)
    settings = replace(SETTINGS, clip_norm=clip_norm)
    together = train_cohort(model, TASKS[family], state, jobs, settings)
    assert [trained.steps for trained in together] == [12, 1, 12, 5, 15, 12, 3, 9]
    assert [trained.examples for trained in together] == [12, 2, 36, 15, 45, 36, 9, 27]
    for job, expected in zip(jobs, together, strict=True):
        (alone,) = train_cohort(model, TASKS[family], state, [job], settings)
        check_same(alone, expected)
        check_update(alone.update, model.blueprint, state)


def test_a_cohort_in_32_bits_is_close():
    model = adapt(make_base("bert", layers=1), LORA)
    state, jobs = make_state(model.blueprint, scale=0.05), make_jobs()
    together = train_cohort(model, TASKS["bert"], state, jobs, SETTINGS)
    for job, expected in zip(jobs, together, strict=True):
        (alone,) = train_cohort(model, TASKS["bert"], state, [job], SETTINGS)
        check_same(alone, expected, tolerance=2e-3)


def test_training_is_deterministic():
    jobs = make_jobs()[3:6]
    runs = []
    for _ in range(2):
        model = make_model()
        runs.append(train_cohort(model, TASKS["bert"], initial_state(model.blueprint), jobs, SETTINGS))
    for one, other in zip(*runs, strict=True):
        assert encode_update(one.update, model.blueprint) == encode_update(other.update, model.blueprint)
        assert one.loss == other.loss


@pytest.mark.parametrize("steps", [7, 8, 9, 40])
def test_the_width_of_the_candidates_does_not_matter(steps):
    """Rows that grow in training end where they would with room for all h from the start."""
    settings = replace(SETTINGS, steps=steps, lr_logits=0.5)
    jobs = [replace(job, steps=None) for job in make_jobs()[4:7]]
    found = []
    for width in (1, 300):
        model = make_model(spec=replace(WIDE, init_std=0.01), width=width)
        start = model.source._candidates.width
        found.append(train_cohort(model, TASKS["bert"], initial_state(model.blueprint), jobs, settings))
        grown = len(model.source._candidates.order) > start * model.blueprint.rows
        assert grown == (width == 1)
    for narrow, wide in zip(*found, strict=True):
        assert (narrow.update.topk.positions == wide.update.topk.positions).all()
        assert (narrow.update.topk.gaps == wide.update.topk.gaps).all()
        assert all((narrow.update.dense[name] == wide.update.dense[name]).all() for name in ("bank", "head"))


# --- One client ----------------------------------------------------------------------


def test_a_client_trains_as_a_plain_loop_does():
    """The same steps with torch's optimiser, its own binding and a loss by hand.

    What shares one second moment is, to Adam, one number with the root of the mean square as its gradient.
    """
    model = make_model(spec=LORA)
    job = replace(make_jobs()[5], steps=None)
    state = make_state(model.blueprint, scale=0.05)
    (found,) = train_cohort(model, TASKS["bert"], state, [job], SETTINGS, scale=0.5)

    tensors = model.load(state)
    rates = {"rows": RATES["lora"], "head": SETTINGS.lr_head}
    optimiser = torch.optim.AdamW([tensors["rows"]], weight_decay=0.0)
    sizes = [tensor.size for tensor in model.blueprint.head]
    first, second = torch.zeros_like(tensors["head"]), torch.zeros(len(sizes)).double()
    losses = []
    for step, indices in enumerate(plan_round(job.examples, 12, 3, job.seed)):
        batch = collate([(job.examples, indices)], 0, CPU)
        model.bind(tensors)
        logits = model(input_ids=batch.tokens, attention_mask=batch.mask).logits
        loss = functional.cross_entropy(logits, batch.targets)
        tensors["rows"].grad, gradient = torch.autograd.grad(loss, [tensors["rows"], tensors["head"]])
        scale = 0.5 * SETTINGS.rise(step)
        optimiser.param_groups[0]["lr"] = scale * rates["rows"]
        optimiser.step()
        first = 0.9 * first + 0.1 * gradient
        squares = torch.stack([part.square().mean() for part in gradient.split(sizes, dim=1)])
        second = 0.999 * second + 0.001 * squares
        root = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        size = root.repeat_interleave(torch.tensor(sizes))
        with torch.no_grad():
            tensors["head"] -= scale * rates["head"] * first / (1 - 0.9 ** (step + 1)) / size
        losses.append(loss.item())
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-6)
    for name, tensor in tensors.items():
        expected = tensor[0].detach().numpy() - state.dense[name]
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(found.update.dense[name], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", TASKS)
def test_training_learns(family):
    model = make_model(family)
    examples = make_examples(6, 0)
    settings = LocalSettings(steps=60, batch_size=6, lr_bank=2e-3, lr_head=4e-3)
    state = initial_state(model.blueprint)
    before = evaluate(model, TASKS[family], state, examples)
    (trained,) = train_cohort(model, TASKS[family], state, [Job("0", examples, (0,))], settings)
    after = evaluate(model, TASKS[family], apply(state, trained), examples)
    assert after["eval-examples"] == before["eval-examples"]
    assert after["eval-loss-sum"] < 0.96 * before["eval-loss-sum"]


def apply(state: State, trained: Trained) -> State:
    """The state of a round in which one client took part."""
    dense = {name: array + trained.update.dense[name] for name, array in state.dense.items()}
    return State(state.version + 1, dense, trained.update.topk)


def test_an_update_names_its_reference_and_travels():
    model = make_model()
    state = make_state(model.blueprint, scale=0.05)
    (trained,) = train_cohort(model, TASKS["bert"], state, make_jobs()[3:4], SETTINGS)
    update = trained.update
    assert (update.version, update.reference, update.examples) == (3, state.digest, 15)
    back = decode_update(encode_update(update, model.blueprint), model.blueprint)
    check_update(back, model.blueprint, state)
    assert all(array.dtype == np.float32 for array in update.dense.values())


def test_without_rates_the_update_changes_nothing_to_the_bit():
    model = make_model()
    state = make_state(model.blueprint, scale=0.05)
    still = replace(SETTINGS, lr_bank=0.0, lr_logits=0.0, lr_head=0.0)
    for trained in train_cohort(model, TASKS["bert"], state, make_jobs()[2:5], still):
        assert not any(array.any() for array in trained.update.dense.values())
        assert trained.update.topk.same_rows(state.topk).all()
    (bank_only,) = train_cohort(
        model, TASKS["bert"], state, make_jobs()[3:4], replace(SETTINGS, lr_logits=0.0)
    )
    assert bank_only.update.dense["bank"].any()
    assert bank_only.update.topk.same_rows(state.topk).all()


def test_the_reference_is_left_alone():
    model = make_model()
    state = make_state(model.blueprint, scale=0.05)
    digest = state.digest
    train_cohort(model, TASKS["bert"], state, make_jobs()[:3], SETTINGS)
    assert replace(state).digest == digest


def test_progress_is_told_after_each_step():
    model, told = make_model(), []
    jobs = make_jobs()[1:4]  # 1, 12 and 5 steps
    train_cohort(
        model,
        TASKS["bert"],
        initial_state(model.blueprint),
        jobs,
        SETTINGS,
        on_step=lambda done, of: told.append((done, of)),
    )
    assert told == [(step, 12) for step in range(1, 13)]


# --- Divergence ----------------------------------------------------------------------


class Diverging(Classification):
    """The second client's loss is NaN from its third step on."""

    calls = 0

    def losses(self, logits: Tensor, batch: Batch, clients: int) -> Tensor:
        losses = super().losses(logits, batch, clients)
        Diverging.calls += 1
        if Diverging.calls < 3:
            return losses
        return losses * torch.tensor([1.0, math.nan, *[1.0] * (clients - 2)][:clients], dtype=losses.dtype)


@pytest.mark.parametrize("spec", [WIDE, LORA, replace(WIDE, topk=1)], ids=["vblora", "lora", "k=1"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_diverged_client_harms_no_other_and_is_refused(spec, clip_norm):
    model, jobs = make_model(spec=spec), [replace(job, steps=20) for job in make_jobs()[3:6]]
    settings = replace(SETTINGS, clip_norm=clip_norm)
    state = make_state(model.blueprint, scale=0.05)
    Diverging.calls = 0
    first, second, third = train_cohort(model, Diverging(LABELS), state, jobs, settings)
    expected = [train_cohort(model, TASKS["bert"], state, [job], settings)[0] for job in (jobs[0], jobs[2])]
    check_same(first, expected[0])
    check_same(third, expected[1])
    assert math.isnan(second.loss)
    assert np.isnan(second.update.dense["head"]).any()
    with pytest.raises(UpdateError, match="not finite"):
        check_update(second.update, model.blueprint, state)


def test_a_diverged_client_does_not_grow_its_rows():
    model = make_model(width=1)
    held = len(model.source._candidates.order)
    Diverging.calls = 0
    jobs = [Job(str(n), make_examples(3, n), (n,), 30) for n in range(2)]
    frozen = replace(SETTINGS, lr_logits=0.0)
    train_cohort(model, Diverging(LABELS), initial_state(model.blueprint), jobs, frozen)
    assert len(model.source._candidates.order) == held


class Broken(Classification):
    def losses(self, logits: Tensor, batch: Batch, clients: int) -> Tensor:
        raise RuntimeError("out of memory, say")

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        raise RuntimeError("out of memory, say")


def test_an_error_leaves_the_base_unbound():
    model = make_model()
    state = initial_state(model.blueprint)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_cohort(model, Broken(LABELS), state, make_jobs()[:2], SETTINGS)
    assert _unbound(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(model, Broken(LABELS), state, make_examples(3, 0))
    assert _unbound(model)
    train_cohort(model, TASKS["bert"], state, make_jobs()[:2], SETTINGS)
    assert _unbound(model)


def _unbound(model: AdaptedModel) -> bool:
    return all(shared.factors is None for shared in model._inputs) and all(
        head.tensors is None for head in model._heads.values()
    )


# --- Settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"steps": 0}, "local-steps is 0, expected at least 1"),
        ({"batch_size": 0}, "batch-size is 0, expected at least 1"),
        ({"lr_bank": -1.0}, "lr-bank is -1.0, expected 0 to 10"),
        ({"lr_head": math.nan}, "lr-head is nan"),
        ({"lr_logits": 11.0}, "lr-logits is 11.0"),
        ({"lr_rows": 11.0}, "lr-rows is 11.0"),
        ({"warmup": 1.5}, "warmup is 1.5, expected 0 to 1"),
        ({"clip_norm": math.inf}, "clip-norm is inf"),
        ({"clip_norm": -1.0}, "clip-norm is -1.0"),
    ],
)
def test_settings_say_what_is_wrong(given, fault):
    with pytest.raises(ConfigError, match=f"^local training: {fault}"):
        LocalSettings(**given)


def test_rates_scale_and_rise():
    settings = LocalSettings(steps=20, warmup=0.25, lr_bank=1.0, lr_logits=2.0, lr_rows=3.0, lr_head=4.0)
    found = settings.rates("lora", 0.5)
    assert found == {"bank": 0.5, "logits": 1.0, "rows": 1.5, "cores": 1.5, "theta": 1.5, "head": 2.0}

    assert [settings.rise(step) for step in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert replace(settings, warmup=0.0).rise(0) == 1.0
    assert replace(settings, steps=1, warmup=1.0).rise(0) == 1.0


# --- What is held fixed, what pulls back ---------------------------------------------


def test_frozen_tensors_stay_and_cost_nothing():
    model, job = make_model(), make_jobs()[3]
    state = make_state(model.blueprint)
    (logits,) = train_cohort(model, TASKS["bert"], state, [job], SETTINGS, frozen=["logits"])
    assert logits.update.topk.same_rows(state.topk).all()
    assert np.abs(logits.update.dense["bank"]).max() > 0
    (bank,) = train_cohort(model, TASKS["bert"], state, [job], SETTINGS, frozen=["bank", "head"])
    assert np.abs(bank.update.dense["bank"]).max() == np.abs(bank.update.dense["head"]).max() == 0
    assert not bank.update.topk.same_rows(state.topk).all()


def test_fedprox_adds_its_gradient():
    """One step from the reference knows no pull; the second does, and AdamW takes its sign alone."""
    model, job = make_model(spec=LORA), make_jobs()[3]
    state = make_state(model.blueprint)
    for steps, alike in ((1, True), (2, False)):
        settings = replace(SETTINGS, steps=steps)
        (free,) = train_cohort(model, TASKS["bert"], state, [replace(job, steps=steps)], settings)
        (pulled,) = train_cohort(
            model, TASKS["bert"], state, [replace(job, steps=steps)], replace(settings, prox=1.0)
        )
        assert np.array_equal(free.update.dense["rows"], pulled.update.dense["rows"]) is alike
    (held,) = train_cohort(model, TASKS["bert"], state, [job], replace(SETTINGS, prox=1e6))
    (free,) = train_cohort(model, TASKS["bert"], state, [job], SETTINGS)
    norms = [np.linalg.norm(found.update.dense["rows"]) for found in (held, free)]
    assert norms[0] < 0.5 * norms[1]


def test_every_kind_has_a_rate_for_what_it_trains():
    model = adapt(make_base("bert", layers=1), LORA)
    for kind, spec in KINDS.items():
        rates = LocalSettings().rates(kind, 1.0)
        own = spec.dense_shapes(model.blueprint.linears)
        assert all(rates[name] > 0 for name in own), kind
    assert LocalSettings().rates("lora", 1.0)["rows"] == RATES["lora"]

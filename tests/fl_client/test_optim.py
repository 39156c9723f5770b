"""AdamW for many clients is torch's AdamW for each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fl_client.optim import AdamW
from vblora.errors import ConfigError

RATES = {"bank": 4e-3, "logits": 0.1}
SHAPES = {"bank": (5, 4), "logits": (7,)}
CLIENTS, STEPS = 3, 50


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn((CLIENTS, *shape), generator=generator, dtype=dtype)
        for name, shape in SHAPES.items()
    }


def gradients(step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of very different sizes over the clients, so that some are clipped and some are not."""
    sizes = torch.tensor([1e-3, 0.3, 50.0], dtype=dtype)
    return {
        name: tensor * sizes.view(-1, *[1] * (tensor.dim() - 1))
        for name, tensor in drawn(1000 + step, dtype).items()
    }


def alone(client: int, steps: int, clip_norm: float, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """torch's optimiser and torch's clipping for one client."""
    tensors = {name: tensor[client].clone().requires_grad_() for name, tensor in drawn(0, dtype).items()}
    groups = [{"params": [tensor], "lr": RATES[name]} for name, tensor in tensors.items()]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(steps):
        for name, gradient in gradients(step, dtype).items():
            tensors[name].grad = gradient[client].clone()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), clip_norm)
        optimiser.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_client_gets_what_torch_gives_it(clip_norm, dtype):
    tensors, optimiser = drawn(0, dtype), AdamW(RATES, clip_norm)
    for step in range(STEPS):
        optimiser.step(tensors, gradients(step, dtype), None)
    tolerance = 1e-12 if dtype is torch.float64 else 2e-6
    for client in range(CLIENTS):
        for name, expected in alone(client, STEPS, clip_norm, dtype).items():
            torch.testing.assert_close(tensors[name][client], expected, rtol=tolerance, atol=tolerance)


def test_a_client_that_has_ended_stays_where_it_is():
    steps = torch.tensor([STEPS, 7, 1])
    tensors, optimiser = drawn(0), AdamW(RATES, 1.0)
    for step in range(STEPS):
        optimiser.step(tensors, gradients(step), steps > step)
    for client, taken in enumerate(steps.tolist()):
        for name, expected in alone(client, taken, 1.0).items():
            torch.testing.assert_close(tensors[name][client], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_a_number_stays_with_its_client(clip_norm):
    tensors, optimiser = drawn(0), AdamW(RATES, clip_norm)
    for step in range(5):
        found = gradients(step)
        found["bank"][1, 2, 3] = torch.nan
        optimiser.step(tensors, found, None)
    for client in (0, 2):
        for name, expected in alone(client, 5, clip_norm).items():
            torch.testing.assert_close(tensors[name][client], expected, rtol=1e-12, atol=1e-12)
    assert not torch.isfinite(tensors["bank"][1, 2, 3])


def test_what_an_ended_client_would_compute_does_not_matter():
    """Its rows only fill up the batch; where its weights are extreme, their gradient may be 0 * inf."""
    tensors, optimiser = drawn(0), AdamW(RATES, 1.0)
    for step in range(4):
        found = gradients(step)
        if step >= 2:
            for gradient in found.values():
                gradient[1] = torch.nan
        optimiser.step(tensors, found, torch.tensor([True, step < 2, True]))
    for name, expected in alone(1, 2, 1.0).items():
        torch.testing.assert_close(tensors[name][1], expected, rtol=1e-12, atol=1e-12)


def test_places_that_are_added_late_were_there_all_along():
    early, late = AdamW(RATES, 1.0), AdamW(RATES, 1.0)
    full, grown = drawn(0), drawn(0)
    grown["logits"] = grown["logits"][:, :4].clone()
    for step in range(20):
        found = gradients(step)
        if step < 10:
            found["logits"][:, 4:] = 0
        if step == 10:
            grown["logits"] = torch.cat([grown["logits"], drawn(0)["logits"][:, 4:]], dim=1)
            late.widen("logits", 3)
        early.step(full, found, None)
        late.step(grown, {**found, "logits": found["logits"][:, : grown["logits"].shape[1]]}, None)
        assert torch.equal(full["logits"][:, : grown["logits"].shape[1]], grown["logits"])
    assert torch.equal(full["bank"], grown["bank"])


def test_widening_before_the_first_step_is_nothing():
    optimiser = AdamW(RATES)
    optimiser.widen("logits", 3)
    tensors = drawn(0)
    optimiser.step(tensors, gradients(0), None)
    torch.testing.assert_close(tensors["bank"][0], alone(0, 1, 0.0)["bank"])


@pytest.mark.parametrize("active", [None, torch.ones(CLIENTS, dtype=torch.bool)])
def test_weight_decay_is_torchs(active):
    tensors = {"rows": drawn(0)["bank"], "head": drawn(0)["logits"]}
    start = {name: tensor.clone() for name, tensor in tensors.items()}
    optimiser = AdamW({"rows": 4e-3, "head": 0.1}, weight_decay=0.1)
    for step in range(10):
        found = gradients(step)
        optimiser.step(tensors, {"rows": found["bank"], "head": found["logits"]}, active)
    for client in range(CLIENTS):
        own = {name: tensor[client].requires_grad_() for name, tensor in start.items()}
        groups = [{"params": [own["rows"]], "lr": 4e-3}, {"params": [own["head"]], "lr": 0.1}]
        theirs = torch.optim.AdamW(groups, weight_decay=0.1)
        for step in range(10):
            found = gradients(step)
            own["rows"].grad, own["head"].grad = found["bank"][client], found["logits"][client]
            theirs.step()
        for name, expected in own.items():
            torch.testing.assert_close(tensors[name][client], expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_client_that_has_ended_does_not_decay():
    tensors, optimiser = {"rows": drawn(0)["bank"]}, AdamW({"rows": 0.1}, weight_decay=0.5)
    optimiser.step(tensors, {"rows": gradients(0)["bank"]}, torch.tensor([True, False, True]))
    assert torch.equal(tensors["rows"][1], drawn(0)["bank"][1])


def test_weight_decay_on_a_bank_or_logits_explains_itself():
    told = r"weight-decay is 0\.1, expected 0 for an adapter with a bank: a logit"
    with pytest.raises(ConfigError, match=told):
        AdamW(RATES, weight_decay=0.1).step(drawn(0), gradients(0), None)


def test_what_has_no_gradient_does_not_move():
    """No weight decay: an untouched logit keeps its seed to the bit."""
    tensors, optimiser = drawn(0), AdamW(RATES, 1.0)
    for step in range(5):
        found = gradients(step)
        found["logits"][:, 2] = 0
        optimiser.step(tensors, found, torch.tensor([True, True, step < 3]))
    assert torch.equal(tensors["logits"][:, 2], drawn(0)["logits"][:, 2])


def test_a_part_shares_one_second_moment():
    """As torch does it for one number whose gradient is the root of the part's mean square."""
    sizes = (3, 4)
    tensors, optimiser = {"logits": drawn(0)["logits"]}, AdamW(RATES, shared={"logits": sizes})
    for step in range(STEPS):
        given = {"logits": gradients(step)["logits"]}
        before = tensors["logits"].clone()
        optimiser.step(tensors, given, None)
    seen = torch.stack([gradients(step)["logits"] for step in range(STEPS)])
    ages = torch.arange(STEPS - 1, -1, -1, dtype=torch.float64).view(-1, 1, 1)
    first = (0.1 * 0.9**ages * seen).sum(dim=0) / (1 - 0.9**STEPS)
    for part in (slice(0, 3), slice(3, 7)):
        squares = seen[..., part].square().mean(dim=-1, keepdim=True)
        second = (0.001 * 0.999**ages * squares).sum(dim=0) / (1 - 0.999**STEPS)
        expected = before[:, part] - RATES["logits"] * first[:, part] / (second.sqrt() + 1e-8)
        torch.testing.assert_close(tensors["logits"][:, part], expected, rtol=1e-12, atol=1e-12)


def test_numbers_of_a_part_keep_their_share_of_a_step():
    """Number by number, Adam moves a weight of a tiny gradient as far as any other."""
    gradient = torch.tensor([[1.0, 1e-4]])
    for shared, least, most in (({}, 0.99, 1.01), ({"logits": (2,)}, 0, 2e-4)):
        tensors = {"logits": torch.zeros(1, 2)}
        AdamW(RATES, shared=shared).step(tensors, {"logits": gradient}, None)
        large, small = tensors["logits"].abs()[0].tolist()
        assert least <= small / large <= most


def test_a_client_may_take_a_part_of_a_step():
    whole, slow = drawn(0), drawn(0)
    start = drawn(0)
    AdamW(RATES).step(whole, gradients(0), None)
    AdamW(RATES).step(slow, gradients(0), torch.tensor([1.0, 0.25, 0.0]))
    for name, tensor in slow.items():
        for client, pace in enumerate((1.0, 0.25, 0.0)):
            moved = pace * (whole[name] - start[name])[client]
            torch.testing.assert_close((tensor - start[name])[client], moved, rtol=1e-9, atol=1e-12)

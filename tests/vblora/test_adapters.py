"""The kinds of adapter: their faults in words, how many numbers each trains, their short text form."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from vblora.adapters import ADAPTERS, LIMITS, NUMBERS, parse_adapter
from vblora.errors import ConfigError, ModelError
from vblora.spec import (
    BankOnlySpec,
    Blueprint,
    FFALoRASpec,
    Linear,
    LoRASpec,
    LoRAXSSpec,
    UniLoRASpec,
    VBLoRASpec,
)

# Layers of a Llama-2-7B block, all linear.
SIDES = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
LLAMA_7B = tuple(Linear(f"{layer}.{n}", *pair) for layer in range(32) for n, pair in enumerate(SIDES))
SMALL = (Linear("a", 8, 12), Linear("b", 20, 8))


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [
        (LoRASpec(rank=64), 64 * sum(i + o for i, o in SIDES) * 32),
        (FFALoRASpec(rank=64), 64 * sum(o for _, o in SIDES) * 32),
        (LoRAXSSpec(rank=64), 64 * 64 * 7 * 32),
        (UniLoRASpec(rank=4, theta_length=524_288), 524_288),
        (BankOnlySpec(num_vectors=2048), 2048 * 256),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_numbers_trained_and_sent_at_the_shape_of_llama_7b(spec, numbers):
    blueprint = Blueprint(spec, LLAMA_7B)
    assert blueprint.trained_parameters == blueprint.stored_parameters == numbers
    assert blueprint.topk_shape is None
    assert sum(map(math.prod, blueprint.dense_shapes.values())) == numbers


def test_bank_only_sends_the_bank_of_vblora_and_nothing_else():
    vblora = Blueprint(VBLoRASpec(rank=2, num_vectors=16, vector_length=4), SMALL)
    bank_only = Blueprint(BankOnlySpec(rank=2, num_vectors=16, vector_length=4), SMALL)
    assert bank_only.dense_shapes == vblora.dense_shapes
    assert bank_only.rows == vblora.rows
    assert vblora.stored_parameters - bank_only.stored_parameters == 3 * vblora.rows


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_can_be_told_back_and_is_its_own(kind):
    spec = ADAPTERS[kind](rank=2)
    blueprint = Blueprint(spec, (Linear("a", 8192, 8192),))
    back = Blueprint.from_json(blueprint.to_json())
    assert back == blueprint
    assert type(back.spec) is type(spec)
    others = [Blueprint(ADAPTERS[other](rank=2), blueprint.linears) for other in ADAPTERS if other != kind]
    assert blueprint.fingerprint not in [other.fingerprint for other in others]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_number_has_limits(kind):
    spec = ADAPTERS[kind]
    for entry in fields(spec):
        name, _, most, told = LIMITS[entry.name]
        with pytest.raises(ConfigError) as caught:
            spec(**{entry.name: type(entry.default)(most * 2)})
        assert str(caught.value).startswith(f"adapter {kind}: {name} is ")
        assert told in str(caught.value)
        with pytest.raises(ConfigError, match=f"^adapter {kind}: {entry.name.replace('_', '-')} is 'x'"):
            spec(**{entry.name: "x"})


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        (LoRAXSSpec(rank=9), "a has 8 singular vectors, rank is 9; lower --rank; b has 8 singular vectors"),
        (UniLoRASpec(rank=2, theta_length=97), r"theta-length \(d\) is 97, the factors have 96 entries"),
    ],
)
def test_sizes_that_the_layers_cannot_have_are_refused(spec, fault):
    with pytest.raises(ModelError, match=f"^blueprint: {fault}"):
        Blueprint(spec, SMALL)
    smaller = replace(spec, **({"rank": 8} if spec.kind == "lora-xs" else {"theta_length": 96}))
    Blueprint(smaller, SMALL)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("vblora", {"adapter": "vblora"}),
        ("vblora:512", {"adapter": "vblora", "num-vectors": 512}),
        ("lora:8", {"adapter": "lora", "rank": 8}),
        ("ffa-lora:16", {"adapter": "ffa-lora", "rank": 16}),
        ("lora-xs:32", {"adapter": "lora-xs", "rank": 32}),
        (" uni-lora:32768 ", {"adapter": "uni-lora", "theta-length": 32768}),
        ("bank-only:64", {"adapter": "bank-only", "num-vectors": 64}),
    ],
)
def test_the_short_form(text, options):
    assert parse_adapter(text) == options


def test_every_kind_has_a_number():
    assert NUMBERS.keys() == ADAPTERS.keys()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dora", "kind is 'dora', expected one of vblora, lora, ffa-lora, lora-xs, uni-lora, bank-only"),
        ("", "kind is ''"),
        (":8", "kind is ''"),
        ("lora:", "rank is '', expected 1 to 1024, as lora:32"),
        ("lora:0", "rank is '0', expected 1 to 1024"),
        ("lora:-1", "rank is '-1'"),
        ("lora:8.0", "rank is '8.0'"),
        ("lora:8:9", "rank is '8:9'"),
        ("lora:٣", "rank is '٣'"),
        ("uni-lora:1e6", "theta-length is '1e6'"),
        ("vblora:9999999", "num-vectors is '9999999', expected 1 to 1048576"),
    ],
)
def test_what_is_no_short_form_is_refused(text, told):
    with pytest.raises(ConfigError) as caught:
        parse_adapter(text)
    assert str(caught.value).startswith(f"adapter {text!r}: {told}")

"""The blueprint: faults in words, rows laid end to end, one fingerprint for one adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vblora.errors import ConfigError, ModelError
from vblora.spec import (
    Blueprint,
    HeadTensor,
    Linear,
    LoRASpec,
    VBLoRASpec,
    choose_num_vectors,
    choose_vector_length,
    row_slices,
)

LINEARS = (Linear("a", 384, 1536), Linear("b", 1536, 384))
HEAD = (HeadTensor("head.weight", (2, 384)), HeadTensor("head.bias", (2,)))
BLUEPRINT = Blueprint(VBLoRASpec(), LINEARS, HEAD, "toy", ("no", "yés"))


# --- Faults --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"rank": 0}, "rank is 0, expected 1 to 1024"),
        ({"num_vectors": 0}, r"num-vectors \(h\) is 0"),
        ({"num_vectors": 1 << 21}, r"num-vectors \(h\) is 2097152"),
        ({"vector_length": 0}, r"vector-length \(b\) is 0, expected 1 to 65536"),
        ({"topk": 0}, r"topk \(k\) is 0"),
        ({"topk": 5, "num_vectors": 4}, r"topk \(k\) is 5, the bank has num-vectors \(h\) 4; choose k <= h"),
        ({"init_std": 0.0}, "init-std is 0.0"),
        ({"init_std": float("nan")}, "init-std is nan"),
        ({"bank_bound": -1.0}, "bank-bound is -1.0"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 62}, r"seed is 4611686018427387904, expected 0 to 2\^62 - 1"),
        ({"rank": 4.5}, "rank is 4.5, expected a whole number"),
        ({"rank": True}, "rank is True, expected a whole number"),
        ({"topk": "2"}, "topk is '2', expected a whole number"),
        ({"init_std": "0.1"}, "init-std is '0.1', expected a number"),
        ({"init_std": None}, "init-std is None, expected a number"),
    ],
)
def test_a_vblora_spec_says_what_is_wrong(given, fault):
    with pytest.raises(ConfigError, match=f"^adapter vblora: {fault}"):
        VBLoRASpec(**given)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"alpha": [1]}, r"alpha is \[1\], expected a number"),
    ],
)
def test_a_lora_spec_says_what_is_wrong(given, fault):
    with pytest.raises(ConfigError, match=f"^adapter lora: {fault}"):
        LoRASpec(**given)


def test_faults_come_together():
    with pytest.raises(ConfigError, match=r"rank is 0.*; .*margin is 99.0"):
        VBLoRASpec(rank=0, margin=99.0)


@pytest.mark.parametrize(
    ("linears", "head", "fault"),
    [
        ((), (), "no linear layer to adapt; check --target-modules"),
        ((Linear("a", 4, 4), Linear("a", 4, 4)), (), "a is named twice"),
        ((Linear("a", 0, 4),), (), "a has sides 0 and 4"),
        ((Linear("a", 4, -4),), (), "a has sides 4 and -4"),
        ((Linear("a", 4, 4),), (HeadTensor("w", (2, 0)),), r"w has shape \(2, 0\)"),
    ],
)
def test_a_blueprint_says_what_is_wrong(linears, head, fault):
    with pytest.raises(ModelError, match=fault):
        Blueprint(VBLoRASpec(), linears, head)


# --- Rows ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 100),
)
def test_rows_lie_end_to_end_and_hold_every_factor(sides, rank, length):
    linears = [Linear(str(number), *pair) for number, pair in enumerate(sides)]
    start = 0
    for part in row_slices(linears, rank, length):
        assert part.start == start
        for rows, side in (
            (part.middle - part.start, part.linear.in_features),
            (part.stop - part.middle, part.linear.out_features),
        ):
            assert rows % rank == 0
            assert 0 <= rows // rank * length - side < length
        start = part.stop
    blueprint = Blueprint(VBLoRASpec(rank=rank, vector_length=length), tuple(linears))
    assert blueprint.rows == start
    cut = sum(rank for pair in sides for side in pair if side % length)
    assert blueprint.cut_rows == cut


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=5), st.integers(1, 5)
)
def test_rows_of_lora_are_never_cut(sides, rank):
    blueprint = Blueprint(LoRASpec(rank=rank), tuple(Linear(str(n), *pair) for n, pair in enumerate(sides)))
    assert blueprint.cut_rows == 0
    assert blueprint.dense_shapes["rows"] == (blueprint.rows, blueprint.vector_length)
    assert blueprint.trained_parameters == rank * sum(map(sum, sides))
    assert blueprint.stored_parameters == blueprint.trained_parameters
    assert blueprint.topk_shape is None


@pytest.mark.parametrize(
    ("spec", "layers", "sides", "rows", "lora_rank", "lora"),
    [
        (VBLoRASpec(rank=4, num_vectors=90), 24, [(1024, 1024)] * 2, 1536, 8, 786_432),
        (
            VBLoRASpec(rank=4, num_vectors=2048),
            32,
            [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)],
            39_040,
            64,
            159_907_840,
        ),
        (
            VBLoRASpec(rank=6, num_vectors=2048),
            40,
            [(5120, 5120)] * 4 + [(5120, 13824)] * 2 + [(13824, 5120)],
            91_680,
            64,
            250_347_520,
        ),
    ],
    ids=["RoBERTa-large q,v", "Llama-2-7B", "Llama-2-13B"],
)
def test_published_shapes(spec, layers, sides, rows, lora_rank, lora):
    linears = tuple(Linear(f"{layer}.{n}", *pair) for layer in range(layers) for n, pair in enumerate(sides))
    blueprint = Blueprint(spec, linears)
    assert blueprint.rows == rows
    bank = spec.num_vectors * 256
    assert blueprint.trained_parameters == bank + rows * spec.num_vectors
    assert blueprint.stored_parameters == bank + 3 * rows
    assert Blueprint(LoRASpec(rank=lora_rank), linears).trained_parameters == lora


def test_the_head_counts():
    assert BLUEPRINT.head_size == 770
    assert BLUEPRINT.dense_shapes == {"bank": (256, 256), "head": (770,)}
    assert list(BLUEPRINT.dense_shapes) == ["bank", "head"]
    headless = replace(BLUEPRINT, head=())
    assert headless.dense_shapes == {"bank": (256, 256)}
    assert BLUEPRINT.stored_parameters - headless.stored_parameters == 770


@pytest.mark.parametrize(
    ("sides", "length"),
    [
        ([(384, 1536), (1536, 384)], 128),
        ([(1024, 4096)], 256),
        ([(768, 3072)], 256),
        ([(64, 172)], 64),
        ([(64, 64)], 64),
        ([(96, 32)], 32),
        ([(7, 5)], 64),
    ],
)
def test_the_vector_length_divides_where_it_can(sides, length):
    assert choose_vector_length(Linear(str(number), *pair) for number, pair in enumerate(sides)) == length


@pytest.mark.parametrize(
    ("rows", "vectors"),
    [(0, 64), (1, 64), (255, 64), (511, 64), (512, 128), (1536, 256), (39_040, 2048), (10**7, 2048)],
)
def test_the_bank_grows_with_the_rows(rows, vectors):
    assert choose_num_vectors(rows) == vectors


# --- Text ----------------------------------------------------------------------------


def test_golden_fingerprints():
    """Of every message: a change parts new sites from old."""
    assert BLUEPRINT.fingerprint.hex() == "23a28a04c70cba865894d5d06a709973"
    assert Blueprint(LoRASpec(), LINEARS).fingerprint.hex() == "68b53bbbdf37e66fe5a30f24f1ef2486"


NAMES = st.text('aé.\n"\x00😀', max_size=4)


@st.composite
def blueprints(draw: st.DrawFn) -> Blueprint:
    k = draw(st.integers(1, 5))
    vblora = st.builds(
        VBLoRASpec,
        rank=st.integers(1, 9),
        num_vectors=st.integers(k, 99),
        vector_length=st.integers(1, 99),
        topk=st.just(k),
        init_std=st.floats(1e-3, 10),
        margin=st.floats(1e-4, 10),
        seed=st.integers(0, (1 << 62) - 1),
    )
    spec = draw(
        vblora | st.builds(LoRASpec, rank=st.integers(1, 9), alpha=st.floats(0.1, 99) | st.integers(1, 99))
    )
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    half = draw(st.integers(1, len(names)))
    return Blueprint(
        spec,
        tuple(Linear(name, draw(st.integers(1, 99)), draw(st.integers(1, 99))) for name in names[:half]),
        tuple(
            HeadTensor(name, tuple(draw(st.lists(st.integers(1, 9), max_size=3)))) for name in names[half:]
        ),
        draw(NAMES),
        tuple(draw(st.lists(NAMES, max_size=3))),
    )


@settings(deadline=None, max_examples=40)
@given(blueprints())
def test_text_form_comes_back(blueprint):
    back = Blueprint.from_json(blueprint.to_json())
    assert back == blueprint
    assert back.fingerprint == blueprint.fingerprint


def test_equal_blueprints_have_one_fingerprint():
    whole, real = Blueprint(LoRASpec(alpha=16), LINEARS), Blueprint(LoRASpec(alpha=16.0), LINEARS)
    assert whole == real
    assert whole.fingerprint == real.fingerprint
    numpy_rank = Blueprint(VBLoRASpec(rank=np.int64(4)), LINEARS, HEAD, "toy", ("no", "yés"))  # type: ignore[arg-type]
    assert numpy_rank.fingerprint == BLUEPRINT.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"spec": VBLoRASpec(seed=1)},
        {"spec": VBLoRASpec(margin=0.03)},
        {"spec": LoRASpec()},
        {"linears": LINEARS[::-1]},
        {"head": HEAD[:1]},
        {"model": "other"},
        {"labels": ("yés", "no")},
    ],
)
def test_another_adapter_has_another_fingerprint(change):
    assert replace(BLUEPRINT, **change).fingerprint != BLUEPRINT.fingerprint


def _with(path: str, value: object) -> str:
    body = json.loads(BLUEPRINT.to_json())
    at, *rest = path.split(".")
    if rest:
        body[at][rest[0]] = value
    else:
        body[at] = value
    return json.dumps(body)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        "[" * 100_000,
        _with("spec", None),
        _with("spec.kind", "dora"),
        _with("spec.kind", []),
        _with("spec.rank", 0),
        _with("spec.rank", 4.5),
        _with("spec.rank", "4"),
        _with("spec.init_std", float("nan")),
        _with("spec.margin", None),
        _with("linears", []),
        _with("linears", [["a", 4]]),
        _with("linears", [["a", 4, 0]]),
        _with("linears", [["a", 4, float("inf")]]),
        _with("linears", 7),
        _with("head", [["w", [0]]]),
        _with("head", [["w"]]),
        _with("labels", None),
    ],
)
def test_what_is_no_blueprint_is_refused(text):
    with pytest.raises(ModelError, match=r"^blueprint: "):
        Blueprint.from_json(text)

"""Bases of few bits: what is quantised; adapters do what they do on the dense weights that the bits mean."""

from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from fl_client.base import load_base
from fl_client.quantize import dequantized, is_quantized
from tests.vblora.tiny import KINDS, LABELS, VOCABULARY, make_base, make_blueprint, make_inputs, make_state
from vblora.errors import ConfigError
from vblora.merge import merge
from vblora.model import AdaptedModel
from vblora.weights import dense_weight

pytest.importorskip("bitsandbytes", reason="not installed: pip install -e '.[quantize]'")

CPU = torch.device("cpu")
# 8-bit layers round the input too: their outputs are those of the dense layer to about a percent.
CLOSE = {"4bit": 1e-4, "8bit": 0.05}
BITS = pytest.mark.parametrize("bits", CLOSE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with a tokenizer, saved."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("models")
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    found = {}
    for family in ("bert", "llama", "gpt2"):
        found[family] = folder / family
        make_base(family).save_pretrained(found[family])
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0").save_pretrained(found[family])
    return found


def load(models: dict[str, Path], family: str, bits: str) -> nn.Module:
    labels = LABELS if family == "bert" else ()
    return load_base(str(models[family]), labels, CPU, quantize=bits).model


def run(model: AdaptedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    tensors = model.load(make_state(model.blueprint, scale=0.1))
    model.bind(tensors)
    logits = model(**inputs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
    return logits.detach(), list(torch.autograd.grad((logits * weights).sum(), list(tensors.values())))


@BITS
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_layers_of_the_trunk_are_quantised_and_nothing_else(models, family, bits):
    model = load(models, family, bits)
    assert is_quantized(model)
    blueprint = make_blueprint(model)
    kind = "Linear4bit" if bits == "4bit" else "Linear8bitLt"
    assert {type(model.get_submodule(linear.name)).__name__ for linear in blueprint.linears} == {kind}
    plain = make_blueprint(make_base(family))
    assert blueprint.linears == plain.linears
    assert blueprint.head == plain.head
    others = {"bert": "classifier", "llama": "lm_head", "gpt2": "lm_head"}
    assert type(model.get_submodule(others[family])) is nn.Linear
    assert next(model.parameters()).dtype is torch.float32


@BITS
@pytest.mark.parametrize("kind", ["vblora", "lora-xs"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_an_adapter_does_what_it_does_on_the_dense_weights(models, family, kind, bits):
    """After an evaluation too, in which bitsandbytes would pack weights on some CPUs and lose gradients."""
    base = load(models, family, bits)
    dense = dequantized(load(models, family, bits))
    assert not is_quantized(dense)
    blueprint, inputs = make_blueprint(base, KINDS[kind]), make_inputs(4)
    model, plain = AdaptedModel(base, blueprint), AdaptedModel(dense, make_blueprint(dense, KINDS[kind]))
    with torch.no_grad():
        model(**inputs)
    found, gradients = run(model, inputs)
    expected, dense_gradients = run(plain, inputs)
    real = inputs["attention_mask"].bool() if expected.dim() == 3 else slice(None)
    scale = float(expected[real].abs().max())
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=CLOSE[bits] * scale)
    for one, other in zip(gradients, dense_gradients, strict=True):
        difference = (one - other).norm() / other.norm()
        assert difference < 5 * CLOSE[bits], difference


def test_a_cohort_over_4_bits(models):
    base = load(models, "llama", "4bit")
    model = AdaptedModel(base, make_blueprint(base))
    states = [make_state(model.blueprint, seed=seed, scale=0.1) for seed in range(3)]
    inputs = make_inputs(6)
    model.bind(model.load(*states))
    together = model(**inputs).logits
    for client, state in enumerate(states):
        part = {name: tensor[2 * client : 2 * client + 2] for name, tensor in inputs.items()}
        model.bind(model.load(state))
        torch.testing.assert_close(model(**part).logits, together[2 * client : 2 * client + 2])


@BITS
def test_the_dense_weight_is_what_the_bits_mean(models, bits):
    """Rounded by no more than the steps of its block or vector allow; the same after an evaluation."""
    exact = make_base("llama").get_submodule("model.layers.0.mlp.up_proj").weight
    base = load(models, "llama", bits)
    layer = base.get_submodule("model.layers.0.mlp.up_proj")
    found = dense_weight(layer)
    assert found.shape == exact.shape
    step = 0.3 if bits == "4bit" else 1 / 127  # of 4 bits the scales are rounded too
    assert 0 < (found - exact).abs().max() < step * exact.abs().max()
    model = AdaptedModel(base, make_blueprint(base))
    with torch.no_grad():
        model(**make_inputs(2))
    torch.testing.assert_close(dense_weight(layer), found)


@BITS
def test_merging_goes_through_the_dense_weights(models, bits, tmp_path):
    base = load(models, "llama", bits)
    model = AdaptedModel(base, make_blueprint(base))
    state, inputs = make_state(model.blueprint, scale=0.1), make_inputs(4)
    model.bind(model.load(state))
    expected = model(**inputs).logits.detach()
    dense = dequantized(load(models, "llama", bits))
    before = copy.deepcopy(dense)
    merge(dense, state, model.blueprint)
    dense.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not is_quantized(loaded)
    assert not hasattr(loaded.config, "quantization_config")
    real, scale = inputs["attention_mask"].bool(), float(expected.abs().max())
    found = loaded(**inputs).logits
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=CLOSE[bits] * scale)
    assert (before(**inputs).logits - found)[real].abs().max() > 0.1 * scale


@BITS
def test_gpt2_comes_back_in_its_own_layers(models, bits, tmp_path):
    dense = dequantized(load(models, "gpt2", bits))
    dense.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert type(dense.get_submodule("transformer.h.0.attn.c_proj")) is Conv1D
    inputs = make_inputs(4)
    torch.testing.assert_close(loaded(**inputs).logits, dense(**inputs).logits)


@BITS
def test_a_model_with_linear_layers_of_its_own_is_refused(models, bits, tmp_path):
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    falcon.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(models["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"^--quantize {bits}: FalconForCausalLM has no linear layer that"):
        load_base(str(tmp_path), (), CPU, quantize=bits)
    settings = BitsAndBytesConfig(load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit")
    few = FalconForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map={"": "cpu"})
    assert dequantized(few) is few


def test_8_bits_beside_float16_are_for_gpus(models, tmp_path):
    with pytest.raises(ConfigError, match=r"^--quantize 8bit: .* use --dtype bfloat16 or float32"):
        load_base(str(models["llama"]), (), CPU, quantize="8bit", dtype="float16")
    make_base("llama").half().save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(models["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^--quantize 8bit: .* use --dtype bfloat16 or float32"):
        load_base(str(tmp_path), (), CPU, quantize="8bit", dtype="own")


def test_a_package_that_is_missing_is_named(models, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )
    with pytest.raises(
        ConfigError, match=r"^--quantize 4bit: bitsandbytes is not installed; run pip install"
    ):
        load(models, "llama", "4bit")


@BITS
def test_nothing_is_said_layer_by_layer(models, bits, caplog, capfd):
    base = load(models, "llama", bits)
    with caplog.at_level(logging.WARNING):
        run(AdaptedModel(base, make_blueprint(base)), make_inputs(2))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr().err == ""


@pytest.mark.gpu
@BITS
def test_on_a_gpu(models, bits):
    cuda = torch.device("cuda")

    def made(dense: bool) -> AdaptedModel:
        base = load_base(str(models["llama"]), (), cuda, dtype="float32", quantize=bits).model
        base = dequantized(base) if dense else base
        return AdaptedModel(base, make_blueprint(base))

    inputs = {name: tensor.to(cuda) for name, tensor in make_inputs(4).items()}
    (found, gradients), (expected, others) = run(made(False), inputs), run(made(True), inputs)
    real, scale = inputs["attention_mask"].bool(), float(expected.abs().max())
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=CLOSE[bits] * scale)
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() / other.norm() < 5 * CLOSE[bits]

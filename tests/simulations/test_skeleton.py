"""Layers from configs alone: sizes of the models that come along, and what is no config."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.skeleton import known_models, skeleton
from vblora.errors import ModelError
from vblora.model import find_head, find_linears

# As the models' own checkpoints have them; RoBERTa with a classifier of two classes.
PARAMETERS = {
    "gemma-2-9b": 9_241_705_984,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gpt2": 124_439_808,
    "gpt2-large": 774_030_080,
    "gpt2-medium": 354_823_168,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
}


def test_known_models_have_the_sizes_of_their_checkpoints():
    assert {name: skeleton(name).parameters for name in known_models()} == PARAMETERS


def test_lora_of_llama_2_13b_has_the_published_size():
    """250,347,520 numbers at rank 64 on all linear layers."""
    linears = find_linears(skeleton("llama-2-13b").model)
    assert sum(64 * (linear.in_features + linear.out_features) for linear in linears) == 250_347_520


def test_classes_make_a_head():
    assert skeleton("roberta-base").classes == 2
    assert [tensor.shape for tensor in find_head(skeleton("Llama-3.2-1B", 5).model)] == [(5, 2048)]
    assert find_head(skeleton("llama-3.2-1b").model) == ()


def test_a_config_a_folder_and_the_demo_model(tiny_bert: Path):
    for model in (tiny_bert, tiny_bert / "config.json"):
        linears = find_linears(skeleton(str(model)).model)
        assert {(linear.in_features, linear.out_features) for linear in linears} == {
            (32, 32),
            (32, 64),
            (64, 32),
        }


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("nonsense", "is no config of a model: OSError"),
        ('{"hidden_size": 3}', "is no config of a model: ValueError: Unrecognized model"),
        ('{"model_type": "unheard-of"}', "is no config of a model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is no config of a model"),
        ('{"model_type": "vit"}', "makes no causal language model"),
    ],
)
def test_what_is_no_config(tmp_path: Path, content: str, told: str):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=told) as caught:
        skeleton(str(path))
    assert len(str(caught.value)) < 400


def test_models_that_are_not_there():
    with pytest.raises(ModelError, match=r"no config of llama-9 .*one of gemma-2-9b, .*roberta-large"):
        skeleton("llama-9")
    with pytest.raises(ModelError, match="no folder; expected a hub id"):
        skeleton("./nowhere")
    with pytest.raises(ModelError, match="is an encoder, which models no language; give --classes"):
        skeleton("roberta-base", 0)

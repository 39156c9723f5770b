"""Base models from disk: the same on every site, and one clear line where they cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fl_client.base import find_device, find_model, is_encoder, load_base
from tests.vblora.tiny import LABELS, VOCABULARY, make_base
from vblora.errors import ConfigError, ModelError

CPU = torch.device("cpu")


def save_model(folder: Path, family: str = "llama", **special: str) -> Path:
    words = {name: number for number, name in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    words |= {f"w{number}": number for number in range(len(words), VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    make_base(family, layers=1).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), eos_token="</s>", bos_token="<s>")


# --- Devices -------------------------------------------------------------------------


def test_a_device_is_found_or_refused():
    assert find_device("cpu") == CPU
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "nonsense", "gpu"):
        with pytest.raises(ConfigError, match=f"^--device: '{name}' cannot be used here .*; try auto or cpu"):
            find_device(name)


# --- Names ---------------------------------------------------------------------------


def test_minilm_is_found_where_the_demo_put_it(minilm: Path):
    assert find_model("minilm") == str(minilm)


def test_minilm_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'fed-vblora\[demo\]'"):
        find_model("minilm")


def test_a_folder_is_taken_and_a_hub_id_passed_on(llama, monkeypatch):
    assert find_model(str(llama)) == str(llama)
    monkeypatch.setenv("HOME", str(llama.parent))
    assert find_model(f"~/{llama.name}") == str(llama)
    assert find_model("owner/name") == "owner/name"
    assert find_model("gpt2") == "gpt2"


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_model(str(tmp_path))
    for name in (str(tmp_path / "file"), str(tmp_path / "missing"), "./missing", "~/missing", "a/b/c"):
        with pytest.raises(ModelError, match="is no folder; expected a hub id or a folder"):
            find_model(name)


# --- Loading -------------------------------------------------------------------------


def test_a_language_model_is_loaded_whole(llama):
    base = load_base(str(llama), (), CPU)
    assert type(base.model).__name__ == "LlamaForCausalLM"
    expected = make_base("llama", layers=1)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    assert base.pad == 2, "a tokenizer without padding pads with its end"
    assert base.model.config.pad_token_id == 2
    assert base.tokenizer("w7 w8", add_special_tokens=False)["input_ids"] == [7, 8]


def test_a_classifier_gets_the_same_new_head_everywhere(llama):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = load_base(str(llama), LABELS, CPU, seed=1).model.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator moved"
    torch.manual_seed(6)
    two = load_base(str(llama), LABELS, CPU, seed=1).model.state_dict()
    other = load_base(str(llama), LABELS, CPU, seed=2).model.state_dict()
    assert one["score.weight"].shape == (3, 32)
    assert torch.equal(one["score.weight"], two["score.weight"])
    assert not torch.equal(one["score.weight"], other["score.weight"])
    assert torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_a_padding_token_is_kept(tmp_path):
    base = load_base(str(save_model(tmp_path, "bert", pad_token="<pad>", eos_token="</s>")), LABELS, CPU)
    assert base.pad == 0


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has neither a padding nor an end token"):
        load_base(str(save_model(tmp_path)), (), CPU)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("bfloat16", "auto", "float32"),
        ("float32", "auto", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
    ],
)
def test_the_dtype_is_float32_on_a_cpu_unless_asked_for(tmp_path, stored, asked, expected):
    folder = save_model(tmp_path, eos_token="</s>")
    make_base("llama", layers=1).to(getattr(torch, stored)).save_pretrained(folder)
    model = load_base(str(folder), (), CPU, dtype=asked).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, expected)}


@pytest.mark.parametrize("dtype", ["int8", "float", "nonsense", "Tensor"])
def test_an_unknown_dtype_is_refused(llama, dtype):
    with pytest.raises(ConfigError, match=f"^--dtype: '{dtype}' is unknown; expected auto, own, float32, "):
        load_base(str(llama), (), CPU, dtype=dtype)


def test_an_encoder_is_no_language_model(tmp_path):
    """It sees what it shall predict: the loss would fall to nothing and mean nothing."""
    folder = save_model(tmp_path, "bert", pad_token="<pad>")
    with pytest.raises(ModelError, match=r"is an encoder, .*; language modelling needs a decoder"):
        load_base(str(folder), (), CPU)


def test_a_decoder_is_none_whatever_its_config_says():
    """GPT-NeoX (Pythia) has `is_decoder`, and it is false."""
    assert not is_encoder(GPTNeoXConfig())
    assert is_encoder(BertConfig())
    assert not is_encoder(BertConfig(is_decoder=True))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _config(**change: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))

    return apply


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half of the weights": lambda folder: _cut(folder / "model.safetensors"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "other weights": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 999),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half of the config": lambda folder: _cut(folder / "config.json"),
    "a list for a config": lambda folder: (folder / "config.json").write_text("[]"),
    "an empty config": lambda folder: (folder / "config.json").write_text("{}"),
    "an unknown kind": _config(model_type="nonsense"),
    "another size": _config(hidden_size=64),
    "half of the tokenizer": lambda folder: _cut(folder / "tokenizer.json"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_clear_line(llama, damage, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(llama, folder)
    DAMAGE[damage](folder)
    with pytest.raises(ModelError) as caught:
        load_base(str(folder), (), CPU)
    where, why = str(caught.value).split(" cannot be loaded: ")
    assert where == f"--model: {folder}"
    assert why.strip(": ") == why != ""
    assert "\n" not in why


def test_a_hub_model_that_is_not_here_is_one_clear_line():
    with pytest.raises(ModelError, match=r"^--model: nobody/nothing cannot be loaded \(offline") as caught:
        load_base("nobody/nothing", (), CPU)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(
        tmp_path
    )
    for labels in ((), LABELS):
        with pytest.raises(
            ModelError, match=r"is an encoder-decoder \(t5\), which no task here trains; use a dec"
        ):
            load_base(str(tmp_path), labels, CPU)


def test_weights_keep_the_dtype_of_their_files_where_it_is_asked_for(llama, tmp_path):
    model = load_base(str(llama), (), CPU).model
    model.bfloat16().save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(tmp_path)
    for dtype, expected in (("own", torch.bfloat16), ("auto", torch.float32), ("float16", torch.float16)):
        found = load_base(str(tmp_path), (), CPU, dtype=dtype).model
        assert {parameter.dtype for parameter in found.parameters()} == {expected}


def change_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("labels", [(), LABELS], ids=["language", "classes"])
def test_weights_that_are_missing_are_named(llama, tmp_path, labels):
    folder = shutil.copytree(llama, tmp_path / "model")
    change_weights(
        folder, lambda weights: {name.replace("layers", "blocks"): weights[name] for name in weights}
    )
    name = "Classification" if labels else "LM"
    with pytest.raises(
        ModelError,
        match=rf"lacks 9 weights of Llama\w+{name}, model\.layers\.0\.self_attn\.q_proj\.weight first; it "
        r"has unknown names such as model\.blocks\.0\.self_attn\.q_proj\.weight; save the whole model again",
    ):
        load_base(str(folder), labels, CPU)


def test_a_trunk_of_another_size_is_no_trunk(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    _config(hidden_size=64)(folder)
    with pytest.raises(
        ModelError, match=r"has model\.embed_tokens\.weight in shape \(96, 32\), expected \(96, 64"
    ):
        load_base(str(folder), LABELS, CPU)


def test_an_output_that_is_not_tied_must_be_there(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    change_weights(folder, lambda weights: {name: weights[name] for name in weights if "lm_head" not in name})
    with pytest.raises(ModelError, match=r"lacks 1 weights of LlamaForCausalLM, lm_head\.weight first; save"):
        load_base(str(folder), (), CPU)
    _config(tie_word_embeddings=True)(folder)
    load_base(str(folder), (), CPU)


def test_a_head_of_other_classes_and_a_pooler_are_drawn(tmp_path):
    folder = save_model(tmp_path, "bert", pad_token="<pad>")
    change_weights(folder, lambda weights: {name: weights[name] for name in weights if "pooler" not in name})
    one, two = (load_base(str(folder), (*LABELS, "more"), CPU, seed=1).model.state_dict() for _ in range(2))
    assert one["classifier.weight"].shape == (4, 32)
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(one[name], two[name])


def test_minilm_is_whole(minilm):
    load_base("minilm", LABELS, CPU)

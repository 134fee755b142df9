"""GGUF import: exact weights, exact ids, and one line for every damaged file."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open

from fedjax_llm.errors import UserError
from fedjax_llm.models import gguf_import as importer
from fedjax_llm.models.gguf_file import read_gguf
from fedjax_llm.models.gguf_import import import_gguf
from fedjax_llm.models.gguf_tokenizer import tokenizer_from_gguf
from fedjax_llm.models.tokenizer import load_tokenizer

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
CHAT = "{{ bos_token }}{{ messages[0].content }}"


def byte_alphabet() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def byte_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and token types of a byte-level BPE over "ab", "12", "aé"."""
    merges = ["a b", "1 2", "12 3", "Ġ a", "Ġa b"]
    control = ["<|end|>", "<|start|>"]
    tokens = [*control, *byte_alphabet(), *(m.replace(" ", "") for m in merges), "<user>"]
    return tokens, merges, [3, 3] + [1] * (len(tokens) - 3) + [4]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does, row by row: head rows 0, half, 1, half + 1, ..."""
    head_dim = weight.shape[0] // heads
    order = [
        head * head_dim + part * (head_dim // 2) + i
        for head in range(heads)
        for i in range(head_dim // 2)
        for part in (0, 1)
    ]
    return weight[order]


def weights(seed: int = 0, **extra: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Published weights by Hugging Face name without the layer, as float32."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(byte_vocabulary()[0]), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj.weight": (INNER, HIDDEN),
            "mlp.up_proj.weight": (INNER, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INNER),
            **extra,
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


STORED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def stored_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, module = stem.split(".", 3)
        return f"blk.{layer}.{STORED[module]}.{kind}"
    return f"{STORED[stem]}.{kind}"


def write(
    path: Path,
    values: dict[str, np.ndarray],
    architecture: str = "llama",
    kind: Kind = Kind.F32,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    pre: str | None = "llama-bpe",
) -> dict[str, np.ndarray]:
    """Writes a GGUF file as llama.cpp's converter would; returns the values that it holds."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens, merges, types = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT)
    edit(writer)
    held = {}
    for name, value in values.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
        # Norms and biases stay float32 in every GGUF file.
        as_kind = Kind.F32 if value.ndim == 1 else kind
        data = gguf.quants.quantize(value, as_kind)
        held[name] = gguf.quants.dequantize(data, as_kind)
        if heads and architecture == "llama":
            data = interleave(data, heads)
        writer.add_tensor(stored_name(name), data, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Values (float32) and stored types of a folder's safetensors file."""
    values, kinds = {}, {}
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    # The library's own reader has to accept the file, too.
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        names = set(file.keys())
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + at for at in entry["data_offsets"])
        kinds[name] = entry["dtype"]
        if entry["dtype"] == "BF16":
            upper = np.frombuffer(raw[begin:end], "<u2").astype(np.uint32)
            array = (upper << np.uint32(16)).view(np.float32)
        else:
            array = np.frombuffer(raw[begin:end], {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        values[name] = array.astype(np.float32).reshape(entry["shape"])
    assert names == values.keys()
    return values, kinds


@pytest.mark.parametrize(
    ("kind", "stored"),
    [(Kind.F32, "F32"), (Kind.F16, "F16"), (Kind.BF16, "BF16"), (Kind.Q8_0, "F32"),
     (Kind.Q4_1, "F32")],
)  # fmt: skip
def test_weights_are_exact_and_the_permutation_is_undone(
    tmp_path: Path, kind: Kind, stored: str
) -> None:
    expected = write(tmp_path / "m.gguf", weights(), kind=kind)
    found, kinds = read(import_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert kinds[name] == ("F32" if value.ndim == 1 else stored)


def test_config_tokenizer_and_generation(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", weights())
    out = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["intermediate_size"]) == (HIDDEN, INNER)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["num_hidden_layers"], config["head_dim"]) == (LAYERS, HEAD_DIM)
    assert (config["rope_theta"], config["rms_norm_eps"]) == (500000.0, 1e-5)
    assert config["tie_word_embeddings"] is True and config["rope_scaling"] is None
    assert config["vocab_size"] == len(byte_vocabulary()[0])
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0
    tokenizer = load_tokenizer(out)
    assert tokenizer.render_chat([{"role": "user", "content": "ab"}]) == "<|start|>ab"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]


def test_an_untied_output_is_kept(tmp_path: Path) -> None:
    values = weights()
    values["lm_head.weight"] = 2 * values["model.embed_tokens.weight"]
    write(tmp_path / "m.gguf", values)
    out = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(read(out)[0]["lm_head.weight"], values["lm_head.weight"])


def test_llama_biases_are_permuted_like_their_weights(tmp_path: Path) -> None:
    values = weights(
        **{
            "self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
            "self_attn.k_proj.bias": (KV_HEADS * HEAD_DIM,),
            "self_attn.v_proj.bias": (KV_HEADS * HEAD_DIM,),
        }
    )
    write(tmp_path / "m.gguf", values)
    out = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    for name, value in read(out)[0].items():
        np.testing.assert_array_equal(value, values[name], err_msg=name)
    assert json.loads((out / "config.json").read_text())["attention_bias"] is True


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        (
            "qwen2",
            {
                "self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
                "self_attn.k_proj.bias": (KV_HEADS * HEAD_DIM,),
                "self_attn.v_proj.bias": (KV_HEADS * HEAD_DIM,),
            },
        ),
        (
            "qwen3",
            {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)},
        ),
    ],
)
def test_qwen_is_stored_as_published(
    tmp_path: Path, architecture: str, extra: dict[str, tuple[int, ...]]
) -> None:
    values = weights(**extra)
    write(tmp_path / "m.gguf", values, architecture, pre="qwen2")
    out = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    for name, value in read(out)[0].items():
        np.testing.assert_array_equal(value, values[name], err_msg=name)
    assert json.loads((out / "config.json").read_text())["model_type"] == architecture


def test_llama3_rotary_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    frequencies = 500000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    divisors = []
    for frequency in frequencies:  # as published with Llama 3.1
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 32 + smooth))

    def edit(values: list[float]) -> Callable[[gguf.GGUFWriter], None]:
        return lambda w: w.add_tensor("rope_freqs.weight", np.array(values, np.float32))

    write(tmp_path / "m.gguf", weights(), edit=edit(divisors))
    out = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    write(tmp_path / "other.gguf", weights(), edit=edit([1.0, 2.0, *divisors[2:]]))
    with pytest.raises(UserError, match="not Llama 3's"):
        import_gguf(tmp_path / "other.gguf", tmp_path / "other")


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        # Digits: one by one, in groups of up to three, or one by one again.
        ("smollm", "12345", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", "12345", ["123", "45"]),
        ("qwen2", "12345", ["1", "2", "3", "4", "5"]),
        ("gpt-2", "12345", ["12345"]),
        # Contractions in capitals; newlines with the punctuation before them.
        ("smollm", "I'LL", ["I", "'", "LL"]),
        ("llama-bpe", "I'LL", ["I", "'LL"]),
        ("qwen2", "a.\n\nb", ["a", ".\n\n", "b"]),
        ("gpt-2", "a.\n\nb", ["a", ".", "\n", "\n", "b"]),
    ],
)
def test_text_is_cut_as_the_named_pre_tokenizer_does(
    tmp_path: Path, pre: str, text: str, pieces: list[str]
) -> None:
    write(tmp_path / "m.gguf", weights(), pre=pre)
    backend = tokenizer_from_gguf(read_gguf(tmp_path / "m.gguf").metadata).backend
    cut = [text[begin:end] for _, (begin, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


def test_control_and_user_tokens_are_found_in_text(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", weights(), edit=lambda w: w.add_add_bos_token(True))
    tokenizer = tokenizer_from_gguf(read_gguf(tmp_path / "m.gguf").metadata)
    tokens = byte_vocabulary()[0]
    ids = tokenizer.encode("<|start|>ab<user>é")
    assert [tokens[i] for i in ids] == ["<|start|>", "ab", "<user>", "Ã", "©"]
    assert tokenizer.decode(ids) == "<|start|>ab<user>é"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<user>é"
    assert tokenizer.encode("ab", add_special_tokens=True) == [1, *tokenizer.encode("ab")]


def test_a_sentencepiece_vocabulary_encodes_as_its_llama2c_form(stories260k: Path) -> None:
    from fedjax_llm.models import llama2c

    pieces, scores = llama2c.read_pieces(stories260k / "tok512.bin")
    names = ["<unk>", "<s>", "</s>", *(p.replace(" ", "▁") for p in pieces[3:])]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(names) - 259),
    }
    tokenizer, oracle = tokenizer_from_gguf(metadata), load_tokenizer(stories260k)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in ("Once upon a time", "  é 🙂\n\tx  y", ""):
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text) and tokenizer.decode(ids) == text
        assert tokenizer.encode(text, add_special_tokens=True) == [1, *ids]


def test_metadata_and_tensors_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", weights(), kind=Kind.Q4_1)
    ours, theirs = read_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == {key: field.contents() for key, field in fields.items()}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(tensor.shape[::-1]) and mine.type_name == tensor.tensor_type.name
        assert mine.rows.tobytes() == tensor.data.tobytes()


def assert_refused(path: Path, out: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        import_gguf(path, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []


def test_a_file_cut_anywhere_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights())
    data = path.read_bytes()
    for keep in (0, 3, 23, 24, 60, 400, 2000, 5000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        assert_refused(path, tmp_path / "out", "truncated")


def test_no_damaged_header_byte_escapes_as_another_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights())
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    messages = []
    for at in rng.integers(0, 6000, 150):
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            importer._entries(source := read_gguf(path), importer._config(source))
            tokenizer_from_gguf(source.metadata)
        except UserError as error:
            messages.append(str(error))
    assert messages and not any("\n" in message for message in messages)


def test_a_false_length_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key = b"tokens"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 2**60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    assert_refused(path, tmp_path / "out", "truncated")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_nan_and_infinity_name_the_tensor(tmp_path: Path, value: float, kind: Kind) -> None:
    values = weights()
    values["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    write(tmp_path / "m.gguf", values, kind=kind)
    assert_refused(tmp_path / "m.gguf", tmp_path / "out", r"blk\.1\.ffn_up\.weight holds NaN")


def test_nan_in_the_scale_of_a_block_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights(), kind=Kind.Q8_0)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_k.weight")
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    assert_refused(path, tmp_path / "out", r"blk\.0\.attn_k\.weight holds NaN")


def _set(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    def edit(writer: gguf.GGUFWriter) -> None:
        add = {int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key, value)

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2' is not supported"),
        ({"edit": _set("llama.expert_count", 8)}, "mixture of 8 experts"),
        ({"edit": _set("llama.rope.scaling.type", "yarn")}, "by 'yarn'"),
        ({"edit": _set("llama.rope.dimension_count", 8)}, "rotates 8 of 16"),
        ({"edit": _set("llama.attention.sliding_window", "wide")}, "is 'wide', expected one int"),
        ({"edit": _set("llama.rope.scaling.type", "linear")}, "rope.scaling.factor is missing"),
        ({"pre": "unheard-of"}, "pre-tokenizer 'unheard-of'"),
        ({"pre": None}, "does not name its pre-tokenizer"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path / "m.gguf", weights(), **change)
    assert_refused(tmp_path / "m.gguf", tmp_path / "out", message)


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path, out = tmp_path / "m.gguf", tmp_path / "out"
    values = weights()
    del values["model.layers.1.mlp.down_proj.weight"]
    write(path, values)
    assert_refused(path, out, r"lacks tensor blk\.1\.ffn_down\.weight")
    values = weights()
    values["model.layers.0.mlp.down_proj.weight"] = np.zeros((HIDDEN, 2), np.float32)
    write(path, values)
    assert_refused(path, out, r"blk\.0\.ffn_down\.weight has shape \(64, 2\)")
    write(path, weights(**{"self_attn.q_norm.weight": (HEAD_DIM,)}))
    assert_refused(path, out, r"blk\.0\.attn_q_norm\.weight, which architecture llama")


def test_files_that_are_no_gguf_and_folders_in_use(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a model " * 10)
    assert_refused(tmp_path / "text", tmp_path / "out", "does not begin with GGUF")
    assert_refused(tmp_path / "gone", tmp_path / "out", "cannot read")
    write(tmp_path / "m.gguf", weights())
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "used")
    assert os.listdir(tmp_path / "used") == ["note.txt"]


def test_an_interrupted_import_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.gguf", weights())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importer, "_write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]

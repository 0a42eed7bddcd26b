"""Write a GGUF file of a MiMo-V2 shape with random Q4_0 weights, for llama.cpp to be measured on.

    python -m benchmarks.gguf_random FILE --shape mid

Needs the `gguf` package. The weights are random bytes: speed does not depend on them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.make_checkpoint import SHAPES, Shape

BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: a half-precision scale, then 32 codes of 4 bits
POOL_BYTES = 1 << 28


def pattern_of(shape: Shape) -> list[bool]:
    """True for window layers, as make_checkpoint lays them out."""
    last = shape.layers - 1
    return [not (i == 0 or (i + 1) % 6 == 0 or i == last) for i in range(shape.layers)]


def matrices(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what is stored in Q4_0."""
    yield "token_embd.weight", (shape.vocab, shape.hidden)
    yield "output.weight", (shape.vocab, shape.hidden)
    for i, window in enumerate(pattern_of(shape)):
        kv = shape.kv_window if window else shape.kv_global
        yield f"blk.{i}.attn_q.weight", (shape.heads * shape.head_dim, shape.hidden)
        yield f"blk.{i}.attn_k.weight", (kv * shape.head_dim, shape.hidden)
        yield f"blk.{i}.attn_v.weight", (kv * shape.v_head_dim, shape.hidden)
        yield f"blk.{i}.attn_output.weight", (shape.hidden, shape.heads * shape.v_head_dim)
        inner = shape.dense_inner if i == 0 else shape.expert_inner
        lead, suffix = ((), "") if i == 0 else ((shape.experts,), "_exps")
        yield f"blk.{i}.ffn_gate{suffix}.weight", (*lead, inner, shape.hidden)
        yield f"blk.{i}.ffn_up{suffix}.weight", (*lead, inner, shape.hidden)
        yield f"blk.{i}.ffn_down{suffix}.weight", (*lead, shape.hidden, inner)


def vectors(shape: Shape, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """What is stored in float32."""
    yield "output_norm.weight", np.ones(shape.hidden, np.float32)
    for i, window in enumerate(pattern_of(shape)):
        yield f"blk.{i}.attn_norm.weight", np.ones(shape.hidden, np.float32)
        yield f"blk.{i}.ffn_norm.weight", np.ones(shape.hidden, np.float32)
        if window:
            yield f"blk.{i}.attn_sinks.weight", np.zeros(shape.heads, np.float32)
        if i > 0:
            weight = random.standard_normal((shape.experts, shape.hidden), np.float32)
            yield f"blk.{i}.ffn_gate_inp.weight", weight / shape.hidden**0.5
            yield f"blk.{i}.exp_probs_b.bias", np.zeros(shape.experts, np.float32)


def write(file: Path, shape: Shape) -> None:
    """Write the file, one tensor at a time."""
    import gguf

    random = np.random.default_rng(0)
    pool = _blocks(random)
    writer = gguf.GGUFWriter(file, "mimo2", use_temp_file=False)
    _add_header(writer, shape)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    tensors = list(matrices(shape))
    for name, dims in tensors:
        stored = (*dims[:-1], dims[-1] // BLOCK * BLOCK_BYTES)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=q4_0)
    plain = list(vectors(shape, random))
    for name, values in plain:
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, dims in tensors:
        nbytes = int(np.prod(dims)) // BLOCK * BLOCK_BYTES
        writer.write_tensor_data(np.resize(pool, nbytes) if nbytes > pool.size else pool[:nbytes])
    for _, values in plain:
        writer.write_tensor_data(values)
    writer.close()


def _blocks(random: np.random.Generator) -> np.ndarray:
    """Random codes under scales that keep activations of unit size."""
    blocks = random.integers(0, 256, (POOL_BYTES // BLOCK_BYTES, BLOCK_BYTES), np.uint8)
    blocks[:, :2] = np.array([0.005], np.float16).view(np.uint8)
    return blocks.reshape(-1)


def _add_header(writer: Any, shape: Shape) -> None:
    w, window = writer, pattern_of(shape)
    w.add_context_length(262144)
    w.add_embedding_length(shape.hidden)
    w.add_block_count(shape.layers)
    w.add_feed_forward_length(shape.dense_inner)
    w.add_expert_feed_forward_length(shape.expert_inner)
    w.add_head_count([shape.heads] * shape.layers)
    w.add_head_count_kv([shape.kv_window if here else shape.kv_global for here in window])
    w.add_key_length(shape.head_dim)
    w.add_value_length(shape.v_head_dim)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(64)
    w.add_rope_freq_base(5e6)
    w.add_rope_freq_base_swa(1e4)
    w.add_sliding_window(128)
    w.add_sliding_window_pattern(window)
    w.add_expert_count(shape.experts)
    w.add_expert_used_count(shape.top_k)
    w.add_uint32("mimo2.expert_gating_func", 2)  # sigmoid
    w.add_expert_weights_norm(True)
    w.add_vocab_size(shape.vocab)
    w.add_tokenizer_model("no_vocab")
    w.add_file_type(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    options = parser.parse_args()
    write(options.file, SHAPES[options.shape])


if __name__ == "__main__":
    main()

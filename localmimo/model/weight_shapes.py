"""Weight shapes: what each tensor of a pack must have for its config.json, checked before any is read.

They disagree where a file was swapped or edited. Knows names and sizes; reads no
weight.
"""

from collections.abc import Iterator

from localmimo.errors import BadModel
from localmimo.model.config import LayerSpec, ModelConfig
from quant.pack.pack import Pack, experts_of

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def check_shapes(pack: Pack, config: ModelConfig) -> None:
    """Raise BadModel where a tensor or the pages are not of the sizes that the config gives."""
    for name, shape in _expected(config):
        found = pack.tensors.get(name)
        if found is not None and found.shape != shape:
            raise _wrong(pack, name, list(found.shape), list(shape))
    page = pack.page
    if page is not None and (page.hidden, page.inner) != (config.hidden, config.expert_inner):
        raise _wrong(pack, "an expert", [page.inner, page.hidden], [config.expert_inner, config.hidden])
    expected, counts = dict.fromkeys(config.moe_layers, config.n_experts), experts_of(pack)
    for layer in sorted({*expected, *counts}):
        if expected.get(layer, 0) != counts.get(layer, 0):
            raise BadModel(
                f"{pack.path} has {counts.get(layer, 0)} experts in layer {layer}, and its config.json says "
                f"{expected.get(layer, 0)}: convert the checkpoint again."
            )


def _wrong(pack: Pack, name: str, found: list[int], expected: list[int]) -> BadModel:
    return BadModel(
        f"{pack.path}: {name} is {found} in the pack, and its config.json asks for {expected}: "
        "convert the checkpoint again."
    )


def _expected(config: ModelConfig) -> Shapes:
    yield from (("embed", (config.vocab_size, config.hidden)), ("head", (config.vocab_size, config.hidden)))
    yield "norm", (config.hidden,)
    for number, layer in enumerate(config.layers):
        yield from _layer(f"layers.{number}", layer, config)
    for number in range(config.n_mtp):
        yield f"mtp.{number}.proj", (config.hidden, 2 * config.hidden)
        for norm in ("embed_norm", "hidden_norm", "final_norm"):
            yield f"mtp.{number}.{norm}", (config.hidden,)
        yield from _layer(f"mtp.{number}", config.mtp_layer, config)


def _layer(name: str, layer: LayerSpec, config: ModelConfig) -> Shapes:
    hidden = config.hidden
    yield from ((f"{name}.attn_norm", (hidden,)), (f"{name}.mlp_norm", (hidden,)))
    yield f"{name}.attn.qkv", (sum(layer.qkv_rows), hidden)
    yield f"{name}.attn.o", (hidden, layer.n_heads * layer.v_head_dim)
    yield f"{name}.attn.sink", (layer.n_heads,)
    if layer.mlp == "moe":
        yield f"{name}.router.weight", (config.n_experts, hidden)
        yield f"{name}.router.bias", (config.n_experts,)
    else:
        yield from ((f"{name}.mlp.{part}", (config.dense_inner, hidden)) for part in ("gate", "up"))
        yield f"{name}.mlp.down", (hidden, config.dense_inner)

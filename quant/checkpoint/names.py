"""Published tensor names and layouts -> canonical matrices. The only module that knows both.

Every tensor that the config implies is looked up, its shape and dtype checked, and what is left over is
named. Must not read weights and must not import torch.

Sources of the layouts: the vLLM and SGLang loaders of MiMo-V2 for the fused shards; sgl-project/sglang-jax
pull request 969 for the joint scale grid of K and V in V2-Flash; SGLang's mimo_v2.py for what a text model
skips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quant.checkpoint.geometry import AttentionHeads, Geometry
from quant.checkpoint.pieces import Grid, Location, Matrix, Piece, plain_grid
from quant.errors import BadCheckpoint
from quant.formats.codec import ceil_div

DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F8_E4M3": "fp8"}
TOWERS = ("visual.", "vision_model.", "audio_encoder.", "audio_")
SPEECH = "speech_embeddings"

LAYER_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
MTP_NORMS = {
    "embed_norm": "enorm",
    "hidden_norm": "hnorm",
    "attn_norm": "input_layernorm",
    "mlp_norm": "pre_mlp_layernorm",
    "final_norm": "final_layernorm",
}


class Names:
    """Maps one checkpoint's stored tensors; `matrices` and `skipped` are the result."""

    def __init__(self, geometry: Geometry, stored: Mapping[str, Location]) -> None:
        self.geometry = geometry
        self._stored = stored
        self._used: set[str] = set()
        self.n_mtp = self._count_mtp()
        self.matrices = {matrix.name: matrix for matrix in self._all()}
        self.skipped = self._left_over()

    def _all(self) -> Iterator[Matrix]:
        g = self.geometry
        yield self._matrix("embed", "model.embed_tokens", (g.vocab, g.hidden))
        for layer in range(g.n_layers):
            yield from self._layer(layer)
        yield self._vector("norm", "model.norm.weight", g.hidden)
        yield self._matrix("head", "lm_head", (g.vocab, g.hidden))
        for k in range(self.n_mtp):
            yield from self._mtp_block(k)

    def _layer(self, layer: int) -> Iterator[Matrix]:
        g, canonical, published = self.geometry, f"layers.{layer}", f"model.layers.{layer}"
        for name, stored in LAYER_NORMS.items():
            yield self._vector(f"{canonical}.{name}", f"{published}.{stored}.weight", g.hidden)
        yield from self._attention(f"{canonical}.attn", f"{published}.self_attn", g.heads(layer))
        if not g.moe[layer]:
            yield from self._mlp(f"{canonical}.mlp", f"{published}.mlp", g.inner_dense)
            return
        yield self._matrix(f"{canonical}.router.weight", f"{published}.mlp.gate", (g.n_experts, g.hidden))
        yield self._vector(
            f"{canonical}.router.bias", f"{published}.mlp.gate.e_score_correction_bias", g.n_experts
        )
        for expert in range(g.n_experts):
            yield from self._mlp(
                f"{canonical}.experts.{expert}", f"{published}.mlp.experts.{expert}", g.inner_expert
            )

    def _mtp_block(self, k: int) -> Iterator[Matrix]:
        g, canonical, published = self.geometry, f"mtp.{k}", f"model.mtp.layers.{k}"
        for name, stored in MTP_NORMS.items():
            yield self._vector(f"{canonical}.{name}", f"{published}.{stored}.weight", g.hidden)
        yield self._matrix(f"{canonical}.proj", f"{published}.eh_proj", (g.hidden, 2 * g.hidden))
        yield from self._attention(f"{canonical}.attn", f"{published}.self_attn", g.window_heads)
        yield from self._mlp(f"{canonical}.mlp", f"{published}.mlp", g.inner_dense)

    def _mlp(self, canonical: str, published: str, inner: int) -> Iterator[Matrix]:
        hidden = self.geometry.hidden
        yield self._matrix(f"{canonical}.gate", f"{published}.gate_proj", (inner, hidden))
        yield self._matrix(f"{canonical}.up", f"{published}.up_proj", (inner, hidden))
        yield self._matrix(f"{canonical}.down", f"{published}.down_proj", (hidden, inner))

    # attention

    def _attention(self, canonical: str, published: str, heads: AttentionHeads) -> Iterator[Matrix]:
        hidden = self.geometry.hidden
        pieces = self._fused(published, heads) if self.geometry.fused else self._split(published, heads)
        dtypes = {self._dtype(piece) for piece in pieces}
        if len(dtypes) > 1:
            raise BadCheckpoint(
                f"{published}: Q, K and V are stored as {' and '.join(sorted(dtypes))}, not alike."
            )
        yield Matrix(f"{canonical}.qkv", (heads.rows, hidden), dtypes.pop(), tuple(pieces))
        yield self._matrix(f"{canonical}.o", f"{published}.o_proj", (hidden, heads.q * heads.v_dim))
        if f"{published}.attention_sink_bias" in self._stored:
            yield self._vector(f"{canonical}.sink", f"{published}.attention_sink_bias", heads.q)

    def _fused(self, published: str, heads: AttentionHeads) -> list[Piece]:
        """Tensor-parallel shards [Q_r | K_r | V_r] one below the other; the scale grid restarts in each.

        Concatenating the Q of all shards, then the K, then the V gives the heads in their natural order.
        """
        weight = self._weight(f"{published}.qkv_proj", (heads.rows, self.geometry.hidden))
        shard_rows = heads.rows // heads.shards
        grids = self._shard_grids(f"{published}.qkv_proj", weight, shard_rows, heads.shards)
        pieces, start = [], 0
        for n_rows in (
            heads.q_rows // heads.shards,
            heads.k_rows // heads.shards,
            heads.v_rows // heads.shards,
        ):
            for shard in range(heads.shards):
                pieces.append(Piece(weight, shard * shard_rows + start, n_rows, grids[shard]))
            start += n_rows
        return pieces

    def _shard_grids(self, name: str, weight: Location, shard_rows: int, shards: int) -> list[Grid | None]:
        per_shard, cols = plain_grid((shard_rows, weight.stored.shape[1]), self.geometry.scale_block)
        scales = self._fp8_scales(name, weight, (shards * per_shard, cols))
        if scales is None:
            return [None] * shards
        block = self.geometry.scale_block
        return [Grid(scales, block, shard * shard_rows, shard * per_shard) for shard in range(shards)]

    def _split(self, published: str, heads: AttentionHeads) -> list[Piece]:
        hidden = self.geometry.hidden
        q = self._plain(f"{published}.q_proj", (heads.q_rows, hidden))
        groups = self._joint_groups(published, heads)
        if groups:
            return [q, *self._joint(published, heads, groups)]
        k = self._plain(f"{published}.k_proj", (heads.k_rows, hidden))
        v = self._plain(f"{published}.v_proj", (heads.v_rows, hidden))
        return [q, k, v]

    def _joint_groups(self, published: str, heads: AttentionHeads) -> int:
        """Over how many groups [K_g | V_g] the scales of K and V were computed jointly; 0: plain grids.

        V2-Flash quantised K and V of its global layers as one matrix per KV head (per tensor-parallel shard,
        which is the same there). Only the number of scale rows tells; where it fits a plain grid, it is one.
        """
        k_scale = self._stored.get(f"{published}.k_proj.weight_scale_inv")
        v_scale = self._stored.get(f"{published}.v_proj.weight_scale_inv")
        if not k_scale or not v_scale or not k_scale.stored.shape or not v_scale.stored.shape:
            return 0
        found = (k_scale.stored.shape[0], v_scale.stored.shape[0])
        side = self.geometry.scale_block[0]
        if found == (ceil_div(heads.k_rows, side), ceil_div(heads.v_rows, side)):
            return 0
        for groups in (heads.shards, heads.kv):
            if heads.kv % groups == 0 and found == self._joint_scale_rows(heads, groups):
                return groups
        return 0

    def _joint_scale_rows(self, heads: AttentionHeads, groups: int) -> tuple[int, int]:
        side = self.geometry.scale_block[0]
        k_blocks = ceil_div(heads.k_rows // groups, side)
        all_blocks = ceil_div((heads.k_rows + heads.v_rows) // groups, side)
        return groups * k_blocks, groups * (all_blocks - k_blocks)

    def _joint(self, published: str, heads: AttentionHeads, groups: int) -> list[Piece]:
        """K then V by groups. The last scale row of a group's K also covers the first rows of its V."""
        g, (side, _) = self.geometry, self.geometry.scale_block
        k_scale_rows, v_scale_rows = self._joint_scale_rows(heads, groups)
        cols = ceil_div(g.hidden, g.scale_block[1])
        k_weight = self._weight(f"{published}.k_proj", (heads.k_rows, g.hidden))
        v_weight = self._weight(f"{published}.v_proj", (heads.v_rows, g.hidden))
        k_scales = self._fp8_scales(f"{published}.k_proj", k_weight, (k_scale_rows, cols))
        v_scales = self._fp8_scales(f"{published}.v_proj", v_weight, (v_scale_rows, cols))
        assert k_scales is not None and v_scales is not None
        k_rows, v_rows = heads.k_rows // groups, heads.v_rows // groups
        k_blocks, v_blocks = k_scale_rows // groups, v_scale_rows // groups
        shared = min(k_blocks * side - k_rows, v_rows)  # rows of V under K's last scale row
        k_pieces, v_pieces = [], []
        for group in range(groups):
            k_grid = Grid(k_scales, g.scale_block, group * k_rows, group * k_blocks)
            k_pieces.append(Piece(k_weight, group * k_rows, k_rows, k_grid))
            top = group * v_rows
            if shared:
                # V row i of the group is row k_rows + i of the joint matrix.
                v_pieces.append(
                    Piece(
                        v_weight, top, shared, Grid(k_scales, g.scale_block, top - k_rows, group * k_blocks)
                    )
                )
            if shared < v_rows:
                v_grid = Grid(v_scales, g.scale_block, top + shared, group * v_blocks)
                v_pieces.append(Piece(v_weight, top + shared, v_rows - shared, v_grid))
        return k_pieces + v_pieces

    # single tensors

    def _matrix(self, canonical: str, published: str, shape: tuple[int, int]) -> Matrix:
        exponents = self._stored.get(f"{published}.weight_scale")
        if exponents is not None:
            return self._mxfp4(canonical, published, shape)
        piece = self._plain(published, shape)
        return Matrix(canonical, shape, self._dtype(piece), (piece,))

    def _plain(self, published: str, shape: tuple[int, int]) -> Piece:
        weight = self._weight(published, shape)
        scales = self._fp8_scales(published, weight, plain_grid(shape, self.geometry.scale_block))
        return Piece(weight, 0, shape[0], Grid(scales, self.geometry.scale_block) if scales else None)

    def _mxfp4(self, canonical: str, published: str, shape: tuple[int, int]) -> Matrix:
        rows, cols = shape
        if cols % 32:
            raise BadCheckpoint(f"{published}.weight is MXFP4, but its {cols} columns are no multiple of 32.")
        weight = self._take(f"{published}.weight", (rows, cols // 2), ("U8",))
        exponents = self._take(f"{published}.weight_scale", (rows, cols // 32), ("U8", "F8_E8M0"))
        return Matrix(canonical, shape, "mxfp4", (Piece(weight, 0, rows, exponents=exponents),))

    def _vector(self, canonical: str, published: str, length: int) -> Matrix:
        vector = self._take(published, (length,), ("BF16", "F16", "F32"))
        return Matrix(canonical, (length,), DTYPES[vector.stored.dtype], (Piece(vector, 0, length),))

    def _weight(self, name: str, shape: tuple[int, int]) -> Location:
        return self._take(f"{name}.weight", shape, tuple(DTYPES))

    def _fp8_scales(self, name: str, weight: Location, shape: tuple[int, int]) -> Location | None:
        """The scales of an FP8 weight; other weights must have none."""
        full = f"{name}.weight_scale_inv"
        if weight.stored.dtype == "F8_E4M3":
            return self._take(full, shape, ("F32", "BF16"))
        if full in self._stored:
            raise BadCheckpoint(f"{name}.weight is stored as {weight.stored.dtype}, yet {full} exists.")
        return None

    def _take(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Location:
        location = self._stored.get(name)
        if location is None:
            raise BadCheckpoint(f"The checkpoint has no tensor {name}, which config.json implies.")
        where = f"{name} in {location.shard.path.name}"
        if location.stored.shape != shape:
            found = list(location.stored.shape)
            raise BadCheckpoint(f"{where} has shape {found}, but config.json implies {list(shape)}.")
        if location.stored.dtype not in dtypes:
            raise BadCheckpoint(
                f"{where} is stored as {location.stored.dtype}; expected {' or '.join(dtypes)}."
            )
        self._used.add(name)
        return location

    @staticmethod
    def _dtype(piece: Piece) -> str:
        return DTYPES[piece.weight.stored.dtype]

    # what is there besides

    def _count_mtp(self) -> int:
        numbers = {name.split(".")[3] for name in self._stored if name.startswith("model.mtp.layers.")}
        found, told = len(numbers), self.geometry.n_mtp
        if told is not None and found != told:
            raise BadCheckpoint(f"config.json promises {told} MTP blocks, but the checkpoint holds {found}.")
        return found

    def _left_over(self) -> dict[str, int]:
        """Counts of skipped tensors by prefix; raises BadCheckpoint when there is something unknown."""
        skipped: dict[str, int] = {}
        unknown = []
        for name in self._stored.keys() - self._used:
            tower = _tower(name)
            if tower is None:
                unknown.append(name)
            else:
                skipped[tower] = skipped.get(tower, 0) + 1
        if unknown:
            shown = ", ".join(sorted(unknown)[:3])
            raise BadCheckpoint(
                f"The checkpoint holds {len(unknown)} tensors that config.json does not imply: {shown}."
            )
        return dict(sorted(skipped.items()))


def _tower(name: str) -> str | None:
    """The part of a multimodal model that a tensor belongs to, None for the text model's."""
    if SPEECH in name:
        return SPEECH
    bare = name.removeprefix("model.")
    return next((prefix for prefix in TOWERS if bare.startswith(prefix)), None)

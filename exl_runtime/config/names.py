"""Where a checkpoint keeps the tensors that the model calls by its own names. Knows no tensors and no files.

Canonical names are the Llama ones. Every method returns candidates in order of preference; the first that exists
in the checkpoint wins. The first candidate is always the split spelling under the family's own prefix, which is also
what an EXL2 folder uses (formats/exl2.md 1.2: fused tensors are split on conversion).

Layout facts (measured on what transformers 5.23 writes):
* A path is the module name, without ".weight"; the matrix behind it is stored as (out_features, in_features).
* Phi-3 fuses along out_features: qkv_proj = all query heads, then all key heads, then all value heads (no
  interleaving by head); gate_up_proj = gate, then up.
* save_pretrained writes experts one by one: Mixtral block_sparse_moe.experts.{e}.w1 (gate), .w3 (up), .w2 (down)
  and block_sparse_moe.gate; Qwen3-MoE mlp.experts.{e}.gate_proj/up_proj/down_proj and mlp.gate.
* The modules of transformers 5 hold experts as 3-D parameters, which other tools write to disk as they are:
  mlp.experts.gate_up_proj (experts, 2 * inner, hidden), gate before up, and mlp.experts.down_proj
  (experts, hidden, inner). Each slice [e] is an ordinary (out_features, in_features) matrix, not transposed.
  Such a path is the whole tensor name: there is no ".weight" behind it.
"""

from dataclasses import dataclass

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")

EXPERT_LETTERS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True, slots=True)
class Source:
    """One place where a matrix may be stored.

    path    module path; with `expert` set, the complete name of a stacked 3-D tensor
    start, stop  the out_features of the wanted part inside a fused matrix of `total` out_features; None: all
    expert  index into the first dimension of a stacked tensor (experts, total, in_features); None: not stacked
    total   out_features of the whole fused or stacked matrix; None when the matrix is stored on its own
    """

    path: str
    start: int | None = None
    stop: int | None = None
    expert: int | None = None
    total: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The spellings of one model.

    prefixes   what may stand before "layers.0", "embed_tokens" and "norm", best first; each ends with a dot
    heads      candidate paths of the output head
    query_size, key_size      out_features of q_proj, and of k_proj and v_proj
    inner_size, expert_size   out_features of gate_proj in a dense layer, and in one expert (0: no experts)
    hidden_size               out_features of an expert's down_proj
    fused      also look for qkv_proj and gate_up_proj
    post_norms four norms per layer instead of two
    lettered   experts may be spelled block_sparse_moe.experts.{e}.w1/w3/w2
    """

    prefixes: tuple[str, ...]
    heads: tuple[str, ...]
    query_size: int
    key_size: int
    inner_size: int
    expert_size: int
    hidden_size: int
    fused: bool
    post_norms: bool
    lettered: bool

    @property
    def embedding(self) -> tuple[str, ...]:
        """Paths of the token embedding (vocab, hidden)."""
        return tuple(f"{prefix}embed_tokens" for prefix in self.prefixes)

    @property
    def final_norm(self) -> tuple[str, ...]:
        """Paths of the norm before the head (hidden,)."""
        return tuple(f"{prefix}norm" for prefix in self.prefixes)

    @property
    def head(self) -> tuple[str, ...]:
        """Paths of the output head (vocab, hidden)."""
        return self.heads

    def norm(self, layer: int, kind: str) -> tuple[str, ...]:
        """Paths of a norm of one layer.

        kind: "input" and "pre_mlp" (every family), "post_attention" and "post_mlp" (only with post norms),
        "q" and "k" (per head, only with qk norms). Where four norms exist, "post_attention_layernorm" is the one
        after the attention; where two exist, the same name is the one before the MLP.
        """
        names = {"input": "input_layernorm", "q": "self_attn.q_norm", "k": "self_attn.k_norm"}
        if self.post_norms:
            names["post_attention"] = "post_attention_layernorm"
            names["pre_mlp"] = "pre_feedforward_layernorm"
            names["post_mlp"] = "post_feedforward_layernorm"
        else:
            names["pre_mlp"] = "post_attention_layernorm"
        return tuple(f"{prefix}layers.{layer}.{names[kind]}" for prefix in self.prefixes)

    def linear(self, layer: int, part: str) -> tuple[Source, ...]:
        """Sources of one matrix of a layer without experts; `part` is one of LINEARS."""
        room = "self_attn" if part in LINEARS[:4] else "mlp"
        found = [Source(path) for path in self._paths(layer, f"{room}.{part}")]
        if self.fused and part in self._parts():
            fused, start, stop, total = self._parts()[part]
            found += [Source(path, start, stop, None, total) for path in self._paths(layer, fused)]
        return tuple(found)

    def router(self, layer: int) -> tuple[Source, ...]:
        """Sources of the matrix (experts, hidden) that scores the experts."""
        rooms = ("block_sparse_moe", "mlp") if self.lettered else ("mlp",)
        return tuple(Source(path) for room in rooms for path in self._paths(layer, f"{room}.gate"))

    def expert_linear(self, layer: int, expert: int, part: str) -> tuple[Source, ...]:
        """Sources of one matrix of one expert; `part` is one of EXPERT_PARTS."""
        single = [f"mlp.experts.{expert}.{part}"]
        if self.lettered:
            letter = EXPERT_LETTERS[part]
            single = [f"block_sparse_moe.experts.{expert}.{letter}", f"mlp.experts.{expert}.{letter}", *single]
        found = [Source(path) for name in single for path in self._paths(layer, name)]
        inner = self.expert_size
        if part == "down_proj":
            stacked = [
                Source(path, None, None, expert, self.hidden_size)
                for path in self._paths(layer, "mlp.experts.down_proj")
            ]
        else:
            start = 0 if part == "gate_proj" else inner
            stacked = [
                Source(path, start, start + inner, expert, 2 * inner)
                for path in self._paths(layer, "mlp.experts.gate_up_proj")
            ]
        return (*found, *stacked)

    def _paths(self, layer: int, name: str) -> tuple[str, ...]:
        return tuple(f"{prefix}layers.{layer}.{name}" for prefix in self.prefixes)

    def _parts(self) -> dict[str, tuple[str, int, int, int]]:
        """part -> (fused path inside the layer, first out feature, end, out_features of the fused matrix)."""
        query, key, inner = self.query_size, self.key_size, self.inner_size
        qkv, gate_up = query + 2 * key, 2 * inner
        return {
            "q_proj": ("self_attn.qkv_proj", 0, query, qkv),
            "k_proj": ("self_attn.qkv_proj", query, query + key, qkv),
            "v_proj": ("self_attn.qkv_proj", query + key, qkv, qkv),
            "gate_proj": ("mlp.gate_up_proj", 0, inner, gate_up),
            "up_proj": ("mlp.gate_up_proj", inner, gate_up, gate_up),
        }

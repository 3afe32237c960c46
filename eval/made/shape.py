"""Sizes of a decoder-only model with gated MLPs, or mixtures of such. Knows no formats and no torch."""

from dataclasses import dataclass, fields, replace

from exl_runtime.errors import UsageError

MULTIPLE = 32  # of every row count: packed codes come in blocks of 32 rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """hidden: width of the residual stream. inner: of the MLP, or of one expert. context: tokens of the longest
    sequence. experts: of every layer, 0: none; active: how many of them a token visits."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 8192
    rope_theta: float = 10000.0
    experts: int = 0
    active: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """(path below `model.layers.N`, in_features, out_features) of every matrix of a layer, in checkpoint order.

        Experts' are called mlp.experts.E.gate_proj and so on, whatever the checkpoint calls them. Without the router.
        """
        narrow = self.kv_heads * self.head_dim
        attention = (
            ("self_attn.q_proj", self.hidden, self.hidden),
            ("self_attn.k_proj", self.hidden, narrow),
            ("self_attn.v_proj", self.hidden, narrow),
            ("self_attn.o_proj", self.hidden, self.hidden),
        )
        mlp = (
            ("gate_proj", self.hidden, self.inner),
            ("up_proj", self.hidden, self.inner),
            ("down_proj", self.inner, self.hidden),
        )
        rooms = [f"mlp.experts.{expert}" for expert in range(self.experts)] or ["mlp"]
        return (*attention, *((f"{room}.{part}", *sizes) for room in rooms for part, *sizes in mlp))


PRESETS = {
    "1.1b": Shape(hidden=2048, inner=5632, layers=22, heads=32, kv_heads=4, vocab=32000),
    "7b": Shape(hidden=4096, inner=11008, layers=32, heads=32, kv_heads=32, vocab=32000),
    "moe-1b": Shape(hidden=1024, inner=512, layers=12, heads=16, kv_heads=4, vocab=32000, experts=32, active=8),
    "8b": Shape(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, vocab=128256, rope_theta=500000.0),
}
_SIZES = tuple(field.name for field in fields(Shape))[:6]
_MIXTURE = (*_SIZES, "experts", "active")
USAGE = f"{', '.join(PRESETS)}, or numbers: {'/'.join(name.upper() for name in _SIZES)}[/EXPERTS/ACTIVE]"
_HINT = f"give {USAGE}, for example 2048/5632/22/32/4/32000"


def parse_shape(text: str, *, layers: int | None = None, mixtures: bool = False) -> Shape:
    """A preset or numbers with slashes between; `layers` stands above its number.

    mixtures: whether one with experts will do. Raises UsageError.
    """
    shape = PRESETS.get(text.lower())
    if shape is None:
        try:
            numbers = [int(part) for part in text.split("/")]
        except ValueError:
            raise UsageError(f"unknown shape {text!r}", hint=_HINT) from None
        if len(numbers) not in (len(_SIZES), len(_MIXTURE)):
            wanted = f"wanted {len(_SIZES)}, or {len(_MIXTURE)} for a mixture of experts"
            raise UsageError(f"the shape {text!r} has {len(numbers)} numbers, {wanted}", hint=_HINT)
        shape = Shape(**dict(zip(_MIXTURE, numbers, strict=False)))
    if layers is not None:
        shape = replace(shape, layers=layers)
    check(shape)
    if shape.experts and not mixtures:
        raise UsageError(f"the shape {text!r} has experts", hint="give the shape of a model without")
    return shape


def check(shape: Shape) -> None:
    """Raise UsageError where the sizes do not go together."""
    for name in _SIZES:
        if getattr(shape, name) < 1:
            raise UsageError(f"{name} is {getattr(shape, name)}, wanted a number from 1 up", hint=_HINT)
    if (shape.experts or shape.active) and not 1 <= shape.active <= shape.experts:
        raise UsageError(f"a token visits {shape.active} of {shape.experts} experts", hint=_HINT)
    for name in ("hidden", "inner"):
        if getattr(shape, name) % MULTIPLE:
            raise UsageError(f"{name} is {getattr(shape, name)}, wanted a multiple of {MULTIPLE}", hint=_HINT)
    if shape.hidden % shape.heads or shape.head_dim % 2:
        raise UsageError(f"{shape.heads} heads do not divide {shape.hidden} into even parts", hint=_HINT)
    if shape.heads % shape.kv_heads:
        raise UsageError(f"{shape.heads} heads are not a multiple of {shape.kv_heads} kv_heads", hint=_HINT)
    if shape.kv_heads * shape.head_dim % MULTIPLE:
        raise UsageError(
            f"keys are {shape.kv_heads * shape.head_dim} wide, wanted a multiple of {MULTIPLE}", hint=_HINT
        )

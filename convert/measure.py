"""What every width of every matrix costs at the end of the model, in nats of KL divergence per token.

To second order, KL(source || changed) = 1/2 E[(g . e)^2] per token: e the change of a matrix's output, g the gradient
of the log-probability of a token drawn from the source itself (the Fisher information; Martens, JMLR 2020). So one
backward pass tells how much an error of every output of every matrix matters, and one trial encoding per width and
group size tells how large it is: no encoding has to be run through the rest of the model. Measured against running
it through: LOG.md.

Two refinements: columns are independent (their errors are), but errors of one column at different tokens are not;
their correlation is measured on whole rows of tokens and multiplies a matrix's figures.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl_runtime.config import ModelSpec
from exl_runtime.errors import ConvertError
from exl_runtime.formats.exl2 import ROW_MULTIPLE, WIDTHS

from .encoder import QUICK, attempt
from .forward import LayerForward, logits
from .moments import Factor, Moments, factor
from .source import Slot

GROUP_SIZES = {2: (128, 64, 32), 3: (128, 64, 32), 4: (128, 64, 32), 5: (128, 32), 6: (128, 32), 8: (128,)}
COLUMNS = 1024  # of one matrix that are tried; they are independent, so an even sample tells of the others
CORRELATED = (3, 64)  # width and group size of the trial whose errors are followed over tokens
PRIOR = 12  # rows' worth of belief that errors at different tokens are independent


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """One matrix. losses: (bits, group size) -> nats per token of every block of 32 stored rows."""

    path: str
    inputs: int
    outputs: int
    biased: bool
    losses: Mapping[tuple[int, int], tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; losses to 5 digits."""
        table = {f"{b}b_{g}g": [float(f"{x:.5g}") for x in row] for (b, g), row in self.losses.items()}
        return {"inputs": self.inputs, "outputs": self.outputs, "biased": self.biased, "losses": table}

    @classmethod
    def from_json(cls, path: str, entry: Mapping[str, Any], where: str) -> "Sensitivity":
        """Raises ConvertError naming `where` for anything but what `to_json` wrote."""
        try:
            losses = {}
            for key, row in entry["losses"].items():
                bits, size = key.removesuffix("g").split("b_")
                losses[int(bits), int(size)] = tuple(float(x) for x in row)
            made = cls(
                path=path,
                inputs=int(entry["inputs"]),
                outputs=int(entry["outputs"]),
                biased=bool(entry["biased"]),
                losses=losses,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
            raise ConvertError(
                f"{where}: the entry of {path} is damaged", hint="measure again without --measurement"
            ) from err
        blocks = made.inputs // ROW_MULTIPLE
        whole = blocks > 0 and made.inputs % ROW_MULTIPLE == 0 and made.outputs > 0 and set(losses) == _wanted()
        if not whole or any(len(row) != blocks or not all(0 <= x < math.inf for x in row) for row in losses.values()):
            raise ConvertError(
                f"{where}: the entry of {path} is incomplete", hint="measure again without --measurement"
            )
        return made


def _wanted() -> set[tuple[int, int]]:
    return {(bits, size) for bits in WIDTHS for size in GROUP_SIZES[bits]}


@torch.enable_grad()
def top_gradient(spec: ModelSpec, x: Tensor, final_norm: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient, at the last hidden states x (B, T, hidden), of the log-probabilities of one drawn token each."""
    x = x.detach().requires_grad_(True)
    scores = torch.log_softmax(logits(spec, x, final_norm, head), dim=-1)
    flat = scores.detach().exp().flatten(0, 1).cpu()
    drawn = torch.multinomial(flat, 1, generator=generator).to(x.device)
    scores.flatten(0, 1).gather(1, drawn).sum().backward()
    return x.grad


class LayerProbe:
    """Runs rows through one layer, forward and back, and keeps what its matrices need to know."""

    def __init__(self, forward: LayerForward, slots: Mapping[str, Slot], weights: dict[str, Tensor], kept: int) -> None:
        """kept: rows whose inputs and gradients are held for the correlation over tokens."""
        self.forward = forward
        self.slots = slots
        self.weights = weights
        self.kept = kept
        self.tokens = 0
        device = weights["input_norm"].device
        sharing = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        self._moments: dict[str, Moments] = {}
        self._gradients: dict[str, Tensor] = {}
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for key, slot in slots.items():
            stem, _, part = key.rpartition(".")
            shared = sharing.get(part)
            owner = f"{stem}.{shared}".removeprefix(".") if shared else None
            self._moments[key] = self._moments[owner] if owner else Moments(slot.inputs, device)
            self._gradients[key] = torch.zeros(slot.outputs, dtype=torch.float64, device=device)
            self._rows[key] = []
        self._owners = {key for key in slots if key.rpartition(".")[2] not in sharing}

    @torch.enable_grad()
    def back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """x, gradient float32 (B, T, hidden): inputs of the layer, gradient at its outputs -> gradient at its inputs.

        Rows of one length in all calls.
        """
        f = self.forward
        w = dict(self.weights)
        x = x.detach().requires_grad_(True)
        taps: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}

        def tap(key: str, into: Tensor, lead: tuple[int, ...]) -> None:
            """A bias of zeros with a place for every token: its gradient is the gradient of the output."""
            inputs[key] = into
            zeros = torch.zeros(*lead, self.slots[key].outputs, device=x.device, requires_grad=True)
            taps[key] = zeros
            bias = self.weights.get(f"{key}.bias")
            w[f"{key}.bias"] = zeros if bias is None else zeros + bias

        lead = tuple(x.shape[:2])
        h = f.attention_input(x, w)
        for key in ("q_proj", "k_proj", "v_proj"):
            tap(key, h, lead)
        inner = f.attention_inner(h, w)
        tap("o_proj", inner, lead)
        middle = f.attention_add(x, inner, w)
        h = f.mlp_input(middle, w)
        if f.is_moe:
            _, chosen, _ = f.route(h, w)
            flat = h.flatten(0, 1)
            for e in chosen.unique(sorted=True).tolist():
                rows = (chosen == e).nonzero()[:, 0]
                tap(f"experts.{e}.gate_proj", flat[rows], (rows.numel(),))
                tap(f"experts.{e}.up_proj", flat[rows], (rows.numel(),))
                tap(f"experts.{e}.down_proj", f.expert_inner(flat[rows], w, e).detach(), (rows.numel(),))
            y = f.moe_add(middle, f.moe_output(h, w), w)
        else:
            tap("gate_proj", h, lead)
            tap("up_proj", h, lead)
            inner = f.mlp_inner(h, w)
            tap("down_proj", inner, lead)
            y = f.mlp_add(middle, inner, w)
        y.backward(gradient)
        self._collect(inputs, taps, lead)
        return x.grad

    @torch.no_grad()
    def _collect(self, inputs: dict[str, Tensor], taps: dict[str, Tensor], lead: tuple[int, ...]) -> None:
        before = self.tokens // lead[1]
        self.tokens += lead[0] * lead[1]
        room = max(0, self.kept - before)
        for key, into in inputs.items():
            g = taps[key].grad
            if key in self._owners:
                self._moments[key].add(into.detach())
            self._gradients[key] += g.flatten(0, -2).square().sum(dim=0, dtype=torch.float64)
            if room and g.dim() == 3:
                columns = _columns(g.shape[-1], g.device)
                self._rows[key].append((into.detach()[:room].bfloat16(), g[:room][..., columns].bfloat16()))

    @torch.no_grad()
    def sensitivities(self, advance: Callable[[str], None]) -> Iterator[Sensitivity]:
        """Try every width on every matrix. Once all rows have passed `back`."""
        shared, factors = None, None
        for key, slot in self.slots.items():
            moments = self._moments[key]
            if factors is None or moments is not shared:  # q, k and v have one input, gate and up another
                shared, factors = moments, factor(moments.hessian, damping=QUICK.damping)
            yield self._sensitivity(key, slot, factors)
            advance(slot.path)

    def _sensitivity(self, key: str, slot: Slot, factors: Factor) -> Sensitivity:
        columns = _columns(slot.outputs, self.weights[key].device)
        weight = self.weights[key][:, columns].contiguous()
        importance = (self._gradients[key][columns] / max(1, self.tokens)).float()
        importance *= slot.outputs / columns.numel() / 2
        losses: dict[tuple[int, int], tuple[float, ...]] = {}
        correlation = 1.0
        for bits, size in sorted(_wanted()):
            if factors.u is None:  # no data reached it (an expert that nobody visits): any width is as good
                losses[bits, size] = (0.0,) * (slot.inputs // ROW_MULTIPLE)
                continue
            trial = attempt(weight, factors, bits, size)
            per_row = (trial.rows_lost @ importance).double()
            losses[bits, size] = tuple(per_row.view(-1, ROW_MULTIPLE).sum(dim=1).tolist())
            if (bits, size) == CORRELATED:
                correlation = self._correlation(key, trial.weight - weight)
        scaled = {place: tuple(x * correlation for x in row) for place, row in losses.items()}
        return Sensitivity(path=slot.path, inputs=slot.inputs, outputs=slot.outputs, biased=slot.biased, losses=scaled)

    def _correlation(self, key: str, off: Tensor) -> float:
        """sum over rows of (sum over tokens g.e)^2, relative to the sum of squares: 1 for independent tokens."""
        together = alone = 0.0
        rows = 0
        for into, g in self._rows[key]:
            each = ((into.float() @ off) * g.float()).sum(dim=-1).double()
            together += float(each.sum(dim=1).square().sum())
            alone += float(each.square().sum())
            rows += each.shape[0]
        if not rows or alone <= 0:
            return 1.0
        return (together / alone * rows + PRIOR) / (rows + PRIOR)


def _columns(outputs: int, device: torch.device) -> Tensor:
    """An even sample of at most COLUMNS columns."""
    return torch.arange(0, outputs, -(-outputs // COLUMNS), device=device)

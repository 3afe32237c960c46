"""From the files of a LoRA adapter to an `Adapter` of one model: every tensor finds its matrix, whatever its name."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.header import short
from ..config.names import EXPERT_PARTS, LINEARS, Source
from ..config.spec import ModelSpec
from ..errors import AdapterError
from ..formats.base import LinearShape
from ..formats.checks import require_finite
from ..formats.dense import FLOATS, Dense
from ..ops.linear.base import LinearKernel
from ..ops.linear.select import select
from ..ops.native import torch_alone
from .adapter_files import BASE, AdapterFiles, Delta, Replaced, read_adapter
from .block import Block
from .dora import table_norms, weight_norms
from .linear import Linear
from .lora import HEAD, ROUTER, Adapter, Change, Place, TableChange, expert_part, held_by
from .mlp import Mlp
from .split_model import SplitTransformer
from .transformer import Transformer

AT_HOME = (
    "matrices, their biases, the embedding and the output head can be adapted; take the adapter made for this model"
)


def load_adapter(folder: Path, model: Transformer | SplitTransformer) -> Adapter:
    """The adapter in `folder` for this very model, on its device or devices.

    Raises AdapterError naming the module that the model does not have, or whose shape is another; and as
    `read_adapter`.
    """
    files = read_adapter(folder)
    with torch_alone():  # the norms of DoRA are the same bits on any number of threads
        return _Loading(files, model).adapter()


def matrices(block: Block) -> Iterator[tuple[str, Linear]]:
    """The matrices of a block by the names of their places."""
    mlp = block.mlp
    yield from zip(LINEARS, (*block.attention.linears, *(mlp.linears if isinstance(mlp, Mlp) else ())), strict=False)
    if not isinstance(mlp, Mlp):
        yield ROUTER, mlp.router
        for number, expert in enumerate(mlp.experts):
            for part, linear in zip(EXPERT_PARTS, expert.linears, strict=True):
                yield expert_part(number, part), linear


def stages(model: Transformer | SplitTransformer) -> list[Transformer]:
    """The models, one for each device, that a model consists of."""
    return [part.model for part in model.parts] if isinstance(model, SplitTransformer) else [model]


@dataclass(frozen=True, slots=True)
class _Site:
    """A matrix of the model under one of its names, and where it is."""

    place: Place
    source: Source
    linear: Linear
    model: Transformer


class _Loading:
    def __init__(self, files: AdapterFiles, model: Transformer | SplitTransformer) -> None:
        self.files = files
        self.spec = model.spec
        self.stages = stages(model)
        self.sites = _sites(self.stages)
        self.stacks = Counter(path for path, expert in self.sites if expert is not None)  # experts of each
        self.changes: dict[Place, list[Change]] = {}
        self.table: list[TableChange] = []

    def adapter(self) -> Adapter:
        rank = 0
        for path, shape in self.files.bases.items():
            self.check_base(path, shape)
        for delta in self.files.deltas:
            if delta.table:
                self.table.append(self.looked_up(delta))
                rank = max(rank, delta.down.shape[0])
                continue
            for each, path, expert in self.singles(delta):
                scale = self.files.settings.scale(path, each.down.shape[0])
                rank = max(rank, each.down.shape[0])
                for site in self.sites[path, expert]:
                    self.add(site, self.product(each, scale, site))
        for replaced in self.files.replaced:
            if replaced.path in self.spec.names.embedding:
                self.replace_rows(replaced)
            else:
                self.replace_matrix(replaced)
        changes = {place: tuple(parts) for place, parts in self.changes.items()}
        held = held_by([*(change for parts in changes.values() for change in parts), *self.table])
        return Adapter(changes, tuple(self.table), self.files.digest, rank, held)

    def add(self, site: _Site, change: Change) -> None:
        self.changes.setdefault(site.place, []).append(change)

    # --- products -----------------------------------------------------------------------------------------------

    def singles(self, delta: Delta) -> Iterator[tuple[Delta, str, int | None]]:
        """The delta, or one for each expert that lies in it, with the key of its sites."""
        if (delta.path, None) in self.sites:
            yield delta, delta.path, None
            return
        module = delta.path
        while module.endswith(BASE):
            module = module.removesuffix(BASE)
        inside = [path for path in self.stacks if path.rpartition(".")[0] == module]
        if not inside:
            raise self.unknown(delta.path)
        (rows, inputs), outputs = delta.down.shape, delta.up.shape[0]
        for path in inside:
            site, count = self.sites[path, 0][0], self.stacks[path]
            if (inputs, outputs) != (site.linear.kernel.shape.in_features, site.source.total):
                continue
            if rows % count or delta.magnitude is not None or delta.bias is not None:
                break
            down = delta.down.view(count, rows // count, inputs)
            up = delta.up.view(outputs, rows // count, count)
            for expert in range(count):
                yield Delta(path, down[expert], up[:, :, expert], None, None, False), path, expert
            return
        raise AdapterError(
            f"{self.files.folder}: {short(delta.path)} is for parameters of {inputs} inputs, {outputs} outputs and "
            f"together rank {rows}: no stack of this model's experts is like that",
            hint="the adapter was made for another model",
        )

    def product(self, delta: Delta, scale: float, site: _Site) -> Change:
        kernel, device = site.linear.kernel, site.model.device
        self.fits(delta.path, site, delta.down.shape[1], delta.up.shape[0])
        down = _ordered(delta.down, kernel.input_order, 1)
        up = self.outputs(delta.up, site)
        shift = stretch = None
        if delta.bias is not None:
            shift = (self.vector(self.outputs(delta.bias, site), delta.path) * scale).to(device)
        if delta.magnitude is not None:
            magnitude = self.vector(self.outputs(delta.magnitude, site), delta.path)
            norms = weight_norms(kernel, down.to(device), up.to(device), scale).cpu()
            up, stretch = self.rescaled(up, magnitude, norms, delta.path)
            stretch = stretch.to(device)
        return Change(
            down=self.dense(down, site.model, delta.path),
            up=self.dense(up, site.model, delta.path),
            scale=scale,
            shift=shift,
            stretch=stretch,
        )

    def looked_up(self, delta: Delta) -> TableChange:
        first = self.stages[0]
        table = first.embedding.table
        if delta.path not in self.spec.names.embedding:
            raise self.unknown(delta.path)
        self.check_rows(delta.path, (delta.down.shape[1], delta.up.shape[0]))
        scale = self.files.settings.scale(delta.path, delta.down.shape[0])
        up, stretch = delta.up, None
        self.vector(delta.down, delta.path)
        if delta.magnitude is not None:
            norms = table_norms(table, delta.down.to(table.device), up.to(table.device), scale).cpu()
            up, stretch = self.rescaled(up, self.vector(delta.magnitude, delta.path), norms, delta.path)
            stretch = stretch.to(table.device)
        return TableChange(
            rows=delta.down.t().contiguous().to(table.device),
            up=self.dense(up, first, delta.path),
            scale=scale * first.embedding.scale,
            stretch=stretch,
        )

    def rescaled(self, up: Tensor, magnitude: Tensor, norms: Tensor, path: str) -> tuple[Tensor, Tensor]:
        """DoRA: `up` times magnitude / norm, and what is left to do to the model's own output."""
        if not norms.all():
            row = int((norms == 0).nonzero()[0])
            raise AdapterError(
                f"{self.files.folder}: {short(path)}: output {row} of matrix and adapter together is zero"
            )
        gain = magnitude.double() / norms
        return (up.double() * gain[:, None]).float(), (gain - 1).float()

    # --- modules trained whole ----------------------------------------------------------------------------------

    def replace_rows(self, replaced: Replaced) -> None:
        first = self.stages[0]
        embedding, weight, tokens = first.embedding, replaced.weight, replaced.tokens
        if weight is None or replaced.bias is not None:
            raise self.unknown(replaced.path)
        self.vector(weight, replaced.path)
        lookup = None
        if tokens is None:
            self.check_rows(replaced.path, tuple(weight.shape))
        else:
            lookup = torch.full((embedding.table.shape[0],), -1, device=weight.device)
            lookup[self.columns(replaced)] = torch.arange(len(tokens))
            lookup = lookup.to(first.device)
        self.table.append(TableChange(rows=weight.to(first.device), scale=embedding.scale, lookup=lookup))
        # peft keeps single tokens of a tied head the same as those of the embedding, and stores them once.
        heads = self.spec.names.head
        if tokens is not None and self.spec.tied_embeddings and all(r.path not in heads for r in self.files.replaced):
            self.replace_matrix(Replaced(heads[0], weight, None, tokens))

    def replace_matrix(self, replaced: Replaced) -> None:
        for site in self.sites.get((replaced.path, None), ()):
            device, columns = site.model.device, None
            if (weight := replaced.weight) is not None:
                if replaced.tokens is not None:
                    if site.place != HEAD:
                        raise self.unknown(replaced.path)
                    columns = self.columns(replaced).to(device)
                else:
                    self.fits(replaced.path, site, weight.shape[-1], weight.shape[0])
                    weight = self.outputs(weight, site)
                weight = _ordered(weight, site.linear.kernel.input_order, 1)
                self.add(site, Change(whole=self.dense(weight, site.model, replaced.path), columns=columns))
            if replaced.bias is not None:
                total = site.source.total or site.linear.kernel.shape.out_features
                self.fits(replaced.path, site, None, replaced.bias.shape[0] if replaced.bias.dim() == 1 else 0)
                assert replaced.bias.shape == (total,)
                shift = self.vector(self.outputs(replaced.bias, site), replaced.path).to(device)
                own = site.linear.bias
                self.add(site, Change(shift=shift if own is None else shift - own.float()))
        if (replaced.path, None) not in self.sites:
            raise self.unknown(replaced.path)

    def columns(self, replaced: Replaced) -> Tensor:
        """int64: the tokens of a module of which single rows are replaced."""
        weight, tokens = replaced.weight, torch.tensor(replaced.tokens)
        vocab, hidden = self.spec.vocab_size, self.spec.hidden_size
        if weight is None or weight.dim() != 2 or weight.shape[1] != hidden or int(tokens.max()) >= vocab:
            raise AdapterError(
                f"{self.files.folder}: {short(replaced.path)}: rows of tokens up to {int(tokens.max())}, shape "
                f"{None if weight is None else tuple(weight.shape)}; the model has {vocab} tokens of {hidden}",
                hint="the adapter was made for another model",
            )
        return tokens

    # --- checks and parts ---------------------------------------------------------------------------------------

    def check_base(self, path: str, shape: tuple[int, ...]) -> None:
        """A base model's own table or head, stored along: only its size matters, which training may have changed."""
        if path in self.spec.names.embedding:
            self.check_rows(path, shape)
        elif (path, None) not in self.sites:
            raise self.unknown(path)
        else:
            for site in self.sites[path, None]:
                self.fits(path, site, shape[-1], shape[0])

    def check_rows(self, path: str, shape: tuple[int, ...]) -> None:
        stored = self.stages[0].embedding.table.shape[0]
        if shape not in ((self.spec.vocab_size, self.spec.hidden_size), (stored, self.spec.hidden_size)):
            raise AdapterError(
                f"{self.files.folder}: {short(path)} is a table of shape {shape}, the model's has "
                f"{(self.spec.vocab_size, self.spec.hidden_size)}",
                hint="the adapter was made for another model, or its vocabulary was changed: that needs another model",
            )

    def fits(self, path: str, site: _Site, inputs: int | None, outputs: int) -> None:
        shape = site.linear.kernel.shape
        total = site.source.total or shape.out_features
        inputs = shape.in_features if inputs is None else inputs
        if inputs != shape.in_features or outputs != total:
            raise AdapterError(
                f"{self.files.folder}: {short(path)} is a matrix of {inputs} inputs and {outputs} "
                f"outputs, the model's has {shape.in_features} and {total}",
                hint="the adapter was made for another model",
            )

    def outputs(self, tensor: Tensor, site: _Site) -> Tensor:
        """The outputs of a fused module that are this matrix's, in the order of its kernel. Dimension 0."""
        return _ordered(tensor[site.source.start : site.source.stop], site.linear.kernel.output_order, 0)

    def vector(self, tensor: Tensor, path: str) -> Tensor:
        """float32, finite."""
        where = f"{self.files.folder}: {short(path)}"
        if tensor.dtype not in FLOATS:
            raise AdapterError(f"{where}: {tensor.dtype} is not a number format of weights")
        require_finite(tensor, "value", where)
        return tensor.float()

    def dense(self, weight: Tensor, model: Transformer, path: str) -> LinearKernel:
        shape = LinearShape(weight.shape[1], weight.shape[0])
        where = f"{self.files.folder}: {short(path)}"
        return select(Dense.load({"weight": weight.contiguous()}, shape, where=where), model.device, model.backend)

    def unknown(self, path: str) -> AdapterError:
        what = "is no matrix of this model"
        if path.endswith("norm"):
            what = "is a norm, and retrained norms are not supported"
        return AdapterError(f"{self.files.folder}: {short(path)} {what}", hint=AT_HOME)


def _sites(models: list[Transformer]) -> dict[tuple[str, int | None], list[_Site]]:
    """Module path -> the matrices it stands for: several, where it is fused. Stacks of experts: (path, expert)."""
    sites: dict[tuple[str, int | None], list[_Site]] = {}
    names = models[0].spec.names
    for model in models:
        for block in model.blocks:
            layer = block.layer.index
            for part, linear in matrices(block):
                for source in _sources(model.spec, layer, part):
                    sites.setdefault((source.path, source.expert), []).append(
                        _Site((layer, part), source, linear, model)
                    )
    for path in names.head:
        sites.setdefault((path, None), []).append(_Site(HEAD, Source(path), models[-1].head, models[-1]))
    return sites


def _sources(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...]:
    if part == ROUTER:
        return spec.names.router(layer)
    if part in LINEARS:
        return spec.names.linear(layer, part)
    _, expert, name = part.split(".")
    return spec.names.expert_linear(layer, int(expert), name)


def _ordered(tensor: Tensor, order: Tensor | None, dim: int) -> Tensor:
    return tensor if order is None else tensor.index_select(dim, order.to(tensor.device).long())

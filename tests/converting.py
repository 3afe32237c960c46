"""Tiny conversions for tests: models with tokenizers, options, a quiet reporter, and a disk that can be watched,
cut off and filled up.
"""

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from convert import blocktune, encoding, measure, tuning
from convert.job import Outcome, run
from convert.options import JobOptions, validated
from convert.tune import tune
from exl_runtime.errors import ConvertError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 70,
}
EXPERTS = {"num_local_experts": 2}
# Group sizes that measuring tries: fewer, as most of the time of a tiny conversion goes there.
FEW_SIZES = {2: (64,), 3: (64,), 4: (32,), 5: (32,), 6: (32,), 8: (128,)}


def write_tokenizer(folder: Path, vocab: int) -> None:
    """One token per character, `vocab` of them; the first three are <pad>, <s>, </s>."""
    pieces = ["<pad>", "<s>", "</s>", *map(chr, range(33, 33 + vocab))][:vocab]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(pieces[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def family(name: str, **options: Any) -> tiny.Family:
    """A family of `tiny` with other options."""
    found = tiny.by_name(name)
    return replace(found, options={**found.options, **options})


@cache
def small_model(name: str, root: Path, seed: int = 0) -> Path:
    """A folder with a two-layer model of a family and a tokenizer; made once per root."""
    changes = {**SMALL, **(EXPERTS if name == "mixtral" else {})}
    folder = root / f"{name}-{seed}"
    save_model(tiny.model_of(family(name, **changes), seed), folder)
    return folder


def save_model(model: Any, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> None:
    """A transformers model, its weights rounded to `dtype`, and a tokenizer of its size as a folder."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder, model.config.vocab_size)


def options(source: Path, out: Path | None, **changes: Any) -> JobOptions:
    """Options of a conversion that takes a second."""
    given = {"bits": 5.5, "rows": 8, "length": 32, "device": "cpu"} | changes
    return validated(JobOptions(source=source, out=out, **given))


class Quiet:
    """A `Progress` that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.said: list[str] = []
        self.warned: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "steps") -> Iterator["Quiet"]:
        self.stages.append(name)
        yield self

    def advance(self, n: int = 1, note: str = "") -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def convert(job: JobOptions) -> Outcome:
    """Run a job that nobody watches."""
    return run(job, Quiet())


def refused(job: JobOptions) -> ConvertError:
    """The error of a job that must not work: one line and a way out."""
    with pytest.raises(Exception) as caught:
        convert(job)
    error = caught.value
    assert type(error).__module__ == "exl_runtime.errors", error
    assert "\n" not in error.problem and len(error.problem) < 400
    assert error.hint is None or "\n" not in error.hint
    return error


def interrupt(*args: Any, **kwargs: Any) -> None:
    """In place of a stage: the job ends there."""
    raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, bytes]:
    """File name -> content of the weight files of a folder, and of its config.json."""
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {path.name: path.read_bytes() for path in files}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def files_under(*folders: Path) -> dict[str, bytes]:
    """Every finished file: what is half-written, scratch, or a lock is left out."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and ".partial" not in str(path) and "scratch" not in path.parts and path.name != ".lock":
                found[str(path.relative_to(folder.parent))] = path.read_bytes()
    return found


@contextmanager
def in_a_hurry() -> Iterator[None]:
    """Measure fewer group sizes, tune for a few steps, leave flushing to the system: nothing that is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for bits, sizes in FEW_SIZES.items():
            patch.setitem(measure.GROUP_SIZES, bits, sizes)
        patch.setattr(tuning, "tune", partial(tune, steps=8))
        patch.setattr(tuning, "GUARD_TOKENS", 0)
        patch.setattr(encoding, "tune_layer", partial(blocktune.tune_layer, steps=4))
        patch.setattr(blocktune, "LEAST_GUARD_TOKENS", 0)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


# --- a disk to be watched ---------------------------------------------------------------------------------------------


class Disk:
    """Sees every change that the program makes to files while it is in place (`with disk:`).

    before  called before every change with what it is: "write", "reserve", "create", "name", "remove", "folder"
    dirty   paths whose content was not flushed since it was written: a power cut would lose it
    """

    KINDS = {  # noqa: RUF012
        "write": "write",
        "pwrite": "write",
        "posix_fallocate": "reserve",
        "replace": "name",
        "rename": "name",
        "unlink": "remove",
        "rmdir": "remove",
        "mkdir": "folder",
        "open": "create",
    }

    def __init__(self, before: Callable[[str], None] = lambda kind: None) -> None:
        self.before = before
        self.dirty: set[str] = set()
        self._real: dict[str, Any] = {}
        self._open: dict[int, str] = {}
        self._busy = False

    def __enter__(self) -> "Disk":
        for name in (*self.KINDS, "fsync"):
            self._real[name] = getattr(os, name)
            setattr(os, name, self._watched(name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)

    def _watched(self, name: str) -> Callable[..., Any]:
        real, kind = self._real[name], self.KINDS.get(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._busy or (name == "write" and args[0] < 3):
                return real(*args, **kwargs)
            if name == "open" and not args[1] & os.O_CREAT:
                self._open.pop(found := real(*args, **kwargs), None)
                return found
            if kind is not None:
                self._busy = True
                try:
                    self.before(kind)
                finally:
                    self._busy = False
            result = real(*args, **kwargs)
            self._follow(name, args, result)
            return result

        return call

    def _follow(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self._open[result] = os.path.abspath(args[0])
        elif name in ("write", "pwrite", "posix_fallocate") and args[0] in self._open:
            self.dirty.add(self._open[args[0]])
        elif name == "fsync":
            self.dirty.discard(self._open.get(args[0], ""))
        elif name == "replace":
            source, target = map(os.path.abspath, args[:2])
            for descriptor, path in self._open.items():
                if path == source:
                    self._open[descriptor] = target
            if source in self.dirty:
                self.dirty = self.dirty - {source} | {target}


def snapshots(root: Path, store: Path, work: Callable[[], object]) -> list[Path]:
    """Run `work`; copies of `root` as a power cut would leave it, one for every set of finished files there was.

    What has not got its name yet is cut in half, what was written and not flushed is garbage.
    """
    found: dict[int, int] = {}

    def before(kind: str) -> None:
        if kind not in ("name", "remove"):
            return
        number = found.setdefault(hash(repr(sorted(files_under(root).items()))), len(found))
        place = store / f"{number:03d}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root, place)
        for half in place.rglob("*.partial"):
            if half.is_file():
                os.truncate(half, half.stat().st_size // 2)
        for path in disk.dirty:
            lost = place / os.path.relpath(path, root)
            if lost.is_file():
                lost.write_bytes(bytes(lost.stat().st_size // 2))

    store.mkdir(parents=True)
    disk = Disk(before)
    with disk:
        work()
    return [store / f"{number:03d}" for number in range(len(found))]


def restore(snapshot: Path, root: Path) -> None:
    """Put a snapshot where it was taken."""
    shutil.rmtree(root)
    shutil.copytree(snapshot, root)


def full(kinds: tuple[str, ...] = ("write", "reserve"), allowed: int = 0) -> Disk:
    """A disk with no room left after `allowed` changes of these kinds."""
    left = allowed

    def before(kind: str) -> None:
        nonlocal left
        if kind in kinds:
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return Disk(before)


def interrupted(names: int, error: type[BaseException] = KeyboardInterrupt) -> Disk:
    """Ctrl-C when a file is about to get its name, after `names` that got theirs."""
    left = names

    def before(kind: str) -> None:
        nonlocal left
        if kind == "name":
            left -= 1
            if left < 0:
                raise error

    return Disk(before)

"""Where this user's packed models are kept: beside the built kernels, in `packed`."""

from ..checkpoint.packed import PackedCache, PackedFolder
from ..ops import native

# Raise it when packing, in Python or in C++, makes other bytes of the same checkpoint and kPackedMagic stays:
# tests/runtime/test_packed_cache.py notices.
PACKING = 1


def packed_folder() -> PackedFolder:
    """The folder, to look at and to clear. Needs no kernels."""
    return PackedFolder(native.cache_folder() / native.PACKED)


def packed_cache() -> PackedCache:
    """The cache of packed models. Needs the native kernels: raises BackendUnavailable without them."""
    ops = native.ops()
    return PackedCache(
        native.cache_folder() / native.PACKED,
        checksum=ops.checksum,
        layout=f"{ops.packed_layout():x}.{PACKING}",
    )

"""When Python looks for garbage: not while many objects are made that all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["no_garbage_collection"]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No collection inside: each one would look again at all that was made before it.

    Nor does one come right after: what was made counts as old then, unless something is frozen.

    Measured: a third of the time to read a large prompt file, 0.7 of the 4.5 s of CPU time to
    import torch and transformers. The collection after it: 0.25 s for 100,000 prompts.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():
                gc.freeze()  # all that is there becomes old,
                gc.unfreeze()  # without being looked at
            gc.enable()

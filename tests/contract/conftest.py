"""Without a GPU, Triton's kernels run in its interpreter; that must be said before its import.

(transformers imports Triton on its own, so a test module would be too late.)
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

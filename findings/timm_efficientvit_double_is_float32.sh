#!/usr/bin/env bash
# A network of timm in double precision that computes its attention in single precision.
#
# Guess: after `model.double()`, on an image of float64, a network computes in float64, so that finite differences and
# second derivatives can be checked to ten digits and more.
# So is: EfficientViT of MIT casts queries, keys and values to float32 before its linear attention, whatever they were
# (the cast is there for half precision). The output is float64 again; only its last eight digits are noise. A gradient
# held against differences is off by 1e-7, and one looks for the fault in one's own code.
# Seen with timm 1.0.31, torch 2.14.1 on Python 3.11, on a CPU. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet 'torch==2.14.1' 'timm==1.0.31' 'numpy'
"$folder/env/bin/python" - <<'PYTHON'
from collections import Counter

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Types(TorchDispatchMode):
    """Count the operations that give float32."""

    def __init__(self):
        super().__init__()
        self.single = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.single[str(func)] += 1
        return out


def single(name):
    torch.manual_seed(0)
    model = timm.create_model(name).double().eval()
    with torch.no_grad(), Types() as seen:
        out = model(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    print(f"{name}: output {out.dtype}, {sum(seen.single.values())} operations in float32 {dict(seen.single)}")
    return sum(seen.single.values())


if single("resnet18") or not single("efficientvit_b0"):
    raise SystemExit("EfficientViT computes in float64 now: this finding is out of date")
PYTHON

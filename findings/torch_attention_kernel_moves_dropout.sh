#!/usr/bin/env bash
# With one seed, dropout behind attention drops other units, depending on the kernel that attention took.
#
# Guess: the kernels of `scaled_dot_product_attention` give equal values up to rounding, so with one seed a network with
# dropout behind attention gives equal outputs too, whichever kernel is chosen.
# So is: of queries that are transposed, as attention layers make them, the fused kernel gives an output that lies in
# memory as they do, the mathematical kernel one that is contiguous. Dropout draws in the order of memory: equal values
# in two layouts lose different units. Whoever computes a pass twice by two kernels, for instance because only the
# mathematical one has forward mode and double backward, gets two different functions, without a word.
# Seen with torch 2.14.1 on Python 3.11, on a CPU. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet 'torch==2.14.1' 'numpy'
"$folder/env/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
query = torch.randn(2, 5, 3, 4).transpose(1, 2)  # batch, heads, tokens, features
dropped, plain = {}, {}
for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
    with sdpa_kernel(kernel):
        plain[kernel] = F.scaled_dot_product_attention(query, query, query)
    torch.manual_seed(1)
    dropped[kernel] = F.dropout(plain[kernel], 0.5)
    print(f"{kernel.name}: strides {plain[kernel].stride()}, {int((dropped[kernel] == 0).sum())} units dropped")
fused, mathematical = plain.values()
torch.testing.assert_close(fused, mathematical)
other = ((dropped[SDPBackend.FLASH_ATTENTION] == 0) != (dropped[SDPBackend.MATH] == 0)).float().mean().item()
print(f"{100 * other:.0f} % of the units are dropped by one and kept by the other")
if fused.stride() == mathematical.stride() or not other:
    raise SystemExit("both kernels drop the same units now: this finding is out of date")
PYTHON

"""What is private in torch is used in one file, and torch is bounded for its sake."""

import ast
import re
from pathlib import Path

import pytest
import torch

from training.objectives.private_torch import (
    batch_norm_backward,
    batch_norm_forward,
    foreach_add,
    foreach_add_,
    foreach_lerp_,
    writes,
)

ROOT = Path(__file__).parents[3]
PRIVATE = ROOT / "training" / "objectives" / "private_torch.py"
UNDOCUMENTED = {"torch.native_batch_norm", "torch.ops"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute of an attribute of a name; "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def private(source: str) -> set[str]:
    """Names of torch in a file that begin with an underscore somewhere, and tensors' own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [dotted(node)] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            hidden = any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
            if name.startswith("torch.") and (hidden or name in UNDOCUMENTED):
                found.add(name)
        if isinstance(node, ast.Attribute) and node.attr == "_version":
            found.add("_version")
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._foreach_add(a, b)", {"torch._foreach_add"}),
        ("from torch._functorch import config", {"torch._functorch.config"}),
        ("from torch.overrides import _len_torch_function_stack", {"torch.overrides._len_torch_function_stack"}),
        ("import torch\ntorch._C.DisableTorchFunction()", {"torch._C", "torch._C.DisableTorchFunction"}),
        ("x.y()._version", {"_version"}),
        ("import torch\ntorch.ops.aten.add", {"torch.ops"}),
        ("import torch\ntorch.__version__, model._modules", set()),
    ],
)
def test_what_is_private_is_noticed(source, found):
    assert private(source) == found


def test_private_torch_is_in_one_file():
    files = {str(file.relative_to(ROOT)): private(file.read_text()) for file in (ROOT / "training").rglob("*.py")}
    assert {name for name, found in files.items() if found} == {str(PRIVATE.relative_to(ROOT))}


def test_torch_is_bounded_from_above():
    declared = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    least, bound = [tuple(map(int, declared.groups()[place : place + 2])) for place in (0, 2)]
    assert least <= tuple(map(int, torch.__version__.split(".")[:2])) < bound


def test_lists_of_tensors_and_batch_norm_are_what_their_names_say():
    values, others = ([torch.arange(3.0) + start for start in (0, 5)] for _ in range(2))
    before = writes(values[0])
    foreach_add_(values, others, alpha=2)
    assert writes(values[0]) > before
    assert torch.equal(values[1], 3 * others[1])
    assert torch.equal(foreach_add(values, others)[1], 4 * others[1])
    foreach_lerp_(values, others, 0.5)
    assert torch.equal(values[1], 2 * others[1])
    x_BC = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected_BC = torch.nn.functional.batch_norm(x_BC, None, None, training=True)
    out_BC, mean_C, scale_C = batch_norm_forward(x_BC, None, None, None, None, True, 0.1, 1e-5)
    torch.testing.assert_close(out_BC, expected_BC)
    slope_BC = torch.arange(12.0, dtype=torch.float64).view(6, 2)
    found_BC = batch_norm_backward(slope_BC, x_BC, None, None, None, mean_C, scale_C, True, 1e-5, [True, False, False])[
        0
    ]
    torch.testing.assert_close(found_BC, torch.autograd.grad(expected_BC, x_BC, slope_BC)[0])

"""The products of `pytest --products=other` are right, and their order depends on the rows."""

import subprocess
import sys
from pathlib import Path

CHECK = """
import torch, other_products
torch.manual_seed(0)
a, b, x = torch.randn(2, 6, 50).double(), torch.randn(2, 50, 4).double(), torch.randn(2, 6, 4)
x = x.double().requires_grad_()
wanted = [a @ b, a[0] @ b[0], 0.5 * x + 2 * (a @ b), 0.5 * x[0] + 2 * (a[0] @ b[0])]
other_products.install()

def products(a, b, x):
    yield torch.bmm(a, b)
    yield torch.mm(a[0], b[0])
    yield torch.baddbmm(x, a, b, beta=0.5, alpha=2)
    yield torch.addmm(x[0], a[0], b[0], beta=0.5, alpha=2)

for found, right in zip(products(a, b, x), wanted, strict=True):
    torch.testing.assert_close(found, right)
found.sum().backward()
assert x.grad[0].eq(0.5).all() and x.grad[1].eq(0).all()

out = torch.empty(4, 6).double().t()
assert torch.mm(a[0], b[0], out=out) is out
torch.testing.assert_close(out, wanted[1])
out.zero_().addmm_(a[0], b[0], beta=0)
torch.testing.assert_close(out, wanted[1])

turned = torch.randn(2, 3, dtype=torch.complex64)
torch.testing.assert_close(turned @ turned.conj().t(), (turned[:, None] * turned.conj()).sum(-1))

for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    many, weight = torch.randn(6, 1000).to(dtype), torch.randn(1000, 500).to(dtype)
    whole, part = torch.mm(many, weight), torch.mm(many[:1], weight)
    assert whole.dtype == dtype and (dtype.itemsize == 2 or not whole[:1].equal(part))
    torch.testing.assert_close(whole[:1], part, rtol=tolerance, atol=100 * tolerance)
"""


def test_products_are_right_and_depend_on_the_number_of_rows() -> None:
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

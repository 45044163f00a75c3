"""What only a CUDA device has: the variable-length kernel, and 16-bit products of the head."""

import pytest
import torch

from recipe.model import attention
from recipe.model.attention import per_row_sdpa
from recipe.training.head import _ChunkedNLL, _scale
from tests.model.test_attention import expected_with_openings, shared_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_rows_attend_to_their_own_and_their_opening(dtype, shared):
    tensors, lengths, openings, whole = shared_case()
    if not shared:
        openings = [0] * len(lengths)
        whole = torch.arange(13).split(lengths)
    ours = [t.to("cuda", dtype).requires_grad_() for t in tensors]
    exact = [t.detach().cpu().double().requires_grad_() for t in ours]
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    kernel = attention._has_varlen_kernel(ours[0].device, dtype, 8)
    assert kernel == (ampere and dtype != torch.float32)
    got, _ = per_row_sdpa(None, *ours, None, row_lengths=lengths, openings=openings, scaling=0.3)
    expected = expected_with_openings(exact, openings, whole)
    got.double().cpu().sum().backward()
    expected.sum().backward()
    near = {"rtol": 0, "atol": TOLERANCE[dtype] * 4}
    torch.testing.assert_close(got.double().cpu(), expected, **near)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad.double().cpu(), b.grad, **near)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_loss_in_chunks(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(32000, 256, generator=generator)
    hidden = torch.randn(4096, 256, generator=generator)
    labels = torch.randint(32000, (4096,), generator=generator).cuda()
    ours = hidden.to("cuda", dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    matrix = weight.to("cuda", dtype)
    got = _ChunkedNLL.apply(ours, matrix, None, labels, _scale(matrix), (1024, 32000))
    expected = torch.nn.functional.cross_entropy(exact @ matrix.double().T, labels)
    got.mean().backward()
    expected.backward()
    assert float(got.double().mean() - expected) == pytest.approx(0, abs=TOLERANCE[dtype])
    error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert float(error) < 5 * TOLERANCE[dtype]

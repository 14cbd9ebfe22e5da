"""Call the masked low-rank projection and compare it with its formula.

    python examples/call_a_kernel.py

CPU tensors run the plain expression, CUDA tensors the vendor's GEMM and the update kernels.
"""

import torch

from slideredit_rt import kernels


def main() -> None:
    """Scale the update of one slider's rows, and leave the others frozen."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, rows, inner, outer, rank = 2, 32, 256, 512, 16
    torch.manual_seed(0)

    x = torch.randn(batch, rows, inner, device=device, dtype=dtype)
    weight = torch.randn(outer, inner, device=device, dtype=dtype) / inner**0.5
    bias = torch.randn(outer, device=device, dtype=dtype)
    lora_a = torch.randn(rank, inner, device=device, dtype=dtype) / inner**0.5
    lora_b = torch.randn(outer, rank, device=device, dtype=dtype) / rank**0.5

    # Two sliders: rows 0 to 3 at alpha 0.5, rows 8 to 11 at alpha -0.25. The scales stay float32.
    alpha = torch.tensor([[0.5, -0.25]], device=device).expand(batch, 2)
    token_mask = torch.zeros(batch, 2, rows, dtype=torch.bool, device=device)
    token_mask[:, 0, 0:4] = token_mask[:, 1, 8:12] = True
    row_scale = torch.einsum("bk,bks->bs", alpha, token_mask.float())

    y = kernels.masked_lora_linear(x, weight, bias, lora_a, lora_b, row_scale)

    wide = [t.double() for t in (x, weight, bias, lora_a, lora_b, row_scale)]
    x_, w_, bias_, a_, b_, scale_ = wide
    formula = x_ @ w_.T + bias_ + scale_[..., None] * (x_ @ a_.T) @ b_.T
    error = (y.double() - formula).norm() / formula.norm()
    frozen = torch.nn.functional.linear(x, weight, bias)
    print(f"{device} {dtype}: relative error {error:.1e}")
    print(f"rows without a slider equal the frozen projection bit for bit: {torch.equal(y[:, 16:], frozen[:, 16:])}")
    assert error < (1e-2 if dtype is torch.bfloat16 else 1e-5)


if __name__ == "__main__":
    main()

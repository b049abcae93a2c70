"""The two ends of a channel, and messages of every kind."""

from __future__ import annotations

import signal

import torch
from torch import Tensor

from ds_ddg.comm import sender as outboxes
from ds_ddg.comm.message import INLINE_BYTES, Kind
from ds_ddg.comm.receiver import Receiver
from ds_ddg.comm.sender import Sender
from helpers.distributed import Outcome

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def close(outbox: Sender, inbox: Receiver) -> None:
    inbox.listen()
    outbox.flush()
    inbox.take(Kind.FLUSH)
    outboxes.INLINE_BYTES = INLINE_BYTES


def assert_same(got: tuple[Tensor | None, ...], sent: tuple[Tensor | None, ...]) -> None:
    assert len(got) == len(sent)
    for received, original in zip(got, sent, strict=True):
        if original is None or received is None:
            assert received is original
        else:
            assert received.dtype == original.dtype
            assert torch.equal(received, original.detach())


def samples() -> list[tuple[Tensor | None, ...]]:
    """Return a message for each thing that could get lost on the way; the same on both ranks."""
    torch.manual_seed(5)
    base = torch.randn(3, 4)
    values = 100 * torch.randn(3, 5, dtype=torch.complex128)
    each = [values.to(dtype) if dtype.is_complex else values.real.abs().to(dtype) for dtype in DTYPES]
    return [
        *((tensor,) for tensor in each),
        tuple(each),
        tuple(tensor[0, 0] for tensor in each),  # 0-dim
        (torch.empty(0), torch.empty(2, 0, 3, dtype=torch.int64)),
        (base.t(), base[:, ::2], base.expand(2, 3, 4), base[1:2, 1:1]),
        (torch.nn.Parameter(base), (base.requires_grad_() * 2)),
        (torch.tensor([1 + 2j, 3 - 4j]).conj(), torch.tensor([1 + 2j, 3 - 4j]).conj().imag),  # lazy in torch
        (torch.tensor([float("nan"), float("inf"), -0.0]).nan_to_num(7.0),),
        (None, base, None),
        (None,),
        (),
    ]


def survivor(outcomes: list[Outcome]) -> Outcome:
    first, killed = outcomes
    assert killed.state == "died"
    assert killed.exit_code == -signal.SIGKILL
    assert (first.state, first.exc_type) == ("raised", "StageError"), str(first)
    assert first.message.startswith("stage 1 (rank 1) is lost: ")
    return first

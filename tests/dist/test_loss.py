"""The vocab-parallel loss on real tensor ranks against a plain fp64 reference, and the memory that it takes."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.distributed import run_distributed

TOKENS, HIDDEN, ROWS, VOCAB = 1100, 16, 64, 57
"""More than a chunk of tokens; the table has 7 rows of padding, all on the last rank."""


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [N, H], table [V, H], targets [N]) in fp64; a fifth of the targets is none."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    table = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[::5] = -100
    return hidden, table, targets


def plain(z_loss: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, gradient of the hidden states, gradient of the table), all logits at once, in one process."""
    hidden, table, targets = example()
    hidden.requires_grad_(), table.requires_grad_()
    logits = hidden @ table[:VOCAB].T
    real = targets != -100
    loss = F.cross_entropy(logits[real], targets[real], reduction="sum")
    loss = loss + z_loss * logits[real].logsumexp(dim=1).square().sum()
    return (loss.detach(), *torch.autograd.grad(loss * 0.5, (hidden, table)))


def parallel(z_loss: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """On a rank: the same with this rank's rows; the hidden states' gradient summed over the ranks, as the head does."""
    import torch.distributed as dist

    from megacm3.model.loss import chunked_loss

    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    hidden, table, targets = example()
    hidden = hidden.to(dtype).requires_grad_()
    rows = ROWS // world
    mine = table[rank * rows : (rank + 1) * rows].to(dtype).requires_grad_()
    keys = {"vocab_size": VOCAB, "z_loss": z_loss, "group": dist.group.WORLD, "world": world, "rank": rank}
    loss, _, _ = chunked_loss(hidden, mine, targets, **keys)
    grad_hidden, grad_table = torch.autograd.grad(loss * 0.5, (hidden, mine))
    dist.all_reduce(grad_hidden)
    return loss.detach(), grad_hidden, grad_table


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_are_the_plain_ones(world: int, z_loss: float, dtype: torch.dtype, tolerance: float) -> None:
    expected, expected_hidden, expected_table = plain(z_loss)
    ranks = run_distributed(parallel, world, z_loss=z_loss, dtype=dtype)
    for loss, grad_hidden, _ in ranks:
        assert float(loss) == pytest.approx(float(expected), rel=tolerance)
        assert float((grad_hidden.double() - expected_hidden).norm() / expected_hidden.norm()) < tolerance
    table = torch.cat([grad for _, _, grad in ranks]).double()
    assert float((table - expected_table).norm() / expected_table.norm()) < tolerance
    assert not table[VOCAB:].any(), "padding rows never count"


def peak(tokens: int) -> tuple[int, int]:
    """On a rank: (bytes that the process grew by at its highest, bytes of the whole logits) for `tokens` positions."""
    import resource

    import torch.distributed as dist

    from megacm3.model.loss import chunked_loss

    dist.init_process_group("gloo")
    world, rank, vocab, width = dist.get_world_size(), dist.get_rank(), 65536, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    table = torch.randn(vocab // world, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = {"vocab_size": vocab, "z_loss": 1e-5, "group": dist.group.WORLD, "world": world, "rank": rank}
    chunked_loss(hidden, table, targets, **keys)[0].backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return grown, tokens * vocab // world * 4


def test_logits_never_exist_whole() -> None:
    """4,096 tokens x 65,536 ids on two ranks: logits of 512 MiB a rank. What a rank grows by is chunks of a quarter."""
    for grown, logits in run_distributed(peak, 2, tokens=4096):
        assert logits == 512 * 2**20
        # A chunk of logits, its copy for the gradient's product, and a mask: 1,024 of the 4,096 tokens each.
        assert grown < 0.65 * logits, f"{grown / 2**20:.0f} MiB"

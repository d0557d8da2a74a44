"""Codes, values, losses and learning of the quantisers, beside vector-quantize-pytorch, SciPy and work by hand."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier.core import ranks
from atelier.core.errors import UserError
from atelier.nets import quantizers
from atelier.nets.quantizers import FSQ, VectorQuantizer, kmeans, nearest, perplexity, seeds


def made(
    n_codes: int = 16,
    dim: int = 3,
    update: Any = "ema",
    ema_decay: float = 0.9,
    commitment_weight: float = 0.25,
    kmeans_init: bool = False,
    dead_code_threshold: float = 0.0,
) -> VectorQuantizer:
    given = {
        "update": update,
        "ema_decay": ema_decay,
        "commitment_weight": commitment_weight,
        "kmeans_init": kmeans_init,
        "dead_code_threshold": dead_code_threshold,
    }
    return VectorQuantizer(n_codes=n_codes, dim=dim, **given)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Beside vector-quantize-pytorch


def twins(n_codes: int, dim: int) -> tuple[VectorQuantizer, nn.Module]:
    """Ours and theirs, with one codebook."""
    reason = "the comparison needs vector-quantize-pytorch"
    theirs = pytest.importorskip("vector_quantize_pytorch", reason=reason).VectorQuantize(
        dim=dim,
        codebook_size=n_codes,
        decay=0.9,
        eps=1e-5,
        commitment_weight=0.25,
        threshold_ema_dead_code=0,
        accept_image_fmap=True,
        rotation_trick=False,
    )
    ours = made(n_codes, dim)
    start = torch.randn(n_codes, dim)
    for name, value in (("codebook", start), ("sums", start)):
        getattr(ours, name).copy_(value)
    theirs._codebook.embed.copy_(start[None])
    theirs._codebook.embed_avg.copy_(start[None])
    return ours.train(), theirs.train()


def test_steps_agree_with_the_library() -> None:
    """Values, codes, loss, gradient and codebook over several steps of training."""
    ours, theirs = twins(16, 3)
    for _ in range(5):
        z = torch.randn(4, 3, 5, 6)
        mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        quantized, (values, codes, loss) = ours(mine), theirs(other)
        assert torch.equal(quantized.codes, codes)
        torch.testing.assert_close(quantized.z, values, atol=1e-6, rtol=0)
        torch.testing.assert_close(quantized.loss, loss.squeeze(), atol=1e-6, rtol=1e-6)
        weight = torch.randn_like(z)
        ((quantized.z * weight).sum() + quantized.loss).backward()
        ((values * weight).sum() + loss.squeeze()).backward()
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.counts, theirs._codebook.cluster_size[0], atol=1e-5, rtol=1e-5)
    chosen = torch.randint(16, (2, 3, 3))
    torch.testing.assert_close(ours.embed(chosen), theirs.get_codes_from_indices(chosen), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("levels", [[8, 6, 5], [7, 5, 5, 5], [3, 4]])
def test_fsq_agrees_with_the_library(levels: list[int]) -> None:
    library = pytest.importorskip("vector_quantize_pytorch", reason="the comparison needs vector-quantize-pytorch")
    ours, theirs = FSQ(levels=levels), library.FSQ(levels)
    z = 3 * torch.randn(4, len(levels), 9, 8)
    mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, (values, codes) = ours(mine), theirs(other)
    assert torch.equal(quantized.codes, codes.long()) and quantized.loss == 0
    torch.testing.assert_close(quantized.z, values, atol=1e-6, rtol=0)
    quantized.z.square().sum().backward()
    values.square().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.embed(codes.long()), theirs.indices_to_codes(codes), atol=1e-6, rtol=0)


# Vector quantisation by hand


def test_the_nearest_entry() -> None:
    vectors, centres = 100 + torch.randn(500, 4), 100 + torch.randn(30, 4)
    assert torch.equal(nearest(vectors, centres), torch.cdist(vectors.double(), centres.double()).argmin(1))


def test_the_value_is_the_entry_itself_and_the_gradient_goes_straight_through() -> None:
    quantizer = made(commitment_weight=0.0).eval()
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    quantized = quantizer(z)
    assert torch.equal(quantized.z, quantizer.embed(quantized.codes))
    weight = torch.randn_like(z)
    (quantized.z * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_a_gradient_step_by_hand() -> None:
    """The mean of (z - e)^2 has d/de = 2 sum (e - z) / (N D) over the vectors of e, and d/dz = 2 (z - e) / (N D)."""
    quantizer = made(n_codes=2, dim=2, update="gradient", commitment_weight=0.5).train()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [4.0, 4.0]]))
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 4.0]]).T[None, :, :, None].requires_grad_()
    quantized = quantizer(z)
    assert quantized.codes.flatten().tolist() == [0, 0, 1]
    assert quantized.loss.item() == pytest.approx(1.5 * (1 + 4 + 1) / 6)
    quantized.loss.backward()
    expected = 2 / 6 * torch.tensor([[-1.0, -2.0], [-1.0, 0.0]])
    torch.testing.assert_close(quantizer.codebook.grad, expected)
    torch.testing.assert_close(z.grad[0, :, :, 0].T, 0.5 * 2 / 6 * torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]))
    torch.testing.assert_close(quantizer.counts, 0.9 * torch.ones(2) + 0.1 * torch.tensor([2.0, 1.0]))


def test_the_running_means_have_no_gradient() -> None:
    quantizer = made().train()
    assert not list(quantizer.parameters())
    assert quantizer(torch.randn(1, 3, 2, 2, requires_grad=True)).loss.requires_grad


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_it_learns_in_train_mode_only(update: str) -> None:
    quantizer = made(update=update, kmeans_init=True, dead_code_threshold=1.0).eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.randn(4, 3, 4, 4))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    quantizer.train()(torch.randn(4, 3, 4, 4))
    assert all(not torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_all_it_knows_is_saved(update: str) -> None:
    """A quantiser that goes on from a saved one does the same, k-means start and revivals included."""
    first = made(update=update, kmeans_init=True, dead_code_threshold=1.0, ema_decay=0.5).train()
    batches = [torch.randn(4, 3, 4, 4) for _ in range(6)]
    for z in batches[:3]:
        first(z)
    second = made(update=update, kmeans_init=True, dead_code_threshold=1.0, ema_decay=0.5).train()
    second.load_state_dict(first.state_dict())
    for quantizer in (first, second):
        torch.manual_seed(1)
        for z in batches[3:]:
            quantizer(z)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_distances_and_statistics_are_float32_under_bf16() -> None:
    z = torch.randn(8, 3, 16, 16)
    plain, cast = made(64).train(), made(64).train()
    with torch.no_grad():
        plain.codebook.normal_()
        cast.codebook.copy_(plain.codebook)
    expected = plain(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z[0, 0] @ z[0, 0]).dtype == torch.bfloat16  # it is on
        quantized = cast(z)
        low = cast(z.bfloat16())
    assert torch.equal(quantized.codes, expected.codes)
    assert {quantized.z.dtype, quantized.loss.dtype, low.z.dtype, low.loss.dtype} == {torch.float32}
    assert {cast.codebook.dtype, cast.counts.dtype, cast.sums.dtype} == {torch.float32}


def test_usage_is_the_running_share() -> None:
    quantizer = made(n_codes=2, dim=1, ema_decay=0.0).train()
    quantizer.codebook.copy_(torch.tensor([[0.0], [1.0]]))
    quantizer(torch.tensor([0.1, 0.2, -0.1, 0.9]).view(1, 1, 2, 2))
    torch.testing.assert_close(quantizer.usage(), torch.tensor([0.75, 0.25]))
    assert FSQ(levels=[3, 5]).usage().tolist() == pytest.approx([1 / 15] * 15)


# Starting from k-means, coming back to life

CENTRES = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0], [30.0, 5.0]])


def toy(n: int = 40) -> Tensor:
    """n vectors round each of five centres, shuffled, as a map (1, 2, 5 n, 1)."""
    vectors = CENTRES.repeat(n, 1) + 0.1 * torch.randn(5 * n, 2)
    return vectors[torch.randperm(5 * n)].T[None, :, :, None]


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_it_starts_on_the_centres_of_clusters(update: str) -> None:
    quantizer = made(n_codes=5, dim=2, update=update, kmeans_init=True).train()
    assert not quantizer.started
    quantizer(toy())
    found = quantizer.codebook.detach()
    assert quantizer.started
    assert torch.cdist(CENTRES, found).min(1).values.max() < 0.1
    assert quantizer.counts.tolist() == [40] * 5
    before = found.clone()
    quantizer(50 + torch.randn(1, 2, 6, 1))  # far away: it does not start again
    assert torch.cdist(before, quantizer.codebook.detach()).min(1).values.sort().values[:4].max() < 0.05


def test_lloyds_steps_agree_with_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.cluster.vq import kmeans2

    vectors = torch.randn(400, 3)
    monkeypatch.setattr(quantizers, "seeds", lambda vectors, n: vectors[:n].clone())
    centres, counts = kmeans(vectors, 12)
    expected, labels = kmeans2(vectors.numpy(), vectors[:12].numpy(), iter=quantizers.LLOYD_STEPS, minit="matrix")
    torch.testing.assert_close(centres, torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    assert counts.tolist() == torch.from_numpy(labels).long().bincount(minlength=12).tolist()


def test_starting_from_kmeans_brings_the_codes_nearer() -> None:
    z = torch.randn(8, 3, 8, 8)
    started = made(kmeans_init=True, commitment_weight=1.0).train()
    started(z)
    random = made(commitment_weight=1.0)
    random.codebook.copy_(torch.randn(16, 3))
    assert started.eval()(z).loss < 0.6 * random.eval()(z).loss


def test_seeds_are_vectors_and_none_is_taken_twice() -> None:
    vectors = torch.randn(30, 2)
    found = seeds(vectors, 30)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, vectors.tolist()))
    assert len(seeds(vectors[:3], 10)) == 10  # fewer vectors than codes


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_start_anew_where_the_vectors_are(update: str) -> None:
    alive = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    quantizer = made(n_codes=4, dim=2, update=update, dead_code_threshold=0.95).train()
    without = made(n_codes=4, dim=2, update=update).train()
    for one in (quantizer, without):
        with torch.no_grad():
            one.codebook.copy_(torch.cat([alive, torch.tensor([[90.0, 0.0], [0.0, 90.0]])]))
            if update == "ema":
                one.sums.copy_(one.codebook)
    z = torch.rand(1, 2, 40, 1)
    quantizer(z)
    without(z)
    codebook, vectors = quantizer.codebook.detach(), z[0, :, :, 0].T
    assert torch.equal(codebook[:2], without.codebook.detach()[:2])
    assert torch.cdist(codebook[2:], vectors).min(1).values.max() == 0
    assert not torch.equal(codebook[2], codebook[3])
    assert quantizer.counts[2:].tolist() == pytest.approx([1.9, 1.9])
    if update == "ema":
        torch.testing.assert_close(quantizer.sums[2:], 1.9 * codebook[2:])
    quantizer(torch.rand(1, 2, 40, 1))
    assert quantizer.codebook.detach().max() < 1.1  # nothing of the old sums is left
    assert (quantizer.usage()[2:] > 0).all()


# Two ranks


def on_two_ranks(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], None]) -> None:
    """work(rank) in two threads whose exchanges wait for each other, as processes' would."""
    mine, barrier, slots = threading.local(), threading.Barrier(2), [Tensor(), Tensor()]

    def summed(x: Tensor) -> Tensor:
        slots[mine.rank] = x
        barrier.wait(timeout=20)
        total = slots[0] + slots[1]
        barrier.wait(timeout=20)
        return total

    def rank(number: int) -> None:
        mine.rank = number
        try:
            work(number)
        finally:
            barrier.abort() if barrier.n_waiting else None

    monkeypatch.setattr(ranks, "summed", summed)
    monkeypatch.setattr(ranks, "from_first", lambda x: x if mine.rank == 0 else torch.zeros_like(x))
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_two_ranks_learn_what_one_learns_from_both_halves(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the k-means start on, here from the first vectors there are."""
    monkeypatch.setattr(quantizers, "seeds", lambda vectors, n: vectors[:n].clone())
    whole = made(update=update, kmeans_init=True).train()
    pair = [copy.deepcopy(whole) for _ in range(2)]
    batches = [torch.randn(6, 3, 4, 4) for _ in range(4)]
    for z in batches:
        whole(z)

    def work(rank: int) -> None:
        for z in batches:
            pair[rank](z[3 * rank : 3 * rank + 3])

    on_two_ranks(monkeypatch, work)
    for name, value in whole.state_dict().items():
        assert torch.equal(pair[0].state_dict()[name], pair[1].state_dict()[name])
        torch.testing.assert_close(pair[0].state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_two_ranks_start_and_revive_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other vectors and with other random numbers on each: what rank 0 chooses counts."""
    pair = [made(kmeans_init=True, dead_code_threshold=3.0, ema_decay=0.5).train() for _ in range(2)]
    batches = [[torch.randn(3, 3, 3, 3) + 3 * rank for _ in range(4)] for rank in range(2)]
    places = []
    inner = VectorQuantizer._revive

    def revive(self: VectorQuantizer, at: Tensor) -> None:
        dead = self.counts < 3.0
        inner(self, at)
        places.append(self.codebook[dead])

    monkeypatch.setattr(VectorQuantizer, "_revive", revive)
    on_two_ranks(monkeypatch, lambda rank: [pair[rank](z) for z in batches[rank]])
    first, second = (quantizer.state_dict() for quantizer in pair)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert pair[0].started and first["counts"].sum() > 16
    zeroth = torch.cat([z.movedim(1, 3).flatten(0, 2) for z in batches[0]])
    revived = torch.cat(places)
    assert len(revived) and (revived[:, None] == zeroth).all(2).any(1).all()


# Finite scalar quantisation


@pytest.mark.parametrize("levels", [[8, 6, 5], [2, 3], [4], [2, 2, 2]])
def test_every_code_of_fsq_can_be_reached_and_undone(levels: list[int]) -> None:
    quantizer = FSQ(levels=levels)
    assert quantizer.n_codes == math.prod(levels) and quantizer.dim == len(levels)
    codes = torch.arange(quantizer.n_codes).view(1, 1, -1)
    z = quantizer.latents(codes)
    assert z.isfinite().all()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes, codes)
    assert torch.equal(quantized.z, quantizer.embed(codes))
    assert len(quantized.z[0, :, 0].T.unique(dim=0)) == quantizer.n_codes
    assert quantized.z.abs().max() == 1


def test_fsq_by_hand() -> None:
    """Three levels are -1, 0, 1 of round(1.001 tanh z); the first channel counts fastest."""
    z = torch.tensor([[-3.0, 0.2, 3.0], [3.0, -0.3, -3.0]])[None, :, :, None]
    quantized = FSQ(levels=[3, 5])(z)
    assert quantized.z[0, :, :, 0].tolist() == [[-1, 0, 1], [1, -0.5, -1]]
    assert quantized.codes.flatten().tolist() == [0 + 3 * 4, 1 + 3 * 1, 2 + 3 * 0]


def test_fsq_has_no_state_and_no_weights() -> None:
    quantizer = FSQ(levels=[3, 5])
    assert not quantizer.state_dict() and not list(quantizer.parameters())


@pytest.mark.parametrize("levels", [[3, 1], []])
def test_a_channel_of_one_level_is_refused(levels: list[int]) -> None:
    with pytest.raises(UserError, match=r"Fix: .levels=\[8,6,5\]"):
        FSQ(levels=levels)


# How many codes are in use


@pytest.mark.parametrize(("codes", "expected"), [([0, 1, 2, 3], 4.0), ([2, 2, 2], 1.0), ([0, 0, 1, 3], 2**1.5)])
def test_perplexity_in_closed_form(codes: list[int], expected: float) -> None:
    assert perplexity(torch.tensor(codes), 4).item() == pytest.approx(expected, rel=1e-6)

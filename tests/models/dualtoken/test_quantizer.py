import copy
from dataclasses import replace

import pytest
import torch

from spar.common.errors import InputError
from spar.models.dualtoken.config import QuantizerConfig
from spar.models.dualtoken.quantizer import ResidualQuantizer, nearest

SHARED = QuantizerConfig(depth=3, entries=16, width=4, codebook="shared", decay=0.9)
PER_DEPTH = replace(SHARED, codebook="per_depth")
both = pytest.mark.parametrize("config", [SHARED, PER_DEPTH], ids=["shared", "per_depth"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gumbel(*shape: int, seed: int = 0) -> torch.Tensor:
    return -torch.rand(shape, generator=torch.Generator().manual_seed(seed)).log().neg().log()


def filled(config: QuantizerConfig, seed: int = 1) -> ResidualQuantizer:
    """A quantiser in mid-training: every entry is used by as many vectors."""
    quantizer = ResidualQuantizer(config)
    quantizer.codebook.copy_(draw(*quantizer.codebook.shape, seed=seed))
    quantizer.counts.fill_(1.0)
    quantizer.sums.copy_(quantizer.codebook)
    return quantizer


@both
def test_codes_are_the_nearest_entries_of_the_residuals_one_depth_after_the_other(config):
    quantizer, x = filled(config), draw(5, 7, 4)
    codes, residual = quantizer.encode(x), x
    for depth in range(3):
        table = quantizer.codebook[0 if config.codebook == "shared" else depth]
        distances = (residual[..., None, :] - table).square().sum(-1)
        assert torch.equal(codes[..., depth], distances.argmin(-1))
        residual = residual - table[codes[..., depth]]
    assert codes.dtype == torch.int64 and codes.shape == (5, 7, 3)
    torch.testing.assert_close(quantizer.decode(codes) + residual, x)          # the residual identity


def test_the_nearest_entry_is_found_in_chunks(monkeypatch):
    monkeypatch.setattr("spar.models.dualtoken.quantizer.MAX_DISTANCES", 40)
    x, table = draw(33, 4), draw(16, 4, seed=1)
    assert torch.equal(nearest(x, table), torch.cdist(x, table).argmin(1))


@both
def test_running_sums_are_the_quantised_vectors_of_the_first_depths(config):
    quantizer = filled(config)
    codes = quantizer.encode(draw(6, 4))
    for depth in (1, 2, 3):
        torch.testing.assert_close(quantizer.partial_sums(codes)[:, depth - 1], quantizer.decode(codes[:, :depth]))


def test_the_gradient_goes_straight_through_and_the_value_is_exactly_that_of_the_codes():
    quantizer, x = filled(SHARED), draw(6, 4).requires_grad_()
    out, wanted = quantizer(x), draw(6, 4, seed=2)
    assert torch.equal(out.vectors, quantizer.decode(out.codes))
    (out.vectors * wanted).sum().backward()
    torch.testing.assert_close(x.grad, wanted)


def test_commitment_pulls_the_input_to_each_partial_sum():
    quantizer, x = filled(PER_DEPTH), draw(6, 4).requires_grad_()
    out = quantizer(x)
    partial = quantizer.partial_sums(out.codes)
    torch.testing.assert_close(out.commitment, torch.stack([(x - p).square().mean() for p in partial.unbind(1)]).mean())
    out.commitment.backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() - partial.mean(1)) / x.numel())


@both
def test_codes_of_training_are_those_of_evaluation_until_the_step_ends(config):
    quantizer, x = filled(config), draw(40, 4)
    before = quantizer.encode(x)
    training = [quantizer.train()(x, gumbel(40, 3)).codes, quantizer.eval()(x).codes, quantizer(x, gumbel(40, 3)).codes]
    assert all(torch.equal(codes, before) for codes in training)
    quantizer.update()
    assert not torch.equal(quantizer.encode(x), before)


@both
def test_the_average_moves_once_a_step(config):
    quantizer, x = filled(config), draw(200, 4)
    old, codes = quantizer.codebook.clone(), quantizer.encode(x)
    quantizer(x, gumbel(200, 3))
    quantizer.update()
    for table in range(len(old)):
        depths = range(3) if config.codebook == "shared" else [table]
        before = [x, *(x - quantizer_sum(old, codes, depth) for depth in (1, 2))]
        for entry in range(16):
            members = torch.cat([before[depth][codes[:, depth] == entry] for depth in depths])
            count = 0.9 * 1 + 0.1 * len(members)
            wanted = (0.9 * old[table, entry] + 0.1 * members.sum(0)) / count
            torch.testing.assert_close(quantizer.counts[table, entry], torch.tensor(count))
            torch.testing.assert_close(quantizer.codebook[table, entry], wanted, rtol=1e-3, atol=1e-4)


def quantizer_sum(codebook: torch.Tensor, codes: torch.Tensor, depths: int) -> torch.Tensor:
    """The sum of the entries of the first depths, written apart from the quantiser."""
    return sum(codebook[depth % len(codebook)][codes[:, depth]] for depth in range(depths))


@both
def test_an_entry_that_nothing_uses_becomes_a_vector_of_the_step(config):
    quantizer, x = filled(config), draw(100, 4)
    quantizer.codebook[:, 5] = 1e3                                             # far from every vector
    quantizer.counts[:, 5] = 0.04
    before = quantizer.codebook.clone()
    quantizer(x, gumbel(100, 3))
    codes = quantizer.encode(x)
    residuals = {0: x, **{depth: x - quantizer_sum(before, codes, depth) for depth in (1, 2)}}
    quantizer.update()
    for table in range(len(before)):
        depths = range(3) if config.codebook == "shared" else [table]
        pool = torch.cat([residuals[depth] for depth in depths])
        assert (pool - quantizer.codebook[table, 5]).abs().sum(1).min() < 1e-6
        assert 0 < quantizer.counts[table, 5] <= 1
    assert torch.isfinite(quantizer.codebook).all()


def test_a_quantiser_without_entries_takes_them_from_its_first_step_and_learns():
    quantizer, x = ResidualQuantizer(replace(PER_DEPTH, entries=64)), draw(500, 4)
    errors = []
    for step in range(30):
        out = quantizer(x, gumbel(500, 3, seed=step))
        errors.append(float((x - out.vectors).square().mean()))
        quantizer.update()
    assert errors[0] == pytest.approx(float(x.square().mean()))                # all entries are zero
    assert errors[-1] < 0.01
    used = [len(quantizer.encode(x)[:, depth].unique()) for depth in range(3)]
    assert min(used) >= 60


def test_vectors_of_large_error_are_likelier_to_become_entries():
    quantizer = ResidualQuantizer(QuantizerConfig(depth=1, entries=10, width=2))
    x = torch.cat([torch.zeros(990, 2) + 1e-3 * draw(990, 2), draw(10, 2) + 5])
    quantizer(x, gumbel(1000, 1))
    quantizer.update()
    assert (quantizer.codebook[0].norm(dim=1) > 1).sum() >= 8


@both
def test_processes_and_micro_batches_together_make_the_step_of_one(config):
    x, noise = draw(120, 4), gumbel(120, 3)
    whole = filled(config)
    whole.codebook[:, 3] = 50.0                                                # restarts too
    whole.counts[:, 3] = 0.0
    parts = [copy.deepcopy(whole) for _ in range(2)]
    whole(x, noise)
    for rank, part in enumerate(parts):
        for micro_step in range(2):
            rows = slice(rank + 2 * micro_step, None, 4)
            part(x[rows], noise[rows])
    steps = [part.step for part in parts]
    whole.update()

    def others(name):  # what a collective would bring of the other process, by the tensor that is given
        def combine(own):
            for step in steps:
                for mine in vars(step).values():
                    for version in (mine, mine.transpose(0, 1)):
                        if version.shape == own.shape and torch.equal(version, own):
                            return name([self_or_other(step, mine, own.shape) for step in steps])
            raise AssertionError

        def self_or_other(step, like, shape):
            of = next(key for s in steps for key, value in vars(s).items() if value is like)
            value = getattr(step, of)
            return value if value.shape == shape else value.transpose(0, 1)

        return combine

    for part in parts:
        part.update(others(lambda two: two[0] + two[1]), others(torch.cat))
    for part in parts:
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(part.state_dict()[key], value, msg=key)


def test_a_saved_quantiser_goes_on_as_if_it_had_not_stopped():
    quantizer, other = filled(SHARED), ResidualQuantizer(SHARED)
    other.load_state_dict(quantizer.state_dict())
    for one in (quantizer, other):
        one(draw(50, 4), gumbel(50, 3))
        one.update()
    assert all(torch.equal(other.state_dict()[key], value) for key, value in quantizer.state_dict().items())


def test_an_update_without_vectors_is_refused():
    with pytest.raises(ValueError, match="expected vectors since the last update"):
        filled(SHARED).update()


@both
def test_data_begin_the_entries_depth_by_depth(config):
    centers = 10 * draw(5, 4, seed=3)
    x = centers.repeat(40, 1) + 0.1 * draw(200, 4)
    quantizer = ResidualQuantizer(replace(config, entries=24))
    quantizer.init_from_data(x, torch.Generator().manual_seed(0))
    errors = [(x - quantizer.partial_sums(quantizer.encode(x))[:, d]).square().mean() for d in range(3)]
    assert errors[2] < errors[1] < errors[0] < x.square().mean() / 10 and errors[2] < 0.1
    assert torch.isfinite(quantizer.codebook).all() and quantizer.counts.mean() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(quantizer.sums, quantizer.codebook * quantizer.counts[..., None])


def test_fewer_vectors_than_entries_begin_a_table_too():
    quantizer = ResidualQuantizer(PER_DEPTH)
    quantizer.init_from_data(draw(3, 4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantizer(draw(3, 4)).vectors, draw(3, 4))


@pytest.mark.parametrize(
    ("field", "value"), [("depth", 0), ("entries", 0), ("decay", 1.0), ("decay", -0.1), ("restart_share", -1.0)]
)
def test_settings_without_meaning_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field}: expected"):
        replace(SHARED, **{field: value})

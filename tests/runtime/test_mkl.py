"""MKL's ordered weights: the product of torch for any number of rows and threads, or no use of them."""

import pytest
import torch
import torch.nn.functional as F

from fairseq_w2v2_light.runtime import cpu, mkl, products
from fairseq_w2v2_light.runtime.mkl import MklWeight, mkl_serves
from fairseq_w2v2_light.runtime.products import PackedLinear


def has_mkl():
    try:
        MklWeight(torch.zeros(4, 4))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


needs_mkl = pytest.mark.skipif(not has_mkl(), reason="a torch without MKL")


@pytest.fixture(autouse=True)
def _threads():
    """Few threads, afterwards as many as before, and no answer from another test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    mkl._serves.cache_clear()
    yield
    torch.set_num_threads(threads)
    mkl._serves.cache_clear()


@pytest.fixture
def intel(monkeypatch):
    monkeypatch.setattr(mkl, "multiplies_by_mkl", lambda: True)


def random_linear(outputs, inputs, seed=0):
    torch.manual_seed(seed)
    return torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)


@needs_mkl
@pytest.mark.parametrize("outputs, inputs", ((384, 1536), (1552, 512), (37, 19), (1, 8), (700, 1)))
@pytest.mark.parametrize("threads", (1, 2))
def test_any_number_of_rows(outputs, inputs, threads):
    torch.set_num_threads(threads)
    weight, bias = random_linear(outputs, inputs)
    ordered = MklWeight(weight)
    for rows in (0, *range(1, 34), 63, 64, 65, 127, 166, 249, 250, 251, 499, 500, 777, 1500):
        x = torch.randn(rows, inputs)
        assert torch.allclose(ordered.linear(x, bias), F.linear(x, weight, bias), atol=2e-5), rows
    x = torch.randn(3, 11, 2 * inputs)[..., ::2]
    assert torch.allclose(ordered.linear(x, None), F.linear(x, weight), atol=2e-5)


@needs_mkl
def test_more_threads_order_it_again_and_fewer_do_not():
    weight, bias = random_linear(600, 400)
    x = torch.randn(70, 400)
    torch.set_num_threads(2)
    ordered = MklWeight(weight)
    first = ordered._packed
    for threads, ordered_for in ((1, 2), (2, 2), (3, 3), (1, 3)):
        torch.set_num_threads(threads)
        assert torch.allclose(ordered.linear(x, bias), F.linear(x, weight, bias), atol=2e-5)
        assert ordered._packed[1] == ordered_for
        assert (ordered._packed is first) == (ordered_for == 2)
    # the weight came back from its order as it was
    assert torch.equal(ordered._product(torch.eye(400), None).t(), weight)


@needs_mkl
@pytest.mark.parametrize("gelu", (False, True))
def test_large_linears_of_packed_models(intel, gelu):
    weight, bias = random_linear(512, 640)
    packed = PackedLinear(weight, bias, 20, gelu)
    assert packed.mkl is not None and packed.packed is None
    x = torch.randn(2, 33, 640)
    expected = F.linear(x, weight, bias)
    assert torch.allclose(packed(x), F.gelu(expected) if gelu else expected, atol=2e-5)
    assert PackedLinear(weight[:100], bias[:100], 20, gelu).mkl is None


@needs_mkl
def test_many_threads_have_onednn(intel):
    torch.set_num_threads(5)
    assert not mkl_serves(512, 640)
    torch.set_num_threads(4)
    assert mkl_serves(512, 640)


def test_other_cpus_have_onednn(monkeypatch):
    for module in (mkl, products):
        monkeypatch.setattr(module, "multiplies_by_mkl", lambda: False)
    assert not mkl_serves(512, 640)
    for outputs, inputs in ((512, 640), (40, 64)):
        weight, bias = random_linear(outputs, inputs)
        packed = PackedLinear(weight, bias, 20)
        assert packed.mkl is None and packed.plain is None and packed.packed is not None
        x = torch.randn(5, inputs)
        assert torch.allclose(packed(x), F.linear(x, weight, bias), atol=2e-5)


def test_small_linears_are_torchs_own_product_on_intels_cpus(monkeypatch):
    monkeypatch.setattr(products, "multiplies_by_mkl", lambda: True)
    weight, bias = random_linear(40, 64)
    packed = PackedLinear(weight, bias, 20)
    assert packed.plain is not None and packed.packed is None
    # of many rows a GELU is oneDNN's, in its product
    with_gelu = PackedLinear(weight, bias, 20, gelu=True)
    assert with_gelu.packed is not None
    for shape in ((0, 64), (1, 64), (2, 7, 64), (2, 70, 64)):
        x = torch.randn(shape)
        expected = F.linear(x, weight, bias)
        assert torch.allclose(packed(x), expected, atol=2e-5)
        assert torch.allclose(with_gelu(x), F.gelu(expected), atol=2e-5)
    weight.zero_()
    assert packed(x).count_nonzero(), "the weight is the packed Linear's own"


@pytest.mark.parametrize("vendor", ("GenuineIntel: Intel(R) Xeon(R) Platinum", "AMD EPYC 9B14", "aarch64"))
def test_which_cpus_multiply_by_mkl(vendor, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_name", lambda: vendor)
    cpu.multiplies_by_mkl.cache_clear()
    assert cpu.multiplies_by_mkl() == ("Intel" in vendor and torch.backends.mkl.is_available())
    monkeypatch.undo()
    cpu.multiplies_by_mkl.cache_clear()


@needs_mkl
def test_a_product_that_is_wrong_for_other_rows_is_not_used(intel, monkeypatch):
    class Strict(MklWeight):
        """As an MKL would be that minds for how many rows it was made."""

        def linear(self, x, bias):
            y = F.linear(x, torch.ones(self.shape), bias) if x.size(0) == 7 else super().linear(x, bias)
            return y

    monkeypatch.setattr(mkl, "MklWeight", Strict)
    assert not mkl_serves(512, 640)


def test_a_torch_without_it(intel, monkeypatch):
    def missing(*args):
        raise AttributeError("'_OpNamespace' 'mkl' object has no attribute '_mkl_reorder_linear_weight'")

    monkeypatch.setattr(MklWeight, "_order", missing)
    assert not mkl_serves(512, 640)

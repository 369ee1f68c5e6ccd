"""The promise in bytes: what autograd really keeps, by policy and block, in every dtype; and SavedBytes itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbp
from fastbp.activations import ROWS, bind
from fastbp.saving import legal_policies

M, K, N = 24, 40, 56
HIDDEN = M * N  # elements of one hidden layer


def kept_by(function, *exclude) -> int:
    with fastbp.SavedBytes(exclude=exclude) as saved:
        y = function()
    del y
    return saved.total


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator).to(dtype).requires_grad_() for s in shapes]


LAYER = [
    (name, policy, elements)
    for name in ROWS
    for policy, elements in {"preact": 1, "output": 0, "recompute": 0}.items()
    if policy in legal_policies(bind(name))
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "policy", "elements"), LAYER)
def test_layer_keeps_what_its_policy_says_beyond_y(name, policy, elements, dtype):
    """y exists anyway, for the next layer keeps it; identity under ``output`` does not even read it."""
    x, w, b = parameters((M, K), (N, K), (N,), dtype=dtype)
    with fastbp.SavedBytes(exclude=[x, w, b]) as saved:
        y = fastbp.linear_act(x, w, b, activation=name, save=policy)
    sizes = list(saved.by_storage)
    if policy == "output" and name != "identity":
        assert y.untyped_storage().nbytes() == sizes.pop(), "y itself is what is kept"
    assert sum(sizes) == elements * HIDDEN * dtype.itemsize


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid"])
def test_auto_layer_and_next_layer_share_y(name):
    """LinearAct then a linear: 0 bytes per hidden element beyond y, in total y once."""
    x, w, b, w2 = parameters((M, K), (N, K), (N,), (K, N))
    total = kept_by(lambda: F.linear(fastbp.linear_act(x, w, b, activation=name), w2), x, w, b, w2)
    assert total == 2 * HIDDEN


MLP_BYTES = [
    ("gelu", "auto", 2),
    ("silu", "auto", 2),
    ("relu", "auto", 2),
    ("relu", "output", 2),
    ("relu", "preact", 2),
]
MLP_BYTES += [("relu2", "auto", 2), ("tanh", "auto", 2), ("gelu", "recompute", 0), ("relu", "recompute", 0)]


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize(("name", "save", "bytes_per_element"), MLP_BYTES)
def test_mlp_bytes_per_hidden_element(name, save, bytes_per_element, layers):
    shapes = [(N, K), *[(N, N)] * (layers - 2), (K, N)]
    x, *tensors = parameters((M, K), *shapes, *[(s[0],) for s in shapes])
    weights, biases = tensors[:layers], tensors[layers:]
    total = kept_by(lambda: fastbp.mlp(x, weights, biases, activation=name, save=save), x, *tensors)
    assert total == bytes_per_element * HIDDEN * (layers - 1)


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
@pytest.mark.parametrize(("save", "bytes_per_element"), [("auto", 4), ("preact", 4), ("recompute", 0)])
def test_gated_bytes_per_hidden_element(name, save, bytes_per_element):
    x, gate, up, down = parameters((M, K), (N, K), (N, K), (K, N))
    options = {"activation": name, "save": save}
    assert kept_by(lambda: fastbp.gated_mlp(x, gate, up, down, **options), x, gate, up, down) == (
        bytes_per_element * HIDDEN
    )
    assert kept_by(lambda: fastbp.gated_linear_act(x, gate, up, **options), x, gate, up) == bytes_per_element * HIDDEN


def test_eager_keeps_twice_as_much():
    """The comparison that the promise is made against, measured the same way."""
    x, w, b, w2, b2 = parameters((M, K), (N, K), (N,), (K, N), (K,))
    exclude = (x, w, b, w2, b2)
    assert kept_by(lambda: F.linear(F.gelu(F.linear(x, w, b)), w2, b2), *exclude) == 4 * HIDDEN
    gate, up = parameters((N, K), (N, K))
    assert kept_by(lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), w2), *exclude, gate, up) == 8 * HIDDEN


def test_modules_and_policies_by_use():
    x = torch.randn(M, K)
    block = fastbp.MLP(K, N)
    assert kept_by(lambda: block(x), x, block) == 4 * HIDDEN
    with fastbp.use(save="recompute"):
        assert kept_by(lambda: block(x), x, block) == 0


@pytest.mark.parametrize("frozen", ["x", "weights", "all"])
def test_frozen_inputs_keep_less(frozen):
    x, w, w2 = parameters((M, K), (N, K), (K, N))
    for tensor in {"x": [x], "weights": [w, w2], "all": [x, w, w2]}[frozen]:
        tensor.requires_grad_(False)
    with fastbp.SavedBytes() as saved:
        y = fastbp.mlp(x, (w, w2))
    size = {"x": x.nbytes + 2 * HIDDEN + w2.nbytes, "weights": w.nbytes + w2.nbytes + 2 * HIDDEN, "all": 0}[frozen]
    assert saved.total == size
    assert y.requires_grad == (frozen != "all")


def test_nothing_is_kept_without_grad():
    x, w = parameters((M, K), (N, K))
    with torch.no_grad():
        assert kept_by(lambda: fastbp.linear_act(x, w)) == 0


def test_counts_every_storage_once_and_only_inside():
    a, b = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)
    outside = a.exp()
    with fastbp.SavedBytes() as saved:
        y = a * b  # keeps both
        z = a * a.view(2, 5).view(10)  # keeps a again, by two names
    assert saved.total == 80 and saved.by_storage == (40, 40)
    (y.sum() + z.sum() + outside.sum()).backward()
    torch.testing.assert_close(a.grad, b.detach() + 2 * a.detach() + a.detach().exp())


def test_a_storage_that_died_is_not_taken_for_its_successor():
    """Addresses are reused; two graphs one after the other keep two storages."""
    with fastbp.SavedBytes() as saved:
        for _ in range(5):
            torch.randn(1000, requires_grad=True).clone().exp()
    assert saved.total == 5 * 4000


def test_excludes_tensors_modules_and_views():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with fastbp.SavedBytes(exclude=[layer, x[1:]]) as saved:
        layer(x).exp()
    assert saved.total == 4 * 8 * 4


def test_meta_and_sparse_tensors():
    x, w = torch.empty(M, K, device="meta", requires_grad=True), torch.empty(N, K, device="meta", requires_grad=True)
    assert kept_by(lambda: fastbp.mlp(x, (w, w.t())), x, w) == 4 * HIDDEN
    indices = torch.tensor([[0, 1, 1], [2, 0, 2]])
    sparse = torch.sparse_coo_tensor(indices, torch.ones(3), (2, 3), check_invariants=True).coalesce()
    dense = torch.randn(3, 4, requires_grad=True)
    assert kept_by(lambda: torch.sparse.mm(sparse, dense)) == 3 * 4 + 6 * 8

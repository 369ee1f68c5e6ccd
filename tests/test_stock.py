"""What somebody put in PyTorch's place is called, whether before fastbp was imported, before fuse, or after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastbp.activations import TABLE
from fastbp.stock import Replaced, named, stock

PATCHES = {
    "nothing": "",
    "nn.Linear.forward": "o = nn.Linear.forward; nn.Linear.forward = lambda self, x: 2 * o(self, x)",
    "nn.Linear.__call__": "o = nn.Module.__call__; nn.Linear.__call__ = lambda self, x: 2 * o(self, x)",
    "nn.Linear, a subclass": "nn.Linear = type('Linear', (nn.Linear,), {'forward': lambda self, x: 7 * x.sum()})",
    "F.linear": "o = F.linear; F.linear = lambda x, w, b=None: 2 * o(x, w, b)",
    "F.linear, decorated by torch": "F.linear = torch.autocast('cpu', torch.bfloat16)(F.linear)",
    "F.gelu": "o = F.gelu; F.gelu = lambda x, approximate='none': 2 * o(x, approximate=approximate)",
    "F.silu": "o = F.silu; F.silu = functools.wraps(o)(lambda x, inplace=False: 2 * o(x))",
    "F.silu, by another of F": "F.silu = F.mish",
    "torch.sigmoid": "o = torch.sigmoid; torch.sigmoid = lambda x: 2 * o(x)",
    "torch.sigmoid, by another builtin": "torch.sigmoid = torch.tanh",
    "nn.GELU.forward": "o = nn.GELU.forward; nn.GELU.forward = functools.wraps(o)(lambda self, x: 2 * o(self, x))",
    "nn.SiLU.forward, by another class's": "nn.SiLU.forward = nn.ReLU.forward",
    "nn.ReLU, by another class": "nn.ReLU = nn.GELU",
    "F.dropout": "o = F.dropout; F.dropout = lambda *a, **k: 2 * o(*a, **k)",
    "nn.Dropout.forward": "o = nn.Dropout.forward; nn.Dropout.forward = lambda self, x: 2 * o(self, x)",
    "nn.Dropout.forward, by another class's": "nn.Dropout.forward = nn.Identity.forward",
    "nn.Dropout.__call__": "o = nn.Module.__call__; nn.Dropout.__call__ = lambda self, x: 2 * o(self, x)",
    "nn.Dropout, by another class": "nn.Dropout = nn.AlphaDropout",
    "nn.Identity, by another class": "nn.Identity = nn.Tanh",
    "nn.Sequential.forward": "o = nn.Sequential.forward; nn.Sequential.forward = lambda self, x: 2 * o(self, x)",
    "nn.Module.__call__": "o = nn.Module.__call__; nn.Module.__call__ = lambda self, x: 2 * o(self, x)",
    "nn.Module._call_impl": "o = nn.Module._call_impl; nn.Module._call_impl = lambda self, x: 2 * o(self, x)",
    "nn.Module.__getattr__": "o = nn.Module.__getattr__; nn.Module.__getattr__ = lambda self, name: "
    "nn.Tanh() if name == 'act' else o(self, name)",
}
MOMENTS = ("before the import", "before fuse", "after fuse")
PROGRAM = """
import copy, functools, json, os, sys, torch, torch.nn.functional as F, traceback
from torch import nn

torch.set_default_dtype(torch.float64)

class Act(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)

class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc1, self.fc2, self.up = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 20)
        self.act, self.drop, self.idle = act, nn.Dropout(0.5), nn.Identity()

class Known(Block):
    def forward(self, x):
        return self.fc2(self.drop(self.idle(self.act(self.fc1(x)))))

class Function(Block):
    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.up(x))

class Read(Block):
    def forward(self, x):
        return self.fc2(self.drop(F.gelu(self.fc1(x)) * 1.0)) if x is not None else x

class Run(Block):
    def __init__(self, act):
        super().__init__(act)
        self.run = nn.Sequential(self.fc1, self.act, self.fc2)

    def forward(self, x):
        return 1.0 * self.run(x)

def step(m):
    torch.manual_seed(1)
    x = torch.linspace(-2, 2, 60).view(5, 12).requires_grad_()
    y = m(x)
    gradients = torch.autograd.grad(y.double().sum(), [x, *m.parameters()], allow_unused=True)
    return [y, *(torch.zeros(()) if g is None else g for g in gradients)]

def differ(patch, moment):
    if moment == 0:
        exec(patch, globals())
    import fastbp
    acts = nn.GELU(), nn.SiLU(), Act(), nn.ReLU()
    stocks = [kind(copy.deepcopy(act)) for act in acts for kind in (Known, Function, Read, Run)]
    if moment == 1:
        exec(patch, globals())
    copies = [copy.deepcopy(m) for m in stocks]
    for m in copies:
        fastbp.fuse(m, save="preact")
    if moment == 2:
        exec(patch, globals())
    for stock, fused in zip(stocks, copies):
        for training in (True, False):
            found, expected = step(fused.train(training)), step(stock.train(training))
            within = 0.1 if expected[0].dtype is torch.bfloat16 else 1e-9
            for a, b in zip(found, expected):
                if a.dtype != b.dtype or not torch.allclose(a, b, atol=within, rtol=within):
                    return f"{type(stock).__name__} of {stock.act}, training={training}"
    return ""

moment, patches, found = int(sys.argv[1]), json.loads(sys.argv[2]), {}
for name, patch in patches.items():  # each in a process of its own, that has PyTorch already
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            said = differ(patch, moment)
        except BaseException:
            said = traceback.format_exc()[-1500:]
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        found[name] = stream.read()
    os.wait()
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_stands_in_the_place_of_pytorchs_is_called(moment, tmp_path):
    program = tmp_path / "program.py"  # forwards are read from their file
    program.write_text(PROGRAM)
    tree = str(Path(__file__).resolve().parents[1])
    ran = subprocess.run(
        [sys.executable, program, str(MOMENTS.index(moment)), json.dumps(PATCHES)],
        env=os.environ | {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout) == dict.fromkeys(PATCHES, "")


def test_pytorchs_own_are_found():
    for row in TABLE:
        assert row.module is None or stock(row.module, "forward") is row.module.forward, row.name
        assert not any(isinstance(f, Replaced) for f in row.functions)
        assert row.functions or row.name in ("identity", "gelu_tanh", "quick_gelu", "relu2"), row.name
    for path in ("F.linear", "F.dropout", "torch.tanh", "torch.special.expit", "math.sqrt", "nn.Module.__call__"):
        assert not isinstance(named(path), Replaced), path
    for owner, name in ((nn.Sequential, "__iter__"), (nn.Dropout, "forward"), (nn.Identity, "forward")):
        assert stock(owner, name) is getattr(owner, name)


def test_what_is_not_is_equal_to_nothing_and_says_so(monkeypatch):
    monkeypatch.setattr(torch, "tanh", torch.sigmoid)
    found = named("torch.tanh")
    assert found != torch.tanh and found is not torch.tanh
    with pytest.raises(RuntimeError, match=r"tanh was not PyTorch's own"):
        found(torch.ones(1))

"""Training on PyTorch's distributed engines, on two ranks: fused models against the stock model in one process."""

from functools import cache

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fusible import WIDTH, Gated, TwoLinears
from mesh_cases import Graphs, fused_calls, line
from module_pairs import StockGated, StockLinearAct, StockMLP
from support import assert_as_good_as_eager, assert_close
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastbp
from fastbp.linear import of_any_size

# Blocks that fuse finds, then modules that are fused as they are; each with the form of its call.
FOUND = {"two": "mlp", "gated": "gated_mlp", "run": "mlp"}
BUILT = {"layer": "linear_act", "mlp": "mlp", "gated_mlp": "gated_mlp"}
FORM_OF = FOUND | BUILT
STEPS = 2


class Stack(nn.Module):
    """Residual blocks, ours or stock, from one seed."""

    def __init__(self, ours, names=tuple(FORM_OF), dtype=torch.float64, checkpointed=False):
        super().__init__()
        torch.manual_seed(3)
        made = {
            "two": TwoLinears(nn.GELU()),
            "gated": Gated(),
            "run": nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH)),
            "layer": fastbp.LinearAct(WIDTH, WIDTH) if ours else StockLinearAct(WIDTH, WIDTH),
            "mlp": fastbp.MLP(WIDTH, 16) if ours else StockMLP(WIDTH, 16, WIDTH),
            "gated_mlp": fastbp.GatedMLP(WIDTH, 16) if ours else StockGated(WIDTH, 16, WIDTH, bias=False),
        }
        for name in names:
            self.add_module(name, made[name])
        self.to(dtype)
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.children():
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


def fused(names=tuple(FORM_OF), **options):
    """A stack of ours, with what ``fuse`` finds fused."""
    model = Stack(True, names, **options)
    fuse(model, names)
    return model


def fuse(model, names=tuple(FORM_OF)):
    report = fastbp.fuse(model)
    found = {site.name.removeprefix("module.") for site in report.fused}
    assert found >= set(names) & set(FOUND), str(report)


def forms(names=tuple(FORM_OF)):
    return [FORM_OF[name] for name in names]


@cache
def drawn(seed=0):
    """A batch for two ranks, two steps of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, 4, 6, WIDTH, dtype=torch.float64, generator=generator)


def mine(x, dim=0, mesh=None):
    """This rank's half of it."""
    rank = dist.get_rank() if mesh is None else mesh.get_local_rank()
    return x.chunk(2 if mesh is None else mesh.size(), dim)[rank]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name):
    return name.removeprefix("module.")


def train(model, batches, weight=1.0, optimizer=None):
    """Steps of training: by name what every step's loss and gradients are, and the parameters after them.

    ``weight`` is that of the loss where an engine takes the mean over ranks of what is a sum here.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = {}
    for step, x in enumerate(batches):
        loss = model(x).square().sum()
        (weight * loss).backward()
        found[f"{step} loss"] = loss.detach()
        for name, p in model.named_parameters():
            found[f"{step} {plain_name(name)}"] = whole(p.grad).detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    return found | {plain_name(name): whole(p).detach().clone() for name, p in model.named_parameters()}


def one_process(names=tuple(FORM_OF), weight=1.0):
    """The stock model on all rows, as anybody trains it."""
    return train(Stack(False, names), drawn(), weight)


def assert_same(found, expected, summed=False):
    """All losses, gradients and parameters; ``summed`` where each rank has the loss of its rows."""
    for key, value in expected.items():
        got = found[key]
        if summed and key.endswith("loss"):
            got = got.clone()
            dist.all_reduce(got)
        assert_close(got, value, rtol=1e-11, msg=lambda text, key=key: f"{key}: {text}")
    assert found.keys() == expected.keys()


def data_parallel(model, calls_expected=None, names=tuple(FORM_OF)):
    """Train on halves of the rows, as DDP and FSDP do, and count the fused calls of a step."""
    with fused_calls() as calls:
        found = train(model, [mine(x) for x in drawn()])
    assert_same(found, one_process(names, weight=0.5), summed=True)
    assert calls == (forms() if calls_expected is None else calls_expected) * STEPS, calls


def ddp_fused_before():
    data_parallel(DistributedDataParallel(fused()))


def ddp_fused_after():
    """The wrapper's buckets hold the parameters, which fuse leaves what they are; and so does unfuse."""
    model = DistributedDataParallel(Stack(True))
    fuse(model)
    data_parallel(model)
    fastbp.unfuse(model)
    assert type(model.module.two) is TwoLinears
    model.module.load_state_dict(Stack(False).state_dict())
    data_parallel(model, forms(BUILT))


class Read(nn.Module):
    """Blocks that nobody knows whole: their linears read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.double()

    def forward(self, x):
        h = nn.functional.silu(self.gate(x)) * self.up(x)
        self.seen = h.detach().mean()
        return x + self.down(h)


def linears_that_read(engine):
    """On DDP, and sharded as blocks, they read; where FSDP puts nodes before each, not; the numbers are the same."""
    expected = train(Read(), drawn(), weight=0.5)
    model = Read()
    fastbp.fuse(model)
    if engine == "DDP":
        wrapped = DistributedDataParallel(model)
    else:
        for module in (model.gate, model.up, model.down) if engine == "FSDP of each linear" else ():
            fully_shard(module, mesh=line())
        wrapped = fully_shard(model, mesh=line())
    with of_any_size():
        assert_same(train(wrapped, [mine(x) for x in drawn()]), expected, summed=True)
    fused = [site.what for site in fastbp.report(model).fused]
    assert fused == ([] if engine == "FSDP of each linear" else ["gated_act_linear, silu"]), fused


def shard(model, **options):
    for block in model.children():
        fully_shard(block, mesh=line(), **options)
    return fully_shard(model, mesh=line(), **options)


def fsdp():
    data_parallel(shard(fused()))


def fsdp_of_the_root_alone():
    data_parallel(fully_shard(fused(), mesh=line()))


def fsdp_of_each_linear():
    """Linears with hooks and a class of FSDP's own are called as they are."""
    model = fused()
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=line())
    data_parallel(fully_shard(model, mesh=line()), ["linear_act"])


def fsdp_checkpointed():
    """Every block runs forward twice."""
    data_parallel(shard(fused(checkpointed=True)), forms() + forms()[::-1])


def fsdp_fused_after():
    """Fused or left, the numbers are stock's, and the report says which."""
    model = shard(Stack(True))
    report = fastbp.fuse(model)
    assert {site.name for site in (*report.fused, *report.left)} >= {"two", "gated"}, str(report)
    assert_same(train(model, [mine(x) for x in drawn()]), one_process(weight=0.5), summed=True)


def fsdp_unfused():
    """unfuse finds the class that was fused beneath FSDP's own, and leaves that in place."""
    model = shard(fused())
    fastbp.unfuse(model)
    assert isinstance(model.two, FSDPModule) and isinstance(model.two, TwoLinears), type(model.two).__mro__
    data_parallel(model, forms(BUILT))


def fsdp_in_bfloat16():
    """Parameters in bfloat16, sums in float32: as near to float64 as the stock model on the same engine."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    halves = [mine(x).float() for x in drawn()]
    model = shard(fused(dtype=torch.float32), mp_policy=policy)
    with fused_calls() as calls:
        ours = train(model, halves, 0.01)
    assert calls == forms() * STEPS, calls
    stock = train(shard(Stack(False, dtype=torch.float32), mp_policy=policy), halves, 0.01)
    exact = one_process(weight=0.005)
    for key in [key for key in exact if "loss" not in key]:
        assert ours[key].dtype == torch.float32, key
        unit = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
        assert_as_good_as_eager([ours[key]], [stock[key]], [exact[key]], spare_units=unit)


def fsdp_compiled():
    """Each block compiled, then sharded; the graphs hold fastbp's ops, one each way."""
    torch._dynamo.reset()
    names = ("two", "gated", "layer")
    model, graphs = fused(names), Graphs()
    for block in model.children():
        block.compile(backend=graphs.backend, fullgraph=True)
    found = train(shard(model), [mine(x) for x in drawn()])
    assert_same(found, one_process(names, weight=0.5), summed=True)
    assert sorted(graphs.ops) == sorted([op for f in forms(names) for op in (f, f"{f}_backward")]), graphs.ops


COLUMNS = ("fc1", "gate_proj", "up_proj", "0")
ROWS = ("fc2", "down_proj", "2")
CUT = tuple(name for name in FORM_OF if name != "layer")  # ColwiseParallel takes an nn.Linear


def plan(names=CUT, along=None):
    """PyTorch's styles for every linear; ``along`` is the layout of what goes from block to block."""
    styles = {}
    for name, block in Stack(False, names).named_children():
        for child, _ in block.named_children():
            if child in COLUMNS:
                styles[f"{name}.{child}"] = ColwiseParallel(input_layouts=along)
            elif child in ROWS:
                styles[f"{name}.{child}"] = RowwiseParallel(output_layouts=along)
    return styles


def tensor_parallel(order):
    """The styles' hooks are the linears' own, so the linears are called as they are, whichever came first."""
    model = fused(CUT) if order == "fuse first" else Stack(True, CUT)
    parallelize_module(model, line(), plan())
    if order == "fuse last":
        fastbp.fuse(model)
    with fused_calls() as calls:
        assert_same(train(model, drawn()), one_process(CUT))
    assert calls == [], calls


def sequence_parallel():
    """Between the blocks each rank has half of the sequence."""
    model = parallelize_module(fused(CUT), line(), plan(along=Shard(1)))
    assert_same(train(model, [mine(x, 1) for x in drawn()]), one_process(CUT), summed=True)


def linears_of_ours_in_styles():
    """fastbp.Linear is an nn.Linear, which the styles take: of DTensors it is computed as they are."""
    made = []
    for linear in (nn.Linear, fastbp.Linear, fastbp.Linear):
        torch.manual_seed(4)
        made.append(nn.Sequential(linear(WIDTH, 16), nn.GELU(), linear(16, WIDTH)).double())
    stock, *ours = made
    expected = train(stock, drawn())
    for model, along in zip(ours, (None, Shard(1)), strict=True):
        styles = {"0": ColwiseParallel(input_layouts=along), "2": RowwiseParallel(output_layouts=along)}
        parallelize_module(model, line(), styles)
        with of_any_size():
            found = train(model, drawn() if along is None else [mine(x, 1) for x in drawn()])
        assert_same(found, expected, summed=along is not None)


def cut(block, mesh, along=Replicate()):  # noqa: B008
    """A whole block divided: the first weights by columns, the last by rows, hooks on the block alone."""

    def partition(name, module, mesh):
        for key, p in list(module.named_parameters(recurse=False)):
            last = name in ROWS
            place = (Shard(1) if key == "weight" else Replicate()) if last else Shard(0)
            module.register_parameter(key, nn.Parameter(distribute_tensor(p.detach(), mesh, [place])))

    def enter(module, inputs, mesh):
        return DTensor.from_local(inputs[0], mesh, [along]).redistribute(placements=[Replicate()])

    def leave(module, output, mesh):
        return output.redistribute(placements=[along]).to_local()

    return distribute_module(block, mesh, partition, enter, leave)


def blocks_cut_whole():
    """Such a block stays one fused call: with the DTensors, and in it with what the rank has of them."""
    for along, dim in ((Replicate(), None), (Shard(1), 1)):
        model = Stack(True, tuple(BUILT))
        for block in model.children():
            cut(block, line(), along)
        with fused_calls() as calls:
            found = train(model, drawn() if dim is None else [mine(x, dim) for x in drawn()])
        assert_same(found, one_process(tuple(BUILT)), summed=dim is not None)
        assert calls == [f for f in forms(BUILT) for _ in "12"] * STEPS, calls


def two_dimensions(shape):
    """FSDP2 along one dimension of the mesh, along the other PyTorch's styles, and whole blocks that are cut."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
    model = fused((*CUT, "layer"))
    parallelize_module(model, mesh["model"], plan(("two", "gated", "run")))
    for name in ("mlp", "gated_mlp"):
        cut(getattr(model, name), mesh["model"])
    for block in (*model.children(), model):
        fully_shard(block, mesh=mesh["data"])
    with fused_calls() as calls:
        found = train(model, [mine(x, 0, mesh["data"]) for x in drawn()])
    assert_same(found, one_process((*CUT, "layer"), weight=1 / shape[0]), summed=shape[0] > 1)
    assert calls == ["mlp", "mlp", "gated_mlp", "gated_mlp", "linear_act"] * STEPS, calls


def saved(model, optimizer=None):
    """A state as trainers save it, by PyTorch's names."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer or ()), strict=True))


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def plain(model):
    return model


def by_columns(model):
    return parallelize_module(model, line(), plan())


CHECKPOINTS = {
    "fused and sharded to stock": (True, shard, False, plain),
    "fused and sharded to stock by columns": (True, shard, False, by_columns),
    "stock by columns to fused and sharded": (False, by_columns, True, shard),
    "fused by columns to fused": (True, by_columns, True, plain),
}


def checkpoints(name, folder):
    """One step, saved, loaded into another model on another engine, where the second step follows."""
    ours, engine, ours_after, engine_after = CHECKPOINTS[name]
    made = [engine(fused(CUT) if ours else Stack(False, CUT))]
    made.append(engine_after(fused(CUT) if ours_after else Stack(False, CUT)))
    optimizers = [momentum(model) for model in made]
    with torch.no_grad():
        for p in made[1].parameters():
            p.fill_(7)
    expected = one_process(CUT)
    for step, (model, optimizer) in enumerate(zip(made, optimizers, strict=True)):
        halves = (engine, engine_after)[step] is shard
        loss = model(mine(drawn()[step]) if halves else drawn()[step]).square().sum() * (2 if halves else 1)
        loss.backward()
        for key, p in model.named_parameters():
            assert_close(whole(p.grad), expected[f"{step} {key}"], rtol=1e-11, msg=lambda t, key=key: f"{key}: {t}")
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            dcp.save(saved(model, optimizer), checkpoint_id=folder)
            state = saved(made[1], optimizers[1])
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(made[1], optimizers[1], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for key, p in made[1].named_parameters():
        assert_close(whole(p), expected[key], rtol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def pipeline(schedule):
    """A stage of three fused blocks on each rank, two microbatches."""
    kind = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[schedule]
    names, rank = tuple(FORM_OF), dist.get_rank()
    parts = names[:3], names[3:]
    model, (x, _) = fused(parts[rank]), drawn()
    half = x[:2].clone().requires_grad_()  # what goes between the stages is like this
    stage = PipelineStage(model, rank, 2, torch.device("cpu"), input_args=(half,), output_args=(half,))
    steps = kind(stage, n_microbatches=2, loss_fn=lambda y, _: y.square().sum(), scale_grads=False)
    with fused_calls() as calls:
        losses = []
        steps.step(x) if rank == 0 else steps.step(target=x, losses=losses)
    assert calls == forms(parts[rank]) * 2, calls
    stock = Stack(False)
    loss = stock(x).square().sum()
    loss.backward()
    if rank == 1:
        assert_close(sum(losses).detach(), loss.detach())
    for name, p in model.named_parameters():
        expected = stock.get_parameter(name).grad
        assert_close(p.grad, expected, rtol=1e-11, msg=lambda text, name=name: f"{name}: {text}")

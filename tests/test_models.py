"""``fuse`` on models that people have: the same numbers before and after, and every block that can be fused is."""

import copy
import importlib.util
import inspect
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from known_models import KNOWN
from model_kinds import expand
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastbp
from fastbp.fusion.surgery import is_fused
from fastbp.linear import of_any_size

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # no package: a tool is run by its path
import render_models  # noqa: E402

FUNCTIONS = {
    "linear_act": fastbp.autograd.LinearActFunction,
    "gated_linear_act": fastbp.autograd.GatedLinearActFunction,
    "mlp": fastbp.autograd.MLPFunction,
    "gated_mlp": fastbp.autograd.GatedMLPFunction,
}
NODES = {call: f"{function.__name__}Backward" for call, function in FUNCTIONS.items()} | {"linear": "ActLinearBackward"}


class Step:
    """What one step of a model gives: outputs, gradients of parameters and inputs, random state, nodes of its graph."""

    def __init__(self, model: nn.Module, inputs: dict[str, object] | tuple[Tensor, ...], grad: bool = True) -> None:
        named = inputs if isinstance(inputs, dict) else {f"input {i}": t for i, t in enumerate(inputs)}
        given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in named.items()}
        floats = {
            k: v.requires_grad_(grad) for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()
        }
        torch.manual_seed(2)
        with torch.set_grad_enabled(grad), of_any_size():
            output = model(**given) if isinstance(inputs, dict) else model(*given.values())
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        self.random_state = torch.get_rng_state()
        self.tensors = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        roots = [t for t in outputs if t.requires_grad]
        self.nodes = nodes_of(roots)
        if grad:
            wanted = {name: p for name, p in model.named_parameters() if p.requires_grad} | floats
            cotangents = [torch.randn_like(t) for t in roots]
            gradients = torch.autograd.grad(roots, list(wanted.values()), cotangents, allow_unused=True)
            self.tensors |= {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True) if g is not None}

    def difference(self, other: "Step") -> dict[str, float]:
        """Relative L2; what is zero but for rounding (a key's bias) is measured by the largest of its kind."""
        assert self.tensors.keys() == other.tensors.keys()
        sizes = {name: float(t.square().mean().sqrt()) for name, t in other.tensors.items()}
        floors = {kind: 1e-3 * max(sizes[n] for n in sizes if n[0] == kind) for kind in {n[0] for n in sizes}}
        return {
            name: float((t - other.tensors[name]).square().mean().sqrt()) / max(sizes[name], floors[name[0]])
            for name, t in self.tensors.items()
        }

    def calls(self) -> Counter:
        """How often each of fastbp's calls was made, by the nodes that autograd has of them."""
        return +Counter({call: self.nodes[node] for call, node in NODES.items()})

    def equals(self, other: "Step") -> bool:
        same = all(torch.equal(t, other.tensors[name]) for name, t in self.tensors.items())
        return same and self.tensors.keys() == other.tensors.keys()


def nodes_of(roots: list[Tensor]) -> Counter:
    """How many nodes of each name the graph has."""
    seen, todo = set(), [t.grad_fn for t in roots]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def anatomy(model: nn.Module) -> list[object]:
    """All that ``unfuse`` must bring back: each module's class, and what is in it, by identity where it is a tensor."""

    def plain(value: object) -> object:
        return id(value) if isinstance(value, Tensor) else dict(value) if isinstance(value, dict) else value

    return [(name, type(m), {k: plain(v) for k, v in vars(m).items()}) for name, m in model.named_modules()]


class Outcome:
    """A model stepped before and after ``fuse`` and after ``unfuse``: done once, looked at by several tests."""

    def __init__(self, name: str) -> None:
        self.name, self.known = name, KNOWN[name]
        inputs, model = self.known.inputs(), self.known.model()
        self.sites, self.left = expand(self.known.fused, model), expand(self.known.left, model)
        self.before = {"evaluation": Step(model.eval(), inputs), "inference": Step(model, inputs, grad=False)}
        self.runs: Counter = Counter()  # of each site in a step
        hooks = [
            model.get_submodule(site).register_forward_hook(lambda *_, site=site: self.runs.update([site]))
            for site in self.sites
        ]
        self.before["training"] = Step(model.train(), inputs)
        for hook in hooks:
            hook.remove()
        self.anatomy, self.identities, self.signatures = anatomy(model), identities(model), signatures(model)
        kept = [bytes_kept(model, inputs)]

        self.report = fastbp.fuse(model, sample_inputs=inputs)
        self.exact = not any(is_fused(module) or "_fastbp_activation" in vars(module) for module in model.modules())
        self.identities_fused, self.signatures_fused = identities(model), signatures(model)
        self.after = {"training": Step(model, inputs)}
        self.report_after = fastbp.report(model)
        self.copied = Step(copy.deepcopy(model), inputs)
        self.kept_before, self.kept_after = *kept, bytes_kept(model, inputs)
        self.after |= {"evaluation": Step(model.eval(), inputs), "inference": Step(model, inputs, grad=False)}
        fastbp.unfuse(model.train())
        self.anatomy_unfused, self.unfused = anatomy(model), Step(model, inputs)
        fastbp.fuse(model.eval(), sample_inputs=inputs)
        self.after["training, fused in evaluation"] = Step(model.train(), inputs)


def bytes_kept(model: nn.Module, inputs: dict[str, object] | tuple[Tensor, ...]) -> int:
    given = inputs if isinstance(inputs, dict) else dict(enumerate(inputs))
    exclude = [model, *(t for t in given.values() if isinstance(t, Tensor))]
    torch.manual_seed(2)
    with of_any_size(), fastbp.SavedBytes(exclude=exclude) as saved:
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return saved.total if output is not None else 0


def identities(model: nn.Module) -> list[object]:
    """The names of a checkpoint, and the very parameters, tied ones too."""
    parameters = model.named_parameters(remove_duplicate=False)
    return [list(model.state_dict()), [(name, id(p)) for name, p in parameters]]


def signatures(model: nn.Module) -> list[object]:
    """What a module says that it can be called with: trainers pass a model the columns that it names."""

    def shown(module: nn.Module) -> list[object]:
        parameters = inspect.signature(module.forward).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    return [(name, shown(m)) for name, m in model.named_modules()]


@pytest.fixture(scope="module", params=KNOWN)
def outcome(request):
    package = KNOWN[request.param].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return Outcome(request.param)


def test_same_numbers(outcome):
    """Of the same random draws. Where nothing but linears was changed, outputs are equal to the bit."""
    for mode, after in outcome.after.items():
        before = outcome.before[mode.partition(",")[0]]
        differences = after.difference(before).items()
        wrong = {name: error for name, error in differences if not error <= outcome.known.bound}  # NaN too
        assert not wrong, mode
        assert torch.equal(after.random_state, before.random_state), mode
        for name, tensor in after.tensors.items():
            assert not outcome.exact or name.startswith("gradient") or torch.equal(tensor, before.tensors[name]), (
                mode,
                name,
            )


def test_nothing_else_changes(outcome):
    assert outcome.identities_fused == outcome.identities
    assert outcome.copied.equals(outcome.after["training"]) and outcome.copied.nodes == outcome.after["training"].nodes
    assert outcome.anatomy_unfused == outcome.anatomy
    assert outcome.unfused.equals(outcome.before["training"])


def test_signatures_stay(outcome):
    assert outcome.signatures_fused == outcome.signatures


def test_every_block_and_linear_that_can_be_is_fused(outcome):
    """And runs as what it is, as often as it ran before."""
    report = outcome.report
    assert sorted((site.name, site.what) for site in report.fused) == sorted(outcome.sites.items()), str(report)
    assert {(s.name, s.what) for s in outcome.report_after.fused} == {(s.name, s.what) for s in report.fused}
    expected: Counter = Counter()
    for site, what in outcome.sites.items():
        call = what.partition(",")[0]
        expected[call if call in FUNCTIONS else "linear"] += outcome.runs[site]
    assert outcome.after["training"].calls() == +expected


def test_less_is_kept(outcome):
    """PyTorch keeps as little of relu and tanh, whose output the next linear has too, and of an activation alone: z."""
    alike = re.compile("linear_act, .*|.*, (relu|tanh)")
    saved = [what for what in outcome.sites.values() if not alike.fullmatch(what)]
    assert outcome.kept_after < outcome.kept_before if saved else outcome.kept_after <= outcome.kept_before


def test_what_is_left_is_named_with_the_reason(outcome):
    left = {site.name: site.reason for site in outcome.report.sites if site not in outcome.report.fused}
    assert left.keys() == outcome.left.keys(), str(outcome.report)
    assert all(outcome.left[name] in reason for name, reason in left.items()), left


def test_table_is_fresh(outcome):
    assert render_models.row(outcome.name, outcome.known, outcome.report) in render_models.rows_shown(), (
        "run `python tools/render_models.py`"
    )


def test_table_has_these_models_alone():
    assert len(render_models.rows_shown()) == len(KNOWN), "run `python tools/render_models.py`"


@pytest.mark.parametrize("name", ["DistilBERT", "Llama"])
def test_saved_and_loaded_by_its_package(name, tmp_path):
    """A fused model's checkpoint is the stock model's, whether the model itself is fused or modules of it are."""
    transformers = pytest.importorskip("transformers")
    known = KNOWN[name]
    model, inputs = known.model(), known.inputs()
    fastbp.fuse(model, sample_inputs=inputs)
    model.save_pretrained(tmp_path)
    kind = getattr(transformers, known.kind)
    loaded = kind.from_pretrained(tmp_path, dtype=torch.float64).train()
    assert type(loaded) is kind and loaded.config.architectures == [known.kind]
    fastbp.fuse(loaded, sample_inputs=inputs)
    assert max(Step(loaded, inputs).difference(Step(model, inputs)).values()) < known.bound

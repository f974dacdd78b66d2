"""Running one module or network from a case: fill, calibrate, forward, backward, collect."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from comparison import Results
from goldens import Case, CaseError, fill_input, fill_value
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Arguments that `run_module` reads. The systems have one of two sets: one states the constants of
# the batch norms, the other leaves them at the defaults and can calibrate.
COMMON_ARGS = frozenset(
    "mode dtype bn_eps bn_momentum absent_gradients inputs cotangents outputs".split()
)
PLAIN_ARGS = frozenset("mode dtype dropout_at_run inputs cotangents outputs".split())
CALIBRATION_ARGS = frozenset(
    "calibrated calibration_input calibration_shape calibration_momentum".split()
)

Forward = Callable[..., Mapping[str, Tensor]]
Shape = Callable[[str, Sequence[int]], Sequence[int]]
Losses = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Feature:
    """Where an inner activation is found."""

    path: str
    """Submodule that returns it."""

    of_input: bool = False
    """The submodule's (first) input instead of what it returns."""

    view: Callable[[Tensor], Tensor] = lambda value: value
    """From our shape to the case's."""


def run_module(
    case: Case,
    module: nn.Module,
    *,
    published: Callable[[str], str | None],
    published_shape: Shape = lambda _name, shape: shape,
    forward: Forward,
    features: Mapping[str, str | Feature] | None = None,
    losses: Losses | None = None,
) -> Results:
    """Results of one forward (and backward) pass from the filled state.

    The scalar that is differentiated is the sum of output * cotangent over the case's cotangents,
    plus losses["loss"], or all losses when none has that name.

    Args:
        case: gives inputs, cotangents, mode, dtype, batch-norm constants, names and shapes.
        module: the thing under test, of the right structure and any values.
        published: the case's name for one of the module's state-dict names.
        published_shape: the case's shape for one of these names and its shape in the module.
        forward: called with the inputs by name; returns the outputs by name.
        features: the case's feature names -> where they are (a path: what the submodule returns).
        losses: called with the outputs after the forward; returns scalars by name.
    """
    args = case.args
    dtype = {"float64": torch.float64, "float32": torch.float32}[args["dtype"]]
    module.to(dtype)
    for norm in _norms(module):
        norm.eps, norm.momentum = args.get("bn_eps", 1e-5), args.get("bn_momentum", 0.1)
    names = _fill(case, module, published, published_shape)
    if args.get("calibrated"):
        _calibrate(case, module, forward, dtype)
    module.train(args["mode"] == "train")

    results = Results()
    for name, feature in (features or {}).items():
        if isinstance(feature, str):
            feature = Feature(feature)
        _keep(results, name, feature, module.get_submodule(feature.path))

    inputs = {}
    for record in args["inputs"]:
        value = fill_input(record["fill"], record["shape"]) * record.get("scale", 1.0)
        inputs[record["arg"]] = torch.from_numpy(value).to(dtype).requires_grad_()
    outputs = forward(**inputs)
    for name, output in outputs.items():
        results.arrays["output", name] = output.detach().numpy()
    scalars = [
        (outputs[c["output"]] * torch.from_numpy(fill_input(c["fill"], c["shape"])).to(dtype)).sum()
        for c in args["cotangents"]
    ]
    if losses:
        computed = losses(outputs)
        for name, loss in computed.items():
            results.arrays["loss", name] = loss.detach().reshape(1).numpy()
        scalars += [computed["loss"]] if "loss" in computed else computed.values()
    if scalars:
        torch.stack(scalars).sum().backward()
        for name, x in inputs.items():
            results.arrays["grad_input", name] = _numpy(x.grad)
        for name, parameter in module.named_parameters():
            shape = published_shape(name, parameter.shape)
            gradient = None if parameter.grad is None else parameter.grad.reshape(shape)
            results.arrays["grad_param", names[name]] = _numpy(gradient)
    for name, buffer in module.named_buffers():
        if name in names:  # others are constants
            results.arrays["buffer", names[name]] = buffer.numpy()
    return results


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]


def _calibrate(case: Case, module: nn.Module, forward: Forward, dtype: torch.dtype) -> None:
    """Take the running statistics from one forward in training mode."""
    args = case.args
    kept = [norm.momentum for norm in _norms(module)]
    for norm in _norms(module):
        norm.momentum = args["calibration_momentum"]
    frames = fill_input(args["calibration_input"], args["calibration_shape"])
    module.train()
    with torch.no_grad():
        forward(**{args["inputs"][0]["arg"]: torch.from_numpy(frames).to(dtype)})
    for norm, momentum in zip(_norms(module), kept, strict=True):
        norm.momentum = momentum


def _keep(results: Results, name: str, feature: Feature, submodule: nn.Module) -> None:
    """Store the activation under its name at each forward."""

    def store(value: Tensor) -> None:
        # A copy: what follows may work in place.
        results.arrays["feature", name] = feature.view(value.detach().clone()).numpy()

    if feature.of_input:
        submodule.register_forward_pre_hook(lambda _module, inputs: store(inputs[0]))
    else:
        submodule.register_forward_hook(lambda _module, _inputs, output: store(output))


def _numpy(gradient: Tensor | None):
    return None if gradient is None else gradient.numpy()


def _fill(
    case: Case,
    module: nn.Module,
    published: Callable[[str], str | None],
    published_shape: Shape,
) -> dict[str, str]:
    """Fill the module by the published names; return our names -> published names."""
    state = module.state_dict()
    names = {name: published(name) or name for name in state}
    shapes = {name: tuple(published_shape(name, value.shape)) for name, value in state.items()}
    ours = {names[name]: shape for name, shape in shapes.items()}
    wrong = sorted(ours.items() ^ case.state_shapes.items())
    if wrong:
        raise CaseError(
            f"state_dict differs from the module's in {len(wrong)} entries: {wrong[:4]}"
        )
    values = {}
    for name, tensor in state.items():
        filled = torch.from_numpy(fill_value(names[name], shapes[name]))
        values[name] = filled.reshape(tensor.shape).to(tensor.dtype)
    module.load_state_dict(values)
    return names

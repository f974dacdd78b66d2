"""Running one module or network from a case: fill, forward, backward, collect."""

from collections.abc import Callable, Mapping

import torch
from comparison import Results
from goldens import Case, CaseError, fill_input, fill_value
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

COMMON_ARGS = frozenset(
    "mode dtype bn_eps bn_momentum absent_gradients inputs cotangents outputs".split()
)


def run_module(
    case: Case,
    module: nn.Module,
    *,
    published: Callable[[str], str | None],
    forward: Callable[..., Mapping[str, Tensor]],
    features: Mapping[str, str] | None = None,
) -> Results:
    """Results of one forward (and backward) pass from the filled state.

    Args:
        case: gives inputs, cotangents, mode, dtype, batch-norm constants, names and shapes.
        module: the thing under test, of the right structure and any values.
        published: the case's name for one of the module's state-dict names.
        forward: called with the inputs by name; returns the outputs by name.
        features: the case's feature names -> paths of the submodules that return them.
    """
    args = case.args
    dtype = {"float64": torch.float64, "float32": torch.float32}[args["dtype"]]
    module.to(dtype)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.eps, norm.momentum = args["bn_eps"], args["bn_momentum"]
    names = _fill(case, module, published)
    module.train(args["mode"] == "train")

    results = Results()

    def keep(feature: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            results.arrays["feature", feature] = output.detach().numpy()

        return hook

    for feature, path in (features or {}).items():
        module.get_submodule(path).register_forward_hook(keep(feature))

    inputs = {}
    for record in args["inputs"]:
        value = fill_input(record["fill"], record["shape"]) * record.get("scale", 1.0)
        inputs[record["arg"]] = torch.from_numpy(value).to(dtype).requires_grad_()
    outputs = forward(**inputs)
    for name, output in outputs.items():
        results.arrays["output", name] = output.detach().numpy()
    loss = [
        (outputs[c["output"]] * torch.from_numpy(fill_input(c["fill"], c["shape"])).to(dtype)).sum()
        for c in args["cotangents"]
    ]
    if loss:
        torch.stack(loss).sum().backward()
        for name, x in inputs.items():
            results.arrays["grad_input", name] = _numpy(x.grad)
        for name, parameter in module.named_parameters():
            results.arrays["grad_param", names[name]] = _numpy(parameter.grad)
    for name, buffer in module.named_buffers():
        results.arrays["buffer", names[name]] = buffer.numpy()
    return results


def _numpy(gradient: Tensor | None):
    return None if gradient is None else gradient.numpy()


def _fill(case: Case, module: nn.Module, published: Callable[[str], str | None]) -> dict[str, str]:
    """Fill the module by the published names; return our names -> published names."""
    names = {name: published(name) or name for name in module.state_dict()}
    ours = {names[name]: tuple(value.shape) for name, value in module.state_dict().items()}
    wrong = sorted(ours.items() ^ case.state_shapes.items())
    if wrong:
        raise CaseError(
            f"state_dict differs from the module's in {len(wrong)} entries: {wrong[:4]}"
        )
    values = {}
    for name, tensor in module.state_dict().items():
        filled = torch.from_numpy(fill_value(names[name], tensor.shape))
        values[name] = filled.to(tensor.dtype)
    module.load_state_dict(values)
    return names

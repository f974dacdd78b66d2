"""Which parameters share a learning-rate and a weight-decay factor."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from accel.models.convert import TABLES
from accel.models.detectors import Detector
from accel.models.msn import DeformConv
from accel.models.network import ClipNetwork

Policy = Literal[
    "tanet_original",
    "tanet_mmaction2",
    "masnet_original",
    "tdn_original",
    "msn_original",
    "amsnet_original",
    "amsnet_gym",
    "plain",
]

# Their released loops list factors and never apply them.
_UNAPPLIED = ("tdn_original", "msn_original")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one pair of factors."""

    name: str
    """Name in logs; for the published policies, the published name."""

    lr_mult: float
    """Factor on the scheduled learning rate."""

    decay_mult: float
    """Factor on the weight decay."""

    params: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameters by their name in the model, in module order; may be empty."""

    unapplied: tuple[float, float] | None = None
    """The published pair (lr, decay) where the released training loop ignores it."""


def parameter_groups(
    model: ClipNetwork, policy: Policy, *, fc_lr5: bool = True, partial_bn: bool | None = None
) -> list[ParameterGroup]:
    """The parameters of `model`, divided as a published recipe divides them.

    Policies:

    * "tanet_original" (the authors): the first convolution, other convolutions, batch norms
      without decay, linear weights at 5x, linear biases at 10x without decay.
    * "tanet_mmaction2": the same, but only the classifier is at 5x / 10x.
    * "masnet_original": the same without faster rates: the classifier joins the others.
    * "tdn_original", "msn_original": the same, but each at 1x with decay, because the released
      loops ignore the factors that they list (`ParameterGroup.unapplied`).
    * "amsnet_original": one group, everything with decay; "amsnet_gym" (fine-tuning on FineGym):
      the same, but the classifiers at 5x without decay.
    * "plain": everything with two or more dimensions with decay; norms and biases without.

    Parameters that are frozen, by partial batch normalization or by the network itself, are in no
    group. Empty groups of the published policies are kept.

    Args:
        model: the network; only names, modules and their order matter.
        policy: see above.
        fc_lr5: the faster rates of linear layers; false when fine-tuning from the same dataset:
            they then join the other weights (1x) and biases (2x). For the tanet policies; of no
            effect beyond names in "tdn_original" and "msn_original".
        partial_bn: list as if partial batch normalization were on (off); None: as the model is.

    Returns:
        The groups in the published order.

    Raises:
        ValueError: unknown policy, or a layer type for which the policy has no rule.
    """
    if policy not in get_args(Policy):
        raise ValueError(
            f"parameter_groups: policy must be one of {get_args(Policy)}, got {policy!r}."
        )
    frozen_bn = model.partial_bn if partial_bn is None else partial_bn
    if policy == "plain":
        return _plain_groups(model, frozen_bn)
    if policy in ("amsnet_original", "amsnet_gym"):
        return _amsnet_groups(model, frozen_bn, fast_classifier=policy == "amsnet_gym")
    groups = [
        ParameterGroup("first_conv_weight", 1, 1),
        ParameterGroup("first_conv_bias", 2, 0),
        ParameterGroup("normal_weight", 1, 1),
        ParameterGroup("normal_bias", 2, 0),
        ParameterGroup(
            "bn" if policy in ("tanet_mmaction2", "masnet_original") else "BN scale/shift", 1, 0
        ),
        ParameterGroup("custom" if policy == "masnet_original" else "custom_ops", 1, 1),
        ParameterGroup("lr5_weight", 5, 1),
        ParameterGroup("lr10_bias", 10, 0),
    ]
    first_weight, first_bias, weight, bias, norm, custom, fast_weight, fast_bias = groups
    if policy == "tanet_mmaction2":
        groups.remove(custom)
    if policy == "masnet_original" or (policy in _UNAPPLIED and not fc_lr5):
        groups = groups[:-2]

    first_conv = True
    for prefix, module in model.named_modules():
        params = dict(module.named_parameters(prefix, recurse=False))
        if not isinstance(module, _BatchNorm):  # whose listing may differ from the present state
            params = {name: param for name, param in params.items() if param.requires_grad}
        if not params:
            continue
        if isinstance(module, _ConvNd | DeformConv):
            _add(params, first_weight if first_conv else weight, first_bias if first_conv else bias)
            first_conv = False
        elif isinstance(module, nn.Linear):
            # Parity: the rule of the authors' code catches every linear layer, so the global
            # branch of TAM (G.0, G.3) trains at 5x; mmaction2 singles out the classifier.
            fast = fc_lr5 and (
                policy in ("tanet_original", *_UNAPPLIED)
                or (policy == "tanet_mmaction2" and module is model.head.fc)
            )
            _add(params, fast_weight if fast else weight, fast_bias if fast else bias)
        elif isinstance(module, _BatchNorm):
            if _trained(model, module, frozen_bn, policy):
                norm.params.update(params)
        else:
            raise ValueError(
                f'parameter_groups: policy "{policy}" has no rule for {type(module).__name__} '
                f'({prefix}); use "plain".'
            )
    if policy in _UNAPPLIED:
        # Parity: TDN, MSN: every parameter trains at the base rate with full decay, norms too.
        return [
            replace(group, lr_mult=1, decay_mult=1, unapplied=(group.lr_mult, group.decay_mult))
            for group in groups
        ]
    return groups


def detector_groups(model: Detector) -> list[ParameterGroup]:
    """The parameters of a detector as the published recipes divide them, four groups.

    Biases train at twice the rate without decay; those of the trunks at a T-th of their rate, T
    being the frames of a micro-tube.
    """
    # Parity: AMTNet: the rates of the trunks (names with "vgg", "extra" or "L2Norm") are divided
    # by the frames of a micro-tube, so that a second trunk, `core_extra`, is slowed as a whole.
    slow = 1 / model.num_frames
    trunk, trunk_bias = ParameterGroup("trunk", slow, 1), ParameterGroup("trunk_bias", 2 * slow, 0)
    heads, head_bias = ParameterGroup("heads", 1, 1), ParameterGroup("head_bias", 2, 0)
    for name, param in model.named_parameters():
        in_trunk = name.startswith(("base.", "extra."))
        weight, bias = (trunk, trunk_bias) if in_trunk else (heads, head_bias)
        (bias if name.endswith("bias") else weight).params[name] = param
    return [trunk, trunk_bias, heads, head_bias]


def _add(params: dict[str, nn.Parameter], weight: ParameterGroup, bias: ParameterGroup) -> None:
    for name, param in params.items():
        (bias if name.endswith(".bias") else weight).params[name] = param


def _trained(model: ClipNetwork, norm: _BatchNorm, frozen_bn: bool, policy: Policy) -> bool:
    if not frozen_bn or norm is model.stem_norm:
        return True
    # Parity: with partial batch normalization the authors' code lists the first norm of any kind
    # and no other, so the BatchNorm1d of TAM keep their gradients but are never updated.
    return policy != "tanet_original" and not isinstance(norm, nn.BatchNorm2d)


def _plain_groups(model: ClipNetwork, frozen_bn: bool) -> list[ParameterGroup]:
    decay, no_decay = ParameterGroup("decay", 1, 1), ParameterGroup("no_decay", 1, 0)
    for name, param in _trained_parameters(model, frozen_bn):
        (decay if param.dim() >= 2 else no_decay).params[name] = param
    return [decay, no_decay]


def _amsnet_groups(
    model: ClipNetwork, frozen_bn: bool, *, fast_classifier: bool
) -> list[ParameterGroup]:
    # Parity: amsnet: weight decay on everything, scales, shifts and biases included.
    others, classifier = ParameterGroup("all", 1, 1), ParameterGroup("classifier", 5, 0)
    fast = TABLES[model.system].classifier if fast_classifier else ()
    for name, param in _trained_parameters(model, frozen_bn):
        (classifier if name in fast else others).params[name] = param
    return [others, classifier] if fast_classifier else [others]


def _trained_parameters(model: ClipNetwork, frozen_bn: bool) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not _trained(model, module, frozen_bn, "plain"):
            continue
        for name, param in module.named_parameters(prefix, recurse=False):
            if param.requires_grad or isinstance(module, _BatchNorm):
                yield name, param

"""bn_act in training: norm and ReLU, with the pooled mean (before TAM), with a shortcut."""

from collections.abc import Iterator

from kernel_cases.case import Case, Code, Setting
from torch import Tensor

import kernels

# Form: (shortcut, pooled mean).
FORMS = {"norm": (False, False), "pooled": (False, True), "block": (True, False)}


def cases(setting: Setting) -> Iterator[Case]:
    """All forms at all sites."""
    for channels, size in setting.sites:
        for form, (shortcut, pool) in FORMS.items():
            x = setting.activation(channels, size)
            other = setting.activation(channels, size) if shortcut else None
            weight, bias = setting.coefficient(channels), setting.coefficient(channels)
            running = setting.coefficient(channels), setting.coefficient(channels).exp()

            def run(
                x: Tensor,
                weight: Tensor,
                bias: Tensor,
                other: Tensor | None,
                *,
                backend: str,
                running: tuple[Tensor, Tensor] = running,
                pool: bool = pool,
            ) -> Tensor | tuple[Tensor, Tensor]:
                return kernels.bn_act(
                    x,
                    weight,
                    bias,
                    *running,
                    other,
                    relu=True,
                    training=True,
                    momentum=0.1,
                    eps=1e-5,
                    pool=pool,
                    backend=backend,
                )

            def code(backend: str, *activations: Tensor | None, run=run, w=weight, b=bias) -> Code:
                def function(*inputs: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
                    return run(*inputs, backend=backend)

                return Code(function, (activations[0], w, b, activations[1]))

            # Statistics and apply each read x; the sums and dx each read grad and x.
            bytes_per_pass = x.numel() * x.element_size()
            mask = x.numel() // 8 if shortcut else 0
            yield Case(
                "bn_act",
                form,
                channels,
                size,
                {
                    "forward": (3 + shortcut) * bytes_per_pass + mask,
                    "backward": (5 + shortcut) * bytes_per_pass + 2 * mask,
                },
                {
                    setting.backend: code(setting.backend, x, other),
                    "reference": code("reference", x, other),
                    "original": code(
                        "reference", x.contiguous(), None if other is None else other.contiguous()
                    ),
                },
            )

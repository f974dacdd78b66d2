"""Published limits of NVIDIA cards: what a measured rate is a fraction of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One card. Tensor rates are dense (no sparsity) with accumulation in fp32, as cuDNN computes.

    Rates are peaks at the boost clock that the source states, 10^12 operations per second.
    """

    name: str
    """Part of the name that the driver reports."""
    architecture: str
    tensor16_tflops: float
    """fp16 and, from Ampere on, bf16."""
    tf32_tflops: float | None
    """None: the architecture has no tf32."""
    fp32_tflops: float
    bandwidth_gb_s: float
    """Device memory, 10^9 bytes per second."""
    source: str

    def peak_tflops(self, precision: str) -> float | None:
        """Peak of a precision mode (fp32, tf32, bf16, fp16); None: the card has no such units."""
        if precision == "fp32":
            return self.fp32_tflops
        if precision == "tf32":
            return self.tf32_tflops
        if precision == "bf16" and self.architecture == "Turing":
            return None
        return self.tensor16_tflops


_TURING = "NVIDIA Turing architecture white paper, reference boards"
_QUADRO = "NVIDIA Quadro RTX 6000 and 8000 data sheets"
_GA102 = "NVIDIA Ampere GA102 white paper"
_ADA = "NVIDIA Ada architecture white paper"

# GeForce cards of Turing, Ampere and Ada accumulate 16-bit products in fp32 at half of the
# advertised rate; the figures here are that half. More specific names come first.
CARDS = (
    Card("T4", "Turing", 65.0, None, 8.1, 320, "NVIDIA T4 data sheet"),
    Card("RTX 2080 Ti", "Turing", 53.8, None, 13.4, 616, _TURING),
    Card("RTX 2080 SUPER", "Turing", 44.6, None, 11.2, 496, _TURING),
    Card("RTX 2080", "Turing", 40.3, None, 10.1, 448, _TURING),
    Card("TITAN RTX", "Turing", 130.5, None, 16.3, 672, "NVIDIA Titan RTX product page"),
    Card("Quadro RTX 6000", "Turing", 130.5, None, 16.3, 672, _QUADRO),
    Card("Quadro RTX 8000", "Turing", 130.5, None, 16.3, 672, _QUADRO),
    Card("A100-SXM4-80GB", "Ampere", 312.0, 156.0, 19.5, 2039, "NVIDIA A100 data sheet"),
    Card("A100 80GB PCIe", "Ampere", 312.0, 156.0, 19.5, 1935, "NVIDIA A100 data sheet"),
    Card("A100", "Ampere", 312.0, 156.0, 19.5, 1555, "NVIDIA A100 data sheet, 40 GB"),
    Card("A30", "Ampere", 165.0, 82.0, 10.3, 933, "NVIDIA A30 data sheet"),
    Card("A40", "Ampere", 149.7, 74.8, 37.4, 696, "NVIDIA A40 data sheet"),
    Card("RTX A6000", "Ampere", 154.8, 77.4, 38.7, 768, _GA102),
    Card("A10", "Ampere", 125.0, 62.5, 31.2, 600, "NVIDIA A10 data sheet"),
    Card("RTX 3090", "Ampere", 71.0, 35.6, 35.6, 936, _GA102),
    Card("RTX 3080", "Ampere", 59.5, 29.8, 29.8, 760, _GA102),
    Card("L40S", "Ada", 362.0, 183.0, 91.6, 864, "NVIDIA L40S data sheet"),
    Card("L40", "Ada", 181.0, 90.5, 90.5, 864, "NVIDIA L40 data sheet"),
    Card("L4", "Ada", 121.0, 60.0, 30.3, 300, "NVIDIA L4 data sheet"),
    Card("RTX 6000 Ada", "Ada", 364.2, 182.1, 91.1, 960, "NVIDIA RTX 6000 Ada data sheet"),
    Card("RTX 4090", "Ada", 165.2, 82.6, 82.6, 1008, _ADA),
    Card("RTX 4080", "Ada", 97.5, 48.7, 48.7, 717, _ADA),
    Card("H200", "Hopper", 989.0, 494.0, 67.0, 4800, "NVIDIA H200 data sheet"),
    Card("H100 NVL", "Hopper", 835.0, 417.0, 60.0, 3900, "NVIDIA H100 data sheet"),
    Card("H100 PCIe", "Hopper", 756.0, 378.0, 51.0, 2000, "NVIDIA H100 data sheet"),
    Card("H100", "Hopper", 989.0, 494.0, 67.0, 3350, "NVIDIA H100 data sheet, SXM"),
)


def find_card(device_name: str) -> Card | None:
    """The card that a driver's device name means ("NVIDIA GeForce RTX 2080 Ti"), or None."""
    words = f" {device_name.lower().replace('/', ' ')} "
    for card in CARDS:
        name = card.name.lower()
        # "A10" is not "A100", and "L4" not "L40": a name ends where a word or a hyphen does.
        if any(f" {name}{end}" in words for end in (" ", "-")):
            return card
    return None

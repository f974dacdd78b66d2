"""Published limits of NVIDIA cards: what a measured rate is a fraction of.

Every card has the document its figures come from; a card without one is not listed.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One card. Tensor rates are dense (no sparsity) with accumulation in fp32, as cuDNN computes.

    Rates are peaks at the boost clock that the source states, 10^12 operations per second.
    """

    name: str
    """As the driver reports it, without the maker and the family (GeForce, Tesla)."""
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


_NVIDIA = "www.nvidia.com/content"
_T4 = "T4 product page, www.nvidia.com/en-us/data-center/tesla-t4 (320+ GB/s; its data sheet: 300)"
_BLOG = "developer.nvidia.com/blog/nvidia-turing-architecture-in-depth"
_TURING = f"Turing white paper, reference boards, {_BLOG}"
_TITAN = "Titan RTX product page; the chip and clocks are those of the Quadro RTX 6000"
_A100 = f"A100 data sheet, {_NVIDIA}/dam/en-zz/Solutions/Data-Center/a100/pdf"
_A100_40 = "A100 white paper, images.nvidia.com (nvidia-ampere-architecture-whitepaper.pdf)"
_A30 = "A30 data sheet, www.nvidia.com/en-us/data-center/products/a30-gpu"
_A40 = "A40 data sheet, images.nvidia.com (nvidia-a40-datasheet.pdf)"
_A10 = f"A10 data sheet, {_NVIDIA}/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"
_GA102 = f"GA102 white paper 2.0, {_NVIDIA}/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2"
_ADA = "Ada white paper, images.nvidia.com (nvidia-ada-gpu-architecture.pdf)"
_L40 = "L40 and L40S data sheets, www.nvidia.com/en-us/data-center/l40s"
_L4 = "L4 product page, www.nvidia.com/en-us/data-center/l4"
_H100 = "H100 data sheet, resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "H200 data sheet, resources.nvidia.com (hpc-datasheet-sc23-h200)"

# Data sheets print rates with sparsity, which are twice the figures here. GeForce cards of Turing,
# Ampere and Ada, and the L40, accumulate 16-bit products in fp32 at half of the advertised rate;
# the figures here are that half.
CARDS = (
    Card("T4", "Turing", 65.0, None, 8.1, 320, _T4),
    Card("RTX 2080 Ti", "Turing", 53.8, None, 13.4, 616, _TURING),
    Card("TITAN RTX", "Turing", 130.5, None, 16.3, 672, _TITAN),
    Card("Quadro RTX 6000", "Turing", 130.5, None, 16.3, 672, _TURING),
    Card("A100-SXM4-80GB", "Ampere", 312.0, 156.0, 19.5, 2039, _A100),
    Card("A100 80GB PCIe", "Ampere", 312.0, 156.0, 19.5, 1935, _A100),
    Card("A100-SXM4-40GB", "Ampere", 312.0, 156.0, 19.5, 1555, _A100_40),
    Card("A100-PCIE-40GB", "Ampere", 312.0, 156.0, 19.5, 1555, _A100_40),
    Card("A30", "Ampere", 165.0, 82.0, 10.3, 933, _A30),
    Card("A40", "Ampere", 149.7, 74.8, 37.4, 696, _A40),
    Card("A10", "Ampere", 125.0, 62.5, 31.2, 600, _A10),
    Card("RTX A6000", "Ampere", 154.8, 77.4, 38.7, 768, _GA102),
    Card("RTX 3090", "Ampere", 71.0, 35.6, 35.6, 936, _GA102),
    Card("L40S", "Ada", 362.0, 183.0, 91.6, 864, _L40),
    Card("L40", "Ada", 181.0, 90.5, 90.5, 864, _L40),
    Card("L4", "Ada", 121.0, 60.0, 30.3, 300, _L4),
    Card("RTX 4090", "Ada", 165.2, 82.6, 82.6, 1008, _ADA),
    Card("H200", "Hopper", 989.0, 494.0, 67.0, 4800, _H200),
    Card("H100 PCIe", "Hopper", 756.0, 378.0, 51.0, 2000, _H100),
    Card("H100 80GB HBM3", "Hopper", 989.0, 494.0, 67.0, 3350, _H100 + ", SXM"),
)


def find_card(device_name: str) -> Card | None:
    """The card that a driver's device name means ("NVIDIA GeForce RTX 2080 Ti"), or None.

    Only whole names count: an "RTX 3090 Ti", an "RTX 4090 Laptop GPU" or an "H200 NVL" is another
    card than the one whose name begins alike.
    """
    name = re.sub(r"^(nvidia |geforce |tesla )*", "", " ".join(device_name.lower().split()))
    return next((card for card in CARDS if card.name.lower() == name), None)

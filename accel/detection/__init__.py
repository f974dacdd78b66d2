"""Everything about boxes and tubes that is not a network.

Training (tensor code, nothing waits for the device): boxes, priors, matching, mining, losses, and
detect. Evaluation (vectorized NumPy): candidates, fusion, linking, labelling, average_precision,
video_ap.
"""

"""Boxes, priors, matching, hard-negative mining and losses of detection; tensor code only."""

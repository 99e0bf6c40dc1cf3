"""Dual Pseudo Training (DPT, NeurIPS 2023, arXiv 2302.10586) as a Ray-distributed pipeline."""

"""Trains and uses goal-conditioned reward models for Llama-family language models."""

__version__ = "0.1.0"

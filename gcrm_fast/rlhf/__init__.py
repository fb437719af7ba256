"""Reward models inside other trainers."""

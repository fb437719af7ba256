"""Faults that `make mutants` plants, a file per folder that they are planted in, or per subject."""

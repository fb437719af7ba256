"""A trained reward model in use: scoring and serving."""
